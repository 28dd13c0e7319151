package activities

import (
	"context"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// bare is a provider that has its contract and no more.
type bare struct{ sandbox.Provider }

func (w *world) agentRuns(ctx context.Context, t *testing.T, ref sandbox.Ref) bool {
	t.Helper()
	sb, err := w.Providers.Attach(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	p, err := sb.Process(ctx, "agent-1")
	if err != nil {
		t.Fatal(err)
	}
	_, ended, err := p.Exit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return !ended
}

func TestAPausedAgentIsLetBeAndFollowedOn(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script slow"))
	hold := orchestrator.HoldSandboxInput{Ref: ref, Deadline: time.Now().Add(time.Hour)}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for len(w.model.Requests()) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		if _, err := w.PauseSandbox(t.Context(), hold); err != nil {
			t.Error(err)
		}
		cancel()
	}()
	out, err := w.RunAgent(ctx, runInput(spec, ref))
	if err != nil || !out.Paused || out.Status != "" {
		t.Fatalf("%+v, %v; want to hear of the pause", out, err)
	}
	// Nor does it end because its time is up.
	late := runInput(spec, ref)
	late.Deadline = time.Now().Add(-time.Second)
	if out, err := w.RunAgent(t.Context(), late); err != nil || !out.Paused {
		t.Errorf("%+v, %v; want to hear of the pause", out, err)
	}
	if !w.agentRuns(t.Context(), t, ref) {
		t.Fatal("the agent was ended")
	}
	if _, err := w.ResumeSandbox(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	out, err = w.RunAgent(t.Context(), runInput(spec, ref))
	if err != nil || out.Status != fork.Success || out.Turns != 2 {
		t.Errorf("%+v, %v", out, err)
	}
	if n := len(w.model.Requests()); n != 2 {
		t.Errorf("%d model calls, want 2: none is repeated", n)
	}
}

func TestAnAgentIsNotStartedInAPausedSandbox(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script write"))
	hold := orchestrator.HoldSandboxInput{Ref: ref, Deadline: time.Now().Add(time.Hour)}
	if _, err := w.PauseSandbox(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	if out, err := w.RunAgent(t.Context(), runInput(spec, ref)); err != nil || !out.Paused {
		t.Errorf("%+v, %v; want to hear of the pause", out, err)
	}
	if _, err := w.ResumeSandbox(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	if out, err := w.RunAgent(t.Context(), runInput(spec, ref)); err != nil || out.Status != fork.Success {
		t.Errorf("%+v, %v", out, err)
	}
}

func TestPauseMovesTheDeadlineOfTheSandbox(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	_, ref := w.start(t, plan("", "Play @script idle"))
	if _, err := w.PauseSandbox(t.Context(), orchestrator.HoldSandboxInput{Ref: ref, Deadline: time.Now().Add(-time.Second)}); err == nil {
		t.Log("the sandbox was paused before it was gone")
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) { // its timer is on its way
		_, err := w.Providers.Attach(t.Context(), ref)
		if fault.KindOf(err) == fault.NotFound {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the deadline was not moved: %v", err)
		}
	}
	if _, err := w.ResumeSandbox(t.Context(), orchestrator.HoldSandboxInput{Ref: ref, Deadline: time.Now().Add(time.Hour)}); fault.KindOf(err) != fault.Lost {
		t.Errorf("resume of a sandbox that is gone: %v", err)
	}
}

func TestPauseSaysWhenTheProviderCannot(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script idle"))
	w.Providers = sandbox.NewSet(bare{w.fake})
	_, err := w.PauseSandbox(t.Context(), orchestrator.HoldSandboxInput{Ref: ref, Deadline: time.Now().Add(time.Hour)})
	if fault.KindOf(err) != fault.Unsupported || fault.HintOf(err) == "" {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if w.isPaused(t.Context(), runInput(spec, ref)) {
		t.Error("what cannot be paused is paused")
	}
}
