package ledger

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A trial is a Reserve under way.
type trial struct {
	call chan *Call
	err  chan error
	held chan Shortage
	stop context.CancelFunc
}

func try(l *Ledger, r Request) trial {
	ctx, stop := context.WithCancel(context.Background())
	tr := trial{make(chan *Call, 1), make(chan error, 1), make(chan Shortage, 10), stop}
	r.Held = func(s Shortage) { tr.held <- s }
	go func() {
		c, err := l.Reserve(ctx, r)
		tr.call <- c
		tr.err <- err
	}()
	return tr
}

func (tr trial) result() (*Call, error) { return <-tr.call, <-tr.err }

func TestCallWaitsForWhatOthersHold(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
		grant(t, l, Account{Run: "r", Fork: 2, RunBudget: 1000})
		first := reserve(t, l, request("r", 1, ask(700)))
		second := try(l, request("r", 2, ask(600)))
		third := try(l, request("r", 2, ask(600)))
		until(t, "both wait", func() bool { return l.Waiting() == 2 })
		first.Settle(Settlement{State: Settled, Cost: 200})
		// Only one of them fits now.
		var c *Call
		var err error
		var other trial
		select {
		case c = <-second.call:
			err, other = <-second.err, third
		case c = <-third.call:
			err, other = <-third.err, second
		}
		if err != nil {
			t.Fatal(err)
		}
		until(t, "the other one waits on", func() bool { return l.Waiting() == 1 })
		c.Settle(Settlement{State: Settled, Cost: 600})
		var short Shortage
		if _, err := other.result(); !errors.As(err, &short) || short.Left != 200 {
			t.Errorf("%v", err)
		}
		if got := usage(t, l, "r", 0); got.Cost != 800 || got.Refused != 1 {
			t.Errorf("%+v", got)
		}
	})
}

// An answer is cut short rather than refused, but not while waiting could give
// it more.
func TestOutputIsLoweredToWhatFits(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
		a := Ask{Fixed: 100, PerToken: 2, Want: 1000, Enough: 300, Least: 100}
		first := reserve(t, l, request("r", 1, a))
		if first.Output != 450 || first.Reserved != 1000 {
			t.Errorf("%+v", first)
		}
		second := try(l, request("r", 1, a))
		until(t, "it waits", func() bool { return l.Waiting() == 1 })
		first.Settle(Settlement{State: Settled, Cost: 600})
		c, err := second.result()
		if err != nil || c.Output != 150 || c.Reserved != 400 {
			t.Errorf("%+v, %v", c, err)
		}
		c.Settle(Settlement{State: Settled, Cost: 101})
		var short Shortage
		if _, err := l.Reserve(t.Context(), request("r", 1, a)); !errors.As(err, &short) || short.Need != 300 || short.Left != 299 {
			t.Errorf("%v", err)
		}
	})
}

func TestWaitEnds(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
		grant(t, l, Account{Run: "r", Fork: 2, RunBudget: 1000})
		reserve(t, l, request("r", 1, ask(700)))
		r := request("r", 2, ask(600))

		r.Patience = time.Millisecond
		if _, err := l.Reserve(t.Context(), r); !errors.Is(err, ErrBusy) {
			t.Errorf("its patience is up: %v", err)
		}
		r.Patience = time.Hour
		given := try(l, r)
		until(t, "it waits", func() bool { return l.Waiting() == 1 })
		given.stop()
		if _, err := given.result(); fault.KindOf(err) != fault.Cancelled {
			t.Errorf("its caller went away: %v", err)
		}
		revoked := try(l, r)
		until(t, "it waits", func() bool { return l.Waiting() == 1 })
		if err := l.Revoke(t.Context(), "r", 2); err != nil {
			t.Fatal(err)
		}
		if _, err := revoked.result(); !errors.Is(err, ErrRevoked) {
			t.Errorf("its token was revoked: %v", err)
		}
		closed := try(l, request("r", 1, ask(600)))
		until(t, "it waits", func() bool { return l.Waiting() == 1 })
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := closed.result(); fault.KindOf(err) != fault.Unavailable {
			t.Errorf("the ledger was closed: %v", err)
		}
	})
}

func TestHeldCallsGoOnWhenThereIsMoney(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		o.DayBudget = 5000
		l := open(t, o)
		day := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
		l.now = func() time.Time { return day }
		for num := 1; num <= 3; num++ {
			grant(t, l, Account{Run: "r", Fork: num, RunBudget: 1000, ForkBudget: 900, Pause: true})
		}
		reserve(t, l, request("r", 1, ask(800))).Settle(Settlement{State: Settled, Cost: 800})
		r := request("r", 2, ask(300))
		r.Patience = time.Millisecond // which does not count while a person is waited for
		second, third := try(l, r), try(l, request("r", 3, ask(700)))
		if s := <-second.held; s != (Shortage{"run", "run r", 1000, 200, 300}) {
			t.Errorf("%v", s)
		}
		<-third.held
		until(t, "it is in the books", func() bool {
			return usage(t, l, "r", 2).Held != "" && usage(t, l, "r", 3).Held != "" && usage(t, l, "r", 1).Held == ""
		})
		if got := usage(t, l, "r", 0); got.Refused != 0 || got.Held == "" {
			t.Errorf("%+v", got)
		}
		// Enough for one of them.
		if err := l.SetBudget(t.Context(), "r", 0, 1200); err != nil {
			t.Fatal(err)
		}
		c, err := second.result()
		if err != nil {
			t.Fatal(err)
		}
		if got := usage(t, l, "r", 2); got.Held != "" {
			t.Errorf("%+v", got)
		}
		c.Settle(Settlement{State: Settled, Cost: 300})
		// Then it is the fork's own budget that is short, and says so.
		if err := l.SetBudget(t.Context(), "r", 3, 100); err != nil {
			t.Fatal(err)
		}
		if s := <-third.held; s.Whose != "fork r/3" {
			t.Errorf("%v", s)
		}
		for num, budget := range map[int]int{3: 5000, 0: 9000} {
			if err := l.SetBudget(t.Context(), "r", num, 1_000_000); err != nil {
				t.Fatal(budget, err)
			}
		}
		c, err = third.result()
		if err != nil {
			t.Fatal(err)
		}
		c.Settle(Settlement{State: Settled, Cost: 700})
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// The budget of a day holds calls until the next one begins.
func TestHeldCallsGoOnTheNextDay(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		o.DayBudget = 1000
		l := open(t, o)
		clock := make(chan time.Time, 1)
		clock <- time.Date(2026, 11, 23, 23, 59, 0, 0, time.UTC)
		l.now = func() time.Time {
			at := <-clock
			clock <- at
			return at
		}
		grant(t, l, Account{Run: "r", Fork: 1, Pause: true})
		reserve(t, l, request("r", 1, ask(800))).Settle(Settlement{State: Settled, Cost: 800})
		held := try(l, request("r", 1, ask(300)))
		if s := <-held.held; s.Whose != "2026-11-23 (UTC)" {
			t.Errorf("%v", s)
		}
		clock <- (<-clock).Add(2 * time.Minute)
		if _, err := held.result(); err != nil {
			t.Error(err)
		}
	})
}

// A held call that its caller gives up leaves its mark in the books until the
// fork gets money or ends: the agent will ask again.
func TestMarkOfAHeldForkStays(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 100, Pause: true})
		held := try(l, request("r", 1, ask(300)))
		<-held.held
		held.stop()
		if _, err := held.result(); fault.KindOf(err) != fault.Cancelled {
			t.Error(err)
		}
		if got := usage(t, l, "r", 1); got.Held == "" {
			t.Error("nobody can see that the fork waits")
		}
		reserve(t, l, request("r", 1, ask(10)))
		if got := usage(t, l, "r", 1); got.Held != "" {
			t.Errorf("%+v", got)
		}
	})
}

// A panic of a decision is the end of its own entry only, whoever writes it: how
// a call ended, in the same transaction, is not lost.
func TestPanicOfACallLeavesTheLedgerAsItWas(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		for i, add := range []func(*Ledger, *entry) bool{(*Ledger).hurry, (*Ledger).add} {
			run := fmt.Sprint("r", i)
			o.Dir = t.TempDir()
			l := open(t, o)
			grant(t, l, Account{Run: run, Fork: 1, RunBudget: 1000})
			reserve(t, l, request(run, 1, ask(100))).Settle(Settlement{State: Settled, Cost: 50})
			told := make(chan error, 1)
			w := want{day: today(l.now()), run: run, num: 1}
			add(l, &entry{want: w.itself, decide: func(s *sheet) {
				s.runs[run].spent += 700
				s.change("", forkKey{run, 1})
				panic("in the middle")
			}, answer: func(err error) { told <- err }})
			if err := <-told; fault.KindOf(err) != fault.Internal {
				t.Error(err)
			}
			reserve(t, l, request(run, 1, ask(950))).Settle(Settlement{State: Settled, Cost: 950})
			if got := usage(t, l, run, 1); got.Cost != 1000 || got.Calls != 2 {
				t.Errorf("%+v", got)
			}
			if err := l.Check(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}
