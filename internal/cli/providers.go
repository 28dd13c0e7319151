package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

type providersOptions struct{ Output string }

// providerInfo is what "providers -o json" says of one. The fields that say
// yes or no by themselves are older than Capabilities and stay.
type providerInfo struct {
	Name         string          `json:"name"`
	HostBound    bool            `json:"host_bound"`
	Snapshots    bool            `json:"snapshots"`           // "freeze", of the capabilities
	Isolation    string          `json:"isolation,omitempty"` // the tier that it is
	Pauses       bool            `json:"pauses"`
	Terminals    bool            `json:"terminals"`
	Ports        bool            `json:"ports"`
	Capabilities map[string]bool `json:"capabilities"` // by sandbox.Capability.Name: all of them
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
		Long: `Providers lists the words that --provider takes and what each provider can do,
as the code itself says: a column for each provider, a line for each capability.
ISOLATION is what to write after --isolation, with --provider local or none, to
have the sandboxes made there:
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
	list := describeProviders(set)
	if opts.Output == "json" {
		return writeJSON(env.Stdout, list)
	}
	columns := []column{{"CAPABILITY", false}}
	for _, i := range list {
		columns = append(columns, column{flat(i.Name), false})
	}
	columns = append(columns, column{"", false})
	var rows [][]cell
	for _, line := range providerTable(list) {
		var row []cell
		for _, text := range line {
			row = append(row, cell{strings.ReplaceAll(text, "`", ""), plain})
		}
		rows = append(rows, row)
	}
	return writeTable(env.Stdout, env.paintFor(env.Stdout), columns, rows)
}

func describeProviders(set sandbox.Set) []providerInfo {
	list := []providerInfo{}
	for _, name := range set.Names() {
		can := map[string]bool{}
		for _, c := range sandbox.Capabilities() {
			can[c.Name] = c.Has(set[name])
		}
		list = append(list, providerInfo{
			Name: name, HostBound: can["host_bound"], Snapshots: can["freeze"], Isolation: tierOf(name),
			Pauses: can["pause"], Terminals: can["terminal"], Ports: can["ports"], Capabilities: can,
		})
	}
	return list
}

// providerTable is a line for each capability: its name, one word for each
// provider, and what it is good for. The last line has the tiers.
func providerTable(list []providerInfo) [][]string {
	var lines [][]string
	for _, c := range sandbox.Capabilities() {
		line := []string{strings.ReplaceAll(c.Name, "_", " ")}
		for _, i := range list {
			word := "no"
			if i.Capabilities[c.Name] {
				word = "yes"
			}
			line = append(line, word)
		}
		lines = append(lines, append(line, c.Text))
	}
	last := []string{"isolation"}
	for _, i := range list {
		tier := i.Isolation
		if tier == "" {
			tier = "-"
		}
		last = append(last, tier)
	}
	return append(lines, append(last, "what to write after `--isolation`"))
}

// ProvidersMarkdown returns the table that "providers" prints, as README shows
// it.
func ProvidersMarkdown(set sandbox.Set) string {
	list := describeProviders(set)
	head := []string{"capability"}
	for _, i := range list {
		head = append(head, "`"+i.Name+"`")
	}
	var b strings.Builder
	for _, line := range append([][]string{append(head, "what it is for"), slices.Repeat([]string{"---"}, len(head)+1)}, providerTable(list)...) {
		b.WriteString("| " + strings.Join(line, " | ") + " |\n")
	}
	return b.String()
}
