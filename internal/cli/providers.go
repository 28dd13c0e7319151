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
	Pauses    bool   `json:"pauses"`
	Terminals bool   `json:"terminals"`
	Ports     bool   `json:"ports"`
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
it; without it, every fork prepares its own. PAUSES is for "pause --freeze",
TERMINALS for a terminal of "attach", PORTS for "forward". ISOLATION is what to
write after --isolation, with --provider local or none, to have the sandboxes
made there:
` + explainTiers() + `.` + exits(exitOK, exitFailed, exitUsage),
		Example: "  sandbox-temporal providers",
		Args:    args(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	outputFlag(cmd, &opts.Output)
	cmd.AddCommand(newProvidersCheck(env))
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
		_, snaps := sandbox.As[sandbox.Freezer](p)
		_, pauses := sandbox.As[sandbox.Pauser](p)
		_, terminals := sandbox.As[sandbox.Terminaler](p)
		_, ports := sandbox.As[sandbox.PortDialer](p)
		list = append(list, providerInfo{name, bound, snaps, tierOf(name), pauses, terminals, ports})
	}
	if opts.Output == "json" {
		return writeJSON(env.Stdout, list)
	}
	var rows [][]cell
	for _, i := range list {
		row := []cell{{flat(i.Name), plain}, {"elsewhere", plain}}
		if i.HostBound {
			row[1].text = "worker's host"
		}
		for _, can := range []bool{i.Snapshots, i.Pauses, i.Terminals, i.Ports} {
			word := "no"
			if can {
				word = "yes"
			}
			row = append(row, cell{word, plain})
		}
		tier := i.Isolation
		if tier == "" {
			tier = "-"
		}
		rows = append(rows, append(row, cell{tier, plain}))
	}
	return writeTable(env.Stdout, env.paintFor(env.Stdout), []column{
		{"PROVIDER", false}, {"RUNS WHERE", false}, {"SNAPSHOTS", false}, {"PAUSES", false}, {"TERMINALS", false}, {"PORTS", false}, {"ISOLATION", false},
	}, rows)
}
