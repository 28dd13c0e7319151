package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
)

// checkTime bounds one check: it may wait for sandboxes to come and to go.
const checkTime = 10 * time.Minute

// newProvidersCheck makes the "providers check" command.
func newProvidersCheck(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "check PROVIDER",
		Short: "Try a provider's every promise, with real sandboxes",
		Long: `Check makes sandboxes with the provider, one after the other, tries in them what
every provider promises, and destroys them. At a provider that bills, that costs
some cents. It exits with 1 when a promise is broken.` + exits(exitOK, exitFailed, exitUsage, exitDenied),
		Example: "  E2B_API_KEY=e2b_… sandbox-temporal providers check e2b",
		Args:    args("PROVIDER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runProvidersCheck(cmd.Context(), env, args[0])
		},
	}
}

func runProvidersCheck(ctx context.Context, env *Env, name string) error {
	if env.Providers == nil {
		return missing("provider")
	}
	set, err := env.Providers(env.Globals)
	if err != nil {
		return err
	}
	p, err := set.Get(name)
	if err != nil {
		return err
	}
	if gated, ok := sandbox.As[sandbox.Gated](p); ok {
		if err := gated.Ready(ctx); err != nil {
			return err
		}
	}
	failed := 0
	for i, check := range conformance.Checks {
		begun := time.Now()
		limited, cancel := context.WithTimeout(ctx, checkTime)
		err := check.Run(limited, p, fmt.Sprintf("check-%x-%d", begun.UnixMilli(), i))
		cancel()
		if ctx.Err() != nil {
			return fault.New("check "+name, fault.Cancelled, "%w", context.Cause(ctx))
		}
		word, text := "ok", ""
		if err != nil {
			failed++
			word, text = "FAILED", ": "+flat(err.Error())
		}
		fmt.Fprintf(env.Stdout, "%-6s %s (%s)%s\n", word, check.Name, time.Since(begun).Round(time.Millisecond), text)
	}
	if failed > 0 {
		return fault.New("check "+name, fault.Internal, "%d of %d promises are broken", failed, len(conformance.Checks))
	}
	return nil
}
