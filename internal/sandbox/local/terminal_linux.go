package local

import (
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A terminal is one that init makes in the sandbox's own devpts; its outer end
// travels out to the worker. Nothing of the worker's goes in: no descriptor of
// the terminal that the person sits at is ever open in a sandbox, so nobody
// there can type into it (TIOCSTI).

var _ sandbox.Terminal = (*terminal)(nil)

// A terminal is the worker's end. It lives for as long as its connection to
// the supervisor.
type terminal struct {
	master *os.File
	link   *link

	ended chan struct{} // closed when exit and err are there
	exit  sandbox.Exit
	err   error

	closing sync.Once
	closed  error
}

// OpenTerminal has init start the command. Cmd.Stdin must be empty, since the
// terminal is its input; TERM is "dumb" unless Cmd.Env says otherwise.
func (p *Provider) OpenTerminal(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, dimensions sandbox.TerminalSize) (sandbox.Terminal, error) {
	const op = "local: open terminal"
	sb, err := p.attach(ctx, op, ref)
	if err != nil {
		return nil, err
	}
	defer sb.Close()
	c := wireCommand(cmd)
	if err := checkTerminal(op, c); err != nil {
		return nil, err
	}
	_, file, l, err := sb.converse(ctx, op, request{Op: opTerminal, Cmd: c, Size: &size{dimensions.Rows, dimensions.Columns}})
	if err != nil {
		return nil, err
	}
	if file == nil {
		return nil, fault.New(op, fault.Internal, "the supervisor sent no terminal")
	}
	master, err := pollable(file)
	if err != nil {
		_ = l.conn.Close()
		return nil, fault.Wrap(op, err)
	}
	t := &terminal{master: master, link: l, ended: make(chan struct{})}
	go t.await(sb)
	return t, nil
}

func checkTerminal(op string, c *command) error {
	if c != nil && len(c.Stdin) > 0 {
		return fault.New(op, fault.Invalid, "a command on a terminal has no other standard input")
	}
	return checkCommand(op, "terminal", c)
}

// pollable takes f over and returns it as a file on which a read can be broken
// off by Close.
func pollable(f *os.File) (*os.File, error) {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// await hears how the command ended.
func (t *terminal) await(sb *attached) {
	defer close(t.ended)
	var r response
	files, err := t.link.receive(&r)
	closeAll(files)
	switch {
	case errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EINVAL):
		t.err = fault.New("local: terminal", fault.Cancelled, "it was hung up")
	case err != nil:
		t.err = gone("local: terminal", sb.handle)
	case r.Fault != nil:
		t.err = r.Fault.err("local: terminal")
	case r.Exit == nil:
		t.err = fault.New("local: terminal", fault.Internal, "the supervisor did not say how the command ended")
	default:
		t.exit = *r.Exit
	}
}

// Read returns what the sandbox shows.
func (t *terminal) Read(p []byte) (int, error) {
	n, err := t.master.Read(p)
	if errors.Is(err, unix.EIO) { // nobody has the inner end open any more
		err = io.EOF
	}
	return n, err
}

// Write types.
func (t *terminal) Write(p []byte) (int, error) { return t.master.Write(p) }

// Resize tells the sandbox, whose foreground processes get SIGWINCH.
func (t *terminal) Resize(to sandbox.TerminalSize) error {
	return fault.Wrap("local: resize terminal", setSize(t.master, size{to.Rows, to.Columns}))
}

// Wait waits for the end of the command.
func (t *terminal) Wait(ctx context.Context) (sandbox.Exit, error) {
	select {
	case <-t.ended:
		return t.exit, t.err
	case <-ctx.Done():
		return sandbox.Exit{}, fault.New("local: wait for terminal", fault.Cancelled, "%w", context.Cause(ctx))
	}
}

// Close hangs up. A command that ignores it is killed by the supervisor.
func (t *terminal) Close() error {
	t.closing.Do(func() { t.closed = errors.Join(t.master.Close(), t.link.conn.Close()) })
	return t.closed
}

func setSize(f *os.File, to size) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	err = raw.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: to.Rows, Col: to.Columns})
	})
	return errors.Join(err, os.NewSyscallError("set size of terminal", ioctlErr))
}

// terminals are the commands on terminals that the supervisor knows of.
type terminals struct {
	mu   sync.Mutex
	made int
	open map[string]*openTerminal
}

type openTerminal struct {
	done chan struct{}
	exit sandbox.Exit // read after done
}

// add returns a new one, with a name that no process can have.
func (t *terminals) add() (id string, o *openTerminal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.made++
	id, o = "terminal:"+strconv.Itoa(t.made), &openTerminal{done: make(chan struct{})}
	if t.open == nil {
		t.open = map[string]*openTerminal{}
	}
	t.open[id] = o
	return id, o
}

func (t *terminals) drop(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open, id)
}

// ended reports whether the id is that of a terminal.
func (t *terminals) ended(id string, exit sandbox.Exit) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.open[id]
	if o == nil {
		return !sandbox.ValidID(id)
	}
	delete(t.open, id)
	o.exit = sandbox.Exit{Code: exit.Code & 0xff, Signal: cut(exit.Signal)}
	close(o.done)
	return true
}

// hangUpTime is how long a command may go on after its terminal was hung up.
const hangUpTime = 3 * time.Second

// serveTerminal has init open a terminal, hands it to the worker, and stays
// until the command has ended or the worker is gone.
func (s *supervisor) serveTerminal(q request, l *link) {
	id, o := s.terminals.add()
	defer s.terminals.drop(id)
	master, err := s.openTerminal(id, q)
	r := response{Version: protocol, Fault: toWire(err)}
	if err != nil {
		_ = l.send(r) // who does not listen any more need not know
		return
	}
	err = l.send(r, int(master.Fd()))
	// From here on the worker's copy is the only one: when that is closed,
	// by whatever end of the worker, the kernel hangs the terminal up.
	_ = master.Close()
	gone := make(chan struct{})
	if err != nil {
		close(gone)
	} else {
		go func() {
			defer close(gone)
			_, _ = l.receive(&request{}) // nothing more is to be said
		}()
	}
	select {
	case <-o.done:
		_ = l.send(response{Version: protocol, Exit: &o.exit})
	case <-gone:
		s.hangUp(id, o)
	case <-s.initDone:
		_ = l.send(response{Version: protocol, Fault: toWire(fault.New("terminal", fault.NotFound, "the sandbox is gone"))})
	}
}

// hangUp ends a command that the kernel's hang-up did not. When the sandbox is
// paused, it does so afterwards.
func (s *supervisor) hangUp(id string, o *openTerminal) {
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGKILL} {
		if _, err := s.orderAwake(order{Op: opSignal, ID: id, Signal: int(sig)}); err != nil {
			return // everything in the sandbox is dead
		}
		select {
		case <-o.done:
			return
		case <-s.initDone:
			return
		case <-time.After(hangUpTime):
		}
	}
}

func (s *supervisor) openTerminal(id string, q request) (*os.File, error) {
	const op = "open terminal"
	if err := s.usable(op); err != nil {
		return nil, err
	}
	if err := checkTerminal(op, q.Cmd); err != nil {
		return nil, err
	}
	if q.Size == nil {
		q.Size = &size{}
	}
	a, files, err := s.command(order{Op: opTerminal, ID: id, Cmd: q.Cmd, Size: q.Size})
	if err == nil {
		err = a.Fault.err(op)
	}
	if err == nil && len(files) != 1 {
		err = fault.New(op, fault.Internal, "init sent %d files", len(files))
	}
	if err == nil {
		err = fault.Wrap(op, checkMaster(files[0]))
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	if a.Exit.Code != 0 {
		s.terminals.ended(id, a.Exit) // the program could not be run; the terminal shows why
	}
	return files[0], nil
}

// multiplexer is the device number of /dev/ptmx, which every outer end of a
// terminal has (Documentation/admin-guide/devices.txt).
var multiplexer = unix.Mkdev(5, 2)

// checkMaster makes sure that f, which comes out of a sandbox, is the outer
// end of a terminal and nothing else.
func checkMaster(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != multiplexer {
		return errors.New("what came is no terminal")
	}
	// Only an outer end knows its number.
	if _, err := unix.IoctlGetUint32(int(f.Fd()), unix.TIOCGPTN); err != nil {
		return os.NewSyscallError("number of terminal", err)
	}
	return nil
}

// openTerminal runs in init: it makes a terminal as the agent and starts the
// program on it, as the leader of a session of its own. The outer end is
// returned also when the program cannot be run: it shows why.
func (in *initProcess) openTerminal(o order) (sandbox.Exit, *os.File, error) {
	const op = "open terminal"
	if o.Cmd == nil || len(o.Cmd.Args) == 0 || o.Size == nil {
		return sandbox.Exit{}, nil, fault.New(op, fault.Invalid, "the order is incomplete")
	}
	if err := checkDir(op, string(o.Cmd.Dir)); err != nil {
		return sandbox.Exit{}, nil, err
	}
	master, slave, err := openPTY(*o.Size)
	if err != nil {
		return sandbox.Exit{}, nil, fault.New(op, fault.Unavailable, "%w", err)
	}
	defer slave.Close()
	exit, note, err := in.execute(op, o, []uintptr{slave.Fd(), slave.Fd(), slave.Fd()}, &syscall.SysProcAttr{Setsid: true, Setctty: true})
	if err == nil && exit.Code != 0 {
		_, err = slave.WriteString(note)
	}
	if err != nil {
		_ = master.Close()
		return sandbox.Exit{}, nil, err
	}
	return exit, master, nil
}

// openPTY opens both ends of a new terminal of this sandbox.
func openPTY(of size) (master, slave *os.File, err error) {
	m, err := unix.Open("/dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/pts/ptmx", Err: err}
	}
	master = os.NewFile(uintptr(m), "terminal")
	defer func() {
		if err != nil {
			_ = master.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(m, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, os.NewSyscallError("unlock terminal", err)
	}
	if err := unix.IoctlSetWinsize(m, unix.TIOCSWINSZ, &unix.Winsize{Row: of.Rows, Col: of.Columns}); err != nil {
		return nil, nil, os.NewSyscallError("set size of terminal", err)
	}
	// By the outer end and not by a path.
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(m), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return nil, nil, os.NewSyscallError("open inner end of terminal", errno)
	}
	slave = os.NewFile(fd, "terminal")
	// So that the kernel erases a whole character, and not a byte of it.
	mode, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
	if err == nil {
		mode.Iflag |= unix.IUTF8
		err = unix.IoctlSetTermios(int(fd), unix.TCSETS, mode)
	}
	if err != nil {
		_ = slave.Close()
		return nil, nil, os.NewSyscallError("set mode of terminal", err)
	}
	return master, slave, nil
}
