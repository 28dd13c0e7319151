package endpoint

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Lock is the right to be the one engine of a state folder, or the one
// command that starts it. The kernel takes it back when the process ends,
// also when it is killed. The file stays: removing it would let two processes
// hold locks of the same name.
type Lock struct {
	dir  string
	file *os.File
}

// Acquire takes the lock that an engine holds for as long as it lives. It does
// not wait: it is fault.Conflict when another process, or this one, has it.
func Acquire(dir string) (*Lock, error) {
	const op = "engine lock"
	l, err := open(op, dir, lockName)
	if err != nil {
		return nil, err
	}
	got, err := l.try()
	if err != nil {
		_ = l.Release()
		return nil, diskFault(op, dir, err)
	}
	if !got {
		who := l.holder()
		_ = l.Release()
		return nil, fault.New(op, fault.Conflict, "an engine runs in %s already%s", dir, who).
			Hinted("Use it, stop it with down, or set SANDBOX_TEMPORAL_HOME to another folder.")
	}
	// Only a courtesy to whoever comes second: the lock holds without it.
	if _, err := l.file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		_ = l.Release()
		return nil, diskFault(op, dir, err)
	}
	return l, nil
}

// retryStart is how often AcquireStart looks again. A wait in the kernel could
// not be ended with ctx.
const retryStart = 20 * time.Millisecond

// AcquireStart takes the lock under which a command starts an engine, so that
// two commands start one. It waits for its turn; the error is fault.Timeout or
// fault.Cancelled when ctx ends first. Whoever gets it looks again whether an
// engine runs by now.
func AcquireStart(ctx context.Context, dir string) (*Lock, error) {
	const op = "engine start lock"
	l, err := open(op, dir, startLockName)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(retryStart)
	defer tick.Stop()
	for {
		got, err := l.try()
		if err != nil {
			_ = l.Release()
			return nil, diskFault(op, dir, err)
		}
		if got {
			return l, nil
		}
		select {
		case <-ctx.Done():
			_ = l.Release()
			return nil, ended(ctx, op, "another command is starting the engine in "+dir)
		case <-tick.C:
		}
	}
}

// ended classes the end of ctx.
func ended(ctx context.Context, op, while string) error {
	kind := fault.Cancelled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		kind = fault.Timeout
	}
	return fault.New(op, kind, "%s: %w", while, ctx.Err())
}

func open(op, dir, name string) (*Lock, error) {
	if err := Prepare(dir); err != nil {
		return nil, fault.Wrap(op, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, diskFault(op, dir, err)
	}
	return &Lock{dir: dir, file: f}, nil
}

// try takes the lock if it is free.
func (l *Lock) try() (bool, error) {
	var got error
	raw, err := l.file.SyscallConn()
	if err != nil {
		return false, err
	}
	err = raw.Control(func(fd uintptr) {
		for {
			if got = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(got, unix.EINTR) {
				return
			}
		}
	})
	if err == nil {
		err = got
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// holder returns " (pid 123)" when the file says so.
func (l *Lock) holder() string {
	text, err := io.ReadAll(io.LimitReader(l.file, 32))
	first, _, _ := strings.Cut(string(text), "\n")
	if pid, convErr := strconv.Atoi(first); err == nil && convErr == nil && pid > 0 {
		return " (pid " + strconv.Itoa(pid) + ")"
	}
	return ""
}

// Dir returns the folder that is locked.
func (l *Lock) Dir() string { return l.dir }

// Release gives the lock back. A second call does nothing.
func (l *Lock) Release() error {
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	if err != nil {
		return fault.New("engine lock: release", fault.Internal, "%w", err)
	}
	return nil
}
