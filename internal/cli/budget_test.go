package cli

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// books is a ledger for the tests.
type books struct {
	budgets ledger.Budgets
	lines   []ledger.Line
	query   ledger.Query
	run     string
	failure error
	closed  int
}

func (b *books) Report(_ context.Context, q ledger.Query) ([]ledger.Line, error) {
	b.query = q
	return b.lines, b.failure
}

func (b *books) Budgets(_ context.Context, run string) (ledger.Budgets, error) {
	b.run = run
	return b.budgets, b.failure
}

func (b *books) Close() error {
	b.closed++
	return nil
}

func withBooks(t *testing.T, m *memory, b *books) *session {
	t.Helper()
	s := newSession(t, m)
	s.env.Books = func(context.Context, Globals) (Books, error) { return b, nil }
	return s
}

func TestBudgetAddAnswersWhenTheMoneyIsThere(t *testing.T) {
	m := newMemory()
	m.order = []string{testRun}
	m.report.Progress = at(nil, fork.Success, fork.Running, fork.Pending).p
	m.report.Budget = 5 * fork.Dollar
	s := newSession(t, m)
	s.want(t, exitOK, "budget", "add", "@last", "5")
	if want := testRun + ": running · 1 of 3 succeeded · 1 running · 1 pending · $0.0000 of $5.0000 · 0s\n"; s.out.String() != want {
		t.Errorf("stdout %q, want %q", &s.out, want)
	}
	s.want(t, exitOK, "budget", "add", "0123/2", "0.25")
	want := []string{"add $5.0000 to " + testRun + "/0", "add $0.2500 to " + testRun + "/2"}
	if diff := cmp.Diff(want, m.done); diff != "" {
		t.Error(diff)
	}
	s.want(t, exitNotFound, "budget", "add", "0123/4", "1")
	s.want(t, exitNotFound, "budget", "add", "ffff", "1")
	for _, amount := range []string{"0", "-1", "1e3", "ten", "0x10", ""} {
		s.want(t, exitUsage, "budget", "add", "@last", "--", amount)
	}
	s.want(t, exitUsage, "budget", "add", "@last")
	if len(m.done) != 2 {
		t.Errorf("%q", m.done)
	}
	m.failure = fault.New("", fault.Conflict, "run %s has ended", testRun)
	s.want(t, exitFailed, "budget", "add", testRun, "1")
}

func TestBudgetShow(t *testing.T) {
	b := &books{budgets: ledger.Budgets{
		Run: testRun, Repo: "git@example.com:a/b\x1b[31m", Pause: true, Day: "2026-03-04",
		Whole: ledger.Budget{Limit: 5 * fork.Dollar, Spent: 4 * fork.Dollar, Reserved: fork.Dollar / 2},
		Today: ledger.Budget{Spent: 6 * fork.Dollar},
		Forks: []ledger.ForkBudget{
			{Num: 1, Budget: ledger.Budget{Limit: 3 * fork.Dollar, Spent: 2 * fork.Dollar}},
			{Num: 2, Budget: ledger.Budget{Spent: 2 * fork.Dollar}, Held: "The budget of run x does not cover this call."},
		},
	}}
	m := newMemory()
	m.order = []string{testRun}
	s := withBooks(t, m, b)
	s.want(t, exitOK, "budget", "show", "@last")
	golden(t, "budget-show.golden", s.out.Bytes())
	if b.run != testRun || b.closed != 1 || !strings.Contains(s.errors.String(), "budget add "+testRun+" USD") {
		t.Errorf("%+v, stderr %q", b, &s.errors)
	}
	// A whole id is shown without Temporal, which may have forgotten it.
	m.failure = fault.New("", fault.Unreachable, "Temporal does not answer")
	s.want(t, exitOK, "budget", "show", "sandbox-orch-99999999", "-o", "json")
	var got ledger.Budgets
	if err := json.Unmarshal(s.out.Bytes(), &got); err != nil || b.run != "sandbox-orch-99999999" {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.budgets, got); diff != "" {
		t.Error(diff)
	}
	s.want(t, exitUnreachable, "budget", "show", "9999")
	s.want(t, exitUsage, "budget", "show", "@last/1")
	b.failure = fault.New("", fault.NotFound, "the ledger does not know it")
	s.want(t, exitNotFound, "budget", "show", testRun)
	s.env.Books = nil
	s.want(t, exitFailed, "budget", "show", testRun)
}

func TestReportSaysWhoSpentWhat(t *testing.T) {
	day := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	b := &books{lines: []ledger.Line{
		{Key: "claude-sonnet-5-5", Calls: 12, Failed: 2, Crashed: 1, Cost: 1_234_567_890, InputTokens: 1, OutputTokens: 2, CacheReadTokens: 3, CacheWrite5mTokens: 4, CacheWrite1hTokens: 5,
			WebSearches: 6, InFlight: 1, Reserved: fork.Dollar / 4, First: day.Add(-time.Hour), Last: day},
		{Key: "", Calls: 1, Cost: 1, First: day, Last: day.Add(time.Hour)},
	}}
	s := withBooks(t, newMemory(), b)
	s.env.Runs = func(context.Context, Globals) (Runs, error) {
		t.Error("a report asked Temporal")
		return nil, fault.New("", fault.Unreachable, "no")
	}
	s.want(t, exitOK, "report", "--by", "model")
	golden(t, "report.golden", s.out.Bytes())
	if b.query != (ledger.Query{By: ledger.ByModel}) || b.closed != 1 {
		t.Errorf("%+v", b)
	}
	s.want(t, exitOK, "report", "-o", "json", "--since", "2026-03-01")
	golden(t, "report-json.golden", s.out.Bytes())
	if !b.query.Since.Equal(time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)) || b.query.By != ledger.ByRun {
		t.Errorf("%+v", b.query)
	}
	s.want(t, exitOK, "report", "-o", "csv")
	rows, err := csv.NewReader(&s.out).ReadAll()
	if err != nil || len(rows) != 3 || len(rows[0]) != 15 || rows[0][0] != "run" || rows[1][4] != "1.23456789" || rows[2][4] != "0.000000001" {
		t.Errorf("%v %q", err, rows)
	}
	b.lines = []ledger.Line{}
	s.want(t, exitOK, "report", "-o", "json")
	var empty struct{ Lines []ledger.Line }
	if err := json.Unmarshal(s.out.Bytes(), &empty); err != nil || empty.Lines == nil {
		t.Errorf("%v %s", err, &s.out)
	}
	s.want(t, exitUsage, "report", "--by", "weather")
	s.want(t, exitUsage, "report", "-o", "yaml")
	for _, since := range []string{"yesterday", "-7d", "7", "2026-13-01", "d"} {
		s.want(t, exitUsage, "report", "--since="+since)
	}
	b.failure = fault.New("", fault.NotFound, "there is no ledger yet")
	s.want(t, exitNotFound, "report")
}

func TestSinceCountsBackOrNamesATime(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"7d":                        now.Add(-7 * 24 * time.Hour),
		"0d":                        now,
		"90m":                       now.Add(-90 * time.Minute),
		"2026-11-01":                time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		"2026-11-01T10:00:00+02:00": time.Date(2026, 11, 1, 8, 0, 0, 0, time.UTC),
	} {
		if got, err := parseSince(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %s, %v", s, got, err)
		}
	}
}

func TestRunThatWaitsForMoneySaysSo(t *testing.T) {
	rep := mixedReport()
	rep.Status, rep.Budget = fork.Running, fork.Dollar
	rep.Statuses[0] = fork.Running
	why := "The budget of run x does not cover this call: $0.0100 of $1.0000 is left, and the call may cost $0.2000."
	rep.Held = []fork.Hold{{ForkNum: 1, Why: why}, {ForkNum: 3, Why: why}}
	m := newMemory()
	m.order, m.report = []string{testRun}, rep
	s := newSession(t, m)
	s.want(t, exitOK, "status", "@last")
	for _, want := range []string{"· paused (budget) ·", "\nforks 1, 3 (paused): " + why + "\n", "budget add " + rep.Run + " USD"} {
		if !strings.Contains(s.out.String(), want) {
			t.Errorf("no %q in:\n%s", want, &s.out)
		}
	}
	var out strings.Builder
	l := newLines(&out)
	l.show(sight{Progress: rep.Progress})
	rep.Held = nil
	l.show(sight{Progress: rep.Progress})
	if got := out.String(); !strings.HasPrefix(got, "paused (budget): "+why) || !strings.Contains(got, "\nthe budget covers the next calls again\n") {
		t.Errorf("%q", got)
	}
}

func TestForkTakesBudgetsFromFlagsAndFile(t *testing.T) {
	var got fork.Plan
	s := newSession(t, newMemory())
	run := func(_ context.Context, _ *Env, o forkOptions) error {
		got = o.Plan
		return nil
	}
	for _, c := range []struct {
		args []string
		want fork.Plan
	}{
		{nil, fork.Plan{}},
		{[]string{"--budget", "5", "--budget-per-fork", "0.5", "--on-budget", "pause"}, fork.Plan{Budget: 5 * fork.Dollar, BudgetPerFork: fork.Dollar / 2, OnBudget: "pause"}},
		{[]string{"--on-budget", "stop"}, fork.Plan{}},
	} {
		env := s.env.complete()
		cmd := newRoot(env)
		for _, sub := range cmd.Commands() {
			if sub.Name() == "fork" {
				cmd.RemoveCommand(sub)
			}
		}
		cmd.AddCommand(newFork(env, run))
		cmd.SetArgs(append([]string{"fork", "https://example.com/a/b", "--prompt", "x", "--agent", "mini"}, c.args...))
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got.Budget != c.want.Budget || got.BudgetPerFork != c.want.BudgetPerFork || got.OnBudget != c.want.OnBudget {
			t.Errorf("%q: %+v", c.args, got)
		}
	}
	s.want(t, exitUsage, "fork", ".", "--prompt", "x", "--on-budget", "ask")
	s.want(t, exitUsage, "fork", ".", "--prompt", "x", "--budget-per-fork", "0")
}
