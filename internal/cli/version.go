package cli

import (
	"context"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

type versionOptions struct{ Output string }

// newVersion makes the "version" command.
func newVersion(env *Env, run func(context.Context, *Env, versionOptions) error) *cobra.Command {
	if run == nil {
		run = runVersion
	}
	var opts versionOptions
	cmd := &cobra.Command{
		Use:         "version",
		Short:       "Print the program's version",
		Long:        "Version prints the program's version, and what it was built with and for." + exits(exitOK, exitUsage),
		Example:     "  sandbox-temporal version",
		Annotations: settings(noSettings),
		Args:        args(),
		RunE:        func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runVersion(_ context.Context, env *Env, opts versionOptions) error {
	if opts.Output == "json" {
		return writeJSON(env.Stdout, struct {
			Version  string `json:"version"`
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{env.Version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH})
	}
	_, err := fmt.Fprintf(env.Stdout, "%s %s (%s, %s/%s)\n", program, env.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
