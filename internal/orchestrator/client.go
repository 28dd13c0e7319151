package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	workflowpb "go.temporal.io/api/workflow/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/temporal"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A Client is what the commands ask Temporal. It is safe for concurrent use.
type Client struct {
	Temporal   client.Client
	Namespace  string
	Queue      string // where runs wait; empty: DefaultTaskQueue
	Attributes bool   // the namespace knows SearchAttributes; false: Start asks whether it does

	// Converter reads payloads; nil: the SDK's own. Sealed says that it keeps
	// them from whoever reads the database, so the repository is no search
	// attribute: those are stored as they are.
	Converter converter.DataConverter
	Sealed    bool
}

// RunInfo is one line of a list of runs.
type RunInfo struct {
	Run     string      `json:"workflow_id"`
	Name    string      `json:"name,omitempty"`
	Repo    string      `json:"repo"`
	Forks   int         `json:"total_forks"`
	Model   string      `json:"model"`
	Status  fork.Status `json:"status"`
	Started time.Time   `json:"started"`
	Closed  *time.Time  `json:"closed,omitempty"` // nil while the run goes on
	Sealed  bool        `json:"sealed,omitempty"` // what it was asked for cannot be read without a key
}

const (
	queryTimeout = 10 * time.Second
	listTimeout  = 3 * time.Second
)

// Close lets go of the connection.
func (c *Client) Close() { c.Temporal.Close() }

func (c *Client) converter() converter.DataConverter {
	if c.Converter == nil {
		return converter.GetDefaultDataConverter()
	}
	return c.Converter
}

func (c *Client) queue() string {
	if c.Queue == "" {
		return DefaultTaskQueue
	}
	return c.Queue
}

// Start starts the run. A second Start with the id of a run that exists, even
// an ended one, fails with fault.Conflict.
func (c *Client) Start(ctx context.Context, run string, plan fork.Plan) error {
	o := client.StartWorkflowOptions{
		ID: run, TaskQueue: c.queue(),
		WorkflowIDReusePolicy:                    enumspb.WORKFLOW_ID_REUSE_POLICY_REJECT_DUPLICATE,
		WorkflowExecutionErrorWhenAlreadyStarted: true,
		StaticSummary:                            fmt.Sprintf("%d forks of %s", plan.Forks, keyword(plan.Repo)),
		StaticDetails:                            planDetails(run, plan),
		Memo:                                     map[string]any{"name": plan.Name, "repo": keyword(plan.Repo), "model": plan.Model, "forks": plan.Forks},
	}
	if c.Attributes || knowsAttributes(ctx, c.Temporal, c.Namespace) {
		visible := plan
		if c.Sealed {
			visible.Repo = ""
		}
		o.TypedSearchAttributes = runAttributes(run, visible)
	}
	if _, err := c.Temporal.ExecuteWorkflow(ctx, o, OrchestrationName, plan); err != nil {
		return fault.Wrap("start run "+run, clientFault(err))
	}
	c.awaitListed(ctx, run)
	return nil
}

// awaitListed waits until a list shows the run, so that @last means it. Lists
// are a moment behind; a run that is never listed is a run all the same.
func (c *Client) awaitListed(ctx context.Context, run string) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		res, err := c.Temporal.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{
			Namespace: c.Namespace, PageSize: 1, Query: "WorkflowId = " + quote(run),
		})
		if err == nil && len(res.Executions) > 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Plan returns what the run was asked to do.
func (c *Client) Plan(ctx context.Context, run string) (fork.Plan, error) {
	var plan fork.Plan
	events := c.Temporal.GetWorkflowHistory(ctx, run, "", false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT)
	first, err := events.Next()
	if err != nil {
		return plan, c.about(run, err)
	}
	input := first.GetWorkflowExecutionStartedEventAttributes().GetInput()
	err = c.converter().FromPayloads(input, &plan)
	return plan, fault.Wrap("read the plan of run "+run, err)
}

// Progress counts where the forks of the run stand.
func (c *Client) Progress(ctx context.Context, run string) (fork.Progress, error) {
	var p fork.Progress
	if err := c.query(ctx, run, GetProgress, &p); err != nil || p.Status.Ended() {
		return p, err
	}
	// A run that was ended from outside had no chance to say so.
	d, err := c.Temporal.DescribeWorkflowExecution(ctx, run, "")
	if err != nil {
		return p, c.about(run, err)
	}
	// A run knows the time of its last event only, and nothing may happen in
	// it for hours.
	info, until := d.WorkflowExecutionInfo, time.Now()
	if t := info.CloseTime; t != nil {
		until = t.AsTime()
	}
	p.Duration = max(p.Duration, until.Sub(info.StartTime.AsTime()).Seconds())
	if s := info.Status; s == enumspb.WORKFLOW_EXECUTION_STATUS_TERMINATED || s == enumspb.WORKFLOW_EXECUTION_STATUS_TIMED_OUT {
		p.Status, p.Error, p.ErrorKind = fork.Cancelled, "the run was ended from outside, in Temporal; its forks clean up by themselves", string(fault.Cancelled)
		p.Failed += p.Pending + p.Running
		p.Pending, p.Running, p.Active, p.Preparing = 0, 0, nil, false
	}
	return p, nil
}

// Report is Progress and the results of every fork that has ended.
func (c *Client) Report(ctx context.Context, run string) (fork.Report, error) {
	p, err := c.Progress(ctx, run)
	rep := fork.Report{Progress: p, Results: []fork.Result{}}
	for next := 1; err == nil && next > 0; {
		var page ResultsOutput
		err = c.query(ctx, run, GetResults, &page, ResultsInput{From: next})
		rep.Results = append(rep.Results, page.Results...)
		next = page.Next
	}
	return rep, err
}

func (c *Client) query(ctx context.Context, run, name string, out any, args ...any) error {
	limited, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	v, err := c.Temporal.QueryWorkflow(limited, run, "", name, args...)
	if err == nil {
		return fault.Wrap("read run "+run, v.Get(out))
	}
	var failed *serviceerror.QueryFailed
	var notReady *serviceerror.WorkflowNotReady
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &notReady):
		return &fault.Error{Op: "read run " + run, Kind: fault.Unavailable, Err: err}
	case errors.As(err, &failed):
		// A worker that cannot open what the run was asked for cannot say so.
		if _, e := c.Plan(ctx, run); fault.KindOf(e) == fault.Denied {
			return e
		}
		f := &fault.Error{Op: "read run " + run, Kind: fault.Internal, Err: err}
		if c.Sealed {
			f.Hint = "Has the engine or worker the key of SANDBOX_TEMPORAL_PAYLOAD_KEY too? Start it again with it."
		}
		return f
	case limited.Err() != nil:
		return fault.New("read run "+run, fault.Unavailable, "no worker answered within %s", queryTimeout).
			Hinted("Start one with: sandbox-temporal worker")
	}
	return c.about(run, err)
}

// about says that it is the run that is not there.
func (c *Client) about(run string, err error) error {
	err = clientFault(err)
	if fault.KindOf(err) == fault.NotFound && fault.HintOf(err) == "" {
		return fault.New("", fault.NotFound, "there is no run %s in namespace %s", run, c.Namespace).
			Hinted("See the runs with: sandbox-temporal list")
	}
	return err
}

// Live tells what the running forks among nums are doing. A fork that is not
// running any more, or not yet, is left out.
func (c *Client) Live(ctx context.Context, run string, nums []int) (map[int]fork.Live, error) {
	live := map[int]fork.Live{}
	for _, n := range nums {
		d, err := c.Temporal.DescribeWorkflowExecution(ctx, fork.WorkflowID(run, n), "")
		if err = clientFault(err); fault.KindOf(err) == fault.NotFound {
			continue
		}
		if err != nil {
			return live, err
		}
		// Nothing is done for a fork that stands still, or what was is being
		// let go.
		idle := len(d.PendingActivities) == 0
		for _, a := range d.PendingActivities {
			idle = idle || a.State == enumspb.PENDING_ACTIVITY_STATE_CANCEL_REQUESTED
			l := fork.Live{Phase: a.ActivityType.GetName()}
			if h := a.HeartbeatDetails; h != nil {
				_ = c.converter().FromPayloads(h, &l) // a heartbeat of another version shows less
			}
			live[n] = l
		}
		if idle && d.WorkflowExecutionInfo.GetStatus() == enumspb.WORKFLOW_EXECUTION_STATUS_RUNNING {
			var r fork.Result
			if c.query(ctx, fork.WorkflowID(run, n), GetStatus, &r) == nil && r.Paused {
				l := live[n] // what it had done by then
				l.Phase = "paused"
				live[n] = l
			}
		}
	}
	return live, nil
}

// Wait returns when the run has ended, with how it stands then.
func (c *Client) Wait(ctx context.Context, run string) (fork.Progress, error) {
	err := c.Temporal.GetWorkflow(ctx, run, "").Get(ctx, nil)
	var app *temporal.ApplicationError
	if err != nil && !errors.As(err, &app) { // a run that failed says why in its progress
		if ctx.Err() != nil {
			return fork.Progress{}, ctx.Err()
		}
		return fork.Progress{}, c.about(run, err)
	}
	return c.Progress(ctx, run)
}

// Pause lets no further fork of the run start.
func (c *Client) Pause(ctx context.Context, run string) (fork.Progress, error) {
	return c.tell(ctx, run, Pause)
}

// Freeze is Pause, and holds the sandboxes of the running forks still. It
// returns when they do, with the numbers of those that do; a fork that has
// ended its agent meanwhile does not. When some cannot be held the others are,
// and the error is that of one of them.
func (c *Client) Freeze(ctx context.Context, run string) (p fork.Progress, still []int, err error) {
	if p, err = c.Pause(ctx, run); err != nil {
		return p, nil, err
	}
	still, err = c.hold(ctx, run, p.Active, Pause)
	return p, still, err
}

// Resume takes a Pause and a Freeze back.
func (c *Client) Resume(ctx context.Context, run string) (fork.Progress, error) {
	p, err := c.Progress(ctx, run)
	if err != nil {
		return p, err
	}
	var still []int
	for _, n := range p.Active {
		var r fork.Result
		err := c.query(ctx, fork.WorkflowID(run, n), GetStatus, &r)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return p, err
		}
		if r.Paused {
			still = append(still, n)
		}
	}
	if _, err := c.hold(ctx, run, still, Resume); err != nil {
		return p, err
	}
	return c.tell(ctx, run, Resume)
}

// hold tells forks of the run to stand still, or to go on, all at once, and
// returns those that stand still then.
func (c *Client) hold(ctx context.Context, run string, nums []int, verb string) (still []int, err error) {
	results := make([]fork.Result, len(nums))
	errs := make([]error, len(nums))
	var all sync.WaitGroup
	for i, n := range nums {
		all.Go(func() { results[i], errs[i] = c.holdOne(ctx, run, n, verb) })
	}
	all.Wait()
	for i, r := range results {
		if r.Paused {
			still = append(still, nums[i])
		}
		if err == nil && errs[i] != nil {
			err = fault.Wrap(fmt.Sprintf("%s fork %d", verb, nums[i]), errs[i])
		}
	}
	return still, err
}

// holdOne returns how the fork stands afterwards. One that is not there, or
// not any more, does not stand still.
func (c *Client) holdOne(ctx context.Context, run string, num int, verb string) (r fork.Result, err error) {
	for soon := time.Now().Add(listTimeout); ; {
		h, err := c.Temporal.UpdateWorkflow(ctx, client.UpdateWorkflowOptions{
			WorkflowID: fork.WorkflowID(run, num), UpdateName: verb, WaitForStage: client.WorkflowUpdateStageCompleted,
		})
		if err == nil {
			err = h.Get(ctx, &r)
		}
		switch {
		case err == nil || ctx.Err() != nil:
			return r, err
		case fault.KindOf(Fault(err)) != fault.NotFound:
			return r, Fault(err)
		}
		// It has ended, or is about to start: its run was told to start it
		// before it heard of the pause.
		p, err := c.Progress(ctx, run)
		if err != nil || !slices.Contains(p.Active, num) || time.Now().After(soon) {
			return r, err
		}
		select {
		case <-ctx.Done():
			return r, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// AddBudget gives the run more money, or with a num above 0 one of its forks.
// When it returns, calls that were held for want of it go on.
func (c *Client) AddBudget(ctx context.Context, run string, num int, add fork.USD) (fork.Progress, error) {
	return c.tell(ctx, run, AddBudget, AddBudgetInput{Num: num, Add: add})
}

// Cancel ends the run. When it returns, every fork has ended and its sandbox
// is gone. A run that had ended before stays as it was.
func (c *Client) Cancel(ctx context.Context, run string) (fork.Progress, error) {
	return c.tell(ctx, run, Cancel)
}

func (c *Client) tell(ctx context.Context, run, verb string, args ...any) (fork.Progress, error) {
	var p fork.Progress
	h, err := c.Temporal.UpdateWorkflow(ctx, client.UpdateWorkflowOptions{
		WorkflowID: run, UpdateName: verb, Args: args, WaitForStage: client.WorkflowUpdateStageCompleted,
	})
	if err == nil {
		err = h.Get(ctx, &p)
	}
	if err == nil {
		return p, nil
	}
	if ctx.Err() != nil {
		return p, ctx.Err()
	}
	// An update of a run that has ended is "not found" to Temporal.
	if p, e := c.Progress(ctx, run); e == nil && p.Status.Ended() {
		if verb == Cancel {
			return p, nil
		}
		return p, fault.New(verb, fault.Conflict, "run %s has ended: %s", run, p.Status)
	}
	return p, c.about(run, Fault(err))
}

// CancelFork ends one fork of the run; the others go on. It returns when the
// fork has ended.
func (c *Client) CancelFork(ctx context.Context, run string, num int) error {
	id := fork.WorkflowID(run, num)
	if err := c.Temporal.SignalWorkflow(ctx, id, "", CancelExecution, nil); err != nil {
		if err = clientFault(err); fault.KindOf(err) == fault.NotFound {
			return fault.New("cancel", fault.NotFound, "fork %d of run %s is not running", num, run).
				Hinted("See where it stands with: sandbox-temporal status %s", run)
		}
		return err
	}
	return fault.Wrap("cancel", clientFault(c.Temporal.GetWorkflow(ctx, id, "").Get(ctx, nil)))
}

// List returns the newest runs, at most limit, newest first. A query, in the
// language of Temporal's lists, leaves out those that it does not fit.
func (c *Client) List(ctx context.Context, limit int, query string) ([]RunInfo, error) {
	runs := []RunInfo{}
	only := fmt.Sprintf("WorkflowType = '%s'", OrchestrationName)
	if query != "" {
		only += " AND (" + query + ")"
	}
	var token []byte
	for len(runs) < limit {
		res, err := c.Temporal.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{
			Namespace: c.Namespace, PageSize: int32(min(limit, 1000)), NextPageToken: token,
			Query: only,
		})
		if err = clientFault(err); query != "" && fault.KindOf(err) == fault.Invalid {
			return nil, fault.New("", fault.Invalid, "--query: %w", err).Hinted("Write it as SandboxStatus = 'failed' AND SandboxCostUSD > 1.")
		}
		if err != nil {
			return nil, fault.Wrap("list runs", err)
		}
		for _, x := range res.Executions {
			if len(runs) < limit {
				runs = append(runs, c.info(ctx, x))
			}
		}
		if token = res.NextPageToken; len(token) == 0 {
			break
		}
	}
	return runs, nil
}

func (c *Client) info(ctx context.Context, x *workflowpb.WorkflowExecutionInfo) RunInfo {
	i := RunInfo{Run: x.Execution.WorkflowId, Started: x.StartTime.AsTime(), Status: fork.Running}
	dc := c.converter()
	for key, into := range map[string]any{"name": &i.Name, "repo": &i.Repo, "model": &i.Model, "forks": &i.Forks} {
		if p := x.Memo.GetFields()[key]; p != nil {
			err := dc.FromPayload(p, into) // a memo of another version shows less
			i.Sealed = i.Sealed || fault.KindOf(err) == fault.Denied
		}
	}
	if x.Status == enumspb.WORKFLOW_EXECUTION_STATUS_RUNNING {
		return i
	}
	closed := x.CloseTime.AsTime()
	i.Closed = &closed
	i.Status = fork.Failed
	if x.Status == enumspb.WORKFLOW_EXECUTION_STATUS_TERMINATED || x.Status == enumspb.WORKFLOW_EXECUTION_STATUS_CANCELED {
		i.Status = fork.Cancelled
	}
	if p := x.SearchAttributes.GetIndexedFields()[attrStatus.GetName()]; p != nil {
		var s string
		if dc.FromPayload(p, &s) == nil && fork.Status(s).Ended() {
			i.Status = fork.Status(s)
		}
	} else if p, err := c.Progress(ctx, i.Run); err == nil && p.Status.Ended() {
		i.Status = p.Status
	}
	return i
}

// Find returns the id of the run that a user means: a full id, a unique
// beginning of one, or @last.
func (c *Client) Find(ctx context.Context, word string) (string, error) {
	if word == "@last" {
		runs, err := c.List(ctx, 1, "")
		if err == nil && len(runs) == 0 {
			err = fault.New("", fault.NotFound, "there is no run yet").Hinted("Start one with: sandbox-temporal fork")
		}
		if err != nil {
			return "", err
		}
		return runs[0].Run, nil
	}
	if strings.HasPrefix(word, fork.RunPrefix) && len(word) == len(fork.RunPrefix)+8 {
		return word, nil
	}
	res, err := c.Temporal.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{
		Namespace: c.Namespace, PageSize: 3,
		Query: fmt.Sprintf("WorkflowType = '%s' AND (WorkflowId STARTS_WITH %s OR WorkflowId STARTS_WITH %s)", OrchestrationName, quote(word), quote(fork.RunPrefix+word)),
	})
	if err != nil {
		return "", fault.Wrap("find run", clientFault(err))
	}
	switch len(res.Executions) {
	case 1:
		return res.Executions[0].Execution.WorkflowId, nil
	case 0:
		return "", c.about(word, &serviceerror.NotFound{})
	}
	return "", fault.New("", fault.Invalid, "more than one run begins with %q", word).Hinted("Write more of the id; see: sandbox-temporal list")
}

func quote(s string) string {
	return "'" + strings.ReplaceAll(strings.ReplaceAll(s, `\`, ``), "'", "''") + "'"
}

// StartCleanup makes the reaper run every interval, now for the first time. A
// second call changes the interval and the age.
func (c *Client) StartCleanup(ctx context.Context, interval, maxAge time.Duration) error {
	spec := client.ScheduleSpec{Intervals: []client.ScheduleIntervalSpec{{Every: interval}}}
	action := &client.ScheduleWorkflowAction{
		ID: CleanupID, Workflow: CleanupName, TaskQueue: c.queue(), Args: []any{CleanupInput{MaxAge: maxAge, Grace: CleanupGrace}},
	}
	_, err := c.Temporal.ScheduleClient().Create(ctx, client.ScheduleOptions{
		ID: CleanupID, Spec: spec, Action: action, Overlap: enumspb.SCHEDULE_OVERLAP_POLICY_SKIP, CatchupWindow: time.Minute,
		TriggerImmediately: true, Note: "removes sandboxes that no run uses",
	})
	if !errors.Is(err, temporal.ErrScheduleAlreadyRunning) {
		return fault.Wrap("start cleanup", clientFault(err))
	}
	h := c.Temporal.ScheduleClient().GetHandle(ctx, CleanupID)
	err = h.Update(ctx, client.ScheduleUpdateOptions{DoUpdate: func(in client.ScheduleUpdateInput) (*client.ScheduleUpdate, error) {
		s := in.Description.Schedule
		s.Spec, s.Action = &spec, action
		return &client.ScheduleUpdate{Schedule: &s}, nil
	}})
	if err == nil {
		err = h.Trigger(ctx, client.ScheduleTriggerOptions{})
	}
	return fault.Wrap("start cleanup", clientFault(err))
}

// StopCleanup takes the reaper away, or fails with fault.NotFound when it was
// not started.
func (c *Client) StopCleanup(ctx context.Context) error {
	err := clientFault(c.Temporal.ScheduleClient().GetHandle(ctx, CleanupID).Delete(ctx))
	if fault.KindOf(err) == fault.NotFound {
		return fault.New("stop cleanup", fault.NotFound, "no cleanup is scheduled").Hinted("Start it with: sandbox-temporal cleanup")
	}
	return fault.Wrap("stop cleanup", err)
}
