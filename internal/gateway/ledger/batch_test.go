package ledger

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

var twoModels = []Part{{"m", 300}, {"n\x00", 200}}

func reserveBatch(t testing.TB, l *Ledger, run string, num int, parts ...Part) *Batch {
	t.Helper()
	b, err := l.ReserveBatch(t.Context(), request(run, num, Ask{}), parts)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func accept(t testing.TB, b *Batch, id string) *Batch {
	t.Helper()
	if err := b.Accept(t.Context(), id, 7); err != nil {
		t.Fatal(err)
	}
	return b
}

// settled is settlements of so much for each call.
func settled(costs ...fork.USD) (all []Settlement) {
	for _, c := range costs {
		all = append(all, Settlement{State: Settled, Cost: c, Tokens: Tokens{Output: int64(c)}})
	}
	return all
}

func TestABatchOutlivesItsGateway(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
		accept(t, reserveBatch(t, l, "r", 1, twoModels...), "batch-1")
		reserveBatch(t, l, "r", 1, Part{"m", 50}) // nobody knows whether it was made
		reserve(t, l, request("r", 1, ask(30)))
		l.crash()

		l = open(t, o)
		want := Spent{Usage: fork.Usage{Cost: 580, Pending: 500}, Calls: 2}
		if diff := cmp.Diff(want, usage(t, l, "r", 1)); diff != "" {
			t.Error(diff)
		}
		if n, err := l.InFlight(t.Context(), "r", 1); n != 0 || err != nil {
			t.Errorf("%d calls are waited for, %v", n, err)
		}
		var short Shortage
		if _, err := l.Reserve(t.Context(), request("r", 1, ask(921))); !errors.As(err, &short) || short.Left != 920 {
			t.Errorf("%v", err)
		}
		all, err := l.OpenBatches(t.Context(), "", 0)
		if err != nil || len(all) != 1 {
			t.Fatal(len(all), err)
		}
		b := all[0]
		if b.ID != "batch-1" || b.Run != "r" || b.Fork != 1 || b.Requests != 7 || len(b.Calls) != 2 || b.Reserved() != 500 || !b.Open || b.Orphaned || b.Created.IsZero() || !b.Looked.IsZero() ||
			b.Calls[1].Model() != "n" || b.Calls[1].Prices() != "p" {
			t.Errorf("%+v %+v", b, b.Calls)
		}
		if first, err := b.Settle(t.Context(), settled(100, 20)); !first || err != nil {
			t.Errorf("%v %v", first, err)
		}
		want = Spent{Usage: fork.Usage{Cost: 200, OutputTokens: 120}, Calls: 4, Refused: 1, Short: fork.BudgetOfRun}
		if diff := cmp.Diff(want, usage(t, l, "r", 1)); diff != "" {
			t.Error(diff)
		}
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestABatchIsSettledOnceWhoeverTries(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
		accept(t, reserveBatch(t, l, "r", 1, twoModels...), "batch-1")
		var firsts atomic.Int64
		var all sync.WaitGroup
		for n := range 8 {
			all.Go(func() {
				b, err := l.Batch(t.Context(), "r", 1, "batch-1")
				if err != nil {
					t.Error(err)
					return
				}
				first, err := b.Settle(context.Background(), settled(fork.USD(n), 10))
				if err != nil {
					t.Error(err)
				}
				if first {
					firsts.Add(1)
				}
			})
		}
		all.Wait()
		if got := usage(t, l, "r", 1); firsts.Load() != 1 || got.Cost < 10 || got.Cost > 17 || got.Pending != 0 || got.Calls != 2 {
			t.Errorf("%d settlements, %+v", firsts.Load(), got)
		}
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestABatchIsHeldWholeOrNotAtAll(t *testing.T) {
	l := open(t, Options{Dir: t.TempDir()})
	grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 499})
	var short Shortage
	if _, err := l.ReserveBatch(t.Context(), request("r", 1, Ask{}), twoModels); !errors.As(err, &short) || short.Need != 500 || short.Left != 499 {
		t.Errorf("%v", err)
	}
	for name, parts := range map[string][]Part{"none": nil, "too dear": {{"m", tooMuch}, {"n", 1}}, "less than nothing": {{"m", -1}}, "far too dear": {{"m", 1 << 62}, {"n", 1 << 62}}} {
		if _, err := l.ReserveBatch(t.Context(), request("r", 1, Ask{}), parts); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := l.SetBudget(t.Context(), "r", 0, 500); err != nil {
		t.Fatal(err)
	}
	b := reserveBatch(t, l, "r", 1, twoModels...)
	for _, c := range b.Calls { // it was not made
		c.Settle(Settlement{State: Failed})
	}
	if got := usage(t, l, "r", 1); got.Cost != 0 || got.Calls != 2 || got.Refused != 1 {
		t.Errorf("%+v", got)
	}
}

func TestANameOfABatchIsTakenOnce(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1})
		grant(t, l, Account{Run: "r", Fork: 2})
		accept(t, reserveBatch(t, l, "r", 1, Part{"m", 5}), "batch-1")
		b := reserveBatch(t, l, "r", 2, Part{"m", 5})
		if err := b.Accept(t.Context(), "batch-1", 1); fault.KindOf(err) != fault.Conflict || b.ID != "" {
			t.Errorf("%v", err)
		}
		for _, id := range []string{"", "a\x00b"} {
			if err := b.Accept(t.Context(), id, 1); fault.KindOf(err) != fault.Invalid {
				t.Errorf("%q: %v", id, err)
			}
		}
		if _, err := l.Batch(t.Context(), "r", 2, "batch-1"); fault.KindOf(err) != fault.NotFound {
			t.Error(err)
		}
		accept(t, b, "batch-2")
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestBatchesAreListedTheNewestFirstUntilDeleted(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		now := time.Now()
		l.now = func() time.Time { now = now.Add(time.Second); return now }
		grant(t, l, Account{Run: "r", Fork: 1})
		grant(t, l, Account{Run: "r", Fork: 2})
		for _, id := range []string{"c", "a", "b"} {
			accept(t, reserveBatch(t, l, "r", 1, twoModels...), id)
		}
		accept(t, reserveBatch(t, l, "r", 2, Part{"m", 1}), "d")
		ids := func(all []*Batch, err error) (list []string) {
			if err != nil {
				t.Error(err)
			}
			for _, b := range all {
				list = append(list, b.ID)
			}
			return list
		}
		if diff := cmp.Diff([]string{"b", "a", "c"}, ids(l.Batches(t.Context(), "r", 1))); diff != "" {
			t.Error(diff)
		}
		a, err := l.Batch(t.Context(), "r", 1, "a")
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Batch(t.Context(), "r", 1, "a"); fault.KindOf(err) != fault.NotFound {
			t.Error(err)
		}
		if diff := cmp.Diff([]string{"b", "c"}, ids(l.Batches(t.Context(), "r", 1))); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"d", "b", "a", "c"}, ids(l.OpenBatches(t.Context(), "", 0))); diff != "" {
			t.Errorf("what is deleted is still to be settled: %s", diff)
		}
		if first, err := a.Settle(t.Context(), settled(1, 1)); !first || err != nil {
			t.Error(first, err)
		}
		if done, err := l.BatchSettled(t.Context(), "a"); !done || err != nil {
			t.Error(done, err)
		}
		if err := l.Revoke(t.Context(), "r", 1); err != nil {
			t.Fatal(err)
		}
		orphans, err := l.OpenBatches(t.Context(), "r", 1)
		if diff := cmp.Diff([]string{"b", "c"}, ids(orphans, err)); diff != "" || !orphans[0].Orphaned {
			t.Error(diff)
		}
	})
}

// Of several gateways that see a batch only one asks about it.
func TestABatchIsLookedAtByOne(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1})
		accept(t, reserveBatch(t, l, "r", 1, Part{"m", 5}), "batch-1")
		read := func() *Batch {
			b, err := l.Batch(t.Context(), "r", 1, "batch-1")
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		one, two := read(), read()
		if mine, err := one.Look(t.Context()); !mine || err != nil {
			t.Error(mine, err)
		}
		if mine, err := two.Look(t.Context()); mine || err != nil {
			t.Error("two looked", err)
		}
		if again := read(); again.Looked.IsZero() {
			t.Error("the look is not in the ledger")
		} else if mine, err := again.Look(t.Context()); !mine || err != nil {
			t.Error(mine, err)
		}
		if _, err := one.Settle(t.Context(), settled(1)); err != nil {
			t.Fatal(err)
		}
		if mine, err := read().Look(t.Context()); mine || err != nil {
			t.Error("a settled one is looked at", err)
		}
	})
}

// A gateway that was only thought dead while its batch was being made has the
// charge replaced by what the batch did cost.
func TestABatchThatWasThoughtLostIsFoundAgain(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		if o.URL == "" {
			t.Skip("a gateway with a file of its own is never thought dead")
		}
		l, other := two(t, o)
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
		b := reserveBatch(t, l, "r", 1, twoModels...)
		if _, err := l.store.read.Exec("UPDATE owners SET seen = 0 WHERE num = $1", l.owner); err != nil {
			t.Fatal(err)
		}
		if err := other.settleDead(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := usage(t, l, "r", 1); got.Cost != 500 || got.Calls != 2 {
			t.Fatalf("%+v", got)
		}
		accept(t, b, "batch-1")
		if got := usage(t, other, "r", 1); got.Cost != 500 || got.Pending != 0 {
			t.Errorf("%+v", got)
		}
		if first, err := b.Settle(t.Context(), settled(70, 0)); !first || err != nil {
			t.Error(first, err)
		}
		if got := usage(t, other, "r", 1); got.Cost != 70 || got.Calls != 2 {
			t.Errorf("%+v", got)
		}
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
