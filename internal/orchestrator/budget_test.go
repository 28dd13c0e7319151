package orchestrator

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.temporal.io/sdk/testsuite"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func progress(t *testing.T, env *testsuite.TestWorkflowEnvironment) (p fork.Progress) {
	t.Helper()
	v, err := env.QueryWorkflow(GetProgress)
	if err == nil {
		err = v.Get(&p)
	}
	if err != nil {
		t.Error(err)
	}
	return p
}

func TestBudgetOfOneForkEndsThatForkOnly(t *testing.T) {
	var d deeds
	d.agent = func(_ context.Context, in RunAgentInput) (RunAgentOutput, error) {
		if in.Spec.ForkBudget != fork.Dollar/2 || in.Spec.RunBudget != 5*fork.Dollar || in.Spec.OnBudget != "" || in.Slack != 0 {
			return RunAgentOutput{}, fault.New("", fault.Invalid, "%+v", in)
		}
		if in.Spec.Num == 1 {
			return RunAgentOutput{Status: fork.BudgetExceeded, Error: "402", Short: fork.BudgetOfFork}, nil
		}
		return RunAgentOutput{Status: fork.Success}, nil
	}
	env := newEnv(t, &d)
	p := plan(4, 1)
	p.Budget, p.BudgetPerFork = 5*fork.Dollar, fork.Dollar/2
	env.ExecuteWorkflow(OrchestrationName, p)
	if rep := report(t, env); rep.Success != 3 || rep.Results[0].Short != fork.BudgetOfFork || rep.Status != fork.BudgetExceeded {
		t.Errorf("%+v", rep)
	}
}

func TestBudgetOfTheDayStopsForksThatHaveNotStarted(t *testing.T) {
	var d deeds
	d.agent = func(context.Context, RunAgentInput) (RunAgentOutput, error) {
		return RunAgentOutput{Status: fork.BudgetExceeded, Error: "402", Short: fork.BudgetOfDay}, nil
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(OrchestrationName, plan(3, 1))
	rep := report(t, env)
	if d.calls["create"] != 1 || rep.Results[2].Status != fork.BudgetExceeded || rep.Results[2].Error != "the budget of the day is used up; this fork was not started" {
		t.Errorf("%v %+v", d.calls, rep.Results[2])
	}
}

// A fork that waits for money keeps others from starting, and the run says so
// in words, until somebody adds some.
func TestRunWaitsForMoneyAndGoesOn(t *testing.T) {
	var d deeds
	money := make(chan struct{})
	d.agent = func(ctx context.Context, in RunAgentInput) (RunAgentOutput, error) {
		if in.Spec.OnBudget != fork.OnBudgetPause || in.Slack == 0 {
			return RunAgentOutput{}, fault.New("", fault.Invalid, "%+v", in)
		}
		if in.Spec.Num == 1 {
			select {
			case <-money:
			case <-time.After(20 * time.Second):
				return RunAgentOutput{}, fault.New("", fault.Invalid, "no money came")
			}
		}
		return RunAgentOutput{Status: fork.Success}, nil
	}
	var sets []SetBudgetInput
	fails := 1
	d.budget = func(in SetBudgetInput) error {
		if fails--; fails >= 0 {
			return fault.New("", fault.Unavailable, "the ledger cannot be written")
		}
		sets = append(sets, in)
		return nil
	}
	env := newEnv(t, &d)
	p := plan(3, 1)
	p.Budget, p.OnBudget = fork.Dollar, fork.OnBudgetPause
	var answers []fork.Progress
	add := func(in AddBudgetInput) {
		env.UpdateWorkflow(AddBudget, "", &updates{t: t, done: func(v any, err error) {
			if err != nil {
				t.Error(err)
				return
			}
			if answers = append(answers, v.(fork.Progress)); len(answers) == 2 {
				env.SignalWorkflow(ForkHeld, fork.Hold{ForkNum: 1})
				close(money)
			}
		}}, in)
	}
	env.RegisterDelayedCallback(func() {
		env.SignalWorkflow(ForkHeld, fork.Hold{ForkNum: 1, Why: "the run is short"})
		env.SignalWorkflow(ForkHeld, fork.Hold{ForkNum: 99, Why: "there is no such fork"})
	}, soon)
	env.RegisterDelayedCallback(func() {
		got := progress(t, env)
		if diff := cmp.Diff([]fork.Hold{{ForkNum: 1, Why: "the run is short"}}, got.Held); diff != "" || got.Words() != "paused (budget)" || got.Status != fork.Running {
			t.Errorf("%q %s", got.Words(), diff)
		}
		add(AddBudgetInput{Add: 2 * fork.Dollar})
		add(AddBudgetInput{Add: fork.Dollar}) // at the same time
	}, 2*soon)
	env.ExecuteWorkflow(OrchestrationName, p)
	rep := report(t, env)
	if rep.Success != 3 || rep.Budget != 4*fork.Dollar || len(rep.Held) != 0 {
		t.Errorf("%+v", rep.Progress)
	}
	id := "default-test-workflow-id"
	want := []SetBudgetInput{{Run: id, Budget: 3 * fork.Dollar}, {Run: id, Budget: 4 * fork.Dollar}}
	if diff := cmp.Diff(want, sets); diff != "" {
		t.Error(diff)
	}
}

func TestMoneyForOneForkIsItsOwn(t *testing.T) {
	var d deeds
	var later fork.USD
	money := make(chan SetBudgetInput, 1)
	added := make(chan struct{})
	d.agent = func(_ context.Context, in RunAgentInput) (RunAgentOutput, error) {
		switch in.Spec.Num {
		case 1:
			select {
			case set := <-money:
				if set.Num != 2 || set.Budget != 3*fork.Dollar {
					return RunAgentOutput{}, fault.New("", fault.Invalid, "%+v", set)
				}
				<-added
			case <-time.After(20 * time.Second):
				return RunAgentOutput{}, fault.New("", fault.Invalid, "no money came")
			}
		case 2:
			later = in.Spec.ForkBudget
		}
		return RunAgentOutput{Status: fork.Success}, nil
	}
	d.budget = func(in SetBudgetInput) error {
		money <- in
		return nil
	}
	env := newEnv(t, &d)
	p := plan(2, 1)
	p.BudgetPerFork = fork.Dollar
	env.RegisterDelayedCallback(func() {
		env.UpdateWorkflow(AddBudget, "", &updates{t: t, done: func(_ any, err error) {
			if err != nil {
				t.Error(err)
			}
			close(added)
		}}, AddBudgetInput{Num: 2, Add: 2 * fork.Dollar})
	}, soon)
	env.ExecuteWorkflow(OrchestrationName, p)
	if rep := report(t, env); rep.Success != 2 || later != 3*fork.Dollar {
		t.Errorf("%+v, fork 2 began with %s", rep.Progress, later)
	}
}

func TestMoneyThatCouldDoNothingIsRefused(t *testing.T) {
	for name, row := range map[string]struct {
		spoil func(*fork.Plan)
		in    AddBudgetInput
	}{
		"a run without a budget":     {func(p *fork.Plan) { p.Budget = 0 }, AddBudgetInput{Add: 1}},
		"forks without budgets":      {func(*fork.Plan) {}, AddBudgetInput{Num: 1, Add: 1}},
		"nothing":                    {func(*fork.Plan) {}, AddBudgetInput{}},
		"less than nothing":          {func(*fork.Plan) {}, AddBudgetInput{Add: -1}},
		"for a fork that is not one": {func(p *fork.Plan) { p.BudgetPerFork = 1 }, AddBudgetInput{Num: 9, Add: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var d deeds
			d.agent = hang
			env := newEnv(t, &d)
			p := plan(1, 1)
			p.Budget = fork.Dollar
			row.spoil(&p)
			var refused error
			env.RegisterDelayedCallback(func() {
				env.UpdateWorkflow(AddBudget, "", &updates{t: t, done: func(_ any, err error) { refused = err }, refused: func(err error) { refused = err }}, row.in)
				env.SignalWorkflow(Cancel, nil)
			}, soon)
			env.ExecuteWorkflow(OrchestrationName, p)
			if k := fault.KindOf(Fault(refused)); k != fault.Invalid || d.calls["budget"] != 0 {
				t.Errorf("%s: %v", k, refused)
			}
		})
	}
}

// The clock of a fork stands still while it waits for money, and whoever
// follows it next follows the same attempt.
func TestForkThatWaitedHasItsTimeBack(t *testing.T) {
	var d deeds
	var seen []RunAgentInput
	d.agent = func(_ context.Context, in RunAgentInput) (RunAgentOutput, error) {
		switch seen = append(seen, in); len(seen) {
		case 1:
			return RunAgentOutput{Status: fork.Running, Unended: true, Held: time.Hour}, nil
		case 2:
			return RunAgentOutput{Status: fork.Failed, Error: "overloaded", Again: true, Held: time.Minute, Turns: 3}, nil
		}
		return RunAgentOutput{Status: fork.Success, Turns: 4}, nil
	}
	env := newEnv(t, &d)
	p := plan(1, 1)
	p.Budget, p.OnBudget = fork.Dollar, fork.OnBudgetPause
	env.ExecuteWorkflow(OrchestrationName, p)
	rep := report(t, env)
	if rep.Success != 1 || rep.Results[0].NumTurns != 7 || len(seen) != 3 {
		t.Fatalf("%+v", rep.Results)
	}
	for i, want := range []struct {
		attempt int
		moved   time.Duration
	}{{1, 0}, {1, time.Hour}, {2, time.Hour + time.Minute}} {
		if got := seen[i]; got.Attempt != want.attempt || got.Deadline.Sub(seen[0].Deadline) != want.moved {
			t.Errorf("call %d: attempt %d, deadline moved by %s", i, got.Attempt, got.Deadline.Sub(seen[0].Deadline))
		}
	}
}
