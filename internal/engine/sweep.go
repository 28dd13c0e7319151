package engine

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	commonpb "go.temporal.io/api/common/v1"
	enumspb "go.temporal.io/api/enums/v1"
	failurepb "go.temporal.io/api/failure/v1"
	"go.temporal.io/api/serviceerror"
	workflowpb "go.temporal.io/api/workflow/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// WorkerDied is the type of the application failure that Sweep gives to an
// activity whose worker is dead.
const WorkerDied = "WorkerDied"

const (
	// sweepDelay is when such an activity starts again.
	sweepDelay = 10 * time.Millisecond
	// sweepers is how many workflows are looked at side by side. There is one
	// connection to the database, so more would only queue there.
	sweepers = 16
	// sweepPage is how many workflows are listed at a time.
	sweepPage = 500
)

// Sweep has the activities of a dead worker started again at once, which would
// otherwise wait for their heartbeat or start-to-close time-out. It returns
// how many there were. An activity that did not come from deadIdentity is left
// alone, so an identity must be of one process and never be used again. The
// caller knows that the process is dead, because it holds the engine's lock.
//
// For the activity it is a failed attempt like any other: its next one finds
// the heartbeat details, and one whose retry policy allows no more attempts
// fails.
//
// Running workflows are found through the visibility store, which a crash may
// leave some milliseconds behind; what is missed for that reason waits for its
// time-out. A second call is harmless. An error on one workflow does not keep
// the others from being swept: all are joined in the result.
func Sweep(ctx context.Context, c client.Client, namespace, deadIdentity string, logger *slog.Logger) (int, error) {
	const op = "engine: sweep"
	if deadIdentity == "" {
		return 0, fault.New(op, fault.Invalid, "no identity was named")
	}
	s := &sweep{client: c, namespace: namespace, dead: deadIdentity, logger: logger}
	found := make(chan *workflowpb.WorkflowExecutionInfo)
	var wg sync.WaitGroup
	for range sweepers {
		wg.Go(func() {
			for w := range found {
				s.workflow(ctx, w.GetExecution())
			}
		})
	}
	err := s.list(ctx, found)
	close(found)
	wg.Wait()
	if err = errors.Join(append(s.errs, err)...); err != nil {
		return int(s.failed.Load()), fault.New(op, fault.Unavailable, "%w", err)
	}
	return int(s.failed.Load()), nil
}

type sweep struct {
	client          client.Client
	namespace, dead string
	logger          *slog.Logger

	failed atomic.Int64
	mu     sync.Mutex
	errs   []error
}

// list sends every running workflow to found.
func (s *sweep) list(ctx context.Context, found chan<- *workflowpb.WorkflowExecutionInfo) error {
	var token []byte
	for {
		page, err := s.client.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{
			Namespace:     s.namespace,
			PageSize:      sweepPage,
			NextPageToken: token,
			Query:         "ExecutionStatus = 'Running'",
		})
		if err != nil {
			return err
		}
		for _, w := range page.GetExecutions() {
			select {
			case found <- w:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if token = page.GetNextPageToken(); len(token) == 0 {
			return nil
		}
	}
}

// workflow fails the dead worker's activities of one workflow.
func (s *sweep) workflow(ctx context.Context, w *commonpb.WorkflowExecution) {
	d, err := s.client.DescribeWorkflowExecution(ctx, w.GetWorkflowId(), w.GetRunId())
	if err != nil {
		s.keep(err)
		return
	}
	for _, a := range d.GetPendingActivities() {
		if a.GetState() != enumspb.PENDING_ACTIVITY_STATE_STARTED || a.GetLastWorkerIdentity() != s.dead {
			continue
		}
		_, err := s.client.WorkflowService().RespondActivityTaskFailedById(ctx, &workflowservice.RespondActivityTaskFailedByIdRequest{
			Namespace:  s.namespace,
			WorkflowId: w.GetWorkflowId(),
			RunId:      w.GetRunId(),
			ActivityId: a.GetActivityId(),
			Identity:   s.dead,
			Failure: &failurepb.Failure{
				Message: "the worker " + s.dead + " died",
				Source:  "GoSDK",
				FailureInfo: &failurepb.Failure_ApplicationFailureInfo{ApplicationFailureInfo: &failurepb.ApplicationFailureInfo{
					Type:           WorkerDied,
					NextRetryDelay: durationpb.New(sweepDelay),
				}},
			},
		})
		if err != nil {
			s.keep(err)
			continue
		}
		s.failed.Add(1)
		s.logger.Debug("an activity of a dead worker starts again", "workflow", w.GetWorkflowId(), "activity", a.GetActivityType().GetName(), "attempt", a.GetAttempt())
	}
}

// keep remembers an error, unless it says that what was to be swept has ended
// in the meantime.
func (s *sweep) keep(err error) {
	if errors.As(err, new(*serviceerror.NotFound)) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs = append(s.errs, err)
}
