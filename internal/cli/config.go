package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

// newConfig makes the "config" command.
func newConfig(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "config",
		GroupID: groupService,
		Short:   "Look at the configuration",
		Long:    "Config has commands that look at the configuration." + exits(exitOK, exitUsage),
		Example: "  sandbox-temporal config explain",
		Args:    cobra.ArbitraryArgs,
		RunE:    onlyCommands,
	}
	cmd.AddCommand(newConfigExplain(env, nil))
	return cmd
}

type explainOptions struct{ Output string }

// newConfigExplain makes the "config explain" command.
func newConfigExplain(env *Env, run func(context.Context, *Env, explainOptions) error) *cobra.Command {
	if run == nil {
		run = runConfigExplain
	}
	var opts explainOptions
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Show every setting and where it came from",
		Long: `Explain shows every setting that is in force and where it came from: a flag
counts more than the environment, the environment more than the configuration
file, the file more than the defaults. Keys and tokens are not settings and are
not shown.` + exits(exitOK, exitFailed, exitUsage),
		Example: "  sandbox-temporal config explain",
		Args:    args(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runConfigExplain(_ context.Context, env *Env, opts explainOptions) error {
	all := env.Globals.Config.Explain()
	if opts.Output == "json" {
		type setting struct {
			Key    string `json:"key"`
			Value  string `json:"value"`
			Source string `json:"source"`
		}
		list := []setting{}
		for _, s := range all {
			list = append(list, setting(s))
		}
		return writeJSON(env.Stdout, list)
	}
	if f := env.Globals.Config.File; f != "" {
		fmt.Fprintf(env.Stderr, "file: %s\n", flat(f))
	}
	var rows [][]cell
	for _, s := range all {
		colour := plain
		if s.Source == "default" {
			colour = dim
		}
		rows = append(rows, []cell{{flat(s.Key), colour}, {fit(flat(s.Value), 60), colour}, {flat(s.Source), colour}})
	}
	return writeTable(env.Stdout, env.paintFor(env.Stdout), []column{{"SETTING", false}, {"VALUE", false}, {"FROM", false}}, rows)
}
