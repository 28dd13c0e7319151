package cli

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// newNamespace makes the "namespace" command and what lies below it.
func (p *plugged) newNamespace(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "namespace",
		GroupID: groupService,
		Short:   "Make a Temporal cluster ready for runs",
		Long:    "Namespace looks after the namespace of a cluster that runs live in. The engine\nhas one of its own, and needs none of this." + exits(exitOK, exitUsage),
		Example: "  sandbox-temporal namespace create",
		Args:    args(),
		RunE:    onlyCommands,
	}
	cmd.AddCommand(p.newNamespaceCreate(env))
	return cmd
}

// setUpTime bounds "namespace create": a new cluster knows a namespace after
// some ten seconds.
const setUpTime = time.Minute

func (p *plugged) newNamespaceCreate(env *Env) *cobra.Command {
	days := 0
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Make the namespace and its search attributes",
		Long: `Create makes the namespace of --namespace in the cluster of TEMPORAL_ADDRESS,
and the search attributes by which "list --query" and Temporal's web page filter
runs:
  ` + strings.Join(attributeNames(), "\n  ") + `
What is there already stays as it is.` + exits(exitOK, exitFailed, exitUsage, exitDenied, exitUnreachable),
		Example: "  export TEMPORAL_ADDRESS=temporal.example.com:7233\n  sandbox-temporal namespace create --retention 30",
		Args:    args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if days < 1 || days > 3650 {
				return usage("Use --retention 1 to 3650, in days.", "--retention %d", days)
			}
			return p.runNamespaceCreate(cmd.Context(), env, time.Duration(days)*24*time.Hour)
		},
	}
	cmd.Flags().Var(newNumber(&days, 30), "retention", "`DAYS` that the cluster remembers a run that has ended")
	return cmd
}

func attributeNames() []string {
	var names []string
	for name := range orchestrator.SearchAttributes() {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (p *plugged) runNamespaceCreate(ctx context.Context, env *Env, retention time.Duration) error {
	cfg := env.Globals.Config
	if cfg.Embedded() {
		return usage("Set TEMPORAL_ADDRESS to the cluster's host:port.", "no Temporal cluster is named, and the engine's namespace is there")
	}
	c, err := p.dial(ctx, cfg, "", slog.New(slog.DiscardHandler), "")
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, setUpTime)
	defer cancel()
	made, added, err := orchestrator.SetUpNamespace(ctx, c, cfg.Namespace, retention)
	if err != nil {
		return err
	}
	what := "was there already"
	if made {
		what = "is made"
	}
	attributes := "it has its search attributes"
	if len(added) > 0 {
		slices.Sort(added)
		attributes = "search attributes added: " + strings.Join(added, ", ")
	}
	_, err = fmt.Fprintf(env.Stdout, "Namespace %s %s; %s.\n", flat(cfg.Namespace), what, attributes)
	return err
}
