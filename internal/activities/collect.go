package activities

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// collectScript commits what the agent left and packs what is new. It runs in
// the sandbox, where the agent may have set any hook, filter or alias; those
// that would make the commit fail are switched off, and none of them can
// reach further than the sandbox. It prints the commit, or nothing when there
// is nothing new.
const collectScript = `set -e
export GIT_CONFIG_GLOBAL=/dev/null GIT_EDITOR=true GIT_TERMINAL_PROMPT=0
g() { git -c core.hooksPath=/dev/null -c commit.gpgSign=false -c gc.auto=0 -c core.fsmonitor=false -c user.name=sandbox-temporal -c user.email=fork@sandbox-temporal.invalid "$@"; }
rm -f .git/index.lock .git/HEAD.lock "$OUT"
g add -A
g diff --cached --quiet HEAD -- || g commit -q --no-verify -m "$MESSAGE"
head=$(g rev-parse HEAD)
[ "$head" = "$BASE" ] && exit 0
g diff --quiet "$BASE" "$head" -- && exit 0
g update-ref "$REF" "$head"
g bundle create -q "$OUT" "$REF" --not "$BASE"
echo "$head"`

// MaxBundle bounds a fork's work, in bytes.
const MaxBundle = 2 << 30

// CollectResult commits what the agent left in its workspace, carries it out
// as a bundle and stores it as the fork's branch. A second call gives the same
// answer. No branch in the answer: the agent changed nothing.
func (a *Activities) CollectResult(ctx context.Context, in orchestrator.CollectResultInput) (orchestrator.CollectResultOutput, error) {
	const op = "collect result"
	defer beat(ctx, phase("collect"))()
	var none orchestrator.CollectResultOutput
	sb, err := a.attach(ctx, in.Ref)
	if err != nil {
		return none, err
	}
	defer sb.Close()
	const out = sandbox.Home + "/" + fork.ResultName
	stdout, stderr, exit, err := sandbox.Output(ctx, sb, "collect", sandbox.Cmd{
		Args: []string{"/bin/sh", "-c", collectScript},
		Env: []string{"BASE=" + in.Spec.BaseCommit, "OUT=" + out, "REF=" + fork.ResultRef,
			fmt.Sprintf("MESSAGE=sandbox-temporal: work of fork %s", in.Spec.ID())},
	}, 64<<10)
	if err == nil {
		err = limitFault("pack", exit, in.Spec.Limits)
	}
	if err != nil {
		return none, fault.Wrap(op, err)
	}
	if exit.Code != 0 {
		return none, fault.New(op, fault.Invalid, "git in the sandbox ended with status %d: %s", exit.Code, lastLines(stderr, stdout)).
			Hinted("The agent left a repository that git cannot commit in.")
	}
	if len(strings.TrimSpace(string(stdout))) == 0 {
		return none, nil
	}
	bundle, err := a.download(ctx, sb, out)
	if err != nil {
		return none, fault.Wrap(op, err)
	}
	defer os.Remove(bundle)
	got, err := a.Repo.Receive(ctx, repo.ReceiveInput{
		Run: in.Spec.Run, Num: in.Spec.Num, Base: repo.Base{Source: in.Spec.Repo, Upload: in.Spec.Upload, Commit: in.Spec.BaseCommit}, Ref: fork.ResultRef, Bundle: bundle,
	})
	if err != nil {
		return none, fault.Wrap(op, err)
	}
	f, err := os.Open(bundle)
	if err != nil {
		return none, fault.Wrap(op, err)
	}
	defer f.Close()
	if err := a.Artifacts.Put(ctx, artifact.RunKey(in.Spec.Run, in.Spec.Num, fork.ResultName), f); err != nil {
		return none, fault.Wrap(op, err)
	}
	warning := ""
	if got.Undelivered != nil {
		warning = fmt.Sprintf("The branch is stored, but could not be fetched into %s: %v", in.Spec.Repo, got.Undelivered)
	}
	return orchestrator.CollectResultOutput{
		Branch: got.Branch, Commit: got.Commit, FilesChanged: got.FilesChanged, Insertions: got.Insertions, Deletions: got.Deletions, Warning: warning,
	}, nil
}

// download carries a file of the sandbox into a temporary file of the worker.
func (a *Activities) download(ctx context.Context, sb sandbox.Sandbox, path string) (string, error) {
	r, err := sb.Download(ctx, path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	f, err := os.CreateTemp(a.TempDir, "result-*.bundle")
	if err != nil {
		return "", err
	}
	n, err := io.Copy(f, io.LimitReader(r, MaxBundle+1))
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil && n > MaxBundle {
		err = fault.New("", fault.Invalid, "the fork's work has more than %d bytes", int64(MaxBundle))
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}
