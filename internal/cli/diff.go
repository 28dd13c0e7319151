package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

type diffOptions struct {
	Target target
	Stat   bool
}

// newDiff makes the "diff" command.
func newDiff(env *Env, run func(context.Context, *Env, diffOptions) error) *cobra.Command {
	if run == nil {
		run = runDiff
	}
	var opts diffOptions
	cmd := &cobra.Command{
		Use:     "diff RUN/N",
		GroupID: groupWork,
		Short:   "Show what a fork changed",
		Long: `Diff shows what a fork changed since the commit it started from, as a patch that
"git apply" takes. On a terminal, characters that could do harm there are left
out; into a file or a pipe the patch goes as it is.

What a worker on another host collected is taken from the artifact store that
SANDBOX_TEMPORAL_ARTIFACTS names here and there. The commit that it builds on is
taken from the clone that the command is run in, from that store, or from where
the run had it.
` + targetHelp + exits(common...),
		Example:           "  sandbox-temporal diff @last/2 --stat\n  sandbox-temporal diff @last/2 > fork2.patch",
		Args:              args("RUN/N"),
		ValidArgsFunction: completeRuns(env),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = forkArg(words[0]); err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().BoolVar(&opts.Stat, "stat", false, "show the files and how much of each changed")
	return cmd
}

func runDiff(ctx context.Context, env *Env, opts diffOptions) error {
	m, err := openWork(ctx, env, opts.Target, ".")
	if err != nil || m.work == nil {
		return err
	}
	shown := env.IsTerminal(env.Stdout)
	o := repo.DiffOptions{Stat: opts.Stat, Binary: !shown && !opts.Stat} // what is not looked at may be applied
	p := env.paintFor(env.Stdout)
	if !shown && !bool(p) {
		return m.work.Diff(ctx, m.run, m.ForkNum, env.Stdout, o)
	}
	c := &diffCleaner{w: env.Stdout, paint: p && !paint(opts.Stat)}
	if err := m.work.Diff(ctx, m.run, m.ForkNum, c, o); err != nil {
		return err
	}
	c.lines.Flush(c.line)
	return c.err
}

// made is a fork that ended, and what holds its branch.
type made struct {
	fork.Result
	run  string
	plan fork.Plan // of runs on a cluster only
	work Work
}

// openWork finds an ended fork and what holds its branch. Dir may lie in a clone
// of the repository. Work is nil, and the user was told, when the fork changed
// nothing.
func openWork(ctx context.Context, env *Env, t target, dir string) (m made, err error) {
	runs, run, err := env.open(ctx, t)
	if err != nil {
		return m, err
	}
	defer runs.Close()
	m.run = run
	m.Result, err = result(ctx, runs, run, t.num)
	switch {
	case err != nil:
		return m, err
	case m.Commit == "":
		fmt.Fprintf(env.Stderr, "fork %d of %s changed nothing (%s)\n", m.ForkNum, flat(run), flat(string(m.Status)))
		return m, nil
	case env.Work == nil:
		return m, missing("store of branches")
	}
	if m.work, err = env.Work(ctx, env.Globals); err != nil || env.Globals.Config.Embedded() {
		return m, err
	}
	if m.plan, err = runs.Plan(ctx, run); err != nil {
		return m, err
	}
	return m, m.work.Bring(ctx, run, m.plan, m.Result, dir)
}

// diffCleaner makes a patch safe to look at, and colours it.
type diffCleaner struct {
	w     io.Writer
	paint paint
	lines agent.Lines
	err   error
}

func (c *diffCleaner) Write(b []byte) (int, error) {
	c.lines.Feed(b, c.line)
	return len(b), c.err
}

func (c *diffCleaner) line(line []byte) {
	colour := plain
	switch {
	case bytes.HasPrefix(line, []byte("+++")), bytes.HasPrefix(line, []byte("---")), bytes.HasPrefix(line, []byte("diff ")):
		colour = bold
	case bytes.HasPrefix(line, []byte("+")):
		colour = green
	case bytes.HasPrefix(line, []byte("-")):
		colour = red
	case bytes.HasPrefix(line, []byte("@@")):
		colour = cyan
	}
	if c.err == nil {
		_, c.err = fmt.Fprintln(c.w, c.paint.in(colour, oneRow(string(line))))
	}
}

// oneRow makes a line safe to print and keeps it one: a carriage return in it
// must not begin another, which would look like a line of its own.
func oneRow(s string) string {
	return string(bytes.ReplaceAll(bytes.TrimRight([]byte(clean(s)), "\n"), []byte{'\n'}, []byte("␍")))
}
