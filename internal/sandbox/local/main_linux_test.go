package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// The test binary plays every part: with one of these words as its first
// argument it is no test.
const (
	supervisorWord = "sandbox-supervisor"
	workerWord     = "test-worker"    // makes a sandbox, says its ref, and waits to be killed
	forbiddenWord  = "test-forbidden" // makes a sandbox where there can be none, and says the error
	attackWord     = "test-attack"    // plays the agent; see escape_linux_test.go
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case supervisorWord:
			os.Exit(Supervise(os.Args[2:]))
		case workerWord:
			os.Exit(testWorker(os.Args[2]))
		case forbiddenWord:
			os.Exit(testForbidden(os.Args[2]))
		case attackWord:
			syscall.Exit(attack(os.Args[2:])) // os.Exit waits a second in a race test
		}
	}
	os.Exit(runAndLookForLeaks(m))
}

// runAndLookForLeaks runs the tests with a folder of their own for temporary
// files, and fails when anything still works or stands in it afterwards.
func runAndLookForLeaks(m *testing.M) int {
	root, err := os.MkdirTemp("", "sandbox-local-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := os.Setenv("TMPDIR", root); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	before := cgroupsOfSandboxes()
	code := m.Run()
	if leaks := leaksBelow(root, before); len(leaks) > 0 {
		fmt.Fprintf(os.Stderr, "LEAKED:\n%s\n", strings.Join(leaks, "\n"))
		code = max(code, 1)
	}
	if err := removeTree(root, ""); err != nil {
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
		dirs, _ := filepath.Glob(filepath.Join(above, "sandbox-temporal", "sandbox-temporal-[0-9a-f]*")) // not of other providers
		for _, d := range dirs {
			found[d] = true
		}
	}
	return found
}

// testOptions names the program in a way that works for every user, wherever
// the go command has put it.
func testOptions(dir string) Options {
	return Options{Dir: dir, Supervisor: []string{"/proc/self/exe", supervisorWord}}
}

// newProvider returns a provider with an empty state folder, and at the end
// makes sure that it is empty again.
func newProvider(t testing.TB) *Provider {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	p := New(testOptions(dir))
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
		dropAllBases(t, p)
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

// dropAllBases removes them from the top of each chain down. An agent can have
// left in them what only RemoveBase can remove.
func dropAllBases(t testing.TB, p *Provider) {
	t.Helper()
	for {
		infos, err := p.Bases(context.Background())
		if err != nil {
			t.Error(err)
		}
		removed := false
		for _, i := range infos {
			if i.Users == 0 {
				if err := p.RemoveBase(context.Background(), i.Key); err != nil {
					t.Error(err)
					return
				}
				removed = true
			}
		}
		if !removed {
			if len(infos) > 0 {
				t.Errorf("bases that nobody can stand on are in use: %+v", infos)
			}
			return
		}
	}
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
	return ref, sb
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

// marker returns a word that only processes of this test have on their command
// line: other checkouts may be tested on this host at the same time.
func marker(what string) string { return "marker-of-" + what + "-" + newInstance() }

// processesNaming counts this host's processes with word in their command line.
func processesNaming(t testing.TB, word string) int {
	t.Helper()
	n := 0
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil && bytes.Contains(b, []byte(word)) && name != fmt.Sprintf("/proc/%d/cmdline", os.Getpid()) {
			n++
		}
	}
	return n
}

// A workerOrder tells the worker in another process what to make.
type workerOrder struct {
	Options Options
	Spec    sandbox.Spec
	Script  string // started as "job"

	Terminal []string // opened on a terminal too
	Pause    bool     // and then paused
}

func testWorker(arg string) int {
	var o workerOrder
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		panic(err)
	}
	ctx := context.Background()
	p := New(o.Options)
	ref, err := p.Create(ctx, o.Spec)
	if err != nil {
		panic(err)
	}
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		panic(err)
	}
	if _, err := sb.Start(ctx, "job", sandbox.Cmd{Args: []string{"sh", "-c", o.Script}}); err != nil {
		panic(err)
	}
	if o.Terminal != nil {
		t, err := p.OpenTerminal(ctx, ref, sandbox.Cmd{Args: o.Terminal}, sandbox.TerminalSize{Rows: 24, Columns: 80})
		if err != nil {
			panic(err)
		}
		defer t.Close()
	}
	if o.Pause {
		if err := p.Pause(ctx, ref); err != nil {
			panic(err)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(ref); err != nil {
		panic(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent is
	return 0
}

// self starts this program again with other arguments.
func self(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: 0}
	return cmd
}

// startWorker runs a worker in another process. kill ends it as kill -9 does.
func startWorker(t testing.TB, o workerOrder, as ...func(*exec.Cmd)) (ref func() sandbox.Ref, kill func()) {
	t.Helper()
	o.Options.Logger = nil
	arg, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := self(t, workerWord, string(arg))
	for _, change := range as {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	kill = func() {
		if !killed {
			killed = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			stdin.Close()
		}
	}
	t.Cleanup(kill)
	ref = func() (r sandbox.Ref) {
		t.Helper()
		if err := json.NewDecoder(stdout).Decode(&r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	return ref, kill
}
