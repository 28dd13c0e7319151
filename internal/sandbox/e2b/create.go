package e2b

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A keyLock keeps two calls of this process from making one sandbox each.
type keyLock struct {
	held  chan struct{}
	users int
}

// lock waits for the others that work on the key.
func (p *Provider) lock(ctx context.Context, key string) (unlock func(), err error) {
	p.mu.Lock()
	l := p.keys[key]
	if l == nil {
		l = &keyLock{held: make(chan struct{}, 1)}
		p.keys[key] = l
	}
	l.users++
	p.mu.Unlock()
	leave := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(p.keys, key)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}

// Create makes a sandbox of the template, or of the base's snapshot, with
// metadata of its own.
func (p *Provider) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
	const op = "e2b: create sandbox"
	switch {
	case !sandbox.ValidID(spec.Key):
		return sandbox.Ref{}, fault.New(op, fault.Invalid, "%q is not a key of a sandbox", spec.Key)
	case spec.Base != "" && !sandbox.ValidID(spec.Base):
		return sandbox.Ref{}, fault.New(op, fault.Invalid, "%q is not a key of a base", spec.Base)
	case spec.Deadline.IsZero():
		return sandbox.Ref{}, fault.New(op, fault.Invalid, "a sandbox needs a deadline")
	}
	c, err := p.connect()
	if err != nil {
		return sandbox.Ref{}, fault.Wrap(op, err)
	}
	unlock, err := p.lock(ctx, spec.Key)
	if err != nil {
		return sandbox.Ref{}, asFault(op, err)
	}
	defer unlock()
	ref, err := p.create(ctx, c, spec)
	return ref, asFault(op, err)
}

func (p *Provider) create(ctx context.Context, c *client, spec sandbox.Spec) (sandbox.Ref, error) {
	// One that another call made: this process knows those of its own, which
	// a list may not show yet.
	if m, ok, err := p.remembered(ctx, c, spec.Key); err != nil || ok {
		return handle{spec.Key, m.ID}.ref(), err
	}
	m, ok, err := p.find(ctx, c, spec.Key)
	if err != nil {
		return sandbox.Ref{}, err
	}
	if ok {
		err = p.fit(ctx, c, m, spec)
	} else {
		m, err = p.fresh(ctx, c, spec)
	}
	if err != nil {
		return sandbox.Ref{}, err
	}
	p.mu.Lock()
	p.made[spec.Key] = m.ID
	p.mu.Unlock()
	p.useBase(spec.Base)
	return handle{spec.Key, m.ID}.ref(), nil
}

// fresh makes a sandbox and prepares it, and looks meanwhile whether another
// worker has made one for the key: hardly ever one has.
func (p *Provider) fresh(ctx context.Context, c *client, spec sandbox.Spec) (machine, error) {
	mine, err := p.add(ctx, c, spec)
	if err != nil {
		return mine, err
	}
	fitting, cancel := context.WithCancel(ctx)
	defer cancel()
	var fit sync.WaitGroup
	var fitErr error
	fit.Go(func() { fitErr = p.fit(fitting, c, mine, spec) })
	kept, err := p.elect(ctx, c, spec.Key, mine)
	if err == nil && kept.ID == mine.ID {
		fit.Wait()
		return mine, fitErr
	}
	cancel() // it is not wanted any more
	fit.Wait()
	if err != nil {
		return mine, errors.Join(err, c.kill(context.WithoutCancel(ctx), mine.ID))
	}
	return kept, p.fit(ctx, c, kept, spec)
}

// fit prepares a sandbox, or kills it: the next try begins with a new one.
func (p *Provider) fit(ctx context.Context, c *client, m machine, spec sandbox.Spec) error {
	err := p.prepare(ctx, c, m, spec)
	if err != nil {
		err = errors.Join(err, c.kill(context.WithoutCancel(ctx), m.ID))
	}
	return err
}

func (p *Provider) remembered(ctx context.Context, c *client, key string) (machine, bool, error) {
	p.mu.Lock()
	id := p.made[key]
	p.mu.Unlock()
	if id == "" {
		return machine{}, false, nil
	}
	m, err := c.get(ctx, id)
	if statusOf(err) == http.StatusNotFound {
		p.mu.Lock()
		delete(p.made, key)
		p.mu.Unlock()
		return m, false, nil
	}
	return m, err == nil, err
}

// find returns the sandbox that was made for the key. Of several the oldest
// is it: forks that others made of ours have its metadata too.
func (p *Provider) find(ctx context.Context, c *client, key string) (machine, bool, error) {
	all, err := p.candidates(ctx, c, key)
	if err != nil || len(all) == 0 {
		return machine{}, false, err
	}
	for _, m := range all {
		if whole, err := c.get(ctx, m.ID); err == nil { // with its token
			return whole, true, nil
		} else if statusOf(err) != http.StatusNotFound {
			return whole, false, err
		}
	}
	return machine{}, false, nil
}

// candidates are those with the key, the oldest first. The first fork of a
// sandbox cannot be older than it; one nonce is one creation.
func (p *Provider) candidates(ctx context.Context, c *client, key string) ([]machine, error) {
	all, err := c.list(ctx, map[string]string{metaOwner: metaVersion, metaKey: key})
	all = slices.DeleteFunc(all, func(m machine) bool {
		return m.Metadata[metaOwner] != metaVersion || m.Metadata[metaKey] != key || !validMachineID(m.ID)
	})
	slices.SortFunc(all, func(a, b machine) int {
		if d := a.Started.Compare(b.Started); d != 0 {
			return d
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all, err
}

// elect looks whether another worker made a sandbox for the key at the same
// time, and keeps the older one. It looks until it sees its own: a list that
// does not show what was just made would not show the other either.
func (p *Provider) elect(ctx context.Context, c *client, key string, mine machine) (machine, error) {
	for n, wait := 0, 50*time.Millisecond; n < 8; n, wait = n+1, min(2*wait, time.Second) {
		all, err := p.candidates(ctx, c, key)
		if err != nil {
			return mine, err
		}
		if slices.ContainsFunc(all, func(m machine) bool { return m.ID == mine.ID }) {
			if all[0].ID == mine.ID {
				return mine, nil
			}
			if first, err := c.get(ctx, all[0].ID); err == nil {
				return first, c.kill(ctx, mine.ID)
			}
		}
		if err := sleep(ctx, wait); err != nil {
			return mine, err
		}
	}
	return mine, nil // E2B's list is later than anybody can wait
}

// add makes a sandbox, at the pace of the plan. When no answer came, the
// nonce tells whether the call was carried out.
func (p *Provider) add(ctx context.Context, c *client, spec sandbox.Spec) (machine, error) {
	nonce := newNonce()
	in := newMachine{Template: c.template(), Metadata: metadata(spec, nonce)}
	if spec.Base != "" {
		s, err := p.base(ctx, c, spec.Base)
		if err != nil {
			return machine{}, err
		}
		in.Template = s.ID
	}
	queued, told := spec.Deadline, false
	if p.o.Queue > 0 {
		queued = time.Now().Add(p.o.Queue)
	}
	wait := 500 * time.Millisecond
	for n := 1; ; n++ {
		if err := c.pace(ctx); err != nil {
			return machine{}, err
		}
		in.Timeout = max(seconds(min(time.Until(spec.Deadline), c.plan.lifetime)), 1)
		m, err := c.create(ctx, in)
		var status *StatusError
		switch errors.As(err, &status); {
		case err == nil:
			return m, nil
		case ctx.Err() != nil:
			return m, errors.Join(context.Cause(ctx), p.abandon(ctx, c, spec.Key, nonce))
		case status != nil && status.Status == http.StatusTooManyRequests:
			// The team's others have to end first.
			n = 0
			if time.Now().After(queued) {
				return m, err
			}
			if !told {
				told = true
				p.o.Logger.WarnContext(ctx, "A sandbox is not made yet: E2B's limit is reached, and it is asked for again until there is room", "key", spec.Key, "error", err)
			}
		case status != nil && status.Status < 500:
			return m, unknownTemplate(in.Template, err)
		case untrusted(err):
			return m, err // it was asked for nothing
		default:
			if m, ok, err := p.madeWith(ctx, c, spec.Key, nonce); err == nil && ok {
				return m, nil
			}
			if n == tries {
				return m, errors.Join(err, p.abandon(ctx, c, spec.Key, nonce))
			}
		}
		if err := sleep(ctx, wait); err != nil {
			return m, err
		}
		wait = min(2*wait, 10*time.Second)
	}
}

func unknownTemplate(template string, err error) error {
	if statusOf(err) != http.StatusNotFound {
		return err
	}
	return fault.New("", fault.NotFound, "template %q: %w", template, err).
		Hinted("Set SANDBOX_TEMPORAL_E2B_TEMPLATE to a template of the team that the key is of; E2B's own is %s.", DefaultTemplate)
}

// madeWith finds what a call made that was not answered.
func (p *Provider) madeWith(ctx context.Context, c *client, key, nonce string) (machine, bool, error) {
	all, err := p.candidates(ctx, c, key)
	for _, m := range all {
		if m.Metadata[metaNonce] == nonce {
			whole, err := c.get(ctx, m.ID)
			return whole, err == nil, err
		}
	}
	return machine{}, false, err
}

// abandon kills what a call may have made for somebody who went away.
func (p *Provider) abandon(ctx context.Context, c *client, key, nonce string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	m, ok, err := p.madeWith(ctx, c, key, nonce)
	if err != nil || !ok {
		return nil //nolint:nilerr // its labels are found by the clean-up
	}
	return c.kill(ctx, m.ID)
}

func newNonce() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// prepare makes a machine a sandbox of ours.
func (p *Provider) prepare(ctx context.Context, c *client, m machine, spec sandbox.Spec) error {
	b := &box{p: p, c: c, ref: handle{spec.Key, m.ID}.ref(), id: m.ID, first: m.Metadata[metaDeadline], end: m.End}
	b.link.Store(c.envd(m))
	if m.State == statePaused {
		return nil // it was prepared before it was paused
	}
	if spec.Base != "" {
		if _, err := b.script(ctx, userAgentOf, endScript, m.ID); err != nil {
			return err
		}
	}
	r, err := b.script(ctx, userRoot, prepareScript, m.ID, spec.Deadline.UTC().Format(time.RFC3339Nano))
	if err != nil {
		return err
	}
	if r.code != 0 {
		return fault.New("prepare", fault.Unsupported, "the template cannot be prepared: status %d: %s", r.code, clean(string(r.stderr), maxErrorText, nil)).
			Hinted("A template needs a user named user, a shell, and the tools of coreutils and util-linux; E2B's own have them.")
	}
	return nil
}
