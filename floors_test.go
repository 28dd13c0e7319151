// Package floors_test holds the rules of the house that a compiler does not
// know: which package may import which.
package floors_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/sandbox-temporal/sandbox-temporal/"

// floors says which of our packages each package may import. A package looks
// down, never up and never sideways. One that is missing here fails: a new
// package needs a line and a reason.
var floors = map[string][]string{
	// 0: words
	"internal/fault": {},
	"internal/fork":  {"internal/fault"},

	// The logger: its keys are words, and it knows none of what is logged.
	"internal/logs": {"internal/fork"},

	// 1: seams
	"internal/sandbox": {"internal/fault"},
	"internal/agent":   {"internal/fault", "internal/fork"},

	// Where traces go, when the environment names a place.
	"internal/tracing": {"internal/fault"},
	// What Temporal keeps of our payloads: a cipher, when there is a key.
	"internal/payload": {"internal/fault"},

	// 2: adapters, blind to each other
	"internal/sandbox/*": {"internal/fault", "internal/sandbox"},
	// What a local sandbox is made of, each blind to the others: its cgroup
	// and limits, what its processes are kept from, the layers of its bases, how
	// its programs are started.
	"internal/sandbox/local/*": {"internal/fault", "internal/sandbox"},
	// What E2B's provider is tested against: a server that speaks its protocol.
	"internal/sandbox/e2b/*": {"internal/fault"},
	// Assembles confine's filter of system calls, when that is built and tested.
	"internal/sandbox/local/confine/filter": {},
	"internal/sandbox/local":                {"internal/fault", "internal/sandbox", "internal/sandbox/local/cgroup", "internal/sandbox/local/confine", "internal/sandbox/local/layer", "internal/sandbox/local/launch"},
	// A sandbox of gVisor's stands in a cgroup as a local one does, and its init
	// starts programs as another.
	"internal/sandbox/gvisor": {"internal/fault", "internal/sandbox", "internal/sandbox/local/cgroup", "internal/sandbox/local/launch"},
	"internal/gateway":        {"internal/fault", "internal/fork", "internal/gateway/ledger", "internal/gateway/governor", "internal/gateway/egress", "internal/gateway/openai"},
	// What else a gateway is made of, each blind to the others: the pace of the
	// fleet, the proxy to the rest of the world, what the APIs bill.
	"internal/gateway/*": {"internal/fault", "internal/fork"},
	// The money of the gateway, in a database that outlives every run. It is a
	// package of its own because commands read it too.
	"internal/gateway/ledger": {"internal/fault", "internal/fork"},
	// Database servers for the tests of those who keep a ledger in one.
	"internal/gateway/ledger/ledgertest": {},
	"internal/repo":                      {"internal/fault", "internal/fork", "internal/logs"},
	"internal/artifact":                  {"internal/fault"},
	// A server that speaks S3, for the tests of those who keep things in one.
	"internal/artifact/s3test": {},
	"internal/metrics":         {"internal/fault", "internal/fork"},
	// How a command finds the engine and talks to it, without linking it:
	// lock, endpoint file, control socket.
	"internal/endpoint": {"internal/fault"},
	// A scripted stand-in for the model API: what demo and the tests run
	// against.
	"internal/standin": {"internal/fault"},
	// The program of the built-in agent: the smallest real agent loop, for
	// machines without Claude Code.
	"internal/mini": {"internal/fault"},
	// The repository and the script that demo runs with.
	"internal/demo": {"internal/fault", "internal/standin"},

	// 3: decisions
	"internal/orchestrator": {"internal/fault", "internal/fork", "internal/logs", "internal/sandbox"},

	// 4: deeds
	"internal/activities": {"internal/fault", "internal/fork", "internal/sandbox", "internal/agent",
		"internal/gateway", "internal/repo", "internal/artifact", "internal/logs", "internal/metrics", "internal/orchestrator", "internal/tracing"},

	// 5: machinery
	"internal/config": {"internal/fault", "internal/fork"},
	"internal/engine": {"internal/fault", "internal/endpoint"},
	// One worker process: gateway, activities, metrics and the task queues
	// it serves. Both "worker" and the engine are made of it.
	"internal/host": {"internal/fault", "internal/fork", "internal/sandbox", "internal/agent", "internal/gateway", "internal/gateway/egress", "internal/gateway/ledger",
		"internal/repo", "internal/artifact", "internal/logs", "internal/metrics", "internal/orchestrator", "internal/activities"},

	// Comes before everything else in the order of initialisation, so it
	// imports nothing.
	"internal/cli/hush": {},
	// Likewise: shows help before anything is initialised. Main imports it.
	"internal/cli/page": {},

	// 6: the face: knows the seams, not what is plugged in
	"internal/cli": {"internal/cli/hush", "internal/cli/page", "internal/fault", "internal/fork", "internal/sandbox", "internal/sandbox/conformance", "internal/agent",
		"internal/repo", "internal/artifact", "internal/orchestrator", "internal/activities", "internal/config",
		"internal/host", "internal/logs", "internal/metrics", "internal/gateway", "internal/gateway/egress", "internal/gateway/ledger", "internal/endpoint", "internal/standin", "internal/mini", "internal/demo",
		"internal/tracing", "internal/payload"},

	// 7: main plugs everything in
	"cmd/*": {"*"},

	// beside the house: what builds and tests it, never shipped
	"scripts/*": {},
	// Measures a provider beside its peers, so it needs one, and the gateway, and
	// the client of E2B against the server that its tests have, followed by a
	// worker's activities.
	"scripts/benchmark": {"internal/sandbox", "internal/sandbox/local", "internal/sandbox/e2b", "internal/sandbox/e2b/e2btest", "internal/fork", "internal/gateway", "internal/gateway/ledger",
		"internal/artifact", "internal/orchestrator", "internal/activities"},
}

// quiet packages decide and never do: they may not reach the outside world.
var quiet = []string{"internal/fault", "internal/fork", "internal/sandbox", "internal/agent", "internal/orchestrator"}

var outside = []string{"os", "os/exec", "net", "net/http", "syscall", "math/rand", "math/rand/v2", "crypto/rand"}

// heavy modules have one home, so that nothing else pays for them.
var heavy = map[string]string{
	"go.temporal.io/server":             "internal/engine",
	"github.com/temporalio/ui-server":   "internal/engine",
	"github.com/labstack/echo":          "internal/engine",
	"github.com/spf13/cobra":            "internal/cli",
	"github.com/charmbracelet":          "internal/cli",
	"gocloud.dev":                       "internal/artifact",
	"github.com/aws":                    "internal/artifact",
	"github.com/johannesboyne/gofakes3": "internal/artifact/s3test",
	"modernc.org/sqlite":                "internal/gateway/ledger",
	"github.com/pressly/goose":          "internal/gateway/ledger",
	"github.com/jackc/pgx":              "internal/gateway/ledger",
	"github.com/elastic/go-seccomp-bpf": "internal/sandbox/local/confine/filter",
	"github.com/landlock-lsm":           "internal/sandbox/local/confine",
}

func TestPackagesLookDownOnly(t *testing.T) {
	// The files are read here and not by a "go list" child, whose reads the
	// test cache would not see.
	seen := 0
	err := filepath.WalkDir(".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != "." || d.Name() == "testdata" || d.Name() == "node_modules") {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		pkg := path.Dir(filepath.ToSlash(file))
		allowed, ok := floor(pkg)
		if !ok {
			t.Errorf("%s stands on no floor: add it to the table, or do without it", pkg)
		}
		seen++
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range f.Imports {
			imp, _ := strconv.Unquote(spec.Path.Value)
			if dep, ours := strings.CutPrefix(imp, module); ours && !slices.Contains(allowed, dep) && !slices.Contains(allowed, "*") {
				t.Errorf("%s may not import %s", file, dep)
			}
			if slices.Contains(quiet, pkg) && slices.Contains(outside, imp) {
				t.Errorf("%s may not import %s: this package decides, it does not do", file, imp)
			}
			for mod, home := range heavy {
				if (imp == mod || strings.HasPrefix(imp, mod+"/")) && pkg != home {
					t.Errorf("%s may not import %s: only %s does", file, imp, home)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 20 {
		t.Errorf("only %d files were looked at", seen)
	}
}

func floor(pkg string) ([]string, bool) {
	if allowed, ok := floors[pkg]; ok {
		return allowed, true
	}
	for pattern, allowed := range floors {
		if ok, _ := path.Match(pattern, pkg); ok {
			return allowed, true
		}
	}
	return nil, false
}
