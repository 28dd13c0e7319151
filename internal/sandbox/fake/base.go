package fake

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A base is a folder and what is known of it. It is a whole copy of its own;
// that it stands on another one is a matter of form.
type base struct {
	below   string // key of the base that its sandbox was started from
	labels  map[string]string
	created time.Time
	used    time.Time
}

// basePath returns the folder of a base, or "" for the key "".
func (p *Provider) basePath(key string) string {
	if key == "" {
		return ""
	}
	return filepath.Join(p.dir, "base-"+key)
}

// Base looks whether there is such a base.
func (p *Provider) Base(_ context.Context, key string) error {
	const op = "fake: look up base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hasBase(op, key)
}

// hasBase needs p.mu, as all that follows does up to Freeze.
func (p *Provider) hasBase(op, key string) error {
	if _, ok := p.bases[key]; !ok {
		return fault.New(op, fault.NotFound, "no base %q", key)
	}
	return nil
}

// useBase notes that a sandbox starts from the base. The sandbox is in
// p.boxes by now, so nobody removes the base any more.
func (p *Provider) useBase(op, key string) error {
	if key == "" {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.hasBase(op, key); err != nil {
		return err
	}
	b := p.bases[key]
	b.used = time.Now()
	p.bases[key] = b
	return nil
}

// users counts who stands on the base.
func (p *Provider) users(key string) (n int) {
	for _, b := range p.boxes {
		if b.spec.Base == key {
			n++
		}
	}
	for _, b := range p.bases {
		if b.below == key {
			n++
		}
	}
	return n
}

// Freeze kills what runs in the sandbox and moves its files away.
func (p *Provider) Freeze(ctx context.Context, ref sandbox.Ref, key string) error {
	return p.store("fake: freeze sandbox", ref, key, func(b *box) error {
		b.markFrozen()
		if err := b.kill(ctx); err != nil {
			return err
		}
		if err := os.Rename(b.root(), p.basePath(key)); err != nil {
			return fault.New("move files", fault.Conflict, "the sandbox was frozen before: %w", err)
		}
		return nil
	})
}

// Snapshot stops what runs in the sandbox, unless it is paused anyway, while it
// copies the files.
func (p *Provider) Snapshot(ctx context.Context, ref sandbox.Ref, key string) error {
	const op = "fake: snapshot sandbox"
	return p.store(op, ref, key, func(b *box) error {
		b.mu.Lock() // nothing is started meanwhile
		defer b.mu.Unlock()
		if !b.paused {
			if err := b.usable(op); err != nil {
				return err
			}
			if err := b.halt(ctx); err != nil {
				return err
			}
			defer b.wake()
		}
		half := filepath.Join(b.dir, "snapshot")
		if err := copyTree(ctx, b.root(), half); err != nil {
			return errors.Join(err, os.RemoveAll(half))
		}
		return os.Rename(half, p.basePath(key))
	})
}

// store has fill make the folder of a base, unless it is there.
func (p *Provider) store(op string, ref sandbox.Ref, key string, fill func(b *box) error) error {
	if err := p.Base(context.Background(), key); fault.KindOf(err) != fault.NotFound {
		return err // nil: it is there
	}
	b, err := p.find(op, ref)
	if err != nil {
		return err
	}
	if b == nil {
		return fault.New(op, fault.NotFound, "sandbox %q is gone", ref.ID)
	}
	b.ending.Lock()
	defer b.ending.Unlock()
	if b.isOver() {
		return fault.New(op, fault.NotFound, "sandbox %q is gone", ref.ID)
	}
	p.storing.Lock() // one base at a time: this is a fake
	defer p.storing.Unlock()
	if p.Base(context.Background(), key) == nil {
		return nil
	}
	if err := fill(b); err != nil {
		return fault.Wrap(op, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bases[key] = base{below: b.spec.Base, labels: maps.Clone(b.spec.Labels), created: time.Now()}
	return nil
}

// Bases looks through the bases in memory.
func (p *Provider) Bases(context.Context) ([]sandbox.BaseInfo, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var infos []sandbox.BaseInfo
	for _, key := range slices.Sorted(maps.Keys(p.bases)) {
		b := p.bases[key]
		info := sandbox.BaseInfo{Key: key, Labels: maps.Clone(b.labels), Created: b.created, Used: b.used, Users: p.users(key), Layers: 1}
		for at := b.below; at != ""; at = p.bases[at].below {
			info.Layers++
		}
		err := filepath.WalkDir(p.basePath(key), func(_ string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := d.Info()
			if err == nil {
				info.Bytes += st.Size()
			}
			return err
		})
		if err != nil {
			info.Damaged = true
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// RemoveBase deletes the folder of the base.
func (p *Provider) RemoveBase(_ context.Context, key string) error {
	const op = "fake: remove base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hasBase(op, key) != nil {
		return nil
	}
	if n := p.users(key); n > 0 {
		return fault.New(op, fault.Conflict, "base %s has %d users", key, n)
	}
	delete(p.bases, key)
	return fault.Wrap(op, os.RemoveAll(p.basePath(key)))
}
