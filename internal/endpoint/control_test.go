package endpoint

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestCommandTalksToTheEngineHoweverDeepTheFolder(t *testing.T) {
	for name, deep := range map[string]bool{"short": false, "deep": true} {
		t.Run(name, func(t *testing.T) {
			dir := stateDir(t, deep)
			if deep && len(dir) < 200 {
				t.Fatalf("%d bytes are not deep", len(dir))
			}
			cmd, _ := spawn(t, "engine", dir)
			c := Dial(dir)
			if err := c.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			var status struct{ PID int }
			if err := c.Ping(t.Context(), &status); err != nil || status.PID != cmd.Process.Pid {
				t.Errorf("status %+v, %v", status, err)
			}
			st, err := os.Stat(filepath.Join(dir, socketName))
			if err != nil || st.Mode() != os.ModeSocket|0o600 {
				t.Errorf("socket: %v, %v", st, err)
			}
			for _, secret := range []string{"first", "second"} {
				if err := c.SetSecrets(t.Context(), []byte(secret)); err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(filepath.Join(dir, "secrets")); err != nil || string(got) != secret {
					t.Errorf("engine has %q, %v", got, err)
				}
			}
			if err := c.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(cmd.Process.Pid, 0); err == nil && alive(cmd.Process.Pid, 0) {
				t.Error("it runs still")
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("it ended with %v", err)
			}
			if _, err := os.Stat(filepath.Join(dir, socketName)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket stays: %v", err)
			}
			wantKind(t, c.Stop(t.Context()), fault.NotFound)
			wantKind(t, c.SetSecrets(t.Context(), nil), fault.NotFound)
		})
	}
}

func TestFaultOfTheEngineReachesTheCommand(t *testing.T) {
	dir := stateDir(t, false)
	spawn(t, "engine", dir)
	err := Dial(dir).SetSecrets(t.Context(), []byte("refuse"))
	wantKind(t, err, fault.Full)
	if fault.HintOf(err) != "Make room." {
		t.Errorf("hint %q", fault.HintOf(err))
	}
	wantKind(t, Dial(dir).SetSecrets(t.Context(), make([]byte, MaxSecrets+1)), fault.Invalid)
	if err := Dial(dir).SetSecrets(t.Context(), bytes.Repeat([]byte("x"), MaxSecrets)); err != nil {
		t.Error(err)
	}
}

// serve runs Serve in this process.
func serve(t *testing.T, c Control) (*Client, context.CancelFunc, <-chan error) {
	t.Helper()
	dir := stateDir(t, false)
	l, err := Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := l.Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, c) }()
	t.Cleanup(func() {
		cancel()
		_ = l.Release()
	})
	return Dial(dir), cancel, done
}

func TestServeEndsWithItsContextAndStopsOnce(t *testing.T) {
	var stops atomic.Int32
	stopped := make(chan struct{})
	c, cancel, done := serve(t, Control{Stop: func() {
		if stops.Add(1) == 1 {
			close(stopped)
		}
	}})
	short, end := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer end()
	// This process does not go away, so the wait for that runs out.
	wantKind(t, c.Stop(short), fault.Timeout)
	<-stopped
	gone, end := context.WithCancel(t.Context())
	end()
	wantKind(t, c.Stop(gone), fault.Cancelled)
	again, end := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer end()
	wantKind(t, c.Stop(again), fault.Timeout)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := stops.Load(); n != 1 {
		t.Errorf("Stop was called %d times", n)
	}
	wantKind(t, c.Ping(t.Context(), nil), fault.NotFound)
}

func TestEngineWithoutAbilitiesSaysSo(t *testing.T) {
	c, _, _ := serve(t, Control{})
	wantKind(t, c.Stop(t.Context()), fault.Unsupported)
	wantKind(t, c.SetSecrets(t.Context(), nil), fault.Unsupported)
	if err := c.Ping(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestReadyWaitsForAnEngineThatIsYetToCome(t *testing.T) {
	dir := stateDir(t, false)
	got := make(chan error, 1)
	go func() { got <- Dial(dir).Ready(t.Context()) }()
	spawn(t, "engine", dir)
	if err := <-got; err != nil {
		t.Error(err)
	}
	short, end := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer end()
	wantKind(t, Dial(stateDir(t, false)).Ready(short), fault.Timeout)
}

func TestEngineThatHangsIsNotWaitedForLongerThanAsked(t *testing.T) {
	dir := stateDir(t, false)
	cmd, _ := spawn(t, "engine", dir)
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// It does not stop at once.
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatal(status, err)
	}
	short, end := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer end()
	wantKind(t, Dial(dir).Ping(short, nil), fault.Timeout)
}

func TestOnlyTheOwnerAndRootAreAdmitted(t *testing.T) {
	for _, tt := range []struct {
		peer, us int
		want     bool
	}{{1000, 1000, true}, {0, 1000, true}, {0, 0, true}, {1001, 1000, false}, {1000, 0, false}} {
		if got := admitted(tt.peer, tt.us); got != tt.want {
			t.Errorf("peer %d, us %d: %v", tt.peer, tt.us, got)
		}
	}
}

// TestStrangerIsCutOff opens the folder and the socket wide, as a careless
// chmod would, and has another user knock.
func TestStrangerIsCutOff(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("becoming another user takes root")
	}
	dir, err := os.MkdirTemp("/tmp", "endpoint") // strangers cannot enter the parent of t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	spawn(t, "engine", dir)
	for path, mode := range map[string]os.FileMode{dir: 0o777, filepath.Join(dir, socketName): 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if _, got := spawn(t, "user 0", dir); got == "0" {
		t.Error("root got no answer, so this test shows nothing")
	}
	if _, got := spawn(t, "user 65534", dir); got != "0" {
		t.Errorf("a stranger got %s bytes", got)
	}
}

var _ net.Listener = (*guarded)(nil)
