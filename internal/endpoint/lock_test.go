package endpoint

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestSecondEngineIsToldWhoHoldsTheLock(t *testing.T) {
	dir := stateDir(t, false)
	cmd, _ := spawn(t, "engine", dir)
	_, err := Acquire(dir)
	wantKind(t, err, fault.Conflict)
	if want := fmt.Sprintf("pid %d", cmd.Process.Pid); !strings.Contains(err.Error(), want) {
		t.Errorf("%v does not say %q", err, want)
	}
	if fault.HintOf(err) == "" {
		t.Error("no hint")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	l, err := Acquire(dir)
	if err != nil {
		t.Fatalf("after its holder was killed: %v", err)
	}
	_, err = Acquire(dir)
	wantKind(t, err, fault.Conflict)
	for range 2 {
		if err := l.Release(); err != nil {
			t.Error(err)
		}
	}
	if _, err := l.Listen(); err == nil {
		t.Error("a lock that was released listens")
	}
	if l, err = Acquire(dir); err != nil {
		t.Fatal(err)
	}
	_ = l.Release()
}

func TestCommandsThatStartTogetherStartOneEngine(t *testing.T) {
	dir := stateDir(t, false)
	const commands = 6
	says := make(chan string, commands)
	for range commands {
		go func() {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), roleEnv+"=starter:"+dir)
			out, err := cmd.Output()
			says <- fmt.Sprintf("%s %v", strings.TrimSpace(string(out)), err)
		}()
	}
	t.Cleanup(func() {
		if e, err := Read(dir); err == nil && e.Alive() {
			_ = syscall.Kill(e.PID, syscall.SIGKILL)
		}
	})
	started, pids := 0, map[string]bool{}
	for range commands {
		f := strings.Fields(<-says)
		if len(f) != 3 || f[2] != "<nil>" {
			t.Fatalf("a command said %q", f)
		}
		pids[f[1]] = true
		if f[0] == "started" {
			started++
		}
	}
	if started != 1 || len(pids) != 1 {
		t.Errorf("%d engines were started: %v", started, pids)
	}
	if err := Dial(dir).Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAcquireStartWaitsAndEndsWithItsContext(t *testing.T) {
	dir := stateDir(t, false)
	first, err := AcquireStart(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	short, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	_, err = AcquireStart(short, dir)
	wantKind(t, err, fault.Timeout)

	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = AcquireStart(cancelled, dir)
	wantKind(t, err, fault.Cancelled)

	got := make(chan error, 1)
	go func() {
		l, err := AcquireStart(t.Context(), dir)
		if err == nil {
			err = l.Release()
		}
		got <- err
	}()
	if err := first.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestStateFolderThatOthersCanEnterIsRefused(t *testing.T) {
	for _, mode := range []os.FileMode{0o755, 0o770, 0o701, 0o500} {
		dir := stateDir(t, false)
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		_, err := Acquire(dir)
		wantKind(t, err, fault.Denied)
		if !strings.Contains(fault.HintOf(err), "chmod 700 "+dir) {
			t.Errorf("hint: %s", fault.HintOf(err))
		}
		wantKind(t, Write(dir, Endpoint{Address: "x"}), fault.Denied)
	}
}

func TestStateFolderOfAnotherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving a folder away takes root")
	}
	dir := stateDir(t, false)
	if err := os.Chown(dir, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	_, err := Acquire(dir)
	wantKind(t, err, fault.Denied)
}

func TestStateFolderThatCannotBeMadeNamesTheVariable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Neither can root make folders there.
	for _, dir := range []string{
		filepath.Join(file, "state"),
		filepath.Join(t.TempDir(), strings.Repeat("x", 300)),
	} {
		_, err := Acquire(dir)
		wantKind(t, err, fault.Invalid)
		if !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_HOME") {
			t.Errorf("%s: hint %q", dir, fault.HintOf(err))
		}
	}
	for _, errno := range []syscall.Errno{syscall.EACCES, syscall.EPERM, syscall.EROFS} {
		err := diskFault("x", "/d", &os.PathError{Op: "open", Path: "/d/f", Err: errno})
		wantKind(t, err, fault.Denied)
		if !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_HOME") {
			t.Errorf("%v: hint %q", errno, fault.HintOf(err))
		}
	}
	wantKind(t, diskFault("x", "/d", syscall.ENOSPC), fault.Full)
}

func TestUnwritableStateFolderIsDenied(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may write everywhere")
	}
	parent := t.TempDir()
	if err := os.Chmod(parent, 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(parent, 0o700) })
	_, err := Acquire(filepath.Join(parent, "state"))
	wantKind(t, err, fault.Denied)
}
