package activities

import (
	"bytes"
	"context"
	"errors"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// maxVerifyLog bounds what is kept of what a verification printed, in bytes.
const maxVerifyLog = 1 << 20

// takeScript moves the workspace from the base commit to the fork's work.
const takeScript = `set -e
git fetch -q --no-tags "$BUNDLE" "$REF"
git reset -q --hard "$COMMIT"
rm -f "$BUNDLE" .git/FETCH_HEAD`

// VerifyFork runs the spec's verification on what was collected of the fork's
// work. It does so in a new sandbox that holds the base and that work: in its
// own, the agent may have left anything, also another "go" on the PATH. A
// second call finds the sandbox and follows the same command. A command that
// ends badly, or not in time, is an answer; an error is that there is none.
//
// The agent's sandbox is destroyed first: nothing of it works beside the
// verification, and a fork never has two. Its token is taken back, too: what
// the agent has written into its work must not ask the model for anything.
func (a *Activities) VerifyFork(ctx context.Context, in orchestrator.VerifyForkInput) (fork.Verify, error) {
	const op = "verify"
	defer beat(ctx, phase(op))()
	ctx, letGo := untilStopping(ctx)
	defer letGo()
	v, err := a.verify(ctx, in)
	if errors.Is(context.Cause(ctx), orchestrator.ErrWorkerStopping) {
		return fork.Verify{}, orchestrator.ErrWorkerStopping // the command runs on, and whoever comes next follows it
	}
	log := a.about(in.Spec.Run, in.Spec.Num, "")
	if err != nil {
		log.WarnContext(ctx, "Work not verified", logs.Error, err)
		return fork.Verify{}, fault.Wrap(op, err)
	}
	log.InfoContext(ctx, "Work verified", logs.Status, v.Outcome(), logs.Took, v.Duration)
	return v, nil
}

// untilStopping is ctx until the worker stops, too.
func untilStopping(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := stopping(ctx)
	go func() {
		select {
		case <-stop:
			cancel(orchestrator.ErrWorkerStopping)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

func (a *Activities) verify(ctx context.Context, in orchestrator.VerifyForkInput) (fork.Verify, error) {
	provider, err := a.Providers.Get(in.Spec.Provider)
	if err != nil {
		return fork.Verify{}, err
	}
	if err := a.Gateway.Revoke(ctx, in.Spec.Run, in.Spec.Num); err != nil {
		return fork.Verify{}, err
	}
	if err := a.destroy(ctx, provider, in.Ref, in.Spec.Run, in.Spec.Num); err != nil {
		return fork.Verify{}, err
	}
	ref, err := a.createFor(ctx, provider, orchestrator.CreateSandboxInput{Spec: in.Spec, Base: in.Base, Deadline: in.Deadline},
		fork.WorkflowID(in.Spec.Run, in.Spec.Num)+"-verify", nil)
	if err != nil {
		return fork.Verify{}, err
	}
	sb, err := a.attach(ctx, ref)
	if err != nil {
		return fork.Verify{}, err
	}
	defer sb.Close()
	proc, err := sb.Process(ctx, "verify")
	if fault.KindOf(err) == fault.NotFound {
		if err = a.take(ctx, sb, in); err == nil {
			proc, err = sb.Start(ctx, "verify", userLine(in.Spec.Verify, a.proxyEnv(in.Spec.Provider)))
		}
	}
	if err != nil {
		return fork.Verify{}, err
	}
	v, err := a.judgeWork(ctx, proc, in.Spec)
	if err != nil {
		return fork.Verify{}, err
	}
	// After an error it is left to the fork's clean-up, as another try needs it.
	return v, a.destroy(ctx, provider, ref, in.Spec.Run, in.Spec.Num)
}

// take carries the fork's work into the sandbox, if it has any.
func (a *Activities) take(ctx context.Context, sb sandbox.Sandbox, in orchestrator.VerifyForkInput) error {
	if in.Commit == "" {
		return nil
	}
	bundle, err := a.Artifacts.Get(ctx, artifact.RunKey(in.Spec.Run, in.Spec.Num, fork.ResultName))
	if err != nil {
		return err
	}
	defer bundle.Close()
	const at = sandbox.Home + "/work.bundle"
	if err := sb.Upload(ctx, at, bundle); err != nil {
		return fault.Wrap("carry the work into the sandbox", err)
	}
	return a.script(ctx, sb, "take", takeScript, "BUNDLE="+at, "REF="+fork.ResultRef, "COMMIT="+in.Commit)
}

// judgeWork waits for the verification and says how it ended.
func (a *Activities) judgeWork(ctx context.Context, proc sandbox.Process, spec fork.Spec) (fork.Verify, error) {
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, spec.Timeout)
	defer cancel()
	exit, err := proc.Wait(limited)
	v := fork.Verify{Status: fork.Success, ExitCode: exit.Code, Duration: time.Since(began).Seconds()}
	why := ""
	switch {
	case err != nil && limited.Err() != nil && ctx.Err() == nil:
		v.Status, v.ExitCode = fork.TimedOut, fork.Unverified
		why = "it did not end within " + spec.Timeout.String() + "\n"
		if err := proc.Signal(ctx, sandbox.Kill); err != nil {
			return v, err
		}
	case err != nil:
		return v, err
	case exit.Limit != "":
		v.Status, why = fork.Failed, exceeded(exit.Limit, spec.Limits)+"\n"
	case exit.Code != 0:
		v.Status = fork.Failed
	}
	log, err := sandbox.Tail(ctx, proc, sandbox.Stdout, maxVerifyLog)
	if err != nil {
		return v, err
	}
	if v.Status != fork.Success {
		v.Output = why + lastLines(log)
	}
	return v, a.Artifacts.Put(ctx, artifact.RunKey(spec.Run, spec.Num, fork.VerifyName), bytes.NewReader(log))
}
