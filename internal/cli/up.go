package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// upOptions are what a command line of "up" comes to.
type upOptions struct {
	Flags  []string // of settings, for the detached engine
	Detach bool
	Child  bool // hidden: this is the detached engine itself
}

// newUp makes the "up" command.
func (p *plugged) newUp(env *Env) *cobra.Command {
	var o upOptions
	own := append([]string{"port", "ui-port"}, serviceFlags...)
	cmd := &cobra.Command{
		Use:     "up",
		GroupID: groupService,
		Short:   "Start the engine: Temporal, web page, worker and gateway",
		Long: `Up starts the engine of this host: a Temporal server with its web page, a
worker, the gateway to the model and the metrics, all in one process with its
state in one folder. Commands start it by themselves when they need it.

It can be killed at any moment: the next command starts it again, and every run
goes on where it was.` + exits(exitOK, exitFailed, exitUsage, exitDenied),
		Example: `  sandbox-temporal up --detach
  sandbox-temporal up --port 0 --ui-port 0 --metrics-port 0`,
		Args:        args(),
		Annotations: settings(own...),
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, name := range own {
				if f := cmd.Flags().Lookup(name); f.Changed {
					o.Flags = append(o.Flags, "--"+name+"="+f.Value.String())
				}
			}
			return p.runUp(cmd.Context(), env, o)
		},
	}
	fs := cmd.Flags()
	fs.Int("port", 7233, "the `PORT` of Temporal's gRPC; 0: any free one")
	fs.Int("ui-port", 8080, "the `PORT` of the web page; 0: any free one")
	addServiceFlags(cmd)
	fs.BoolVar(&o.Detach, "detach", false, "start it in the background and return when it is ready")
	fs.BoolVar(&o.Child, "detached", false, "")
	_ = fs.MarkHidden("detached")
	return cmd
}

func (p *plugged) runUp(ctx context.Context, env *Env, o upOptions) error {
	cfg, err := home(env.Globals.Config)
	if err != nil {
		return err
	}
	if o.Detach {
		ep, started, err := p.startEngine(ctx, cfg, o.Flags)
		if err != nil {
			return err
		}
		word := "the engine runs already"
		if started {
			word = "the engine is ready"
		}
		fmt.Fprintf(p.env.Stderr, "%s: %s (%s)\n", program, word, whereabouts(ep))
		p.tellLacks(ep)
		return nil
	}
	if err := p.parts.BecomeEngine(); err != nil {
		return err
	}
	log, secrets, done, err := p.logger(cfg)
	if err != nil {
		return err
	}
	defer done()
	return p.serveEngine(ctx, cfg, log, secrets, func(ep endpoint.Endpoint) {
		if !o.Child {
			fmt.Fprintf(p.env.Stderr, "%s: the engine is ready (%s); Ctrl-C stops it\n", program, whereabouts(ep))
		}
	})
}

// serveEngine is the engine: server, then worker, then the control socket
// that says it is ready. It ends when ctx does, or "down" asks it to.
func (p *plugged) serveEngine(ctx context.Context, cfg *config.Config, log *slog.Logger, secrets *keeper, ready func(endpoint.Endpoint)) (err error) {
	lock, err := endpoint.Acquire(cfg.Home)
	if err != nil {
		return err
	}
	defer lock.Release()
	// Who was the engine before us is dead: we have its lock.
	dead, err := endpoint.Read(cfg.Home)
	if err != nil && fault.KindOf(err) != fault.NotFound && fault.KindOf(err) != fault.Invalid {
		return err
	}
	vault, err := openVault(cfg.Home, p.env.Getenv)
	if err != nil {
		return err
	}
	secrets.hold(vault)
	srv, err := p.parts.StartServer(ctx, ServerOptions{
		Dir: cfg.Home, Lock: lock, Port: cfg.Port, UIPort: cfg.UIPort, Namespace: cfg.Namespace,
		SearchAttributes: orchestrator.SearchAttributes(), Logger: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, srv.Stop()) }()

	identity := "engine-" + uuid.NewString()
	reg := prometheus.NewRegistry()
	traces := p.startTraces(ctx, log, "engine")
	defer traces.Stop(traceFlush)
	c, err := p.dialTraced(ctx, cfg, srv.Address(), log, identity, traces, counted(reg))
	if err != nil {
		return err
	}
	defer c.Close()
	if dead.Identity != "" {
		// Before our own worker polls: what it takes is not the dead one's.
		if n, err := p.parts.Sweep(ctx, c, cfg.Namespace, dead.Identity, log); err != nil {
			log.Warn("Some activities of the engine before this one wait for their time-out", logs.Error, err)
		} else if n > 0 {
			log.Info("Took over the activities of the engine before this one", logs.Activities, n)
		}
	}
	h, err := p.startHost(ctx, cfg, c, identity, vault, reg, traces, log)
	if err != nil {
		return err
	}
	defer h.Stop()
	ln, err := lock.Listen()
	if err != nil {
		return err
	}
	ep := endpoint.Endpoint{Address: srv.Address(), UI: srv.UIAddress(), Identity: identity, Version: p.env.Version}
	if ep.Metrics, err = h.MetricsURL(); err != nil {
		ep.Lacks = append(ep.Lacks, fmt.Sprintf("%v. %s", err, fault.HintOf(err)))
	}
	if err := endpoint.Write(cfg.Home, ep); err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		select {
		case err := <-srv.Failed():
			stop(err)
		case err := <-h.Failed():
			stop(err)
		case <-ctx.Done():
		}
	}()
	ready(ep)
	err = endpoint.Serve(ctx, ln, endpoint.Control{
		Stop:       func() { stop(nil) },
		SetSecrets: func(_ context.Context, b []byte) error { return vault.add(b) },
		Status:     func() any { return ep },
	})
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return err
}

// stopTime bounds how long "down" waits.
const stopTime = 30 * time.Second

// newDown makes the "down" command.
func (p *plugged) newDown(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:     "down",
		GroupID: groupService,
		Short:   "Stop the engine",
		Long: `Down stops the engine of this host. Runs are not lost: they go on when an
engine is started again, and their agents keep working for as long as they can
do without the model.` + exits(exitOK, exitFailed, exitUsage, exitDenied),
		Example: `  sandbox-temporal down`,
		Args:    args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg := env.Globals.Config
			ctx, cancel := context.WithTimeout(cmd.Context(), stopTime)
			defer cancel()
			open := p.openRuns(ctx, cfg)
			err := endpoint.Dial(cfg.Home).Stop(ctx)
			if fault.KindOf(err) == fault.NotFound {
				fmt.Fprintf(p.env.Stderr, "%s: no engine runs in %s\n", program, cfg.Home)
				return nil
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(p.env.Stderr, "%s: the engine has stopped\n", program)
			if open > 0 {
				fmt.Fprintf(p.env.Stderr, "%d unfinished run(s) go on when it is started again.\n", open)
			}
			return nil
		},
	}
}

// openRuns counts the runs that have not ended; 0 when nobody can tell.
func (p *plugged) openRuns(ctx context.Context, cfg *config.Config) int {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	ep, err := endpoint.Read(cfg.Home)
	if err != nil || !ep.Alive() {
		return 0
	}
	c, err := p.dial(ctx, cfg, ep.Address, slog.New(slog.DiscardHandler), "")
	if err != nil {
		return 0
	}
	runs := &orchestrator.Client{Temporal: c, Namespace: cfg.Namespace, Attributes: true}
	defer runs.Close()
	list, _ := runs.List(ctx, 100, "")
	n := 0
	for _, r := range list {
		if r.Closed == nil {
			n++
		}
	}
	return n
}
