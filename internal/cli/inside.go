package cli

import (
	"context"
	"strconv"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// An inside is the sandbox of one fork, for the commands that go into it.
// They go there by themselves, past Temporal: what happens inside is a matter
// of this host and of the provider.
type inside struct {
	provider sandbox.Provider
	ref      sandbox.Ref
	id       string // of the fork
}

// inside finds the sandbox of the fork that t names.
func (env *Env) inside(ctx context.Context, t target) (inside, error) {
	runs, run, err := env.open(ctx, t)
	if err != nil {
		return inside{}, err
	}
	defer runs.Close()
	p, err := runs.Progress(ctx, run)
	if err != nil {
		return inside{}, err
	}
	if err := hasFork(p, run, t.num); err != nil {
		return inside{}, err
	}
	switch s := (sight{Progress: p}).status(t.num); {
	case s.Ended():
		return inside{}, fault.New("", fault.NotFound, "fork %d of run %s has ended (%s), and its sandbox is gone", t.num, run, flat(string(s))).
			Hinted("See what it did with: %s logs %s/%d", program, run, t.num)
	case s != fork.Running:
		return inside{}, fault.New("", fault.Unavailable, "fork %d of run %s has not started, and has no sandbox yet", t.num, run).
			Hinted("See where it stands with: %s status %s", program, run)
	}
	plan, err := runs.Plan(ctx, run)
	if err != nil {
		return inside{}, err
	}
	if env.Providers == nil {
		return inside{}, missing("provider")
	}
	set, err := env.Providers(env.Globals)
	if err != nil {
		return inside{}, err
	}
	provider, err := set.Get(plan.Provider)
	if err != nil {
		return inside{}, err
	}
	infos, err := provider.List(ctx, map[string]string{sandbox.LabelRun: run, sandbox.LabelFork: strconv.Itoa(t.num)})
	if err != nil {
		return inside{}, err
	}
	in := inside{provider: provider, id: fork.Spec{Run: run, Num: t.num}.ID()}
	if len(infos) == 0 {
		err := fault.New("", fault.Unavailable, "fork %d of run %s has no sandbox that can be seen from here", t.num, run)
		if _, bound := sandbox.As[sandbox.HostBound](provider); bound {
			return in, err.Hinted("It is being made or removed right now, or it lives on another worker's host: only there, as the same user, can it be reached.")
		}
		return in, err.Hinted("It is being made or removed right now.")
	}
	in.ref = infos[0].Ref
	if infos[0].Paused {
		return in, fault.New("", fault.Conflict, "fork %d of run %s is paused", t.num, run).Hinted("Let it go on with: %s resume %s", program, run)
	}
	return in, nil
}

// cannot is the error of a provider that lacks what a command needs.
func (in inside) cannot(what string) error {
	return fault.New("", fault.Unsupported, "provider %s has no %s", in.provider.Name(), what).
		Hinted("See what each can do with: %s providers", program)
}
