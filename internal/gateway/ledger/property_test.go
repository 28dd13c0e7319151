package ledger

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

// A world is some gateways that share a ledger, and crash.
type world struct {
	t       *testing.T
	options []Options
	mu      sync.RWMutex
	open    []*Ledger
	billed  atomic.Int64 // by the API, for calls that were forwarded
	paid    atomic.Int64 // calls that were forwarded
	refused atomic.Int64
	crashes atomic.Int64

	batches sync.Map     // what each bills in the end, by the API's name for it
	made    atomic.Int64 // of them
}

func newWorld(t *testing.T, options ...Options) *world {
	w := &world{t: t, options: options}
	for _, o := range options {
		l, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		w.open = append(w.open, l)
	}
	t.Cleanup(func() {
		for _, l := range w.open {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return w
}

func (w *world) ledger(n int) *Ledger {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.open[n]
}

// crash kills a gateway and starts it again, while its callers go on.
func (w *world) crash(n int) {
	l := w.ledger(n)
	l.crash()
	again, err := Open(context.Background(), w.options[n])
	if err != nil {
		w.t.Errorf("after a crash: %v", err)
		return
	}
	w.crashes.Add(1)
	w.mu.Lock()
	w.open[n] = again
	w.mu.Unlock()
}

// agent is a fork that makes calls, as agents do.
func (w *world) agent(n int, run string, num, calls int, rnd *rand.Rand) {
	var side sync.WaitGroup // sub-agents
	defer side.Wait()
	for range calls {
		r := request(run, num, Ask{Fixed: fork.USD(rnd.Int64N(2000)), PerToken: fork.USD(rnd.Int64N(3)), Want: rnd.Int64N(4000)})
		r.Ask.Least = min(r.Ask.Want, 100)
		r.Ask.Enough = min(r.Ask.Want, 1000)
		r.Patience = time.Duration(rnd.Int64N(300)) * time.Millisecond
		r.Model = []string{"m", "n\x00", "o\xff"}[rnd.IntN(3)]
		ctx, cancel := context.WithCancel(context.Background())
		if rnd.IntN(8) == 0 {
			time.AfterFunc(time.Duration(rnd.IntN(20))*time.Millisecond, cancel)
		}
		fate, share, pause := rnd.IntN(10), rnd.Float64(), time.Duration(rnd.IntN(2000))*time.Microsecond
		call := func() {
			defer cancel()
			if fate >= 8 {
				w.batch(ctx, n, r, share, fate == 9)
				return
			}
			c, err := w.ledger(n).Reserve(ctx, r)
			if err != nil {
				w.blame(err)
				return
			}
			if c.Reserved != r.Ask.Cost(c.Output) || c.Output > r.Ask.Want {
				w.t.Errorf("%+v for %+v", c, r.Ask)
			}
			// It is forwarded.
			cost := fork.USD(float64(c.Reserved) * share)
			w.billed.Add(int64(cost))
			w.paid.Add(1)
			time.Sleep(pause) // the answer takes its time
			s := Settlement{State: Settled, Status: 200, Cost: cost, Tokens: Tokens{Input: int64(share * 100), Output: c.Output}}
			switch fate {
			case 0: // the stream was cut: charged at what it can have cost
				s.Cost, s.Note = c.Reserved, "cut off"
			case 1: // nobody saw its end: its gateway will have to crash
				if n%2 == 0 {
					return
				}
			case 2: // an error, and a retry
				w.billed.Add(-int64(cost))
				s.State, s.Status, s.Cost = Failed, 529, 0
			}
			c.Settle(s)
			if fate == 3 {
				c.Settle(Settlement{State: Settled, Cost: c.Reserved}) // a second one counts nothing
			}
		}
		if rnd.IntN(4) == 0 {
			side.Go(call)
		} else {
			call()
		}
	}
}

// batch is a batch that an agent makes, and in most cases forgets. It is billed
// when the API has it, whoever dies then.
func (w *world) batch(ctx context.Context, n int, r Request, share float64, cut bool) {
	parts := []Part{{"m", r.Ask.Fixed}, {"n", r.Ask.Cost(r.Ask.Want) - r.Ask.Fixed}}
	b, err := w.ledger(n).ReserveBatch(ctx, r, parts)
	if err != nil {
		w.blame(err)
		return
	}
	cost := fork.USD(float64(b.Reserved()) * share)
	w.billed.Add(int64(cost))
	w.paid.Add(2)
	if cut { // the API's answer does not come
		for _, c := range b.Calls {
			c.Settle(Settlement{State: Failed, Cost: c.Reserved})
		}
		return
	}
	id := fmt.Sprint("batch-", w.made.Add(1))
	w.batches.Store(id, cost)
	if err := b.Accept(context.Background(), id, 2); err != nil {
		for _, c := range b.Calls {
			c.Settle(Settlement{State: Failed, Cost: c.Reserved})
		}
		return
	}
	if share < 0.3 {
		w.tend(n)
	}
}

// tend settles the batches that are there, as some gateway does.
func (w *world) tend(n int) {
	open, err := w.ledger(n).OpenBatches(context.Background(), "", 0)
	if err != nil {
		return // it died
	}
	for _, b := range open {
		bill, ok := w.batches.Load(b.ID)
		if !ok {
			w.t.Errorf("nobody made batch %s", b.ID)
			continue
		}
		cost := bill.(fork.USD)
		first := min(cost, b.Calls[0].Reserved)
		if _, err := b.Settle(context.Background(), settled(first, cost-first)); err != nil && fault.KindOf(err) != fault.Unavailable {
			w.t.Errorf("%v", err)
		}
	}
}

// drain makes calls until a budget is used up.
func (w *world) drain(run string, num int) {
	for {
		c, err := w.ledger(0).Reserve(context.Background(), request(run, num, Ask{Fixed: 2000, PerToken: 1, Want: 2000, Enough: 1000, Least: 100}))
		if err != nil {
			w.blame(err)
			return
		}
		w.billed.Add(int64(c.Reserved))
		w.paid.Add(1)
		c.Settle(Settlement{State: Settled, Cost: c.Reserved})
	}
}

// blame looks at an error of Reserve.
func (w *world) blame(err error) {
	var short Shortage
	switch kind := fault.KindOf(err); {
	case errors.As(err, &short):
		w.refused.Add(1)
		if short.Left < 0 || short.Left >= short.Need {
			w.t.Errorf("%v", err)
		}
	case errors.Is(err, ErrBusy), kind == fault.Cancelled, kind == fault.Unavailable:
	default:
		w.t.Errorf("%v", err)
	}
}

// Whatever forks do, and whatever happens to their gateways: what is spent and
// what is reserved is never more than a budget, at no moment, and what the API
// bills is never more than what the books say.
func TestSpentNeverExceedsABudget(t *testing.T) {
	forks, calls, kills := 100, 12, 6
	if testing.Short() {
		forks, calls, kills = 30, 5, 2
	}
	seed := uint64(time.Now().UnixNano())
	run := func(t *testing.T, seed uint64, gateways int, o Options) {
		t.Logf("seed %d", seed)
		rnd := rand.New(rand.NewPCG(seed, 0))
		share := fork.USD(forks * calls) // the budgets are short of what is asked for
		o.DayBudget = 600 * share
		o.Lease = 300 * time.Millisecond
		options := []Options{o}
		for range gateways - 1 {
			o.Dir = t.TempDir()
			options = append(options, o)
		}
		w := newWorld(t, options...)
		budgets := map[string]fork.USD{"a": 200 * share, "b": 80 * share, "c": 0}
		forkBudgets := map[string]fork.USD{"a": 1500 * fork.USD(calls), "b": 0, "c": 1200 * fork.USD(calls)}
		spectator := open2(t, options[0])
		stop := watch(t, spectator)
		var agents, killers sync.WaitGroup
		for n := range forks {
			name := []string{"a", "b", "c"}[n%3]
			grant(t, w.ledger(n%gateways), Account{Run: name, Fork: n + 1, RunBudget: budgets[name], ForkBudget: forkBudgets[name]})
			mine := rand.New(rand.NewPCG(seed, uint64(n+1)))
			agents.Go(func() { w.agent(n%gateways, name, n+1, calls, mine) })
		}
		done := make(chan struct{})
		killers.Go(func() {
			for range kills {
				select {
				case <-done:
					return
				case <-time.After(time.Duration(rnd.IntN(150)) * time.Millisecond):
				}
				w.crash(rnd.IntN(gateways))
			}
		})
		agents.Wait()
		close(done)
		killers.Wait()
		for n := range gateways {
			w.crash(n) // what nobody settled is charged
		}
		for n := range gateways {
			w.tend(n)
		}
		for n := range forks {
			w.drain([]string{"a", "b", "c"}[n%3], n+1)
		}
		stop()
		var total Spent
		for name := range budgets {
			u := usage(t, w.ledger(0), name, 0)
			total.Cost += u.Cost
			total.Calls += u.Calls
			total.Refused += u.Refused
		}
		t.Logf("%d calls were forwarded and %d are in the books, at %d, billed %d; %d refused, %d crashes",
			w.paid.Load(), total.Calls, total.Cost, w.billed.Load(), w.refused.Load(), w.crashes.Load())
		if total.Cost > o.DayBudget || total.Calls < int(w.paid.Load()) || int64(total.Cost) < w.billed.Load() {
			t.Error("the books are wrong")
		}
		if w.paid.Load() == 0 || w.made.Load() == 0 || w.refused.Load() < int64(forks) || w.crashes.Load() == 0 {
			t.Error("nothing was tried")
		}
		if err := spectator.check(t.Context()); err != nil {
			t.Error(err)
		}
		var open int
		if err := spectator.read.QueryRow("SELECT COUNT(*) FROM calls WHERE state = 'in_flight'").Scan(&open); err != nil || open > 0 {
			t.Errorf("%d calls are in flight, %v", open, err)
		}
	}
	for round := range uint64(3) {
		t.Run(fmt.Sprint("sqlite/", seed+round), func(t *testing.T) { run(t, seed+round, 1, Options{Dir: t.TempDir()}) })
		t.Run(fmt.Sprint("postgres/", seed+round), func(t *testing.T) {
			run(t, seed+round, 3, Options{Dir: t.TempDir(), URL: ledgertest.Postgres(t)})
		})
	}
}

// open2 opens the same database a second time, to look at it.
func open2(t *testing.T, o Options) *store {
	t.Helper()
	var s *store
	var err error
	if o.URL != "" {
		s, err = openPostgres(t.Context(), o.URL)
	} else {
		s, err = openSQLite(t.Context(), o.Dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.close() })
	return s
}
