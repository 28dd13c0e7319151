package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// processesNaming counts this host's processes with word in their command line.
func processesNaming(t testing.TB, word string) int {
	t.Helper()
	n := 0
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), word) {
			n++
		}
	}
	return n
}

// instance is what runsc calls the sandbox.
func instance(t testing.TB, ref sandbox.Ref) string {
	t.Helper()
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	return h.Instance
}

// endProcesses kills those whose command line is chosen, of which there must
// be some.
func endProcesses(t testing.TB, chosen func(args []string) bool) {
	t.Helper()
	n, err := killProcesses(chosen)
	if err != nil || n == 0 {
		t.Fatalf("%d processes killed, %v", n, err)
	}
}

// TestKillingAnyPartyEndsTheSandbox kills one of the processes of a sandbox at
// a time. Nothing of it may be left when List has looked.
func TestKillingAnyPartyEndsTheSandbox(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	for name, row := range map[string]func(id string) func(args []string) bool{
		"guardian": func(string) func([]string) bool {
			return func(args []string) bool { return args[len(args)-1] == p.boxPath("guardian") }
		},
		"runsc": func(id string) func([]string) bool {
			return func(args []string) bool {
				return args[0] == "runsc" && args[len(args)-1] == id
			}
		},
		"kernel": func(id string) func([]string) bool {
			return func(args []string) bool {
				return strings.HasPrefix(args[0], "runsc-sandbox") && args[len(args)-1] == id
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ref, sb := newSandbox(t, p, testSpec(name))
			id := instance(t, ref)
			if _, err := sb.Start(ctx, "long", sandbox.Cmd{Args: []string{"sleep", "1000"}}); err != nil {
				t.Fatal(err)
			}
			endProcesses(t, row(id))
			eventually(t, "the sandbox is gone", func() bool {
				_, err := p.Attach(ctx, ref)
				return fault.KindOf(err) == fault.NotFound
			})
			eventually(t, "no process is left", func() bool { return processesNaming(t, id) == 0 })
			if _, err := sb.Start(ctx, "late", sandbox.Cmd{Args: []string{"true"}}); fault.KindOf(err) != fault.NotFound {
				t.Errorf("start in a dead sandbox: %v", err)
			}
			// The list tidies up, or the guardian has: there is nothing left
			// for Destroy to do.
			eventually(t, "the list is empty, and the folder gone", func() bool {
				infos, err := p.List(ctx, nil)
				if err != nil {
					t.Fatal(err)
				}
				_, err = os.Lstat(p.boxPath(name))
				return len(infos) == 0 && errors.Is(err, os.ErrNotExist)
			})
		})
	}
}

// The server of host files is one that a sandbox can live without: what it has
// opened for gVisor's kernel stays open.
func TestDestroyNeedsNeitherGuardianNorFileServer(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("crippled"))
	id := instance(t, ref)
	endProcesses(t, func(args []string) bool {
		return strings.HasPrefix(args[0], "runsc-gofer") && args[len(args)-1] == id
	})
	stopped := 0
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil && strings.HasSuffix(string(b), p.boxPath("crippled")+"\x00") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			stopped++
		}
	}
	if stopped != 1 {
		t.Fatalf("%d guardians were stopped", stopped)
	}
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if n := processesNaming(t, id) + processesNaming(t, p.dir); n > 0 {
		t.Errorf("%d processes are left", n)
	}
}

func TestDestroyAndCreateTidyUpAfterADeadGuardian(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	for name, tidy := range map[string]func(ref sandbox.Ref) error{
		"destroy": func(ref sandbox.Ref) error { return p.Destroy(ctx, ref) },
		"create": func(ref sandbox.Ref) error {
			again, err := p.Create(ctx, testSpec(ref.ID))
			if err == nil && again == ref {
				err = errors.New("the dead sandbox was returned")
			}
			return errors.Join(err, p.Destroy(ctx, again))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ref, _ := newSandbox(t, p, testSpec(name))
			if err := killGuardian(p.boxPath(name)); err != nil {
				t.Fatal(err)
			}
			if err := tidy(ref); err != nil {
				t.Error(err)
			}
			if n := processesNaming(t, instance(t, ref)); n > 0 {
				t.Errorf("%d processes are left", n)
			}
			if _, err := os.Lstat(p.boxPath(name)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the folder is left: %v", err)
			}
		})
	}
}

// TestProcessOutlivesAWorkerThatWasKilled has another process be the worker.
func TestProcessOutlivesAWorkerThatWasKilled(t *testing.T) {
	p := newProvider(t)
	ref := workerThatIsKilled(t, p, testSpec("outlive"), "echo one; while [ ! -e go ]; do sleep 0.02; done; echo two; exit 7")
	ctx := t.Context()
	sb := attach(t, p, ref)
	proc, err := sb.Process(ctx, "job")
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.Create(ctx, testSpec("outlive"))
	if err != nil || again != ref {
		t.Fatalf("create again: %+v, %v, want %+v", again, err, ref)
	}
	if _, ok, err := proc.Exit(ctx); ok || err != nil {
		t.Fatalf("the process did not outlive its worker: %v", err)
	}
	if err := sb.Upload(ctx, sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	if exit, err := proc.Wait(ctx); err != nil || exit.Code != 7 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	buf := make([]byte, 64)
	n, err := proc.ReadAt(ctx, sandbox.Stdout, buf, 4)
	if string(buf[:n]) != "two\n" || !errors.Is(err, io.EOF) {
		t.Errorf("from byte 4: %q, %v", buf[:n], err)
	}
}

func TestDeadlineHoldsWithNobodyAlive(t *testing.T) {
	p := newProvider(t)
	s := testSpec("alone")
	s.Deadline = time.Now().Add(5 * time.Second)
	ref := workerThatIsKilled(t, p, s, "exec sleep 987654")
	eventually(t, "the folder is gone", func() bool {
		boxes, _ := filepath.Glob(filepath.Join(p.dir, sandboxesDir, "*"))
		trash, _ := filepath.Glob(filepath.Join(p.dir, trashDir, "*"))
		return len(boxes)+len(trash) == 0
	})
	eventually(t, "the processes are gone", func() bool { return processesNaming(t, instance(t, ref)) == 0 })
	if time.Now().Before(s.Deadline) {
		t.Error("it was gone before its deadline")
	}
}

// A workerOrder tells the worker in another process what to make.
type workerOrder struct {
	Options Options
	Spec    sandbox.Spec
	Script  string // started as "job"
}

// workerThatIsKilled runs a worker in another process, and kills it when its
// job has begun.
func workerThatIsKilled(t testing.TB, p *Provider, s sandbox.Spec, job string) sandbox.Ref {
	t.Helper()
	o := workerOrder{Options: testOptions(t, p.dir), Spec: s, Script: job}
	o.Options.Logger = nil
	arg, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", workerWord, string(arg))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ref sandbox.Ref
	err = json.NewDecoder(stdout).Decode(&ref)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func testWorker(arg string) int {
	var o workerOrder
	err := json.Unmarshal([]byte(arg), &o)
	ctx := context.Background()
	p := New(o.Options)
	var ref sandbox.Ref
	if err == nil {
		ref, err = p.Create(ctx, o.Spec)
	}
	var sb sandbox.Sandbox
	if err == nil {
		sb, err = p.Attach(ctx, ref)
	}
	if err == nil {
		_, err = sb.Start(ctx, "job", sandbox.Cmd{Args: []string{"sh", "-c", o.Script}})
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(ref)
	}
	if err != nil {
		panic(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent is
	return 0
}

func TestCreateThatFailsLeavesNothing(t *testing.T) {
	p := newProvider(t)
	hopeless, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	missing := testSpec("fails")
	missing.Mounts = []sandbox.Mount{{Source: "/etc/passwd", Target: "/etc/passwd/below-a-file"}}
	for name, row := range map[string]struct {
		ctx    context.Context
		change func(o *Options)
		spec   sandbox.Spec
		kind   fault.Kind
		says   string
	}{
		"cancelled":    {hopeless, func(*Options) {}, testSpec("fails"), fault.Unavailable, ""},
		"no guardian":  {t.Context(), func(o *Options) { o.Guardian = []string{"/no/such/guardian"} }, testSpec("fails"), fault.Invalid, ""},
		"dies":         {t.Context(), func(o *Options) { o.Guardian = []string{"/bin/sh", "-c", "echo alas >&2; exit 1"} }, testSpec("fails"), fault.Internal, "alas"},
		"no runsc":     {t.Context(), func(o *Options) { o.Runsc = "/no/such/runsc" }, testSpec("fails"), fault.Unsupported, ""},
		"runsc dies":   {t.Context(), func(o *Options) { o.Runsc = "/bin/false" }, testSpec("fails"), fault.Unsupported, ""},
		"no such base": {t.Context(), func(*Options) {}, sandbox.Spec{Key: "fails", Base: "none", Deadline: time.Now().Add(time.Minute)}, fault.NotFound, ""},
		"cannot mount": {t.Context(), func(*Options) {}, missing, fault.Internal, "below-a-file"},
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(t, p.dir)
			row.change(&o)
			ref, err := New(o).Create(row.ctx, row.spec)
			if err == nil {
				t.Fatalf("made %+v", ref)
			}
			if fault.KindOf(err) != row.kind || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%v, of kind %s, want %s", err, fault.KindOf(err), row.kind)
			}
			if row.kind == fault.Unsupported && fault.HintOf(err) == "" {
				t.Errorf("no hint: %v", err)
			}
			for _, sub := range []string{sandboxesDir, trashDir} {
				entries, err := os.ReadDir(filepath.Join(p.dir, sub))
				if err != nil && !errors.Is(err, os.ErrNotExist) || len(entries) > 0 {
					t.Errorf("%s holds %v, %v", sub, entries, err)
				}
			}
			if n := processesNaming(t, p.dir); n > 0 {
				t.Errorf("%d processes are left", n)
			}
		})
	}
}

func TestListSweepsWhatWasLeftHalfDone(t *testing.T) {
	p := newProvider(t)
	if err := makeState("test", p.dir); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{filepath.Join(trashDir, newInstance()), filepath.Join(sandboxesDir, newPrefix+newInstance()), filepath.Join(sandboxesDir, keyName("dead"))} {
		dir := filepath.Join(p.dir, at)
		if err := os.MkdirAll(filepath.Join(dir, upperDir, "deep"), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{lifeFile: "", specFile: `{"key":"dead"}`} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if infos, err := p.List(t.Context(), nil); err != nil || len(infos) > 0 {
		t.Fatalf("%+v, %v", infos, err)
	} // that nothing is left, newProvider sees
}

func TestRefOfAnotherSandboxIsNotFound(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("ref"))
	other := handle{Key: "ref", Instance: "0123456789abcdef"}.ref()
	if _, err := p.Attach(t.Context(), other); fault.KindOf(err) != fault.NotFound {
		t.Errorf("attach: %v", err)
	}
	if err := p.Destroy(t.Context(), other); err != nil {
		t.Errorf("destroy: %v", err)
	}
	if _, err := p.Attach(t.Context(), ref); err != nil {
		t.Errorf("the living one was hurt: %v", err)
	}
	for kind, bad := range map[fault.Kind]sandbox.Ref{
		fault.Invalid:     {Provider: "other", Version: 1, Handle: ref.Handle},
		fault.Unsupported: {Provider: ProviderName, Version: 99, Handle: ref.Handle},
	} {
		if _, err := p.Attach(t.Context(), bad); fault.KindOf(err) != kind {
			t.Errorf("attach to %+v: %v", bad, err)
		}
	}
}

func TestADeepStateFolderWorks(t *testing.T) {
	deep := filepath.Join(newProvider(t).dir, strings.Repeat("a-long-name-of-a-folder-in-between/", 12))
	p := New(testOptions(t, deep))
	ref, sb := newSandbox(t, p, testSpec(strings.Repeat("k", 64)))
	if out := script(t, sb, "say", "echo deep"); out != "deep" {
		t.Error(out)
	}
	forks, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{testSpec("fork")})
	if err != nil || forks[0].Err != nil {
		t.Fatal(err, forks)
	}
	if out := script(t, attach(t, p, forks[0].Ref), "again", "echo deeper"); out != "deeper" {
		t.Error(out)
	}
	if found, _ := filepath.Glob("/tmp/runsc-" + instance(t, ref) + "*"); len(found) > 0 {
		t.Errorf("runsc has put %v elsewhere", found)
	}
}
