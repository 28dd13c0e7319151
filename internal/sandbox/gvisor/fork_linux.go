package gvisor

import (
	"context"
	"errors"
	"runtime"
	"sync"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// ForkLive has the sandbox saved while it runs, which holds it still for a
// moment, and restores what was saved in one new sandbox for each spec.
//
// Connections inside a fork go on, those to the gateway are cut: whoever had
// one sees it reset, as when a network breaks. The forks have the sandbox's
// base, mounts, environment and, at first, its random numbers.
func (p *Provider) ForkLive(ctx context.Context, ref sandbox.Ref, specs []sandbox.Spec) ([]sandbox.LiveFork, error) {
	const op = "gvisor: fork live"
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	var parent record
	if err := a.readJSON(specFile, &parent); err != nil {
		return nil, fault.Wrap(op, err)
	}
	if err := checkUnchanged(op, parent); err != nil {
		return nil, err
	}
	forks := make([]sandbox.LiveFork, len(specs))
	records := make([]record, len(specs))
	for i, s := range specs {
		records[i], forks[i].Err = p.checkFork(op, parent, s)
	}
	saved, c, err := a.converse(ctx, op, request{Op: opSave})
	if err != nil {
		return nil, err
	}
	defer c.Close() // then the guardian removes what it has saved
	slots := make(chan struct{}, max(2, runtime.NumCPU()))
	var all sync.WaitGroup
	for i := range specs {
		if forks[i].Err != nil {
			continue
		}
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			r := records[i]
			r.From = saved.Image
			forks[i].Ref, forks[i].Err = p.create(ctx, op, r, func() error { return nil }, &r)
		})
	}
	all.Wait()
	return forks, nil
}

// checkFork reads a spec and fills its record as the parent's.
func (p *Provider) checkFork(op string, parent record, s sandbox.Spec) (record, error) {
	if s.Base != "" {
		return record{}, fault.New(op, fault.Invalid, "a live fork has the base of its sandbox")
	}
	s.Mounts = nil
	r, err := p.check(op, s)
	if err != nil {
		return record{}, err
	}
	if r.Identity != parent.Identity {
		return record{}, fault.New(op, fault.Denied, "the sandbox was made by another user")
	}
	r.Mounts, r.Seen, r.Base, r.Runsc, r.Program = parent.Mounts, parent.Seen, parent.Base, parent.Runsc, parent.Program
	return r, nil
}

// checkUnchanged makes sure that what the sandbox was started with is there
// still. A process that is restored goes on in the middle of its program: in
// another version of the file it would be lost. And what one version of gVisor
// has saved another cannot read.
func checkUnchanged(op string, r record) error {
	for i, name := range r.sources() {
		now, err := seen(name)
		if err != nil || i >= len(r.Seen) || now != r.Seen[i] {
			return fault.New(op, fault.Conflict, "%w", errors.Join(errors.New(name+" is not what it was when the sandbox was made"), err)).
				Hinted("Fork sandboxes that were made after it was updated.")
		}
	}
	return nil
}
