package orchestrator

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/testsuite"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// holding is an agent that works until it is cancelled, which is what becomes
// of it when its sandbox is paused; after a resume it ends.
type holding struct {
	mu    sync.Mutex
	calls []RunAgentInput
	held  []HoldSandboxInput
}

func (h *holding) serve(d *deeds) {
	d.agent = func(ctx context.Context, in RunAgentInput) (RunAgentOutput, error) {
		h.mu.Lock()
		h.calls = append(h.calls, in)
		first := len(h.calls) == 1
		h.mu.Unlock()
		if first {
			if _, err := hang(ctx, in); ctx.Err() == nil {
				return RunAgentOutput{}, err
			}
			return RunAgentOutput{Paused: true}, nil
		}
		return RunAgentOutput{Status: fork.Success, Output: "went on", Turns: 3}, nil
	}
	hold := func(in HoldSandboxInput) error {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.held = append(h.held, in)
		return nil
	}
	d.pause, d.resume = hold, hold
}

func forkInput() ForkInput {
	return ForkInput{
		Spec: fork.Spec{Run: "r", Num: 1, Model: "sonnet", Timeout: time.Hour, Provider: "test", Agent: "claude"},
		Base: Base{Queue: DefaultTaskQueue, Commit: "c0ffee", Frozen: "base"},
	}
}

// tell sends an update, and hands its answer to done.
func tell(t *testing.T, env *testsuite.TestWorkflowEnvironment, verb string, done func(fork.Result, error)) {
	env.UpdateWorkflow(verb, "", &updates{t: t, done: func(v any, err error) {
		r, _ := v.(fork.Result)
		done(r, err)
	}})
}

func wantAnswer(t *testing.T, paused bool) func(fork.Result, error) {
	return func(r fork.Result, err error) {
		if err != nil || r.Paused != paused {
			t.Errorf("answer: paused %v, %v; want %v", r.Paused, err, paused)
		}
	}
}

func ended(t *testing.T, env *testsuite.TestWorkflowEnvironment) fork.Result {
	t.Helper()
	var r fork.Result
	if err := env.GetWorkflowResult(&r); err != nil {
		t.Fatal(err)
	}
	if r.Paused {
		t.Error("a fork that has ended stands still")
	}
	return r
}

func TestAPausedForkGetsItsTimeBack(t *testing.T) {
	t.Parallel() // it waits for a heartbeat
	var d deeds
	var h holding
	h.serve(&d)
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(func() { tell(t, env, Pause, wantAnswer(t, true)) }, soon)
	env.RegisterDelayedCallback(func() {
		var r fork.Result
		v, err := env.QueryWorkflow(GetStatus)
		if err == nil {
			err = v.Get(&r)
		}
		if err != nil || !r.Paused || r.Status != fork.Running {
			t.Errorf("status while paused: %+v, %v", r, err)
		}
		tell(t, env, Pause, wantAnswer(t, true)) // twice is once
		tell(t, env, Resume, wantAnswer(t, false))
	}, 3*time.Hour)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.Success || r.Output != "went on" || r.NumTurns != 3 || r.Commit == "" {
		t.Errorf("%+v", r)
	}
	if len(h.calls) != 2 || h.calls[0].Attempt != 1 || h.calls[1].Attempt != 1 {
		t.Fatalf("the agent was followed %d times: %+v", len(h.calls), h.calls)
	}
	// Three hours of an hour's time: none of it counts.
	if moved := h.calls[1].Deadline.Sub(h.calls[0].Deadline); moved < 3*time.Hour-time.Minute || moved > 3*time.Hour+time.Minute {
		t.Errorf("the deadline was moved by %s", moved)
	}
	if len(h.held) != 2 || h.held[0].Ref.ID != "sb-1" {
		t.Fatalf("%+v", h.held)
	}
	if left := h.held[0].Deadline.Sub(h.calls[0].Deadline); left != maxHold+grace {
		t.Errorf("the paused sandbox outlives its fork's deadline by %s", left)
	}
	if left := h.held[1].Deadline.Sub(h.calls[1].Deadline); left < grace-time.Minute || left > grace {
		t.Errorf("the resumed sandbox outlives its fork's deadline by %s", left)
	}
}

func TestAForkThatCannotBePausedGoesOn(t *testing.T) {
	var d deeds
	release := make(chan struct{})
	d.agent = func(context.Context, RunAgentInput) (RunAgentOutput, error) {
		<-release
		return RunAgentOutput{Status: fork.Success}, nil
	}
	d.pause = func(HoldSandboxInput) error {
		return fault.New("pause", fault.Unsupported, "it cannot").Hinted("Do without.")
	}
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(func() {
		tell(t, env, Pause, func(_ fork.Result, err error) {
			if err = Fault(err); fault.KindOf(err) != fault.Unsupported || fault.HintOf(err) != "Do without." {
				t.Errorf("answer: %v, hint %q", err, fault.HintOf(err))
			}
			close(release)
		})
	}, soon)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.Success || d.calls["agent"] != 1 || d.calls["resume"] != 0 {
		t.Errorf("%+v, %v", r, d.calls)
	}
}

func TestAPausedForkCanBeCancelled(t *testing.T) {
	t.Parallel() // it waits for a heartbeat
	var d deeds
	var h holding
	h.serve(&d)
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(func() { tell(t, env, Pause, wantAnswer(t, true)) }, soon)
	env.RegisterDelayedCallback(func() { env.SignalWorkflow(CancelExecution, nil) }, time.Hour)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.Cancelled || d.calls["clean"] != 1 || d.calls["resume"] != 0 || d.now != 0 {
		t.Errorf("%+v, %v", r, d.calls)
	}
}

func TestAForkThatNobodyResumesEndsInTime(t *testing.T) {
	t.Parallel() // it waits for a heartbeat
	var d deeds
	var h holding
	h.serve(&d)
	env := newEnv(t, &d)
	env.RegisterDelayedCallback(func() { tell(t, env, Pause, wantAnswer(t, true)) }, soon)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.TimedOut || !strings.Contains(r.Error, "paused") || d.calls["clean"] != 1 {
		t.Errorf("%+v, %v", r, d.calls)
	}
}

func TestAnAgentThatIsPausedBeforeItStartsWaits(t *testing.T) {
	var d deeds
	var env *testsuite.TestWorkflowEnvironment
	paused := make(chan struct{})
	d.health = func() error {
		<-paused // the update is there before the agent could be started
		return nil
	}
	d.pause = func(HoldSandboxInput) error {
		if d.count("agent") != 1 {
			t.Error("the agent was started")
		}
		return nil
	}
	env = newEnv(t, &d)
	env.RegisterDelayedCallback(func() {
		tell(t, env, Pause, wantAnswer(t, true))
		close(paused)
	}, soon)
	env.RegisterDelayedCallback(func() { tell(t, env, Resume, wantAnswer(t, false)) }, 5*time.Hour)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.Success || d.calls["agent"] != 2 || d.calls["pause"] != 1 { // once by d.pause
		t.Errorf("%+v, %v", r, d.calls)
	}
}

func TestAnAgentThatEndsAsItIsPausedIsNotRunAgain(t *testing.T) {
	var d deeds
	pausing, handled := make(chan struct{}), make(chan struct{})
	d.agent = func(context.Context, RunAgentInput) (RunAgentOutput, error) {
		<-pausing
		return RunAgentOutput{Status: fork.Success, Output: "done just now"}, nil
	}
	d.pause = func(HoldSandboxInput) error {
		close(pausing)
		<-handled
		return nil
	}
	env := newEnv(t, &d)
	env.SetOnActivityCompletedListener(func(info *activity.Info, _ converter.EncodedValue, _ error) {
		if info.ActivityType.Name == RunClaudeAgent.Name {
			close(handled)
		}
	})
	env.RegisterDelayedCallback(func() { tell(t, env, Pause, wantAnswer(t, true)) }, soon)
	env.RegisterDelayedCallback(func() { tell(t, env, Resume, wantAnswer(t, false)) }, time.Hour)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.Success || r.Output != "done just now" || d.calls["agent"] != 1 || d.calls["resume"] != 1 || d.calls["collect"] != 1 {
		t.Errorf("%+v, %v", r, d.calls)
	}
}

func TestPauseOfAForkWhoseAgentHasEndedChangesNothing(t *testing.T) {
	var d deeds
	var env *testsuite.TestWorkflowEnvironment
	told := make(chan struct{})
	d.collect = func(CollectResultInput) (CollectResultOutput, error) {
		<-told
		return CollectResultOutput{Branch: "b", Commit: "deed"}, nil
	}
	env = newEnv(t, &d)
	env.RegisterDelayedCallback(func() {
		tell(t, env, Pause, wantAnswer(t, false))
		tell(t, env, Resume, wantAnswer(t, false))
		close(told)
	}, soon)
	env.ExecuteWorkflow(Fork, forkInput())
	if r := ended(t, env); r.Status != fork.Success || r.Commit != "deed" || d.calls["pause"] != 0 {
		t.Errorf("%+v, %v", r, d.calls)
	}
}
