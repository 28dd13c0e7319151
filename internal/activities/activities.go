// Package activities holds the deeds that workflows ask for. It is the one
// place where sandboxes, agents, the gateway, git and the artifact store meet.
//
// An activity is a plain method of [Activities]: it runs without Temporal
// too. Each finds what an earlier attempt of itself began, so that the death
// of a worker costs nothing but the time until the next one looks.
package activities

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/temporal"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/metrics"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Options is what activities work with.
type Options struct {
	Providers sandbox.Set
	Gateway   *gateway.Gateway
	Repo      *repo.Store
	Artifacts *artifact.Store

	// Shared says that hosts without a worker see the artifact store, too.
	Shared bool

	// Doors are how host-bound sandboxes reach the gateway; nil: they do not.
	// GatewayURL is where all others do, a public https URL; it may be empty.
	Doors      Doors
	GatewayURL string

	// Program finds a program of this host that sandboxes are lent.
	Program func(name string) (path string, err error)

	// State tells who may still use the sandboxes of a run, or with num above 0
	// the sandbox of that fork. An error is not an answer: nothing is removed
	// after one.
	State func(ctx context.Context, run string, num int) (orchestrator.RunState, error)

	// Held tells a run that one of its forks waits for more money, or does not
	// any more. Nil: nobody is told.
	Held func(ctx context.Context, run string, hold fork.Hold) error

	// Progress tells a fork how far its agent is, for people who look at it in
	// Temporal. Nil: it is not told.
	Progress func(ctx context.Context, run string, num int, step fork.Step) error

	Deployment string           // labels the sandboxes of this installation
	Namespace  string           // Temporal's, likewise
	Queue      string           // the task queue that any worker serves
	HostQueue  string           // the task queue that only this host serves
	TempDir    string           // for bundles on their way; emptied by nobody else
	Metrics    *metrics.Metrics // nil: nothing is recorded
	Logger     *slog.Logger
}

// Doors are the ways from sandboxes of this host to the gateway, one for each.
// They outlive the worker.
type Doors interface {
	// Open returns the address of the fork's door, as sandbox.Spec.Gateway
	// takes it. A second call returns the same.
	Open(ctx context.Context, d Door) (addr string, err error)

	// Refused returns what the door did not let pass, lines of fork.Refusal.
	Refused(run string, num int) ([]byte, error)

	// Close closes the fork's door for good, and forgets what it refused. One
	// that is not open is no error.
	Close(run string, num int)
}

// A Door says whose it is and what may pass.
type Door struct {
	Run    string
	Fork   int    // 0: the base
	Egress string // as the user wrote it; empty: the default
	Repo   string // where the run's repository is
}

// Activities does what workflows decide. It is safe for concurrent use.
type Activities struct {
	Options

	mu    sync.Mutex
	used  map[string]bool        // providers that remember was told of
	bases map[string]*sync.Mutex // one preparation of a base at a time
}

// New returns the activities of one worker.
func New(o Options) *Activities {
	return &Activities{Options: o, bases: map[string]*sync.Mutex{}, used: map[string]bool{}}
}

// Serve registers every activity with w under its wire name.
func (a *Activities) Serve(w orchestrator.Registrar) {
	orchestrator.PrepareBase.Serve(w, a.PrepareBase)
	orchestrator.CreateSandbox.Serve(w, a.CreateSandbox)
	orchestrator.HealthCheck.Serve(w, a.HealthCheck)
	orchestrator.ExecuteCommand.Serve(w, a.ExecuteCommand)
	orchestrator.RunClaudeAgent.Serve(w, a.RunAgent)
	orchestrator.RunAgent.Serve(w, a.RunAgent)
	orchestrator.PauseSandbox.Serve(w, a.PauseSandbox)
	orchestrator.ResumeSandbox.Serve(w, a.ResumeSandbox)
	orchestrator.CollectResult.Serve(w, a.CollectResult)
	orchestrator.VerifyFork.Serve(w, a.VerifyFork)
	orchestrator.CleanupSandbox.Serve(w, a.CleanupSandbox)
	orchestrator.SetBudget.Serve(w, a.SetBudget)
	orchestrator.RecordMetrics.Serve(w, a.RecordMetrics)
	orchestrator.FindOrphanedSandboxes.Serve(w, a.FindOrphanedSandboxes)
}

// SetBudget changes a budget in the ledger. A second call changes nothing.
func (a *Activities) SetBudget(ctx context.Context, in orchestrator.SetBudgetInput) (orchestrator.None, error) {
	defer beat(ctx, phase("budget"))()
	return orchestrator.None{}, a.Gateway.SetBudget(ctx, in.Run, in.Num, in.Budget)
}

// RecordMetrics counts a fork that ended.
func (a *Activities) RecordMetrics(ctx context.Context, in orchestrator.RecordMetricsInput) (orchestrator.None, error) {
	a.ended(ctx, in)
	a.Metrics.ForkEnded(in.Result)
	if in.Cancelled > 0 {
		a.Metrics.ForkCancelled(in.Cancelled)
	}
	return orchestrator.None{}, nil
}

// beatEvery is how often an activity says that it lives. Cancellation comes
// with the answer, so this bounds how long a cancel takes.
const beatEvery = time.Second

// beat heartbeats on a timer of its own until the returned function is
// called: an activity that is quiet for long is not dead. Outside Temporal it
// does nothing.
func beat(ctx context.Context, live func() fork.Live) (stop func()) {
	if !activity.IsActivity(ctx) {
		return func() {}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(beatEvery)
		defer tick.Stop()
		for {
			activity.RecordHeartbeat(ctx, live())
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// phase is a heartbeat that only says what is going on.
func phase(name string) func() fork.Live {
	return func() fork.Live { return fork.Live{Phase: name} }
}

// stopping returns a channel that is closed when the worker shuts down, nil
// outside Temporal.
func stopping(ctx context.Context) <-chan struct{} {
	if !activity.IsActivity(ctx) {
		return nil
	}
	return activity.GetWorkerStopChannel(ctx)
}

// cancelAsked reports whether ctx ended because somebody wants the work to
// stop. It can also end because the server gave the activity to another
// worker; then the work is that one's.
func cancelAsked(ctx context.Context) bool {
	if !activity.IsActivity(ctx) {
		return ctx.Err() != nil
	}
	return temporal.IsCanceledError(context.Cause(ctx))
}
