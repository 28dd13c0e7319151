package orchestrator

import (
	"errors"
	"fmt"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// errorText bounds the error text of a result.
const errorText = 4 << 10

// heartbeatTimeout is how long a worker may be silent before its activity is
// given to another. It is short because nothing is lost by it: every activity
// finds what its predecessor began.
const heartbeatTimeout = 10 * time.Second

// retries says how often something is tried, and how long to wait in between:
// wait, 2·wait, 4·wait, …
type retries struct {
	most int
	wait time.Duration
}

// policy is how one kind of activity is run.
type policy struct {
	retries
	limit time.Duration // for one attempt
	total time.Duration // for all of it, the death of workers included; 0: no limit
	local bool          // runs beside the workflow, for what takes milliseconds
}

// The policies; the table in README is made of them.
var (
	preparing  = policy{retries: retries{3, 5 * time.Second}, limit: time.Hour}
	creating   = policy{retries: retries{3, 5 * time.Second}, limit: 10 * time.Minute, total: 2 * time.Hour}
	checking   = policy{retries: retries{1, 0}, limit: time.Minute, total: time.Hour}
	pausing    = policy{retries: retries{3, 2 * time.Second}, limit: time.Minute, total: 10 * time.Minute}
	resuming   = policy{retries: retries{3, 2 * time.Second}, limit: time.Minute, total: 2 * time.Hour}
	collecting = policy{retries: retries{3, 2 * time.Second}, limit: 10 * time.Minute, total: 2 * time.Hour}
	verifyTry  = retries{3, 2 * time.Second}
	cleaning   = policy{retries: retries{3, 2 * time.Second}, limit: 2 * time.Minute, total: 2 * time.Hour}
	budgeting  = policy{retries: retries{3, 2 * time.Second}, limit: time.Minute, total: 15 * time.Minute}
	recording  = policy{retries: retries{1, 0}, limit: 10 * time.Second, total: time.Minute, local: true}
	finding    = policy{retries: retries{3, 2 * time.Second}, limit: 5 * time.Minute, total: time.Hour}

	agentAttempts = retries{2, 10 * time.Second}
)

// heldSlack is how long an agent is followed past its deadline while the run
// waits for more money. It bounds how often an activity is begun anew, and not
// how long the run may wait.
const heldSlack = time.Hour

// following is how an agent is followed: one attempt here, because another one
// of the agent is a decision of the fork, and as many workers as it takes.
func following(left time.Duration) policy {
	left = max(left, 0) + 2*time.Minute // the activity stops the agent first
	return policy{retries: retries{1, 0}, limit: left, total: left}
}

// verifying is how a fork's work is verified: in as much time as a fork has.
func verifying(limit time.Duration) policy {
	limit += 10 * time.Minute // for its sandbox; the activity stops the command first
	return policy{retries: verifyTry, limit: limit, total: limit + time.Hour}
}

// attempt runs an activity as its policy says. Temporal's own retry policy
// covers the death of a worker only, which is not an attempt: it is repeated
// for as long as the policy's total allows. An error that the activity
// returned is counted here.
func attempt[In, Out any](ctx workflow.Context, p policy, a Activity[In, Out], in In) (Out, error) {
	onDeath := deathPolicy()
	if p.local {
		onDeath.MaximumAttempts = 3
		ctx = workflow.WithLocalActivityOptions(ctx, workflow.LocalActivityOptions{
			StartToCloseTimeout: p.limit, ScheduleToCloseTimeout: p.total, RetryPolicy: onDeath, Summary: summary(in),
		})
	} else {
		ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
			TaskQueue: workflow.GetActivityOptions(ctx).TaskQueue, StartToCloseTimeout: p.limit, ScheduleToCloseTimeout: p.total,
			HeartbeatTimeout: heartbeatTimeout, WaitForCancellation: true, RetryPolicy: onDeath, Summary: summary(in),
		})
	}
	for n := 1; ; n++ {
		do := a.Do
		if p.local {
			do = a.DoLocal
		}
		out, err := do(ctx, in)
		if err == nil {
			return out, nil
		}
		err = Fault(err)
		if n >= p.most || !fault.KindOf(err).Retryable() || !retryWait(ctx, p.retries, n) {
			return out, err
		}
	}
}

// deathPolicy is Temporal's part in trying again: when a worker has died.
func deathPolicy() *temporal.RetryPolicy {
	return &temporal.RetryPolicy{
		InitialInterval: 500 * time.Millisecond, BackoffCoefficient: 2, MaximumInterval: 10 * time.Second,
		NonRetryableErrorTypes: []string{"PanicError"}, // a bug does not go away
	}
}

// retryWait waits before attempt n+1 and reports false when it was cancelled.
func retryWait(ctx workflow.Context, r retries, n int) bool {
	wait := workflow.NewTimerWithOptions(ctx, r.wait<<(n-1), workflow.TimerOptions{Summary: fmt.Sprintf("before attempt %d", n+1)})
	return wait.Get(ctx, nil) == nil
}

// statusOf says how a fork ended that met err.
func statusOf(err error) fork.Status {
	var canceled *temporal.CanceledError
	if errors.As(err, &canceled) {
		return fork.Cancelled
	}
	switch fault.KindOf(err) {
	case fault.Cancelled:
		return fork.Cancelled
	case fault.OverBudget:
		return fork.BudgetExceeded
	case fault.Timeout:
		return fork.TimedOut
	case fault.Lost:
		return fork.Lost
	}
	return fork.Failed
}
