package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

type providersOptions struct{ Output string }

// providerInfo is one line of "providers".
type providerInfo struct {
	Name      string `json:"name"`
	HostBound bool   `json:"host_bound"`
	Snapshots bool   `json:"snapshots"`
	Isolation string `json:"isolation,omitempty"` // the tier that it is
}

// newProviders makes the "providers" command.
func newProviders(env *Env, run func(context.Context, *Env, providersOptions) error) *cobra.Command {
	if run == nil {
		run = runProviders
	}
	var opts providersOptions
	cmd := &cobra.Command{
		Use:     "providers",
		GroupID: groupService,
		Short:   "List the places where sandboxes can be made",
		Long: `Providers lists the words that --provider takes and what each provider can do.

RUNS WHERE says whether the sandboxes live on the worker's own host. SNAPSHOTS
says whether a prepared repository is frozen once and every fork started from
it; without it, every fork prepares its own. ISOLATION is what to write after
--isolation, with --provider local or none, to have the sandboxes made there:
` + explainTiers() + `.` + exits(exitOK, exitFailed, exitUsage),
		Example: "  sandbox-temporal providers",
		Args:    args(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runProviders(_ context.Context, env *Env, opts providersOptions) error {
	if env.Providers == nil {
		return missing("provider")
	}
	set, err := env.Providers(env.Globals)
	if err != nil {
		return err
	}
	list := []providerInfo{}
	for _, name := range set.Names() {
		p := set[name]
		_, bound := sandbox.As[sandbox.HostBound](p)
		_, snaps := sandbox.As[sandbox.Snapshotter](p)
		list = append(list, providerInfo{name, bound, snaps, tierOf(name)})
	}
	if opts.Output == "json" {
		return writeJSON(env.Stdout, list)
	}
	var rows [][]cell
	for _, i := range list {
		where, snaps := "elsewhere", "no"
		if i.HostBound {
			where = "worker's host"
		}
		if i.Snapshots {
			snaps = "yes"
		}
		tier := i.Isolation
		if tier == "" {
			tier = "-"
		}
		rows = append(rows, []cell{{flat(i.Name), plain}, {where, plain}, {snaps, plain}, {tier, plain}})
	}
	return writeTable(env.Stdout, env.paintFor(env.Stdout), []column{{"PROVIDER", false}, {"RUNS WHERE", false}, {"SNAPSHOTS", false}, {"ISOLATION", false}}, rows)
}
