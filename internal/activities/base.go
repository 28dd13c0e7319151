package activities

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// setupTime bounds --setup.
const setupTime = 45 * time.Minute

// PrepareBase makes what all forks of a run start from: the base commit in
// the worker's mirror, the prompt in the artifact store and, where the
// provider can freeze one, a sandbox file system with the repository checked
// out and set up. A base that is there already is used again.
func (a *Activities) PrepareBase(ctx context.Context, in orchestrator.PrepareBaseInput) (orchestrator.Base, error) {
	const op = "prepare base"
	defer beat(ctx, phase("prepare"))()
	provider, err := a.Providers.Get(in.Plan.Provider)
	if err != nil {
		return orchestrator.Base{}, err
	}
	ag, err := agent.ByName(in.Plan.Agent)
	if err != nil {
		return orchestrator.Base{}, err
	}
	out := orchestrator.Base{Queue: a.Queue}
	if _, ok := sandbox.As[sandbox.HostBound](provider); ok {
		out.Queue = a.HostQueue
		if _, err := a.agentMounts(ag, in.Plan.AgentPath); err != nil {
			return out, err
		}
	}
	src, err := a.Repo.Resolve(ctx, in.Plan.Repo, in.Plan.Branch)
	if err != nil {
		return out, err
	}
	out.Commit, out.Branch = src.Commit, src.Branch
	if out.PromptKey, err = a.Artifacts.PutText(ctx, in.Plan.Prompt); err != nil {
		return out, fault.Wrap(op, err)
	}
	if snap, ok := sandbox.As[sandbox.Snapshotter](provider); ok {
		out.Frozen, err = a.freeze(ctx, in, provider, snap, src)
		return out, fault.Wrap(op, err)
	}
	if in.Plan.Setup != "" {
		return out, fault.New(op, fault.Unsupported, "provider %s cannot freeze a prepared sandbox", provider.Name()).
			Hinted("Leave --setup out and let the prompt say how to set up.")
	}
	out.Bundle = "bases/" + src.Commit + ".bundle"
	return out, fault.Wrap(op, a.storeBundle(ctx, src, out.Bundle))
}

func (a *Activities) storeBundle(ctx context.Context, src repo.Base, key string) error {
	bundle := a.bundle(ctx, src)
	defer bundle.Close()
	return a.Artifacts.Put(ctx, key, bundle)
}

// bundle streams the base commit as git packs it. Who closes it early lets
// git go.
func (a *Activities) bundle(ctx context.Context, src repo.Base) io.ReadCloser {
	r, w := io.Pipe()
	go func() { w.CloseWithError(a.Repo.Bundle(ctx, src, w)) }()
	return r
}

// freeze prepares a sandbox and freezes it, once for all who ask for the same.
func (a *Activities) freeze(ctx context.Context, in orchestrator.PrepareBaseInput, p sandbox.Provider, snap sandbox.Snapshotter, src repo.Base) (string, error) {
	key := baseKey(p.Name(), src.Source, src.Branch, src.Commit, in.Plan.Setup)
	a.mu.Lock()
	if a.bases[key] == nil {
		a.bases[key] = &sync.Mutex{}
	}
	one := a.bases[key]
	a.mu.Unlock()
	one.Lock()
	defer one.Unlock()

	err := snap.Base(ctx, key)
	if fault.KindOf(err) != fault.NotFound { // nil: it is there
		return key, err
	}
	spec := sandbox.Spec{
		Key: key, Deadline: time.Now().Add(setupTime + 10*time.Minute),
		Mounts: planMounts(in.Plan.Mounts), Limits: sandbox.Limits(in.Plan.Limits), Labels: a.labels(in.Run, "base", time.Now().Add(setupTime)),
	}
	if _, ok := sandbox.As[sandbox.HostBound](p); ok && in.Plan.Setup != "" {
		if spec.Gateway, err = a.door(ctx, in.Run, 0, in.Plan.Egress, in.Plan.Repo); err != nil {
			return "", err
		}
		if a.Doors != nil {
			defer a.Doors.Close(in.Run, 0)
		}
	}
	ref, err := p.Create(ctx, spec)
	if err != nil {
		return "", err
	}
	defer func() { _ = p.Destroy(context.WithoutCancel(ctx), ref) }()
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return "", err
	}
	defer sb.Close()
	bundle := a.bundle(ctx, src)
	defer bundle.Close()
	err = a.unpack(ctx, sb, bundle, src.Commit, src.Branch)
	if err == nil && in.Plan.Setup != "" {
		err = a.setup(ctx, sb, in.Plan.Setup, in.Plan.Limits, a.proxyEnv(in.Plan.Provider))
	}
	if err != nil {
		return "", err
	}
	return key, snap.Freeze(ctx, ref, key)
}

// baseKey names a base by everything that it was made from.
func baseKey(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return "base-" + hex.EncodeToString(h.Sum(nil))[:32]
}

// unpackScript makes the workspace from a bundle. The branch is the user's
// word and only ever part of a full ref name.
const unpackScript = `set -e
git init -q .
git fetch -q --no-tags "$BUNDLE" "+refs/*:refs/unpack/*"
git update-ref "refs/heads/$BRANCH" "$COMMIT"
git symbolic-ref HEAD "refs/heads/$BRANCH"
git for-each-ref --format="delete %(refname)" refs/unpack | git update-ref --stdin
git config user.name sandbox-temporal
git config user.email fork@sandbox-temporal.invalid
git config gc.auto 0
git reset -q --hard
git update-index -q --refresh
rm -f "$BUNDLE" .git/FETCH_HEAD`

// unpack puts the base commit into an empty workspace.
func (a *Activities) unpack(ctx context.Context, sb sandbox.Sandbox, bundle io.Reader, commit, branch string) error {
	const at = sandbox.Home + "/base.bundle"
	if err := sb.Upload(ctx, at, bundle); err != nil {
		return fault.Wrap("carry the repository into the sandbox", err)
	}
	return a.script(ctx, sb, "unpack", unpackScript, "BUNDLE="+at, "COMMIT="+commit, "BRANCH="+branch)
}

func (a *Activities) setup(ctx context.Context, sb sandbox.Sandbox, line string, limits fork.Limits, env []string) error {
	limited, cancel := context.WithTimeout(ctx, setupTime)
	defer cancel()
	stdout, stderr, exit, err := sandbox.Output(limited, sb, "setup", sandbox.Cmd{Args: []string{"/bin/sh", "-c", line}, Env: env}, fork.MaxText)
	if limited.Err() != nil && ctx.Err() == nil {
		return fault.New("setup", fault.Timeout, "--setup did not end within %s", setupTime)
	}
	if err == nil {
		err = limitFault("setup", exit, limits)
	}
	if err == nil && exit.Code != 0 {
		return fault.New("setup", fault.Invalid, "--setup ended with status %d: %s", exit.Code, lastLines(stderr, stdout)).
			Hinted("The command runs in %s of a sandbox that reaches only what --egress names.", sandbox.Workspace)
	}
	return err
}

// script runs a shell script of ours to its end; what it prints is only shown
// when it fails.
func (a *Activities) script(ctx context.Context, sb sandbox.Sandbox, id, text string, env ...string) error {
	stdout, stderr, exit, err := sandbox.Output(ctx, sb, id, sandbox.Cmd{Args: []string{"/bin/sh", "-c", text}, Env: env}, fork.MaxText)
	if err == nil {
		err = limitFault(id, exit, fork.Limits{})
	}
	if err == nil && exit.Code != 0 {
		return fault.New(id, fault.Internal, "status %d: %s", exit.Code, lastLines(stderr, stdout))
	}
	return err
}

// lastLines is the end of what a command of the sandbox printed, made safe to
// show.
func lastLines(outputs ...[]byte) string {
	for _, out := range outputs {
		s := strings.TrimSpace(agent.Clean(string(out)))
		if len(s) > 1000 {
			s = "…" + strings.ToValidUTF8(s[len(s)-1000:], "")
		}
		if s != "" {
			return s
		}
	}
	return "(no output)"
}

func planMounts(in []fork.Mount) []sandbox.Mount {
	out := make([]sandbox.Mount, 0, len(in)+1)
	for _, m := range in {
		out = append(out, sandbox.Mount(m))
	}
	return out
}

// agentMounts lends the sandbox the agent's program.
func (a *Activities) agentMounts(ag agent.Agent, path string) ([]sandbox.Mount, error) {
	p := ag.Program()
	if p.Name == "" {
		return nil, nil
	}
	if path == "" {
		found, err := a.Program(p.Name)
		if err != nil {
			return nil, fault.New("find agent", fault.Unsupported, "the program %q of agent %s is not on this host's PATH", p.Name, ag.Name()).
				Hinted("Install it with: %s; or say where it is with --agent-path.", p.Install)
		}
		path = found
	}
	info, err := os.Stat(path)
	if err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
		return nil, fault.New("find agent", fault.Unsupported, "%s is not a program that can be run", path).
			Hinted("Install it with: %s; or say where it is with --agent-path.", p.Install)
	}
	return []sandbox.Mount{{Source: path, Target: sandbox.ProgramDir + "/" + p.Name}}, nil
}

// labels says whose a sandbox is.
func (a *Activities) labels(run, num string, expires time.Time) map[string]string {
	return map[string]string{
		sandbox.LabelDeployment: a.Deployment, sandbox.LabelNamespace: a.Namespace,
		sandbox.LabelRun: run, sandbox.LabelFork: num,
		sandbox.LabelCreated: time.Now().UTC().Format(time.RFC3339), sandbox.LabelExpires: expires.UTC().Format(time.RFC3339),
	}
}
