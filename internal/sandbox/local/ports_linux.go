package local

import (
	"context"
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A socket belongs for ever to the network that it was made in. Init makes it,
// in the sandbox's; the worker connects it. So a program in the sandbox that
// accepts nothing keeps nobody waiting but who asked.

var _ sandbox.Conn = (*net.TCPConn)(nil)

// DialPort tries 127.0.0.1 and then ::1: programs that listen on "localhost"
// mean one of them.
func (p *Provider) DialPort(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
	const op = "local: dial port"
	if port < 1 || port > 65535 {
		return nil, fault.New(op, fault.Invalid, "%d is no port", port)
	}
	sb, err := p.attach(ctx, op, ref)
	if err != nil {
		return nil, err
	}
	defer sb.Close()
	var refused error
	for _, way := range []struct {
		network string
		to      unix.Sockaddr
	}{
		{"tcp4", &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}},
		{"tcp6", &unix.SockaddrInet6{Port: port, Addr: [16]byte{15: 1}}},
	} {
		_, file, l, err := sb.converse(ctx, op, request{Op: opDial, Network: way.network})
		if err != nil {
			if refused != nil && fault.KindOf(err) == fault.Unsupported {
				break // a kernel without IPv6
			}
			return nil, err
		}
		if file == nil {
			return nil, fault.New(op, fault.Internal, "the supervisor sent no socket")
		}
		_ = l.conn.Close()
		conn, err := connect(ctx, file, way.to)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, p.ctxFault(ctx, op, err)
		}
		if refused == nil {
			refused = err
		}
	}
	return nil, fault.New(op, fault.Unavailable, "nobody listens on port %d in the sandbox: %w", port, refused)
}

// connect takes f over.
func connect(ctx context.Context, f *os.File, to unix.Sockaddr) (*net.TCPConn, error) {
	defer f.Close()
	fd := int(f.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	err := unix.Connect(fd, to)
	if errors.Is(err, unix.EINPROGRESS) {
		if err := waitEvents(ctx, fd, unix.POLLOUT); err != nil {
			return nil, err
		}
		var code int
		if code, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
			err = unix.Errno(code)
		}
	}
	if err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	conn, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a TCP socket")
	}
	return conn, nil
}

// openSocket has init make a socket, and makes sure that it is a fresh one.
func (s *supervisor) openSocket(q request) (*writable, error) {
	const op = "open socket"
	if q.Network != "tcp4" && q.Network != "tcp6" {
		return nil, fault.New(op, fault.Invalid, "%q is no network", cut(q.Network))
	}
	a, files, err := s.command(order{Op: opDial, Network: q.Network})
	if err == nil {
		err = a.Fault.err(op)
	}
	if err == nil && len(files) != 1 {
		err = fault.New(op, fault.Internal, "init sent %d files", len(files))
	}
	if err == nil {
		err = fault.Wrap(op, checkSocket(files[0], q.Network))
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return &writable{File: files[0]}, nil
}

// checkSocket makes sure that f, which comes out of a sandbox, is a TCP socket
// of the sandbox's network that leads nowhere yet.
func checkSocket(f *os.File, network string) error {
	fd := int(f.Fd())
	for _, want := range []struct{ option, value int }{
		{unix.SO_DOMAIN, family(network)}, {unix.SO_TYPE, unix.SOCK_STREAM}, {unix.SO_PROTOCOL, unix.IPPROTO_TCP}, {unix.SO_ACCEPTCONN, 0},
	} {
		got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, want.option)
		if err != nil {
			return os.NewSyscallError("getsockopt", err)
		}
		if got != want.value {
			return errors.New("what came is no fresh TCP socket")
		}
	}
	if _, err := unix.Getpeername(fd); !errors.Is(err, unix.ENOTCONN) {
		return errors.New("what came is connected already")
	}
	return nil
}

func family(network string) int {
	if network == "tcp6" {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// newSocket runs in init.
func newSocket(network string) (int, error) {
	fd, err := unix.Socket(family(network), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return -1, fault.New("open socket", fault.Unsupported, "%w", err)
	}
	if err != nil {
		return -1, fault.New("open socket", fault.Unavailable, "%w", err)
	}
	return fd, nil
}
