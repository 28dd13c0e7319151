package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Freeze stops everything in the group where it stands and returns when it
// does. A second call is no error. In v1 not even a SIGKILL works on what is
// frozen, until it is thawed.
func (g *Group) Freeze(ctx context.Context) error { return g.freeze(ctx, true) }

// Thaw lets the group go on. One that is not frozen is no error.
func (g *Group) Thaw(ctx context.Context) error { return g.freeze(ctx, false) }

func (g *Group) freeze(ctx context.Context, on bool) error {
	if g != nil {
		for _, p := range g.parts {
			if p.v1 == "" {
				return p.freeze(ctx, on)
			}
			if p.v1 == freezer {
				return p.freezeV1(ctx, on)
			}
		}
	}
	return errors.ErrUnsupported
}

func (p part) freeze(ctx context.Context, on bool) error {
	text := "0"
	if on {
		text = "1"
	}
	if err := write(p.path, "cgroup.freeze", text); err != nil {
		return err
	}
	return p.await(ctx, "frozen "+text)
}

func (p part) freezeV1(ctx context.Context, on bool) error {
	text := "THAWED"
	if on {
		text = "FROZEN"
	}
	return every(ctx, func() (bool, error) {
		// Written anew each time: a process that was born meanwhile keeps
		// the group at FREEZING (cgroup-v1/freezer-subsystem.rst).
		if err := write(p.path, "freezer.state", text); err != nil {
			return false, err
		}
		now := words(p.path, "freezer.state")
		return len(now) == 1 && now[0] == text, nil
	})
}

// await returns when the line stands in the group's events.
func (p part) await(ctx context.Context, line string) error {
	name := filepath.Join(p.path, "cgroup.events")
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var readErr error
	buf := make([]byte, 4096)
	waitErr := raw.Read(func(uintptr) bool {
		var n int
		n, readErr = unix.Pread(fd, buf, 0)
		return readErr != nil || strings.Contains(string(buf[:max(n, 0)]), line)
	})
	if ctx.Err() != nil {
		return fmt.Errorf("%s: waiting for %q: %w", p.path, line, context.Cause(ctx))
	}
	return errors.Join(waitErr, readErr)
}

// every asks again and again, in steps that grow: v1 tells nobody when it is
// done.
func every(ctx context.Context, ok func() (bool, error)) error {
	for step := time.Millisecond; ; step = min(2*step, 50*time.Millisecond) {
		if done, err := ok(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(step):
		}
	}
}

// Kill kills everything in the group, frozen or not, and returns when nobody
// lives in it any more.
func (g *Group) Kill(ctx context.Context) error {
	if g == nil {
		return nil
	}
	for _, p := range g.parts {
		if p.v1 != "" {
			continue
		}
		err := write(p.path, "cgroup.kill", "1") // since Linux 5.14
		if err == nil {
			err = p.await(ctx, "populated 0")
		}
		if ctx.Err() != nil {
			return err
		}
	}
	// Older kernels, and what lives in a part of v1 only.
	return every(ctx, func() (bool, error) {
		empty := true
		for _, p := range g.parts {
			for _, w := range words(p.path, "cgroup.procs") {
				empty = false
				if err := p.killOne(w); err != nil {
					return false, err
				}
			}
			if p.v1 == freezer {
				if err := write(p.path, "freezer.state", "THAWED"); ignoreGone(err) != nil {
					return false, err
				}
			}
		}
		return empty, nil
	})
}

// killOne kills the process when it still is in the group. Its number could
// have passed to somebody else since it was read.
func (p part) killOne(word string) error {
	pid, err := strconv.Atoi(word)
	if err != nil || pid <= 1 {
		return err // 0: of a pid namespace that we do not see
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	b, err := os.ReadFile("/proc/" + word + "/cgroup")
	if err != nil || !strings.Contains(string(b), "/"+filepath.Base(p.path)+"\n") {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return nil
}

// Remove kills what is in the group and removes its folders, and those of
// ours above them when no other group is left. What is gone already is no
// error, and what is no cgroup is left alone.
func (g *Group) Remove(ctx context.Context) error {
	if g == nil {
		return nil
	}
	g.Close()
	var errs []error
	for _, p := range g.parts {
		if isUnified(p.path) || isV1(p.path) {
			errs = append(errs, g.removePart(ctx, p))
		}
	}
	for _, p := range g.parts {
		removeFolder(filepath.Dir(p.path))
	}
	return errors.Join(errs...)
}

func (g *Group) removePart(ctx context.Context, p part) error {
	for {
		err := unix.Rmdir(p.path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return &os.PathError{Op: "rmdir", Path: p.path, Err: err}
		}
		if err := g.Kill(ctx); err != nil {
			return err
		}
	}
}

// removeFolder removes our own folder, unless there is another group in it.
func removeFolder(dir string) {
	if filepath.Base(dir) == folder && (isUnified(dir) || isV1(dir)) {
		_ = unix.Rmdir(dir) // the kernel refuses while it is of use
	}
}

// orphanAge is how long a group of ours stays empty before it is taken for
// one whose supervisor was killed and whose folder somebody deleted. Between
// its making and its first process lie milliseconds.
const orphanAge = 10 * time.Minute

// Sweep removes the groups whose name ours recognises, that are empty, and
// that nobody can be about to use.
func (p Place) Sweep(now time.Time, ours func(name string) bool) error {
	var errs []error
	above := []string{p.unified}
	for _, dir := range p.v1 {
		above = append(above, dir)
	}
	for _, dir := range above {
		if dir == "" || !isUnified(dir) && !isV1(dir) {
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			errs = append(errs, ignoreGone(err))
			continue
		}
		for _, e := range entries {
			name, found := strings.CutPrefix(e.Name(), prefix)
			if st, err := e.Info(); !found || !ours(name) || err != nil || now.Sub(st.ModTime()) < orphanAge {
				continue
			}
			path := filepath.Join(dir, e.Name())
			// The kernel refuses while anybody lives in it.
			if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, &os.PathError{Op: "rmdir", Path: path, Err: err})
			}
		}
		removeFolder(dir)
	}
	return errors.Join(errs...)
}
