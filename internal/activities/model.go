package activities

import (
	"context"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// connect says to the agent where its model is and how it is let in: by the
// gateway with a token that is good for this fork only, or with the real key,
// where the user wanted that.
func (a *Activities) connect(ctx context.Context, to *agent.Spec, in orchestrator.RunAgentInput) error {
	account := gateway.Account{
		Run: in.Spec.Run, Repo: in.Spec.Repo, Fork: in.Spec.Num, RunBudget: in.Spec.RunBudget, ForkBudget: in.Spec.ForkBudget,
		Pause: in.Spec.OnBudget == fork.OnBudgetPause,
	}
	if in.Spec.Credentials == fork.CredentialsDirect {
		loan, err := a.Gateway.Lend(ctx, account, in.Spec.Model, in.Attempt)
		if err != nil {
			return err
		}
		to.BaseURL, to.Token, to.Remaining = loan.BaseURL, loan.APIKey, loan.Limit
		if loan.AuthToken != "" {
			to.Token, to.Bearer = loan.AuthToken, true
		}
		return nil
	}
	way := gateway.ByNet
	to.BaseURL = a.GatewayURL
	if a.hostBound(in.Spec.Provider) {
		way, to.BaseURL = gateway.ByDoor, "http://"+gatewayInside
	}
	// What is left of the budget is not said to the agent: the gateway stops
	// it to the cent, and Claude Code would write the amount into its prompt,
	// where it keeps the forks from sharing the prompt cache.
	var err error
	to.Token, err = a.Gateway.GrantFor(ctx, account, way)
	return err
}

// repay books what an agent has cost that the gateway did not see, by its own
// account of it.
func (f *follower) repay(ctx context.Context) error {
	spec := f.in.Spec
	if spec.Credentials != fork.CredentialsDirect {
		return nil
	}
	if f.sum.End == nil {
		return f.a.writeOff(ctx, spec.Run, spec.Num, f.in.Attempt)
	}
	used := fork.Usage{Cost: f.sum.End.Cost} // with what a resumed session cost before: too much rather than too little
	if f.sum.Used != nil {
		used = *f.sum.Used
	}
	return f.a.Gateway.Repay(ctx, spec.Run, spec.Num, f.in.Attempt, used)
}

// writeOff charges what was lent to an attempt, if anything was and nobody has
// told what it did cost.
func (a *Activities) writeOff(ctx context.Context, run string, num, attempt int) error {
	err := a.Gateway.WriteOff(ctx, run, num, attempt)
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// maxAttempts is at least how often an agent is started for one fork.
const maxAttempts = 2

// writeOffAll is writeOff of everything that was lent to a fork that has ended.
func (a *Activities) writeOffAll(ctx context.Context, run string, num int) error {
	for attempt := 1; attempt <= maxAttempts; attempt++ {
		if err := a.writeOff(ctx, run, num, attempt); err != nil {
			return err
		}
	}
	return nil
}

// denied reports whether the agent was refused the model for want of a good
// key.
func (f *follower) denied() bool {
	if f.in.Spec.Credentials == fork.CredentialsDirect {
		return f.sum.Denied
	}
	return f.a.Gateway.Denied(f.in.Spec.Run, f.in.Spec.Num)
}

// checkModel says, before anything is made, why the agents of the plan could not
// reach their model from the provider's sandboxes.
func (a *Activities) checkModel(ctx context.Context, p fork.Plan) error {
	const op = "reach the model"
	bound := a.hostBound(p.Provider)
	switch {
	case p.Prompt == "": // a base is made ahead of all runs
		return nil
	case bound && p.Credentials == fork.CredentialsDirect:
		return fault.New(op, fault.Invalid, "sandboxes of provider %s reach the gateway, so the key need not be in them", p.Provider).
			Hinted("Leave --credentials out.")
	case !bound && a.GatewayURL == "" && p.Credentials != fork.CredentialsDirect:
		return fault.New(op, fault.Invalid, "sandboxes of provider %s cannot reach this worker's gateway: it has no public address", p.Provider).
			Hinted("Set SANDBOX_TEMPORAL_GATEWAY_URL for the worker, or put the key into the sandboxes with --credentials direct.")
	}
	switch p.Agent {
	case "claude", "mini":
		return a.Gateway.Ready(ctx, gateway.Anthropic)
	case "codex":
		return a.Gateway.Ready(ctx, gateway.OpenAI)
	case "opencode":
		if strings.HasPrefix(a.Gateway.ModelID(p.Model), "gpt-") {
			return a.Gateway.Ready(ctx, gateway.OpenAI)
		}
		return a.Gateway.Ready(ctx, gateway.Anthropic)
	}
	return nil // it may need none
}
