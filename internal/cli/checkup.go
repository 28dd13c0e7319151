package cli

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// doctor looks for what would make a run fail on this host.
func (p *plugged) doctor(ctx context.Context, g Globals) []Finding {
	cfg := g.Config
	var all []Finding
	add := func(name string, err error, good string) {
		if err != nil {
			all = append(all, Finding{Name: name, Health: Bad, Text: err.Error(), Hint: fault.HintOf(err)})
			return
		}
		all = append(all, Finding{Name: name, Health: Good, Text: good})
	}
	_, err := home(cfg)
	add("state folder", err, cfg.Home)
	if p.parts.CheckHost != nil && err == nil {
		all = append(all, p.parts.CheckHost(ctx, sandboxDir(cfg))...)
	}
	if p.parts.Providers != nil {
		all = append(all, checkTiers(p.providers(cfg, p.secrets(cfg), slog.New(slog.DiscardHandler))))
	}
	if path, err := p.program(cfg)("claude"); err != nil {
		all = append(all, Finding{Name: "claude", Health: Poor, Text: "Claude Code is not on PATH",
			Hint: "Install it with: npm install -g @anthropic-ai/claude-code; or use --agent mini."})
	} else {
		add("claude", nil, path)
	}
	secrets, err := config.ReadSecrets(p.env.Getenv)
	switch {
	case err != nil:
		add("model key", err, "")
	case secrets.AnthropicKey == "" && secrets.AnthropicAuthToken == "":
		all = append(all, Finding{Name: "model key", Health: Poor, Text: "neither ANTHROPIC_API_KEY nor ANTHROPIC_AUTH_TOKEN is set",
			Hint: "Set one of them; the engine also keeps the one that an earlier fork command gave it."})
	default:
		add("model key", nil, "set")
	}
	if !cfg.Embedded() {
		c, err := p.dial(ctx, cfg, "", slog.New(slog.DiscardHandler), "")
		if err == nil {
			c.Close()
		}
		add("Temporal", err, fmt.Sprintf("answers, namespace %s", cfg.Namespace))
		return all
	}
	if ep, err := endpoint.Read(cfg.Home); err == nil && ep.Alive() {
		add("engine", endpoint.Dial(cfg.Home).Ping(ctx, nil), whereabouts(ep))
	} else {
		add("engine", nil, "not running; the next command that needs it starts it")
	}
	return all
}
