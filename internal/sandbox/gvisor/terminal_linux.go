package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A terminal is one of gVisor's, in the sandbox. What is typed and shown goes
// over a stream, in chunks whose first byte says what they are; nothing of the
// worker's own terminal goes in, and no descriptor comes out.
const (
	chunkData = 'd' // either way
	chunkSize = 's' // to init: JSON of a sandbox.TerminalSize
	chunkExit = 'x' // from init, the last: JSON of a sandbox.Exit
)

// maxTyped is a chunk's most.
const maxTyped = 32 << 10

var _ sandbox.Terminal = (*terminal)(nil)

// A terminal is the worker's end.
type terminal struct {
	conn io.ReadWriteCloser

	writing sync.Mutex
	mu      sync.Mutex
	change  *sync.Cond
	shown   []byte // and not yet read
	over    bool   // nothing more is shown
	closed  bool

	ended chan struct{} // closed when exit and err are there
	exit  sandbox.Exit
	err   error
}

// OpenTerminal has init start the command. Cmd.Stdin must be empty, since the
// terminal is its input; TERM is "dumb" unless Cmd.Env says otherwise.
func (p *Provider) OpenTerminal(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error) {
	const op = "gvisor: open terminal"
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	q := request{Op: opTerminal, ID: terminalID, Cmd: wireCommand(cmd), TerminalSize: &size}
	if err := checkTerminal(op, q); err != nil {
		return nil, err
	}
	_, c, err := a.converse(ctx, op, q)
	if err != nil {
		return nil, err
	}
	if !c.stop() { // from here on the connection is the caller's, and not ctx's
		_ = c.Close()
		return nil, contextFault(ctx, op, context.Cause(ctx))
	}
	t := &terminal{conn: c.UnixConn, ended: make(chan struct{})}
	t.change = sync.NewCond(&t.mu)
	go t.hear(a.handle)
	return t, nil
}

// terminalID is the id that checkStart sees; commands on terminals have none.
const terminalID = "terminal"

func checkTerminal(op string, q request) error {
	if q.Cmd != nil && len(q.Cmd.Stdin) > 0 {
		return fault.New(op, fault.Invalid, "a command on a terminal has no other standard input")
	}
	q.ID = terminalID
	return checkStart(op, q)
}

// unread bounds what is kept of what nobody reads; beyond it the command has
// to wait, as on any terminal.
const unread = 256 << 10

// hear takes what init says until that is the end.
func (t *terminal) hear(h handle) {
	const op = "gvisor: terminal"
	var err error
	exited := false
	for err == nil && !exited {
		var chunk []byte
		if chunk, err = readChunk(t.conn, maxChunk); err != nil || len(chunk) == 0 {
			continue
		}
		switch chunk[0] {
		case chunkData:
			t.show(chunk[1:])
		case chunkExit:
			if err = json.Unmarshal(chunk[1:], &t.exit); err == nil {
				t.exit, exited = tame(t.exit), true
			}
		}
	}
	t.mu.Lock()
	t.over = true
	closed := t.closed
	t.change.Broadcast()
	t.mu.Unlock()
	switch {
	case exited:
	case closed:
		t.err = fault.New(op, fault.Cancelled, "it was hung up")
	default:
		t.err = gone(op, h)
	}
	close(t.ended)
}

func (t *terminal) show(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.shown) > unread && !t.closed {
		t.change.Wait()
	}
	t.shown = append(t.shown, b...)
	t.change.Broadcast()
}

// Read returns what the sandbox shows.
func (t *terminal) Read(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.shown) == 0 && !t.over && !t.closed && len(p) > 0 {
		t.change.Wait()
	}
	if t.closed {
		return 0, os.ErrClosed
	}
	n := copy(p, t.shown)
	if t.shown = t.shown[n:]; len(t.shown) == 0 {
		t.shown = nil
	}
	t.change.Broadcast()
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (t *terminal) send(kind byte, b []byte) error {
	t.writing.Lock()
	defer t.writing.Unlock()
	return writeChunk(t.conn, append([]byte{kind}, b...))
}

// Write types.
func (t *terminal) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		part := p[n:min(n+maxTyped, len(p))]
		if err := t.send(chunkData, part); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// Resize tells the sandbox, whose foreground processes get SIGWINCH.
func (t *terminal) Resize(to sandbox.TerminalSize) error {
	b, err := json.Marshal(to)
	if err == nil {
		err = t.send(chunkSize, b)
	}
	return fault.Wrap("gvisor: resize terminal", err)
}

// Wait waits for the end of the command.
func (t *terminal) Wait(ctx context.Context) (sandbox.Exit, error) {
	select {
	case <-t.ended:
		return t.exit, t.err
	case <-ctx.Done():
		return sandbox.Exit{}, fault.New("gvisor: wait for terminal", fault.Cancelled, "%w", context.Cause(ctx))
	}
}

// Close hangs up. A command that ignores it is killed by init.
func (t *terminal) Close() error {
	t.mu.Lock()
	again := t.closed
	t.closed = true
	t.change.Broadcast()
	t.mu.Unlock()
	if again {
		return nil
	}
	return t.conn.Close()
}

// terminal runs in init: it makes a terminal as the agent and starts the
// program on it, as the leader of a session of its own.
func (in *initProcess) terminal(q request, s *stream) (func(bool), error) {
	const op = "open terminal"
	if err := checkTerminal(op, q); err != nil {
		return nil, err
	}
	if q.TerminalSize == nil {
		q.TerminalSize = &sandbox.TerminalSize{}
	}
	var master, slave *os.File
	err := in.hand.do(func() (err error) {
		master, slave, err = openPTY(*q.TerminalSize)
		return err
	})
	if err != nil {
		return nil, fault.New(op, fault.Unavailable, "%w", err)
	}
	defer slave.Close()
	g := &program{known: make(chan struct{}), done: make(chan struct{})}
	close(g.known)
	exit, note, err := in.execute(g, q, []uintptr{slave.Fd(), slave.Fd(), slave.Fd()}, true)
	if err == nil && exit.Code != 0 {
		_, err = slave.WriteString(note)
		g.end(exit)
	}
	if err != nil {
		_ = master.Close()
		return nil, err
	}
	return func(ok bool) { serveTerminal(master, g, s, ok) }, nil
}

// hangUpTime is how long a command may go on after its terminal was hung up.
const hangUpTime = 3 * time.Second

// serveTerminal carries both ways until the command has ended or the worker
// has hung up.
func serveTerminal(master *os.File, g *program, s *stream, ok bool) {
	typed := make(chan struct{})
	shown := make(chan struct{})
	go func() {
		defer close(typed)
		if ok {
			obey(master, s)
		}
	}()
	go func() {
		defer close(shown)
		show(s, master)
	}()
	select {
	case <-g.done:
		// What it wrote last is on its way; what still has the terminal open
		// is not waited for.
		select {
		case <-shown:
		case <-time.After(100 * time.Millisecond):
			_ = master.SetReadDeadline(time.Now())
			<-shown
		}
		if b, err := json.Marshal(g.exit); err == nil {
			_ = writeChunk(s, append([]byte{chunkExit}, b...)) // nobody listens: then nobody has to know
		}
		_ = master.Close()
	case <-typed:
		_ = master.Close() // gVisor hangs up
		g.hangUp()
		<-shown
	}
}

// hangUp ends everybody in the session of the program.
func (g *program) hangUp() {
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGKILL} {
		signalSession(g.pid, sig)
		select {
		case <-g.done:
			if sig == unix.SIGKILL {
				return
			}
		case <-time.After(hangUpTime):
		}
	}
}

// signalSession reaches all whose session is that of its leader.
func signalSession(leader int, sig unix.Signal) {
	if leader <= 1 {
		return
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return
	}
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		pid, err := strconv.Atoi(strings.Split(name, "/")[2])
		if err == nil && len(f) > 3 && f[3] == strconv.Itoa(leader) {
			_ = unix.Kill(pid, sig) // an error: it is gone
		}
	}
}

// obey types what arrives, until nothing more does.
func obey(master *os.File, s io.Reader) {
	for {
		chunk, err := readChunk(s, maxChunk)
		if err != nil {
			return
		}
		if len(chunk) == 0 {
			continue
		}
		switch chunk[0] {
		case chunkData:
			_, err = master.Write(chunk[1:])
		case chunkSize:
			var size sandbox.TerminalSize
			if json.Unmarshal(chunk[1:], &size) == nil {
				_ = setSize(master, size) // an error: it is closed
			}
		}
		if err != nil {
			// The worker is told by the end of the command.
			_, _ = io.Copy(io.Discard, s)
			return
		}
	}
}

// show sends what the terminal shows, until nobody has its inner end open.
func show(s io.Writer, master io.Reader) {
	buf := make([]byte, maxTyped)
	buf[0] = chunkData
	for {
		n, err := master.Read(buf[1:])
		if n > 0 {
			if writeChunk(s, buf[:1+n]) != nil {
				_, _ = io.Copy(io.Discard, master)
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func setSize(f *os.File, to sandbox.TerminalSize) error {
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

// openPTY opens both ends of a new terminal of this sandbox.
func openPTY(size sandbox.TerminalSize) (master, slave *os.File, err error) {
	const multiplexer = "/dev/pts/ptmx"
	m, err := unix.Open(multiplexer, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: multiplexer, Err: err}
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
	if err := unix.IoctlSetWinsize(m, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Columns}); err != nil {
		return nil, nil, os.NewSyscallError("set size of terminal", err)
	}
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(m), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return nil, nil, os.NewSyscallError("open inner end of terminal", errno)
	}
	slave = os.NewFile(fd, "terminal")
	// So that a whole character is erased, and not a byte of it.
	if mode, err := unix.IoctlGetTermios(int(fd), unix.TCGETS); err == nil {
		mode.Iflag |= unix.IUTF8
		_ = unix.IoctlSetTermios(int(fd), unix.TCSETS, mode) // an error: then it is a byte
	}
	return master, slave, nil
}

// credential is the agent.
func credential() *syscall.Credential { return &syscall.Credential{Uid: agentID, Gid: agentID} }
