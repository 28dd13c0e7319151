package orchestrator

import (
	"context"
	"errors"
	"strings"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// sweepTime bounds a clean-up that somebody asked for and may have left.
const sweepTime = time.Hour

// Sweep does one clean-up now, or in a dry run says what it would do, and
// waits for it. When ctx is done before it is, it goes on. It is
// fault.Conflict while another one goes on.
func (c *Client) Sweep(ctx context.Context, in CleanupInput) (CleanupOutput, error) {
	id := CleanupID + "-once"
	if in.DryRun {
		id = CleanupID + "-dry-run"
	}
	var out CleanupOutput
	w, err := c.Temporal.ExecuteWorkflow(ctx, client.StartWorkflowOptions{
		ID: id, TaskQueue: c.queue(), WorkflowExecutionTimeout: sweepTime,
		WorkflowExecutionErrorWhenAlreadyStarted: true,
		WorkflowIDConflictPolicy:                 enumspb.WORKFLOW_ID_CONFLICT_POLICY_FAIL,
	}, CleanupName, in)
	if err != nil {
		err = clientFault(err)
		if fault.KindOf(err) == fault.Conflict {
			return out, fault.New("clean up", fault.Conflict, "a clean-up that somebody asked for goes on").Hinted("Try again when it has ended; it takes an hour at most.")
		}
		return out, fault.Wrap("clean up", err)
	}
	if err := w.Get(ctx, &out); err != nil {
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		return out, fault.Wrap("clean up", Fault(err))
	}
	return out, nil
}

// A RunState is what Temporal knows of those who may use a sandbox.
type RunState struct {
	Known  bool      // Temporal has not forgotten it
	Open   bool      // it goes on; what it uses must not be touched
	Closed time.Time // when the last of it ended; zero when it is open or not known
}

// StateOf asks for a run, and with num above 0 also for that fork of it, which
// can go on when its run was ended from outside. Run can also be the id of a
// preparation. An error is not an answer.
func StateOf(ctx context.Context, c client.Client, run string, num int) (RunState, error) {
	var s RunState
	if strings.HasPrefix(run, fork.PreparePrefix) {
		d, err := c.GetActivityHandle(client.GetActivityHandleOptions{ActivityID: run}).Describe(ctx, client.DescribeActivityOptions{})
		if err != nil {
			return s, forgotten(err)
		}
		s.Known, s.Open = true, d.Status == enumspb.ACTIVITY_EXECUTION_STATUS_RUNNING
		if !s.Open {
			s.Closed = d.CloseTime
		}
		return s, nil
	}
	ids := []string{run}
	if num > 0 {
		ids = append(ids, fork.WorkflowID(run, num))
	}
	for _, id := range ids {
		d, err := c.DescribeWorkflowExecution(ctx, id, "")
		if err != nil {
			if err = forgotten(err); err != nil {
				return RunState{}, err
			}
			continue
		}
		s.Known = true
		if info := d.WorkflowExecutionInfo; info.GetStatus() == enumspb.WORKFLOW_EXECUTION_STATUS_RUNNING {
			return RunState{Known: true, Open: true}, nil
		} else if t := info.GetCloseTime().AsTime(); t.After(s.Closed) {
			s.Closed = t
		}
	}
	return s, nil
}

// forgotten returns nil when err says that Temporal has no such thing, and the
// fault otherwise. That there is no such namespace is no answer.
func forgotten(err error) error {
	var gone *serviceerror.NotFound
	if errors.As(err, &gone) {
		return nil
	}
	return Fault(err)
}
