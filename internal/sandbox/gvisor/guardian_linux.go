package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// Supervise is the body of the program that [Options].Guardian names. It runs
// the guardian of one sandbox until the sandbox is gone, or, started by runsc
// in the sandbox, its first process. It returns the exit code of the program.
// Only a [Provider] and a guardian call the program, with arguments of their
// own; args must be the last of the program's, as they came.
func Supervise(args []string) int {
	switch {
	case len(args) == 2 && args[0] == runWord:
		// What stands before args on the command line leads here again.
		return guardianMain(os.Args[:max(1, len(os.Args)-len(args))], args[1])
	case len(args) == 1 && args[0] == initWord:
		return initMain()
	case len(args) > 2 && args[0] == enterWord:
		return enterMain(args[1], args[2:])
	}
	fmt.Fprintln(os.Stderr, "This program owns one gVisor sandbox. The worker starts it; there is nothing to do with it by hand.")
	return 2
}

// The arguments of Supervise.
const (
	runWord   = "run"
	initWord  = "init"
	enterWord = "enter" // wait to be put into the cgroup, and be runsc
)

// The descriptors that a guardian is started with.
const (
	lifeFD     = 3 // the life file, locked
	greetingFD = 4
)

// patience bounds what a guardian waits for runsc and for init.
const patience = 30 * time.Second

// debugVariable makes runsc write its log into the folder that it names.
const debugVariable = "SANDBOX_TEMPORAL_RUNSC_DEBUG"

// A guardian owns one sandbox.
type guardian struct {
	argv   []string // how this program is told to run Supervise
	record record
	box    *box
	log    *slog.Logger

	group *cgroup.Group
	runsc *exec.Cmd     // it lives as long as the sandbox
	dead  chan struct{} // closed when runsc is
	link  *mux
	bell  chan struct{} // the deadline was moved

	ending sync.Mutex    // held while the sandbox is saved, frozen or destroyed
	over   chan struct{} // closed when the sandbox is gone
	overBy error         // what went wrong at that; read after over

	mu       sync.Mutex
	state    state
	deadline time.Time
	serving  sync.WaitGroup
}

func guardianMain(argv []string, path string) int {
	life := os.NewFile(lifeFD, "life")
	defer life.Close()
	unix.CloseOnExec(lifeFD)
	unix.CloseOnExec(greetingFD)
	hello := os.NewFile(greetingFD, "greeting")
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	unix.Umask(0o077)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, unix.SIGHUP) // and nothing more: workers come and go
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)

	g, err := newGuardian(path, log)
	if err == nil {
		g.argv = append([]string{filepath.Base(argv[0])}, argv[1:]...)
		err = g.open()
	}
	helloErr := writeMessage(hello, greeting{Fault: toWire(err)})
	_ = hello.Close()
	if err != nil {
		log.Error("sandbox not made", "err", err)
		if g != nil {
			g.kill() // the folder is the worker's to remove
		}
		return 1
	}
	if helloErr != nil {
		// The worker died meanwhile. The sandbox is whole, and the next
		// worker that asks for the key gets it.
		log.Info("nobody waits for this sandbox", "err", helloErr)
	}
	select {
	case <-stop:
		_ = g.end("signal")
	case <-g.over:
	}
	g.farewell()
	return 0
}

// farewell lets the last answers out, but waits for nobody who hangs on.
func (g *guardian) farewell() {
	done := make(chan struct{})
	go func() {
		g.serving.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Second):
	}
}

func newGuardian(path string, log *slog.Logger) (*guardian, error) {
	b, err := openBox(path)
	if err != nil {
		return nil, err
	}
	g := &guardian{
		box: b, log: log, state: starting, bell: make(chan struct{}, 1),
		dead: make(chan struct{}), over: make(chan struct{}),
	}
	close(g.dead) // until there is something that lives
	if err := b.readJSON(specFile, &g.record); err != nil {
		return nil, err
	}
	g.group = cgroup.Open(g.record.Cgroups)
	g.deadline = g.record.Deadline
	return g, nil
}

// watch ends the sandbox at its deadline. The calendar is looked at again now
// and then: Go's timers stand still while the machine sleeps.
func (g *guardian) watch() {
	for {
		g.mu.Lock()
		left := time.Until(g.deadline.Round(0))
		begun := g.state == starting
		g.mu.Unlock()
		if left <= 0 {
			if begun {
				// Something keeps us waiting. What there is of the sandbox
				// dies with us, and who comes next removes the folder.
				os.Exit(1)
			}
			_ = g.end("deadline")
			return
		}
		select {
		case <-time.After(min(left, 10*time.Second)):
		case <-g.bell:
		case <-g.over:
			return
		}
	}
}

// open makes the sandbox and returns when it can be used.
func (g *guardian) open() error {
	go g.watch()
	// What runsc leaves behind when it dies becomes our child: see kill.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("become a subreaper", err)
	}
	for _, d := range []string{upperDir, outputDir, stateDir, emptyDir} {
		if err := os.Mkdir(filepath.Join(g.box.path, d), 0o700); err != nil {
			return fileFault("make folders", err)
		}
	}
	set, err := writeConfig(g.box.path, g.record, g.argv)
	if err != nil {
		return fileFault("configure the sandbox", err)
	}
	if err := g.startRunsc(); err != nil {
		return err
	}
	if g.record.From != "" {
		if err := g.link.takeOver(); err != nil {
			return g.startFault(err)
		}
	}
	if err := g.setUp(set); err != nil {
		return err
	}
	return g.listen()
}

// startRunsc starts the sandbox in a process that is our child, and dies when
// we do.
func (g *guardian) startRunsc() error {
	orders, toInit, err := os.Pipe()
	if err != nil {
		return err
	}
	defer orders.Close()
	fromInit, answers, err := os.Pipe()
	if err != nil {
		_ = toInit.Close()
		return err
	}
	defer answers.Close()
	for _, f := range []*os.File{toInit, fromInit} {
		// Large files go this way. An error: it is slower.
		if raw, err := f.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 1<<20) })
		}
	}
	args := []string{"run", "--bundle=" + boxAt("")}
	if g.record.From != "" {
		// The folders named in the configuration are those of this sandbox;
		// everything else in it is the parent's, as we wrote it.
		args = []string{"--restore-spec-validation=ignore", "restore", "--bundle=" + boxAt(""), "--image-path=" + g.record.From}
	}
	g.runsc = g.runscCommand(append(args, g.record.Instance)...)
	g.runsc.Stdin, g.runsc.Stdout, g.runsc.Stderr = orders, answers, os.Stderr
	g.runsc.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	entered, err := g.enterGroup()
	if err != nil {
		return err
	}
	started := make(chan error)
	g.dead = make(chan struct{})
	go func() {
		// A child dies with the thread that started it, so this one stays.
		runtime.LockOSThread()
		err := g.runsc.Start()
		started <- err
		if err != nil {
			return
		}
		err = g.runsc.Wait()
		g.log.Info("runsc ended", "how", fmt.Sprint(err))
		close(g.dead)
		_ = toInit.Close()
		_ = fromInit.Close()
		g.runscGone()
	}()
	err = <-started
	if err == nil {
		err = entered(g.runsc.Process.Pid)
	} else {
		_ = entered(0)
	}
	if err != nil && g.runsc.Process == nil {
		close(g.dead)
		return fault.New("start runsc", fault.Unsupported, "%w", err).Hinted("%s", install)
	}
	g.link = newMux(fromInit, toInit, false, g.gateway)
	go func() {
		if err := g.link.serve(); !errors.Is(err, io.EOF) {
			g.log.Warn("no more from init", "err", err)
		}
		// One that does not speak to us any more is of no use.
		_ = g.runsc.Process.Kill()
	}()
	return nil
}

// runscCommand is a call of runsc, with nothing of ours but the box.
func (g *guardian) runscCommand(args ...string) *exec.Cmd {
	return &exec.Cmd{
		Path: g.record.Runsc, Args: append(append([]string{"runsc"}, runscArgs(os.Getenv(debugVariable))...), args...),
		Env: []string{}, Dir: "/", ExtraFiles: []*os.File{g.box.dir},
	}
}

// callRunsc runs one of runsc's commands to its end.
func (g *guardian) callRunsc(op string, args ...string) error {
	cmd := g.runscCommand(append(args, g.record.Instance)...)
	var said strings.Builder
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		return runscFault(op, err, said.String())
	}
	return nil
}

// startFault says why there is no sandbox: what runsc said stands in the log.
func (g *guardian) startFault(err error) error {
	select {
	case <-g.dead:
		return fault.New("start sandbox", fault.Unsupported, "runsc ended: %s", g.box.lastWords()).
			Hinted("Look at what sandbox-temporal doctor says about gVisor.")
	case <-time.After(time.Second):
		return fault.Wrap("start sandbox", err)
	}
}

// setUp has init make the sandbox what it is to be.
func (g *guardian) setUp(set setup) error {
	s, err := g.link.open()
	if err != nil {
		return g.startFault(err)
	}
	defer s.Close()
	var r response
	if err = writeMessage(s, request{Version: protocol, Op: opSetup, Setup: &set}); err == nil {
		err = readMessage(s, &r, maxReply)
	}
	if err != nil {
		return g.startFault(err)
	}
	return r.Fault.err("start sandbox")
}

// gateway connects one caller of the sandbox. When the gateway cannot be
// reached the caller sees its connection closed, and will try again as it
// would with a server.
func (g *guardian) gateway(s *stream) {
	if g.record.Gateway == "" {
		_ = s.Close()
		return
	}
	c, err := dialUnix(g.record.Gateway)
	if err != nil {
		g.log.Debug("gateway not reached", "err", err)
		_ = s.Close()
		return
	}
	splice(c, s)
}

// dialUnix connects to a socket whose path may be longer than an address.
func dialUnix(path string) (*net.UnixConn, error) {
	dir, err := openBox(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: dir.at(filepath.Base(path))})
}

// listen opens the way in for workers and says so.
func (g *guardian) listen() error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: g.box.at(socketFile)})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false) // it goes with the folder
	g.setState(ready)
	select {
	case <-g.dead:
		l.Close()
		return g.startFault(errLinkDead)
	default:
	}
	go g.serve(l)
	return g.box.writeJSON(refFile, handle{Key: g.record.Key, Instance: g.record.Instance})
}

// runscGone ends a sandbox whose runsc died without having been told to.
func (g *guardian) runscGone() {
	g.mu.Lock()
	expected := g.state != ready
	g.mu.Unlock()
	if !expected {
		_ = g.end("runsc is gone")
	}
}

func (g *guardian) setState(to state) {
	g.mu.Lock()
	g.state = to
	g.mu.Unlock()
}

// kill returns when everything of the sandbox is dead. Runsc's children have
// the same pact with it as it has with us, and those that outlive it for a
// moment are ours by then.
func (g *guardian) kill() {
	if g.runsc != nil && g.runsc.Process != nil {
		_ = g.runsc.Process.Kill() // an error: it is dead already
	}
	<-g.dead
	for {
		_, err := unix.Wait4(-1, nil, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// end destroys the sandbox, once. A second call waits for the first.
func (g *guardian) end(why string) error {
	// Who cannot attach to it any more must not see it listed.
	_ = unix.Unlinkat(int(g.box.dir.Fd()), refFile, 0) // an error: it was never ready
	g.setState(dying)                                  // also while it is being saved or frozen, which then ends
	_ = g.runsc.Process.Kill()
	g.ending.Lock()
	defer g.ending.Unlock()
	select {
	case <-g.over:
		return g.overBy
	default:
	}
	g.log.Info("destroying", "why", why)
	g.kill()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	g.overBy = errors.Join(g.group.Remove(ctx), g.box.remove(g.record.Dir, g.record.Instance))
	if g.overBy != nil {
		g.log.Error("not everything could be removed", "err", g.overBy)
	}
	close(g.over)
	return g.overBy
}

// serve answers workers until the sandbox is gone.
func (g *guardian) serve(l *net.UnixListener) {
	go func() {
		<-g.over
		l.Close()
	}()
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			g.log.Warn("accept", "err", err)
			time.Sleep(100 * time.Millisecond) // out of descriptors: that passes
			continue
		}
		g.serving.Add(1)
		go func() {
			defer g.serving.Done()
			defer c.Close()
			g.talk(c)
		}()
	}
}

// ours lets in nobody but the sandbox's owner and root.
func ours(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	})
	return err == nil && ok
}

// talk carries out one request, or passes it on.
func (g *guardian) talk(c *net.UnixConn) {
	if !ours(c) {
		return
	}
	var q request
	if err := readMessage(c, &q, maxRequest); err != nil {
		return // a worker that died, or nobody of ours
	}
	r := response{Version: protocol}
	var err error
	switch q.Op {
	case opHello:
		g.mu.Lock()
		r.State, r.Instance = g.state, g.record.Instance
		g.mu.Unlock()
	case opDestroy:
		err = g.end("asked to")
	case opFreeze:
		err = g.freeze(q.Base)
	case opSnapshot:
		err = g.snapshot(q.Base)
	case opPause, opResume:
		err = g.pause(q.Op)
	case opUsage:
		r.Usage, err = g.usage()
	case opDeadline:
		g.mu.Lock()
		g.deadline = q.Deadline
		g.mu.Unlock()
		select {
		case g.bell <- struct{}{}:
		default:
		}
	case opSave:
		g.save(c)
		return
	case opSetup, opPack, opCopy:
		err = fault.New("sandbox", fault.Invalid, "%q is not for workers", q.Op)
	default:
		if err = g.usable(q.Op); err == nil {
			g.pass(c, q)
			return
		}
	}
	r.Fault = toWire(err)
	_ = writeMessage(c, r) // nobody listens any more: then nobody has to know
}

// usable is an error when nothing can be started any more.
func (g *guardian) usable(op string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch g.state {
	case used:
		if op != opProcess && op != opWait && op != opOutput && op != opSignal {
			return fault.New("sandbox", fault.Conflict, "the sandbox was frozen and can only be destroyed")
		}
	case dying:
		return fault.New("sandbox", fault.NotFound, "the sandbox is being destroyed")
	}
	return nil
}

// pass lets the worker talk with init.
func (g *guardian) pass(c *net.UnixConn, q request) {
	s, err := g.link.open()
	if err == nil {
		err = writeMessage(s, q)
	}
	if err != nil {
		if s != nil {
			_ = s.Close()
		}
		_ = writeMessage(c, response{Version: protocol, Fault: toWire(fault.New("sandbox", fault.NotFound, "%w", err))})
		return
	}
	splice(c, s)
}

// freeze stores the files of the sandbox as a base. The file gets its name
// when it is whole and on the disk.
func (g *guardian) freeze(key string) error {
	const op = "freeze"
	g.ending.Lock()
	defer g.ending.Unlock()
	if err := g.usable(op); err != nil && fault.KindOf(err) != fault.Conflict {
		return err
	}
	if haveBase(g.record.Dir, key) == nil {
		return nil
	}
	if err := g.usable(op); err != nil {
		return err
	}
	g.setState(used)
	stage := filepath.Join(g.box.path, stageFile)
	if err := g.pack(opPack, stage); err != nil {
		return fileFault(op, err)
	}
	return fileFault(op, g.publish(stage, key))
}

// publish makes a base of the image, and says of whom.
func (g *guardian) publish(stage, key string) error {
	if err := writeMeta(g.record.Dir, key, g.record.Labels); err != nil {
		return err
	}
	return publish(stage, basePath(g.record.Dir, key))
}

// pack writes an image of what init sends when it is asked for op.
func (g *guardian) pack(op, name string) error {
	s, err := g.link.open()
	if err != nil {
		return err
	}
	defer s.Close()
	var r response
	if err = writeMessage(s, request{Version: protocol, Op: op}); err == nil {
		err = readMessage(s, &r, maxReply)
	}
	if err == nil {
		err = r.Fault.err("freeze")
	}
	if err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = unpack(s, newImage(f))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// publish gives the base its name. One that is whole keeps the name against
// ours; one that is damaged makes room.
func publish(stage, to string) error {
	for {
		err := os.Link(stage, to)
		if !errors.Is(err, os.ErrExist) {
			if err != nil {
				return err
			}
			dir, err := os.Open(filepath.Dir(to))
			if err != nil {
				return err
			}
			defer dir.Close()
			return dir.Sync()
		}
		if checkBase(to) == nil {
			return nil
		}
		if err := os.Remove(to); ignoreGone(err) != nil {
			return err
		}
	}
}

// haveBase returns nil when the base is there.
func haveBase(dir, key string) error {
	err := checkBase(basePath(dir, key))
	if err != nil {
		return fault.New("look up base", fault.NotFound, "no base %q: %w", key, err)
	}
	return nil
}

func checkBase(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return checkImage(f, st.Size())
}

// save writes a checkpoint for a worker that wants to make live forks of it,
// and removes it when the worker closes the connection.
func (g *guardian) save(c *net.UnixConn) {
	image := filepath.Join(g.box.path, "save-"+newInstance())
	defer os.RemoveAll(image)
	r := response{Version: protocol, Image: image}
	r.Fault = toWire(g.checkpoint(image))
	if writeMessage(c, r) != nil || r.Fault != nil {
		return
	}
	// The worker says no more; it is dead or ready when this returns.
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, c)
	}()
	select {
	case <-done:
	case <-g.over:
	}
}

// checkpoint has runsc write what the sandbox is at this moment. Init is held
// still, so that in a fork it begins with a new guardian where no message is
// half sent.
func (g *guardian) checkpoint(image string) error {
	const op = "save sandbox"
	g.ending.Lock()
	defer g.ending.Unlock()
	if err := g.usable(op); err != nil {
		return err
	}
	if err := os.Mkdir(image, 0o700); err != nil {
		return fileFault(op, err)
	}
	release, err := g.link.hold(patience)
	if err != nil {
		return fault.New(op, fault.Unavailable, "%w", err)
	}
	defer release()
	return g.callRunsc(op, "checkpoint", "--leave-running", "--image-path="+image)
}
