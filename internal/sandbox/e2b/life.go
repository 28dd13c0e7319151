package e2b

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// SetDeadline writes the deadline down in the sandbox, where all who work in
// it find it, and moves E2B's timeout as near to it as the plan allows.
func (b *box) SetDeadline(ctx context.Context, t time.Time) error {
	const op = "e2b: set deadline"
	if time.Until(t) <= 0 {
		return asFault(op, b.c.kill(ctx, b.id))
	}
	err := b.reading(ctx, func() error {
		_, err := b.script(ctx, userRoot, `printf %s "$1" > `+deadlineFile+`.new && mv `+deadlineFile+`.new `+deadlineFile, t.UTC().Format(time.RFC3339Nano))
		if err != nil {
			return err
		}
		b.renewing.Lock()
		defer b.renewing.Unlock()
		return b.move(ctx, t)
	})
	return asFault(op, err)
}

// deadline reads what SetDeadline wrote. A stranger could have: what cannot be
// read is the deadline that E2B's metadata has, which nobody can change.
func (b *box) deadline(ctx context.Context) (time.Time, error) {
	r, err := b.script(ctx, userRoot, "cat "+deadlineFile)
	if err != nil {
		return time.Time{}, err
	}
	t, err := time.Parse(time.RFC3339Nano, strings.TrimSpace(string(r.stdout)))
	if err != nil {
		return time.Parse(time.RFC3339, b.first)
	}
	return t, nil
}

// forgetEnd has the end looked at when it next matters.
func (b *box) forgetEnd() {
	b.mu.Lock()
	b.end, b.look = time.Time{}, time.Time{}
	b.mu.Unlock()
}

// due reports whether it is time to look after the end of the sandbox.
func (b *box) due(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return now.After(b.look) && (b.end.IsZero() || b.end.Sub(now) < b.p.margin(b.c))
}

// keep sees to it that a sandbox that is worked in lives up to its deadline,
// though E2B's timeouts are shorter. It costs nothing until one is near.
func (b *box) keep(ctx context.Context) error {
	if !b.due(time.Now()) || !b.renewing.TryLock() {
		return nil // or somebody is at it
	}
	defer b.renewing.Unlock()
	// Where there is nothing to do, or nothing can be done, it is not looked
	// at with every poll.
	b.mu.Lock()
	b.look = time.Now().Add(b.p.margin(b.c) / 8)
	b.mu.Unlock()
	m, err := b.c.get(ctx, b.id)
	if statusOf(err) == http.StatusNotFound {
		return gone("", b.ref.ID)
	}
	if err != nil || m.State == statePaused {
		return nil //nolint:nilerr // what is to be done in it will say so
	}
	b.setEnd(m.End)
	if time.Until(m.End) >= b.p.margin(b.c) {
		return nil
	}
	deadline, err := b.deadline(ctx)
	if err != nil {
		return nil //nolint:nilerr // as above
	}
	if deadline.Sub(m.End) > 2*time.Second {
		if err := b.move(ctx, deadline); err != nil && (fault.KindOf(err) != fault.Unsupported || b.told.CompareAndSwap(false, true)) {
			b.p.o.Logger.WarnContext(ctx, "A sandbox could not be given more time", "sandbox", b.ref.ID, "error", err)
		}
	}
	return nil
}

func (b *box) setEnd(end time.Time) {
	b.mu.Lock()
	b.end = end
	b.mu.Unlock()
}

// move brings E2B's timeout as near to t as it can be. Where the plan cuts
// time since the start, a pause begins a new one: the memory is kept, and
// the agent goes on as if nothing had been. The caller holds renewing.
func (b *box) move(ctx context.Context, t time.Time) error {
	life := min(time.Until(t), b.c.plan.lifetime)
	err := b.c.setTimeout(ctx, b.id, life)
	if fault.KindOf(err) == fault.Unsupported {
		_, connectErr := b.c.connect(ctx, b.id, life) // which can only give more
		if connectErr != nil {
			return errors.Join(err, connectErr)
		}
		err = nil
	}
	if s := statusOf(err); err != nil && s != http.StatusBadRequest {
		return err
	}
	m, getErr := b.c.get(ctx, b.id)
	if getErr != nil {
		return getErr
	}
	// One that was given less than was asked for is at the plan's end. It is
	// crossed when that comes near, or cannot be told to be far.
	short := err != nil || time.Until(m.End) < life-min(5*time.Second, b.p.margin(b.c)/4)
	if short && (m.End.IsZero() || time.Until(m.End) < b.p.margin(b.c)) {
		// What is begun here is brought to its end: a sandbox that nobody
		// resumes would wait for the next who looks.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*callTime)
		defer cancel()
		if err := b.c.pause(ctx, b.id); err != nil {
			return err
		}
		if _, err := b.c.connect(ctx, b.id, life); err != nil {
			return err
		}
		if m, getErr = b.c.get(ctx, b.id); getErr != nil {
			return getErr
		}
	}
	b.mu.Lock()
	b.end, b.look = m.End, time.Now().Add(b.p.margin(b.c)/8)
	b.mu.Unlock()
	return nil
}
