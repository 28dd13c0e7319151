package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/host"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/metrics"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/tracing"
)

// newWorker makes the "worker" command.
func (p *plugged) newWorker(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "worker",
		GroupID: groupService,
		Short:   "Serve the runs of a Temporal cluster on this host",
		Long: `Worker serves the task queue of the Temporal cluster that TEMPORAL_ADDRESS
names: it makes sandboxes on this host, runs agents in them and meters their
calls. Any number of workers can serve one queue. Each keeps a ledger of its own
unless SANDBOX_TEMPORAL_LEDGER_URL names a PostgreSQL database for all of them:
with one, the budget of a run holds whatever workers its forks are on. So it is
with what agents printed, unless SANDBOX_TEMPORAL_ARTIFACTS names a bucket or a
folder that all of them, and the commands of people, share.

Without TEMPORAL_ADDRESS the engine is the worker; see "up".` + exits(exitOK, exitFailed, exitUsage, exitDenied, exitUnreachable),
		Example:     `  TEMPORAL_ADDRESS=temporal.example.com:7233 sandbox-temporal worker`,
		Args:        args(),
		Annotations: settings(serviceFlags...),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.runWorker(cmd.Context(), env)
		},
	}
	addServiceFlags(cmd)
	return cmd
}

// unpricedFlag adds --allow-unpriced.
func unpricedFlag(cmd *cobra.Command) {
	cmd.Flags().Bool("allow-unpriced", false, "let models be called that have no price, and count each call at the dearest there is; a setting of the engine or worker")
}

// dayFlag adds --budget-per-day.
func dayFlag(cmd *cobra.Command) {
	cmd.Flags().String("budget-per-day", "none", "the most `USD` that all runs together may cost on one day, by UTC")
}

func (p *plugged) runWorker(ctx context.Context, env *Env) error {
	cfg, err := home(env.Globals.Config)
	if err != nil {
		return err
	}
	if cfg.Embedded() {
		return usage("Set TEMPORAL_ADDRESS to the cluster's host:port, or start the engine with: "+program+" up",
			"no Temporal cluster is named")
	}
	lock, err := endpoint.Acquire(cfg.Home) // two workers would fight over the ledger
	if err != nil {
		return err
	}
	defer lock.Release()
	log, secrets, done, err := p.logger(cfg)
	if err != nil {
		return err
	}
	defer done()
	vault, err := openVault(cfg.Home, p.env.Getenv)
	if err != nil {
		return err
	}
	secrets.hold(vault)
	if err := p.tryArtifacts(ctx, cfg, vault, log); err != nil {
		return err
	}
	reg := prometheus.NewRegistry()
	traces := p.startTraces(ctx, log, "worker")
	defer traces.Stop(traceFlush)
	c, err := p.dialTraced(ctx, cfg, "", log, "", traces, counted(reg))
	if err != nil {
		return err
	}
	defer c.Close()
	h, err := p.startHost(ctx, cfg, c, "", vault, reg, traces, log)
	if err != nil {
		return err
	}
	defer h.Stop()
	fmt.Fprintf(p.env.Stderr, "%s: worker serves %s in namespace %s\n", program, cfg.TaskQueue, cfg.Namespace)
	select {
	case <-ctx.Done():
		log.Info("Worker stops: it takes no more work, and agents run on")
		return nil
	case err := <-h.Failed():
		return err
	}
}

// tryArtifacts tries the artifact store: a worker whose forks could not keep
// what they did takes no work. One that is only away for a moment is waited
// for by who needs it.
func (p *plugged) tryArtifacts(ctx context.Context, cfg *config.Config, v *vault, log *slog.Logger) error {
	store, err := host.Artifacts(ctx, cfg.Home, cfg.Artifacts, storeKeys(cfg, v.secrets))
	if err != nil {
		return err
	}
	defer store.Close()
	err = store.Try(ctx)
	if fault.KindOf(err) == fault.Unavailable {
		log.Warn("The artifact store cannot be used yet", logs.Error, err)
		return nil
	}
	return err
}

// counted has Temporal's SDK count what it does. That it cannot is no reason
// not to work.
func counted(reg *prometheus.Registry) func(*client.Options) {
	return func(o *client.Options) {
		if handler, err := metrics.Temporal(reg); err == nil {
			o.MetricsHandler = handler
		}
	}
}

// startHost starts the worker's part of an engine, or of "worker".
func (p *plugged) startHost(ctx context.Context, cfg *config.Config, c client.Client, identity string, v *vault, reg *prometheus.Registry, t *tracing.Tracing, log *slog.Logger) (*host.Host, error) {
	if err := dumpNoCore(); err != nil {
		return nil, err
	}
	prices, err := loadPrices(cfg)
	if err != nil {
		return nil, err
	}
	port := cfg.MetricsPort
	if cfg.DisableMetrics {
		port = host.NoMetrics
	}
	return host.Start(ctx, host.Options{
		Temporal: c, Home: cfg.Home, Providers: p.providers(cfg, v.secrets, log), Prices: prices,
		ModelCredentials: func(context.Context) (gateway.Credentials, error) {
			s := v.secrets()
			return gateway.Credentials{APIKey: string(s.AnthropicKey), AuthToken: string(s.AnthropicAuthToken), BaseURL: s.AnthropicBaseURL,
				OpenAIKey: string(s.OpenAIKey), OpenAIBaseURL: s.OpenAIBaseURL}, nil
		},
		GitCredentials: func(context.Context) (repo.Credential, error) {
			s := v.secrets()
			return repo.Credential{Server: s.GitHubServer, Token: string(s.GitHubToken)}, nil
		},
		Program: p.program(cfg), Namespace: cfg.Namespace, Queue: cfg.TaskQueue, Identity: identity,
		AllowUnpriced: cfg.AllowUnpriced, LedgerURL: string(cfg.LedgerURL), Artifacts: cfg.Artifacts, ArtifactOptions: []artifact.Option{storeKeys(cfg, v.secrets)}, DayBudget: cfg.BudgetPerDay,
		GatewayURL: strings.TrimRight(cfg.GatewayURL, "/"), GatewayListen: gatewayListen(cfg), GatewayCert: cfg.GatewayCert, GatewayKey: cfg.GatewayKey,
		Deployment: cfg.Deployment, MetricsHost: cfg.MetricsHost, MetricsPort: port, Registry: reg, Version: p.env.Version, Tracer: t.Tracer(), Logger: log,
	})
}

// gatewayListen is where the gateway answers sandboxes on other hosts, or "".
func gatewayListen(cfg *config.Config) string {
	if cfg.GatewayListen == config.NoListener {
		return ""
	}
	return cfg.GatewayListen
}

// program finds the programs that sandboxes are lent.
func (p *plugged) program(cfg *config.Config) func(name string) (string, error) {
	return func(name string) (string, error) {
		var path string
		var err error
		switch {
		case name == "":
			return "", fault.New("", fault.NotFound, "no program is needed")
		case name == program:
			path, err = p.parts.Program()
		case name == "claude" && cfg.ClaudePath != "":
			path = cfg.ClaudePath
		default:
			path, err = exec.LookPath(name)
		}
		if err != nil {
			return "", fault.New("", fault.NotFound, "%w", err)
		}
		if path, err = filepath.Abs(path); err == nil {
			path, err = filepath.EvalSymlinks(path) // a link's target is not in the sandbox
		}
		if err == nil {
			path = native(name, path)
		}
		if err != nil {
			return "", fault.New("", fault.NotFound, "%w", err)
		}
		return path, nil
	}
}

// native returns the program that runs alone, when the one at path is a script
// that only starts it.
func native(name, path string) string {
	for _, a := range agent.All() {
		if a.Program().Name != name {
			continue
		}
		for _, pattern := range a.Program().Native {
			found, err := filepath.Glob(filepath.Join(filepath.Dir(path), pattern))
			if err == nil && len(found) > 0 {
				return found[0]
			}
		}
	}
	return path
}

// agentProgram names the program that the agent needs, or "".
func agentProgram(name string) string {
	a, err := agent.ByName(strings.TrimSpace(name))
	if err != nil {
		return ""
	}
	return a.Program().Name
}
