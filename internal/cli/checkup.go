package cli

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A checkup gathers what doctor finds.
type checkup struct{ all []Finding }

func (c *checkup) add(name string, err error, good string) {
	if err != nil {
		c.all = append(c.all, Finding{Name: name, Health: Bad, Text: err.Error(), Hint: fault.HintOf(err)})
		return
	}
	c.all = append(c.all, Finding{Name: name, Health: Good, Text: good})
}

// poor adds what makes some runs fail, or be slower or less safe.
func (c *checkup) poor(name, text, hint string) {
	c.all = append(c.all, Finding{Name: name, Health: Poor, Text: text, Hint: hint})
}

// doctor looks for what would make a run fail on this host.
func (p *plugged) doctor(ctx context.Context, g Globals) []Finding {
	cfg := g.Config
	var c checkup
	_, err := home(cfg)
	c.add("state folder", err, cfg.Home)
	if err == nil {
		c.room(cfg)
	}
	if p.parts.CheckHost != nil && err == nil {
		c.all = append(c.all, p.parts.CheckHost(ctx, sandboxDir(cfg))...)
	}
	if p.parts.Providers != nil {
		c.all = append(c.all, checkTiers(p.providers(cfg, p.secrets(cfg), slog.New(slog.DiscardHandler))))
	}
	c.programs(cfg, p.program(cfg))
	c.credentials(ctx, cfg, p.env.Getenv)
	_, err = loadPrices(cfg)
	c.add("prices", err, "can be read")
	c.ledger(ctx, cfg, p.books)
	c.artifacts(ctx, cfg, p.secrets(cfg))
	c.logFile(cfg)
	if cfg.Embedded() {
		p.checkEngine(ctx, &c, cfg)
	} else {
		p.checkCluster(ctx, &c, cfg)
	}
	return c.all
}

// checkCluster asks the cluster, and whether anybody serves its queue.
func (p *plugged) checkCluster(ctx context.Context, c *checkup, cfg *config.Config) {
	conn, err := p.dial(ctx, cfg, "", slog.New(slog.DiscardHandler), "")
	c.add("Temporal", err, fmt.Sprintf("answers, namespace %s", cfg.Namespace))
	if err != nil {
		return
	}
	defer conn.Close()
	const name = "workers"
	n, err := pollers(ctx, conn, cfg.TaskQueue)
	switch {
	case err != nil:
		c.poor(name, fmt.Sprintf("cannot be asked for: %v", err), "Let this user describe task queues.")
	case n == 0:
		c.poor(name, fmt.Sprintf("nobody serves the task queue %s", cfg.TaskQueue), "Start one with: "+program+" worker")
		c.metricsPort(ctx, cfg)
	default:
		c.add(name, nil, fmt.Sprintf("%d wait(s) for work on the task queue %s", n, cfg.TaskQueue))
	}
}

// checkEngine asks the engine, or whether one could be started.
func (p *plugged) checkEngine(ctx context.Context, c *checkup, cfg *config.Config) {
	const name = "engine"
	if ep, err := endpoint.Read(cfg.Home); err == nil && ep.Alive() {
		c.add(name, endpoint.Dial(cfg.Home).Ping(ctx, nil), whereabouts(ep))
		c.ready(ctx, cfg, ep)
		return
	}
	c.add(name, nil, "not running; the next command that needs it starts it")
	c.port(ctx, "port", "127.0.0.1", cfg.Port, "--port or SANDBOX_TEMPORAL_PORT")
	c.port(ctx, "UI port", "127.0.0.1", cfg.UIPort, "--ui-port or SANDBOX_TEMPORAL_UI_PORT")
	c.metricsPort(ctx, cfg)
}
