package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

// A workshop is what all engines share: one folder, and one base in it that
// all make their sandboxes over.
type workshop struct {
	options
	watch
	outer        string // the folder, and everything that is made lies below it
	dir          string // where the sandboxes lie
	where        string // what is to be said of that
	mark         string // stands in the command line of everything that an engine leaves running
	local        *local.Provider
	localOptions local.Options
	lower        string // the folder of the large base's work tree
}

// An engine makes sandboxes over the large base. Its methods are called from
// several goroutines, for different i.
type engine interface {
	name() string

	// open finds out whether the engine works here. errMissing: it does not,
	// and why.
	open(ctx context.Context) error

	// create returns when the first command, /bin/true, has ended.
	create(ctx context.Context, i int) error
	exec(ctx context.Context, i int) error
	destroy(ctx context.Context, i int) error

	// close removes whatever is left. It is called once, also after open has
	// failed.
	close(ctx context.Context) error
}

// A pauser is an engine that can hold a sandbox still.
type pauser interface {
	pause(ctx context.Context, i int) error
	resume(ctx context.Context, i int) error
}

// errMissing is why an engine is not measured.
type errMissing string

func (e errMissing) Error() string { return string(e) }

// newWorkshop makes the folder and the large base.
func newWorkshop(ctx context.Context, o options) (w *workshop, err error) {
	supervisor, err := filepath.Abs(o.supervisor)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(supervisor); err != nil {
		return nil, fmt.Errorf("the supervisor program is not there (-supervisor): %w", err)
	}
	if o.dir != "" {
		if err := os.MkdirAll(o.dir, 0o755); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(o.dir, "sandbox-bench-")
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	// Others than the owner pass through: an engine may run as nobody.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	w = &workshop{options: o, outer: dir, mark: filepath.Base(dir)}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close(context.WithoutCancel(ctx)))
		}
	}()
	if err := w.settle(ctx); err != nil {
		return nil, err
	}
	state := filepath.Join(w.dir, "state")
	w.localOptions = local.Options{Dir: state, Supervisor: []string{supervisor}, Spares: local.DefaultSpares}
	w.local = local.New(w.localOptions)
	o.logf("making a base of %d files", o.files)
	if err := w.makeBase(ctx, largeBase, o.files); err != nil {
		return nil, err
	}
	w.lower = filepath.Join(state, "bases", "k-"+largeBase, "fs", "workspace")
	if _, err := os.Stat(filepath.Join(w.lower, ".git")); err != nil {
		return nil, fmt.Errorf("the base has another layout than this program knows: %w", err)
	}
	return w, nil
}

// Names of bases.
const (
	largeBase = "large"
	smallBase = "small"
)

// makeBase prepares a sandbox the way forks' bases are, by commands in it, and
// freezes it.
func (w *workshop) makeBase(ctx context.Context, key string, files int) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	const tool = sandbox.ProgramDir + "/benchmark"
	ref, err := w.local.Create(ctx, sandbox.Spec{
		Key: "base-" + key, Deadline: time.Now().Add(time.Hour),
		Mounts: []sandbox.Mount{{Source: self, Target: tool}},
	})
	if err != nil {
		return err
	}
	defer w.local.Destroy(context.WithoutCancel(ctx), ref) //nolint:errcheck // what is left is seen when the folder is removed
	sb, err := w.local.Attach(ctx, ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	cmd := sandbox.Cmd{Args: []string{"sh", "-c", treeScript + sandbox.SettleIndex(sandbox.ManyFiles)}, Env: []string{"TREE=" + tool, "FILES=" + strconv.Itoa(files)}}
	if err := runIn(ctx, sb, "tree", cmd); err != nil {
		return err
	}
	return w.local.Freeze(ctx, ref, key)
}

// runIn runs a command in a sandbox, to its end.
func runIn(ctx context.Context, sb sandbox.Sandbox, id string, cmd sandbox.Cmd) error {
	_, stderr, exit, err := sandbox.Output(ctx, sb, id, cmd, 4096)
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("%v: exit code %d: %s", cmd.Args, exit.Code, stderr)
	}
	return err
}

// close destroys what still lives, removes the folder and looks for what
// should not be there any more.
func (w *workshop) close(ctx context.Context) error {
	var errs []error
	if w.local != nil {
		w.local.Close()
		infos, err := w.local.List(ctx, nil)
		errs = append(errs, err)
		for _, i := range infos {
			errs = append(errs, w.local.Destroy(ctx, i.Ref))
		}
	}
	errs = append(errs, removeAll(w.outer))
	for _, g := range w.cgroups() {
		_ = unix.Rmdir(g) // of a peer that failed half-way; who still lives there is seen below
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left := w.leftovers()
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			errs = append(errs, fmt.Errorf("left behind: %s", strings.Join(left, ", ")))
			break
		}
	}
	return errors.Join(errs...)
}

// removeAll removes a folder and, before that, what is mounted below it: what
// shows through a mount is not to be deleted.
func removeAll(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return os.RemoveAll(dir)
}

func mountsBelow(dir string) (mounts []string, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	for line := range bytes.Lines(b) {
		if f := strings.Fields(string(line)); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			mounts = append(mounts, f[4])
		}
	}
	return mounts, err
}

// leftovers names processes, cgroups and mounts that carry the mark.
func (w *workshop) leftovers() (left []string) {
	for pid := range w.processes() {
		left = append(left, "process "+pid)
	}
	mounts, _ := mountsBelow(w.outer)
	left = append(left, mounts...)
	return append(left, w.cgroups()...)
}

func (w *workshop) cgroups() []string {
	groups, _ := filepath.Glob("/sys/fs/cgroup/*" + w.mark + "*")
	more, _ := filepath.Glob("/sys/fs/cgroup/*/*" + w.mark + "*")
	return append(groups, more...)
}

// memory adds up the memory of all processes that an engine keeps for its
// sandboxes. Pages that several share count for each by its part.
func (w *workshop) memory() (size int64, processes int) {
	for pid := range w.processes() {
		b, err := os.ReadFile("/proc/" + pid + "/smaps_rollup")
		if err != nil {
			continue
		}
		for line := range bytes.Lines(b) {
			var kb int64
			if _, err := fmt.Sscanf(string(line), "Pss: %d", &kb); err == nil {
				size += kb << 10
				processes++
			}
		}
	}
	return size, processes
}

// processes finds those with the mark in their command line and all that they
// have started, but not this program's own.
func (w *workshop) processes() map[string]bool {
	self := strconv.Itoa(os.Getpid())
	entries, _ := filepath.Glob("/proc/[0-9]*")
	parents, marked := map[string]string{}, map[string]bool{}
	for _, e := range entries {
		pid := filepath.Base(e)
		stat, err := os.ReadFile(e + "/stat")
		if err != nil {
			continue
		}
		if f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]); len(f) > 1 {
			parents[pid] = string(f[1])
		}
		line, err := os.ReadFile(e + "/cmdline")
		marked[pid] = err == nil && pid != self && bytes.Contains(line, []byte(w.mark))
	}
	found := map[string]bool{}
	for pid := range parents {
		for at := pid; at != "" && at != self; at = parents[at] {
			if marked[at] {
				found[pid] = true
				break
			}
		}
	}
	return found
}

// An overlay is one that the harness mounts, for engines that have none.
type overlay struct{ dir string }

func (w *workshop) newOverlay(engine string, i int) overlay {
	return overlay{filepath.Join(w.dir, engine, fmt.Sprintf("%04d", i))}
}

func (o overlay) upper() string  { return filepath.Join(o.dir, "upper") }
func (o overlay) work() string   { return filepath.Join(o.dir, "work") }
func (o overlay) merged() string { return filepath.Join(o.dir, "merged") }

// options are those of mount(8).
func (o overlay) options(lower string) string {
	return "lowerdir=" + lower + ",upperdir=" + o.upper() + ",workdir=" + o.work() + ",volatile"
}

func (o overlay) make() error {
	for _, d := range []string{o.upper(), o.work(), o.merged()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (o overlay) mount(lower string) error {
	if err := o.make(); err != nil {
		return err
	}
	return os.NewSyscallError("mount overlay", unix.Mount("overlay", o.merged(), "overlay", 0, o.options(lower)))
}

func (o overlay) remove() error {
	// Whoever still holds on to it is on the way out.
	if err := unix.Unmount(o.merged(), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return os.NewSyscallError("unmount overlay", err)
	}
	return os.RemoveAll(o.dir)
}

// call runs a program of a peer. Ctrl-C is not for it: what it makes is
// removed by another call of it.
func call(ctx context.Context, name string, args ...string) error {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = nil, nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// A file, not a pipe: what the program leaves running has it open too,
	// and would be waited for.
	log, err := os.CreateTemp("", "bench-*")
	if err != nil {
		return err
	}
	defer os.Remove(log.Name())
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Run(); err != nil {
		if _, seekErr := log.Seek(0, 0); seekErr == nil {
			_, _ = stderr.ReadFrom(log)
		}
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, firstLine(stderr.String()))
	}
	return nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	return s
}

// ours is the engine of this project.
type ours struct {
	*workshop
	local *local.Provider
	base  string

	mu    sync.Mutex
	boxes map[int]box
}

type box struct {
	ref sandbox.Ref
	sb  sandbox.Sandbox
	ran int
}

func newOurs(w *workshop, base string) *ours {
	return &ours{workshop: w, local: w.local, base: base, boxes: map[int]box{}}
}

func (e *ours) name() string               { return "sandbox-temporal" }
func (e *ours) open(context.Context) error { return nil }
func (e *ours) spec(i int) sandbox.Spec {
	return sandbox.Spec{Key: fmt.Sprintf("bench-%04d", i), Base: e.base, Deadline: time.Now().Add(time.Hour)}
}

func (e *ours) create(ctx context.Context, i int) error {
	if err := e.make(ctx, i); err != nil {
		return err
	}
	return e.exec(ctx, i)
}

// make is create without a command.
func (e *ours) make(ctx context.Context, i int) error {
	ref, err := e.local.Create(ctx, e.spec(i))
	if err != nil {
		return err
	}
	sb, err := e.local.Attach(ctx, ref)
	if err != nil {
		return errors.Join(err, e.local.Destroy(context.WithoutCancel(ctx), ref))
	}
	e.mu.Lock()
	e.boxes[i] = box{ref: ref, sb: sb}
	e.mu.Unlock()
	return nil
}

func (e *ours) box(i int) box {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.boxes[i]
}

func (e *ours) exec(ctx context.Context, i int) error {
	e.mu.Lock()
	b := e.boxes[i]
	b.ran++
	e.boxes[i] = b
	e.mu.Unlock()
	p, err := b.sb.Start(ctx, "true-"+strconv.Itoa(b.ran), sandbox.Cmd{Args: []string{"/bin/true"}})
	if err != nil {
		return err
	}
	exit, err := p.Wait(ctx)
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("exit code %d", exit.Code)
	}
	return err
}

func (e *ours) pause(ctx context.Context, i int) error {
	p, ok := sandbox.As[sandbox.Pauser](e.local)
	if !ok {
		return errMissing("not offered")
	}
	return p.Pause(ctx, e.box(i).ref)
}

func (e *ours) resume(ctx context.Context, i int) error {
	p, ok := sandbox.As[sandbox.Pauser](e.local)
	if !ok {
		return errMissing("not offered")
	}
	return p.Resume(ctx, e.box(i).ref)
}

func (e *ours) destroy(ctx context.Context, i int) error {
	b := e.box(i)
	if b.sb == nil {
		return nil
	}
	err := e.local.Destroy(ctx, b.ref)
	e.mu.Lock()
	delete(e.boxes, i)
	e.mu.Unlock()
	return errors.Join(err, b.sb.Close())
}

func (e *ours) close(ctx context.Context) error {
	var errs []error
	for i := range e.boxes {
		errs = append(errs, e.destroy(ctx, i))
	}
	return errors.Join(errs...)
}
