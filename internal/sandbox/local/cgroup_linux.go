package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A sandbox has a cgroup of its own where the host lets us make one: it is
// how everything in it is killed at one stroke, and where limits will go.
// The pid namespace alone already sees to it that nothing outlives init.

const cgroupPrefix = "sandbox-temporal-"

// cgroupParent returns the folder below which we may make a cgroup, or ""
// when there is none.
func cgroupParent() string {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if !isCgroup(root) {
			continue
		}
		if os.Geteuid() == 0 && unix.Access(root, unix.W_OK) == nil {
			return root
		}
		own, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			return ""
		}
		// An ordinary user has what was delegated, and a process can be put
		// into a cgroup only by who may write to the common ancestor too.
		for line := range bytes.Lines(own) {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "0::"); ok {
				dir := filepath.Join(root, rest)
				if isCgroup(dir) && unix.Access(dir, unix.W_OK) == nil && unix.Access(filepath.Join(dir, "cgroup.procs"), unix.W_OK) == nil {
					return dir
				}
			}
		}
	}
	return ""
}

// isCgroup reports whether dir lies in a mounted cgroup2 file system. What
// looks like a cgroup can be a plain folder where one was mounted once.
func isCgroup(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// makeCgroup makes the folder and opens it.
func makeCgroup(path string) (*os.File, error) {
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// removeCgroup kills what is in the cgroup and removes it. Empty: there is
// none.
func removeCgroup(ctx context.Context, path string) error {
	if path == "" || !strings.HasPrefix(filepath.Base(path), cgroupPrefix) || !isCgroup(path) {
		return nil
	}
	for {
		err := unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return &os.PathError{Op: "rmdir", Path: path, Err: err}
		}
		if err := emptyCgroup(ctx, path); err != nil {
			return err
		}
	}
}

// emptyCgroup returns when nobody lives in the cgroup any more.
func emptyCgroup(ctx context.Context, path string) error {
	events, err := os.Open(filepath.Join(path, "cgroup.events"))
	if err != nil {
		return ignoreGone(err)
	}
	defer events.Close()
	if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); ignoreGone(err) != nil {
		return err
	}
	for {
		buf := make([]byte, 4096)
		n, err := events.ReadAt(buf, 0)
		if n == 0 && err != nil {
			if errors.Is(err, unix.ENODEV) {
				return nil // removed under us
			}
			return err
		}
		if !bytes.Contains(buf[:n], []byte("populated 1")) {
			return nil
		}
		if err := waitEvents(ctx, int(events.Fd()), unix.POLLPRI); err != nil {
			return fmt.Errorf("%s does not become empty: %w", path, err)
		}
	}
}

// orphanAge is how long a cgroup of ours stays empty before it is taken for
// one whose supervisor was killed and whose folder somebody deleted. Between
// its making and its first process lie milliseconds.
const orphanAge = 10 * time.Minute

// sweepCgroups removes the empty cgroups that carry a name of ours and that
// nobody can be about to use.
func sweepCgroups(parent string, now time.Time) error {
	if parent == "" {
		return nil
	}
	entries, err := os.ReadDir(parent)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		instance, ours := strings.CutPrefix(e.Name(), cgroupPrefix)
		path := filepath.Join(parent, e.Name())
		if !ours || !validInstance(instance) || !isCgroup(path) {
			continue
		}
		if st, err := e.Info(); err != nil || now.Sub(st.ModTime()) < orphanAge {
			continue
		}
		// The kernel refuses while anybody lives in it.
		if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "rmdir", Path: path, Err: err})
		}
	}
	return errors.Join(errs...)
}
