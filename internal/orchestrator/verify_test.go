package orchestrator

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func TestWorkIsVerifiedWhenThatWasAsked(t *testing.T) {
	bad := func(context.Context, VerifyForkInput) (fork.Verify, error) {
		return fork.Verify{Status: fork.Failed, ExitCode: 2, Output: "FAIL"}, nil
	}
	unchanged := func(CollectResultInput) (CollectResultOutput, error) { return CollectResultOutput{}, nil }
	ends := func(status fork.Status) func(context.Context, RunAgentInput) (RunAgentOutput, error) {
		return func(context.Context, RunAgentInput) (RunAgentOutput, error) {
			return RunAgentOutput{Status: status, Error: "why"}, nil
		}
	}
	for name, row := range map[string]struct {
		line   string
		set    func(*deeds)
		calls  int
		status fork.Status
		want   *fork.Verify
	}{
		"not asked": {"", func(*deeds) {}, 0, fork.Success, nil},
		"good":      {"make test", func(*deeds) {}, 1, fork.Success, &fork.Verify{Status: fork.Success, Duration: 1.5}},
		"bad": {"make test", func(d *deeds) { d.verify = bad }, 1, fork.Success,
			&fork.Verify{Status: fork.Failed, ExitCode: 2, Output: "FAIL"}},
		"nothing changed":         {"make test", func(d *deeds) { d.collect = unchanged }, 1, fork.Success, &fork.Verify{Status: fork.Success, Duration: 1.5}},
		"half done":               {"make test", func(d *deeds) { d.agent = ends(fork.TimedOut) }, 1, fork.TimedOut, &fork.Verify{Status: fork.Success, Duration: 1.5}},
		"failed, nothing changed": {"make test", func(d *deeds) { d.agent, d.collect = ends(fork.Failed), unchanged }, 0, fork.Failed, nil},
		"not collected": {"make test", func(d *deeds) {
			d.collect = func(CollectResultInput) (CollectResultOutput, error) {
				return CollectResultOutput{}, fault.New("", fault.Invalid, "no git")
			}
		}, 0, fork.Failed, nil},
		"cannot be run": {"make test", func(d *deeds) {
			d.verify = func(context.Context, VerifyForkInput) (fork.Verify, error) {
				return fork.Verify{}, errors.New("no room")
			}
		}, 3, fork.Success, &fork.Verify{Status: fork.Failed, ExitCode: fork.Unverified, Output: "no room"}},
	} {
		t.Run(name, func(t *testing.T) {
			var d deeds
			row.set(&d)
			env := newEnv(t, &d)
			p := plan(1, 1)
			p.Verify = row.line
			env.ExecuteWorkflow(OrchestrationName, p)
			res := report(t, env).Results[0]
			if res.Status != row.status || d.calls["verify"] != row.calls || d.calls["clean"] != 1 {
				t.Errorf("%s: %s, %v", name, res.Status, d.calls)
			}
			switch got := res.Verify; {
			case row.want == nil && got == nil:
			case row.want == nil || got == nil:
				t.Errorf("%+v, want %+v", got, row.want)
			case got.Status != row.want.Status || got.ExitCode != row.want.ExitCode || got.Duration != row.want.Duration || !strings.Contains(got.Output, row.want.Output):
				t.Errorf("%+v, want %+v", got, row.want)
			}
		})
	}
}

func TestVerificationIsOfWhatWasCollected(t *testing.T) {
	var d deeds
	var got VerifyForkInput
	d.verify = func(_ context.Context, in VerifyForkInput) (fork.Verify, error) {
		got = in
		return fork.Verify{Status: fork.Success}, nil
	}
	env := newEnv(t, &d)
	p := plan(1, 1)
	p.Verify, p.Timeout = "make test", time.Hour
	env.ExecuteWorkflow(OrchestrationName, p)
	if got.Commit != "deed" || got.Base.Frozen != "base" || got.Ref.ID != "sb-1" || got.Spec.Verify != "make test" {
		t.Errorf("%+v", got)
	}
	if left := got.Deadline.Sub(env.Now()); left < time.Hour || left > 2*time.Hour {
		t.Errorf("its sandbox has %s, for a command that has an hour", left)
	}
}

func TestCancelledVerificationSaysNothing(t *testing.T) {
	var d deeds
	env := newEnv(t, &d)
	d.verify = func(ctx context.Context, _ VerifyForkInput) (fork.Verify, error) {
		env.SignalWorkflow(Cancel, nil)
		<-ctx.Done()
		return fork.Verify{}, ctx.Err()
	}
	p := plan(1, 1)
	p.Verify = "make test"
	env.ExecuteWorkflow(OrchestrationName, p)
	res := report(t, env).Results[0]
	if res.Status != fork.Success || res.Verify != nil || d.calls["clean"] != 1 || d.now != 0 {
		t.Errorf("%+v, %v", res, d.calls)
	}
}
