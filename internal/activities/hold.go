package activities

import (
	"context"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// unended is why an agent is followed no further that goes on.
const unended fork.Status = "unended"

// lookEvery is how often the ledger is asked what a fork has spent.
const lookEvery = time.Second

// A hold is what is known of a fork that waits for more money. Its clock stands
// still meanwhile: a run that waits for a person must not be over when that
// person comes.
type hold struct {
	why  string        // empty: it does not wait
	long time.Duration // how long it has waited, since the deadline was set
	at   time.Time     // of the last look

	blind bool // what was spent could not be read, and that was said

	told  string        // what the run was told
	when  time.Time     // and when; zero: it was told nothing yet
	moved time.Duration // by how much the sandbox's deadline was moved
}

// heldBefore returns for how long the fork was held while a worker followed it
// that is dead.
func heldBefore(ctx context.Context) time.Duration {
	var live fork.Live
	if !activity.IsActivity(ctx) || !activity.HasHeartbeatDetails(ctx) || activity.GetHeartbeatDetails(ctx, &live) != nil {
		return 0
	}
	return live.HeldFor
}

// look asks the ledger what the fork has spent and whether it waits. What
// cannot be read now is read the next time: nothing but what people see
// depends on it.
func (f *follower) look(ctx context.Context) {
	now := time.Now()
	if now.Sub(f.hold.at) < lookEvery {
		return
	}
	spent, err := f.a.Gateway.Usage(ctx, f.in.Spec.Run, f.in.Spec.Num)
	if err != nil {
		if ctx.Err() == nil && !f.hold.blind { // the first time only
			f.hold.blind = true
			f.about().WarnContext(ctx, "What a fork has spent cannot be read; it is asked for every second", logs.Error, err)
		}
		return
	}
	f.hold.blind = false
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hold.why != "" {
		f.hold.long += now.Sub(f.hold.at)
	}
	f.cost, f.hold.why, f.hold.at = spent.Cost, spent.Held, now
}

// tell lets the run know when the fork begins to wait and when it goes on, and
// keeps the sandbox alive meanwhile.
func (f *follower) tell(ctx context.Context) {
	const often = 10 * time.Second // enough for a text that changes
	h := &f.hold
	if f.in.Slack == 0 || h.at.IsZero() {
		return
	}
	news := h.when.IsZero() || (h.why == "") != (h.told == "") || h.why != h.told && time.Since(h.when) > often
	if news && f.a.Held != nil {
		if err := f.a.Held(ctx, f.in.Spec.Run, fork.Hold{ForkNum: f.in.Spec.Num, Why: h.why}); err == nil {
			h.told, h.when = h.why, time.Now()
		} else if ctx.Err() == nil {
			f.about().WarnContext(ctx, "A run is not told that a fork waits for more money", logs.Error, err)
		}
	}
	if h.long-h.moved > time.Minute {
		// So far ahead that nobody needs to follow the agent all the time.
		until := f.in.Deadline.Add(h.long + f.in.Slack + orchestrator.Grace)
		if err := f.sandbox.SetDeadline(ctx, until); err == nil {
			h.moved = h.long
		} else if ctx.Err() == nil {
			f.about().WarnContext(ctx, "The deadline of a sandbox that waits for more money cannot be moved", logs.Error, err)
		}
	}
}

// held is for how long the fork has been held up to now.
func (h *hold) held(now time.Time) time.Duration {
	if h.why == "" {
		return h.long
	}
	return h.long + now.Sub(h.at)
}

// late says whether the fork's time is up, or that of this activity.
func (f *follower) late(now time.Time) fork.Status {
	long := f.hold.held(now)
	switch {
	case !now.Before(f.in.Deadline.Add(long)):
		return fork.TimedOut
	case long > 0 && !now.Before(f.in.Deadline.Add(f.in.Slack)):
		return unended
	}
	return ""
}

// left is how long late has nothing to say.
func (f *follower) left(now time.Time) time.Duration {
	long := f.hold.held(now)
	left := f.in.Deadline.Add(long).Sub(now)
	if long > 0 {
		left = min(left, f.in.Deadline.Add(f.in.Slack).Sub(now))
	}
	return left
}
