package orchestrator

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Grace is how long a sandbox outlives its fork's time-out: long enough to
// collect the work and to survive a restart of the engine, short enough that
// nothing forgotten costs much.
const Grace = 15 * time.Minute

// Fork takes one spec from an empty sandbox to a branch, and leaves nothing
// running behind it, whatever happens on the way. It never fails: how the
// fork ended is in its result.
func Fork(ctx workflow.Context, in ForkInput) (fork.Result, error) {
	f := &forked{in: in, started: workflow.Now(ctx)}
	f.result = fork.Result{
		ForkNum: in.Spec.Num, Status: fork.Running, Model: in.Spec.Model, Agent: in.Spec.Agent, BaseCommit: in.Spec.BaseCommit,
	}
	if err := workflow.SetQueryHandler(ctx, GetStatus, func() (fork.Result, error) { return f.status(), nil }); err != nil {
		return f.result, err
	}
	if err := f.listenHold(ctx); err != nil {
		return f.result, err
	}
	work, stop := workflow.WithCancel(workflow.WithTaskQueue(ctx, in.Base.Queue))
	workflow.GoNamed(ctx, "cancel", func(ctx workflow.Context) {
		if workflow.GetSignalChannel(ctx, CancelExecution).Receive(ctx, nil) {
			stop()
		}
	})

	workflow.GoNamed(ctx, "cancelled", func(ctx workflow.Context) {
		work.Done().Receive(ctx, nil)
		f.cancelled = workflow.Now(ctx)
	})

	workflow.GoNamed(ctx, Progress, func(ctx workflow.Context) {
		var step fork.Step
		for workflow.GetSignalChannel(ctx, Progress).Receive(ctx, &step) {
			if f.step != nil { // else it comes too late
				*f.step = step
				f.describe(ctx, f.doing)
			}
			step = fork.Step{}
		}
	})

	f.carryOut(work)
	f.hold.over, f.hold.still = true, false // nothing of it stands still that is being destroyed
	if work.Err() != nil && f.result.Status != fork.Success {
		f.result.Status, f.result.Error, f.result.Hint = fork.Cancelled, "the fork was cancelled", ""
	}

	// Cancelling a fork must not cancel its clean-up.
	last, _ := workflow.NewDisconnectedContext(work)
	f.cleanUp(last)
	f.result.Duration = workflow.Now(ctx).Sub(f.started).Seconds()
	_, _ = attempt(last, recording, RecordMetrics, RecordMetricsInput{Run: in.Spec.Run, Result: brief(f.result), Cancelled: f.sinceCancel(ctx)})
	f.describe(last, "it has ended")
	upsertEnd(last, f.result.Status, f.result.Cost)
	// Whoever asked for a pause hears the end of it before the fork closes.
	_ = workflow.Await(last, func() bool { return workflow.AllHandlersFinished(last) })
	return f.result, nil
}

// forked is the state of one Fork.
type forked struct {
	in       ForkInput
	started  time.Time
	deadline time.Time // of the agent; moved by the time that it stood still
	ref      sandbox.Ref
	result   fork.Result
	hold     hold

	doing string     // what the fork does now, in words
	step  *fork.Step // how far its agent was when that was last told; nil: none is at work

	cancelled time.Time // when its work was; zero: it was not
}

// sinceCancel returns how long ago the work was cancelled, 0 when it was not.
func (f *forked) sinceCancel(ctx workflow.Context) time.Duration {
	if f.result.Status != fork.Cancelled || f.cancelled.IsZero() {
		return 0
	}
	return workflow.Now(ctx).Sub(f.cancelled)
}

// carryOut does the work: sandbox, health, agent, branch, verification.
func (f *forked) carryOut(ctx workflow.Context) {
	spec := f.in.Spec
	f.deadline = f.started.Add(spec.Timeout)

	f.describe(ctx, "its sandbox is made")
	ref, err := attempt(ctx, creating, CreateSandbox, CreateSandboxInput{Spec: spec, Base: f.in.Base, Deadline: f.deadline.Add(Grace)})
	if err != nil {
		f.fail(err)
		return
	}
	f.ref, f.result.SandboxID = ref, ref.ID
	if _, err = attempt(ctx, checking, HealthCheck, HealthCheckInput{Spec: spec, Ref: ref}); err != nil {
		f.fail(err)
		return
	}
	if !f.runAgent(ctx) {
		return
	}
	f.hold.over = true
	f.collect(ctx)
	f.verify(ctx)
}

// runAgent runs the agent, twice if a second attempt can help, and reports
// whether there may be work to collect.
func (f *forked) runAgent(ctx workflow.Context) bool {
	run := RunAgent
	if f.in.Spec.Agent == "claude" {
		run = RunClaudeAgent
	}
	slack := time.Duration(0)
	if f.in.Spec.OnBudget == fork.OnBudgetPause {
		slack = heldSlack
	}
	for n := 1; ; n++ {
		f.describe(ctx, fmt.Sprintf("its agent works, attempt %d", n))
		f.step = &fork.Step{}
		out, again, ok, err := f.follow(ctx, func(ctx workflow.Context) (RunAgentOutput, error) {
			left := f.deadline.Sub(workflow.Now(ctx))
			return attempt(ctx, following(left+slack), run, RunAgentInput{Spec: f.in.Spec, Ref: f.ref, Attempt: n, Deadline: f.deadline, Slack: slack})
		})
		f.step = nil
		if !ok {
			return false
		}
		if again {
			n-- // the same attempt, after a pause
			continue
		}
		if err != nil {
			f.fail(err)
			return false
		}
		f.deadline = f.deadline.Add(out.Held)
		if out.Unended {
			n--
			continue
		}
		f.result.Status, f.result.Output = out.Status, fork.Cut(out.Output, fork.MaxText)
		f.result.Error, f.result.Hint = fork.Cut(out.Error, errorText), out.Hint
		f.result.NumTurns += out.Turns
		f.result.Usage = out.Usage
		f.result.Short, f.result.ErrorKind = out.Short, out.ErrorKind
		if ctx.Err() != nil {
			return false
		}
		if !out.Again || n == agentAttempts.most || !retryWait(ctx, agentAttempts, n) {
			return true
		}
	}
}

// collect brings the work out as a branch, also that of an agent which did
// not end well: a half-done fix can be worth having.
func (f *forked) collect(ctx workflow.Context) {
	f.describe(ctx, "its work is collected")
	out, err := attempt(ctx, collecting, CollectResult, CollectResultInput{Spec: f.in.Spec, Ref: f.ref})
	switch {
	case err == nil:
		f.result.Branch, f.result.Commit = out.Branch, out.Commit
		f.result.FilesChanged, f.result.Insertions, f.result.Deletions = out.FilesChanged, out.Insertions, out.Deletions
		if out.Warning != "" {
			f.result.Hint = fork.Cut(out.Warning, errorText)
		}
	case f.result.Status == fork.Success:
		f.fail(err)
	default:
		f.result.Error = fork.Cut(fmt.Sprintf("%s; its work could not be collected: %s", f.result.Error, err), errorText)
	}
}

// verify asks whether the work is good: what there is of it, also when the
// agent did not end well, and the base itself when a successful agent left
// that as it was. It does not change how the fork ended.
func (f *forked) verify(ctx workflow.Context) {
	spec := f.in.Spec
	if spec.Verify == "" || f.result.Commit == "" && f.result.Status != fork.Success || ctx.Err() != nil {
		return
	}
	f.describe(ctx, "its work is verified")
	p := verifying(spec.Timeout)
	out, err := attempt(ctx, p, VerifyFork, VerifyForkInput{
		Spec: spec, Ref: f.ref, Base: f.in.Base, Commit: f.result.Commit, Deadline: workflow.Now(ctx).Add(p.limit + Grace),
	})
	if ctx.Err() != nil {
		return // nobody waits for the answer any more
	}
	if err != nil {
		out = fork.Verify{Status: fork.Failed, ExitCode: fork.Unverified, Output: fork.Cut(err.Error(), errorText)}
	}
	f.result.Verify = &out
}

// fail makes err the fork's result.
func (f *forked) fail(err error) {
	f.result.Status = statusOf(err)
	f.result.Error, f.result.Hint = fork.Cut(err.Error(), errorText), fault.HintOf(err)
}

// cleanUp frees everything the fork may have, known or not: a sandbox whose
// creation was cut off has no ref yet.
func (f *forked) cleanUp(ctx workflow.Context) {
	out, err := attempt(ctx, cleaning, CleanupSandbox, CleanupSandboxInput{
		Ref: f.ref, Provider: f.in.Spec.Provider, Run: f.in.Spec.Run, Num: f.in.Spec.Num,
	})
	if err != nil {
		// The sandbox's own deadline and the reaper are what is left.
		workflow.GetLogger(ctx).Error("Sandbox left behind", logs.Sandbox, f.ref.ID, logs.Error, err)
		f.result.Error = fork.Cut(f.result.Error+"\nthe sandbox could not be removed: "+err.Error(), errorText)
		return
	}
	f.result.Usage = out.Usage
}

// brief drops the texts that a metric has no use for.
func brief(r fork.Result) fork.Result {
	r.Output, r.Error, r.Hint = "", "", ""
	if r.Verify != nil {
		v := *r.Verify
		v.Output = ""
		r.Verify = &v
	}
	return r
}
