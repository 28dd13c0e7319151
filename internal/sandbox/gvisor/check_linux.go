package gvisor

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Check says whether gVisor sandboxes can be had on this host: it looks for
// runsc, asks for its version, and makes a sandbox that it removes again. It
// takes about half a second, and leaves nothing in the state folder.
func Check(ctx context.Context, o Options) []Finding {
	f := Finding{Name: "gVisor"}
	bad := func(err error) []Finding {
		f.Text, f.Hint = err.Error(), fault.HintOf(err)
		return []Finding{f}
	}
	runsc, err := findRunsc(o.Runsc)
	if err != nil {
		return bad(err)
	}
	version, err := versionOf(ctx, runsc, o.ModuleVersion)
	if err != nil {
		return bad(err)
	}
	if err := tryOne(ctx, o); err != nil {
		return bad(fault.Wrap(runsc, err))
	}
	f.OK, f.Text = true, fmt.Sprintf("%s, version %s", runsc, version)
	if version != TestedVersion {
		f.Hint = "This program is tested with runsc " + TestedVersion + "; should sandboxes of gVisor misbehave, install that one."
	}
	return []Finding{f}
}

// tryOne makes a sandbox and runs a command in it.
func tryOne(ctx context.Context, o Options) (err error) {
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return err
	}
	if o.Dir, err = os.MkdirTemp(o.Dir, "check-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(o.Dir) }() // empty but for folders and locks of ours
	p := New(o)
	ref, err := p.Create(ctx, sandbox.Spec{Key: "check", Deadline: time.Now().Add(time.Minute)})
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
