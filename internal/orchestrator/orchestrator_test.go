package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/testsuite"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// deeds serves every activity with plain functions that a test can replace,
// and keeps count of what was done.
type deeds struct {
	mu      sync.Mutex
	calls   map[string]int
	create  func(CreateSandboxInput) error
	health  func() error
	agent   func(context.Context, RunAgentInput) (RunAgentOutput, error)
	collect func(CollectResultInput) (CollectResultOutput, error)
	verify  func(context.Context, VerifyForkInput) (fork.Verify, error)
	clean   func(CleanupSandboxInput) error
	find    func(FindOrphanedSandboxesInput) (FindOrphanedSandboxesOutput, error)
	prepare func() error
	pause   func(HoldSandboxInput) error
	resume  func(HoldSandboxInput) error
	budget  func(SetBudgetInput) error
	now     int // sandboxes that exist
	most    int // that existed at once
}

func (d *deeds) count(name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls[name]++
	return d.calls[name]
}

func (d *deeds) serve(w Registrar) {
	PrepareBase.Serve(w, func(context.Context, PrepareBaseInput) (Base, error) {
		d.count("prepare")
		if d.prepare != nil {
			return Base{}, d.prepare()
		}
		return Base{Queue: DefaultTaskQueue, Commit: "c0ffee", Frozen: "base"}, nil
	})
	CreateSandbox.Serve(w, func(_ context.Context, in CreateSandboxInput) (sandbox.Ref, error) {
		d.count("create")
		if d.create != nil {
			if err := d.create(in); err != nil {
				return sandbox.Ref{}, err
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.now++
		d.most = max(d.most, d.now)
		return sandbox.Ref{Provider: "test", ID: fmt.Sprint("sb-", in.Spec.Num)}, nil
	})
	HealthCheck.Serve(w, func(context.Context, HealthCheckInput) (None, error) {
		d.count("health")
		if d.health != nil {
			return None{}, d.health()
		}
		return None{}, nil
	})
	run := func(ctx context.Context, in RunAgentInput) (RunAgentOutput, error) {
		d.count("agent")
		if d.agent != nil {
			return d.agent(ctx, in)
		}
		return RunAgentOutput{Status: fork.Success, Output: "done", Turns: 2, Usage: fork.Usage{Cost: fork.Dollar / 10}}, nil
	}
	RunClaudeAgent.Serve(w, run)
	RunAgent.Serve(w, run)
	PauseSandbox.Serve(w, func(_ context.Context, in HoldSandboxInput) (None, error) {
		d.count("pause")
		if d.pause != nil {
			return None{}, d.pause(in)
		}
		return None{}, nil
	})
	ResumeSandbox.Serve(w, func(_ context.Context, in HoldSandboxInput) (None, error) {
		d.count("resume")
		if d.resume != nil {
			return None{}, d.resume(in)
		}
		return None{}, nil
	})
	CollectResult.Serve(w, func(_ context.Context, in CollectResultInput) (CollectResultOutput, error) {
		d.count("collect")
		if d.collect != nil {
			return d.collect(in)
		}
		return CollectResultOutput{Branch: fork.Branch(in.Spec.Run, in.Spec.Num), Commit: "deed", FilesChanged: 1}, nil
	})
	VerifyFork.Serve(w, func(ctx context.Context, in VerifyForkInput) (fork.Verify, error) {
		d.count("verify")
		if d.verify != nil {
			return d.verify(ctx, in)
		}
		return fork.Verify{Status: fork.Success, Duration: 1.5}, nil
	})
	CleanupSandbox.Serve(w, func(_ context.Context, in CleanupSandboxInput) (CleanupSandboxOutput, error) {
		d.count("clean")
		if d.clean != nil {
			if err := d.clean(in); err != nil {
				return CleanupSandboxOutput{}, err
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if in.Ref.ID != "" {
			d.now--
		}
		return CleanupSandboxOutput{Usage: fork.Usage{Cost: fork.Dollar / 10}}, nil
	})
	SetBudget.Serve(w, func(_ context.Context, in SetBudgetInput) (None, error) {
		d.count("budget")
		if d.budget != nil {
			return None{}, d.budget(in)
		}
		return None{}, nil
	})
	RecordMetrics.Serve(w, func(_ context.Context, in RecordMetricsInput) (None, error) {
		d.count("metrics")
		return None{}, nil
	})
	FindOrphanedSandboxes.Serve(w, func(_ context.Context, in FindOrphanedSandboxesInput) (FindOrphanedSandboxesOutput, error) {
		if d.find != nil {
			return d.find(in)
		}
		return FindOrphanedSandboxesOutput{Orphans: []CleanupSandboxInput{{Ref: sandbox.Ref{ID: "old"}}, {Ref: sandbox.Ref{ID: "older"}}}}, nil
	})
}

func newEnv(t *testing.T, d *deeds) *testsuite.TestWorkflowEnvironment {
	t.Helper()
	d.calls = map[string]int{}
	var suite testsuite.WorkflowTestSuite
	env := suite.NewTestWorkflowEnvironment()
	env.SetWorkerOptions(worker.Options{Interceptors: []interceptor.WorkerInterceptor{&Faults{}}})
	env.SetTestTimeout(time.Minute)
	Serve(env)
	d.serve(env)
	return env
}

func plan(forks, window int) fork.Plan {
	return fork.Plan{Repo: "/r", Prompt: "do it", Forks: forks, Model: "sonnet", MaxConcurrent: window, Timeout: time.Hour, Provider: "test", Agent: "claude"}
}

func report(t *testing.T, env *testsuite.TestWorkflowEnvironment) fork.Report {
	t.Helper()
	if !env.IsWorkflowCompleted() {
		t.Fatal("the run did not end")
	}
	var rep fork.Report
	v, err := env.QueryWorkflow(GetProgress)
	if err == nil {
		err = v.Get(&rep.Progress)
	}
	if err != nil {
		t.Fatal(err)
	}
	for from := 1; from > 0; {
		v, err := env.QueryWorkflow(GetResults, ResultsInput{From: from})
		var page ResultsOutput
		if err == nil {
			err = v.Get(&page)
		}
		if err != nil {
			t.Fatal(err)
		}
		rep.Results = append(rep.Results, page.Results...)
		from = page.Next
	}
	return rep
}

func TestRunReportsEveryForkInOrder(t *testing.T) {
	var d deeds
	env := newEnv(t, &d)
	env.ExecuteWorkflow(OrchestrationName, plan(120, 7))
	if err := env.GetWorkflowError(); err != nil {
		t.Fatal(err)
	}
	rep := report(t, env)
	if rep.Status != fork.Success || rep.Success != 120 || rep.Cost != 12*fork.Dollar || len(rep.Results) != 120 {
		t.Fatalf("%+v", rep.Progress)
	}
	for i, res := range rep.Results {
		if res.ForkNum != i+1 || res.Status != fork.Success || res.Output != "done" || res.NumTurns != 2 || res.Commit != "deed" || res.SandboxID != fmt.Sprint("sb-", i+1) {
			t.Fatalf("result %d: %+v", i, res)
		}
	}
	if d.calls["clean"] != 120 || d.calls["metrics"] != 120 || d.now != 0 {
		t.Errorf("%v, %d sandboxes left", d.calls, d.now)
	}
}

func TestNeverMoreForksAtOnceThanAsked(t *testing.T) {
	var d deeds
	d.agent = func(_ context.Context, in RunAgentInput) (RunAgentOutput, error) {
		return RunAgentOutput{Status: fork.Success}, nil
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(OrchestrationName, plan(20, 3))
	if rep := report(t, env); rep.Success != 20 {
		t.Fatalf("%+v", rep.Progress)
	}
	if d.most > 3 {
		t.Errorf("%d sandboxes at once, 3 were allowed", d.most)
	}
}

func TestAForkThatEndsFreesItsSlotAtOnce(t *testing.T) {
	// Fork 1 hangs until all others have run: with a batch instead of a
	// sliding window it would wait for ever.
	var d deeds
	others := make(chan struct{}, 20)
	d.agent = func(ctx context.Context, in RunAgentInput) (RunAgentOutput, error) {
		if in.Spec.Num != 1 {
			others <- struct{}{}
			return RunAgentOutput{Status: fork.Success}, nil
		}
		for range 9 {
			select {
			case <-others:
			case <-time.After(20 * time.Second):
				return RunAgentOutput{}, fault.New("wait", fault.Invalid, "the other forks did not run")
			}
		}
		return RunAgentOutput{Status: fork.Success}, nil
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(OrchestrationName, plan(10, 2))
	if rep := report(t, env); rep.Success != 10 {
		t.Fatalf("%+v", rep)
	}
}

func TestForkDestroysSandboxWhenAgentFails(t *testing.T) {
	for name, spoil := range map[string]func(*deeds){
		"agent": func(d *deeds) {
			d.agent = func(context.Context, RunAgentInput) (RunAgentOutput, error) {
				return RunAgentOutput{}, errors.New("boom")
			}
		},
		"health": func(d *deeds) { d.health = func() error { return errors.New("sick") } },
		"create": func(d *deeds) { d.create = func(CreateSandboxInput) error { return errors.New("no room") } },
		"collect": func(d *deeds) {
			d.collect = func(CollectResultInput) (CollectResultOutput, error) {
				return CollectResultOutput{}, errors.New("bad git")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var d deeds
			spoil(&d)
			env := newEnv(t, &d)
			env.ExecuteWorkflow(OrchestrationName, plan(1, 1))
			if err := env.GetWorkflowError(); err != nil {
				t.Fatalf("a fork that fails is a result, not an error of the run: %v", err)
			}
			rep := report(t, env)
			if rep.Failed != 1 || rep.Results[0].Status != fork.Failed || rep.Results[0].Error == "" {
				t.Errorf("%+v", rep.Results)
			}
			if d.calls["clean"] != 1 || d.now != 0 || d.calls["metrics"] != 1 {
				t.Errorf("%v, %d sandboxes left", d.calls, d.now)
			}
		})
	}
}

func TestRetriesAreThosePromised(t *testing.T) {
	again := func(context.Context, RunAgentInput) (RunAgentOutput, error) {
		return RunAgentOutput{Status: fork.Failed, Error: "overloaded", Again: true}, nil
	}
	for name, row := range map[string]struct {
		spoil func(*deeds)
		call  string
		want  int
		waits time.Duration
	}{
		"create three times": {func(d *deeds) { d.create = func(CreateSandboxInput) error { return errors.New("busy") } }, "create", 3, 15 * time.Second},
		"create once when denied": {func(d *deeds) {
			d.create = func(CreateSandboxInput) error { return fault.New("", fault.Denied, "no key") }
		}, "create", 1, 0},
		"create once when invalid": {func(d *deeds) {
			d.create = func(CreateSandboxInput) error { return fault.New("", fault.Invalid, "no base") }
		}, "create", 1, 0},
		"health once":                  {func(d *deeds) { d.health = func() error { return errors.New("sick") } }, "health", 1, 0},
		"agent twice when it can help": {func(d *deeds) { d.agent = again }, "agent", 2, 10 * time.Second},
		"cleanup three times":          {func(d *deeds) { d.clean = func(CleanupSandboxInput) error { return errors.New("busy") } }, "clean", 3, 6 * time.Second},
		"agent once when it cannot": {func(d *deeds) {
			d.agent = func(context.Context, RunAgentInput) (RunAgentOutput, error) {
				return RunAgentOutput{Status: fork.BudgetExceeded}, nil
			}
		}, "agent", 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var d deeds
			row.spoil(&d)
			env := newEnv(t, &d)
			env.ExecuteWorkflow(OrchestrationName, plan(1, 1))
			if got := d.calls[row.call]; got != row.want {
				t.Errorf("%s was tried %d times, want %d", row.call, got, row.want)
			}
			took := time.Duration(report(t, env).Duration * float64(time.Second))
			if took < row.waits || took > row.waits+5*time.Second {
				t.Errorf("waited %s between attempts, want %s", took, row.waits)
			}
		})
	}
}

func TestBudgetStopsForksThatHaveNotStarted(t *testing.T) {
	var d deeds
	d.agent = func(_ context.Context, in RunAgentInput) (RunAgentOutput, error) {
		if in.Spec.Num == 3 {
			return RunAgentOutput{Status: fork.BudgetExceeded, Error: "402"}, nil
		}
		return RunAgentOutput{Status: fork.Success}, nil
	}
	env := newEnv(t, &d)
	p := plan(10, 1)
	p.Budget = fork.Dollar
	env.ExecuteWorkflow(OrchestrationName, p)
	rep := report(t, env)
	if rep.Status != fork.BudgetExceeded || rep.Success != 2 || d.calls["create"] != 3 {
		t.Errorf("%+v, %v", rep.Progress, d.calls)
	}
	for _, res := range rep.Results[2:] {
		if res.Status != fork.BudgetExceeded || res.Error == "" {
			t.Errorf("%+v", res)
		}
	}
}

func TestSpentBudgetStopsForksThatHaveNotStarted(t *testing.T) {
	var d deeds // each fork costs $0.10
	env := newEnv(t, &d)
	p := plan(10, 1)
	p.Budget = fork.Dollar / 4
	env.ExecuteWorkflow(OrchestrationName, p)
	if rep := report(t, env); rep.Success != 3 || d.calls["create"] != 3 || rep.Status != fork.BudgetExceeded {
		t.Errorf("%+v", rep.Progress)
	}
}

// hang is an agent that works until it is told to stop.
func hang(ctx context.Context, _ RunAgentInput) (RunAgentOutput, error) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return RunAgentOutput{Status: fork.Cancelled}, nil
		case <-tick.C:
			activity.RecordHeartbeat(ctx) // cancellation comes with the answer
		}
	}
}

// soon is when a callback fires while agents hang: the test environment's
// clock is the real one as long as an activity runs.
const soon = 300 * time.Millisecond

func TestCancelAnswersWhenEverySandboxIsGone(t *testing.T) {
	var d deeds
	d.agent = hang
	env := newEnv(t, &d)
	var answer fork.Progress
	env.RegisterDelayedCallback(func() {
		env.UpdateWorkflow(Cancel, "", &updates{t: t, done: func(v any, err error) {
			if err != nil {
				t.Error(err)
			}
			answer = v.(fork.Progress)
			if d.now != 0 {
				t.Errorf("cancel answered while %d sandboxes were there", d.now)
			}
		}})
	}, soon)
	env.ExecuteWorkflow(OrchestrationName, plan(8, 3))
	rep := report(t, env)
	if rep.Status != fork.Cancelled || answer.Status != fork.Cancelled || d.calls["create"] != 3 || d.calls["clean"] != 3 {
		t.Errorf("%+v; answer %+v; %v", rep.Progress, answer, d.calls)
	}
	for _, res := range rep.Results {
		if res.Status != fork.Cancelled || res.Error == "" {
			t.Errorf("%+v", res)
		}
	}
	if err := env.GetWorkflowError(); err != nil {
		t.Errorf("a cancelled run is no failure: %v", err)
	}
}

func TestCancelOfTheWorkflowItselfCleansUpToo(t *testing.T) {
	var d deeds
	d.agent = hang
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(env.CancelWorkflow, soon)
	env.ExecuteWorkflow(OrchestrationName, plan(4, 2))
	if rep := report(t, env); rep.Status != fork.Cancelled || d.now != 0 || d.calls["clean"] != 2 {
		t.Errorf("%+v, %v", rep.Progress, d.calls)
	}
}

func TestSignalCancelsToo(t *testing.T) {
	var d deeds
	d.agent = hang
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(func() { env.SignalWorkflow(Cancel, nil) }, soon)
	env.ExecuteWorkflow(OrchestrationName, plan(4, 2))
	if rep := report(t, env); rep.Status != fork.Cancelled || d.now != 0 {
		t.Errorf("%+v", rep.Progress)
	}
}

func TestCancelOfOneForkLetsTheOthersGoOn(t *testing.T) {
	var d deeds
	d.agent = func(ctx context.Context, in RunAgentInput) (RunAgentOutput, error) {
		if in.Spec.Num == 2 {
			return hang(ctx, in)
		}
		return RunAgentOutput{Status: fork.Success}, nil
	}
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(func() {
		if err := env.SignalWorkflowByID(fork.WorkflowID("default-test-workflow-id", 2), CancelExecution, nil); err != nil {
			t.Error(err)
		}
	}, soon)
	env.ExecuteWorkflow(OrchestrationName, plan(3, 3))
	rep := report(t, env)
	if rep.Success != 2 || rep.Results[1].Status != fork.Cancelled || d.now != 0 {
		t.Errorf("%+v", rep.Results)
	}
}

func TestPauseLetsNoForkStartUntilResume(t *testing.T) {
	var d deeds
	env := newEnv(t, &d)
	var before, during int
	env.RegisterDelayedCallback(func() { env.SignalWorkflow(Pause, nil) }, 0)
	env.RegisterDelayedCallback(func() {
		before = d.calls["create"]
	}, time.Minute)
	env.RegisterDelayedCallback(func() {
		during = d.calls["create"]
		v, err := env.QueryWorkflow(GetProgress)
		var p fork.Progress
		if err != nil || v.Get(&p) != nil || !p.Paused {
			t.Errorf("%+v, %v", p, err)
		}
		env.UpdateWorkflow(Resume, "", &updates{t: t, done: func(v any, err error) {
			if err != nil || v.(fork.Progress).Paused {
				t.Errorf("%+v, %v", v, err)
			}
		}})
	}, time.Hour)
	env.ExecuteWorkflow(OrchestrationName, plan(5, 1))
	if rep := report(t, env); rep.Success != 5 || before != during || during > 1 {
		t.Errorf("%+v; %d then %d sandboxes while paused", rep.Progress, before, during)
	}
}

func TestRunWithoutBaseSaysWhyAndFails(t *testing.T) {
	var d deeds
	d.prepare = func() error {
		return fault.New("resolve", fault.NotFound, "no branch %q", "x").Hinted("There is: main.")
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(OrchestrationName, plan(2, 1))
	err := Fault(env.GetWorkflowError())
	if fault.KindOf(err) != fault.NotFound || fault.HintOf(err) != "There is: main." {
		t.Errorf("%v (%s; %s)", err, fault.KindOf(err), fault.HintOf(err))
	}
	rep := report(t, env)
	if rep.Status != fork.Failed || rep.ErrorKind != string(fault.NotFound) || !strings.Contains(rep.Error, "no branch") || rep.Failed != 2 || d.calls["prepare"] != 1 {
		t.Errorf("%+v, %v", rep, d.calls)
	}
}

func TestEveryKindOfFaultComesBackFromTemporalAsItWas(t *testing.T) {
	for _, kind := range []fault.Kind{fault.Internal, fault.Invalid, fault.NotFound, fault.Denied, fault.Unavailable, fault.OverBudget, fault.Timeout, fault.Lost, fault.Full} {
		for _, name := range []string{CreateSandbox.Name, RunAgent.Name} {
			got := Fault(fmt.Errorf("activity failed: %w", wire(fault.New("op", kind, "text").Hinted("hint"), name)))
			if fault.KindOf(got) != kind || got.Error() != "op: text" || fault.HintOf(got) != "hint" {
				t.Errorf("%s: %s %q %q", kind, fault.KindOf(got), got, fault.HintOf(got))
			}
		}
	}
}

func TestStatusFollowsTheFault(t *testing.T) {
	for kind, want := range map[fault.Kind]fork.Status{
		fault.OverBudget: fork.BudgetExceeded, fault.Timeout: fork.TimedOut, fault.Lost: fork.Lost, fault.Cancelled: fork.Cancelled, fault.Invalid: fork.Failed,
	} {
		if got := statusOf(fault.New("", kind, "x")); got != want {
			t.Errorf("%s: %s, want %s", kind, got, want)
		}
	}
}

func TestCleanupRemovesWhatItFinds(t *testing.T) {
	var d deeds
	gone := []string{}
	d.clean = func(in CleanupSandboxInput) error {
		if in.Ref.ID == "old" {
			return fault.New("", fault.Denied, "not ours")
		}
		gone = append(gone, in.Ref.ID)
		return nil
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(CleanupName, CleanupInput{MaxAge: time.Hour})
	var out CleanupOutput
	if err := env.GetWorkflowResult(&out); err != nil || out.Found != 2 || out.Removed != 1 || !slices.Equal(gone, []string{"older"}) ||
		len(out.Problems) != 1 || out.Items[0].Removed || out.Items[0].Kept == "" || !out.Items[1].Removed {
		t.Errorf("%+v, %v, %v", out, gone, err)
	}
}

func TestCleanupGoesThroughPagesAndContinuesAsNew(t *testing.T) {
	const pages = cleanupPages + 3
	var d deeds
	var asked []FindOrphanedSandboxesInput
	d.find = func(in FindOrphanedSandboxesInput) (FindOrphanedSandboxesOutput, error) {
		asked = append(asked, in)
		out := FindOrphanedSandboxesOutput{Queue: "q@host", Kept: map[string]int{"in use": len(asked)}, Problems: []string{"e2b is down"}}
		for i := range CleanupPage {
			out.Orphans = append(out.Orphans, CleanupSandboxInput{Ref: sandbox.Ref{ID: fmt.Sprint(len(asked), "-", i)}, Orphan: &in.OrphanRule})
		}
		if len(asked) < pages {
			out.Next = fmt.Sprint(len(asked))
		}
		return out, nil
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(CleanupName, CleanupInput{MaxAge: time.Hour})
	var next *workflow.ContinueAsNewError
	if err := env.GetWorkflowError(); !errors.As(err, &next) || len(asked) != cleanupPages {
		t.Fatalf("%v after %d pages", err, len(asked))
	}
	var in CleanupInput
	if err := converter.GetDefaultDataConverter().FromPayloads(next.Input, &in); err != nil {
		t.Fatal(err)
	}
	if size := next.Input.Size(); size > 128<<10 {
		t.Errorf("it goes on with %d bytes", size)
	}
	env = newEnv(t, &d)
	env.ExecuteWorkflow(CleanupName, in)
	var out CleanupOutput
	if err := env.GetWorkflowResult(&out); err != nil {
		t.Fatal(err)
	}
	if out.Found != pages*CleanupPage || out.Removed != out.Found || len(out.Items) != CleanupItems || len(out.Problems) != 1 || out.Kept["in use"] != 1 {
		t.Errorf("found %d, removed %d, %d items, %q, %v", out.Found, out.Removed, len(out.Items), out.Problems, out.Kept)
	}
	for i, a := range asked {
		if want := map[bool]string{true: "", false: fmt.Sprint(i)}[i == 0]; a.After != want || a.Grace != CleanupGrace || a.MaxAge != time.Hour {
			t.Errorf("page %d: %+v", i, a)
		}
	}
}

func TestDryCleanupRemovesNothing(t *testing.T) {
	var d deeds
	d.clean = func(in CleanupSandboxInput) error {
		t.Errorf("%s was removed", in.Ref.ID)
		return nil
	}
	env := newEnv(t, &d)
	env.ExecuteWorkflow(CleanupName, CleanupInput{MaxAge: time.Hour, DryRun: true})
	var out CleanupOutput
	if err := env.GetWorkflowResult(&out); err != nil || !out.DryRun || out.Found != 2 || out.Removed != 0 || len(out.Items) != 2 {
		t.Errorf("%+v, %v", out, err)
	}
}

// updates receives the answer to an update.
type updates struct {
	t       *testing.T
	done    func(any, error)
	refused func(error) // nil: it must not be
}

func (u *updates) Accept()                 {}
func (u *updates) Complete(v any, e error) { u.done(v, e) }

func (u *updates) Reject(err error) {
	if u.refused == nil {
		u.t.Error(err)
		return
	}
	u.refused(err)
}
