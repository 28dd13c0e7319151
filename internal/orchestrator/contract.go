package orchestrator

import (
	"context"
	"time"

	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// The strings below are written into workflow history or said by clients of
// other versions. Renaming a Go identifier is free; changing a string breaks
// every run in flight.

// Workflow types, and the id and schedule of the clean-up.
const (
	OrchestrationName = "SandboxOrchestrationWorkflow"
	ForkName          = "ForkWorkflow"
	CleanupName       = "ScheduledCleanupWorkflow"
	CleanupID         = "sandbox-cleanup-scheduled"
)

// Messages to a run. Pause, Resume and Cancel are both signals, which any
// Temporal client can send, and updates, which answer with a fork.Progress
// when the thing is done.
const (
	Pause  = "pause"
	Resume = "resume"
	Cancel = "cancel"

	// AddBudget is an update that takes an AddBudgetInput. It answers with a
	// fork.Progress when the money can be spent.
	AddBudget = "add_budget"

	// ForkHeld is a signal that carries a fork.Hold: the fork waits for more
	// money, or with an empty Why it does not any more.
	ForkHeld = "fork_held"

	// GetProgress answers with a fork.Progress.
	GetProgress = "get_progress"
	// GetResults takes a ResultsInput and answers with a ResultsOutput.
	GetResults = "get_results"
)

// Messages to a fork.
const (
	CancelExecution = "cancel_execution" // signal
	Progress        = "progress"         // signal that carries a fork.Step, for people who look at the fork in Temporal's web page
	GetStatus       = "get_status"       // query; answers with a fork.Result

	// Pause and Resume are updates of a fork too, which answer with a
	// fork.Result. They hold the fork's sandbox still, and let it go on.
)

// DefaultTaskQueue is where runs, and the activities that any worker can do,
// wait.
const DefaultTaskQueue = "sandbox-orchestration"

// HostQueue returns the task queue of one host: where the activities of the
// sandboxes wait that live there.
func HostQueue(queue, host string) string { return queue + "@" + host }

// The activities.
var (
	PrepareBase           = Activity[PrepareBaseInput, Base]{"prepare_base"}
	CreateSandbox         = Activity[CreateSandboxInput, sandbox.Ref]{"create_sandbox"}
	HealthCheck           = Activity[HealthCheckInput, None]{"health_check"}
	ExecuteCommand        = Activity[ExecuteCommandInput, ExecuteCommandOutput]{"execute_command"}
	RunClaudeAgent        = Activity[RunAgentInput, RunAgentOutput]{"run_claude_agent"}
	RunAgent              = Activity[RunAgentInput, RunAgentOutput]{"run_agent"}
	PauseSandbox          = Activity[HoldSandboxInput, None]{"pause_sandbox"}
	ResumeSandbox         = Activity[HoldSandboxInput, None]{"resume_sandbox"}
	VerifyFork            = Activity[VerifyForkInput, fork.Verify]{"verify_fork"}
	CollectResult         = Activity[CollectResultInput, CollectResultOutput]{"collect_result"}
	CleanupSandbox        = Activity[CleanupSandboxInput, CleanupSandboxOutput]{"cleanup_sandbox"}
	SetBudget             = Activity[SetBudgetInput, None]{"set_budget"}
	RecordMetrics         = Activity[RecordMetricsInput, None]{"record_metrics"}
	FindOrphanedSandboxes = Activity[FindOrphanedSandboxesInput, FindOrphanedSandboxesOutput]{"find_orphaned_sandboxes"}
)

type (
	// PrepareBaseInput asks for what all forks of a run start from.
	PrepareBaseInput struct {
		Run  string    `json:"run"`
		Plan fork.Plan `json:"plan"`
	}
	// Base is what all forks of a run start from.
	Base struct {
		Queue     string `json:"queue"`           // where the run's other activities wait
		Commit    string `json:"commit"`          // the full id of the base commit
		Branch    string `json:"branch"`          // the branch it was taken from
		PromptKey string `json:"prompt_key"`      // where the artifact store holds the prompt
		Frozen    string `json:"frozen"`          // the provider's frozen base; empty: every fork unpacks Bundle
		Bundle    string `json:"bundle"`          // where the artifact store holds the commit; empty when Frozen is set
		Bytes     int64  `json:"bytes,omitempty"` // of Frozen, on the disk
		Made      bool   `json:"made,omitempty"`  // Frozen was not there already
	}
	// CreateSandboxInput asks for a sandbox that holds the base.
	CreateSandboxInput struct {
		Spec     fork.Spec `json:"spec"`
		Base     Base      `json:"base"`
		Deadline time.Time `json:"deadline"` // when the sandbox destroys itself
	}
	// HealthCheckInput asks whether the sandbox can do the work.
	HealthCheckInput struct {
		Spec fork.Spec   `json:"spec"`
		Ref  sandbox.Ref `json:"ref"`
	}
	// ExecuteCommandInput runs one command in a sandbox. A second call with
	// the same ID follows the same process.
	ExecuteCommandInput struct {
		Ref  sandbox.Ref `json:"ref"`
		ID   string      `json:"id"`
		Args []string    `json:"args"`
		Env  []string    `json:"env,omitempty"`
		Dir  string      `json:"dir,omitempty"`
	}
	// ExecuteCommandOutput is how the command ended; its outputs are cut at
	// fork.MaxText.
	ExecuteCommandOutput struct {
		ExitCode int    `json:"exit_code"`
		Stdout   string `json:"stdout"`
		Stderr   string `json:"stderr"`
	}
	// RunAgentInput runs the agent to its end. A second call with the same
	// Attempt follows the same process.
	RunAgentInput struct {
		Spec     fork.Spec   `json:"spec"`
		Ref      sandbox.Ref `json:"ref"`
		Attempt  int         `json:"attempt"` // from 1; above 1 the agent resumes its session
		Deadline time.Time   `json:"deadline"`

		// Slack is how long after the deadline an agent may be followed that was
		// held for want of money: its clock stands still then. 0: it runs on.
		Slack time.Duration `json:"slack,omitempty"`
	}
	// RunAgentOutput is what remains of a run that may have said megabytes.
	RunAgentOutput struct {
		Status fork.Status `json:"status"`
		Output string      `json:"output"`
		Error  string      `json:"error,omitempty"`
		Hint   string      `json:"hint,omitempty"`
		Turns  int         `json:"num_turns"`
		Usage  fork.Usage  `json:"usage"`
		Again  bool        `json:"again,omitempty"` // another attempt could help

		Short     string        `json:"short,omitempty"`      // as in fork.Result
		ErrorKind string        `json:"error_kind,omitempty"` // as in fork.Result
		Held      time.Duration `json:"held,omitempty"`       // by how much the deadline has moved, because the fork was held

		// Unended: the agent goes on; another call with the same attempt, and the
		// deadline moved, follows it. Nothing else is said then but Held.
		Unended bool `json:"unended,omitempty"`

		// Paused says that the sandbox was paused, so the agent was let be.
		// Nothing else is set then.
		Paused bool `json:"paused,omitempty"`
	}
	// HoldSandboxInput names a sandbox to pause or to resume.
	HoldSandboxInput struct {
		Ref      sandbox.Ref `json:"ref"`
		Deadline time.Time   `json:"deadline"` // when the sandbox destroys itself from now on
	}
	// CollectResultInput asks for the work of a fork as a branch.
	CollectResultInput struct {
		Spec fork.Spec   `json:"spec"`
		Ref  sandbox.Ref `json:"ref"`
	}
	// CollectResultOutput names the branch; Branch and Commit are empty when
	// the agent changed nothing.
	CollectResultOutput struct {
		Branch       string `json:"branch"`
		Commit       string `json:"commit"`
		FilesChanged int    `json:"files_changed"`
		Insertions   int    `json:"insertions"`
		Deletions    int    `json:"deletions"`
		Warning      string `json:"warning,omitempty"` // what else the user should know
	}
	// VerifyForkInput asks what the spec's verification says of the fork's work.
	// A second call follows the same command.
	VerifyForkInput struct {
		Spec     fork.Spec   `json:"spec"`
		Ref      sandbox.Ref `json:"ref"` // the agent's sandbox, which goes first
		Base     Base        `json:"base"`
		Commit   string      `json:"commit"`   // that was collected; empty: the agent changed nothing
		Deadline time.Time   `json:"deadline"` // when the sandbox of the verification destroys itself
	}
	// CleanupSandboxInput names everything a fork may have left: Ref, when it
	// is known, and whatever carries the labels of the run and the fork.
	CleanupSandboxInput struct {
		Ref      sandbox.Ref `json:"ref"`
		Provider string      `json:"provider"`
		Run      string      `json:"run"`
		Num      int         `json:"fork_num"`

		// Orphan makes it the removal of what a clean-up found: that sandbox and
		// no other, and only when the rule still holds for it.
		Orphan *OrphanRule `json:"orphan,omitempty"`
	}
	// CleanupSandboxOutput is the fork's final account: nothing can be spent
	// after its clean-up.
	CleanupSandboxOutput struct {
		Usage fork.Usage `json:"usage"`
		Kept  string     `json:"kept,omitempty"` // of an orphan: why it was left after all
	}
	// SetBudgetInput says what a budget is from now on: the run's, or with Num
	// above 0 that of a fork.
	SetBudgetInput struct {
		Run    string   `json:"run"`
		Num    int      `json:"fork_num,omitempty"`
		Budget fork.USD `json:"budget"`
	}
	// RecordMetricsInput is a fork that ended.
	RecordMetricsInput struct {
		Run    string      `json:"run,omitempty"`
		Result fork.Result `json:"result"`
		// Cancelled is how long it took from the cancellation of the fork until
		// nothing of it was left; 0: it was not cancelled.
		Cancelled time.Duration `json:"cancelled,omitempty"`
	}
	// FindOrphanedSandboxesInput asks for a page of the sandboxes that no run
	// uses. With the first page, unless it is a dry run, goes what is kept on
	// disk and was used by nobody for long.
	FindOrphanedSandboxesInput struct {
		OrphanRule
		DryRun bool   `json:"dry_run,omitempty"`
		After  string `json:"after,omitempty"` // the Next of the page before
		Limit  int    `json:"limit,omitempty"` // of a page; 0: CleanupPage
	}
	// FindOrphanedSandboxesOutput is what can go.
	FindOrphanedSandboxesOutput struct {
		Orphans   []CleanupSandboxInput `json:"orphans"`
		Sandboxes []CleanupItem         `json:"sandboxes,omitempty"` // the orphans again, for people
		Stored    []CleanupItem         `json:"stored,omitempty"`    // bases, bundles, files of runs
		Kept      map[string]int        `json:"kept,omitempty"`      // how many sandboxes of ours stay, by why
		Problems  []string              `json:"problems,omitempty"`  // what could not be looked at
		Queue     string                `json:"queue,omitempty"`     // where those can be removed that were found
		Next      string                `json:"next,omitempty"`      // empty on the last page
	}
	// None is the output of an activity that has nothing to say.
	None struct{}
)

type (
	// ForkInput is what a fork's workflow is started with.
	ForkInput struct {
		Spec fork.Spec `json:"spec"`
		Base Base      `json:"base"`
	}
	// AddBudgetInput gives a run more money, or with Num above 0 one of its
	// forks, within the run's.
	AddBudgetInput struct {
		Num int      `json:"fork_num,omitempty"`
		Add fork.USD `json:"add_usd"`
	}
	// CleanupInput is what a clean-up is started with.
	CleanupInput struct {
		MaxAge time.Duration `json:"max_age"`
		Grace  time.Duration `json:"grace,omitempty"` // 0: CleanupGrace
		DryRun bool          `json:"dry_run,omitempty"`

		// Where a clean-up goes on that has continued as new.
		After string         `json:"after,omitempty"`
		Queue string         `json:"queue,omitempty"`
		Sofar *CleanupOutput `json:"so_far,omitempty"`
	}
	// CleanupOutput says what one clean-up did, or in a dry run would do.
	CleanupOutput struct {
		DryRun   bool           `json:"dry_run,omitempty"`
		Found    int            `json:"found"`
		Removed  int            `json:"removed"`
		Items    []CleanupItem  `json:"items,omitempty"`    // the first CleanupItems of what was found
		Kept     map[string]int `json:"kept,omitempty"`     // how many sandboxes of ours stay, by why
		Problems []string       `json:"problems,omitempty"` // what could not be looked at or removed
	}
	// CleanupItem is one thing that a clean-up removes, and why.
	CleanupItem struct {
		Kind     string    `json:"kind"` // KindSandbox, KindBase, KindBundle or KindRun
		Provider string    `json:"provider,omitempty"`
		ID       string    `json:"id"`
		Run      string    `json:"run,omitempty"`
		ForkNum  int       `json:"fork_num,omitempty"`
		Since    time.Time `json:"since"`                  // when it was made, or last used
		Bytes    int64     `json:"bytes,omitempty"`        // on a disk, where known
		Hourly   *fork.USD `json:"usd_per_hour,omitempty"` // where known
		Paused   bool      `json:"paused,omitempty"`
		Why      string    `json:"why"`
		Removed  bool      `json:"removed"`
		Kept     string    `json:"kept,omitempty"` // why it is there still
	}
	// OrphanRule says which sandboxes of ours are orphans: those made MaxAge
	// ago or earlier whose workflows have all been closed for Grace, or are
	// forgotten.
	OrphanRule struct {
		MaxAge time.Duration `json:"max_age"`
		Grace  time.Duration `json:"grace,omitempty"`
	}
	// ResultsInput asks for the results of ended forks with a number of at
	// least From.
	ResultsInput struct {
		From int `json:"from"`
	}
	// ResultsOutput is a page of results, by number. Next is the From of the
	// next page, 0 on the last.
	ResultsOutput struct {
		Results []fork.Result `json:"results"`
		Next    int           `json:"next,omitempty"`
	}
)

// An Activity ties a name on the wire to the types on both sides of it, so
// the workflow that calls and the worker that serves cannot drift apart.
type Activity[In, Out any] struct{ Name string }

// Do runs the activity with the options of ctx and waits for it.
func (a Activity[In, Out]) Do(ctx workflow.Context, in In) (out Out, err error) {
	err = workflow.ExecuteActivity(ctx, a.Name, in).Get(ctx, &out)
	return out, err
}

// DoLocal runs the activity beside the workflow, without a task of its own.
func (a Activity[In, Out]) DoLocal(ctx workflow.Context, in In) (out Out, err error) {
	err = workflow.ExecuteLocalActivity(ctx, a.Name, in).Get(ctx, &out)
	return out, err
}

// Registrar is the part of a worker, or of a test environment, that serves.
type Registrar interface {
	RegisterActivityWithOptions(fn any, o activity.RegisterOptions)
}

// Serve registers fn as the activity's implementation.
func (a Activity[In, Out]) Serve(w Registrar, fn func(context.Context, In) (Out, error)) {
	w.RegisterActivityWithOptions(fn, activity.RegisterOptions{Name: a.Name})
}
