package ledger

import (
	"context"
	"crypto/sha256"
	"encoding/hex"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// An Account names who pays: one fork of one run. A fork's budget lies inside
// the run's, which it shares with the run's other forks, and that inside the
// day's, which it shares with all runs.
type Account struct {
	Run  string
	Repo string // what the run works on, for the reports
	Fork int    // from 1

	RunBudget  fork.USD // 0: none
	ForkBudget fork.USD // 0: none

	// Pause holds calls that no budget covers until there is more money, instead
	// of refusing them. It is the run's.
	Pause bool
}

// A Hash is that of a token. Tokens themselves are never in the ledger: who
// reads it cannot use them.
type Hash [sha256.Size]byte

// HashOf hashes a token.
func HashOf(token string) Hash { return sha256.Sum256([]byte(token)) }

func (h Hash) text() string { return hex.EncodeToString(h[:]) }

// Grant makes the token good for the fork, and the earlier one of the fork bad.
// The first Grant of a run says what the run's budget is, and the first of a
// fork the fork's; from then on only SetBudget changes them. Money that was
// spent before counts against them.
//
// The kind of the error is Invalid for an account that cannot be.
func (l *Ledger) Grant(ctx context.Context, a Account, token Hash) error {
	const op = "grant token"
	if a.Run == "" || a.Run != tidy(a.Run) || a.Fork < 1 || a.RunBudget < 0 || a.ForkBudget < 0 {
		return fault.New(op, fault.Invalid, "run %q, fork %d, budgets %s and %s", a.Run, a.Fork, a.RunBudget, a.ForkBudget)
	}
	key := forkKey{a.Run, a.Fork}
	w := want{
		run: a.Run, num: a.Fork, create: true, repo: tidy(a.Repo), pause: a.Pause, budget: [2]fork.USD{a.RunBudget, a.ForkBudget}, at: millis(l.now()),
	}
	return fault.Wrap(op, l.do(ctx, w, func(s *sheet) {
		run, f := s.runs[a.Run], s.forks[key]
		run.repo, run.pause = w.repo, a.Pause // SetBudget may have made the row
		f.token, f.granted, f.held = token.text(), w.at, ""
		s.changedTokens[key] = true
		s.change("", key)
		s.free("", key)
	}))
}

// Revoke makes the fork's token bad: calls of the fork that wait, and those that
// come, are refused with ErrRevoked. To revoke what was never granted, or a
// second time, is no error.
func (l *Ledger) Revoke(ctx context.Context, run string, num int) error {
	key := forkKey{run, num}
	return fault.Wrap("revoke token", l.do(ctx, want{run: run, num: num}, func(s *sheet) {
		if f := s.forks[key]; f != nil && f.token != "" {
			f.token, f.held = "", ""
			s.changedForks[key], s.changedTokens[key] = true, true
			s.free("", key)
		}
	}))
}

// Holder returns whose token it is, and fault.NotFound for one that is not
// good.
func (l *Ledger) Holder(ctx context.Context, token Hash) (run string, num int, err error) {
	const op = "find token"
	found, err := l.store.read.QueryContext(ctx, "SELECT run, fork FROM forks WHERE token_sha256 = $1", token.text())
	if err != nil {
		return "", 0, l.store.fault(op, err)
	}
	defer found.Close() // Err tells
	if found.Next() {
		err = found.Scan(&run, &num)
	} else if err = found.Err(); err == nil {
		return "", 0, fault.New(op, fault.NotFound, "no fork has the token")
	}
	if err != nil {
		return "", 0, l.store.fault(op, err)
	}
	return run, num, nil
}

// SetBudget makes budget the run's, or with a num above 0 the fork's; 0 takes
// the limit away. Calls that wait for money are tried again. What was spent
// stays spent: a budget below it lets nothing through.
func (l *Ledger) SetBudget(ctx context.Context, run string, num int, budget fork.USD) error {
	const op = "set budget"
	if run == "" || run != tidy(run) || num < 0 || budget < 0 {
		return fault.New(op, fault.Invalid, "run %q, fork %d, budget %s", run, num, budget)
	}
	w := want{run: run, num: num, create: true, at: millis(l.now())}
	return fault.Wrap(op, l.do(ctx, w, func(s *sheet) {
		key := forkKey{run, num}
		if num == 0 {
			s.runs[run].budget = budget
			s.changedRuns[run] = true
		} else {
			s.forks[key].budget = budget
			s.changedForks[key] = true
		}
		s.free("", key)
	}))
}
