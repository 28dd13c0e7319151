package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

type cleanupOptions struct {
	Interval, MaxAge time.Duration
	Once, DryRun     bool
	Output           string
}

// maxMinutes bounds the two times of a clean-up: a year.
const maxMinutes = 366 * 24 * 60

// newCleanup makes the "cleanup" command.
func newCleanup(env *Env, run func(context.Context, *Env, cleanupOptions) error) *cobra.Command {
	if run == nil {
		run = runCleanup
	}
	var interval, maxAge int
	var opts cleanupOptions
	cmd := &cobra.Command{
		Use:     "cleanup",
		GroupID: groupService,
		Short:   "Remove forgotten sandboxes, now and then again",
		Long: `Cleanup looks at every provider for sandboxes that this installation made in
this Temporal namespace, that no run uses and that are older than --max-age, and
removes them: now, and every --interval from then on, until stop-cleanup. A
second call changes the two. With it go bases, and the logs and branches of runs
that Temporal has forgotten, when nobody has used them for 30 days.

--once removes them now, waits for it and says what went; --dry-run only says
what would go, and why. What could not be looked at stays, is told, and makes
the exit status 1.` + exits(common...),
		Example: `  sandbox-temporal cleanup --interval 15 --max-age 180
  sandbox-temporal cleanup --dry-run
  sandbox-temporal cleanup --once --max-age 0`,
		Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if interval < 1 || interval > maxMinutes {
				return usage(fmt.Sprintf("Use --interval 1 to %d, in minutes.", maxMinutes), "--interval %d", interval)
			}
			if maxAge < 0 || maxAge > maxMinutes {
				return usage(fmt.Sprintf("Use --max-age 0 to %d, in minutes.", maxMinutes), "--max-age %d", maxAge)
			}
			if (opts.Once || opts.DryRun) && cmd.Flags().Changed("interval") {
				return usage("Leave --interval out.", "--interval is for a clean-up that is done again")
			}
			opts.Interval, opts.MaxAge = time.Duration(interval)*time.Minute, time.Duration(maxAge)*time.Minute
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().Var(newNumber(&interval, 15), "interval", "`MINUTES` between two clean-ups")
	cmd.Flags().Var(newNumber(&maxAge, 180), "max-age", "`MINUTES` that a sandbox must have lived")
	cmd.Flags().BoolVar(&opts.Once, "once", false, "clean up now and not again")
	cmd.Flags().BoolVar(&opts.DryRun, "dry-run", false, "remove nothing, and say what would go and why")
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runCleanup(ctx context.Context, env *Env, opts cleanupOptions) error {
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	defer runs.Close()
	if opts.Once || opts.DryRun {
		out, err := runs.Sweep(ctx, orchestrator.CleanupInput{MaxAge: opts.MaxAge, DryRun: opts.DryRun})
		if err != nil {
			return err
		}
		return sayCleanup(env, out, opts)
	}
	if err := runs.StartCleanup(ctx, opts.Interval, opts.MaxAge); err != nil {
		return err
	}
	if opts.Output == "json" {
		return writeJSON(env.Stdout, struct {
			ID       string `json:"schedule_id"`
			Interval int64  `json:"interval_seconds"`
			MaxAge   int64  `json:"max_age_seconds"`
		}{orchestrator.CleanupID, int64(opts.Interval.Seconds()), int64(opts.MaxAge.Seconds())})
	}
	_, err = fmt.Fprintf(env.Stdout, "Every %s, sandboxes that no run uses are removed when they are older than %s.\n",
		seconds(opts.Interval.Seconds()), seconds(opts.MaxAge.Seconds()))
	fmt.Fprintf(env.Stderr, "End it with: %s stop-cleanup\n", program)
	return err
}

// sayCleanup shows what went, or would go, and then what could not be looked
// at, which is a failure.
func sayCleanup(env *Env, out orchestrator.CleanupOutput, opts cleanupOptions) error {
	if opts.Output == "json" {
		if out.Items == nil {
			out.Items = []orchestrator.CleanupItem{} // scripts find a list, not null
		}
		if err := writeJSON(env.Stdout, out); err != nil {
			return err
		}
	} else {
		if len(out.Items) > 0 {
			err := writeTable(env.Stdout, env.paintFor(env.Stdout), []column{
				{"KIND", false}, {"PROVIDER", false}, {"ID", false}, {"AGE", true}, {"SIZE", true}, {"$/H", true}, {"WHY", false},
			}, cleanupRows(env.Now(), out))
			if err != nil {
				return err
			}
		}
		fmt.Fprintln(env.Stderr, cleanupTotals(out))
		for _, p := range out.Problems {
			fmt.Fprintf(env.Stderr, "not done: %s\n", flat(p))
		}
	}
	if len(out.Problems) > 0 {
		return said{exitFailed}
	}
	return nil
}

func cleanupRows(now time.Time, out orchestrator.CleanupOutput) [][]cell {
	var rows [][]cell
	for _, i := range out.Items {
		why, size, hourly := i.Why, "", ""
		if i.Paused {
			why += "; paused"
		}
		if !i.Removed && !out.DryRun {
			why = "left: " + i.Kept
		}
		if i.Bytes > 0 {
			size = byteText(i.Bytes)
		}
		if i.Hourly != nil {
			hourly = dollars(*i.Hourly)
		}
		rows = append(rows, []cell{
			{flat(i.Kind), plain}, {flat(i.Provider), plain}, {flat(i.ID), plain}, {age(now, i.Since), plain},
			{size, plain}, {hourly, plain}, {fit(flat(why), 100), plain},
		})
	}
	return rows
}

// cleanupTotals is the sum of it: what goes and what that saves, what stays
// and why.
func cleanupTotals(out orchestrator.CleanupOutput) string {
	var b strings.Builder
	if out.DryRun {
		fmt.Fprintf(&b, "%s would be removed", plural(out.Found, "thing"))
	} else {
		fmt.Fprintf(&b, "%s removed", plural(out.Removed, "thing"))
		if left := out.Found - out.Removed; left > 0 {
			fmt.Fprintf(&b, ", %d left", left)
		}
	}
	var hourly fork.USD
	for _, i := range out.Items {
		if i.Hourly != nil && (i.Removed || out.DryRun) {
			hourly += *i.Hourly
		}
	}
	if hourly > 0 {
		fmt.Fprintf(&b, ", %s an hour", dollars(hourly))
	}
	if more := out.Found - len(out.Items); more > 0 {
		fmt.Fprintf(&b, " (%d of them not shown)", more)
	}
	for _, why := range slices.Sorted(maps.Keys(out.Kept)) {
		fmt.Fprintf(&b, "; %d kept: %s", out.Kept[why], flat(why))
	}
	return b.String()
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
