package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func TestProcessOutlivesAWorkerThatWasKilled(t *testing.T) {
	p := newProvider(t)
	ref, kill := startWorker(t, workerOrder{
		Options: testOptions(p.dir), Spec: testSpec("outlive"),
		Script: "echo one; while [ ! -e go ]; do sleep 0.02; done; echo two; exit 7",
	})
	r := ref()
	kill()
	ctx := t.Context()
	sb, err := p.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	proc, err := sb.Process(ctx, "job")
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.Create(ctx, testSpec("outlive"))
	if err != nil || again != r {
		t.Fatalf("create again: %+v, %v, want %+v", again, err, r)
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
	if err := p.Destroy(ctx, r); err != nil {
		t.Fatal(err)
	}
}

func TestDeadlineHoldsWithNobodyAlive(t *testing.T) {
	p := newProvider(t)
	s := testSpec("alone")
	s.Deadline = time.Now().Add(2 * time.Second)
	ref, kill := startWorker(t, workerOrder{Options: testOptions(p.dir), Spec: s, Script: "exec sleep 987654"})
	ref()
	kill()
	eventually(t, "the folder is gone", func() bool {
		boxes, _ := filepath.Glob(filepath.Join(p.dir, "*", "*", specFile))
		return len(boxes) == 0
	})
	eventually(t, "the processes are gone", func() bool { return processesNaming(t, p.dir) == 0 })
	if time.Now().Before(s.Deadline) {
		t.Error("it was gone before its deadline")
	}
}

func TestKillingTheSupervisorKillsTheSandbox(t *testing.T) {
	p := newProvider(t)
	word := marker("a-supervisor-killed")
	ref, sb := newSandbox(t, p, testSpec("orphan"))
	ctx := t.Context()
	for _, id := range []string{"one", "two"} {
		if _, err := sb.Start(ctx, id, sandbox.Cmd{Args: []string{"sh", "-c", "setsid sh -c 'while :; do sleep 1; done' " + word + " & wait", word}}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all processes run", func() bool { return processesNaming(t, word) == 4 })
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(h.Supervisor.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no process is left", func() bool { return processesNaming(t, word) == 0 })
	eventually(t, "the supervisor is dead", func() bool {
		_, err := p.Attach(ctx, ref)
		return fault.KindOf(err) == fault.NotFound
	})
	if _, err := sb.Start(ctx, "late", sandbox.Cmd{Args: []string{"true"}}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("start in a dead sandbox: %v", err)
	}
	// The list tidies up: afterwards there is nothing for Destroy to do. The
	// kernel lets go of a dead process's lock a bit later than of its socket.
	eventually(t, "it is listed no more", func() bool {
		infos, err := p.List(ctx, nil)
		return err == nil && len(infos) == 0
	})
	if _, err := os.Lstat(p.boxPath("orphan")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is left: %v", err)
	}
}

func TestDestroyAndCreateTidyUpAfterADeadSupervisor(t *testing.T) {
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
			h, err := readHandle("test", ref)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(h.Supervisor.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := tidy(ref); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(p.boxPath(name)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the folder is left: %v", err)
			}
		})
	}
}

func TestDestroyDoesNotNeedTheSupervisor(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("stopped"))
	word := marker("a-supervisor-stopped")
	if _, err := sb.Start(t.Context(), "long", sandbox.Cmd{Args: []string{"sh", "-c", "while :; do sleep 1; done", word}}); err != nil {
		t.Fatal(err)
	}
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	stop(t, h.Supervisor.PID)
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if n := processesNaming(t, word) + processesNaming(t, p.dir); n > 0 {
		t.Errorf("%d processes are left", n)
	}
}

// stop returns when the process stands still.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is stopped", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && bytes.Contains(b, []byte(") T "))
	})
}

func TestCreateFinishesWhatAKilledWorkerBegan(t *testing.T) {
	p := newProvider(t)
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if f, err := os.Open(program); err != nil {
		// An ordinary user cannot name the program where the go command put it.
		program = copyOf(t, "/proc/self/exe")
	} else {
		f.Close()
	}
	gate := filepath.Join(t.TempDir(), "gate")
	slow := testOptions(p.dir)
	slow.Supervisor = []string{"/bin/sh", "-c", `while [ ! -e "$0" ]; do sleep 0.02; done; exec "$@"`, gate, program, supervisorWord}
	_, kill := startWorker(t, workerOrder{Options: slow, Spec: testSpec("half"), Script: "true"})
	var before record
	eventually(t, "the sandbox is half made", func() bool {
		b, err := os.ReadFile(filepath.Join(p.boxPath("half"), specFile))
		return err == nil && json.Unmarshal(b, &before) == nil
	})
	eventually(t, "the supervisor is started", func() bool { return processesNaming(t, p.boxPath("half")) > 0 })
	kill()
	// The supervisor has not begun: the next worker has to wait for it.
	made := make(chan sandbox.Ref, 1)
	go func() {
		ref, err := p.Create(context.Background(), testSpec("half"))
		if err != nil {
			t.Error(err)
		}
		made <- ref
	}()
	if err := os.WriteFile(gate, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	ref := <-made
	defer func() {
		if err := p.Destroy(context.Background(), ref); err != nil {
			t.Error(err)
		}
	}()
	if h, err := readHandle("test", ref); err != nil || h.Instance != before.Instance {
		t.Errorf("another sandbox was made: %+v, %v, want instance %s", h, err, before.Instance)
	}
}

func copyOf(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "copy")
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestCreateThatFailsLeavesNothing(t *testing.T) {
	p := newProvider(t)
	hopeless, cancel := context.WithTimeout(t.Context(), 3*time.Millisecond)
	defer cancel()
	for name, row := range map[string]struct {
		ctx        context.Context
		supervisor []string
	}{
		"cancelled":  {hopeless, testOptions("").Supervisor},
		"no program": {t.Context(), []string{"/no/such/supervisor"}},
		"dies":       {t.Context(), []string{"/bin/sh", "-c", "echo alas >&2; exit 1"}},
		"hangs":      {hopeless, []string{"/bin/sh", "-c", "exec sleep 1000"}},
		"chatters":   {t.Context(), []string{"/bin/sh", "-c", "echo hello there >&4"}},
	} {
		t.Run(name, func(t *testing.T) {
			o := testOptions(p.dir)
			o.Supervisor = row.supervisor
			ref, err := New(o).Create(row.ctx, testSpec("fails"))
			if err == nil {
				t.Fatalf("made %+v", ref)
			}
			if name == "dies" && !strings.Contains(err.Error(), "alas") {
				t.Errorf("the supervisor's last words are lost: %v", err)
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
		if err := os.MkdirAll(filepath.Join(dir, fsDir, "deep"), 0o700); err != nil {
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

func TestRefOfALaterOrEarlierSandboxIsNotFound(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("ref"))
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	other := h
	other.Instance = "0123456789abcdef"
	if _, err := p.Attach(t.Context(), other.ref()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("attach: %v", err)
	}
	if err := p.Destroy(t.Context(), other.ref()); err != nil {
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

func TestAReusedPIDIsNotKilled(t *testing.T) {
	cmd := self(t, workerWord, "{") // any process of ours; it is killed below
	cmd.Path, cmd.Args = "/bin/sleep", []string{"sleep", "1000"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []processID{{id.PID, id.Start + 1, id.Boot}, {id.PID, id.Start, "another boot"}} {
		if err := killProcess(t.Context(), wrong); err != nil {
			t.Error(err)
		}
		if now, err := identify(id.PID); err != nil || now != id {
			t.Fatalf("%+v was killed as %+v: %v", id, wrong, err)
		}
	}
	if err := killProcess(t.Context(), id); err != nil {
		t.Error(err)
	}
	if state, err := cmd.Process.Wait(); err != nil || state.Success() {
		t.Errorf("%v, %v", state, err)
	}
}

// A ref is in workflow history, where others may write. Which process is
// killed for it is not its decision.
func TestARefThatNamesAnotherProcessDoesNotKillIt(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("forged"))
	bystander := self(t)
	bystander.Path, bystander.Args = "/bin/sleep", []string{"sleep", "1000"}
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = bystander.Process.Kill()
		_ = bystander.Wait()
	}()
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	own := h.Supervisor
	if h.Supervisor, err = identify(bystander.Process.Pid); err != nil {
		t.Fatal(err)
	}
	stop(t, own.PID) // one that does not answer is killed
	if err := p.Destroy(t.Context(), h.ref()); err != nil {
		t.Fatal(err)
	}
	if now, err := identify(bystander.Process.Pid); err != nil || now != h.Supervisor {
		t.Errorf("the bystander was killed: %v", err)
	}
	// It is our child: what is left of it goes when somebody has waited for it.
	eventually(t, "the supervisor is dead", func() bool {
		now, err := identify(own.PID)
		return err != nil || now != own
	})
}

// What a ref holds is all that history ever holds of a sandbox.
func TestARefHoldsNoMoreThanTheNamesOfTwoProcesses(t *testing.T) {
	p := newProvider(t)
	s := testSpec("plain")
	s.Gateway = "unix:/no/such/secret-gateway"
	s.Labels = map[string]string{"run": "secret-run"}
	ref, _ := newSandbox(t, p, s)
	var fields map[string]any
	if err := json.Unmarshal([]byte(ref.Handle), &fields); err != nil {
		t.Fatal(err)
	}
	super, _ := fields["supervisor"].(map[string]any)
	if len(fields) != 3 || fields["key"] != "plain" || fields["instance"] == "" || len(super) != 3 || super["pid"] == nil || super["start"] == nil || super["boot"] == nil {
		t.Errorf("handle %s", ref.Handle)
	}
	if ref.Version != refVersion || ref.Provider != ProviderName || ref.ID != "plain" {
		t.Errorf("%+v", ref)
	}
}

// An upgrade replaces the program while supervisors of the old one run.
func TestASandboxOutlivesTheProgramThatMadeIt(t *testing.T) {
	p := newProvider(t)
	old := copyOf(t, "/proc/self/exe")
	o := testOptions(p.dir)
	o.Supervisor = []string{old, supervisorWord}
	ref, kill := startWorker(t, workerOrder{Options: o, Spec: testSpec("upgraded"), Script: "while [ ! -e go ]; do sleep 0.02; done; exit 7"})
	r := ref()
	kill()
	if err := os.Remove(old); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(old, []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	defer func() {
		if err := p.Destroy(context.Background(), r); err != nil {
			t.Error(err)
		}
	}()
	sb, err := p.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	if out := script(t, sb, "new", "touch go; echo started"); out != "started" {
		t.Error(out)
	}
	proc, err := sb.Process(ctx, "job")
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := proc.Wait(ctx); err != nil || exit.Code != 7 {
		t.Errorf("%+v, %v", exit, err)
	}
}

func TestASupervisorSaysWhatItDoesNotKnow(t *testing.T) {
	p := newProvider(t)
	_, sb := newSandbox(t, p, testSpec("future"))
	_, err := sb.ask(t.Context(), "test", request{Op: "a-thing-of-next-year"})
	if fault.KindOf(err) != fault.Unsupported || fault.HintOf(err) == "" {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
}

func TestStrangersBytesDoNotHurtTheSupervisor(t *testing.T) {
	p := newProvider(t)
	_, sb := newSandbox(t, p, testSpec("bytes"))
	for _, b := range [][]byte{nil, {0}, {0xff, 0xff, 0xff, 0xff}, append([]byte{0, 0, 0, 5}, "hello"...), append([]byte{0, 0, 0, 2}, "{}"...), bytes.Repeat([]byte{0}, 1<<16)} {
		c, err := sb.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(b) // the supervisor may have hung up
		c.Close()
	}
	if err := sb.Health(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPathsThatAreTooLongForTheKernelAreRefused(t *testing.T) {
	parent := newProvider(t).dir
	long := "/" + strings.Repeat("a-long-name-of-a-folder-in-between/", 120) + "end"
	_, err := New(testOptions(filepath.Join(parent, long))).Create(t.Context(), testSpec("long"))
	if fault.KindOf(err) != fault.Invalid {
		t.Errorf("a state folder: %v", err)
	}
	for what, change := range map[string]func(*sandbox.Spec){
		"a gateway": func(s *sandbox.Spec) { s.Gateway = "unix:" + long },
		"a source":  func(s *sandbox.Spec) { s.Mounts = []sandbox.Mount{{Source: long, Target: "/opt/x"}} },
		"a target":  func(s *sandbox.Spec) { s.Mounts = []sandbox.Mount{{Source: "/usr/bin/env", Target: long}} },
	} {
		s := testSpec("long")
		change(&s)
		if _, err := New(testOptions(parent)).Create(t.Context(), s); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", what, err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(parent, sandboxesDir, "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestADeepStateFolderWorks(t *testing.T) {
	deep := filepath.Join(newProvider(t).dir, strings.Repeat("a-long-name-of-a-folder-in-between/", 12))
	p := New(testOptions(deep))
	ref, sb := newSandbox(t, p, testSpec(strings.Repeat("k", 64)))
	if out := script(t, sb, "say", "echo deep"); out != "deep" {
		t.Error(out)
	}
	if err := p.Freeze(t.Context(), ref, "deep"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("fork")
	s.Base = "deep"
	_, fork := newSandbox(t, p, s)
	if out := script(t, fork, "say", "echo deeper"); out != "deeper" {
		t.Error(out)
	}
}
