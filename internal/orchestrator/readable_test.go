package orchestrator

import (
	"context"
	"strings"
	"testing"

	sdkpb "go.temporal.io/api/sdk/v1"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/testsuite"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// details are what Temporal's web page shows of a workflow that runs.
func details(t *testing.T, env *testsuite.TestWorkflowEnvironment, id string) string {
	t.Helper()
	v, err := env.QueryWorkflowByID(id, "__temporal_workflow_metadata")
	var m sdkpb.WorkflowMetadata
	if err == nil {
		err = v.Get(&m)
	}
	if err != nil {
		t.Error(err)
	}
	return m.GetCurrentDetails()
}

func TestDetailsTellHowFarTheAgentIs(t *testing.T) {
	var d deeds
	env := newEnv(t, &d)
	run := ""
	look := func(wanted ...string) {
		t.Helper()
		got := details(t, env, fork.WorkflowID(run, 1))
		for _, want := range wanted {
			if !strings.Contains(got, want) {
				t.Errorf("no %q in\n%s", want, got)
			}
		}
	}
	tell := func(step fork.Step) {
		if err := env.SignalWorkflowByID(fork.WorkflowID(run, 1), Progress, step); err != nil {
			t.Error(err)
		}
	}
	d.agent = func(_ context.Context, in RunAgentInput) (RunAgentOutput, error) {
		run = in.Spec.Run
		if in.Attempt == 1 {
			tell(fork.Step{Turns: 7, Cost: fork.Dollar / 4, Doing: "Bash"})
			return RunAgentOutput{Status: fork.Failed, Turns: 7, Again: true, Usage: fork.Usage{Cost: fork.Dollar / 4}}, nil
		}
		tell(fork.Step{Turns: 2, Cost: fork.Dollar / 2})
		return RunAgentOutput{Status: fork.Success, Turns: 3, Usage: fork.Usage{Cost: fork.Dollar}}, nil
	}
	d.collect = func(CollectResultInput) (CollectResultOutput, error) {
		tell(fork.Step{Turns: 100, Doing: "late"})
		return CollectResultOutput{Branch: "b", Commit: "deed", FilesChanged: 2}, nil
	}
	d.verify = func(context.Context, VerifyForkInput) (fork.Verify, error) {
		return fork.Verify{Status: fork.Failed, ExitCode: 1}, nil
	}
	// It is called when the fork has taken the signals, and has not heard of
	// the end of its agent yet.
	env.SetOnActivityCompletedListener(func(info *activity.Info, _ converter.EncodedValue, _ error) {
		if info.ActivityType.Name != RunClaudeAgent.Name {
			return
		}
		if d.calls["agent"] == 1 {
			look("**running**: its agent works, attempt 1", "- turns: 7\n", "- cost: $0.2500\n", "- last action: `Bash`\n")
			return
		}
		look("attempt 2", "- turns: 9\n- cost: $0.5000\n- sandbox") // and no action of an older step
	})
	p := plan(1, 1)
	p.Verify = "make test"
	env.ExecuteWorkflow(OrchestrationName, p)
	look("**success**", "- turns: 10\n", "- branch: `b`, 2 files changed\n", "- verification: failed\n",
		"[the run](/namespaces/default-test-namespace/workflows/"+run+")")
}
