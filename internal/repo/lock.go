package repo

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A lock is an advisory lock on a file. The kernel drops it when the process
// that holds it dies, so there are no stale ones.
type lock struct{ f *os.File }

func (l *lock) unlock() { _ = l.f.Close() }

// acquire waits until the lock on path is had, shared or exclusive.
func acquire(ctx context.Context, path string, exclusive bool) (*lock, error) {
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		l, err := tryLock(path, exclusive)
		if err != nil || l != nil {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, contextFault(ctx)
		case <-time.After(wait):
		}
	}
}

// tryLock returns nil when somebody else has the lock.
func tryLock(path string, exclusive bool) (*lock, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, diskFault(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, diskFault(err)
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for {
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, diskFault(err)
	}
	// Whoever held the lock before may have removed the file: then this is a
	// lock on nothing, and the next who comes would not see it.
	mine, err1 := f.Stat()
	there, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(mine, there) {
		_ = f.Close()
		return nil, nil
	}
	return &lock{f}, nil
}

// A scratch is a folder for work in progress.
type scratch struct {
	dir  string
	lock *lock
}

// scratch makes a folder that goes away with close, or, when this process is
// killed, with the next call of scratch by anybody.
func (s *Store) scratch(ctx context.Context) (*scratch, error) {
	tmp := filepath.Join(s.dir, "tmp")
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return nil, diskFault(err)
	}
	sweep(tmp)
	dir := filepath.Join(tmp, randomName())
	l, err := acquire(ctx, dir+".lock", true)
	if err != nil {
		return nil, err
	}
	sc := &scratch{dir: dir, lock: l}
	if err := os.Mkdir(dir, 0o700); err != nil {
		sc.close()
		return nil, diskFault(err)
	}
	return sc, nil
}

func (sc *scratch) close() {
	_ = os.RemoveAll(sc.dir)
	_ = os.Remove(sc.dir + ".lock")
	sc.lock.unlock()
}

// sweep removes the folders whose owner is dead.
func sweep(tmp string) {
	entries, _ := os.ReadDir(tmp)
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".lock")
		if !ok {
			continue
		}
		dir := filepath.Join(tmp, name)
		if l, err := tryLock(dir+".lock", true); err == nil && l != nil {
			(&scratch{dir: dir, lock: l}).close()
		}
	}
}

// contextFault says why ctx ended.
func contextFault(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &fault.Error{Kind: fault.Unavailable, Err: context.Cause(ctx)}
	}
	return &fault.Error{Kind: fault.Cancelled, Err: context.Cause(ctx)}
}

// diskFault classes an error of the file system.
func diskFault(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return &fault.Error{Kind: fault.Full, Err: err, Hint: hintFull}
	case errors.Is(err, os.ErrPermission), errors.Is(err, unix.EROFS):
		return &fault.Error{Kind: fault.Denied, Err: err}
	}
	return err
}

const hintFull = "Free some space on the disk that holds the state folder, then try again."
