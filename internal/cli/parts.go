package cli

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/tracing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
)

// Parts is what main plugs in: the things that only it may link.
type Parts struct {
	// StartServer starts the embedded Temporal server in the state folder
	// that the lock is for.
	StartServer func(ctx context.Context, o ServerOptions) (Server, error)

	// Sweep gives the activities back to the queue that a dead worker of the
	// engine held, and returns how many there were.
	Sweep func(ctx context.Context, c client.Client, namespace, identity string, log *slog.Logger) (int, error)

	// Providers makes the places for sandboxes, with their state in dir.
	// The secrets are asked for anew whenever they are needed.
	Providers func(dir string, secrets func() config.Secrets, log *slog.Logger) sandbox.Set

	// CheckHost says what would keep local sandboxes from working here.
	CheckHost func(ctx context.Context, dir string) []Finding

	// Program is the file of the program that sandboxes are lent for the
	// built-in agent.
	Program func() (string, error)

	// Engine is the file of the program that "up" is started with.
	Engine func() (string, error)

	// BecomeEngine makes this process, from the start of its command line, the
	// program that holds the embedded server. It returns nil when this program
	// is that one, or when there is none: StartServer says so then.
	BecomeEngine func() error
}

// ServerOptions say how the embedded server is started.
type ServerOptions struct {
	Dir              string
	Lock             *endpoint.Lock
	Port, UIPort     int // 0: any free one
	Namespace        string
	SearchAttributes map[string]enumspb.IndexedValueType
	Logger           *slog.Logger
}

// A Server is an embedded Temporal server.
type Server interface {
	Address() string
	UIAddress() string
	Failed() <-chan error
	Stop() error
}

// Plug fills the hooks of env from parts.
func Plug(env *Env, parts Parts) {
	p := &plugged{env: env, parts: parts}
	env.Runs = p.runs
	env.BeforeStart = p.beforeStart
	env.Artifacts = p.artifacts
	env.Work = p.work
	env.Books = p.books
	env.Providers = func(g Globals) (sandbox.Set, error) {
		return p.providers(g.Config, p.secrets(g.Config), slog.New(slog.DiscardHandler)), nil
	}
	env.Doctor = p.doctor
	env.Trace = p.trace
	env.Commands = append(env.Commands,
		p.newUp, p.newDown, p.newWorker, p.newNamespace, p.newDemo, p.newCodec)
}

// plugged carries the parts to the commands that need them.
type plugged struct {
	env    *Env
	parts  Parts
	traces *tracing.Tracing // of this command; nil: none
}

// home makes sure that the state folder is there and ours.
func home(cfg *config.Config) (*config.Config, error) { return cfg, endpoint.Prepare(cfg.Home) }

// sandboxDir is where providers keep the state of their sandboxes.
func sandboxDir(cfg *config.Config) string { return filepath.Join(cfg.Home, "sandboxes") }

func (p *plugged) providers(cfg *config.Config, secrets func() config.Secrets, log *slog.Logger) sandbox.Set {
	return p.parts.Providers(sandboxDir(cfg), secrets, log)
}

// secrets returns what a command knows: its own environment's credentials, and
// what was lent to the engine of the state folder before. Those that cannot be
// read are reported by who needs them.
func (p *plugged) secrets(cfg *config.Config) func() config.Secrets {
	return sync.OnceValue(func() config.Secrets {
		v, err := openVault(cfg.Home, p.env.Getenv)
		if err != nil {
			s, _ := config.ReadSecrets(p.env.Getenv)
			return s
		}
		return v.secrets()
	})
}
