package fake

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

var _ sandbox.Conn = (*net.TCPConn)(nil)

// Pause stops every process with SIGSTOP and lets none be started.
func (p *Provider) Pause(ctx context.Context, ref sandbox.Ref) error {
	const op = "fake: pause sandbox"
	b, err := p.must(op, ref)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.paused && !b.ended {
		return nil
	}
	if err := b.usable(op); err != nil {
		return err
	}
	if err := b.halt(ctx); err != nil {
		return fault.Wrap(op, err)
	}
	b.paused = true
	return nil
}

// halt stops every process. The caller holds mu, so that none is started.
func (b *box) halt(ctx context.Context) error {
	for step := time.Millisecond; ; step = min(2*step, 50*time.Millisecond) {
		// The mark finds also those that left their group.
		moving := false
		for _, pid := range b.marked() {
			_ = syscall.Kill(pid, syscall.SIGSTOP) // an error: it is gone
			moving = moving || !standsStill(pid)
		}
		if !moving {
			return nil
		}
		select {
		case <-time.After(step):
		case <-ctx.Done():
			b.wake()
			return fault.New("", fault.Cancelled, "%w", context.Cause(ctx))
		}
	}
}

// Resume continues every process.
func (p *Provider) Resume(_ context.Context, ref sandbox.Ref) error {
	const op = "fake: resume sandbox"
	b, err := p.must(op, ref)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.paused = false
	if err := b.usable(op); err != nil {
		return err
	}
	b.wake()
	return nil
}

func (b *box) wake() {
	for _, pid := range b.marked() {
		_ = syscall.Kill(pid, syscall.SIGCONT) // an error: it is gone
	}
}

func (b *box) isPaused() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.paused
}

// standsStill reports whether the process is stopped, or gone.
func standsStill(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	i := bytes.LastIndexByte(stat, ')')
	return i >= 0 && len(stat) > i+2 && bytes.ContainsRune([]byte("TtZXxD"), rune(stat[i+2]))
}

// DialPort connects to the port on the host's loopback, which is the sandbox's
// too.
func (p *Provider) DialPort(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
	const op = "fake: dial port"
	b, err := p.must(op, ref)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	err = b.usable(op)
	b.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if port < 1 || port > 65535 {
		return nil, fault.New(op, fault.Invalid, "%d is no port", port)
	}
	var d net.Dialer
	var refused error
	for _, host := range []string{"127.0.0.1", "::1"} {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return c.(*net.TCPConn), nil
		}
		refused = errors.Join(refused, err)
	}
	return nil, fault.New(op, fault.Unavailable, "%w", refused)
}
