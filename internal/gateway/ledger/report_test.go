package ledger

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestReportSumsUpTheCalls(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		if _, err := OpenReader(t.Context(), o); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
			t.Errorf("%v", err)
		}
		o.DayBudget = 5000
		l := open(t, o)
		first := time.Date(2026, 11, 22, 23, 0, 0, 0, time.UTC)
		day := first
		l.now = func() time.Time { return day }
		grant(t, l, Account{Run: "a", Repo: "one", Fork: 1, RunBudget: 1000, ForkBudget: 400, Pause: true})
		grant(t, l, Account{Run: "a", Repo: "one", Fork: 2, RunBudget: 1000, Pause: true})
		grant(t, l, Account{Run: "b", Repo: "two", Fork: 1})
		spend := func(run string, num int, model string, s Settlement) {
			t.Helper()
			r := request(run, num, ask(300))
			r.Model = model
			reserve(t, l, r).Settle(s)
		}
		spend("a", 1, "sonnet", Settlement{State: Settled, Cost: 100, Tokens: Tokens{Input: 1, CacheWrite5m: 2, CacheWrite1h: 3, CacheRead: 4, Output: 5, WebSearches: 6}})
		day = day.Add(2 * time.Hour)
		second := day
		spend("a", 2, "sonnet", Settlement{State: Settled, Cost: 20, Model: "opus", Tokens: Tokens{Input: 10}})
		spend("b", 1, "opus", Settlement{State: Settled, Cost: 250})
		spend("b", 1, "opus", Settlement{State: Failed})
		day = day.Add(time.Hour)
		third := day
		reserve(t, l, request("b", 1, ask(70)))

		r, err := OpenReader(t.Context(), o) // beside the gateway
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		usage(t, l, "a", 0) // what was settled is written
		a1 := Line{Key: "sonnet", Calls: 1, Cost: 100, InputTokens: 1, CacheWrite5mTokens: 2, CacheWrite1hTokens: 3, CacheReadTokens: 4, OutputTokens: 5, WebSearches: 6, First: first, Last: first}
		a2 := Line{Calls: 1, Cost: 20, InputTokens: 10, First: second, Last: second}
		b := Line{Key: "b", Calls: 2, Failed: 1, Cost: 250, First: second, Last: second}
		open := Line{Key: "m", InFlight: 1, Reserved: 70, First: third, Last: third}
		named := func(key string, l Line) Line { l.Key = key; return l }
		for by, want := range map[Group][]Line{
			ByRun:   {b.Add(open), named("a", a1.Add(a2))},
			ByRepo:  {named("two", b.Add(open)), named("one", a1.Add(a2))},
			ByModel: {named("opus", a2.Add(b)), a1, open},
			ByDay:   {named("2026-11-22", a1), named("2026-11-23", a2.Add(b).Add(open))},
		} {
			got, err := r.Report(t.Context(), Query{By: by})
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("by %s: %v %s", by, err, diff)
			}
		}
		got, err := r.Report(t.Context(), Query{By: ByRun, Since: second.Add(time.Second)})
		if diff := cmp.Diff([]Line{named("b", open)}, got); err != nil || diff != "" {
			t.Errorf("%v %s", err, diff)
		}
		if got, err := r.Report(t.Context(), Query{By: ByRun, Since: third.Add(time.Hour)}); err != nil || got == nil || len(got) != 0 {
			t.Errorf("%v %v", got, err)
		}
		if _, err := r.Report(t.Context(), Query{By: "weather"}); fault.KindOf(err) != fault.Invalid {
			t.Error(err)
		}

		if _, err := r.Budgets(t.Context(), "c"); fault.KindOf(err) != fault.NotFound {
			t.Error(err)
		}
		var short Shortage
		if _, err := l.Reserve(t.Context(), request("b", 1, ask(5000))); !errors.As(err, &short) {
			t.Error(err)
		}
		budgets, err := r.store.budgets(t.Context(), "a", "2026-11-23")
		want := Budgets{Run: "a", Repo: "one", Pause: true, Whole: Budget{1000, 120, 0}, Day: "2026-11-23", Today: Budget{5000, 270, 70},
			Forks: []ForkBudget{{Num: 1, Budget: Budget{400, 100, 0}}, {Num: 2, Budget: Budget{0, 20, 0}}}}
		if diff := cmp.Diff(want, budgets); err != nil || diff != "" {
			t.Errorf("%v %s", err, diff)
		}
		if left := budgets.Today.Left(); left != 4660 {
			t.Errorf("%d", left)
		}
	})
}

func TestReaderReadsALedgerThatNobodyUses(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "a", Fork: 1, RunBudget: 10})
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := OpenReader(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if b, err := r.Budgets(t.Context(), "a"); err != nil || b.Whole.Limit != 10 {
			t.Errorf("%+v %v", b, err)
		}
		// It is no gateway: one can start beside it.
		open(t, o)
	})
}
