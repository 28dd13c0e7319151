package fake

import (
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

var (
	_ sandbox.Terminaler = (*Provider)(nil)
	_ sandbox.Terminal   = (*terminal)(nil)
)

// A terminal is one of the host's.
type terminal struct {
	master *os.File
	done   chan struct{}
	exit   sandbox.Exit // read after done

	closing sync.Once
	closed  error
}

// OpenTerminal runs the command on a terminal of the host.
func (p *Provider) OpenTerminal(_ context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error) {
	const op = "fake: open terminal"
	b, err := p.must(op, ref)
	if err != nil {
		return nil, err
	}
	if len(cmd.Args) == 0 || cmd.Stdin != "" {
		return nil, fault.New(op, fault.Invalid, "the command is empty, or has another standard input than its terminal")
	}
	c, err := b.command(op, cmd)
	if err != nil {
		return nil, err
	}
	master, slave, err := openPTY()
	if err != nil {
		return nil, fault.New(op, fault.Unavailable, "%w", err)
	}
	defer slave.Close()
	t := &terminal{master: master, done: make(chan struct{})}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err = b.usable(op); err == nil {
		err = t.Resize(size)
	}
	var exit sandbox.Exit
	if err == nil {
		c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		exit, err = launch(op, c, slave)
	}
	if err != nil {
		return nil, errors.Join(err, master.Close())
	}
	if exit.Code != 0 {
		t.exit = exit
		close(t.done)
		return t, nil
	}
	go func() {
		_ = c.Wait() // how it ended stands in the state
		t.exit = exitOf(c.ProcessState)
		close(t.done)
	}()
	return t, nil
}

func openPTY() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(int(n)), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}

// Read returns what the command shows.
func (t *terminal) Read(p []byte) (int, error) {
	n, err := t.master.Read(p)
	if errors.Is(err, unix.EIO) { // nobody has the inner end open any more
		err = io.EOF
	}
	return n, err
}

// Write types.
func (t *terminal) Write(p []byte) (int, error) { return t.master.Write(p) }

// Resize sets the size.
func (t *terminal) Resize(size sandbox.TerminalSize) error {
	raw, err := t.master.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) {
		setErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Columns})
	})
	return errors.Join(err, setErr)
}

// Wait waits for the end of the command.
func (t *terminal) Wait(ctx context.Context) (sandbox.Exit, error) {
	select {
	case <-t.done:
		return t.exit, nil
	case <-ctx.Done():
		return sandbox.Exit{}, fault.New("fake: wait for terminal", fault.Cancelled, "%w", context.Cause(ctx))
	}
}

// Close has the kernel hang up.
func (t *terminal) Close() error {
	t.closing.Do(func() { t.closed = t.master.Close() })
	return t.closed
}
