package fork

import (
	"fmt"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func bad(hint, format string, args ...any) error {
	return fault.New("plan", fault.Invalid, format, args...).Hinted("%s", hint)
}

// ValidateBase is Validate of the part of a plan that a base is made from.
func (p Plan) ValidateBase() error {
	switch {
	case p.Repo == "":
		return bad("Name a git URL or a local path.", "no repository given")
	case p.Provider == "":
		return bad("Use --provider local.", "no provider given")
	case p.Agent == "":
		return bad("Use --agent claude.", "no agent given")
	}
	return nil
}

// Validate says what is wrong with the plan, as a fault of kind Invalid with
// a hint, or returns nil.
func (p Plan) Validate() error {
	if err := p.ValidateBase(); err != nil {
		return err
	}
	switch {
	case strings.TrimSpace(p.Prompt) == "":
		return bad("Say what the agents shall do: --prompt TEXT, --prompt @file, or --prompt - for standard input.", "the prompt is empty")
	case len(p.Prompt) > MaxPrompt:
		return bad("Put the long part into a file in the repository and refer to it.", "the prompt has %d bytes, the most is %d", len(p.Prompt), MaxPrompt)
	case strings.ContainsRune(p.Prompt, 0):
		return bad("Give the prompt as text.", "the prompt holds a NUL byte")
	case p.Forks < 1 || p.Forks > MaxForks:
		return bad(fmt.Sprintf("Use --forks 1 to %d.", MaxForks), "%d forks asked for", p.Forks)
	case p.MaxConcurrent < 1:
		return bad("Use --max-concurrent 1 or more.", "%d forks at once asked for", p.MaxConcurrent)
	case p.Timeout < time.Second:
		return bad("Use --timeout 1 or more, in seconds.", "a timeout of %s asked for", p.Timeout)
	case p.Timeout > 7*24*time.Hour:
		return bad("Use --timeout 604800 (a week) or less.", "a timeout of %s asked for", p.Timeout)
	case p.Budget < 0:
		return bad("Use --budget with an amount above 0.", "a budget of %s asked for", p.Budget)
	case p.BudgetPerFork < 0:
		return bad("Use --budget-per-fork with an amount above 0.", "a budget of %s for each fork asked for", p.BudgetPerFork)
	case p.Credentials != "" && p.Credentials != CredentialsGateway && p.Credentials != CredentialsDirect:
		return bad("Use --credentials gateway or --credentials direct.", "%q is no way to the model", p.Credentials)
	case p.Credentials == CredentialsDirect && p.Agent != "claude":
		return bad("Use --agent claude, or leave --credentials out.", "the agent %q keeps to no budget without the gateway", p.Agent)
	case p.Credentials == CredentialsDirect && p.OnBudget == OnBudgetPause:
		return bad("Use --on-budget stop, or leave --credentials out.", "only the gateway can hold an agent until there is more money")
	case p.OnBudget != "" && p.OnBudget != OnBudgetStop && p.OnBudget != OnBudgetPause:
		return bad("Use --on-budget stop or --on-budget pause.", "%q is nothing to do when a budget is used up", p.OnBudget)
	case p.Verify != "" && strings.TrimSpace(p.Verify) == "":
		return bad("Use --verify 'make test', or leave it out.", "--verify names no command")
	case strings.ContainsRune(p.Verify, 0):
		return bad("Give the command as text.", "--verify holds a NUL byte")
	case p.Agent == "command" && strings.TrimSpace(p.AgentCommand) == "":
		return bad("Say which program it is: --agent-command 'my-agent {prompt}'.", "the agent \"command\" has no command")
	case p.Agent != "command" && p.AgentCommand != "":
		return bad("Add --agent command, or leave --agent-command out.", "--agent-command is given but the agent is %q", p.Agent)
	}
	return p.Limits.Validate()
}
