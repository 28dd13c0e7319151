package orchestrator

import (
	"fmt"
	"net/url"
	"strings"

	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// What Temporal's web page shows of a run beside its events. None of it is a
// command, so it can change without breaking the runs in flight. It says
// nothing that an agent wrote: the page renders Markdown.

// summary is one line about an activity, by its input.
func summary(in any) string {
	switch in := in.(type) {
	case PrepareBaseInput:
		return "what the forks of " + keyword(in.Plan.Repo) + " start from"
	case CreateSandboxInput:
		return fmt.Sprintf("sandbox of fork %d, %s", in.Spec.Num, in.Spec.Provider)
	case HealthCheckInput:
		return fmt.Sprintf("can fork %d work there?", in.Spec.Num)
	case RunAgentInput:
		return fmt.Sprintf("%s works on fork %d, attempt %d", in.Spec.Agent, in.Spec.Num, in.Attempt)
	case CollectResultInput:
		return fmt.Sprintf("branch of fork %d", in.Spec.Num)
	case VerifyForkInput:
		return fmt.Sprintf("is the work of fork %d good?", in.Spec.Num)
	case CleanupSandboxInput:
		return fmt.Sprintf("remove what fork %d of %s has", in.Num, in.Run)
	case HoldSandboxInput:
		return "sandbox " + in.Ref.ID
	case SetBudgetInput:
		if in.Num > 0 {
			return fmt.Sprintf("budget of fork %d: %s", in.Num, in.Budget)
		}
		return fmt.Sprintf("budget of the run: %s", in.Budget)
	case RecordMetricsInput:
		return fmt.Sprintf("fork %d: %s", in.Result.ForkNum, in.Result.Status)
	case FindOrphanedSandboxesInput:
		return fmt.Sprintf("sandboxes that no run uses, older than %s", in.MaxAge)
	}
	return ""
}

// code is text as Markdown shows it unchanged.
func code(text string) string { return "`" + strings.ReplaceAll(keyword(text), "`", "'") + "`" }

// planDetails say what a run was asked to do, without the prompt.
func planDetails(run string, p fork.Plan) string {
	budget, verify := "none", ""
	if p.Budget > 0 {
		budget = p.Budget.String()
	}
	if p.Verify != "" {
		verify = "- verified by " + code(p.Verify) + "\n"
	}
	return fmt.Sprintf("- repository %s\n- %d forks, %d at a time\n- agent %s, model %s, provider %s\n- budget %s\n%s\nSee `sandbox-temporal status %s`.",
		code(p.Repo), p.Forks, p.MaxConcurrent, code(p.Agent), code(p.Model), code(p.Provider), budget, verify, run)
}

// forkDetails say what a fork is.
func forkDetails(s fork.Spec) string {
	return fmt.Sprintf("- base %s of %s\n- agent %s, model %s, provider %s\n\nSee `sandbox-temporal logs %s/%d`.",
		code(s.BaseCommit), code(s.Repo), code(s.Agent), code(s.Model), code(s.Provider), s.Run, s.Num)
}

// describe shows how far the fork is.
func (f *forked) describe(ctx workflow.Context, doing string) {
	f.doing = doing
	r := f.result
	step := fork.Step{}
	if f.step != nil {
		step = *f.step
	}
	text := fmt.Sprintf("**%s**: %s\n\n- turns: %d\n- cost: %s\n", r.Status, doing, r.NumTurns+step.Turns, max(r.Cost, step.Cost))
	if step.Doing != "" {
		text += "- last action: " + code(step.Doing) + "\n"
	}
	if r.SandboxID != "" {
		text += "- sandbox: " + code(r.SandboxID) + "\n"
	}
	if r.Branch != "" {
		text += fmt.Sprintf("- branch: %s, %d files changed\n", code(r.Branch), r.FilesChanged)
	}
	if r.Verify != nil {
		text += "- verification: " + r.Verify.Outcome() + "\n"
	}
	run, num := f.in.Spec.Run, f.in.Spec.Num
	workflow.SetCurrentDetails(ctx, text+fmt.Sprintf("\n`sandbox-temporal logs %s/%d` · `sandbox-temporal diff %s/%d` · %s", run, num, run, num, link(ctx, "the run", run)))
}

// describe shows how far the run is.
func (r *run) describe(ctx workflow.Context) {
	p := r.progress(ctx)
	text := fmt.Sprintf("**%s**: %d of %d forks succeeded, %s spent\n\n- pending: %d\n- running: %d\n- failed: %d\n\n`sandbox-temporal status %s`",
		p.Status, p.Success, p.Total, p.Cost, p.Pending, p.Running, p.Failed, r.id)
	for _, num := range p.Active {
		text += " · " + link(ctx, fmt.Sprintf("fork %d", num), fork.WorkflowID(r.id, num))
	}
	workflow.SetCurrentDetails(ctx, text)
}

// link leads to the page of another workflow of the namespace.
func link(ctx workflow.Context, words, workflowID string) string {
	return fmt.Sprintf("[%s](/namespaces/%s/workflows/%s)", words, url.PathEscape(workflow.GetInfo(ctx).Namespace), url.PathEscape(workflowID))
}
