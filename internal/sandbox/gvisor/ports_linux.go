package gvisor

import (
	"context"
	"net"
	"strconv"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// DialPort has init connect to 127.0.0.1 and then ::1 in gVisor's own network:
// programs that listen on "localhost" mean one of them.
func (p *Provider) DialPort(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
	const op = "gvisor: dial port"
	if port < 1 || port > 65535 {
		return nil, fault.New(op, fault.Invalid, "%d is no port", port)
	}
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	_, c, err := a.converse(ctx, op, request{Op: opDial, Port: port})
	if err != nil {
		return nil, err
	}
	if !c.stop() { // from here on the connection is the caller's, and not ctx's
		_ = c.Close()
		return nil, contextFault(ctx, op, context.Cause(ctx))
	}
	return c.UnixConn, nil
}

// dialTime bounds how long a program inside may let a caller wait.
const dialTime = 10 * time.Second

// dial connects a stream to a port of the sandbox.
func dial(port int, s *stream) (func(bool), error) {
	const op = "dial port"
	if port < 1 || port > 65535 {
		return nil, fault.New(op, fault.Invalid, "%d is no port", port)
	}
	var c net.Conn
	var refused error
	for _, host := range []string{"127.0.0.1", "::1"} {
		var err error
		if c, err = (&net.Dialer{Timeout: dialTime}).DialContext(context.Background(), "tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			break
		}
		if refused == nil {
			refused = err
		}
	}
	if c == nil {
		return nil, fault.New(op, fault.Unavailable, "nobody listens on port %d in the sandbox: %w", port, refused)
	}
	return func(ok bool) {
		if !ok {
			_ = c.Close()
			return
		}
		splice(c.(*net.TCPConn), s)
	}, nil
}
