package orchestrator

import (
	"context"
	"errors"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Prepare makes the base that the forks of such a plan would start from, and
// waits for it. It is prepare_base by itself, a standalone activity of
// Temporal's: it needs no workflow, outlives this client and its worker, and a
// second Prepare of the same plan finds what the first one made. When ctx is
// done before it is, or Temporal does not answer any more, the preparation
// goes on, and another Prepare with the same id follows it.
//
// The id begins with fork.PreparePrefix. An error that another try could mend
// is returned at the first.
func (c *Client) Prepare(ctx context.Context, id string, plan fork.Plan) (Base, error) {
	var base Base
	if err := plan.ValidateBase(); err != nil {
		return base, err
	}
	h, err := c.Temporal.ExecuteActivity(ctx, client.StartActivityOptions{
		ID: id, TaskQueue: c.queue(), StartToCloseTimeout: preparing.limit, HeartbeatTimeout: heartbeatTimeout,
		RetryPolicy: deathPolicy(), Summary: "base of " + keyword(plan.Repo),
		ActivityIDReusePolicy: enumspb.ACTIVITY_ID_REUSE_POLICY_REJECT_DUPLICATE,
	}, PrepareBase.Name, PrepareBaseInput{Run: id, Plan: plan})
	var unknown *serviceerror.Unimplemented
	var begun *serviceerror.ActivityExecutionAlreadyStarted
	switch {
	case errors.As(err, &begun):
		h, err = c.Temporal.GetActivityHandle(client.GetActivityHandleOptions{ActivityID: id}), nil
	case errors.As(err, &unknown):
		return base, fault.New("prepare", fault.Unsupported, "this Temporal cannot run an activity by itself: %w", err).
			Hinted("Use a newer Temporal server, or just start a run: it prepares its own base.")
	}
	if err == nil {
		err = c.await(ctx, h, &base)
	}
	if err != nil && ctx.Err() != nil {
		return base, ctx.Err()
	}
	return base, Fault(err)
}

// awaitTime is how long one wait for a result takes. The SDK goes on asking a
// server that has died for a minute.
const awaitTime = 10 * time.Second

// await waits for the result, and looks now and then whether anybody is there
// to give it.
func (c *Client) await(ctx context.Context, h client.ActivityHandle, out any) error {
	for {
		wait, cancel := context.WithTimeout(ctx, awaitTime)
		err := h.Get(wait, out)
		over := wait.Err() != nil
		cancel()
		if !over || err == nil || ctx.Err() != nil {
			return err
		}
		look, cancel := context.WithTimeout(ctx, awaitTime)
		_, err = h.Describe(look, client.DescribeActivityOptions{})
		cancel()
		if err != nil {
			return err
		}
	}
}
