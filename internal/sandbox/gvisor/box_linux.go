package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"path/filepath"
	"strconv"
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
	programsDir  = "programs"
	trashDir     = "trash"
	locksDir     = "locks"
	newPrefix    = ".new-" // what does not have its name yet; no key begins so, see keyName
)

// Names in the folder of a sandbox.
const (
	specFile   = "spec.json"
	pausedFile = "paused"   // there while the sandbox is
	refFile    = "ref.json" // written when commands can be started
	lifeFile   = "life"     // locked for as long as the guardian lives
	logFile    = "log"      // what the guardian, runsc and init have to say
	socketFile = "control.sock"
	configFile = "config.json" // for runsc
	rootFile   = "root.erofs"
	upperDir   = "upper"  // gVisor keeps one file in it
	outputDir  = "output" // and in this one: what processes say is not the agent's to bound
	stateDir   = "state"  // runsc's
	emptyDir   = "empty"
	stageFile  = "base.erofs" // a base before it has its name
)

// keyName turns a key, which may be "..", into a file name.
func keyName(key string) string { return "k-" + key }

func basePath(dir, key string) string {
	return filepath.Join(dir, basesDir, keyName(key)+imageSuffix)
}

// makeState makes the folders. What is in them is nobody else's business.
func makeState(op, dir string) error {
	for _, sub := range []string{sandboxesDir, basesDir, programsDir, trashDir, locksDir} {
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

// contextFault gives an error its operation, and the kind that ctx decides when
// ctx is what ended it.
func contextFault(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		kind := fault.Cancelled
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			kind = fault.Unavailable // the caller's patience, not a limit of the user
		}
		return fault.New(op, kind, "%w", errors.Join(context.Cause(ctx), err))
	}
	return fileFault(op, err)
}

// lockKey keeps all other workers from changing what belongs to the key.
// There are 64 locks for all keys, so that the files need no tidying.
func (p *Provider) lockKey(ctx context.Context, key string, wait bool) (*os.File, error) {
	h := fnv.New32a()
	h.Write([]byte(key))
	name := filepath.Join(p.dir, locksDir, fmt.Sprintf("%02x", h.Sum32()%64))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock(ctx, f, wait); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

var errLocked = errors.New("locked by somebody else")

// lock takes the lock of f. The lock belongs to the open file: it is let go
// when every copy of the descriptor, in whatever process, is closed. A
// blocking flock cannot be called off, so it is asked for again and again.
func lock(ctx context.Context, f *os.File, wait bool) error {
	return lockAs(ctx, f, unix.LOCK_EX, wait)
}

// lockAs is lock for LOCK_EX or LOCK_SH.
func lockAs(ctx context.Context, f *os.File, how int, wait bool) error {
	for step := time.Millisecond; ; step = min(2*step, 50*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if !wait {
			return errLocked
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(step):
		}
	}
}

// A box is the opened folder of one sandbox. What is opened through it is
// that sandbox's, even when another one has taken its place under the key.
type box struct {
	path string
	dir  *os.File
}

func openBox(path string) (*box, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &box{path: path, dir: os.NewFile(uintptr(fd), path)}, nil
}

func (b *box) Close() error { return b.dir.Close() }

func (b *box) open(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(b.dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(b.path, name), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(b.path, name)), nil
}

// at names a file of the box in a few bytes: the address of a unix socket
// holds 108, and state folders are deeper than that.
func (b *box) at(name string) string {
	return filepath.Join("/proc/self/fd", strconv.Itoa(int(b.dir.Fd())), name)
}

func (b *box) readJSON(name string, v any) error {
	f, err := b.open(name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRequest))
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return nil
}

// writeJSON puts the file there whole or not at all.
func (b *box) writeJSON(name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	temp := name + ".tmp"
	f, err := b.open(temp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := unix.Renameat(int(b.dir.Fd()), temp, int(b.dir.Fd()), name); err != nil {
		return &os.LinkError{Op: "rename", Old: temp, New: filepath.Join(b.path, name), Err: err}
	}
	return nil
}

// life opens the file whose lock says that the guardian lives. The caller
// closes it, and holds the lock until then when it was granted.
func (b *box) life(ctx context.Context, wait bool) (*os.File, error) {
	f, err := b.open(lifeFile, unix.O_RDWR)
	if err != nil {
		return nil, err
	}
	if err := lock(ctx, f, wait); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// lastWords reads the end of the log.
func (b *box) lastWords() string {
	f, err := b.open(logFile, unix.O_RDONLY)
	if err != nil {
		return "and left no log"
	}
	defer f.Close()
	buf := make([]byte, 2048)
	st, err := f.Stat()
	if err != nil {
		return "and left no log"
	}
	n, _ := f.ReadAt(buf, max(0, st.Size()-int64(len(buf))))
	return strings.ToValidUTF8(strings.TrimSpace(string(buf[:n])), "�")
}

// bury frees everything of a sandbox whose guardian is dead, and whose key
// the caller has locked or whose folder lies in the trash already.
func (b *box) bury(ctx context.Context, dir string) error {
	var r record
	if err := b.readJSON(specFile, &r); err == nil && validInstance(r.Instance) {
		// The kernel is killing what the guardian has started, or has done so.
		if err := errors.Join(cgroup.Open(r.Cgroups).Remove(ctx), awaitDeath(ctx, r.Instance)); err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return b.remove(dir, r.Instance)
}

// remove takes the folder out of the way at once, under a name that no other
// sandbox ever has, and then deletes it. All that is in it is ours. The life
// file goes last: who finds the folder in the trash can wait for whoever is
// deleting it.
func (b *box) remove(dir, instance string) error {
	trash := filepath.Join(dir, trashDir)
	at := b.path
	if filepath.Dir(at) != trash {
		if !validInstance(instance) {
			instance = newInstance()
		}
		at = filepath.Join(trash, instance)
		if err := os.Rename(b.path, at); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	entries, err := os.ReadDir(at)
	if err != nil {
		return ignoreGone(err)
	}
	for _, e := range entries {
		if e.Name() != lifeFile {
			if err := os.RemoveAll(filepath.Join(at, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(at)
}

// awaitDeath kills every process of this host that is runsc's for the
// instance, whose name is in its command line, and returns when there is none.
// It does so after the death of a guardian only, when the kernel has sent
// those processes a signal already: so there is hardly ever one to be found.
func awaitDeath(ctx context.Context, instance string) error {
	for {
		alive, err := killProcesses(func(args []string) bool {
			return len(args) > 2 && strings.HasPrefix(filepath.Base(args[0]), "runsc") && args[len(args)-1] == instance
		})
		if err != nil || alive == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// killProcesses kills those processes of this host whose command line is
// chosen, and returns how many there were. A dead process has none.
func killProcesses(chosen func(args []string) bool) (int, error) {
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	killed := 0
	is := func(name string) bool {
		line, err := os.ReadFile(name)
		return err == nil && chosen(strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"))
	}
	for _, name := range names {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil || !is(name) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it is dead
		}
		// The descriptor holds on to whichever process has the number now. An
		// error: it is dead, or another user's who gave it such a name.
		if is(name) && unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil {
			killed++
		}
		unix.Close(fd)
	}
	return killed, nil
}

// sweep deletes what workers and guardians that were killed left half done.
func (p *Provider) sweep(ctx context.Context) error {
	errs := []error{p.sweepPrograms(), p.sweepBases(), sweepGroups()}
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
	b, err := openBox(path)
	if err != nil {
		return ignoreGone(err)
	}
	defer b.Close()
	life, err := b.life(ctx, false)
	switch {
	case errors.Is(err, errLocked):
		return nil // somebody is at work on it
	case errors.Is(err, os.ErrNotExist):
		// Just being made, or just being deleted, unless it stays so.
		var st unix.Stat_t
		if unix.Fstat(int(b.dir.Fd()), &st) != nil || time.Since(time.Unix(st.Mtim.Unix())) < time.Minute {
			return nil
		}
	case err != nil:
		return err
	default:
		defer life.Close()
	}
	return b.bury(ctx, p.dir)
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
