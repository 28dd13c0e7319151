// Package governor spreads the calls of a whole fleet so that the model API's
// rate limits are met by waiting here, not by being refused there.
//
// All forks share what an API account allows. N agents that each meet a limit
// by themselves back off and come back together; one governor in front of them
// sends at the pace that the API's answers show it can take:
//
//	Acquire(model, fork) -> the call -> Done(status, header)
//
// For each model there is one bucket. Its rate starts low, doubles in a second
// while nothing is refused and somebody waits, falls when a call is refused
// (429, 529), and from then on feels its way up slowly. What an answer says
// outright (the anthropic-ratelimit-* headers, retry-after) counts more than
// what was felt. Those who wait are served in turn, fork by fork, so one busy
// fork cannot starve the others.
package governor

import (
	"context"
	"math"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// Options say how carefully a governor begins. The zero value is for an
// account of which nothing is known.
type Options struct {
	// Rate is how many calls a second a model gets before anything is known.
	// 0: 8.
	Rate float64

	// Most is the highest rate that is ever tried, in calls a second. 0: 2000.
	Most float64
}

const (
	defaultRate = 8
	defaultMost = 2000
	// leastRate keeps a model that is refused all the time alive: a call in
	// ten seconds finds out when it is over.
	leastRate = 0.1
	// burst is how many seconds of the rate may be sent at once.
	burst = 0.5
)

// What a refusal does to the rate.
const (
	limited    = 0.7 // 429: we were too fast, by little
	overloaded = 0.5 // 529: the API itself is in trouble
	// climb is by how much of itself the rate grows in a second once a limit
	// was met: slowly enough that feeling for the limit costs about one
	// refused call in a hundred.
	climb = 0.02
)

// A Governor spreads calls. Its methods may be called from many goroutines.
// The zero value is of no use; see [New].
type Governor struct {
	rate, most float64

	mu      sync.Mutex
	buckets map[string]*bucket
	stats   Stats
}

// Stats count since the start.
type Stats struct {
	Calls    int64         // that were let through
	Delayed  int64         // of them, those that had to wait
	Refused  int64         // of them, those that the API answered with 429 or 529
	Waiting  int64         // that wait now
	WaitTime time.Duration // of all that were delayed, together
}

// New returns a governor that knows nothing yet.
func New(o Options) *Governor {
	if o.Rate <= 0 {
		o.Rate = defaultRate
	}
	if o.Most <= 0 {
		o.Most = defaultMost
	}
	return &Governor{rate: min(o.Rate, o.Most), most: o.Most, buckets: map[string]*bucket{}}
}

// Stats returns what has happened so far.
func (g *Governor) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stats
}

// Acquire returns when a call to the model may go out for the fork, or with
// the cause of ctx when that is done first. The call is expected to use tokens
// of input. Done must be called on the permit.
func (g *Governor) Acquire(ctx context.Context, model, fork string, tokens int64) (*Permit, error) {
	g.mu.Lock()
	b := g.buckets[model]
	if b == nil {
		b = newBucket(g, time.Now())
		g.buckets[model] = b
	}
	w := &waiter{tokens: tokens, since: time.Now(), ready: make(chan struct{})}
	b.push(fork, w)
	g.stats.Waiting++
	b.dispatch(time.Now())
	g.mu.Unlock()

	select {
	case <-w.ready:
		return &Permit{b: b, began: w.began}, nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !b.drop(fork, w) {
		// It was let through at the same moment.
		return &Permit{b: b, began: w.began}, nil
	}
	g.stats.Waiting--
	return nil, context.Cause(ctx)
}

// A Permit lets one call through.
type Permit struct {
	b     *bucket
	began time.Time
	once  sync.Once
}

// Done tells what the API answered: its status, or 0 when there was no answer,
// and the header, which may be nil. A second call does nothing.
func (p *Permit) Done(status int, header http.Header) {
	p.once.Do(func() {
		p.b.g.mu.Lock()
		defer p.b.g.mu.Unlock()
		now := time.Now()
		p.b.learn(p.began, now, status, header)
		p.b.dispatch(now)
	})
}

// A waiter is one call that wants to go out.
type waiter struct {
	tokens int64
	since  time.Time
	began  time.Time // when it was let through
	ready  chan struct{}
}

// A line is the calls of one fork. Its turn is a virtual time: the line with
// the lowest is served next, and each call moves it on by one.
type line struct {
	waiting []*waiter
	turn    float64
}

// A bucket paces the calls to one model. Everything in it is guarded by the
// governor's mutex.
type bucket struct {
	g     *Governor
	lines map[string]*line
	turn  float64 // of the line served last: where a new one starts

	rate    float64 // calls a second
	known   bool    // a limit was met, so the rate is about right
	level   float64 // calls that may go out now
	at      time.Time
	until   time.Time // nothing goes out before
	lowered time.Time // what began before says nothing of the present rate
	tokens  allowance // of input tokens, as the API told it
	calls   allowance // of requests, as the API told it
	timer   *time.Timer
}

func newBucket(g *Governor, now time.Time) *bucket {
	return &bucket{g: g, lines: map[string]*line{}, rate: g.rate, level: g.rate, at: now}
}

func (b *bucket) push(fork string, w *waiter) {
	l := b.lines[fork]
	if l == nil {
		l = &line{turn: b.turn}
		b.lines[fork] = l
	}
	l.waiting = append(l.waiting, w)
}

// drop takes w out of its line and reports whether it was still there.
func (b *bucket) drop(fork string, w *waiter) bool {
	l := b.lines[fork]
	if l == nil {
		return false
	}
	for i, other := range l.waiting {
		if other == w {
			l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
			b.tidy(fork, l)
			return true
		}
	}
	return false
}

// tidy forgets a line that nobody stands in. A fork that comes back starts at
// the present turn, neither behind nor ahead.
func (b *bucket) tidy(fork string, l *line) {
	if len(l.waiting) == 0 && l.turn <= b.turn {
		delete(b.lines, fork)
	}
}

// next returns the line whose turn it is, or nil when nobody waits.
func (b *bucket) next() (fork string, next *line) {
	for f, l := range b.lines {
		if len(l.waiting) == 0 {
			b.tidy(f, l)
			continue
		}
		if next == nil || l.turn < next.turn || l.turn == next.turn && l.waiting[0].since.Before(next.waiting[0].since) {
			fork, next = f, l
		}
	}
	return fork, next
}

// dispatch lets through whom it can, and sets the clock for the next one.
func (b *bucket) dispatch(now time.Time) {
	b.refill(now)
	for {
		_, l := b.next()
		if l == nil {
			return
		}
		w := l.waiting[0]
		wait := b.wait(now, w.tokens)
		if wait > 0 {
			b.wake(wait)
			return
		}
		l.waiting = l.waiting[1:]
		b.turn = l.turn
		l.turn++
		b.level--
		b.calls.take(1)
		b.tokens.take(float64(w.tokens))
		w.began = now
		b.g.stats.Waiting--
		b.g.stats.Calls++
		if d := now.Sub(w.since); d > time.Millisecond {
			b.g.stats.Delayed++
			b.g.stats.WaitTime += d
		}
		close(w.ready)
	}
}

// wait returns how long a call of so many tokens has to wait.
func (b *bucket) wait(now time.Time, tokens int64) time.Duration {
	wait := b.until.Sub(now)
	if b.level < 1 {
		wait = max(wait, seconds((1-b.level)/b.rate))
	}
	return max(wait, b.calls.wait(now, 1), b.tokens.wait(now, float64(tokens)))
}

func (b *bucket) wake(in time.Duration) {
	if b.timer != nil {
		b.timer.Stop()
	}
	b.timer = time.AfterFunc(in, func() {
		b.g.mu.Lock()
		defer b.g.mu.Unlock()
		b.dispatch(time.Now())
	})
}

func (b *bucket) refill(now time.Time) {
	most := max(1, b.rate*burst)
	if !b.known {
		most = max(1, b.g.rate) // the first ones need not queue
	}
	b.level = min(most, b.level+now.Sub(b.at).Seconds()*b.rate)
	b.at = now
}

// learn takes in how a call that began then was answered now.
func (b *bucket) learn(began, now time.Time, status int, h http.Header) {
	b.refill(now)
	b.calls.read(now, h, "requests")
	b.tokens.read(now, h, "input-tokens")
	switch status {
	case http.StatusTooManyRequests, StatusOverloaded:
		b.g.stats.Refused++
		if until := now.Add(spread(retryAfter(now, h))); until.After(b.until) {
			b.until = until
		}
		if began.Before(b.lowered) {
			return // one of those that were under way already
		}
		factor := limited
		if status == StatusOverloaded {
			factor = overloaded
		}
		b.rate = max(leastRate, b.rate*factor)
		b.known, b.lowered = true, now
		b.level = min(b.level, 0)
	case 0:
	default:
		if status/100 != 2 || began.Before(b.lowered) || b.g.stats.Waiting == 0 {
			return // nobody waits: the rate is high enough
		}
		if b.known {
			// A call a second at this rate is 1/rate of what there is.
			b.rate += climb
		} else {
			b.rate++
		}
		b.rate = min(b.rate, b.g.most)
	}
}

// StatusOverloaded is what the Anthropic API answers when it cannot keep up,
// whoever asks (docs: API, Errors, "529 - overloaded_error").
const StatusOverloaded = 529

// spread adds up to a fifth, so that two governors of one account do not come
// back together.
func spread(d time.Duration) time.Duration {
	return d + time.Duration(rand.Int64N(int64(d)/5+1))
}

func seconds(s float64) time.Duration {
	if !(s > 0) { // not a number, too
		return 0
	}
	return time.Duration(math.Ceil(min(s, 3600) * float64(time.Second)))
}
