package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// Names in the state folder.
const (
	sandboxesDir = "sandboxes"
	basesDir     = "bases"
	trashDir     = "trash"
	locksDir     = "locks"
	newPrefix    = ".new-" // a sandbox's folder before it has its name; no key begins so, see keyName
)

// Names in the folder of a sandbox.
const (
	specFile   = "spec.json"
	refFile    = "ref.json" // written when commands can be started
	lifeFile   = "life"     // locked for as long as the supervisor lives; holds what one that is killed leaves behind
	logFile    = "log"      // what the supervisor and init have to say
	socketFile = "control.sock"
	pausedFile = "paused" // there while the sandbox is paused
	fsDir      = "fs"
	workDir    = "work"
	stageDir   = "base" // a base before it has its name; one that is copied has an instance behind it
)

// keyName turns a key, which may be "..", into a file name.
func keyName(key string) string { return "k-" + key }

// A remains is what has to be looked for after a supervisor was killed.
type remains struct {
	Init    processID `json:"init"`
	Cgroups []string  `json:"cgroups,omitempty"` // absolute paths; made by this sandbox and by nobody else
}

// makeState makes the folders. What is in them is nobody else's business.
func makeState(op, dir string) error {
	for _, sub := range []string{sandboxesDir, basesDir, trashDir, locksDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return fileFault(op, err)
		}
	}
	return nil
}

// fileFault gives an error of the file system its kind.
func fileFault(op string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(op, fault.Full, "%w", err).Hinted("Free some space on the disk of the state folder.")
	}
	return fault.Wrap(op, err)
}

// lockKey keeps all other workers from changing what belongs to the key.
// There are 64 locks for all keys, so that the files need no tidying.
func (p *Provider) lockKey(ctx context.Context, key string, wait bool) (*os.File, error) {
	h := fnv.New32a()
	h.Write([]byte(key))
	return lockFile(ctx, p.dir, fmt.Sprintf("%02x", h.Sum32()%64), unix.LOCK_EX, wait)
}

// lockFile takes the lock of a file in locksDir. It is let go when the file is
// closed.
func lockFile(ctx context.Context, dir, name string, how int, wait bool) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, locksDir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockAs(ctx, f, how, wait); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

var errLocked = errors.New("locked by somebody else")

// lock takes the lock of f. The lock belongs to the open file: it is let go
// when every copy of the descriptor, in whatever process, is closed. When it
// fails because of ctx, f must be closed by nobody but the caller, later: the
// lock may still be granted, and goes away with f.
func lock(ctx context.Context, f *os.File, wait bool) error {
	return lockAs(ctx, f, unix.LOCK_EX, wait)
}

// lockAs is lock, with how as in flock(2): shared or exclusive.
func lockAs(ctx context.Context, f *os.File, how int, wait bool) error {
	fd := int(f.Fd())
	err := unix.Flock(fd, how|unix.LOCK_NB)
	if err == nil || !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	if !wait {
		return errLocked
	}
	// A blocking flock cannot be called off. It waits on a copy of the
	// descriptor, which is the same lock, and gives it back when nobody
	// wants it any more.
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(dup, how)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if ctx.Err() != nil {
				_ = unix.Flock(dup, unix.LOCK_UN)
			}
			unix.Close(dup)
			got <- err
			return
		}
	}()
	select {
	case err := <-got:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A folder is the opened folder of one sandbox. What is opened through it is
// that sandbox's, even when another one has taken its place under the key.
type folder struct {
	path string
	dir  *os.File
}

func openFolder(path string) (*folder, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &folder{path: path, dir: os.NewFile(uintptr(fd), path)}, nil
}

// instance returns that of a sandbox whose folder has no name yet.
func (f *folder) instance() string {
	return strings.TrimPrefix(filepath.Base(f.path), newPrefix)
}

func (f *folder) fd() int { return int(f.dir.Fd()) }

func (f *folder) Close() error { return f.dir.Close() }

// open opens a file of the folder. There are no links in what is ours.
func (f *folder) open(name string, flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(f.fd(), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(f.path, name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(f.path, name)), nil
}

func (f *folder) readJSON(name string, v any) error {
	file, err := f.open(name, unix.O_RDONLY|unix.O_NONBLOCK, 0) // who opens a pipe would wait
	if err != nil {
		return err
	}
	defer file.Close()
	if st, err := file.Stat(); err != nil || !st.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%s is not a file", file.Name()), err)
	}
	b, err := readSmall(file, maxRequest)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", file.Name(), err)
	}
	return nil
}

// writeJSON puts the file there whole or not at all.
func (f *folder) writeJSON(name string, v any) error {
	return f.replaceJSON(name, v, func(*os.File) error { return nil })
}

// replaceJSON is writeJSON that syncs the file before it has its name.
func (f *folder) replaceJSON(name string, v any, sync func(*os.File) error) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	temp := name + ".tmp"
	file, err := f.open(temp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = file.Write(b); err == nil {
		err = sync(file)
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err := unix.Renameat(f.fd(), temp, f.fd(), name); err != nil {
		return &os.LinkError{Op: "rename", Old: temp, New: filepath.Join(f.path, name), Err: err}
	}
	return nil
}

// life opens the file whose lock says that the supervisor lives. The caller
// closes it, and holds the lock until then when it was granted.
func (f *folder) life(ctx context.Context, wait bool) (*os.File, error) {
	file, err := f.open(lifeFile, unix.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := lock(ctx, file, wait); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// writeRemains adds a line to the life file, in which the last one holds: a
// file of its own, written twice, would cost more than all else that is
// written here. A line is there whole or not at all, as the kernel lets the
// file grow only after the bytes.
func (f *folder) writeRemains(left remains) error {
	line, err := json.Marshal(left)
	if err != nil {
		return err
	}
	file, err := f.open(lifeFile, unix.O_WRONLY|unix.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(append(line, '\n'))
	return errors.Join(err, file.Close())
}

// readRemains returns nothing when nothing was written. A line that is not
// whole was written before the machine went down, and what it told of went
// down with it.
func (f *folder) readRemains() (left remains, err error) {
	file, err := f.open(lifeFile, unix.O_RDONLY, 0)
	if err != nil {
		return left, ignoreGone(err)
	}
	defer file.Close()
	b, err := readSmall(file, maxRequest)
	if err != nil {
		return left, err
	}
	for line := range bytes.Lines(b) {
		var l remains
		if json.Unmarshal(line, &l) == nil {
			left = l
		}
	}
	return left, nil
}

// bury frees everything of a sandbox whose supervisor is dead, and whose key
// the caller has locked or whose folder lies in the trash already.
func (f *folder) bury(ctx context.Context, dir string) error {
	left, err := f.readRemains()
	if err != nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if left.Init.Boot == boot {
		if err := killProcess(ctx, left.Init); err != nil {
			return err
		}
	}
	if err := cgroup.Open(left.Cgroups).Remove(ctx); err != nil {
		return err
	}
	return f.remove(dir)
}

// remove takes the folder out of the way at once, under a name that no other
// sandbox ever has, and then deletes it. The life file goes last: who finds
// the folder in the trash can wait for whoever is deleting it.
func (f *folder) remove(dir string) error {
	var r record
	trash := filepath.Join(dir, trashDir)
	at := f.path
	if filepath.Dir(f.path) != trash {
		name := newInstance()
		if err := f.readJSON(specFile, &r); err == nil && validInstance(r.Instance) {
			name = r.Instance
		}
		at = filepath.Join(trash, name)
		if err := os.Rename(f.path, at); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return removeTree(at, lifeFile)
}

// sweep deletes what workers and supervisors that were killed left half done.
func (p *Provider) sweep(ctx context.Context) error {
	errs := []error{cgroup.Find().Sweep(time.Now(), validInstance), p.trimBases(ctx)}
	for _, sub := range []string{trashDir, sandboxesDir} {
		entries, err := os.ReadDir(filepath.Join(p.dir, sub))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if sub == sandboxesDir && !strings.HasPrefix(e.Name(), newPrefix) {
				continue
			}
			errs = append(errs, p.sweepOne(ctx, filepath.Join(p.dir, sub, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func (p *Provider) sweepOne(ctx context.Context, path string) error {
	f, err := openFolder(path)
	if err != nil {
		return ignoreGone(err)
	}
	defer f.Close()
	life, err := f.life(ctx, false)
	switch {
	case errors.Is(err, errLocked):
		return nil // somebody is at work on it
	case errors.Is(err, os.ErrNotExist):
		// Just being made, or just being deleted, unless it stays so.
		var st unix.Stat_t
		if unix.Fstat(f.fd(), &st) != nil || time.Since(time.Unix(st.Mtim.Unix())) < time.Minute {
			return nil
		}
	case err != nil:
		return err
	default:
		defer life.Close()
	}
	return f.bury(ctx, p.dir)
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
