package governor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// An api allows so many calls a second, as a token bucket that holds a second's
// worth.
type api struct {
	mu    sync.Mutex
	rate  float64
	level float64
	at    time.Time
	tell  bool // it sends the ratelimit headers
	calls int
	full  int // refused
}

func newAPI(rate float64) *api { return &api{rate: rate, level: rate, at: time.Now()} }

func (a *api) call() (int, http.Header) {
	time.Sleep(50 * time.Millisecond) // of the bubble's clock
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	a.level = min(a.rate, a.level+now.Sub(a.at).Seconds()*a.rate)
	a.at = now
	a.calls++
	h := http.Header{}
	status := http.StatusOK
	if a.level < 1 {
		a.full++
		h.Set("Retry-After", "1")
		status = http.StatusTooManyRequests
	} else {
		a.level--
	}
	if a.tell {
		h.Set(headerPrefix+"Requests-Limit", strconv.Itoa(int(a.rate)))
		h.Set(headerPrefix+"Requests-Remaining", strconv.Itoa(int(a.level)))
		h.Set(headerPrefix+"Requests-Reset", now.Add(time.Duration((a.rate-a.level)/a.rate*float64(time.Second))).Format(time.RFC3339Nano))
	}
	return status, h
}

// fleet makes calls calls from each of forks forks and returns how long each
// took to get done with all of them.
func fleet(t *testing.T, g *Governor, a *api, forks, calls int) []time.Duration {
	t.Helper()
	began := time.Now()
	took := make([]time.Duration, forks)
	var all sync.WaitGroup
	for f := range forks {
		all.Go(func() {
			for range calls {
				for {
					p, err := g.Acquire(t.Context(), "model", fmt.Sprint(f), 1000)
					if err != nil {
						t.Error(err)
						return
					}
					status, h := a.call()
					p.Done(status, h)
					if status == http.StatusOK {
						break
					}
				}
			}
			took[f] = time.Since(began)
		})
	}
	all.Wait()
	return took
}

func TestFiftyForksAreHardlyEverRefused(t *testing.T) {
	for _, tell := range []bool{false, true} {
		t.Run(fmt.Sprintf("headers=%v", tell), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAPI(10)
				a.tell = tell
				g := New(Options{})
				took := fleet(t, g, a, 50, 20)
				if a.full*50 > a.calls {
					t.Errorf("%d of %d calls were refused, more than 2 %%", a.full, a.calls)
				}
				best := 1000 / a.rate
				var last, first time.Duration
				for _, d := range took {
					last = max(last, d)
					if first == 0 || d < first {
						first = d
					}
				}
				if last.Seconds() > 1.6*best {
					t.Errorf("a thousand calls took %v, the limit allows them in %.0f s", last, best)
				}
				if first.Seconds() < 0.8*last.Seconds() {
					t.Errorf("the first fork was done after %v, the last after %v: they do not share", first, last)
				}
				if s := g.Stats(); s.Calls != int64(a.calls) || s.Refused != int64(a.full) || s.Waiting != 0 {
					t.Errorf("stats %+v, want %d calls and %d refused", s, a.calls, a.full)
				}
				t.Logf("%d calls, %d refused, %v", a.calls, a.full, last)
			})
		})
	}
}

func TestAGenerousLimitIsFoundInSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(500)
		began := time.Now()
		fleet(t, New(Options{}), a, 100, 50)
		if d := time.Since(began); d > 30*time.Second {
			t.Errorf("5000 calls took %v where 10 s would do", d)
		}
	})
}

func TestAFewCallsDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Options{})
		began := time.Now()
		for i := range defaultRate {
			if _, err := g.Acquire(t.Context(), "model", fmt.Sprint(i), 1); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("the first calls waited %v", d)
		}
	})
}

func TestABusyForkDoesNotStarveAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Options{Rate: 1, Most: 1})
		var served atomic.Int64
		ctx, stop := context.WithCancel(t.Context())
		var busy sync.WaitGroup
		for range 100 {
			busy.Go(func() {
				if _, err := g.Acquire(ctx, "model", "busy", 1); err == nil {
					served.Add(1)
				}
			})
		}
		synctest.Wait()
		if _, err := g.Acquire(t.Context(), "model", "modest", 1); err != nil {
			t.Fatal(err)
		}
		if n := served.Load(); n > 3 {
			t.Errorf("%d calls of the busy fork went first", n)
		}
		stop()
		busy.Wait()
		if w := g.Stats().Waiting; w != 0 {
			t.Errorf("%d still wait after they gave up", w)
		}
	})
}

func TestRetryAfterHoldsEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Options{})
		p, err := g.Acquire(t.Context(), "model", "1", 1)
		if err != nil {
			t.Fatal(err)
		}
		p.Done(http.StatusTooManyRequests, http.Header{"Retry-After": {"7"}})
		p.Done(http.StatusTooManyRequests, http.Header{"Retry-After": {"700"}}) // said once already
		began := time.Now()
		if _, err := g.Acquire(t.Context(), "other model", "2", 1); err != nil || time.Since(began) != 0 {
			t.Errorf("another model waits %v, %v", time.Since(began), err)
		}
		if _, err := g.Acquire(t.Context(), "model", "2", 1); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d < 7*time.Second || d > 10*time.Second {
			t.Errorf("the next call went out after %v, the API asked for 7 s", d)
		}
	})
}

func TestTokensThatAreUsedUpAreWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Options{})
		p, err := g.Acquire(t.Context(), "model", "1", 1)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		p.Done(http.StatusOK, http.Header{
			headerPrefix + "Input-Tokens-Limit":     {"60000"},
			headerPrefix + "Input-Tokens-Remaining": {"0"},
			headerPrefix + "Input-Tokens-Reset":     {now.Add(time.Minute).Format(time.RFC3339)},
		})
		if _, err := g.Acquire(t.Context(), "model", "1", 30000); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(now); d < 29*time.Second || d > 32*time.Second {
			t.Errorf("30,000 tokens at 1,000 a second were waited for %v", d)
		}
	})
}

func TestWhoGivesUpIsToldWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Options{Rate: 1, Most: 1})
		why := errors.New("why")
		ctx, cancel := context.WithCancelCause(t.Context())
		if _, err := g.Acquire(ctx, "model", "1", 1); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Millisecond, func() { cancel(why) })
		if _, err := g.Acquire(ctx, "model", "1", 1); !errors.Is(err, why) {
			t.Errorf("error %v, want the cause", err)
		}
	})
}

// FuzzHeaders reads what an API, or somebody in its place, says: no wait may
// be negative or without end.
func FuzzHeaders(f *testing.F) {
	f.Add("10", "0", "2026-11-23T00:00:00Z", "1", "")
	f.Add("NaN", "Inf", "0001-01-01T00:00:00Z", "-1", "NaN")
	f.Add("1e300", "1e300", "9999-12-31T23:59:59Z", "1e300", "1e300")
	f.Fuzz(func(t *testing.T, limit, left, reset, after, ms string) {
		h := http.Header{
			headerPrefix + "Requests-Limit": {limit}, headerPrefix + "Requests-Remaining": {left}, headerPrefix + "Requests-Reset": {reset},
			"Retry-After": {after}, "Retry-After-Ms": {ms},
		}
		now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
		if d := retryAfter(now, h); d < leastPause || d > mostPause {
			t.Errorf("retry after %v", d)
		}
		var a allowance
		a.read(now, h, "requests")
		if d := a.wait(now, 1); d < 0 || d > time.Hour {
			t.Errorf("wait %v", d)
		}
	})
}
