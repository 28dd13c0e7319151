package ledger

import "github.com/sandbox-temporal/sandbox-temporal/internal/fork"

// Tokens is what one call used, by price class.
type Tokens struct {
	Input        int64 // neither read from the cache nor written to it
	CacheWrite5m int64
	CacheWrite1h int64
	CacheRead    int64
	Output       int64
	WebSearches  int64 // requests, not tokens
}

// Prompt is how long the prompt was, cached or not: what long-context tiers
// look at.
func (t Tokens) Prompt() int64 { return t.Input + t.CacheWrite5m + t.CacheWrite1h + t.CacheRead }

// Spent is what a fork or a run has used. Calls under way are not in it; batches
// that are not settled are, at the most that they can cost: see Usage.Pending.
type Spent struct {
	fork.Usage
	Calls   int    // that have ended, well or not
	Refused int    // that were answered that no budget covers them
	Short   string // whose budget the latest of these was over: one of fork.Budgets; of a run: of any of its forks
	Held    string // why a call of the fork, or of one of the run's, waits for a budget; empty: none does
}

// plus adds and stops at the greatest sum that is safe to add to again.
func plus(a, b fork.USD) fork.USD { return min(a+b, most) }

// most is far above any bill, and low enough for a sum of two.
const most fork.USD = 1 << 62
