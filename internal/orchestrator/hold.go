package orchestrator

import (
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// maxHold is how long a fork may stand still. Nobody may be left who would
// resume it, and a sandbox that stands still holds memory.
const maxHold = 24 * time.Hour

// hold is how a fork stands still while its agent would run. The time is not
// counted against the fork.
type hold struct {
	asked   bool  // somebody wants the fork to stand still
	still   bool  // it does: its sandbox is paused
	refused error // why it could not be done
	over    bool  // there is nothing to hold any more: the agent has ended, or never ran
	since   time.Time
}

// listenHold answers the updates that pause and resume one fork. Both return
// when the thing is done, or when there is nothing to do it to.
func (f *forked) listenHold(ctx workflow.Context) error {
	err := workflow.SetUpdateHandler(ctx, Pause, func(ctx workflow.Context) (fork.Result, error) {
		f.hold.asked, f.hold.refused = true, nil
		ctx, _ = workflow.NewDisconnectedContext(ctx) // not even a cancelled fork leaves its caller without an answer
		err := workflow.Await(ctx, func() bool { return f.hold.still || f.hold.over || f.hold.refused != nil })
		if err == nil && f.hold.refused != nil {
			f.hold.asked = false
			err = failure(f.hold.refused)
		}
		return f.status(), err
	})
	if err != nil {
		return err
	}
	return workflow.SetUpdateHandler(ctx, Resume, func(ctx workflow.Context) (fork.Result, error) {
		f.hold.asked = false
		ctx, _ = workflow.NewDisconnectedContext(ctx)
		err := workflow.Await(ctx, func() bool { return !f.hold.still || f.hold.over })
		return f.status(), err
	})
}

// status is the fork's result so far.
func (f *forked) status() fork.Result {
	r := f.result
	r.Paused = f.hold.still
	return r
}

// follow runs do, which follows the agent, to its end. When the fork is to
// stand still meanwhile, the sandbox is paused and do is cancelled: it finds
// the sandbox paused and lets the agent be. follow returns once the fork goes
// on; ok is false when it does not. again says that do must follow the same
// agent once more.
func (f *forked) follow(ctx workflow.Context, do func(workflow.Context) (RunAgentOutput, error)) (out RunAgentOutput, again, ok bool, err error) {
	if f.mustStop() && f.stop(ctx) && !f.standStill(ctx) {
		return out, false, false, nil
	}
	following, letGo := workflow.WithCancel(ctx)
	// A cancelled fork waits for its agent's end, too.
	wait, _ := workflow.NewDisconnectedContext(ctx)
	done := false
	workflow.GoNamed(following, "agent", func(ctx workflow.Context) {
		out, err = do(ctx)
		done = true
	})
	for !done {
		_ = workflow.Await(wait, func() bool { return done || f.mustStop() })
		if !done && f.stop(ctx) {
			letGo()
		}
	}
	if ctx.Err() != nil {
		return out, false, true, err
	}
	// It can also have been paused by others, through the provider.
	if out.Paused && !f.hold.still {
		f.hold.asked, f.hold.still, f.hold.since = true, true, workflow.Now(ctx)
	}
	if !f.hold.still {
		return out, false, true, err
	}
	again = err != nil || out.Paused // or the agent had just ended
	return out, again, f.standStill(ctx), err
}

func (f *forked) mustStop() bool { return f.hold.asked && !f.hold.still && f.hold.refused == nil }

// stop pauses the sandbox and reports whether it stands still.
func (f *forked) stop(ctx workflow.Context) bool {
	f.hold.since = workflow.Now(ctx)
	_, err := attempt(ctx, pausing, PauseSandbox, HoldSandboxInput{Ref: f.ref, Deadline: f.deadline.Add(maxHold + Grace)})
	if err != nil {
		f.hold.refused = err
		return false
	}
	f.hold.still = true
	return true
}

// standStill waits until the fork is resumed, and gives it back the time. It
// reports false when the fork does not go on.
func (f *forked) standStill(ctx workflow.Context) bool {
	resumed, err := workflow.AwaitWithOptions(ctx, workflow.AwaitOptions{
		Timeout: maxHold, TimerOptions: workflow.TimerOptions{Summary: "paused for at most this long"},
	}, func() bool { return !f.hold.asked })
	if err != nil {
		return false // cancelled
	}
	if !resumed {
		f.fail(fault.New("", fault.Timeout, "the fork was paused for more than %s", maxHold).Hinted("Resume it sooner."))
		return false
	}
	lost := func() time.Duration { return workflow.Now(ctx).Sub(f.hold.since) }
	_, err = attempt(ctx, resuming, ResumeSandbox, HoldSandboxInput{Ref: f.ref, Deadline: f.deadline.Add(lost() + Grace)})
	if err != nil {
		f.fail(err)
		return false
	}
	f.deadline = f.deadline.Add(lost())
	f.hold.still = false
	return true
}
