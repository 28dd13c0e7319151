package cli

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

type applyOptions struct {
	Target target
	Dir    string
}

// newApply makes the "apply" command.
func newApply(env *Env, run func(context.Context, *Env, applyOptions) error) *cobra.Command {
	if run == nil {
		run = runApply
	}
	var opts applyOptions
	cmd := &cobra.Command{
		Use:     "apply RUN/N",
		GroupID: groupWork,
		Short:   "Bring a fork's changes into a work tree",
		Long: `Apply brings what a fork changed into a work tree, uncommitted, for you to look
at, test and commit. When the changes do not fit, the work tree stays as it is.

Of a run that was given a path which its workers do not see, the branch comes
into the repository, too; see: diff --help for where the work is taken from.
` + targetHelp + exits(common...),
		Example:           "  sandbox-temporal apply @last/2\n  sandbox-temporal apply 3f9c/1 --dir ~/src/project",
		Args:              args("RUN/N"),
		ValidArgsFunction: completeRuns(env),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = forkArg(words[0]); err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().StringVar(&opts.Dir, "dir", ".", "the `FOLDER` of the work tree")
	return cmd
}

func runApply(ctx context.Context, env *Env, opts applyOptions) error {
	dir, err := filepath.Abs(opts.Dir)
	if err == nil {
		dir, err = git(ctx, dir, "rev-parse", "--show-toplevel")
	}
	if err != nil {
		return fault.New("", fault.NotFound, "%s is in no git work tree", opts.Dir).Hinted("Go to the repository's folder, or name it with --dir.")
	}
	m, err := openWork(ctx, env, opts.Target, dir)
	if err != nil || m.work == nil {
		return err
	}
	if m.plan.Upload != "" {
		// The worker could not. A folder without the commit that the fork began
		// at gets the changes all the same.
		if err := m.work.Deliver(ctx, m.run, m.ForkNum, dir); err != nil && fault.KindOf(err) != fault.NotFound {
			fmt.Fprintf(env.Stderr, "warning: %s\n", clean(err.Error()))
		}
	}
	done, err := m.work.Apply(ctx, m.run, m.ForkNum, dir)
	if err != nil {
		return err
	}
	how := "Applied"
	if done.ThreeWay {
		how = "Merged"
	}
	if _, err = fmt.Fprintf(env.Stdout, "%s fork %d of %s in %s: %s, +%d/-%d\n",
		how, m.ForkNum, flat(m.run), flat(dir), plural(len(done.Files), "file"), m.Insertions, m.Deletions); err != nil {
		return err
	}
	if done.ThreeWay {
		fmt.Fprintln(env.Stderr, "The work tree has moved on from where the fork began; look at what came of it.")
	}
	if m.Verify != nil && m.Verify.Status != fork.Success {
		fmt.Fprintf(env.Stderr, "This work did not pass its verification. See why with: %s logs %s/%d --verify\n", program, flat(m.run), m.ForkNum)
	}
	fmt.Fprintln(env.Stderr, "Nothing is committed yet. Look with: git status")
	return nil
}
