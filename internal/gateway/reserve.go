package gateway

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A call is one reservation, and what is known of what it was made for.
type call struct {
	g       *Gateway
	id      int64
	grant   *grant
	fork    *forkAccount
	model   string
	path    string
	prices  string
	attempt int
	ask     ask
	output  int64    // the max_tokens that it may ask for
	hold    fork.USD // what is reserved
	started time.Time
	settled sync.Once
}

// A settlement is how a call ended.
type settlement struct {
	tokens    Tokens
	cost      fork.USD
	model     string
	state     string
	status    int
	requestID string
	note      string
	ended     time.Time
}

// The states that a call ends in; the ledger's schema says what they mean.
const (
	stateSettled = "settled"
	stateFailed  = "failed"
)

// A verdict says whether a call can be paid.
type verdict int

const (
	pays  verdict = iota
	later         // when other calls have settled, it may fit
	never         // it does not fit, even if all others cost nothing
	gone          // its token was revoked
)

// A waiter is a call that waits for others to settle.
type waiter struct {
	call     *call
	verdict  verdict
	short    shortage
	recorded *entry
	answered chan struct{} // closed once verdict is set
}

// A shortage says which budget does not suffice.
type shortage struct {
	whose  string
	budget fork.USD
	left   fork.USD
	need   fork.USD
}

func (s shortage) String() string {
	return fmt.Sprintf("The budget of %s does not cover this call: %s of %s is left, and the call may cost %s.",
		s.whose, max(s.left, 0), s.budget, s.need)
}

// fit says whether the call can be paid now, with how many output tokens, or
// else which budget is short. The caller holds g.mu.
func (c *call) fit() (out int64, v verdict, short shortage) {
	if c.grant.revoked {
		return 0, gone, short
	}
	a := c.ask
	now, settled := fork.USD(math.MaxInt64), fork.USD(math.MaxInt64)
	helps := false // waiting could
	limited := false
	for i, p := range c.fork.purses() {
		if p.budget == 0 {
			continue
		}
		limited = true
		left := p.budget - p.spent.Cost
		now = min(now, left-p.reserved)
		if left-p.reserved < a.cost(a.enough) && p.reserved > 0 {
			helps = true
		}
		if left < settled {
			settled = left
			short = shortage{whose: "run " + c.fork.run.name, budget: p.budget, left: left, need: a.cost(a.least)}
			if i == 0 {
				short.whose = fmt.Sprintf("fork %s/%d", c.fork.run.name, c.fork.num)
			}
		}
	}
	switch {
	case !limited:
		return a.want, pays, short
	case settled < a.cost(a.least):
		return 0, never, short
	case now >= a.cost(a.enough), now >= a.cost(a.least) && !helps:
		out = a.want
		if a.perToken > 0 {
			out = min(out, int64((now-a.fixed)/a.perToken))
		}
		return out, pays, short
	}
	return 0, later, short
}

// take books the reservation. The caller holds g.mu and waits for the entry
// before anything is forwarded.
func (c *call) take(out int64) *entry {
	c.output = out
	c.hold = c.ask.cost(out)
	for _, p := range c.fork.purses() {
		p.reserved += c.hold
	}
	c.g.lastID++
	c.id = c.g.lastID
	e := c.g.ledger.insertCall(c)
	c.g.ledger.append(e)
	return e
}

// reserve holds the most that c can cost in every budget it is paid from, and
// returns when that is on the disk. A call that fits only after others have
// settled waits for them; one that never fits is refused.
func (g *Gateway) reserve(ctx context.Context, c *call) *refusal {
	g.mu.Lock()
	out, v, short := c.fit()
	// It passes no waiter that could have had the same money: each of them was
	// tried at the last change and did not fit.
	var recorded *entry
	switch v {
	case pays:
		recorded = c.take(out)
		g.mu.Unlock()
	case later:
		w := &waiter{call: c, answered: make(chan struct{})}
		c.fork.run.waiting = append(c.fork.run.waiting, w)
		g.mu.Unlock()
		if r := g.await(ctx, w); r != nil {
			return r
		}
		v, short, recorded = w.verdict, w.short, w.recorded
	default:
		g.mu.Unlock()
	}
	switch v {
	case never:
		return g.broke(c, short)
	case gone:
		return refuseToken()
	}
	if err := <-recorded.done; err != nil {
		g.void(c)
		g.log.Warn("a call is refused because its reservation cannot be written", "run", c.fork.run.name, "fork", c.fork.num, "error", err)
		return refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot write its ledger, and forwards nothing unmetered.")
	}
	return nil
}

// await waits until w has a verdict. A call that cannot wait any longer is told
// to come again, not that the budget is gone.
func (g *Gateway) await(ctx context.Context, w *waiter) *refusal {
	late := time.NewTimer(g.limits.wait)
	defer late.Stop()
	var r *refusal
	select {
	case <-w.answered:
		return nil
	case <-late.C:
		r = refuse(http.StatusTooManyRequests, "rate_limit_error", "What is left of the budget is held by other calls.")
		r.after = 5 * time.Second
	case <-ctx.Done():
		r = refuse(http.StatusServiceUnavailable, "api_error", "The call was given up while it waited for other calls.")
	case <-g.closing.Done():
		r = refuse(http.StatusServiceUnavailable, "api_error", "The gateway is closing.")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-w.answered: // in the very moment
		return nil
	default:
	}
	run := w.call.fork.run
	run.waiting = slices.DeleteFunc(run.waiting, func(o *waiter) bool { return o == w })
	return r
}

// serve gives a verdict to the waiters of a run that can have one, oldest
// first. The caller holds g.mu.
func (g *Gateway) serve(r *runAccount) {
	r.waiting = slices.DeleteFunc(r.waiting, func(w *waiter) bool {
		out, v, short := w.call.fit()
		if v == later {
			return false
		}
		w.verdict, w.short = v, short
		if v == pays {
			w.recorded = w.call.take(out)
		}
		close(w.answered)
		return true
	})
}

// broke refuses a call for which there is no money.
func (g *Gateway) broke(c *call, short shortage) *refusal {
	g.mu.Lock()
	for _, p := range c.fork.purses() {
		p.spent.Refused++
	}
	n := c.fork.spent.Refused
	g.ledger.append(g.ledger.countRefusal(c.grant.hash))
	g.mu.Unlock()
	if seldom(int64(n)) {
		g.log.Info("call refused: over budget", "run", c.fork.run.name, "fork", c.fork.num, "model", c.model,
			"whose", short.whose, "left", short.left.String(), "need", short.need.String(), "refused", n)
	}
	r := refuse(http.StatusPaymentRequired, "billing_error", short.String())
	r.final = true
	return r
}

// seldom is true for 1, 2, 4, 8 …: what an agent can repeat as fast as it likes
// must not fill the log.
func seldom(n int64) bool { return n&(n-1) == 0 }

// void takes back a reservation that may or may not be on the disk.
func (g *Gateway) void(c *call) {
	c.settled.Do(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, p := range c.fork.purses() {
			p.reserved -= c.hold
		}
		g.ledger.append(g.ledger.settleCall(c.id, settlement{model: c.model, state: stateFailed, note: "never forwarded", ended: time.Now()}))
		g.serve(c.fork.run)
	})
}

// settle replaces the reservation by the cost. Only the first settlement of a
// call counts.
func (c *call) settle(s settlement) {
	c.settled.Do(func() {
		g := c.g
		s.ended = time.Now()
		if s.model == "" {
			s.model = c.model
		}
		used := Spent{Calls: 1, Usage: fork.Usage{
			Cost:             s.cost,
			InputTokens:      s.tokens.Input,
			OutputTokens:     s.tokens.Output,
			CacheReadTokens:  s.tokens.CacheRead,
			CacheWriteTokens: s.tokens.CacheWrite5m + s.tokens.CacheWrite1h,
		}}
		g.mu.Lock()
		for _, p := range c.fork.purses() {
			p.reserved -= c.hold
			p.spent = p.spent.add(used)
		}
		c.fork.dense = c.fork.dense || s.tokens.prompt() > c.ask.prompt
		g.ledger.append(g.ledger.settleCall(c.id, s))
		g.serve(c.fork.run)
		g.mu.Unlock()

		log := g.log.With("run", c.fork.run.name, "fork", c.fork.num, "call", c.id, "model", s.model, "status", s.status, "state", s.state)
		if s.cost > c.hold {
			log.Warn("a call cost more than was reserved for it", "cost", s.cost.String(), "reserved", c.hold.String(),
				"prompt", s.tokens.prompt(), "estimate", c.ask.prompt)
		}
		log.Debug("call settled", "input", s.tokens.Input, "write_5m", s.tokens.CacheWrite5m, "write_1h", s.tokens.CacheWrite1h,
			"read", s.tokens.CacheRead, "output", s.tokens.Output, "cost", s.cost.String(), "reserved", c.hold.String(),
			"attempt", c.attempt, "took", s.ended.Sub(c.started).Round(time.Millisecond).String(), "note", s.note)
	})
}
