package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/demo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// demoOptions are what a command line of "demo" comes to.
type demoOptions struct {
	Forks  int
	Agent  string
	Budget fork.USD
	Keep   bool
}

// newDemo makes the "demo" command.
func (p *plugged) newDemo(env *Env) *cobra.Command {
	var o demoOptions
	var budget string
	cmd := &cobra.Command{
		Use:     "demo",
		GroupID: groupService,
		Short:   "See it work without an account, on a scripted model",
		Long: `Demo gives a small Go repository with a failing test to three agents. Engine,
sandboxes, budget, git and the agents are the real ones; the model that answers
them is a script, so it costs nothing and needs no account and no network.

The agent is Claude Code when it is installed, else the built-in one. The
sandboxes see the Go of this host and, read-only, its build cache. The
repository stays for you to look at; everything else is removed.` + exits(ofRuns...),
		Example: `  sandbox-temporal demo
  sandbox-temporal demo --agent mini --forks 5`,
		Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Budget, err = fork.ParseUSD(budget); err != nil || o.Budget == 0 {
				return usage("Use --budget with an amount above 0, as --budget 0.50.", "--budget %q", budget)
			}
			return p.runDemo(cmd.Context(), env, o)
		},
	}
	fs := cmd.Flags()
	fs.VarP(newNumber(&o.Forks, 3), "forks", "f", "how many agents get the task")
	fs.StringVar(&o.Agent, "agent", "", "who does the work: claude or mini (default: claude when it is installed)")
	fs.StringVar(&budget, "budget", "1", "the budget of the run, in (imagined) `USD`")
	fs.BoolVar(&o.Keep, "keep", false, "keep the engine's state folder too")
	return cmd
}

const demoModel = "sonnet"

func (p *plugged) runDemo(ctx context.Context, outer *Env, o demoOptions) error {
	if err := p.parts.BecomeEngine(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "sandbox-temporal-demo-")
	if err != nil {
		return fault.New("demo", fault.Denied, "%w", err).Hinted("Set TMPDIR to a folder that can be written.")
	}
	repo, state := filepath.Join(dir, "repo"), filepath.Join(dir, "state")
	if err := demo.WriteRepo(ctx, repo); err != nil {
		return fault.Wrap("demo", err)
	}
	if !o.Keep {
		defer os.RemoveAll(state)
	}

	model := standin.New(standin.Options{Scripts: demo.Scripts()})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fault.New("demo", fault.Internal, "%w", err)
	}
	srv := &http.Server{Handler: model, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()

	// Everything below runs as it would for a user whose state folder, model
	// and key are these.
	inner := *p
	env := *outer
	env.Getenv = overlay(outer.Getenv, map[string]string{
		"SANDBOX_TEMPORAL_HOME": state, "SANDBOX_TEMPORAL_PORT": "0", "SANDBOX_TEMPORAL_UI_PORT": "0", "METRICS_PORT": "0",
		"SANDBOX_TEMPORAL_CONFIG": "", "SANDBOX_TEMPORAL_ARTIFACTS": "", "SANDBOX_TEMPORAL_LEDGER_URL": "", "TEMPORAL_ADDRESS": "", "TEMPORAL_PROFILE": "", "XDG_CONFIG_HOME": dir,
		"ANTHROPIC_BASE_URL": "http://" + ln.Addr().String(), "ANTHROPIC_API_KEY": "demo-key", "ANTHROPIC_AUTH_TOKEN": "", "OPENAI_API_KEY": "", "GITHUB_TOKEN": "", "E2B_API_KEY": "",
	})
	inner.env = &env
	env.Runs, env.BeforeStart, env.Artifacts, env.Work = inner.runs, inner.beforeStart, inner.artifacts, inner.work
	cfg, err := config.Load(env.Getenv)
	if err != nil {
		return err
	}
	env.Globals = Globals{Config: cfg, Color: outer.Globals.Color, NoStart: true}
	if o.Agent == "" {
		o.Agent = "mini"
		if _, err := inner.program(cfg)("claude"); err == nil {
			o.Agent = "claude"
		}
	}
	fmt.Fprintf(env.Stderr, "The model of this demo is a script: no account, no cost, no network. All else is real:\nengine, sandboxes, the agent (%s), budget, git. The repository: %s\n\n", o.Agent, repo)

	mounts, compiled, err := toolchain(ctx, repo)
	if err != nil {
		return err
	}
	setup := ""
	if !compiled {
		setup = demo.Setup // what it compiles, the forks find compiled
	}
	// An interrupt ends the run first, and the engine after it.
	engine, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ready := make(chan endpoint.Endpoint, 1)
	ended := make(chan error, 1)
	go func() {
		err := endpoint.Prepare(state)
		if err == nil {
			err = inner.serveEngine(engine, cfg, slog.New(slog.DiscardHandler), &keeper{}, func(ep endpoint.Endpoint) { ready <- ep })
		}
		ended <- err
	}()
	select {
	case <-ready:
	case err := <-ended:
		return fault.Wrap("start the engine", err)
	}

	err = runFork(ctx, &env, forkOptions{Wait: true, Output: "table", Plan: fork.Plan{
		Repo: repo, Prompt: demo.Prompt, Name: "demo", Forks: o.Forks, Model: demoModel, MaxConcurrent: 3, Timeout: 10 * time.Minute,
		Budget: o.Budget, Provider: "local", Agent: o.Agent, Mounts: mounts,
		Setup: setup, Verify: demo.Verify,
	}})
	if e := endRuns(engine, &env); err == nil {
		err = e
	}
	stop()
	if e := <-ended; err == nil {
		err = e
	}
	fmt.Fprintf(env.Stderr, "\nThe model was scripted; the branches are real. Look at them, and remove them when done:\n  git -C %s log --oneline --all --graph\n  rm -r %s\n", repo, dir)
	return err
}

// endRuns cancels the run that the user did not wait for: its engine is about
// to go, and a demo leaves no agent behind.
func endRuns(ctx context.Context, env *Env) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	defer runs.Close()
	list, err := runs.List(ctx, 1, "")
	for _, r := range list {
		if r.Closed == nil {
			fmt.Fprintln(env.Stderr, "The demo ends here: its agents are stopped.")
			_, err = runs.Cancel(ctx, r.Run)
		}
	}
	return err
}

// overlay is getenv with some variables replaced.
func overlay(getenv func(string) string, vars map[string]string) func(string) string {
	return func(name string) string {
		if v, ok := vars[name]; ok {
			return v
		}
		return getenv(name)
	}
}
