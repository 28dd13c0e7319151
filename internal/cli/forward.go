package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

type forwardOptions struct {
	Target target
	Ports  []portPair
	Output string
}

// A portPair is a port of this host and the one in the sandbox that it leads
// to.
type portPair struct{ local, remote int }

// newForward makes the "forward" command.
func newForward(env *Env, run func(context.Context, *Env, forwardOptions) error) *cobra.Command {
	if run == nil {
		run = runForward
	}
	var opts forwardOptions
	cmd := &cobra.Command{
		Use:     "forward RUN/N [LOCAL:]PORT...",
		GroupID: groupRuns,
		Short:   "Reach ports in the sandbox of a fork that runs",
		Long: `Forward listens on this host's 127.0.0.1 and carries every connection to PORT on
the loopback of the fork's sandbox, until you end it with Ctrl-C or the fork
ends. LOCAL is the port to listen on: the same number when left out, any free
one when 0.

Whoever can connect to this host's loopback can use it. What answers is a
program that you may have reason not to trust: to a browser, all ports of
127.0.0.1 are one site that shares its cookies.
` + targetHelp + exits(common...),
		Example: "  sandbox-temporal forward @last/1 3000\n" +
			"  sandbox-temporal forward 3f9c/2 8081:8080 0:5432\n" +
			"  sandbox-temporal forward @last/1 0:3000 --output json",
		Args: func(cmd *cobra.Command, words []string) error {
			if len(words) < 2 {
				return args("RUN/N", "PORT")(cmd, words)
			}
			return nil
		},
		ValidArgsFunction: completeRuns(env, fork.Running),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = forkArg(words[0]); err != nil {
				return err
			}
			opts.Ports = nil
			for _, word := range words[1:] {
				pair, err := parsePorts(word)
				if err != nil {
					return err
				}
				opts.Ports = append(opts.Ports, pair)
			}
			return run(cmd.Context(), env, opts)
		},
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

// parsePorts reads "PORT" or "LOCAL:PORT".
func parsePorts(word string) (portPair, error) {
	local, remote, two := strings.Cut(word, ":")
	if !two {
		remote = local
	}
	r, err := strconv.ParseUint(remote, 10, 16)
	l, localErr := strconv.ParseUint(local, 10, 16)
	if err != nil || localErr != nil || r == 0 {
		return portPair{}, usage("Write PORT or LOCAL:PORT with numbers up to 65535, as 3000 or 8081:8080.", "%q names no port", word)
	}
	return portPair{int(l), int(r)}, nil
}

// forwarding is what is printed of each port.
type forwarding struct {
	Address string `json:"address"`    // to connect to
	Local   int    `json:"local_port"` // that of Address
	Port    int    `json:"port"`       // in the sandbox

	listener net.Listener
}

func runForward(ctx context.Context, env *Env, opts forwardOptions) error {
	in, err := env.inside(ctx, opts.Target)
	if err != nil {
		return err
	}
	dialer, ok := sandbox.As[sandbox.PortDialer](in.provider)
	if !ok {
		return in.cannot("ports")
	}
	ways, err := listenAll(opts.Ports)
	if err != nil {
		return err
	}
	defer func() {
		for _, w := range ways {
			w.listener.Close()
		}
	}()
	if opts.Output == "json" {
		if err := writeJSON(env.Stdout, ways); err != nil {
			return err
		}
	} else {
		for _, w := range ways {
			if _, err := fmt.Fprintf(env.Stdout, "%s leads to port %d of %s\n", w.Address, w.Port, in.id); err != nil {
				return err
			}
		}
		fmt.Fprintln(env.Stderr, "Ctrl-C ends it.")
	}
	serving, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	f := &portForward{in: in, dialer: dialer, end: stop, complain: env.complainer(), slots: make(chan struct{}, maxConnections)}
	var all sync.WaitGroup
	for _, w := range ways {
		all.Go(func() { f.accept(serving, w, &all) })
	}
	all.Go(func() { f.watch(serving, env.timing.alive) })
	<-serving.Done()
	for _, w := range ways {
		w.listener.Close()
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil // as it is meant to end
	}
	return context.Cause(serving)
}

// listenAll listens on every port, or on none.
func listenAll(ports []portPair) (ways []*forwarding, err error) {
	defer func() {
		if err != nil {
			for _, w := range ways {
				w.listener.Close()
			}
		}
	}()
	for _, p := range ports {
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.local)))
		if err != nil {
			return ways, fault.New("", fault.Conflict, "cannot listen on port %d of this host: %w", p.local, err).
				Hinted("Choose another one, or let any free one be taken: 0:%d", p.remote)
		}
		ways = append(ways, &forwarding{l.Addr().String(), l.Addr().(*net.TCPAddr).Port, p.remote, l})
	}
	return ways, nil
}

// maxConnections bounds the connections of one forward. More wait.
const maxConnections = 256

type portForward struct {
	in       inside
	dialer   sandbox.PortDialer
	end      context.CancelCauseFunc
	complain func(error)
	slots    chan struct{}
}

// accept carries what connects to w.
func (f *portForward) accept(ctx context.Context, w *forwarding, all *sync.WaitGroup) {
	for {
		select {
		case f.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c, err := w.listener.Accept()
		if err != nil {
			<-f.slots
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			f.complain(err)
			if pause(ctx, 100*time.Millisecond) != nil { // out of descriptors: that passes
				return
			}
			continue
		}
		all.Go(func() {
			defer func() { <-f.slots }()
			f.carry(ctx, c.(*net.TCPConn), w.Port)
		})
	}
}

// carry connects one caller. When nobody answers in the sandbox the caller
// sees its connection closed, as by a server that is down.
func (f *portForward) carry(ctx context.Context, c *net.TCPConn, port int) {
	defer c.Close()
	dialing, cancel := context.WithTimeout(ctx, 10*time.Second)
	to, err := f.dialer.DialPort(dialing, f.in.ref, port)
	cancel()
	if err != nil {
		if fault.KindOf(err) == fault.NotFound {
			f.end(err)
		} else if ctx.Err() == nil {
			f.complain(err)
		}
		return
	}
	defer to.Close()
	stop := context.AfterFunc(ctx, func() {
		_, _ = c.Close(), to.Close() // nothing is to be saved
	})
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(to, c) // either side may go at any time
		_ = to.CloseWrite()
	}()
	_, _ = io.Copy(c, to)
	_ = c.CloseWrite()
	<-done
}

// watch ends the forward when the sandbox is gone.
func (f *portForward) watch(ctx context.Context, every time.Duration) {
	for pause(ctx, every) == nil {
		sb, err := f.in.provider.Attach(ctx, f.in.ref)
		if err == nil {
			_ = sb.Close() // nothing was done with it
		}
		if fault.KindOf(err) == fault.NotFound {
			f.end(fault.New("", fault.NotFound, "the sandbox of %s is gone: its fork has ended", f.in.id))
			return
		}
	}
}

// complainer returns what tells the user of troubles, each that is not the
// same as the one before.
func (env *Env) complainer() func(error) {
	var mu sync.Mutex
	last := ""
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if text := flat(err.Error()); text != last {
			fmt.Fprintf(env.Stderr, "%s: %s\n", program, text)
			last = text
		}
	}
}
