package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

type statusOptions struct {
	Target target
	Watch  bool
	Output string
}

// newStatus makes the "status" command.
func newStatus(env *Env, run func(context.Context, *Env, statusOptions) error) *cobra.Command {
	if run == nil {
		run = runStatus
	}
	var opts statusOptions
	cmd := &cobra.Command{
		Use:     "status RUN",
		GroupID: groupRuns,
		Short:   "Show how a run stands",
		Long: `Status shows how a run and each of its forks stand. With -o json it prints the
report so far: the forks that ended are in "results", the others are counted.
` + targetHelp + `

Without --watch the exit code says whether there was an answer, not how the run
goes; with it, status waits for the end of the run and exits as fork does.` + exits(ofRuns...),
		Example:           "  sandbox-temporal status @last\n  sandbox-temporal status --watch 3f9c\n  sandbox-temporal status @last --output json",
		Args:              args("RUN"),
		ValidArgsFunction: completeRuns(env),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = runArg(words[0]); err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().BoolVarP(&opts.Watch, "watch", "w", false, "follow the run until it ends")
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runStatus(ctx context.Context, env *Env, opts statusOptions) error {
	runs, run, err := env.open(ctx, opts.Target)
	if err != nil {
		return err
	}
	if opts.Watch {
		w := newWatcher(env, runs)
		defer w.close()
		w.run = run
		return waitAndReport(ctx, env, w, opts.Output)
	}
	defer runs.Close()
	rep, err := runs.Report(ctx, run)
	if err != nil {
		return err
	}
	var live map[int]fork.Live
	if opts.Output == "table" {
		if len(rep.Active) > 0 {
			if live, err = runs.Live(ctx, run, rep.Active); err != nil {
				return err
			}
		}
		if _, err := io.WriteString(env.Stdout, heading(env.paintFor(env.Stdout), rep)); err != nil {
			return err
		}
	}
	return printReport(env, rep, live, opts.Output)
}

// heading is what stands above the table of status.
func heading(p paint, rep fork.Report) string {
	parts := []string{p.in(bold, flat(rep.Run)), p.in(colourOf(rep.Status), flat(rep.Words()))}
	if rep.Name != "" {
		parts = append(parts, flat(rep.Name))
	}
	return fmt.Sprintf("%s\n\n", strings.Join(append(parts, flat(rep.Repo)), " · "))
}
