package local

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/confine"
)

// initSocket is the descriptor that init finds its supervisor at.
const initSocket = 3

// initMain is PID 1 of a sandbox. It carries out the supervisor's orders one
// after the other, on one thread that is the agent to the file system, and
// reaps what dies. When the supervisor is gone it ends, and with it
// everything in its pid namespace.
func initMain(sealed bool) int {
	if !sealed && os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "init: program:", execUnchangeable(sealedWord))
		return 1
	}
	// Capabilities, the ids of the file system and the death signal belong
	// to threads. What matters happens on this one.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "init: death signal:", err)
		return 1
	}
	if err := closeOnExec(initSocket); err != nil {
		fmt.Fprintln(os.Stderr, "init: descriptors:", err)
		return 1
	}
	// What is started from this thread sleeps as exactly as anywhere.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, exactSlack, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "init: timer slack:", err)
		return 1
	}
	unix.Umask(0o022)
	conn, err := fileConn(os.NewFile(initSocket, "supervisor"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "init: socket:", err)
		return 1
	}
	in := &initProcess{link: newLink(conn, maxRequest, maxFiles), writes: map[uint64]*write{}}
	for _, op := range []string{opStage, opSetup} {
		if !in.begin(op) {
			return 1
		}
	}
	if err := handleSignals(); err != nil {
		fmt.Fprintln(os.Stderr, "init: signals:", err)
		return 1
	}
	in.programs.run(in)
	for {
		var o order
		files, err := in.link.receive(&o)
		if err != nil {
			return 0 // the supervisor is gone
		}
		err = in.obey(o, files)
		closeAll(files)
		if err != nil {
			return 0
		}
	}
}

// begin carries out one of the orders that make the sandbox, and reports
// whether it goes on.
func (in *initProcess) begin(op string) bool {
	var o order
	files, err := in.link.receive(&o)
	defer closeAll(files)
	if errors.Is(err, io.EOF) {
		return false // nobody needs the sandbox
	}
	if err != nil || o.Op != op || o.Setup == nil {
		fmt.Fprintln(os.Stderr, "init: no", op, err)
		return false
	}
	do := in.setup
	if op == opStage {
		do = in.stage
	}
	listener, err := do(o.Setup, files)
	if err != nil {
		_ = in.answer(answer{Seq: o.Seq, Fault: toWire(err)})
		return false
	}
	if listener == nil {
		return in.answer(answer{Seq: o.Seq}) == nil
	}
	defer listener.Close()
	return in.answer(answer{Seq: o.Seq}, int(listener.Fd())) == nil
}

type initProcess struct {
	link *link
	id   identity
	root tree // under construction, until setup is done

	sending  sync.Mutex // answers come from the orders and from the reaper
	programs programs
	writes   map[uint64]*write
	halted   map[int]bool // what had been stopped before opHalt stopped all; nil: nothing is halted
}

func (in *initProcess) answer(a answer, fds ...int) error {
	in.sending.Lock()
	defer in.sending.Unlock()
	return in.link.send(a, fds...)
}

// obey carries out one order. An error means that there is nobody to answer.
func (in *initProcess) obey(o order, files []*os.File) error {
	a := answer{Seq: o.Seq}
	var err error
	switch o.Op {
	case opPing:
	case opStart:
		a.Exit, a.Note, err = in.start(o, files)
	case opSignal:
		in.programs.signal(o.ID, unix.Signal(o.Signal))
	case opKillAll:
		// The kernel signals everybody at one stroke, and a fork under way
		// is begun again only after its signals: not even a fork bomb
		// outruns it.
		err = ignoreNobody(unix.Kill(-1, unix.SIGKILL))
	case opUsage:
		a.Usage, err = usage(o.Most)
	case opRead, opWrite:
		var f *os.File
		if o.Op == opRead {
			f, err = openRegular(string(o.Path))
		} else {
			f, err = in.beginWrite(o.Seq, string(o.Path))
		}
		if err == nil {
			defer f.Close()
			return in.answer(a, int(f.Fd()))
		}
	case opCommit, opAbort:
		err = in.endWrite(o.Token, o.Op == opCommit)
	case opTerminal:
		var master *os.File
		if a.Exit, master, err = in.openTerminal(o); err == nil {
			defer master.Close()
			return in.answer(a, int(master.Fd()))
		}
	case opDial:
		var fd int
		if fd, err = newSocket(o.Network); err == nil {
			defer unix.Close(fd)
			return in.answer(a, fd)
		}
	case opHalt:
		err = in.halt(o.Patient)
	case opWake:
		in.wake()
	default:
		err = fault.New("init", fault.Unsupported, "%q is not known", o.Op)
	}
	a.Fault = toWire(err)
	return in.answer(a)
}

// stage makes what all sandboxes have. It returns the listener for the monitor.
func (in *initProcess) stage(s *setup, files []*os.File) (*os.File, error) {
	in.id = s.Record.Identity
	mounts, done, err := s.received(files, func() (mountList, error) {
		// What is open in the host's namespace cannot be cloned here, and
		// this one must be set apart first.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return nil, os.NewSyscallError("make mounts private", err)
		}
		return openSystem()
	})
	defer done()
	if err != nil {
		return nil, err
	}
	if err := unix.Sethostname([]byte("sandbox")); err != nil {
		return nil, refusal("set host name", err)
	}
	// An ordinary user's init opens what is the sandbox's own by itself, later
	// and by its path.
	if in.root, err = stageRoot(mounts, s.HostLinks, in.id.Root); err != nil {
		return nil, refusal("build root", err)
	}
	if err := loopbackUp(); err != nil {
		return nil, refusal("loopback", err)
	}
	return listenLoopback(sandbox.ChangesPort)
}

// setup turns this process, which has every capability in its namespaces, into
// one that has next to none in the sandbox. It returns the listener for the
// gateway, when one is asked for.
func (in *initProcess) setup(s *setup, files []*os.File) (*os.File, error) {
	mounts, done, err := s.received(files, func() (mountList, error) { return openOwn(s.Record, s.Box) })
	defer done()
	if err != nil {
		return nil, err
	}
	err = in.root.finish(mounts, s.Record.Limits.MemoryBytes)
	unix.Close(in.root.root)
	if err != nil {
		return nil, refusal("build root", err)
	}
	var listener *os.File
	if s.Record.Gateway != "" {
		var err error
		if listener, err = listenLoopback(sandbox.GatewayPort); err != nil {
			return nil, err
		}
	}
	if err := in.confine(s.Record.Limits); err != nil {
		if listener != nil {
			_ = listener.Close()
		}
		return nil, refusal("confine", err)
	}
	return listener, nil
}

// received returns the mounts whose descriptors came with the setup, or those
// that open opens, until done is called.
func (s *setup) received(files []*os.File, open func() (mountList, error)) (mounts mountList, done func(), err error) {
	if s.Mounts == nil {
		mounts, err := open()
		return mounts, func() { closeMounts(mounts) }, refusal("open mounts", err)
	}
	if len(files) != len(s.Mounts) {
		return nil, func() {}, fmt.Errorf("%d mounts and %d descriptors", len(s.Mounts), len(files))
	}
	for i, f := range files {
		s.Mounts[i].fd = int(f.Fd())
	}
	return s.Mounts, func() {}, nil // whoever received the files closes them
}

func closeMounts(mounts []mount) {
	for _, m := range mounts {
		unix.Close(m.fd)
	}
}

// The capabilities that init keeps for its work: becoming the agent before a
// program starts, and signalling it. It has no use for any when it is the
// agent already.
var kept = []uint{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL}

// confine gives up what setup needed.
func (in *initProcess) confine(limits sandbox.Limits) error {
	var keep []uint
	if in.id.Root {
		keep = kept
	}
	// A keyring of its own, so that the agent does not possess the one that
	// the worker's session was given.
	_, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0)
	if err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return os.NewSyscallError("keyctl", err)
	}
	if err := in.programs.victims(); err != nil {
		return err
	}
	// Neither memory nor descriptors nor the program file of init can be
	// reached through /proc by processes of the same id.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return os.NewSyscallError("not dumpable", err)
	}
	in.programs.limits = limits
	if err := boundQueues(); err != nil {
		return err
	}
	if err := confine.Resources(); err != nil {
		return err
	}
	if err := limitInit(limits, in.id.Root); err != nil {
		return err
	}
	// Before capabilities are gone: some may be needed to see the places.
	if err := confine.Files(places()); err != nil {
		return err
	}
	if err := confine.DropCapabilities(keep); err != nil {
		return err
	}
	if in.id.Root {
		// From here on this thread is the agent wherever a path is opened.
		if err := setFileIDs(agentID); err != nil {
			return err
		}
	}
	// Once more: the kernel forgets it when the ids of the file system change
	// (prctl(2)). An init that is paused does not hear its supervisor's end.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return os.NewSyscallError("death signal", err)
	}
	if err := confine.Neighbours(); err != nil {
		return err
	}
	return confine.Calls()
}

// places are where the agent, and init in its name, may write at all. A rule
// cannot name "the caller's own folder in /proc", and those of processes to
// come do not exist yet, so /proc is in it as a whole; what is not of
// processes there is masked or mounted read-only.
func places() confine.Places {
	p := confine.Places{Folders: []string{"/dev/shm"}, Devices: []string{"/dev"}, Process: []string{"/proc"}}
	for _, l := range layers {
		p.Folders = append(p.Folders, l.target)
	}
	return p
}

func setFileIDs(id int) error {
	// These calls return the id that was, also when they fail; a second one
	// tells.
	if err := unix.Setfsgid(id); err != nil {
		return os.NewSyscallError("setfsgid", err)
	}
	if err := unix.Setfsuid(id); err != nil {
		return os.NewSyscallError("setfsuid", err)
	}
	if now, _ := unix.SetfsuidRetUid(-1); now != id {
		return fmt.Errorf("setfsuid: still %d", now)
	}
	return nil
}

// loopbackUp is all the network there is.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("ioctl", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr))
}

// listenLoopback listens in the sandbox's network. The listener goes to the
// supervisor, who accepts from it on the host.
func listenLoopback(port int) (*os.File, error) {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.File()
}

// closeOnExec keeps every descriptor from first on to this process: its own,
// and those that a careless ancestor let through.
func closeOnExec(first uint) error {
	err := unix.CloseRange(first, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC)
	return os.NewSyscallError("close_range", err)
}
