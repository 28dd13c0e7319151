package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

type controlOptions struct {
	Target target
	Freeze bool // pause only
}

// newCancel makes the "cancel" command.
func newCancel(env *Env, run func(context.Context, *Env, controlOptions) error) *cobra.Command {
	if run == nil {
		run = runCancel
	}
	var opts controlOptions
	return &cobra.Command{
		Use:     "cancel RUN[/N]",
		GroupID: groupRuns,
		Short:   "End a run, or one fork of it",
		Long: `Cancel ends a run, or with RUN/N one fork of it while the others go on. It
returns when every agent is dead and every sandbox gone. What forks had finished
before stays. To cancel what has ended changes nothing and is no error.
` + targetHelp + exits(common...),
		Example:           "  sandbox-temporal cancel @last\n  sandbox-temporal cancel 3f9c/2",
		Args:              args("RUN or RUN/N"),
		ValidArgsFunction: completeRuns(env, fork.Running),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = parseTarget(words[0]); err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
}

func runCancel(ctx context.Context, env *Env, opts controlOptions) error {
	runs, run, err := env.open(ctx, opts.Target)
	if err != nil {
		return err
	}
	defer runs.Close()
	if opts.Target.num > 0 {
		return cancelFork(ctx, env, runs, run, opts.Target.num)
	}
	before, err := runs.Progress(ctx, run)
	if err != nil {
		return err
	}
	if before.Status.Ended() {
		fmt.Fprintf(env.Stderr, "run %s has ended already: %s\n", flat(run), flat(string(before.Status)))
		return nil
	}
	fmt.Fprintf(env.Stderr, "cancelling %s: waiting for %s to be cleaned up\n", flat(run), plural(before.Running, "fork"))
	p, err := runs.Cancel(ctx, run)
	if err != nil {
		return err
	}
	return sayProgress(env, p)
}

func cancelFork(ctx context.Context, env *Env, runs Runs, run string, num int) error {
	p, err := runs.Progress(ctx, run)
	if err != nil {
		return err
	}
	if err := hasFork(p, run, num); err != nil {
		return err
	}
	if s := (sight{Progress: p}).status(num); s.Ended() {
		fmt.Fprintf(env.Stderr, "fork %d has ended already: %s\n", num, flat(string(s)))
		return nil
	}
	fmt.Fprintf(env.Stderr, "cancelling fork %d of %s\n", num, flat(run))
	if err := runs.CancelFork(ctx, run, num); err != nil {
		return err
	}
	if p, err = runs.Progress(ctx, run); err != nil {
		return err
	}
	return sayProgress(env, p)
}

// newPause makes the "pause" command.
func newPause(env *Env, run func(context.Context, *Env, controlOptions) error) *cobra.Command {
	if run == nil {
		run = runPause
	}
	var opts controlOptions
	cmd := newTell(env, &opts, run, "pause", "Let no further fork of a run start",
		`Pause lets no further fork of the run start. Forks that run go on to their end;
to end one, cancel it.

With --freeze the forks that run stand still too: every process in their
sandboxes stops where it is, with its memory and files, and goes on with resume.
The time does not count against the forks. A call of the model that is under way
is still paid for. What stands still for more than a day is ended.`)
	cmd.Example += "\n  " + program + " pause @last --freeze"
	cmd.Flags().BoolVar(&opts.Freeze, "freeze", false, "hold the forks that run still, too")
	return cmd
}

func runPause(ctx context.Context, env *Env, opts controlOptions) error {
	if !opts.Freeze {
		return runTell(ctx, env, opts, Runs.Pause)
	}
	runs, run, err := env.open(ctx, opts.Target)
	if err != nil {
		return err
	}
	defer runs.Close()
	p, still, err := runs.Freeze(ctx, run)
	if len(still) > 0 {
		fmt.Fprintf(env.Stderr, "standing still: %s\nlet go on with: %s resume %s\n", numbers(still), program, flat(run))
	}
	if err != nil {
		return err
	}
	return sayProgress(env, p)
}

// numbers lists forks by their numbers.
func numbers(nums []int) string {
	var words []string
	for _, n := range nums {
		words = append(words, fmt.Sprintf("fork %d", n))
	}
	return strings.Join(words, ", ")
}

// newResume makes the "resume" command.
func newResume(env *Env, run func(context.Context, *Env, controlOptions) error) *cobra.Command {
	if run == nil {
		run = func(ctx context.Context, env *Env, opts controlOptions) error {
			return runTell(ctx, env, opts, Runs.Resume)
		}
	}
	var opts controlOptions
	return newTell(env, &opts, run, "resume", "Take a pause back",
		"Resume lets the forks of a paused run start again, and those that stand still\ngo on.")
}

func newTell(env *Env, opts *controlOptions, run func(context.Context, *Env, controlOptions) error, verb, short, long string) *cobra.Command {
	return &cobra.Command{
		Use:               verb + " RUN",
		GroupID:           groupRuns,
		Short:             short,
		Long:              long + "\n" + targetHelp + exits(common...),
		Example:           "  sandbox-temporal " + verb + " @last",
		Args:              args("RUN"),
		ValidArgsFunction: completeRuns(env, fork.Running),
		RunE: func(cmd *cobra.Command, words []string) error {
			t, err := runArg(words[0])
			if err != nil {
				return err
			}
			opts.Target = t
			return run(cmd.Context(), env, *opts)
		},
	}
}

func runTell(ctx context.Context, env *Env, opts controlOptions, tell func(Runs, context.Context, string) (fork.Progress, error)) error {
	runs, run, err := env.open(ctx, opts.Target)
	if err != nil {
		return err
	}
	defer runs.Close()
	p, err := tell(runs, ctx, run)
	if err != nil {
		return err
	}
	return sayProgress(env, p)
}

// sayProgress prints how a run stands in one line.
func sayProgress(env *Env, p fork.Progress) error {
	state := string(p.Status)
	if p.Paused && !p.Status.Ended() {
		state = "paused"
	}
	_, err := fmt.Fprintf(env.Stdout, "%s: %s · %s\n", flat(p.Run), flat(state), totals(fork.Report{Progress: withoutPause(p)}, nil))
	return err
}

// withoutPause is p for a line that says it already.
func withoutPause(p fork.Progress) fork.Progress {
	p.Paused = false
	return p
}
