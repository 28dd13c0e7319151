package activities

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// errPaused is why an agent is let be that was not asked to stop: it cannot
// hear.
var errPaused = errors.New("the sandbox is paused")

// PauseSandbox holds a fork's sandbox still, and moves the sandbox's own
// deadline, which does not stand still. Of the two it does both or neither.
func (a *Activities) PauseSandbox(ctx context.Context, in orchestrator.HoldSandboxInput) (orchestrator.None, error) {
	const op = "pause sandbox"
	defer beat(ctx, phase("pause"))()
	pauser, err := a.pauser(in.Ref.Provider)
	if err == nil {
		err = pauser.Pause(ctx, in.Ref)
	}
	if err == nil {
		if err = a.moveDeadline(ctx, in); err != nil {
			err = errors.Join(err, pauser.Resume(context.WithoutCancel(ctx), in.Ref))
		}
	}
	return orchestrator.None{}, fault.Wrap(op, err)
}

// ResumeSandbox takes that back.
func (a *Activities) ResumeSandbox(ctx context.Context, in orchestrator.HoldSandboxInput) (orchestrator.None, error) {
	const op = "resume sandbox"
	defer beat(ctx, phase("resume"))()
	pauser, err := a.pauser(in.Ref.Provider)
	if err == nil {
		err = pauser.Resume(ctx, in.Ref)
	}
	if err == nil {
		err = a.moveDeadline(ctx, in)
	}
	if fault.KindOf(err) == fault.NotFound {
		err = &fault.Error{Kind: fault.Lost, Err: err}
	}
	return orchestrator.None{}, fault.Wrap(op, err)
}

func (a *Activities) pauser(provider string) (sandbox.Pauser, error) {
	p, err := a.Providers.Get(provider)
	if err != nil {
		return nil, err
	}
	pauser, ok := sandbox.As[sandbox.Pauser](p)
	if !ok {
		return nil, fault.New("", fault.Unsupported, "sandboxes of provider %s cannot be paused", provider).
			Hinted("The forks that run go on; pause without --freeze keeps further ones from starting.")
	}
	return pauser, nil
}

func (a *Activities) moveDeadline(ctx context.Context, in orchestrator.HoldSandboxInput) error {
	sb, err := a.attach(ctx, in.Ref)
	if err != nil {
		return err
	}
	return errors.Join(sb.SetDeadline(ctx, in.Deadline), sb.Close())
}

// isPaused reports whether the fork's sandbox stands still. When that cannot
// be told, it does not.
func (a *Activities) isPaused(ctx context.Context, in orchestrator.RunAgentInput) bool {
	p, err := a.Providers.Get(in.Ref.Provider)
	if err != nil {
		return false
	}
	if _, ok := sandbox.As[sandbox.Pauser](p); !ok {
		return false
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	infos, err := p.List(ctx, map[string]string{
		sandbox.LabelRun: in.Spec.Run, sandbox.LabelFork: strconv.Itoa(in.Spec.Num),
		sandbox.LabelDeployment: a.Deployment, sandbox.LabelNamespace: a.Namespace,
	})
	for _, info := range infos {
		if err == nil && info.Ref == in.Ref {
			return info.Paused
		}
	}
	return false
}
