// Package cli is the command line: one file a command, the words they share,
// and how things are shown to people.
//
// Results go to standard output; ids, progress and warnings to standard error.
// A command touches nothing of its process but what [Env] hands to it.
package cli

import (
	"context"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// program is the name under which users call it.
const program = "sandbox-temporal"

// Env is all that a command may touch of the process it runs in, and the parts
// that main plugs in. What is dear to make is a function, called by the
// commands that need it and by no other, so that help costs nothing.
//
// A hook that is nil makes the commands that need it fail with
// fault.Unsupported; those called optional are left out instead.
type Env struct {
	Args           []string // the command line without the program's name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string // nil: no variable is set
	IsTerminal     func(x any) bool    // whether the reader or writer is a terminal; nil: nothing is
	Now            func() time.Time    // nil: time.Now
	Version        string              // of the program; empty: "dev"

	// Globals are what the flags of every command come to. Main fills them
	// in before a command runs.
	Globals Globals

	// Runs connects to Temporal: to the cluster that the configuration names,
	// or to the embedded engine, which it starts when it does not run (one
	// line on Stderr says so). It is fault.Unreachable when nothing answers.
	// It can be called again to replace a connection that broke.
	Runs func(ctx context.Context, g Globals) (Runs, error)

	// BeforeStart is called with a plan that was found valid, after Runs and
	// before the run is started: to lend credentials to the engine, or to
	// carry a local repository to a cluster, for which it may change the
	// plan. Optional.
	BeforeStart func(ctx context.Context, g Globals, run string, plan *fork.Plan) error

	// Artifacts opens the store that holds what agents said.
	Artifacts func(ctx context.Context, g Globals) (Artifacts, error)

	// Books opens the ledger in which every call of the model stands, to read
	// it. It is fault.NotFound when there is none yet.
	Books func(ctx context.Context, g Globals) (Books, error)

	// Work opens what holds the branches of ended forks.
	Work func(ctx context.Context, g Globals) (Work, error)

	// Providers are the places where this program can make sandboxes.
	Providers func(g Globals) (sandbox.Set, error)

	// Doctor looks for what would make a run fail. Optional: without it,
	// doctor checks only what this package can see.
	Doctor func(ctx context.Context, g Globals) []Finding

	// Commands makes the commands that are more than a question to Temporal:
	// up, down, worker, demo.
	Commands []func(*Env) *cobra.Command

	// Trace begins the span of a command, when traces are wanted, and returns
	// what ends it. Optional.
	Trace func(ctx context.Context, command string) (context.Context, func(error))

	timing timing
}

// Globals are what the flags of every command come to.
type Globals struct {
	Config  *config.Config // never nil in a hook
	Color   string         // "auto", "always" or "never"
	NoStart bool           // do not start an engine; fail with fault.Unreachable when none runs
}

// Runs is what the commands ask Temporal. Errors are faults: NotFound when
// there is no such run, Unreachable when Temporal does not answer, Unavailable
// when the same question may be answered later.
type Runs interface {
	// Start starts the run, and fails with fault.Conflict when the id exists.
	Start(ctx context.Context, run string, plan fork.Plan) error

	// Find returns the id of the run that a user means by a full id, a
	// unique beginning of one, or @last.
	Find(ctx context.Context, word string) (string, error)

	// Plan returns what the run was asked to do.
	Plan(ctx context.Context, run string) (fork.Plan, error)

	Progress(ctx context.Context, run string) (fork.Progress, error)
	Report(ctx context.Context, run string) (fork.Report, error)

	// Live tells what the running forks among nums are doing. A fork that is
	// not running is left out.
	Live(ctx context.Context, run string, nums []int) (map[int]fork.Live, error)

	// Wait returns when the run has ended.
	Wait(ctx context.Context, run string) (fork.Progress, error)

	// Pause, Freeze, Resume and Cancel return when the thing is done. Freeze
	// also returns the numbers of the forks that stand still.
	Pause(ctx context.Context, run string) (fork.Progress, error)
	Freeze(ctx context.Context, run string) (fork.Progress, []int, error)
	Resume(ctx context.Context, run string) (fork.Progress, error)
	Cancel(ctx context.Context, run string) (fork.Progress, error)

	// AddBudget gives the run more money, or with a num above 0 one of its
	// forks, and returns when it can be spent.
	AddBudget(ctx context.Context, run string, num int, add fork.USD) (fork.Progress, error)

	// CancelFork ends one fork and returns when it has ended.
	CancelFork(ctx context.Context, run string, num int) error

	// Prepare makes the base that forks of the plan start from and returns
	// when it is there. When ctx is done before, it goes on. A second call
	// with the same id follows the first.
	Prepare(ctx context.Context, id string, plan fork.Plan) (orchestrator.Base, error)

	// List returns the newest runs that fit the query, at most limit, newest
	// first. An empty query fits all.
	List(ctx context.Context, limit int, query string) ([]orchestrator.RunInfo, error)

	// StartCleanup removes what no run uses, every interval, when it is
	// older than maxAge. A second call changes the two.
	StartCleanup(ctx context.Context, interval, maxAge time.Duration) error

	// Sweep does one clean-up now, or in a dry run says what it would do, and
	// waits for it. It is fault.Conflict while another one goes on.
	Sweep(ctx context.Context, in orchestrator.CleanupInput) (orchestrator.CleanupOutput, error)

	// StopCleanup is fault.NotFound when no clean-up was started.
	StopCleanup(ctx context.Context) error

	Close()
}

// Artifacts is what the commands read from the artifact store.
type Artifacts interface {
	// Transcript opens what the agent of fork num has printed so far in one
	// attempt, counted from 1, as the agent wrote it, from byte offset on. It
	// ends where the agent is now. An offset at the end gives an empty
	// reader; an attempt that has no transcript yet is fault.NotFound.
	Transcript(ctx context.Context, run string, num, attempt int, offset int64) (io.ReadCloser, error)

	// Refused opens the list of connections that the sandbox of fork num was
	// not let open, a fork.Refusal in JSON a line; fault.NotFound when there
	// is none, or none yet.
	Refused(ctx context.Context, run string, num int) (io.ReadCloser, error)

	// Verified opens what the verification of fork num's work printed;
	// fault.NotFound when there was none, or none yet.
	Verified(ctx context.Context, run string, num int) (io.ReadCloser, error)
}

// Books is what the commands read in the ledger.
type Books interface {
	Report(ctx context.Context, q ledger.Query) ([]ledger.Line, error)

	// Budgets is fault.NotFound for a run that has spent nothing yet.
	Budgets(ctx context.Context, run string) (ledger.Budgets, error)

	Close() error
}

var _ Books = (*ledger.Reader)(nil)

// Work is what the commands do with the branches of forks that ended.
type Work interface {
	// Bring makes the branch of a fork that ended available here, which may be
	// in the artifact store that this host shares with the worker's. It comes
	// before the others. Dir is a folder that may lie in a clone of the
	// repository; empty: there is none. Fault.NotFound says that the branch, or
	// the commit that it builds on, cannot be had from here.
	Bring(ctx context.Context, run string, plan fork.Plan, r fork.Result, dir string) error

	// Carried reports whether this state folder gave the commit, which it took
	// from the repository at path, to a run.
	Carried(ctx context.Context, path, commit string) bool

	// Deliver fetches the branch into the repository at path. It is
	// fault.NotFound when that does not hold the commit that the fork began at.
	Deliver(ctx context.Context, run string, num int, path string) error

	// Diff writes what the fork changed since its base.
	Diff(ctx context.Context, run string, num int, w io.Writer, o repo.DiffOptions) error

	// Apply puts the fork's changes into the work tree that dir lies in,
	// uncommitted: all of them, or none and fault.Conflict.
	Apply(ctx context.Context, run string, num int, dir string) (repo.ApplyResult, error)
}

// Main runs the program and returns its exit code. When ctx is done, the
// command lets go of what it waits for; the run goes on.
func Main(ctx context.Context, env *Env) int {
	e := env.complete()
	root := newRoot(e)
	root.SetArgs(e.Args)
	end := func(error) {}
	if cmd, _, err := root.Find(e.Args); err == nil && e.Trace != nil && (cmd.GroupID == groupRuns || cmd.GroupID == groupWork) {
		ctx, end = e.Trace(ctx, cmd.Name())
	}
	err := root.ExecuteContext(ctx)
	end(err)
	return exit(ctx, e, err)
}

// complete returns a copy of env in which the fields with a default are set.
func (env *Env) complete() *Env {
	e := *env
	if e.Args == nil {
		e.Args = []string{} // cobra takes nil for os.Args
	}
	if e.Getenv == nil {
		e.Getenv = func(string) string { return "" }
	}
	if e.IsTerminal == nil {
		e.IsTerminal = func(any) bool { return false }
	}
	if e.Now == nil {
		e.Now = time.Now
	}
	if e.Version == "" {
		e.Version = "dev"
	}
	e.timing = e.timing.complete()
	return &e
}

// runs connects to Temporal.
func (env *Env) runs(ctx context.Context) (Runs, error) {
	if env.Runs == nil {
		return nil, missing("Temporal client")
	}
	return env.Runs(ctx, env.Globals)
}

// books opens the ledger.
func (env *Env) books(ctx context.Context) (Books, error) {
	if env.Books == nil {
		return nil, missing("ledger")
	}
	return env.Books(ctx, env.Globals)
}

// missing is the error of a command whose part main did not plug in.
func missing(part string) error {
	return fault.New("", fault.Unsupported, "this build has no %s", part)
}
