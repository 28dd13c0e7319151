package activities

import (
	"context"
	"errors"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// CreateSandbox makes the fork's sandbox with the base commit checked out. A
// second call for the same fork finds the first one's.
func (a *Activities) CreateSandbox(ctx context.Context, in orchestrator.CreateSandboxInput) (sandbox.Ref, error) {
	defer beat(ctx, phase("create"))()
	provider, err := a.Providers.Get(in.Spec.Provider)
	if err != nil {
		return sandbox.Ref{}, err
	}
	ag, err := agent.ByName(in.Spec.Agent)
	if err != nil {
		return sandbox.Ref{}, err
	}
	var lent []sandbox.Mount
	if _, ok := sandbox.As[sandbox.HostBound](provider); ok {
		if lent, err = a.agentMounts(ag, in.Spec.AgentPath); err != nil {
			return sandbox.Ref{}, err
		}
	}
	return a.createFor(ctx, provider, in, fork.WorkflowID(in.Spec.Run, in.Spec.Num), lent)
}

// createFor makes a sandbox for a fork, of which it can have more than one, by
// their keys.
func (a *Activities) createFor(ctx context.Context, provider sandbox.Provider, in orchestrator.CreateSandboxInput, key string, lent []sandbox.Mount) (ref sandbox.Ref, err error) {
	spec := sandbox.Spec{
		Key:      key,
		Base:     in.Base.Frozen,
		Mounts:   append(planMounts(in.Spec.Mounts), lent...),
		Deadline: in.Deadline,
		Labels:   a.labels(in.Spec.Run, strconv.Itoa(in.Spec.Num), in.Deadline),
		Limits:   sandbox.Limits(in.Spec.Limits),
	}
	if _, ok := sandbox.As[sandbox.HostBound](provider); ok {
		if spec.Gateway, err = a.door(ctx, in.Spec.Run, in.Spec.Num, in.Spec.Egress, in.Spec.Repo); err != nil {
			return sandbox.Ref{}, err
		}
	}
	if err := a.remember(ctx, provider.Name()); err != nil {
		return sandbox.Ref{}, err
	}
	var fill func(sandbox.Ref) error
	if in.Base.Bundle != "" {
		fill = func(ref sandbox.Ref) error {
			err := a.fill(ctx, ref, in.Base)
			if err != nil {
				// The next try begins with a new one.
				err = errors.Join(err, provider.Destroy(context.WithoutCancel(ctx), ref))
			}
			return err
		}
	}
	creating, span := startSpan(ctx, "create sandbox", forkAttributes(in.Spec)...)
	ref, err = a.create(creating, provider, spec, fill)
	endSpan(span, err)
	return ref, err
}

// door opens the way of a host-bound sandbox to the gateway.
func (a *Activities) door(ctx context.Context, run string, num int, egress, repo string) (addr string, err error) {
	if a.Doors == nil {
		return "", nil
	}
	return a.Doors.Open(ctx, Door{Run: run, Fork: num, Egress: egress, Repo: repo})
}

// proxyEnv tells programs in a host-bound sandbox the way out. Names are
// looked up at its other end.
func (a *Activities) proxyEnv(provider string) []string {
	if a.Doors == nil || !a.hostBound(provider) {
		return nil
	}
	const near = "127.0.0.1,localhost,::1"
	at := "http://" + gatewayInside
	return []string{"HTTPS_PROXY=" + at, "https_proxy=" + at, "HTTP_PROXY=" + at, "http_proxy=" + at, "NO_PROXY=" + near, "no_proxy=" + near}
}

// fill unpacks the base in a sandbox that was not made from a frozen one.
func (a *Activities) fill(ctx context.Context, ref sandbox.Ref, base orchestrator.Base) error {
	sb, err := a.Providers.Attach(ctx, ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	bundle, err := a.Artifacts.Get(ctx, base.Bundle)
	if err != nil {
		return err
	}
	defer bundle.Close()
	return a.unpack(ctx, sb, bundle, base.Commit, base.Branch)
}

// healthScript asks for everything an agent needs: a writable workspace at
// the base commit, a writable home, and the way to the model.
const healthScript = `set -e
test "$(git rev-parse HEAD)" = "$COMMIT" || { echo "the workspace is not at $COMMIT" >&2; exit 1; }
touch "$HOME/.health" && rm "$HOME/.health"
test -w .
if [ -n "$GATEWAY" ] && command -v bash >/dev/null; then
  bash -c "exec 3<>/dev/tcp/${GATEWAY%:*}/${GATEWAY##*:}" || { echo "the gateway does not answer" >&2; exit 1; }
fi`

// gatewayInside is where a host-bound sandbox reaches the gateway.
var gatewayInside = net.JoinHostPort("127.0.0.1", strconv.Itoa(sandbox.GatewayPort))

// HealthCheck verifies that an agent could work in the sandbox.
func (a *Activities) HealthCheck(ctx context.Context, in orchestrator.HealthCheckInput) (orchestrator.None, error) {
	const op = "health check"
	defer beat(ctx, phase("health"))()
	sb, err := a.attach(ctx, in.Ref)
	if err != nil {
		return orchestrator.None{}, err
	}
	defer sb.Close()
	if err := sb.Health(ctx); err != nil {
		return orchestrator.None{}, fault.Wrap(op, err)
	}
	gateway := ""
	switch bound := a.hostBound(in.Spec.Provider); {
	case bound && a.Doors != nil:
		gateway = gatewayInside
	case !bound && in.Spec.Credentials != fork.CredentialsDirect:
		gateway = hostPort(a.GatewayURL)
	}
	err = a.script(ctx, sb, "health", healthScript, "COMMIT="+in.Spec.BaseCommit, "GATEWAY="+gateway)
	return orchestrator.None{}, fault.Wrap(op, err)
}

// hostPort is where a URL is connected to, as the health script takes it, or "".
func hostPort(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		return ""
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Hostname() + ":" + port
}

// ready reports whether the provider can be asked for anything. One that was
// given no key has nothing of ours.
func ready(ctx context.Context, p sandbox.Provider) bool {
	gated, ok := sandbox.As[sandbox.Gated](p)
	return !ok || gated.Ready(ctx) == nil
}

func (a *Activities) hostBound(provider string) bool {
	p, err := a.Providers.Get(provider)
	if err != nil {
		return false
	}
	_, ok := sandbox.As[sandbox.HostBound](p)
	return ok
}

// attach finds a fork's sandbox again; one that is gone is lost.
func (a *Activities) attach(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	sb, err := a.Providers.Attach(ctx, ref)
	if fault.KindOf(err) == fault.NotFound {
		return nil, &fault.Error{Op: "find sandbox " + ref.ID, Kind: fault.Lost, Err: err}
	}
	return sb, err
}

// ExecuteCommand runs a command in the sandbox to its end.
func (a *Activities) ExecuteCommand(ctx context.Context, in orchestrator.ExecuteCommandInput) (orchestrator.ExecuteCommandOutput, error) {
	defer beat(ctx, phase("command"))()
	sb, err := a.attach(ctx, in.Ref)
	if err != nil {
		return orchestrator.ExecuteCommandOutput{}, err
	}
	defer sb.Close()
	stdout, stderr, exit, err := sandbox.Output(ctx, sb, in.ID, sandbox.Cmd{Args: in.Args, Env: in.Env, Dir: in.Dir}, fork.MaxText)
	if err != nil {
		return orchestrator.ExecuteCommandOutput{}, fault.Wrap("execute "+in.ID, err)
	}
	return orchestrator.ExecuteCommandOutput{ExitCode: exit.Code, Stdout: string(stdout), Stderr: string(stderr)}, nil
}

// settleTime is how long a call that was under way when its agent was stopped
// may go on to tell what it costs. A cancel answers within five seconds.
const settleTime = 1500 * time.Millisecond

// CleanupSandbox frees everything the fork had and closes its account. A
// second call, or one for a fork that had nothing, is no error.
func (a *Activities) CleanupSandbox(ctx context.Context, in orchestrator.CleanupSandboxInput) (orchestrator.CleanupSandboxOutput, error) {
	const op = "clean up"
	defer beat(ctx, phase("cleanup"))()
	var out orchestrator.CleanupSandboxOutput
	provider, err := a.Providers.Get(in.Provider)
	if err != nil && in.Orphan == nil {
		return out, nil // a fork of an unknown provider never had a sandbox
	}
	switch {
	case err != nil:
		return out, err
	case in.Orphan != nil:
		out.Kept, err = a.removeOrphan(ctx, provider, in)
		if err != nil || out.Kept != "" {
			return out, fault.Wrap(op, err)
		}
	default:
		if err := a.removeAll(ctx, provider, in); err != nil {
			return out, fault.Wrap(op, err)
		}
	}
	if a.Doors != nil {
		defer a.Doors.Close(in.Run, in.Num)
	}
	if in.Num == 0 {
		return out, nil // a base: nobody paid for it
	}
	if err := a.writeOffAll(ctx, in.Run, in.Num); err != nil {
		return out, fault.Wrap(op, err)
	}
	// The account is closed last: what the agent asked for until its end is in it.
	if err := a.Gateway.Revoke(ctx, in.Run, in.Num); err != nil {
		return out, fault.Wrap(op, err)
	}
	if err := a.Gateway.Settle(ctx, in.Run, in.Num, settleTime); err != nil {
		return out, fault.Wrap(op, err)
	}
	spent, err := a.Gateway.Usage(ctx, in.Run, in.Num)
	out.Usage = spent.Usage
	return out, fault.Wrap(op, err)
}

// destroy destroys one sandbox of the fork.
func (a *Activities) destroy(ctx context.Context, p sandbox.Provider, ref sandbox.Ref, run string, num int) error {
	err := p.Destroy(ctx, ref)
	if err == nil {
		a.about(run, num, ref.ID).InfoContext(ctx, "Sandbox removed", logs.Provider, p.Name())
	}
	return err
}

// lookAgain is how often a list that lags is looked at.
const lookAgain = time.Second

// removeAll destroys the fork's sandbox, known or not. A creation that was cut
// off has no ref, but it has labels; where a list can miss it for a while, it
// is looked for until it cannot any more.
func (a *Activities) removeAll(ctx context.Context, provider sandbox.Provider, in orchestrator.CleanupSandboxInput) error {
	if in.Ref.ID != "" {
		if err := a.destroy(ctx, provider, in.Ref, in.Run, in.Num); err != nil {
			return err
		}
	}
	labels := a.ours()
	labels[sandbox.LabelRun], labels[sandbox.LabelFork] = in.Run, strconv.Itoa(in.Num)
	until := time.Now()
	if lag, ok := sandbox.As[sandbox.Lagger](provider); ok && in.Ref.ID == "" {
		until = until.Add(min(lag.ListLag(), time.Minute))
	}
	for {
		left, err := provider.List(ctx, labels)
		if err != nil {
			return err
		}
		for _, info := range left {
			if err := a.destroy(ctx, provider, info.Ref, in.Run, in.Num); err != nil {
				return err
			}
		}
		if len(left) > 0 || !time.Now().Before(until) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(lookAgain, time.Until(until))):
		}
	}
}
