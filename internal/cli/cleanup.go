package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

type cleanupOptions struct{ Interval, MaxAge time.Duration }

// maxMinutes bounds the two ages of a clean-up: a year.
const maxMinutes = 366 * 24 * 60

// newCleanup makes the "cleanup" command.
func newCleanup(env *Env, run func(context.Context, *Env, cleanupOptions) error) *cobra.Command {
	if run == nil {
		run = runCleanup
	}
	var interval, maxAge int
	cmd := &cobra.Command{
		Use:     "cleanup",
		GroupID: groupService,
		Short:   "Remove forgotten sandboxes, now and then again",
		Long: `Cleanup looks for sandboxes of this installation that no run uses and that are
older than --max-age, and removes them: now, and every --interval from then on,
until stop-cleanup. A second call changes the two.` + exits(common...),
		Example: "  sandbox-temporal cleanup --interval 15 --max-age 180",
		Args:    args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for flag, n := range map[string]int{"interval": interval, "max-age": maxAge} {
				if n < 1 || n > maxMinutes {
					return usage(fmt.Sprintf("Use --%s 1 to %d, in minutes.", flag, maxMinutes), "--%s %d", flag, n)
				}
			}
			return run(cmd.Context(), env, cleanupOptions{time.Duration(interval) * time.Minute, time.Duration(maxAge) * time.Minute})
		},
	}
	cmd.Flags().Var(newNumber(&interval, 15), "interval", "`MINUTES` between two clean-ups")
	cmd.Flags().Var(newNumber(&maxAge, 180), "max-age", "`MINUTES` that a sandbox must have lived")
	return cmd
}

func runCleanup(ctx context.Context, env *Env, opts cleanupOptions) error {
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	defer runs.Close()
	if err := runs.StartCleanup(ctx, opts.Interval, opts.MaxAge); err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "Every %s, sandboxes that no run uses are removed when they are older than %s.\n",
		seconds(opts.Interval.Seconds()), seconds(opts.MaxAge.Seconds()))
	fmt.Fprintf(env.Stderr, "End it with: %s stop-cleanup\n", program)
	return err
}

// newStopCleanup makes the "stop-cleanup" command.
func newStopCleanup(env *Env, run func(context.Context, *Env) error) *cobra.Command {
	if run == nil {
		run = runStopCleanup
	}
	return &cobra.Command{
		Use:     "stop-cleanup",
		GroupID: groupService,
		Short:   "End what cleanup began",
		Long:    "Stop-cleanup ends the regular removal of forgotten sandboxes." + exits(common...),
		Example: "  sandbox-temporal stop-cleanup",
		Args:    args(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env) },
	}
}

func runStopCleanup(ctx context.Context, env *Env) error {
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	defer runs.Close()
	if err := runs.StopCleanup(ctx); err != nil {
		return err
	}
	_, err = fmt.Fprintln(env.Stdout, "The regular clean-up is ended.")
	return err
}
