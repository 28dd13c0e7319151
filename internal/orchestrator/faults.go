package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/temporal"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Error types on the wire that other programs may look for.
const (
	sandboxCreationError     = "SandboxCreationError" // create_sandbox: authentication, invalid input
	agentBudgetExceededError = "AgentBudgetExceededError"
	agentTimeoutError        = "AgentTimeoutError"
	workerStopping           = "WorkerStopping"
)

// ErrWorkerStopping is what an activity returns that lets go of its work
// because its worker shuts down. The work goes on where it is; another worker
// follows it at once.
var ErrWorkerStopping = errors.New("the worker is stopping")

// Faults turns every error that leaves an activity into a Temporal one: the
// kind and the hint travel in its details. No other code in this program
// builds a temporal.ApplicationError, but failure below, for a workflow's own.
type Faults struct {
	interceptor.WorkerInterceptorBase
}

// InterceptActivity implements interceptor.WorkerInterceptor.
func (*Faults) InterceptActivity(_ context.Context, next interceptor.ActivityInboundInterceptor) interceptor.ActivityInboundInterceptor {
	return &faultsInbound{interceptor.ActivityInboundInterceptorBase{Next: next}}
}

type faultsInbound struct {
	interceptor.ActivityInboundInterceptorBase
}

func (f *faultsInbound) ExecuteActivity(ctx context.Context, in *interceptor.ExecuteActivityInput) (any, error) {
	out, err := f.Next.ExecuteActivity(ctx, in)
	switch {
	case err == nil:
		return out, nil
	case errors.Is(err, ErrWorkerStopping):
		return out, temporal.NewApplicationErrorWithOptions(err.Error(), workerStopping, temporal.ApplicationErrorOptions{
			NextRetryDelay: 10 * time.Millisecond,
		})
	case ctx.Err() != nil:
		return out, ctx.Err() // the SDK knows what that is: cancelled, or too late
	}
	return out, wire(err, activity.GetInfo(ctx).ActivityType.Name)
}

// failure is what a workflow returns for err.
func failure(err error) error { return wire(err, "") }

// wire makes err a Temporal error. It is never retried by Temporal: what is
// tried again is decided in attempt, by its kind.
func wire(err error, activityName string) error {
	kind := fault.KindOf(err)
	name := string(kind)
	switch {
	case activityName == CreateSandbox.Name && (kind == fault.Denied || kind == fault.Invalid):
		name = sandboxCreationError
	case kind == fault.OverBudget:
		name = agentBudgetExceededError
	case kind == fault.Timeout:
		name = agentTimeoutError
	}
	return temporal.NewApplicationErrorWithOptions(err.Error(), name, temporal.ApplicationErrorOptions{
		NonRetryable: true, Details: []any{string(kind), fault.HintOf(err)},
	})
}

// Fault is the way back: it finds the fault in what Temporal returned, to a
// workflow or to a client. A cancel stays what it is.
func Fault(err error) error {
	if err == nil {
		return nil
	}
	var canceled *temporal.CanceledError
	if errors.As(err, &canceled) {
		return &fault.Error{Kind: fault.Cancelled, Err: err}
	}
	var app *temporal.ApplicationError
	if errors.As(err, &app) {
		var kind, hint string
		if app.Details(&kind, &hint) != nil || kind == "" {
			kind = string(fault.Internal) // not of our making: a panic, or another SDK's
		}
		return &fault.Error{Kind: fault.Kind(kind), Err: errors.New(app.Message()), Hint: hint}
	}
	var late *temporal.TimeoutError
	if errors.As(err, &late) {
		if late.TimeoutType() == enumspb.TIMEOUT_TYPE_SCHEDULE_TO_START || late.TimeoutType() == enumspb.TIMEOUT_TYPE_SCHEDULE_TO_CLOSE {
			return &fault.Error{Kind: fault.Lost, Err: fmt.Errorf("no worker answered for it in time: %w", err),
				Hint: "Is a worker running on the host of the sandbox?"}
		}
		return &fault.Error{Kind: fault.Timeout, Err: err}
	}
	return clientFault(err)
}

// clientFault classes what the Temporal service itself answered.
func clientFault(err error) error {
	var notFound *serviceerror.NotFound
	var namespace *serviceerror.NamespaceNotFound
	var denied *serviceerror.PermissionDenied
	var unavailable *serviceerror.Unavailable
	var late *serviceerror.DeadlineExceeded
	var invalid *serviceerror.InvalidArgument
	var started *serviceerror.WorkflowExecutionAlreadyStarted
	switch {
	case errors.As(err, &namespace):
		return &fault.Error{Kind: fault.NotFound, Err: err, Hint: "Check TEMPORAL_NAMESPACE."}
	case errors.As(err, &notFound):
		return &fault.Error{Kind: fault.NotFound, Err: err}
	case errors.As(err, &denied), status.Code(err) == codes.Unauthenticated:
		return &fault.Error{Kind: fault.Denied, Err: err, Hint: "Check TEMPORAL_API_KEY or the client certificate, and TEMPORAL_NAMESPACE."}
	case errors.As(err, &unavailable), errors.As(err, &late), errors.Is(err, context.DeadlineExceeded):
		return &fault.Error{Kind: fault.Unreachable, Err: err, Hint: "Check TEMPORAL_ADDRESS, or unset it to use the embedded engine."}
	case errors.As(err, &invalid):
		return &fault.Error{Kind: fault.Invalid, Err: err}
	case errors.As(err, &started):
		return &fault.Error{Kind: fault.Conflict, Err: err}
	}
	return err
}
