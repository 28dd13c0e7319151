package engine

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A portName is how a user chooses a port.
type portName struct{ of, flag, variable string }

var (
	grpcPort = portName{"Temporal", "--port", "SANDBOX_TEMPORAL_PORT"}
	uiPort   = portName{"the Web UI", "--ui-port", "SANDBOX_TEMPORAL_UI_PORT"}
)

// listen opens a port, 0 for any. One that is taken is fault.Conflict.
func listen(ctx context.Context, name portName, host string, port int) (net.Listener, error) {
	const op = "engine: listen"
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	switch {
	case err == nil:
		return ln, nil
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fault.New(op, fault.Conflict, "port %d, wanted for %s, is taken: %w", port, name.of, err).
			Hinted("Choose another one with %s or %s; 0 is any free one.", name.flag, name.variable)
	case errors.Is(err, fs.ErrPermission):
		return nil, fault.New(op, fault.Denied, "port %d, wanted for %s: %w", port, name.of, err).
			Hinted("Choose one above 1023 with %s or %s; 0 is any free one.", name.flag, name.variable)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fault.New(op, fault.Invalid, "%s is not an address of this machine: %w", host, err)
	}
	return nil, fault.New(op, fault.Internal, "port %d for %s: %w", port, name.of, err)
}

// ports are where the four services of the server listen; all but the first
// are for each other, on the loopback.
type ports struct{ frontend, history, matching, worker int }

const loopback = "127.0.0.1"

// choosePorts finds the server's ports, and refuses a frontend port that is
// taken. The server opens them itself, a moment later: see free.
func choosePorts(ctx context.Context, host string, port int) (ports, error) {
	p := ports{frontend: port}
	if port != 0 {
		ln, err := listen(ctx, grpcPort, host, port)
		if err != nil {
			return ports{}, err
		}
		_ = ln.Close()
	}
	for _, want := range []*int{&p.frontend, &p.history, &p.matching, &p.worker} {
		if *want != 0 {
			continue
		}
		from := loopback
		if want == &p.frontend {
			from = host
		}
		var err error
		if *want, err = free(ctx, from); err != nil {
			return ports{}, err
		}
	}
	return p, nil
}

// free returns a port that is free now and stays so for a minute.
//
// The server takes port numbers, not listeners, so a port must be let go of
// before the server opens it. In between the kernel could give it to another
// process, or to another call of free. It does not as long as a connection on
// that port rests in TIME_WAIT, while a listener with SO_REUSEADDR, which Go
// sets, may have it all the same. So one connection is made, and closed from
// the listening side first, because that side is the one that rests.
func free(ctx context.Context, host string) (int, error) {
	ln, err := listen(ctx, grpcPort, host, 0)
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).Port
	near, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", net.JoinHostPort(dialable(host), strconv.Itoa(port)))
	if err != nil {
		return port, nil // free, only not reserved
	}
	defer near.Close()
	if far, err := ln.Accept(); err == nil {
		_ = far.Close()
	}
	return port, nil
}

// dialable returns the address under which this machine reaches what listens
// on host.
func dialable(host string) string {
	ip := net.ParseIP(host)
	switch {
	case ip == nil || !ip.IsUnspecified():
		return host
	case ip.To4() == nil:
		return "::1"
	}
	return loopback
}
