package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/payload"
)

type listOptions struct {
	Limit  int
	Query  string
	Output string
}

// maxList bounds what one list can ask for.
const maxList = 10_000

// newList makes the "list" command.
func newList(env *Env, run func(context.Context, *Env, listOptions) error) *cobra.Command {
	if run == nil {
		run = runList
	}
	var opts listOptions
	cmd := &cobra.Command{
		Use:     "list",
		GroupID: groupRuns,
		Short:   "List the newest runs",
		Long:    "List shows the newest runs, whether they go on or have ended, newest first." + exits(common...),
		Example: "  sandbox-temporal list --limit 5\n  sandbox-temporal list --query \"SandboxStatus = 'failed'\"",
		Args:    args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Limit < 1 || opts.Limit > maxList {
				return usage(fmt.Sprintf("Use --limit 1 to %d.", maxList), "a list of %d runs asked for", opts.Limit)
			}
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().Var(newNumber(&opts.Limit, 20), "limit", "how many runs to show")
	cmd.Flags().StringVar(&opts.Query, "query", "", "only runs that fit this `QUERY` over SandboxStatus, SandboxRepo, SandboxModel,\nSandboxCostUSD and Temporal's own attributes")
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runList(ctx context.Context, env *Env, opts listOptions) error {
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	defer runs.Close()
	list, err := runs.List(ctx, opts.Limit, opts.Query)
	if err != nil {
		return err
	}
	sealed := 0
	for _, r := range list {
		if r.Sealed {
			sealed++
		}
	}
	if sealed > 0 {
		fmt.Fprintf(env.Stderr, "%s: %d run(s) were sealed with a key that %s does not have\n", program, sealed, payload.Variable)
	}
	if opts.Output == "json" {
		if list == nil {
			list = []orchestrator.RunInfo{} // scripts find a list, not null
		}
		return writeJSON(env.Stdout, list)
	}
	if len(list) == 0 {
		fmt.Fprintf(env.Stderr, "There is no run yet. Start one with: %s fork\n", program)
		return nil
	}
	return writeTable(env.Stdout, env.paintFor(env.Stdout), []column{
		{"RUN", false}, {"STATUS", false}, {"FORKS", true}, {"MODEL", false}, {"AGE", true}, {"DURATION", true}, {"NAME", false}, {"REPOSITORY", false},
	}, listRows(env.Now(), list))
}

func listRows(now time.Time, list []orchestrator.RunInfo) [][]cell {
	var rows [][]cell
	for _, r := range list {
		end := now
		if r.Closed != nil {
			end = *r.Closed
		}
		status := r.Status
		if status == "" {
			status = fork.Running
		}
		rows = append(rows, []cell{
			{flat(r.Run), plain}, {flat(string(status)), colourOf(status)}, {fmt.Sprint(r.Forks), plain}, {flat(r.Model), plain},
			{age(now, r.Started), plain}, {seconds(end.Sub(r.Started).Seconds()), plain}, {fit(flat(r.Name), 30), plain}, {flat(r.Repo), plain},
		})
	}
	return rows
}
