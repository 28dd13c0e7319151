// Package fork holds the words of this program: what is asked for (a [Plan]
// of [Spec]s), what it may cost (a [USD] budget), and what came of it
// ([Result]s in a [Report]). It is data only and touches nothing outside.
package fork

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A Status is where a fork, or a whole run, stands. Statuses are written into
// workflow history and into JSON that scripts read, so they never change.
type Status string

// The statuses. Pending and Running are the only ones that can still change.
const (
	Pending        Status = "pending"         // waits for a slot
	Running        Status = "running"         // has a sandbox, or is getting one
	Success        Status = "success"         // the agent ended well and its work was collected
	Failed         Status = "failed"          // something went wrong; Result.Error says what
	Cancelled      Status = "cancelled"       // a person asked for it to stop
	TimedOut       Status = "timeout"         // the fork used up its time
	BudgetExceeded Status = "budget_exceeded" // the money ran out
	Lost           Status = "lost"            // its sandbox vanished and could not be restored
)

// Statuses lists every status, in the order in which a fork can reach them.
var Statuses = []Status{Pending, Running, Success, Failed, Cancelled, TimedOut, BudgetExceeded, Lost}

// Ended reports whether s is final.
func (s Status) Ended() bool { return s != Pending && s != Running && s != "" }

// A Plan is what one run was asked to do: the same task, given to Forks
// agents that know nothing of each other.
type Plan struct {
	Repo          string        `json:"repo"`                      // a git URL, or an absolute path on the worker's host; with Upload, on the user's
	Upload        string        `json:"upload,omitempty"`          // where the artifact store holds Repo, which the worker's host does not have; empty: it is had from Repo
	Branch        string        `json:"branch"`                    // where the forks start; empty: main, or else the repository's own default
	Prompt        string        `json:"prompt"`                    // the task, at most MaxPrompt bytes
	Name          string        `json:"name,omitempty"`            // the user's own word for the run; may be empty
	Forks         int           `json:"forks"`                     // 1 to MaxForks
	Model         string        `json:"model"`                     // an alias ("sonnet") or a full model id
	MaxConcurrent int           `json:"max_concurrent"`            // forks that run at once; at least 1
	Timeout       time.Duration `json:"timeout"`                   // the most one fork may take, from its sandbox's creation
	Budget        USD           `json:"budget,omitempty"`          // for the whole run; 0: no limit
	BudgetPerFork USD           `json:"budget_per_fork,omitempty"` // for each fork, within the run's; 0: no limit
	OnBudget      string        `json:"on_budget,omitempty"`       // what happens when no budget covers a call: OnBudgetStop or OnBudgetPause; empty: stop
	Provider      string        `json:"provider"`                  // where the sandboxes are made
	Isolation     string        `json:"isolation,omitempty"`       // the tier that the user asked for; Provider has it already
	Agent         string        `json:"agent"`                     // who does the work
	AgentCommand  string        `json:"agent_command,omitempty"`   // for the agent "command": a shell line, {prompt} substituted
	AgentPath     string        `json:"agent_path,omitempty"`      // the agent's program on the worker's host; empty: looked up on its PATH
	Setup         string        `json:"setup,omitempty"`           // a shell line that prepares the base once
	Verify        string        `json:"verify,omitempty"`          // a shell line that says with status 0 that a fork's work is good; empty: nothing is verified
	Credentials   string        `json:"credentials,omitempty"`     // how agents come by the model: CredentialsGateway or CredentialsDirect; empty: the gateway
	Egress        string        `json:"egress,omitempty"`          // what the sandboxes may reach; empty: the default
	Mounts        []Mount       `json:"mounts,omitempty"`          // host files the sandboxes see, read-only
	Limits        Limits        `json:"limits,omitzero"`           // of each sandbox
}

// What happens to a fork when no budget covers its next call of the model.
const (
	OnBudgetStop  = "stop"  // it ends
	OnBudgetPause = "pause" // it waits, with its sandbox and its session, until there is more money
)

// How agents come by the model.
const (
	CredentialsGateway = "gateway" // with a token that is good at the gateway only
	CredentialsDirect  = "direct"  // with the real key, which is in their sandboxes then
)

// A Mount is a file or folder of the worker's host that a sandbox sees
// read-only at Target.
type Mount struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// The bounds of a plan.
const (
	MaxForks  = 1000    // history stays within Temporal's limits; see docs/decisions
	MaxPrompt = 1 << 20 // 1 MiB: half of what one Temporal payload may hold
)

// A Spec is one fork of a plan, as its workflow receives it.
type Spec struct {
	Run          string        `json:"run"`
	Num          int           `json:"fork_num"` // from 1
	Repo         string        `json:"repo"`
	Upload       string        `json:"upload,omitempty"` // as in Plan
	BaseCommit   string        `json:"base_commit"`
	PromptKey    string        `json:"prompt_key"` // where the artifact store holds the prompt
	Model        string        `json:"model"`
	Timeout      time.Duration `json:"timeout"`
	RunBudget    USD           `json:"run_budget,omitempty"`  // shared with the run's other forks; 0: no limit
	ForkBudget   USD           `json:"fork_budget,omitempty"` // its own, within the run's; 0: no limit
	OnBudget     string        `json:"on_budget,omitempty"`   // as in Plan
	Provider     string        `json:"provider"`
	Agent        string        `json:"agent"`
	AgentCommand string        `json:"agent_command,omitempty"`
	AgentPath    string        `json:"agent_path,omitempty"`
	Credentials  string        `json:"credentials,omitempty"` // as in Plan
	Egress       string        `json:"egress,omitempty"`
	Verify       string        `json:"verify,omitempty"` // as in Plan
	Mounts       []Mount       `json:"mounts,omitempty"`
	Limits       Limits        `json:"limits,omitzero"`
}

// ID returns the name that users write for the fork: "<run>/<n>".
func (s Spec) ID() string { return s.Run + "/" + strconv.Itoa(s.Num) }

// WorkflowID returns the id of the workflow that runs fork num of run.
func WorkflowID(run string, num int) string { return fmt.Sprintf("%s-fork-%d", run, num) }

// ParseWorkflowID returns whose workflow has the id: a fork's, or with a num of
// 0 that of a run or of a preparation.
func ParseWorkflowID(id string) (run string, num int, ok bool) {
	if !strings.HasPrefix(id, RunPrefix) && !strings.HasPrefix(id, PreparePrefix) {
		return "", 0, false
	}
	run, word, forked := strings.Cut(id, "-fork-")
	if !forked {
		return id, 0, true
	}
	num, err := strconv.Atoi(word)
	return run, num, err == nil && num > 0
}

// Branch returns the name of the branch that holds the work of fork num.
func Branch(run string, num int) string { return fmt.Sprintf("sandbox/%s/%d", run, num) }

// RunPrefix begins the id of every run.
const RunPrefix = "sandbox-orch-"

// PreparePrefix begins the id of every preparation of a base ahead of runs.
const PreparePrefix = "sandbox-prep-"

// ParseID splits "<run>" or "<run>/<n>". The number is 0 when s names a whole
// run; ok is false when s is neither.
func ParseID(s string) (run string, num int, ok bool) {
	run, n, found := strings.Cut(s, "/")
	if run == "" {
		return "", 0, false
	}
	if !found {
		return run, 0, true
	}
	num, err := strconv.Atoi(n)
	if err != nil || num < 1 || num > MaxForks {
		return "", 0, false
	}
	return run, num, true
}
