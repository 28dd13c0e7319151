// Command sandbox-temporal runs coding agents side by side, each in its own
// sandbox, durably, on Temporal. This file only plugs its parts together.
package main

import (
	"context"
	"debug/buildinfo"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/term"

	"github.com/sandbox-temporal/sandbox-temporal/internal/cli"
	_ "github.com/sandbox-temporal/sandbox-temporal/internal/cli/page" // ends the program when it is asked for help
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/engine"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/mini"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/gvisor"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

// version is set by the linker.
var version = "dev"

// Words that this program starts itself with; they are no commands. The first
// is a program beside it, too.
const (
	supervisorWord = "sandbox-supervisor"
	miniWord       = "mini-agent"
)

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case supervisorWord:
			if len(os.Args) > 2 && os.Args[2] == gvisor.ProviderName {
				os.Exit(gvisor.Supervise(os.Args[3:]))
			}
			os.Exit(local.Supervise(os.Args[2:]))
		case miniWord:
			os.Exit(mini.Main(context.Background(), os.Args[2:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	env := &cli.Env{
		Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv,
		IsTerminal: isTerminal, Version: version,
	}
	cli.Plug(env, cli.Parts{
		StartServer: startServer, Sweep: engine.Sweep, Providers: providers, CheckHost: checkHost,
		Program: program, Engine: engineProgram, BecomeEngine: becomeEngine,
	})
	code := cli.Main(ctx, env)
	stop()
	os.Exit(code)
}

// providers is the list of places where a sandbox can be made. To add one,
// write its package, run the conformance checks, and name it here.
func providers(dir string, secrets func() config.Secrets, log *slog.Logger) sandbox.Set {
	return sandbox.NewSet(
		local.New(local.Options{Dir: dir, Supervisor: supervisor(), Spares: spareSandboxes(log), Logger: log}),
		gvisor.New(gvisorOptions(dir, log)),
		e2b.New(e2b.Options{Dir: filepath.Join(dir, e2b.ProviderName), Settings: func() e2b.Settings { return e2bSettings(secrets()) }, Logger: log}),
	)
}

// spareSandboxes is how many local sandboxes are kept ready for as long as runs
// ask for more: SANDBOX_TEMPORAL_SPARE_SANDBOXES, or local.DefaultSpares.
func spareSandboxes(log *slog.Logger) int {
	const most = 64
	said := os.Getenv("SANDBOX_TEMPORAL_SPARE_SANDBOXES")
	if said == "" {
		return local.DefaultSpares
	}
	n, err := strconv.Atoi(said)
	if err != nil || n < 0 || n > most {
		log.Warn("SANDBOX_TEMPORAL_SPARE_SANDBOXES is not a number of sandboxes", "value", said, "most", most, "taken", local.DefaultSpares)
		return local.DefaultSpares
	}
	return n
}

// e2bSettings are those of the credentials that this process holds now.
func e2bSettings(s config.Secrets) e2b.Settings {
	return e2b.Settings{
		Key: string(s.E2BKey), APIURL: s.E2B.APIURL, Domain: s.E2B.Domain, SandboxURL: s.E2B.SandboxURL, Debug: s.E2B.Debug,
		CAFile: s.E2B.CAFile, Template: s.E2B.Template, Plan: s.E2B.Plan,
	}
}

// gvisorOptions puts the state of gVisor's sandboxes beside that of the local
// ones, and has the same program own them.
func gvisorOptions(dir string, log *slog.Logger) gvisor.Options {
	return gvisor.Options{
		Dir: filepath.Join(dir, gvisor.ProviderName), Guardian: append(supervisor(), gvisor.ProviderName), ModuleVersion: moduleVersion, Logger: log,
	}
}

// moduleVersion returns the version of the module in a Go program, or "".
func moduleVersion(program, module string) string {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return ""
	}
	for _, m := range append(info.Deps, &info.Main) {
		if m.Path == module {
			return m.Version
		}
	}
	return ""
}

// checkHost says what the local provider needs and this host does not have,
// and whether gVisor, which nobody needs, can be used.
func checkHost(ctx context.Context, dir string) []cli.Finding {
	var all []cli.Finding
	for _, f := range local.Check(ctx, local.Options{Dir: dir, Supervisor: supervisor(), Logger: slog.New(slog.DiscardHandler)}) {
		health := cli.Good
		switch {
		case !f.OK && f.Optional:
			health = cli.Poor
		case !f.OK:
			health = cli.Bad
		}
		all = append(all, cli.Finding{Name: f.Name, Health: health, Text: f.Text, Hint: f.Hint})
	}
	for _, f := range gvisor.Check(ctx, gvisorOptions(dir, slog.New(slog.DiscardHandler))) {
		health := cli.Good
		if !f.OK || f.Hint != "" {
			health = cli.Poor
		}
		all = append(all, cli.Finding{Name: f.Name, Health: health, Text: f.Text, Hint: f.Hint})
	}
	return all
}

// supervisor is how a local sandbox's supervisor is started: the small program
// installed beside this one, or else this one itself.
func supervisor() []string {
	if small, err := beside(supervisorWord); err == nil {
		return []string{small}
	}
	exe, err := os.Executable()
	if err != nil {
		exe = os.Args[0]
	}
	return []string{exe, supervisorWord}
}

// This program is installed in one of two ways. Alone it holds the embedded
// server and does everything. Or it is built without (tag noembed), and the
// one that holds it stands beside it as sandbox-engine: a command that needs no
// server does not pay for linking one.
const (
	clientName = "sandbox-temporal"
	engineName = "sandbox-engine"
)

// program is the file of the smaller of the two, where there are two.
func program() (string, error) {
	if engine.Embedded {
		if small, err := beside(clientName); err == nil {
			return small, nil
		}
	}
	return os.Executable()
}

// engineProgram is the file of the one that holds the server.
func engineProgram() (string, error) {
	if !engine.Embedded {
		if with, err := beside(engineName); err == nil {
			return with, nil
		}
	}
	return os.Executable()
}

func becomeEngine() error {
	if engine.Embedded {
		return nil
	}
	with, err := beside(engineName)
	if err != nil {
		return nil //nolint:nilerr // StartServer says what this build lacks
	}
	err = syscall.Exec(with, append([]string{with}, os.Args[1:]...), os.Environ())
	return fault.New("start "+with, fault.Internal, "%w", err)
}

// beside returns the program of that name in the folder of this one.
func beside(name string) (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	return exec.LookPath(filepath.Join(filepath.Dir(exe), name))
}

func startServer(ctx context.Context, o cli.ServerOptions) (cli.Server, error) {
	return engine.Start(ctx, engine.Options{
		Dir: o.Dir, Lock: o.Lock, Port: o.Port, UIPort: o.UIPort, Namespace: o.Namespace, SearchAttributes: o.SearchAttributes, Logger: o.Logger,
	})
}

func isTerminal(x any) bool {
	f, ok := x.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
