package cli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/contrib/envconfig"
	sdklog "go.temporal.io/sdk/log"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/payload"
	"github.com/sandbox-temporal/sandbox-temporal/internal/tracing"
)

// dialTime bounds how long a command waits for a cluster's first answer.
const dialTime = 10 * time.Second

// runs connects to the cluster that was named, or to the engine of the state
// folder, which it starts when it does not run.
func (p *plugged) runs(ctx context.Context, g Globals) (Runs, error) {
	cfg := g.Config
	address := ""
	if cfg.Embedded() {
		ep, err := p.engine(ctx, cfg, g.NoStart)
		if err != nil {
			return nil, err
		}
		address = ep.Address
	}
	c, err := p.dial(ctx, cfg, address, slog.New(slog.DiscardHandler), "")
	if err != nil {
		return nil, err
	}
	keys, err := p.keys()
	if err != nil {
		return nil, err
	}
	return &orchestrator.Client{
		Temporal: c, Namespace: cfg.Namespace, Queue: cfg.TaskQueue, Attributes: cfg.Embedded(), Converter: keys.Converter(), Sealed: keys != nil,
	}, nil
}

// dial connects to Temporal: to the engine at address or, when that is empty,
// to where the environment and Temporal's own configuration file point. more
// change what it is connected with.
func (p *plugged) dial(ctx context.Context, cfg *config.Config, address string, log *slog.Logger, identity string, more ...func(*client.Options)) (client.Client, error) {
	return p.dialTraced(ctx, cfg, address, log, identity, p.traces, more...)
}

// dialTraced is dial with the traces of a worker.
func (p *plugged) dialTraced(ctx context.Context, cfg *config.Config, address string, log *slog.Logger, identity string, t *tracing.Tracing, more ...func(*client.Options)) (client.Client, error) {
	o := client.Options{HostPort: address}
	if address == "" {
		var err error
		if o, err = p.clusterOptions(cfg); err != nil {
			return nil, err
		}
	}
	var err error
	if o.Interceptors, err = t.Interceptors(); err != nil {
		return nil, err
	}
	keys, err := p.keys()
	if err != nil {
		return nil, err
	}
	o.DataConverter, o.FailureConverter = keys.Converter(), keys.FailureConverter()
	o.Namespace, o.Logger, o.Identity = cfg.Namespace, sdklog.NewStructuredLogger(log), identity
	for _, set := range more {
		set(&o)
	}
	o.ConnectionOptions.GetSystemInfoTimeout = dialTime // else the SDK waits for its own 5 s
	dialCtx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	c, err := client.DialContext(dialCtx, o)
	if err == nil {
		return c, nil
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, ctx.Err() // that says nothing of Temporal
	}
	if err = orchestrator.Fault(err); fault.KindOf(err) == fault.Internal {
		err = &fault.Error{Kind: fault.Unreachable, Err: err}
	}
	if fault.KindOf(err) == fault.Unreachable && address == "" {
		if why := whyNot(dialCtx, o.HostPort, o.ConnectionOptions.TLS); why != nil {
			return nil, why
		}
	}
	if fault.KindOf(err) == fault.Unreachable {
		return nil, fault.New("", fault.Unreachable, "Temporal does not answer at %s: %w", o.HostPort, err).
			Hinted("Check TEMPORAL_ADDRESS (or --address), or leave it out to use the engine on this host.")
	}
	return nil, fault.Wrap("connect to Temporal at "+o.HostPort, err)
}

// clusterOptions reads Temporal's own environment and configuration file, and
// the names of this program for the client certificate.
func (p *plugged) clusterOptions(cfg *config.Config) (client.Options, error) {
	const op = "connect to Temporal"
	o, err := envconfig.LoadClientOptions(envconfig.LoadClientOptionsRequest{
		ConfigFileProfile: cfg.TemporalProfile, EnvLookup: lookup{p.env.Getenv},
	})
	if err != nil {
		return o, fault.New(op, fault.Invalid, "%w", err).Hinted("Check the TEMPORAL_ variables and Temporal's configuration file.")
	}
	if cfg.TemporalAddress != "" {
		o.HostPort = cfg.TemporalAddress
	}
	cert, key := p.env.Getenv("TEMPORAL_TLS_CERT"), p.env.Getenv("TEMPORAL_TLS_KEY")
	switch {
	case cert == "" && key == "":
	case cert == "" || key == "":
		return o, fault.New(op, fault.Invalid, "only one of TEMPORAL_TLS_CERT and TEMPORAL_TLS_KEY is set").Hinted("Set both or neither.")
	default:
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return o, fault.New(op, fault.Invalid, "TEMPORAL_TLS_CERT, TEMPORAL_TLS_KEY: %w", err).Hinted("Name a certificate and its key, both in PEM.")
		}
		if o.ConnectionOptions.TLS == nil {
			o.ConnectionOptions.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		o.ConnectionOptions.TLS.Certificates = []tls.Certificate{pair}
	}
	if err := p.trust(&o); err != nil {
		return o, err
	}
	return o, current(o.ConnectionOptions.TLS)
}

// keys are what payloads are sealed with; nil: they are not.
func (p *plugged) keys() (*payload.Keys, error) { return payload.Parse(p.env.Getenv(payload.Variable)) }

// lookup lets envconfig see the environment that the command was given.
type lookup struct{ getenv func(string) string }

func (l lookup) Environ() []string { return nil }

func (l lookup) LookupEnv(name string) (string, bool) {
	v := l.getenv(name)
	return v, v != ""
}

// engine finds the engine of the state folder and starts it when it does not
// run. Of two commands that come at once, one starts it and both use it.
func (p *plugged) engine(ctx context.Context, cfg *config.Config, noStart bool) (endpoint.Endpoint, error) {
	if err := endpoint.Prepare(cfg.Home); err != nil {
		return endpoint.Endpoint{}, err
	}
	ctl := endpoint.Dial(cfg.Home)
	err := ctl.Ping(ctx, nil)
	switch {
	case err == nil:
		return endpoint.Read(cfg.Home)
	case fault.KindOf(err) != fault.NotFound && fault.KindOf(err) != fault.Unreachable:
		return endpoint.Endpoint{}, err
	case noStart:
		return endpoint.Endpoint{}, fault.New("", fault.Unreachable, "no engine runs in %s", cfg.Home).
			Hinted("Start it with: %s up --detach", program)
	}
	var flags []string
	if cfg.AllowUnpriced {
		flags = append(flags, "--allow-unpriced")
	}
	ep, started, err := p.startEngine(ctx, cfg, flags)
	if err == nil && started {
		fmt.Fprintf(p.env.Stderr, "%s: started the engine (%s); stop it with: %s down\n", program, whereabouts(ep), program)
		p.tellLacks(ep)
	}
	return ep, err
}

// tellLacks says what an engine that was just started does without.
func (p *plugged) tellLacks(ep endpoint.Endpoint) {
	for _, text := range ep.Lacks {
		fmt.Fprintf(p.env.Stderr, "%s: warning: %s\n", program, text)
	}
}

// whereabouts says where an engine can be seen.
func whereabouts(ep endpoint.Endpoint) string {
	parts := []string{"Temporal " + ep.Address}
	if ep.UI != "" {
		parts = append(parts, "UI "+ep.UI)
	}
	if ep.Metrics != "" {
		parts = append(parts, "metrics "+ep.Metrics)
	}
	return strings.Join(parts, ", ")
}

// startTime bounds how long an engine may take until it is ready; an upgrade
// of a large state file is part of it.
const startTime = 2 * time.Minute

// startEngine starts "up" as a process of its own and waits until it is
// ready. args are flags for it. started is false when another command was
// faster.
func (p *plugged) startEngine(ctx context.Context, cfg *config.Config, args []string) (ep endpoint.Endpoint, started bool, err error) {
	const op = "start the engine"
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	lock, err := endpoint.AcquireStart(ctx, cfg.Home)
	if err != nil {
		return ep, false, err
	}
	defer lock.Release()
	ctl := endpoint.Dial(cfg.Home)
	if ctl.Ping(ctx, nil) == nil {
		ep, err = endpoint.Read(cfg.Home)
		return ep, false, err
	}
	exe, err := p.parts.Engine()
	if err != nil {
		return ep, false, fault.New(op, fault.Internal, "%w", err)
	}
	log, err := openLog(cfg.Home)
	if err != nil {
		return ep, false, err
	}
	defer log.Close()
	from, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return ep, false, fault.New(op, fault.Internal, "%w", err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), exe, // it outlives this command
		append([]string{"up", "--detached"}, args...)...)
	cmd.Env = append(withoutSecrets(os.Environ()), "SANDBOX_TEMPORAL_HOME="+cfg.Home)
	if cfg.File != "" {
		cmd.Env = append(cmd.Env, "SANDBOX_TEMPORAL_CONFIG="+cfg.File)
	}
	cmd.Dir = cfg.Home
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C in this terminal is not for it
	if err := cmd.Start(); err != nil {
		return ep, false, fault.New(op, fault.Internal, "%w", err)
	}
	wait, ended := context.WithCancelCause(ctx)
	go func() { ended(fmt.Errorf("it ended: %w", errors.Join(cmd.Wait(), errEngineEnded))) }()
	if err := ctl.Ready(wait); err != nil {
		if errors.Is(context.Cause(wait), errEngineEnded) {
			kind := fault.Conflict
			if died, ok := errors.AsType[*exec.ExitError](context.Cause(wait)); ok {
				kind = exitKind(died.ExitCode())
			}
			return ep, false, lastWords(log.Name(), from, kind)
		}
		return ep, false, fault.Wrap(op, err)
	}
	ep, err = endpoint.Read(cfg.Home)
	return ep, true, err
}

var errEngineEnded = errors.New("the engine ended")

// engineLog is the engine's log in the state folder.
const engineLog = "engine.log"

// maxLog is when a log is put aside for a fresh one.
const maxLog = 16 << 20

func openLog(home string) (*os.File, error) {
	path := filepath.Join(home, engineLog)
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		_ = os.Rename(path, path+".1")
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fault.New("engine log", fault.Denied, "%w", err).Hinted("Set SANDBOX_TEMPORAL_HOME to a folder that can be written.")
	}
	return f, nil
}

// lastWords is the error of an engine that ended before it was ready: what it
// wrote to its log, in the form that "up" itself prints an error in.
func lastWords(path string, from int64, kind fault.Kind) error {
	f, err := os.Open(path)
	if err != nil {
		return fault.New("start the engine", fault.Internal, "it ended: %w", err)
	}
	defer f.Close()
	_, _ = f.Seek(from, io.SeekStart)
	b, _ := io.ReadAll(io.LimitReader(f, 1<<20))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if text, ok := strings.CutPrefix(lines[i], program+": "); ok {
			hint := strings.Join(lines[i+1:], " ")
			if hint == "" {
				hint = "Its log is " + path
			}
			return fault.New("", kind, "%s", text).Hinted("%s", hint)
		}
	}
	return fault.New("start the engine", fault.Internal, "it ended at once").Hinted("Its log is %s", path)
}

// secretNames are the variables that no child process is given.
var secretNames = []string{"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY", "GITHUB_TOKEN", "E2B_API_KEY",
	"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}

func withoutSecrets(environ []string) []string {
	var out []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		secret := name == "SANDBOX_TEMPORAL_HOME"
		for _, s := range secretNames {
			secret = secret || name == s
		}
		if !secret {
			out = append(out, kv)
		}
	}
	return out
}

// beforeStart lends the engine the credentials and the programs of the user
// who starts a run: the engine may be older than both. To a cluster, it carries
// a repository that is a folder of this host.
func (p *plugged) beforeStart(ctx context.Context, g Globals, run string, plan *fork.Plan) error {
	cfg := g.Config
	if !cfg.Embedded() {
		return p.carry(ctx, cfg, run, plan)
	}
	if plan.AgentPath == "" {
		// Not found here is no error yet: the engine looks on its own PATH.
		if path, err := p.program(cfg)(agentProgram(plan.Agent)); err == nil {
			plan.AgentPath = path
		}
	}
	mine, err := config.ReadSecrets(p.env.Getenv)
	if err != nil {
		return err
	}
	b, err := mine.LentFor(cfg.Artifacts).Reveal()
	if err != nil {
		return fault.New("lend credentials", fault.Internal, "%w", err)
	}
	return endpoint.Dial(cfg.Home).SetSecrets(ctx, b)
}
