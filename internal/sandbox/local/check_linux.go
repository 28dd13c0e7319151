package local

import (
	"context"
	"os"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Check tries what local sandboxes need on this host and says what it found,
// most needed first: it makes a sandbox, freezes it, starts another one from
// that base and removes all three. It takes well under a second, and leaves
// nothing in the state folder.
func Check(ctx context.Context, o Options) []Finding {
	var found []Finding
	note := func(name, good string, err error) bool {
		f := Finding{Name: name, OK: err == nil, Text: good}
		if err != nil {
			f.Text, f.Hint = err.Error(), fault.HintOf(err)
		}
		found = append(found, f)
		return err == nil
	}
	dir, err := os.MkdirTemp(o.Dir, "check-")
	if os.IsNotExist(err) {
		if err = os.MkdirAll(o.Dir, 0o700); err == nil {
			dir, err = os.MkdirTemp(o.Dir, "check-")
		}
	}
	if !note("state folder", o.Dir, fault.Wrap("make folder", err)) {
		return found
	}
	o.Dir = dir
	defer func() { _ = os.RemoveAll(dir) }() // empty but for folders and locks of ours
	p := New(o)
	if !note("file system", "sandboxes can live on it", p.openState("look at state folder", currentIdentity())) {
		return found
	}
	who := "agents run as the worker's own uid, in a user namespace of that one id"
	if id := currentIdentity(); id.Root {
		who = "agents run as an id that owns nothing on the host"
	}
	err = p.try(ctx, "")
	found = append(found, kernelFindings(o, err == nil)...)
	if !note("sandbox", who, err) {
		return found
	}
	note("base", "forks start from a prepared base, copy on write", p.try(ctx, "check"))
	return append(found, checkLimitsHere())
}

// try makes a sandbox and runs a command in it; with a base, first one to
// freeze.
func (p *Provider) try(ctx context.Context, base string) (err error) {
	spec := sandbox.Spec{Key: "check", Deadline: time.Now().Add(time.Minute)}
	if base != "" {
		ref, err := p.Create(ctx, spec)
		if err != nil {
			return err
		}
		err = p.Freeze(ctx, ref, base)
		if destroyErr := p.Destroy(context.WithoutCancel(ctx), ref); err == nil {
			err = destroyErr
		}
		if err != nil {
			return err
		}
		defer func() {
			if removeErr := p.RemoveBase(context.WithoutCancel(ctx), base); err == nil {
				err = removeErr
			}
		}()
		spec.Base = base
	}
	ref, err := p.Create(ctx, spec)
	if err != nil {
		return err
	}
	defer func() {
		if destroyErr := p.Destroy(context.WithoutCancel(ctx), ref); err == nil {
			err = destroyErr
		}
	}()
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	_, stderr, exit, err := sandbox.Output(ctx, sb, "check", sandbox.Cmd{Args: []string{"true"}}, 1024)
	if err == nil && exit.Code != 0 {
		err = fault.New("run true in a sandbox", fault.Unsupported, "exit code %d: %s", exit.Code, stderr)
	}
	return err
}
