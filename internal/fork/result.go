package fork

import "unicode/utf8"

// Budgets are the words for whose budget it is: they lie inside one another.
var Budgets = []string{BudgetOfFork, BudgetOfRun, BudgetOfDay}

// The words.
const (
	BudgetOfFork = "fork"
	BudgetOfRun  = "run"
	BudgetOfDay  = "day" // which all runs share
)

// Usage is what model calls used and cost.
type Usage struct {
	Cost             USD   `json:"cost_usd"`
	InputTokens      int64 `json:"input_tokens"`
	OutputTokens     int64 `json:"output_tokens"`
	CacheReadTokens  int64 `json:"cache_read_tokens"`
	CacheWriteTokens int64 `json:"cache_write_tokens"`

	// Pending is the part of Cost that is not certain: the most that message
	// batches can cost of which nobody knows yet what they did.
	Pending USD `json:"pending_usd,omitempty"`
}

// Add returns the sum of two usages.
func (u Usage) Add(v Usage) Usage {
	return Usage{
		Cost:             u.Cost + v.Cost,
		InputTokens:      u.InputTokens + v.InputTokens,
		OutputTokens:     u.OutputTokens + v.OutputTokens,
		CacheReadTokens:  u.CacheReadTokens + v.CacheReadTokens,
		CacheWriteTokens: u.CacheWriteTokens + v.CacheWriteTokens,
		Pending:          u.Pending + v.Pending,
	}
}

// A Result is how one fork ended, or how it stands. Its JSON is a promise to
// scripts: fields are added, never renamed.
type Result struct {
	ForkNum      int     `json:"fork_num"`
	Status       Status  `json:"status"`
	Model        string  `json:"model"`
	Agent        string  `json:"agent"`
	SandboxID    string  `json:"sandbox_id"`
	Branch       string  `json:"branch"` // empty when the fork has no branch
	BaseCommit   string  `json:"base_commit"`
	Commit       string  `json:"commit"` // empty when the agent changed nothing
	FilesChanged int     `json:"files_changed"`
	Insertions   int     `json:"insertions"`
	Deletions    int     `json:"deletions"`
	Usage                // cost_usd, input_tokens, …
	NumTurns     int     `json:"num_turns"`
	Duration     float64 `json:"duration_seconds"`
	Output       string  `json:"output"`               // the agent's last words, at most MaxText bytes
	Error        string  `json:"error"`                // why Status is not success; empty otherwise
	Short        string  `json:"short,omitempty"`      // whose budget was used up, for BudgetExceeded: one of Budgets; empty: not known
	ErrorKind    string  `json:"error_kind,omitempty"` // "denied" when the model's key was refused; else empty
	Hint         string  `json:"hint,omitempty"`
	Verify       *Verify `json:"verify,omitempty"` // nil: nothing was verified
	Paused       bool    `json:"paused,omitempty"` // it stands still now; never of a fork that has ended
}

// Verify is what the plan's verification said of a fork's work. Status is one
// of Success, which is an exit status of 0, Failed and TimedOut.
type Verify struct {
	Status   Status  `json:"status"`
	ExitCode int     `json:"exit_code"` // Unverified when the command did not come to its own end
	Duration float64 `json:"duration_seconds"`
	Output   string  `json:"output,omitempty"` // the end of what was printed, or why it could not be run; empty after Success
}

// Unverified is the exit code of a verification that has none.
const Unverified = -1

// The words for how a verification ended, as metrics have them.
const (
	VerifyPassed  = "passed"
	VerifyFailed  = "failed"
	VerifyTimeout = "timeout"
	VerifyError   = "error" // it could not be run
)

// VerifyOutcomes are those words.
var VerifyOutcomes = []string{VerifyPassed, VerifyFailed, VerifyTimeout, VerifyError}

// Outcome is the word for how the verification ended.
func (v Verify) Outcome() string {
	switch {
	case v.Status == Success:
		return VerifyPassed
	case v.Status == TimedOut:
		return VerifyTimeout
	case v.ExitCode == Unverified:
		return VerifyError
	}
	return VerifyFailed
}

// Progress counts a run's forks by where they stand.
type Progress struct {
	Run       string   `json:"workflow_id"`
	Name      string   `json:"name,omitempty"`
	Repo      string   `json:"repo"`
	Status    Status   `json:"status"`              // Running until every fork has ended
	Preparing bool     `json:"preparing,omitempty"` // what the forks start from is being made
	Paused    bool     `json:"paused,omitempty"`    // by a person: no further fork starts
	Held      []Hold   `json:"held,omitempty"`      // the forks that wait for more money; while there are any, no further one starts
	Total     int      `json:"total_forks"`
	Pending   int      `json:"pending"`
	Running   int      `json:"running"`
	Success   int      `json:"successful"`
	Failed    int      `json:"failed"` // every ended fork that is no success
	Cost      USD      `json:"total_cost_usd"`
	Budget    USD      `json:"budget_usd,omitempty"`
	Duration  float64  `json:"total_duration_seconds"`
	Active    []int    `json:"active,omitempty"`   // the numbers of the running forks
	Statuses  []Status `json:"statuses,omitempty"` // of each fork, by number
	Error     string   `json:"error,omitempty"`    // why the run itself could not go on
	ErrorKind string   `json:"error_kind,omitempty"`
	Hint      string   `json:"hint,omitempty"`
}

// A Hold is a fork that waits, because no budget covers its next call of the
// model.
type Hold struct {
	ForkNum int    `json:"fork_num"`
	Why     string `json:"why"` // which budget is short and how much of it is left, a whole sentence
}

// Words says in words how the run stands: "running", "paused", "paused
// (budget)", "preparing the base", or its final status.
func (p Progress) Words() string {
	switch {
	case p.Status.Ended():
		return string(p.Status)
	case p.Preparing:
		return "preparing the base"
	case len(p.Held) > 0:
		return "paused (budget)"
	case p.Paused:
		return "paused"
	}
	return string(Running)
}

// A Report is all there is to say about a run so far.
type Report struct {
	Progress
	Results []Result `json:"results"` // of the forks that ended, by number
}

// MaxText bounds the free text of a Result, in bytes.
const MaxText = 16 << 10

// Cut shortens s to at most limit bytes at a rune's edge and marks the place.
// What was cut stands in the artifact store.
func Cut(s string, limit int) string {
	const mark = "\n… (cut)"
	if len(s) <= limit {
		return s
	}
	n := limit - len(mark)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:max(n, 0)] + mark
}
