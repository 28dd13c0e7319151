package local

import (
	"context"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// namespaceHint says what keeps user namespaces from us on this host.
func namespaceHint() string {
	sysctl := func(name string) string {
		b, err := os.ReadFile("/proc/sys/" + name)
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(b))
	}
	switch {
	case sysctl("user/max_user_namespaces") == "0":
		return "User namespaces are switched off; allow them with: sudo sysctl -w user.max_user_namespaces=15000"
	case sysctl("kernel/unprivileged_userns_clone") == "0" && os.Geteuid() != 0:
		return "User namespaces are kept for root; allow them with: sudo sysctl -w kernel.unprivileged_userns_clone=1"
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" && os.Geteuid() != 0:
		return "AppArmor restricts user namespaces; allow them with: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (or give the supervisor program a profile with the rule \"userns,\")"
	}
	return "Local sandboxes need Linux 5.12 or later with user namespaces, overlayfs and an unmasked /proc; in a container, run it privileged, or run the worker on the host."
}

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
	if !note("sandbox", who, p.try(ctx, "")) {
		return found
	}
	note("base", "forks start from a prepared base, copy on write", p.try(ctx, "check"))
	note("cgroup", cgroupParent(), cgroupFault())
	return found
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

// cgroupFault says why a sandbox has no cgroup of its own, which it can live
// without.
func cgroupFault() error {
	parent := cgroupParent()
	if parent == "" {
		return fault.New("cgroup", fault.Unsupported, "no cgroup v2 folder that we may write to; sandboxes do without").
			Hinted("Start the worker in a delegated cgroup, for instance: systemd-run --user --scope -p Delegate=yes")
	}
	if err := unix.Access(parent, unix.W_OK); err != nil {
		return fault.New("cgroup", fault.Unsupported, "%s: %w", parent, err)
	}
	return nil
}
