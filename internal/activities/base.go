package activities

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
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
	if err := a.checkModel(ctx, in.Plan); err != nil {
		return out, err
	}
	system := ""
	if _, ok := sandbox.As[sandbox.HostBound](provider); ok {
		out.Queue, system = a.HostQueue, hostSystem()
		lent, err := a.agentMounts(ag, in.Plan.AgentPath)
		if err == nil {
			err = a.checkPrograms(ctx, in.Plan, lent)
		}
		if err != nil {
			return out, err
		}
	}
	src, err := a.source(ctx, in)
	if err != nil {
		return out, err
	}
	out.Commit, out.Branch = src.Commit, src.Branch
	if in.Plan.Prompt != "" { // a base that is made ahead of all runs has none
		if out.PromptKey, err = a.Artifacts.PutText(ctx, in.Plan.Prompt); err != nil {
			return out, fault.Wrap(op, err)
		}
	}
	if snap, ok := sandbox.As[sandbox.Freezer](provider); ok {
		out.Frozen, out.Made, err = a.freeze(ctx, in, system, provider, snap, src)
		if err == nil {
			out.Bytes = sizeOf(ctx, provider, out.Frozen)
			a.about(in.Run, 0, "").InfoContext(ctx, "Base ready", logs.Provider, provider.Name(), logs.Base, out.Frozen, logs.Commit, out.Commit, logs.Made, out.Made)
		}
		if !errors.Is(err, errNoBases) || in.Plan.Prompt == "" {
			return out, fault.Wrap(op, err)
		}
		a.about(in.Run, 0, "").WarnContext(ctx, "No base is prepared: each fork unpacks the repository by itself", logs.Provider, provider.Name(), logs.Error, err)
	}
	if in.Plan.Setup != "" {
		return out, fault.New(op, fault.Unsupported, "provider %s cannot freeze a prepared sandbox", provider.Name()).
			Hinted("Leave --setup out and let the prompt say how to set up.")
	}
	if out.Bundle = src.Upload; out.Bundle != "" {
		return out, nil // the store holds it already
	}
	out.Bundle = bundles + "/" + src.Commit + bundleEnd
	if err := a.storeBundle(ctx, src, out.Bundle); err != nil {
		return out, fault.Wrap(op, err)
	}
	// As long as the run goes on, the clean-up keeps the bundle.
	return out, fault.Wrap(op, a.Artifacts.Put(ctx, artifact.RunKey(in.Run, 0, bundleNote), strings.NewReader(out.Bundle)))
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

// hostSystem is what of this host a prepared base depends on: what setup may
// have built against, and to whom the files belong. An update of the system
// makes bases anew.
func hostSystem() string {
	release, _ := os.ReadFile("/etc/os-release") // a host without one has no say
	ids, _ := os.ReadFile("/proc/self/uid_map")  // likewise
	return fmt.Sprintf("%s %s\nuid %d\n%s%s", runtime.GOOS, runtime.GOARCH, os.Geteuid(), ids, release)
}

// sizeOf returns how much of the disk the base takes, 0 when nobody can say:
// forks can start from it all the same.
func sizeOf(ctx context.Context, p sandbox.Provider, key string) int64 {
	snap, ok := sandbox.As[sandbox.Snapshotter](p)
	if !ok {
		return 0
	}
	bases, err := snap.Bases(ctx)
	if err != nil {
		return 0
	}
	for _, b := range bases {
		if b.Key == key {
			return b.Bytes
		}
	}
	return 0
}

// errNoBases is met where a provider could freeze, and the service behind it does
// not.
var errNoBases = errors.New("no base can be kept there")

// freeze prepares a sandbox and freezes it, once for all who ask for the same.
// It reports whether it had to be made.
func (a *Activities) freeze(ctx context.Context, in orchestrator.PrepareBaseInput, system string, p sandbox.Provider, snap sandbox.Freezer, src repo.Base) (string, bool, error) {
	parts := []string{p.Name(), system, cmp.Or(src.Upload, src.Source), src.Branch, src.Commit, in.Plan.Setup, in.Plan.Agent}
	if in.Plan.Setup != "" {
		parts = append(parts, "egress", in.Plan.Egress) // who may reach less does not get what was fetched from more
	}
	for _, m := range in.Plan.Mounts { // setup sees them
		parts = append(parts, m.Source, m.Target)
	}
	key := baseKey(parts...)
	a.mu.Lock()
	if a.bases[key] == nil {
		a.bases[key] = &sync.Mutex{}
	}
	one := a.bases[key]
	a.mu.Unlock()
	one.Lock()
	defer one.Unlock()

	err := snap.Base(ctx, key)
	switch fault.KindOf(err) {
	case fault.NotFound:
	case fault.Unsupported:
		return "", false, fmt.Errorf("%w: %w", errNoBases, err)
	default: // nil: it is there
		return key, false, err
	}
	labels := a.labels(in.Run, "base", time.Now().Add(setupTime))
	labels[sandbox.LabelRepository], labels[sandbox.LabelBranch], labels[sandbox.LabelCommit] = src.Source, src.Branch, src.Commit
	spec := sandbox.Spec{
		Key: key, Deadline: time.Now().Add(setupTime + 10*time.Minute),
		Mounts: planMounts(in.Plan.Mounts), Limits: sandbox.Limits(in.Plan.Limits), Labels: labels,
	}
	if _, ok := sandbox.As[sandbox.HostBound](p); ok && in.Plan.Setup != "" {
		if spec.Gateway, err = a.door(ctx, in.Run, 0, in.Plan.Egress, in.Plan.Repo); err != nil {
			return "", false, err
		}
		if a.Doors != nil {
			defer a.Doors.Close(in.Run, 0)
		}
	}
	if err := a.remember(ctx, p.Name()); err != nil {
		return "", false, err
	}
	ref, err := a.create(ctx, p, spec, nil)
	if err != nil {
		return "", false, err
	}
	defer func() { _ = p.Destroy(context.WithoutCancel(ctx), ref) }()
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return "", false, err
	}
	defer sb.Close()
	bundle := a.bundle(ctx, src)
	defer bundle.Close()
	err = a.unpack(ctx, sb, bundle, src.Commit, src.Branch)
	if err == nil && in.Plan.Setup != "" {
		err = a.setup(ctx, sb, in.Plan.Setup, in.Plan.Limits, a.proxyEnv(in.Plan.Provider))
	}
	if err == nil {
		err = a.script(ctx, sb, "settle", sandbox.SettleIndex(sandbox.ManyFiles))
	}
	if err != nil {
		return "", false, err
	}
	return key, true, snap.Freeze(ctx, ref, key)
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
//
// Its exit status is 28, as ENOSPC is, when it failed and there is no room
// left for as much as it was to unpack: git has tidied up after itself by then,
// so the disk need not be full any more.
const unpackScript = `set -e
need=$(($(wc -c < "$BUNDLE") + 1048576))
trap 'st=$?; test $st -eq 0 || head -c $need /dev/zero > .room || st=28; rm -f .room; exit $st' EXIT
git init -q .
git fetch -q --no-tags "$BUNDLE" "+refs/*:refs/unpack/*"
git update-ref "refs/heads/$BRANCH" "$COMMIT"
git symbolic-ref HEAD "refs/heads/$BRANCH"
git for-each-ref --format="delete %(refname)" refs/unpack | git update-ref --stdin
git config user.name sandbox-temporal
git config user.email fork@sandbox-temporal.invalid
git config gc.auto 0
git reset -q --hard
rm -f "$BUNDLE" .git/FETCH_HEAD`

// unpack puts the base commit into an empty workspace.
func (a *Activities) unpack(ctx context.Context, sb sandbox.Sandbox, bundle io.Reader, commit, branch string) error {
	const at = sandbox.Home + "/base.bundle"
	if err := sb.Upload(ctx, at, bundle); err != nil {
		return fault.Wrap("carry the repository into the sandbox", err)
	}
	return a.script(ctx, sb, "unpack", unpackScript, "BUNDLE="+at, "COMMIT="+commit, "BRANCH="+branch)
}

// userLine is a shell line of the user's. Both its outputs are one log, in the
// order in which they were written.
func userLine(line string, env []string) sandbox.Cmd {
	return sandbox.Cmd{Args: []string{"/bin/sh", "-c", `exec /bin/sh -c "$1" 2>&1`, "sh", line}, Env: env}
}

func (a *Activities) setup(ctx context.Context, sb sandbox.Sandbox, line string, limits fork.Limits, env []string) error {
	const op = "setup"
	limited, cancel := context.WithTimeout(ctx, setupTime)
	defer cancel()
	proc, err := sb.Start(limited, op, userLine(line, env))
	if err != nil {
		return err
	}
	exit, err := proc.Wait(limited)
	late := limited.Err() != nil && ctx.Err() == nil
	if err == nil {
		err = limitFault(op, exit, limits)
	}
	if err != nil && !late || err == nil && exit.Code == 0 {
		return err
	}
	log, logErr := sandbox.Tail(ctx, proc, sandbox.Stdout, fork.MaxText)
	if logErr != nil {
		return fault.Wrap(op, logErr)
	}
	if late {
		return fault.New(op, fault.Timeout, "--setup did not end within %s; the end of its log:\n%s", setupTime, lastLines(log))
	}
	if a.full(ctx, sb) {
		return fault.New(op, fault.Full, "--setup ended with status %d; the end of its log:\n%s", exit.Code, lastLines(log)).Hinted(fullHint)
	}
	return fault.New(op, fault.Invalid, "--setup ended with status %d; the end of its log:\n%s", exit.Code, lastLines(log)).
		Hinted("The command runs in %s of a sandbox that reaches only what --egress names.", sandbox.Workspace)
}

const fullHint = "There is no room left for the sandbox; free some space on the disk of the worker's state folder."

// full reports whether the sandbox has no room for a megabyte.
func (a *Activities) full(ctx context.Context, sb sandbox.Sandbox) bool {
	err := a.script(ctx, sb, "room", `head -c 1048576 /dev/zero > "$HOME/.room" || st=28; rm -f "$HOME/.room"; exit ${st:-0}`)
	return fault.KindOf(err) == fault.Full
}

// statusFull is what scripts of ours end with when there is no room.
const statusFull = 28

// script runs a shell script of ours to its end; what it prints is only shown
// when it fails.
func (a *Activities) script(ctx context.Context, sb sandbox.Sandbox, id, text string, env ...string) error {
	stdout, stderr, exit, err := sandbox.Output(ctx, sb, id, sandbox.Cmd{Args: []string{"/bin/sh", "-c", text}, Env: env}, fork.MaxText)
	if err == nil {
		err = limitFault(id, exit, fork.Limits{})
	}
	if err == nil && exit.Code == statusFull {
		return fault.New(id, fault.Full, "no space is left on the disk: %s", lastLines(stderr, stdout)).Hinted(fullHint)
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
		const most = 2000
		if len(s) > most {
			s = s[len(s)-most:]
			if _, rest, ok := strings.Cut(s, "\n"); ok {
				s = rest // from the beginning of a line
			}
			s = "…\n" + strings.ToValidUTF8(s, "")
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
