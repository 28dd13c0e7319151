// Package orchestrator holds the workflows: what happens, in which order, and
// what is done when it goes wrong. It also holds both ends of the contract
// with them, the activities' types and a [Client] for the commands.
//
// Code here is replayed. It may not look at the clock, the disk, the network,
// the environment or a random number; whatever needs those is an [Activity].
package orchestrator

import (
	"fmt"
	"slices"
	"time"

	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	enumspb "go.temporal.io/api/enums/v1"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// maxWindow is the most forks of one run that work at once. Above it a parent
// gets slower, not faster, and one workflow task can outgrow what the server
// takes (measured: 1,000 children at once are half as fast as 50, and with
// 10 KB inputs the server terminates the parent).
const maxWindow = 50

// Serve registers the workflows with w.
func Serve(w worker.WorkflowRegistry) {
	w.RegisterWorkflowWithOptions(Orchestration, workflow.RegisterOptions{Name: OrchestrationName})
	w.RegisterWorkflowWithOptions(Fork, workflow.RegisterOptions{Name: ForkName})
	w.RegisterWorkflowWithOptions(Cleanup, workflow.RegisterOptions{Name: CleanupName})
}

// Orchestration carries out a plan: it prepares what the forks start from and
// runs one child workflow per fork, a sliding window of them at a time. A fork
// that fails is a Result. The run itself fails only when there is nothing to
// start forks from.
func Orchestration(ctx workflow.Context, plan fork.Plan) (fork.Progress, error) {
	r := newRun(ctx, plan)
	if err := r.listen(ctx); err != nil {
		return fork.Progress{}, err
	}

	var err error
	r.base, err = r.prepare()
	r.prepared = true
	if err == nil {
		r.forkAll(r.base)
	} else {
		r.endUnstarted(statusOf(err), err)
	}

	// Whoever asked for a cancel hears the end of it before the run closes.
	r.done = true
	r.ended = workflow.Now(r.work)
	last, _ := workflow.NewDisconnectedContext(ctx)
	if e := workflow.Await(last, func() bool { return workflow.AllHandlersFinished(last) }); e != nil {
		return fork.Progress{}, e
	}
	r.recordEnd(last)
	if err != nil && !r.cancelled {
		return fork.Progress{}, failure(err)
	}
	return r.progress(last), nil
}

// run is the state of one Orchestration.
type run struct {
	id     string
	plan   fork.Plan
	window int
	work   workflow.Context // what the forks run under; cancelled by stop
	stop   workflow.CancelFunc

	results   []fork.Result  // by number - 1
	held      []string       // by number - 1: why the fork waits for more money; empty: it does not
	added     []fork.USD     // by number - 1: what was added to the fork's own budget
	purse     workflow.Mutex // one change of a budget at a time
	base      Base
	prepared  bool
	active    int
	paused    bool
	cancelled bool
	err       error // why the run could not go on
	done      bool
	started   time.Time
	ended     time.Time
}

func newRun(ctx workflow.Context, plan fork.Plan) *run {
	r := &run{
		id:      workflow.GetInfo(ctx).WorkflowExecution.ID,
		plan:    plan,
		window:  min(max(plan.MaxConcurrent, 1), maxWindow),
		results: make([]fork.Result, plan.Forks),
		held:    make([]string, plan.Forks),
		added:   make([]fork.USD, plan.Forks),
		purse:   workflow.NewMutex(ctx),
		started: workflow.Now(ctx),
	}
	for i := range r.results {
		r.results[i] = fork.Result{ForkNum: i + 1, Status: fork.Pending, Model: plan.Model, Agent: plan.Agent}
	}
	// A cancel of the workflow is taken as the cancel message is: the loop
	// goes on in a context of its own until every fork has cleaned up.
	work, _ := workflow.NewDisconnectedContext(ctx)
	r.work, r.stop = workflow.WithCancel(work)
	workflow.GoNamed(ctx, "cancel", func(ctx workflow.Context) {
		ctx.Done().Receive(ctx, nil)
		r.cancel()
	})
	return r
}

// listen answers the queries, signals and updates of the run.
func (r *run) listen(ctx workflow.Context) error {
	verbs := []struct {
		name string
		do   func()
		done func() bool
	}{
		{Pause, func() { r.paused = true }, func() bool { return true }},
		{Resume, func() { r.paused = false }, func() bool { return true }},
		{Cancel, r.cancel, func() bool { return r.done }},
	}
	for _, verb := range verbs {
		signal := workflow.GetSignalChannel(ctx, verb.name)
		workflow.GoNamed(ctx, verb.name, func(ctx workflow.Context) {
			for signal.Receive(ctx, nil) {
				verb.do()
			}
		})
		err := workflow.SetUpdateHandler(ctx, verb.name, func(ctx workflow.Context) (fork.Progress, error) {
			verb.do()
			// Not even a cancelled run leaves its caller without an answer.
			ctx, _ = workflow.NewDisconnectedContext(ctx)
			err := workflow.Await(ctx, verb.done)
			return r.progress(ctx), err
		})
		if err != nil {
			return err
		}
	}
	workflow.GoNamed(ctx, ForkHeld, func(ctx workflow.Context) {
		var hold fork.Hold
		for workflow.GetSignalChannel(ctx, ForkHeld).Receive(ctx, &hold) {
			if i := hold.ForkNum - 1; i >= 0 && i < len(r.held) && !r.results[i].Status.Ended() {
				r.held[i] = fork.Cut(hold.Why, errorText)
			}
			hold = fork.Hold{}
		}
	})
	err := workflow.SetUpdateHandlerWithOptions(ctx, AddBudget, r.addBudget, workflow.UpdateHandlerOptions{Validator: r.mayAdd})
	if err != nil {
		return err
	}
	if err := workflow.SetQueryHandler(ctx, GetProgress, func() (fork.Progress, error) { return r.progress(ctx), nil }); err != nil {
		return err
	}
	return workflow.SetQueryHandler(ctx, GetResults, r.page)
}

func (r *run) cancel() {
	if !r.done {
		r.cancelled = true
		r.stop()
	}
}

// mayAdd refuses money that could do nothing.
func (r *run) mayAdd(in AddBudgetInput) error {
	const op = "add budget"
	switch {
	case r.done:
		return failure(fault.New(op, fault.Conflict, "run %s has ended", r.id))
	case in.Add <= 0 || in.Num < 0 || in.Num > len(r.results):
		return failure(fault.New(op, fault.Invalid, "%s for fork %d", in.Add, in.Num))
	case in.Num == 0 && r.plan.Budget == 0:
		return failure(fault.New(op, fault.Invalid, "run %s has no budget: it may spend what it likes, within that of the day", r.id))
	case in.Num > 0 && r.plan.BudgetPerFork == 0:
		return failure(fault.New(op, fault.Invalid, "the forks of run %s have no budgets of their own", r.id).
			Hinted("Add to the run's: leave the number of the fork out."))
	}
	return nil
}

// addBudget raises a budget, here for the forks to come and in the ledger for
// those that run.
func (r *run) addBudget(ctx workflow.Context, in AddBudgetInput) (fork.Progress, error) {
	// Not even a cancelled run leaves its caller without an answer.
	ctx, _ = workflow.NewDisconnectedContext(ctx)
	if err := r.purse.Lock(ctx); err != nil {
		return fork.Progress{}, err
	}
	defer r.purse.Unlock()
	if err := workflow.Await(ctx, func() bool { return r.prepared }); err != nil {
		return fork.Progress{}, err
	}
	if err := r.mayAdd(in); err != nil { // it may have ended meanwhile
		return fork.Progress{}, err
	}
	// The sum is said, and not what to add to it: an activity can be done twice.
	set := SetBudgetInput{Run: r.id, Num: in.Num, Budget: r.plan.Budget + in.Add}
	if in.Num > 0 {
		set.Budget = r.plan.BudgetPerFork + r.added[in.Num-1] + in.Add
	}
	if r.err == nil {
		if _, err := attempt(workflow.WithTaskQueue(ctx, r.base.Queue), budgeting, SetBudget, set); err != nil {
			return fork.Progress{}, failure(err)
		}
	}
	if in.Num > 0 {
		r.added[in.Num-1] += in.Add
	} else {
		r.plan.Budget = set.Budget
	}
	return r.progress(ctx), nil
}

// prepare makes what all forks start from.
func (r *run) prepare() (Base, error) {
	if err := r.plan.Validate(); err != nil {
		return Base{}, err
	}
	return attempt(r.work, preparing, PrepareBase, PrepareBaseInput{Run: r.id, Plan: r.plan})
}

// forkAll starts every fork as soon as there is a slot for it and waits for
// all of them.
func (r *run) forkAll(base Base) {
	// The loop itself must outlive a cancel, so it waits in a context that
	// cannot be cancelled.
	loop, _ := workflow.NewDisconnectedContext(r.work)
	for i := range r.results {
		_ = workflow.Await(loop, func() bool { return r.closed() != "" || !r.paused && !r.waits() && r.active < r.window })
		if why := r.closed(); why != "" {
			r.endUnstarted(why, nil)
			break
		}
		r.active++
		r.results[i].Status = fork.Running
		r.describe(loop)
		workflow.GoNamed(r.work, fmt.Sprint("fork ", i+1), func(ctx workflow.Context) {
			r.results[i] = r.fork(ctx, i+1, base)
			r.held[i] = ""
			r.active--
			r.describe(ctx)
		})
	}
	_ = workflow.Await(loop, func() bool { return r.active == 0 })
}

// closed says why no further fork may start, or "".
func (r *run) closed() fork.Status {
	if r.cancelled {
		return fork.Cancelled
	}
	if r.denied() {
		return fork.Failed
	}
	if r.plan.OnBudget == fork.OnBudgetPause {
		return "" // there may be more money
	}
	var spent fork.USD
	for _, res := range r.results {
		spent += res.Cost
		if r.overBudget(res) {
			return fork.BudgetExceeded
		}
	}
	if r.plan.Budget > 0 && spent >= r.plan.Budget {
		return fork.BudgetExceeded
	}
	return ""
}

// denied reports whether the model's key was refused to a fork. It would be to
// every other one.
func (r *run) denied() bool {
	return slices.ContainsFunc(r.results, func(res fork.Result) bool { return res.ErrorKind == string(fault.Denied) })
}

// overBudget reports whether a fork ended for a budget that it shares with
// those that have not begun.
func (r *run) overBudget(res fork.Result) bool {
	switch {
	case res.Status != fork.BudgetExceeded:
		return false
	case res.Short == "": // not known: an agent's own limit, or a result of an older version
		return r.plan.Budget > 0
	}
	return res.Short != fork.BudgetOfFork
}

// waits reports whether a fork waits for more money. Another one would do the
// same.
func (r *run) waits() bool {
	return slices.ContainsFunc(r.held, func(why string) bool { return why != "" })
}

// endUnstarted gives every fork that has not begun its result.
func (r *run) endUnstarted(status fork.Status, err error) {
	r.err = err
	for i := range r.results {
		res := &r.results[i]
		if res.Status != fork.Pending {
			continue
		}
		res.Status = status
		switch {
		case err != nil:
			res.Error, res.Hint = fork.Cut(err.Error(), errorText), fault.HintOf(err)
		case status == fork.BudgetExceeded:
			res.Error = fmt.Sprintf("the run's budget of %s is used up; this fork was not started", r.plan.Budget)
			if i := slices.IndexFunc(r.results, func(res fork.Result) bool { return res.Short == fork.BudgetOfDay }); i >= 0 {
				res.Error, res.Short = "the budget of the day is used up; this fork was not started", fork.BudgetOfDay
			}
		case status == fork.Failed:
			res.Error, res.ErrorKind = "the model API refuses the key; this fork was not started", string(fault.Denied)
		default:
			res.Error = "the run was cancelled before this fork started"
		}
	}
}

// fork runs one fork to its end.
func (r *run) fork(ctx workflow.Context, num int, base Base) fork.Result {
	p := r.plan
	spec := fork.Spec{
		Run: r.id, Num: num, Repo: p.Repo, Upload: p.Upload, BaseCommit: base.Commit, PromptKey: base.PromptKey, Model: p.Model,
		Timeout: p.Timeout, RunBudget: p.Budget, OnBudget: p.OnBudget, Provider: p.Provider, Agent: p.Agent, AgentCommand: p.AgentCommand,
		AgentPath: p.AgentPath, Credentials: p.Credentials, Egress: p.Egress, Verify: p.Verify,
		Mounts: p.Mounts, Limits: p.Limits,
	}
	if p.BudgetPerFork > 0 {
		spec.ForkBudget = p.BudgetPerFork + r.added[num-1]
	}
	if p.Credentials == fork.CredentialsDirect && p.Budget > 0 {
		// Nobody stands between the agents and the money: each gets its part.
		if part := p.Budget / fork.USD(p.Forks); spec.ForkBudget == 0 || spec.ForkBudget > part {
			spec.ForkBudget = part
		}
	}
	ctx = workflow.WithChildOptions(ctx, workflow.ChildWorkflowOptions{
		WorkflowID:            fork.WorkflowID(r.id, num),
		ParentClosePolicy:     enumspb.PARENT_CLOSE_POLICY_REQUEST_CANCEL, // a terminated run still cleans up
		WaitForCancellation:   true,
		StaticSummary:         fmt.Sprintf("fork %d of %d, %s", num, p.Forks, p.Model),
		StaticDetails:         forkDetails(spec),
		TypedSearchAttributes: childAttributes(ctx, num),
	})
	var res fork.Result
	if err := workflow.ExecuteChildWorkflow(ctx, ForkName, ForkInput{Spec: spec, Base: base}).Get(ctx, &res); err != nil {
		err = Fault(err)
		return fork.Result{
			ForkNum: num, Status: statusOf(err), Model: p.Model, Agent: p.Agent, BaseCommit: base.Commit,
			Error: fork.Cut(err.Error(), errorText), Hint: fault.HintOf(err),
		}
	}
	return res
}

// progress counts where the forks stand.
func (r *run) progress(ctx workflow.Context) fork.Progress {
	p := fork.Progress{
		Run: r.id, Name: r.plan.Name, Repo: r.plan.Repo, Status: fork.Running, Preparing: !r.prepared, Paused: r.paused,
		Total: len(r.results), Budget: r.plan.Budget, Statuses: make([]fork.Status, len(r.results)),
	}
	count := map[fork.Status]int{}
	for i, res := range r.results {
		count[res.Status]++
		p.Statuses[i] = res.Status
		p.Cost += res.Cost
		if res.Status == fork.Running {
			p.Active = append(p.Active, res.ForkNum)
		}
		if r.held[i] != "" {
			p.Held = append(p.Held, fork.Hold{ForkNum: i + 1, Why: r.held[i]})
		}
	}
	p.Pending, p.Running, p.Success = count[fork.Pending], count[fork.Running], count[fork.Success]
	p.Failed = p.Total - p.Pending - p.Running - p.Success
	if r.err != nil {
		p.Error, p.ErrorKind, p.Hint = r.err.Error(), string(fault.KindOf(r.err)), fault.HintOf(r.err)
	}
	end := workflow.Now(ctx)
	if r.done {
		end = r.ended
		p.Status = r.status(count)
	}
	p.Duration = end.Sub(r.started).Seconds()
	return p
}

// status is how the whole run ended.
func (r *run) status(count map[fork.Status]int) fork.Status {
	switch {
	case r.cancelled:
		return fork.Cancelled
	case count[fork.Success] == len(r.results):
		return fork.Success
	case count[fork.BudgetExceeded] > 0:
		return fork.BudgetExceeded
	case count[fork.TimedOut] > 0 && count[fork.TimedOut]+count[fork.Success] == len(r.results):
		return fork.TimedOut
	}
	return fork.Failed
}

// pageSize keeps an answer to GetResults far below the 4 MiB that a message
// may have: 50 results of at most two texts of 16 KiB.
const pageSize = 50

// page returns the results of ended forks from number in.From on.
func (r *run) page(in ResultsInput) (ResultsOutput, error) {
	out := ResultsOutput{Results: []fork.Result{}}
	for i := max(in.From-1, 0); i < len(r.results); i++ {
		if len(out.Results) == pageSize {
			out.Next = i + 1
			break
		}
		if r.results[i].Status.Ended() {
			out.Results = append(out.Results, r.results[i])
		}
	}
	return out, nil
}

// recordEnd makes the end of the run readable in Temporal's own UI.
func (r *run) recordEnd(ctx workflow.Context) {
	p := r.progress(ctx)
	r.describe(ctx)
	upsertEnd(ctx, p.Status, p.Cost)
}
