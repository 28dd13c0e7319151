package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// workerWord as its first argument makes the test binary a worker that makes a
// sandbox, says its ref, and waits to be killed.
const workerWord = "test-worker"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == workerWord {
		os.Exit(testWorker(os.Args[2]))
	}
	os.Exit(runAndLookForLeaks(m))
}

// runAndLookForLeaks runs the tests with a folder of their own for temporary
// files, and fails when anything still works or stands in it afterwards.
func runAndLookForLeaks(m *testing.M) int {
	root, err := os.MkdirTemp("", "sandbox-gvisor-")
	if err == nil {
		err = errors.Join(os.Chmod(root, 0o755), os.Setenv("TMPDIR", root))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	before := cgroupsOfSandboxes()
	code := m.Run()
	if leaks := leaksBelow(root, before); len(leaks) > 0 {
		fmt.Fprintf(os.Stderr, "LEAKED:\n%s\n", strings.Join(leaks, "\n"))
		code = max(code, 1)
	}
	if err := os.RemoveAll(root); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	return code
}

// leaksBelow looks until there is nothing to be seen, for some seconds: what
// was killed last may still be on its way out.
func leaksBelow(root string, before map[string]bool) (leaks []string) {
	empty := map[string]bool{} // cgroups that were so at every look
	for look, deadline := 0, time.Now().Add(5*time.Second); ; look++ {
		leaks = nil
		for _, kind := range []string{"cmdline", "mountinfo"} {
			files, _ := filepath.Glob("/proc/[0-9]*/" + kind)
			for _, name := range files {
				if b, err := os.ReadFile(name); err == nil && bytes.Contains(b, []byte(root)) {
					leaks = append(leaks, name)
				}
			}
		}
		// Another test's are there for as long as somebody lives in them, and
		// for a moment before and after.
		now := map[string]bool{}
		for dir := range cgroupsOfSandboxes() {
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if !before[dir] && err == nil && len(procs) == 0 && (look == 0 || empty[dir]) {
				now[dir] = true
				leaks = append(leaks, dir)
			}
		}
		empty = now
		boxes, _ := filepath.Glob(filepath.Join(root, "*", "*", "*", sandboxesDir, "*")) // TestX/001/state
		leaks = append(leaks, boxes...)
		if len(leaks) == 0 || time.Now().After(deadline) {
			return leaks
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func cgroupsOfSandboxes() map[string]bool {
	found := map[string]bool{}
	for _, above := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, _ := filepath.Glob(filepath.Join(above, "sandbox-temporal", "sandbox-temporal-"+groupPrefix+"*"))
		for _, d := range dirs {
			found[d] = true
		}
	}
	return found
}

// supervisor builds the program that guards sandboxes and is their init: a
// test binary is linked dynamically when it looks for races, and cannot be an
// init.
var supervisor = sync.OnceValues(func() (string, error) {
	if built := os.Getenv("SANDBOX_TEMPORAL_BIN"); built != "" {
		return filepath.Join(filepath.Dir(built), "sandbox-supervisor"), nil
	}
	to := filepath.Join(os.TempDir(), "sandbox-supervisor")
	cmd := exec.Command("go", "build", "-o", to, "github.com/sandbox-temporal/sandbox-temporal/cmd/sandbox-supervisor")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return to, nil
})

// needRunsc skips a test where gVisor is not installed.
func needRunsc(t testing.TB) {
	t.Helper()
	if _, err := findRunsc(""); err != nil {
		t.Skip(err)
	}
}

func testOptions(t testing.TB, dir string) Options {
	t.Helper()
	program, err := supervisor()
	if err != nil {
		t.Fatal(err)
	}
	return Options{Dir: dir, Guardian: []string{program, ProviderName}, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

// newProvider returns a provider with an empty state folder, and at the end
// makes sure that it is empty again.
func newProvider(t testing.TB) *Provider {
	t.Helper()
	needRunsc(t)
	dir := filepath.Join(t.TempDir(), "state")
	p := New(testOptions(t, dir))
	t.Cleanup(func() {
		ctx := context.Background()
		infos, err := p.List(ctx, nil)
		if err != nil {
			t.Error(err)
		}
		for _, i := range infos {
			t.Errorf("%s is left", i.Ref.ID)
			if err := p.Destroy(ctx, i.Ref); err != nil {
				t.Error(err)
			}
		}
		for _, sub := range []string{sandboxesDir, trashDir} {
			entries, err := os.ReadDir(filepath.Join(dir, sub))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
			for _, e := range entries {
				t.Errorf("%s/%s is left", sub, e.Name())
			}
		}
	})
	return p
}

func testSpec(key string) sandbox.Spec {
	return sandbox.Spec{Key: key, Deadline: time.Now().Add(5 * time.Minute)}
}

// newSandbox makes a sandbox that goes with the test.
func newSandbox(t testing.TB, p *Provider, s sandbox.Spec) (sandbox.Ref, *attached) {
	t.Helper()
	ref, err := p.Create(t.Context(), s)
	if err != nil {
		t.Fatalf("%v\n%s", err, fault.HintOf(err))
	}
	return ref, attach(t, p, ref)
}

// attach returns a sandbox that goes with the test.
func attach(t testing.TB, p *Provider, ref sandbox.Ref) *attached {
	t.Helper()
	t.Cleanup(func() {
		if err := p.Destroy(context.Background(), ref); err != nil {
			t.Error(err)
		}
	})
	sb, err := p.attach(t.Context(), "test", ref)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sb.Close() })
	return sb
}

// script runs a shell script and returns all it says, on either output.
func script(t testing.TB, sb sandbox.Sandbox, id, text string) string {
	t.Helper()
	out, _, exit, err := sandbox.Output(t.Context(), sb, id, sandbox.Cmd{Args: []string{"sh", "-c", "exec 2>&1; " + text}}, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if exit.Code != 0 {
		t.Fatalf("%s: %+v: %s", id, exit, out)
	}
	return strings.TrimSpace(string(out))
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}
