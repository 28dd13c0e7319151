package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// Create starts a guardian and waits until it says that the sandbox is ready.
// With a base it fails with fault.NotFound when the base is not there; without
// runsc, and where the host keeps from us what runsc needs, it fails with
// fault.Unsupported and a hint.
func (p *Provider) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
	const op = "gvisor: create sandbox"
	r, err := p.check(op, spec)
	if err != nil {
		return sandbox.Ref{}, err
	}
	return p.create(ctx, op, r, func() (err error) {
		if r.Runsc, err = findRunsc(p.runsc); err != nil {
			return err
		}
		if err := r.look(); err != nil {
			return err
		}
		if r.Base != "" {
			if err := haveBase(r.Dir, r.Base); err != nil {
				return err
			}
		}
		program, err := exec.LookPath(p.guardian[0])
		if err != nil {
			return guardianFault(err)
		}
		r.Program, err = copyProgram(r.Dir, program)
		return err
	}, &r)
}

// create returns the sandbox that is there under the record's key, or has
// prepare complete the record and makes one.
func (p *Provider) create(ctx context.Context, op string, r record, prepare func() error, to *record) (sandbox.Ref, error) {
	if err := makeState(op, p.dir); err != nil {
		return sandbox.Ref{}, err
	}
	key, err := p.lockKey(ctx, r.Key, true)
	if err != nil {
		return sandbox.Ref{}, contextFault(ctx, op, err)
	}
	defer key.Close()
	ref, err := p.existing(ctx, op, r.Key)
	if err == nil || fault.KindOf(err) != fault.NotFound {
		return ref, err
	}
	if r.Base != "" {
		// Until the sandbox is known to stand on it.
		lock, err := p.lockBase(ctx, r.Base, false)
		if err != nil {
			return sandbox.Ref{}, contextFault(ctx, op, err)
		}
		defer lock.Close()
		usedNow(p.dir, r.Base)
	}
	if err = prepare(); err == nil {
		ref, err = p.make(ctx, *to)
	}
	if err != nil {
		return sandbox.Ref{}, contextFault(ctx, op, err)
	}
	return ref, nil
}

func (p *Provider) boxPath(key string) string {
	return filepath.Join(p.dir, sandboxesDir, keyName(key))
}

// existing finds the sandbox that was made, or is being made by a guardian
// whose worker died, under the key. What is dead there is removed; then, and
// when there never was any, the error is of kind fault.NotFound. The caller
// holds the key's lock.
func (p *Provider) existing(ctx context.Context, op, key string) (sandbox.Ref, error) {
	none := fault.New(op, fault.NotFound, "no sandbox %q", key)
	b, err := openBox(p.boxPath(key))
	if errors.Is(err, os.ErrNotExist) {
		return sandbox.Ref{}, none
	}
	if err != nil {
		return sandbox.Ref{}, fault.Wrap(op, err)
	}
	defer b.Close()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		life, err := b.life(ctx, false)
		if err == nil {
			defer life.Close()
			if err := b.bury(ctx, p.dir); err != nil {
				return sandbox.Ref{}, contextFault(ctx, op, err)
			}
			return sandbox.Ref{}, none
		}
		if errors.Is(err, os.ErrNotExist) {
			return sandbox.Ref{}, none // it has just removed itself
		}
		if !errors.Is(err, errLocked) {
			return sandbox.Ref{}, contextFault(ctx, op, err)
		}
		// Somebody lives there. A guardian that was just started does not
		// listen yet, and one that is dying will be gone soon; both are rare,
		// and nothing but time tells.
		var h handle
		if err := b.readJSON(refFile, &h); err == nil {
			a := &attached{box: b, handle: h}
			if st, err := a.hello(ctx, op); err == nil && st != dying {
				return h.ref(), nil
			}
		}
		select {
		case <-ctx.Done():
			return sandbox.Ref{}, contextFault(ctx, op, ctx.Err())
		case <-tick.C:
		}
	}
}

// make makes a new sandbox in the key's place, which is empty.
func (p *Provider) make(ctx context.Context, r record) (sandbox.Ref, error) {
	temp := filepath.Join(p.dir, sandboxesDir, newPrefix+r.Instance)
	if err := os.Mkdir(temp, 0o700); err != nil {
		return sandbox.Ref{}, err
	}
	b, err := openBox(temp)
	if err != nil {
		return sandbox.Ref{}, err
	}
	defer b.Close()
	// The lock is taken before the folder has its name, and handed to the
	// guardian as an open file. So the folder is never without somebody who
	// lives in it, until that somebody is dead.
	life, err := b.open(lifeFile, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return sandbox.Ref{}, errors.Join(err, b.remove(p.dir, r.Instance))
	}
	defer life.Close()
	group := cgroup.Find().Group(groupPrefix + r.Instance)
	r.Cgroups = group.Paths()
	err = func() error {
		if err := lock(ctx, life, false); err != nil {
			return err
		}
		if err := b.writeJSON(specFile, r); err != nil {
			return err
		}
		if r.From != "" {
			// The kernel in the checkpoint knows its root by its image.
			if err := os.Link(filepath.Join(filepath.Dir(r.From), rootFile), filepath.Join(temp, rootFile)); err != nil {
				return err
			}
		}
		if err := os.Rename(temp, p.boxPath(r.Key)); err != nil {
			return err
		}
		b.path = p.boxPath(r.Key)
		p.openGroup(ctx, group, r.Limits)
		defer group.Close() // it is in the record
		return p.startGuardian(ctx, b, life, r.Identity)
	}()
	if err != nil {
		// The guardian, if there was one, is dead. ctx may be over, and what
		// was begun must go all the same.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		return sandbox.Ref{}, errors.Join(err, b.bury(clean, p.dir))
	}
	return handle{Key: r.Key, Instance: r.Instance}.ref(), nil
}

func guardianFault(err error) error {
	return fault.New("start guardian", fault.Invalid, "%w", err).Hinted("Install sandbox-supervisor beside the main program.")
}

// startGuardian returns when the sandbox is ready, or, with an error, when the
// guardian is dead.
func (p *Provider) startGuardian(ctx context.Context, b *box, life *os.File, id identity) error {
	program, err := exec.LookPath(p.guardian[0])
	if err == nil {
		program, err = filepath.Abs(program)
	}
	if err != nil {
		return guardianFault(err)
	}
	log, err := b.open(logFile, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	if err != nil {
		return err
	}
	defer log.Close()
	heard, said, err := os.Pipe()
	if err != nil {
		return err
	}
	defer heard.Close()
	cmd := &exec.Cmd{
		Path: program, Args: append(append([]string{}, p.guardian...), runWord, b.path),
		Env: []string{}, // not ours: it holds keys
		Dir: "/", Stdout: log, Stderr: log, ExtraFiles: []*os.File{life, said},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if dir := os.Getenv(debugVariable); dir != "" {
		cmd.Env = append(cmd.Env, debugVariable+"="+dir)
	}
	if !id.Root {
		// Runsc, without its mode for ordinary users in which nothing can be
		// restored, takes itself for root in a namespace where it is.
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	err = cmd.Start()
	_ = said.Close()
	if err != nil {
		if !id.Root && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EUSERS)) {
			return fault.New("make user namespace", fault.Unsupported, "the kernel refuses: %w", err).
				Hinted("Run the worker as root, or allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns).")
		}
		return fault.New("start guardian", fault.Invalid, "%w", err).Hinted("Check that %s can be run on this machine.", program)
	}
	// ctx must not end the guardian later: only the wait for its greeting.
	stop := context.AfterFunc(ctx, func() { _ = heard.Close() })
	var g greeting
	err = readMessage(heard, &g, maxReply)
	stop()
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err != nil:
		err = fault.New("start guardian", fault.Internal, "it died: %s", b.lastWords())
	default:
		err = g.Fault.err("start guardian")
	}
	if err != nil {
		_ = cmd.Process.Kill() // an error: it is dead already
		_ = cmd.Wait()         // how it ended was said
		return err
	}
	go func() { _ = cmd.Wait() }() // it is our child until we die; nobody asks how it ended
	return nil
}

// Attach finds the sandbox and makes sure that it answers.
func (p *Provider) Attach(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	return p.attach(ctx, "gvisor: attach", ref)
}

func (p *Provider) attach(ctx context.Context, op string, ref sandbox.Ref) (*attached, error) {
	h, err := readHandle(op, ref)
	if err != nil {
		return nil, err
	}
	b, err := openBox(p.boxPath(h.Key))
	if errors.Is(err, os.ErrNotExist) {
		return nil, gone(op, h)
	}
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	a := &attached{box: b, handle: h}
	st, err := a.hello(ctx, op)
	if err == nil && st == dying {
		err = gone(op, h)
	}
	if err != nil {
		_ = b.Close()
		return nil, err
	}
	return a, nil
}

func gone(op string, h handle) error {
	return fault.New(op, fault.NotFound, "sandbox %q is gone", h.Key)
}

// Destroy asks the guardian to end the sandbox, and does it itself where there
// is none any more or none that answers.
func (p *Provider) Destroy(ctx context.Context, ref sandbox.Ref) error {
	const op = "gvisor: destroy sandbox"
	h, err := readHandle(op, ref)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(p.dir, locksDir)); errors.Is(err, os.ErrNotExist) {
		return nil // nothing was ever made here
	}
	key, err := p.lockKey(ctx, h.Key, true)
	if err != nil {
		return contextFault(ctx, op, err)
	}
	defer key.Close()
	return contextFault(ctx, op, errors.Join(p.destroyLiving(ctx, op, h), p.destroyTrash(ctx, h)))
}

func (p *Provider) destroyLiving(ctx context.Context, op string, h handle) error {
	b, err := openBox(p.boxPath(h.Key))
	if err != nil {
		return ignoreGone(err)
	}
	defer b.Close()
	var r record
	if err := b.readJSON(specFile, &r); err != nil {
		return ignoreGone(err) // removing itself right now; see destroyTrash
	}
	if r.Instance != h.Instance {
		return nil // another sandbox took the key
	}
	life, err := b.life(ctx, false)
	if errors.Is(err, errLocked) {
		err = p.askToEnd(ctx, op, &attached{box: b, handle: h})
		if err != nil && fault.KindOf(err) != fault.NotFound {
			if ctx.Err() != nil {
				return err
			}
			p.log.WarnContext(ctx, "guardian is killed: it could not destroy its sandbox", "sandbox", h.Key, "err", err)
			if err := killGuardian(b.path); err != nil {
				return err
			}
		}
		life, err = b.life(ctx, true)
	}
	if err != nil {
		return ignoreGone(err)
	}
	defer life.Close()
	if _, err := os.Lstat(b.path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return b.bury(ctx, p.dir)
}

// askToEnd has the guardian destroy the sandbox. One that does not even say
// hello is not waited for: what it would do can be done without it.
func (p *Provider) askToEnd(ctx context.Context, op string, a *attached) error {
	soon, cancel := context.WithTimeout(ctx, 2*time.Second)
	_, err := a.hello(soon, op)
	cancel()
	if err != nil {
		return err
	}
	long, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err = a.ask(long, op, request{Op: opDestroy})
	return err
}

// killGuardian kills the guardian of the box, which is the process that was
// started with its path as last argument.
func killGuardian(path string) error {
	_, err := killProcesses(func(args []string) bool {
		return len(args) > 2 && args[len(args)-1] == path && args[len(args)-2] == runWord
	})
	return err
}

// destroyTrash waits for a guardian that is just removing the sandbox, or
// finishes what one that was killed had begun.
func (p *Provider) destroyTrash(ctx context.Context, h handle) error {
	b, err := openBox(filepath.Join(p.dir, trashDir, h.Instance))
	if err != nil {
		return ignoreGone(err)
	}
	defer b.Close()
	life, err := b.life(ctx, true)
	if err == nil {
		defer life.Close()
	} else if ignoreGone(err) != nil {
		return err
	}
	return b.bury(ctx, p.dir)
}

// List reads what is in the state folder. It also removes what dead guardians
// and workers have left there, and logs what cannot be removed.
func (p *Provider) List(ctx context.Context, labels map[string]string) ([]sandbox.Info, error) {
	const op = "gvisor: list sandboxes"
	entries, err := os.ReadDir(filepath.Join(p.dir, sandboxesDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	var infos []sandbox.Info
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), keyName("")) {
			continue
		}
		info, err := p.info(ctx, filepath.Join(p.dir, sandboxesDir, e.Name()))
		switch {
		case ctx.Err() != nil:
			return nil, contextFault(ctx, op, ctx.Err())
		case err != nil:
			p.log.WarnContext(ctx, "sandbox is not listed", "folder", e.Name(), "err", err)
		case info != nil && sandbox.HasLabels(info.Labels, labels):
			infos = append(infos, *info)
		}
	}
	if err := p.sweep(ctx); err != nil {
		p.log.WarnContext(ctx, "left-overs could not be removed", "err", err)
	}
	return infos, nil
}

// info describes the sandbox in the folder, or removes it and returns nil
// when it is dead. One that is not ready yet is nil too.
func (p *Provider) info(ctx context.Context, path string) (*sandbox.Info, error) {
	b, err := openBox(path)
	if err != nil {
		return nil, ignoreGone(err)
	}
	defer b.Close()
	var r record
	if err := b.readJSON(specFile, &r); err != nil {
		return nil, ignoreGone(err)
	}
	if keyName(r.Key) != filepath.Base(path) {
		return nil, fmt.Errorf("it says it is %q", r.Key)
	}
	key, err := p.lockKey(ctx, r.Key, false)
	switch {
	case err == nil:
		// Nobody changes it now: whether it is dead can be told, and done.
		defer key.Close()
		life, err := b.life(ctx, false)
		if err == nil {
			defer life.Close()
			return nil, b.bury(ctx, p.dir)
		}
		if !errors.Is(err, errLocked) {
			return nil, ignoreGone(err)
		}
	case !errors.Is(err, errLocked):
		return nil, err
	}
	var h handle
	if err := b.readJSON(refFile, &h); err != nil {
		return nil, ignoreGone(err)
	}
	info := &sandbox.Info{Ref: h.ref(), Labels: r.Labels, Created: r.Created}
	var st unix.Stat_t
	info.Paused = unix.Fstatat(int(b.dir.Fd()), pausedFile, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	return info, nil
}

// Base returns nil when a base is stored under key. Whether the bytes in it
// are the right ones is not looked at.
func (p *Provider) Base(_ context.Context, key string) error {
	const op = "gvisor: look up base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	return fault.Wrap(op, haveBase(p.dir, key))
}

// Freeze has init end everything in the sandbox and send its files, which the
// guardian writes into an image. Everything is copied, so it takes as long as
// the disk needs for it.
func (p *Provider) Freeze(ctx context.Context, ref sandbox.Ref, key string) error {
	const op = "gvisor: freeze sandbox"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return err
	}
	defer a.Close()
	_, err = a.ask(ctx, op, request{Op: opFreeze, Base: key})
	return err
}
