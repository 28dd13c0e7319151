package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// Supervise is the body of the sandbox-supervisor program and of any command
// that stands in for it (see Options.Supervisor). It runs the supervisor of
// one sandbox until the sandbox is gone, or, started again by the supervisor
// inside the new namespaces, the sandbox's first process; or it makes chains
// of bases shorter until none is too long. It returns the exit code of the
// program. Only a [Provider] calls the program, with arguments of
// its own; args must be the last of the program's, as they came.
func Supervise(args []string) int {
	switch {
	case len(args) == 2 && (args[0] == runWord || args[0] == spareWord):
		// What stands before args on the command line leads here again.
		return supervisorMain(os.Args[:max(1, len(os.Args)-len(args))], args[1], args[0] == spareWord)
	case len(args) == 1 && (args[0] == initWord || args[0] == sealedWord):
		return initMain(args[0] == sealedWord)
	case len(args) == 2 && args[0] == flattenWord:
		return flattenMain(args[1])
	}
	fmt.Fprintln(os.Stderr, "This program owns one local sandbox. The worker starts it; there is nothing to do with it by hand.")
	return 2
}

// The arguments of Supervise.
const (
	runWord     = "run"
	spareWord   = "spare" // run, once there is a sandbox to run: see spares
	initWord    = "init"
	sealedWord  = "init-sealed" // init, once its program is out of everybody's reach
	flattenWord = "flatten"
)

// runtimeSettings is the whole environment of a supervisor and of init: they
// wait most of the time, and share the processors with many others. A second
// processor each would cost a sandbox half a megabyte; and without a word on
// it, Go reads the list of mounts and looks once a second for a new limit.
func runtimeSettings() []string { return []string{"GOMAXPROCS=1"} }

// patience bounds what a supervisor waits for the kernel while it tidies up.
const patience = 30 * time.Second

// A supervisor owns one sandbox.
type supervisor struct {
	argv   []string // how this program is told to run Supervise
	record record
	box    *folder
	log    *slog.Logger

	init     *initChild
	initDone chan struct{} // closed when everything in the sandbox is dead
	heard    chan struct{} // closed when init has said its last
	orders   orders
	left     remains
	group    *cgroup.Group
	apart    bool            // init is not in the group, which limits nobody then; settled before the sandbox is ready
	missing  []sandbox.Limit // that the group does not enforce; likewise
	listener *net.UnixListener
	gateway  *forwarder
	monitor  *monitor
	alarm    *alarm

	uploads sync.RWMutex // held shared while a file is on its way to its name

	joined <-chan struct{} // closed when init is in the group
	staged <-chan reply    // to opStage

	asked  sync.Once
	asking chan struct{} // closed when the sandbox shall end
	ending sync.Mutex    // held while the sandbox is frozen, copied or destroyed
	over   chan struct{} // closed when the sandbox is gone
	overBy error         // what went wrong at that; read after over

	mu        sync.Mutex
	state     state
	processes map[string]*process
	terminals terminals
	ooms      int           // kills for want of memory that are known of
	lastOOM   time.Time     // when the last of them became known
	killing   chan struct{} // while everything in the sandbox is being killed; closed when that is done
	diskUse   int64         // bytes, when it was last looked at
	serving   sync.WaitGroup

	still stillness
}

func supervisorMain(argv []string, path string, spare bool) int {
	life := os.NewFile(lifeFD, "life")
	defer life.Close()
	unix.CloseOnExec(lifeFD)
	unix.CloseOnExec(greetingFD)
	hello := os.NewFile(greetingFD, "greeting")
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var calls *os.File
	if spare {
		calls = os.NewFile(callFD, "call")
		unix.CloseOnExec(callFD)
	}
	closeStray(greetingFD + 1)
	unix.Umask(0o077)
	signal.Ignore(unix.SIGHUP) // workers come and go

	s, err := newSupervisor(path, log)
	if err == nil {
		s.argv = append([]string{filepath.Base(argv[0])}, argv[1:]...)
		if spare {
			err = s.awaitCall(calls, hello)
			if errors.Is(err, errNotNeeded) {
				return s.vanish()
			}
		} else if err = s.arm(); err == nil {
			err = s.stage()
		}
	}
	if err == nil {
		err = s.open()
	}
	var missing []sandbox.Limit
	if err == nil {
		missing = s.missing
	}
	frame, encodeErr := encodeFrame(greeting{Fault: toWire(err), Missing: missing})
	if encodeErr == nil {
		_, encodeErr = hello.Write(frame)
	}
	_ = hello.Close()
	if err != nil {
		log.Error("sandbox not made", "err", err)
		if s != nil {
			s.abandon()
		}
		return 1
	}
	if encodeErr != nil {
		// The worker died meanwhile. The sandbox is whole, and the next
		// worker that asks for the key gets it.
		log.Info("nobody waits for this sandbox", "err", encodeErr)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	select {
	case <-stop:
		_ = s.end("signal")
	case <-s.over:
	}
	s.farewell()
	return 0
}

// farewell lets the last answers out, but waits for nobody who hangs on.
func (s *supervisor) farewell() {
	done := make(chan struct{})
	go func() {
		s.serving.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Second):
	}
}

// closeStray closes what an ancestor of the worker forgot to: a supervisor
// lives long and would hold on to it.
func closeStray(first int) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < first {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd) // all that this program opened itself has the flag
		}
	}
}

func newSupervisor(path string, log *slog.Logger) (*supervisor, error) {
	box, err := openFolder(path)
	if err != nil {
		return nil, err
	}
	s := &supervisor{
		box: box, log: log, state: starting, processes: map[string]*process{},
		initDone: make(chan struct{}), heard: make(chan struct{}), over: make(chan struct{}), asking: make(chan struct{}),
	}
	return s, nil
}

// ring ends the sandbox at its deadline.
func (s *supervisor) ring() {
	if !s.alarm.wait() {
		return
	}
	s.mu.Lock()
	begun := s.state == starting
	s.mu.Unlock()
	if begun {
		// The kernel keeps us waiting for something. What there is of the
		// sandbox dies with us, and who comes next removes the folder.
		os.Exit(1)
	}
	_ = s.end("deadline")
}

// arm reads what the sandbox shall be, and sets the alarm that ends it.
func (s *supervisor) arm() (err error) {
	if err := s.box.readJSON(specFile, &s.record); err != nil {
		return err
	}
	if s.alarm, err = newAlarm(); err != nil {
		return err
	}
	if err := s.alarm.set(s.record.Deadline); err != nil {
		return err
	}
	go s.ring()
	return nil
}

// stage makes what all sandboxes have, and returns when init is at work on it.
func (s *supervisor) stage() error {
	set := setup{Record: s.record, Box: s.box.path, HostLinks: rootLinks()}
	s.openGroup()
	cloned, err := s.startInit()
	if err == nil {
		// Only now, while init comes up: this process has one processor, and
		// keeps it until the kernel has made init.
		err = set.prepare()
	}
	defer closeMounts(set.Mounts)
	if err != nil {
		return err
	}
	s.joined = s.joinGroup(cloned)
	if s.staged, err = s.orders.give(order{Op: opStage, Setup: &set}, fdsOf(set.Mounts)...); err != nil {
		return err
	}
	return s.bind()
}

// awaitStage returns when init has done what it was at.
func (s *supervisor) awaitStage() error {
	if s.staged == nil {
		return nil
	}
	<-s.joined
	a, files, err := s.orders.answered(s.staged)
	s.staged = nil
	if err == nil {
		err = a.Fault.err("start sandbox")
	}
	if err == nil && len(files) != 1 {
		err = errors.New("init sent no listener")
	}
	if err != nil {
		closeAll(files)
		return err
	}
	s.monitor, err = newMonitor(files[0], s.log)
	return err
}

func fdsOf(mounts []mount) (fds []int) {
	for _, m := range mounts {
		fds = append(fds, m.fd)
	}
	return fds
}

// open makes the sandbox of the spec and returns when it can be used.
func (s *supervisor) open() (err error) {
	set := setup{Record: s.record, Box: s.box.path}
	err = set.prepareOwn()
	defer closeMounts(set.Mounts)
	if err != nil {
		return err
	}
	if err := s.awaitStage(); err != nil {
		return err
	}
	s.limitGroup()
	a, files, err := s.orders.do(order{Op: opSetup, Setup: &set}, fdsOf(set.Mounts)...)
	if err == nil {
		err = a.Fault.err("start sandbox")
	}
	if err != nil {
		closeAll(files)
		if s.group.OOMs() > 0 {
			return fault.New("start sandbox", fault.Invalid, "%d bytes of memory are too few for this host's init", s.record.Limits.MemoryBytes).
				Hinted("Give each sandbox more with --memory SIZE.")
		}
		return err
	}
	if s.record.Gateway != "" {
		if len(files) != 1 {
			closeAll(files)
			return errors.New("init sent no listener")
		}
		if s.gateway, err = forward(files[0], s.record.Gateway, s.log); err != nil {
			return err
		}
	}
	s.monitor.watch(s.record, s.box)
	return s.listen()
}

// prepare makes what init is given for opStage. As root that is the mounts;
// another user's init opens them itself.
func (s *setup) prepare() (err error) {
	if err := makeLayers(s.Record, s.Box); err != nil {
		return fileFault("make folders", err)
	}
	if s.Record.Identity.Root {
		s.Mounts, err = openSystem()
	}
	return refusal("open mounts", err)
}

// prepareOwn is prepare for opSetup.
func (s *setup) prepareOwn() (err error) {
	if len(s.Record.Layers) > 0 {
		if err := os.Mkdir(filepath.Join(s.Box, workDir), 0o700); err != nil {
			return fileFault("make folders", err)
		}
	}
	if s.Record.Identity.Root {
		s.Mounts, err = openOwn(s.Record, s.Box)
	}
	return refusal("open mounts", err)
}

// namespaces are what separates a sandbox from the host. See clockNamespace for
// one more.
const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// clockNamespace is the flag of a time namespace, or 0 on a kernel that has
// none (before Linux 5.6). Its clocks show what the host's do: they can be set
// only as long as nobody is in it, and a process that is cloned into it is.
// The flag exists in clone3 only, which Go uses when it sees it; clone has a
// signal number in its place.
func clockNamespace() uintptr {
	if _, err := os.Stat("/proc/self/ns/time"); err != nil {
		return 0
	}
	return unix.CLONE_NEWTIME
}

// startInit starts this program again as PID 1 of new namespaces, and says
// whether the kernel could put it into the cgroup at that.
func (s *supervisor) startInit() (cloned bool, err error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return false, err
	}
	defer theirs.Close()
	s.orders.open(ours, s.initDone)
	clock := clockNamespace()
	start := func() (err error) {
		attr := initAttr(s.record.Identity)
		attr.Cloneflags |= clock
		if cloned {
			attr.UseCgroupFD, attr.CgroupFD = true, int(s.group.Dir().Fd())
		}
		s.init, err = newInit(append(slices.Clone(s.argv), initWord), theirs, attr)
		return err
	}
	cloned = s.group.Dir() != nil
	started := make(chan error)
	go func() {
		// Init dies with the thread that started it. This one does nothing
		// else from now on.
		runtime.LockOSThread()
		leave, err := s.group.Enter()
		if err != nil {
			s.log.Info("init is not born into all of the cgroup", "err", err)
			leave = func() error { return nil }
		}
		err = start()
		if err != nil && cloned {
			// It may still be let in later; what else is wrong shows again.
			s.log.Info("not born into the cgroup", "err", err)
			cloned = false
			err = start()
		}
		if err != nil && clock != 0 {
			// Where a filter of a container around us refuses clone3, the
			// sandbox does without.
			s.log.Info("no time namespace", "err", err)
			clock = 0
			err = start()
		}
		if left := leave(); left != nil && err == nil {
			// This thread would keep the cgroup for ever, and count in it.
			err = errors.Join(left, s.init.kill())
			_, _ = s.init.wait() // how it ended was said
		}
		started <- err
		if err != nil {
			return
		}
		// The first process of a pid namespace is reaped after all others.
		how, err := s.init.wait()
		s.log.Info("init ended", "code", how.Code, "signal", how.Signal, "err", err)
		<-s.heard
		spent := s.bereaved()
		close(s.initDone)
		if !spent {
			s.initGone()
		}
	}()
	if err := <-started; err != nil {
		_ = ours.Close()
		close(s.initDone)
		s.init = nil
		return false, cloneFault(err)
	}
	go s.orders.hear(s)
	if s.left.Init, err = identify(s.init.pid); err != nil {
		return false, err
	}
	return cloned, s.box.writeRemains(s.left)
}

func initAttr(id identity) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL, Cloneflags: namespaces}
	if id.Root {
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: id.First, Size: id.Count}}
		attr.GidMappings = attr.UidMappings
		attr.GidMappingsEnableSetgroups = true
		attr.Credential = &syscall.Credential{Uid: 0, Gid: 0}
		return attr
	}
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: agentID, HostID: id.First, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: agentID, HostID: id.Group, Size: 1}}
	// Who is not root inside keeps no capability over exec unless it is
	// ambient. The first four are what setup needs; the others are those
	// that an overlay works with, which keeps the credentials of whoever
	// mounted it and has folders that not even their owner may enter.
	attr.AmbientCaps = []uintptr{
		unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SETPCAP, unix.CAP_SYS_RESOURCE,
		unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_FSETID,
	}
	return attr
}

// cloneFault says why namespaces cannot be had.
func cloneFault(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EUSERS), errors.Is(err, unix.ENOSYS):
		return fault.New("make namespaces", fault.Unsupported, "the kernel refuses: %w", err).Hinted("%s", namespaceHint())
	case errors.Is(err, unix.EACCES):
		return fault.New("start init", fault.Unsupported, "%w", err).
			Hinted("The supervisor program must be executable by everybody (mode 0755): inside a sandbox it runs as nobody.")
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return fault.New("make namespaces", fault.Unavailable, "%w", err)
	}
	return fault.Wrap("make namespaces", err)
}

// bind makes the socket that workers will come to.
func (s *supervisor) bind() (err error) {
	s.listener, err = net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fdPath(s.box.fd(), socketFile)})
	if err != nil {
		return err
	}
	s.listener.SetUnlinkOnClose(false) // it goes with the folder
	return nil
}

// listen opens the way in for workers and says so.
func (s *supervisor) listen() error {
	self, err := identify(os.Getpid())
	if err != nil {
		return err
	}
	s.setState(ready)
	select {
	case <-s.initDone:
		return errors.New("init died")
	default:
	}
	go s.watch()
	go s.serve(s.listener)
	return s.box.writeJSON(refFile, handle{Key: s.record.Key, Instance: s.record.Instance, Supervisor: self})
}

// initGone ends a sandbox whose init died without having been told to.
func (s *supervisor) initGone() {
	s.mu.Lock()
	expected := s.state != ready
	s.mu.Unlock()
	if !expected {
		_ = s.end("init is dead")
	}
}

func (s *supervisor) setState(to state) {
	s.mu.Lock()
	s.state = to
	s.mu.Unlock()
}

// kill returns when everything in the sandbox is dead.
func (s *supervisor) kill() {
	if s.init != nil {
		_ = s.init.kill() // an error: it is dead already
		s.letDie()
	}
	<-s.initDone
}

// end destroys the sandbox, once. A second call waits for the first.
func (s *supervisor) end(why string) error {
	s.asked.Do(func() { close(s.asking) }) // a copy that is under way is called off
	s.ending.Lock()
	defer s.ending.Unlock()
	select {
	case <-s.over:
		return s.overBy
	default:
	}
	s.log.Info("destroying", "why", why)
	s.setState(dying)
	s.kill()
	s.gateway.close()
	s.monitor.close()
	s.alarm.close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.overBy = errors.Join(s.removeGroup(ctx), s.box.remove(s.record.Dir))
	if s.overBy != nil {
		s.log.Error("not everything could be removed", "err", s.overBy)
	}
	close(s.over)
	return s.overBy
}

// abandon undoes what open began. The folder is the worker's to remove, who
// is alive and waiting; if not, the next one's who comes across it.
func (s *supervisor) abandon() {
	if s.init != nil {
		s.setState(dying)
		s.kill()
	}
	s.gateway.close()
	s.monitor.close()
	s.alarm.close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.removeGroup(ctx); err != nil {
		s.log.Error("cgroup not removed", "err", err)
	}
}
