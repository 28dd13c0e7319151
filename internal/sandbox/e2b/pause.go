package e2b

import (
	"context"
	"net/http"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Pause stops every process of the agent and then the machine. The first is
// so that somebody can look into the sandbox while it is paused, for which the
// machine has to run.
func (p *Provider) Pause(ctx context.Context, ref sandbox.Ref) error {
	const op = "e2b: pause sandbox"
	b, m, err := p.look(ctx, op, ref)
	if err != nil || m.State == statePaused {
		return err
	}
	if _, err := b.script(ctx, userRoot, "touch "+pausedFile); err != nil {
		return asFault(op, err)
	}
	if _, err := b.script(ctx, userAgentOf, holdScript); err != nil {
		return asFault(op, err)
	}
	return asFault(op, b.c.pause(ctx, b.id))
}

// Resume lets the machine go on and then the agent's processes.
func (p *Provider) Resume(ctx context.Context, ref sandbox.Ref) error {
	const op = "e2b: resume sandbox"
	b, m, err := p.look(ctx, op, ref)
	if err != nil {
		return err
	}
	if m.State == statePaused {
		if _, err := b.c.connect(ctx, b.id, b.c.plan.lifetime); err != nil {
			return asFault(op, err)
		}
	}
	if _, err := b.script(ctx, userAgentOf, letScript); err != nil {
		return asFault(op, err)
	}
	if _, err := b.script(ctx, userRoot, "rm -f "+pausedFile); err != nil {
		return asFault(op, err)
	}
	deadline, err := b.deadline(ctx)
	if err == nil && m.State == statePaused {
		b.renewing.Lock()
		defer b.renewing.Unlock()
		err = b.move(ctx, deadline)
	}
	return asFault(op, err)
}

// look finds a sandbox and says what E2B says of it.
func (p *Provider) look(ctx context.Context, op string, ref sandbox.Ref) (*box, machine, error) {
	h, err := readHandle(op, ref)
	if err != nil {
		return nil, machine{}, err
	}
	c, err := p.connect()
	if err != nil {
		return nil, machine{}, fault.Wrap(op, err)
	}
	m, err := c.get(ctx, h.Sandbox)
	if statusOf(err) == http.StatusNotFound {
		return nil, m, gone(op, ref.ID)
	}
	if err != nil {
		return nil, m, asFault(op, err)
	}
	b := &box{p: p, c: c, ref: ref, id: h.Sandbox, first: m.Metadata[metaDeadline], end: m.End, look: time.Now().Add(time.Second)}
	b.link.Store(c.envd(m))
	return b, m, nil
}
