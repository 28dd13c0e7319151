package activities

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

func TestAForkOfTwoHoursIsToldOfFewSteps(t *testing.T) {
	var told []fork.Step
	var at []time.Duration
	began := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now := began
	a := New(Options{Logger: slog.New(slog.DiscardHandler), Progress: func(_ context.Context, run string, num int, step fork.Step) error {
		if run != "r" || num != 3 {
			t.Errorf("%s/%d was told", run, num)
		}
		told, at = append(told, step), append(at, now.Sub(began))
		return errors.New("Temporal does not answer") // no harm
	}})
	f := &follower{a: a, in: orchestrator.RunAgentInput{Spec: fork.Spec{Run: "r", Num: 3}}}
	for ; now.Before(began.Add(2 * time.Hour)); now = now.Add(pollEvery) {
		f.sum.Turns, f.sum.Doing, f.cost = 1+int(now.Sub(began)/(3*time.Second)), "Bash", fork.USD(now.Sub(began))
		f.showStep(t.Context(), now)
	}
	if len(told) < 12 || len(told) > 20 || at[0] != showFirst {
		t.Errorf("told of %d steps, at %v", len(told), at)
	}
	if last := told[len(told)-1]; last.Turns < 2000 || last.Doing != "Bash" || last.Cost == 0 {
		t.Errorf("the last is %+v", last)
	}
	// What stands still is told once.
	n := len(told)
	for range 100 {
		now = now.Add(time.Hour)
		f.showStep(t.Context(), now)
	}
	if len(told) != n+1 {
		t.Errorf("%d steps without news", len(told)-n)
	}
}
