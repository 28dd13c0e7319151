package local

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
)

// Create starts a supervisor and waits until it says that the sandbox is
// ready. With a base it fails with fault.NotFound when the base is not there;
// where the kernel or the distribution keeps namespaces from us it fails with
// fault.Unsupported and a hint.
func (p *Provider) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
	const op = "local: create sandbox"
	r, err := p.check(op, spec)
	if err != nil {
		return sandbox.Ref{}, err
	}
	if err := p.openState(op, r.Identity); err != nil {
		return sandbox.Ref{}, err
	}
	key, err := p.lockKey(ctx, spec.Key, true)
	if err != nil {
		return sandbox.Ref{}, p.ctxFault(ctx, op, err)
	}
	defer key.Close()
	ref, err := p.existing(ctx, op, spec.Key)
	if err == nil || fault.KindOf(err) != fault.NotFound {
		return ref, err
	}
	recorded := func() {}
	if spec.Base != "" {
		bases, err := lockBases(ctx, p.dir, unix.LOCK_SH)
		if err != nil {
			return sandbox.Ref{}, p.ctxFault(ctx, op, err)
		}
		defer bases.Close()
		recorded = func() { _ = bases.Close() }
		if r.Layers, err = readLayers(op, p.dir, spec.Base, r.Identity); err != nil {
			return sandbox.Ref{}, err
		}
	}
	ref, err = p.make(ctx, r, recorded)
	if err != nil {
		return sandbox.Ref{}, p.ctxFault(ctx, op, err)
	}
	if spec.Base != "" {
		if err := touchBase(p.dir, spec.Base); err != nil {
			p.log.WarnContext(ctx, "use of base not noted", "base", spec.Base, "err", err)
		}
		p.flattenSoon(r.Layers)
	}
	return ref, nil
}

// ctxFault gives an error its operation, and the kind that ctx decides when
// ctx is what ended it.
func (p *Provider) ctxFault(ctx context.Context, op string, err error) error {
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

func (p *Provider) boxPath(key string) string {
	return filepath.Join(p.dir, sandboxesDir, keyName(key))
}

// existing finds the sandbox that was made, or is being made by a supervisor
// whose worker died, under the key. What is dead there is removed; then, and
// when there never was any, the error is of kind fault.NotFound. The caller
// holds the key's lock.
func (p *Provider) existing(ctx context.Context, op, key string) (sandbox.Ref, error) {
	none := func() (sandbox.Ref, error) {
		return sandbox.Ref{}, fault.New(op, fault.NotFound, "no sandbox %q", key)
	}
	box, err := openFolder(p.boxPath(key))
	if errors.Is(err, os.ErrNotExist) {
		return none()
	}
	if err != nil {
		return sandbox.Ref{}, fault.Wrap(op, err)
	}
	defer box.Close()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		life, err := box.life(ctx, false)
		if err == nil {
			defer life.Close()
			if err := box.bury(ctx, p.dir); err != nil {
				return sandbox.Ref{}, p.ctxFault(ctx, op, err)
			}
			return none()
		}
		if errors.Is(err, os.ErrNotExist) {
			return none() // it has just removed itself
		}
		if !errors.Is(err, errLocked) {
			return sandbox.Ref{}, p.ctxFault(ctx, op, err)
		}
		// Somebody lives there. A supervisor that was just started does not
		// listen yet, and one that is dying will be gone soon; both are
		// rare, and nothing but time tells.
		var h handle
		if err := box.readJSON(refFile, &h); err == nil {
			b := &attached{folder: box, handle: h, p: p}
			if st, err := b.hello(ctx, op); err == nil && st != dying {
				return h.ref(), nil
			}
		}
		select {
		case <-ctx.Done():
			return sandbox.Ref{}, p.ctxFault(ctx, op, ctx.Err())
		case <-tick.C:
		}
	}
}

// make makes a new sandbox in the key's place, which is empty. It calls
// recorded when everybody can see what the sandbox stands on.
func (p *Provider) make(ctx context.Context, r record, recorded func()) (ref sandbox.Ref, err error) {
	d := p.takeSpare(ctx)
	defer p.refill()
	if d == nil {
		if d, err = p.newDwelling(ctx, r.Instance); err != nil {
			return sandbox.Ref{}, err
		}
	}
	defer d.close()
	r.Instance = d.box.instance()
	err = func() error {
		if err := d.box.writeJSON(specFile, r); err != nil {
			return err
		}
		if err := os.Rename(d.box.path, p.boxPath(r.Key)); err != nil {
			return err
		}
		d.box.path = p.boxPath(r.Key)
		recorded() // not before: who reads the folder while it gets its name sees neither
		if d.cmd == nil {
			if err := p.startSupervisor(d, runWord); err != nil {
				return err
			}
		} else if err := d.callIn(); err != nil {
			return err
		}
		g, err := d.hear(ctx)
		if err == nil {
			p.tellLimits(ctx, g.Missing)
		}
		return err
	}()
	if err != nil {
		return sandbox.Ref{}, errors.Join(err, p.demolish(ctx, d))
	}
	var h handle
	if err := d.box.readJSON(refFile, &h); err != nil {
		return sandbox.Ref{}, err
	}
	return h.ref(), nil
}

// A dwelling is the folder of a sandbox to be, and the supervisor in it as soon
// as there is one.
type dwelling struct {
	box  *folder
	life *os.File // locked

	cmd   *exec.Cmd
	heard *os.File      // what the supervisor says
	call  *os.File      // what a spare one is told; its end is the end of that one
	ended chan struct{} // closed when the supervisor is dead
}

// newDwelling makes a folder that has no name yet.
func (p *Provider) newDwelling(ctx context.Context, instance string) (d *dwelling, err error) {
	temp := filepath.Join(p.dir, sandboxesDir, newPrefix+instance)
	if err := os.Mkdir(temp, 0o700); err != nil {
		return nil, err
	}
	d = &dwelling{}
	if d.box, err = openFolder(temp); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.box.remove(p.dir))
			d.close()
		}
	}()
	// The lock is taken before the folder has its name, and handed to the
	// supervisor as an open file. So the folder is never without somebody
	// who lives in it, until that somebody is dead.
	if d.life, err = d.box.open(lifeFile, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600); err != nil {
		return nil, err
	}
	if err := lock(ctx, d.life, false); err != nil {
		return nil, err
	}
	return d, os.Mkdir(filepath.Join(temp, fsDir), 0o700)
}

// close lets go of everything. The supervisor lives on, but not a spare one.
func (d *dwelling) close() {
	_ = d.box.Close()
	for _, f := range []*os.File{d.life, d.heard, d.call} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// demolish removes what was begun.
func (p *Provider) demolish(ctx context.Context, d *dwelling) error {
	if d.cmd != nil {
		_ = d.cmd.Process.Kill() // an error: it is dead already
		<-d.ended                // how it ended was said
	}
	// ctx may be over, and what was begun must go all the same.
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return d.box.bury(clean, p.dir)
}

// startSupervisor starts one, which is told with the word whether it makes a
// sandbox at once. After an error there is none.
func (p *Provider) startSupervisor(d *dwelling, word string) error {
	program, err := exec.LookPath(p.supervisor[0])
	if err != nil {
		return fault.New("start supervisor", fault.Invalid, "%w", err).Hinted("Install sandbox-supervisor beside the main program.")
	}
	if program, err = filepath.Abs(program); err != nil {
		return err
	}
	log, err := d.box.open(logFile, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	theirs := []*os.File{log}
	defer func() { closeAll(theirs) }()
	heard, said, err := os.Pipe()
	if err != nil {
		return err
	}
	d.heard, theirs = heard, append(theirs, said)
	extra := []*os.File{d.life, said}
	if word == spareWord {
		called, call, err := os.Pipe()
		if err != nil {
			return err
		}
		d.call, theirs, extra = call, append(theirs, called), append(extra, called)
	}
	cmd := &exec.Cmd{
		Path: program, Args: append(append([]string{}, p.supervisor...), word, d.box.path),
		Env: runtimeSettings(), // not ours: it holds keys
		Dir: "/", Stdout: log, Stderr: log, ExtraFiles: extra,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := inNoHurry(cmd.Start); err != nil {
		return fault.New("start supervisor", fault.Invalid, "%w", err).Hinted("Check that %s can be run on this machine.", program)
	}
	d.cmd, d.ended = cmd, make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is our child until we die; nobody asks how it ended
		close(d.ended)
	}()
	return nil
}

// hear returns what the supervisor says when it is ready.
func (d *dwelling) hear(ctx context.Context) (g greeting, err error) {
	// ctx must not end the supervisor later: only the wait for its greeting.
	stop := context.AfterFunc(ctx, func() { _ = d.heard.Close() })
	err = decodeFrame(d.heard, &g, maxReply)
	stop()
	switch {
	case ctx.Err() != nil:
		return g, context.Cause(ctx)
	case err != nil:
		return g, fault.New("start supervisor", fault.Internal, "it died: %s", lastWords(d.box))
	}
	return g, g.Fault.err("start supervisor")
}

// lastWords reads the end of the supervisor's log.
func lastWords(box *folder) string {
	f, err := box.open(logFile, unix.O_RDONLY, 0)
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

// Attach finds the sandbox and makes sure that it answers.
func (p *Provider) Attach(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	return p.attach(ctx, "local: attach", ref)
}

func (p *Provider) attach(ctx context.Context, op string, ref sandbox.Ref) (*attached, error) {
	h, err := readHandle(op, ref)
	if err != nil {
		return nil, err
	}
	folder, err := openFolder(p.boxPath(h.Key))
	if errors.Is(err, os.ErrNotExist) {
		return nil, gone(op, h)
	}
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	b := &attached{folder: folder, handle: h, p: p}
	st, err := b.hello(ctx, op)
	if err == nil && st == dying {
		err = gone(op, h)
	}
	if err != nil {
		_ = folder.Close()
		return nil, err
	}
	return b, nil
}

func gone(op string, h handle) error {
	return fault.New(op, fault.NotFound, "sandbox %q is gone", h.Key)
}

// Usage asks the supervisor.
func (p *Provider) Usage(ctx context.Context, ref sandbox.Ref) (sandbox.Usage, error) {
	const op = "local: usage"
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return sandbox.Usage{}, err
	}
	defer a.Close()
	r, err := a.ask(ctx, op, request{Op: opUsage})
	if err != nil || r.Usage == nil {
		return sandbox.Usage{}, err
	}
	return *r.Usage, nil
}

// Destroy asks the supervisor to end the sandbox, and does it itself where
// there is none any more or none that answers.
func (p *Provider) Destroy(ctx context.Context, ref sandbox.Ref) error {
	const op = "local: destroy sandbox"
	h, err := readHandle(op, ref)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(p.dir, locksDir)); errors.Is(err, os.ErrNotExist) {
		return nil // nothing was ever made here
	}
	p.spares.busy()
	key, err := p.lockKey(ctx, h.Key, true)
	if err != nil {
		return p.ctxFault(ctx, op, err)
	}
	defer key.Close()
	return p.ctxFault(ctx, op, errors.Join(p.destroyLiving(ctx, op, h), p.destroyTrash(ctx, h)))
}

func (p *Provider) destroyLiving(ctx context.Context, op string, h handle) error {
	box, err := openFolder(p.boxPath(h.Key))
	if err != nil {
		return ignoreGone(err)
	}
	defer box.Close()
	var r record
	if err := box.readJSON(specFile, &r); err != nil {
		if ignoreGone(err) == nil {
			return nil // removing itself right now; see destroyTrash
		}
		return err
	}
	if r.Instance != h.Instance {
		return nil // another sandbox took the key
	}
	life, err := box.life(ctx, false)
	if errors.Is(err, errLocked) {
		err = p.askToEnd(ctx, op, &attached{folder: box, handle: h, p: p})
		if err != nil && fault.KindOf(err) != fault.NotFound {
			if ctx.Err() != nil {
				return err
			}
			// Which process that is the folder knows better than the ref,
			// which others can write; until its own file of it is removed.
			if err := box.readJSON(refFile, &h); ignoreGone(err) != nil {
				return err
			}
			p.log.WarnContext(ctx, "supervisor is killed: it could not destroy its sandbox", "sandbox", h.Key, "err", err)
			// The one that the folder names: a ref comes from workflow
			// history, where others may have written.
			var own handle
			if err := box.readJSON(refFile, &own); err != nil {
				return err
			}
			if err := killProcess(ctx, own.Supervisor); err != nil {
				return err
			}
		}
		life, err = box.life(ctx, true)
	}
	if err != nil {
		return ignoreGone(err)
	}
	defer life.Close()
	if _, err := os.Lstat(box.path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return box.bury(ctx, p.dir)
}

// askToEnd has the supervisor destroy the sandbox. One that does not even say
// hello is not waited for: what it would do can be done without it.
func (p *Provider) askToEnd(ctx context.Context, op string, a *attached) error {
	// Nor is one for ever that does not get on: what it has done by then
	// need not be done again.
	long, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// Most are done before there is a reason to wonder.
	wondered := make(chan struct{})
	wonder := time.AfterFunc(200*time.Millisecond, func() {
		defer close(wondered)
		soon, over := context.WithTimeout(long, 2*time.Second)
		defer over()
		if _, err := a.hello(soon, op); err != nil && soon.Err() != nil {
			cancel()
		}
	})
	defer func() {
		if !wonder.Stop() {
			cancel()
			<-wondered // the folder is closed next, and its descriptor is another file's then
		}
	}()
	_, err := a.ask(long, op, request{Op: opDestroy})
	return err
}

// destroyTrash waits for a supervisor that is just removing the sandbox, or
// finishes what one that was killed had begun.
func (p *Provider) destroyTrash(ctx context.Context, h handle) error {
	box, err := openFolder(filepath.Join(p.dir, trashDir, h.Instance))
	if err != nil {
		return ignoreGone(err)
	}
	defer box.Close()
	life, err := box.life(ctx, true)
	if err == nil {
		defer life.Close()
	} else if ignoreGone(err) != nil {
		return err
	}
	return box.bury(ctx, p.dir)
}

// List reads what is in the state folder. It also removes what dead
// supervisors and workers have left there, and logs what cannot be removed.
func (p *Provider) List(ctx context.Context, labels map[string]string) ([]sandbox.Info, error) {
	const op = "local: list sandboxes"
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
			return nil, p.ctxFault(ctx, op, ctx.Err())
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
	box, err := openFolder(path)
	if err != nil {
		return nil, ignoreGone(err)
	}
	defer box.Close()
	var r record
	if err := box.readJSON(specFile, &r); err != nil {
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
		life, err := box.life(ctx, false)
		if err == nil {
			defer life.Close()
			return nil, box.bury(ctx, p.dir)
		}
		if !errors.Is(err, errLocked) {
			return nil, ignoreGone(err)
		}
	case !errors.Is(err, errLocked):
		return nil, err
	}
	var h handle
	if err := box.readJSON(refFile, &h); err != nil {
		return nil, ignoreGone(err)
	}
	var st unix.Stat_t
	paused := unix.Fstatat(box.fd(), pausedFile, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
	return &sandbox.Info{Ref: h.ref(), Labels: r.Labels, Created: r.Created, Paused: paused}, nil
}
