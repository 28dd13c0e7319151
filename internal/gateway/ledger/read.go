package ledger

import (
	"context"
	"database/sql"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Usage returns what a fork has spent, or the whole run when num is 0, with
// everything that was settled before, and what batches that are not settled may
// cost at most. Of a run that made no call it returns zeros.
func (l *Ledger) Usage(ctx context.Context, run string, num int) (Spent, error) {
	const op = "read usage"
	// What was settled is written before the next entry is.
	if err := l.do(ctx, want{}, nil); err != nil {
		return Spent{}, fault.Wrap(op, err)
	}
	s, err := l.store.usage(ctx, run, num)
	if err != nil {
		return Spent{}, l.store.fault(op, err)
	}
	return s, nil
}

// usageOf is what a fork, or with less of a condition a run, has spent.
const usageOf = `SELECT CAST(COALESCE(SUM(spent), 0) AS bigint), CAST(COALESCE(SUM(calls), 0) AS bigint),
	CAST(COALESCE(SUM(input), 0) AS bigint), CAST(COALESCE(SUM(output), 0) AS bigint), CAST(COALESCE(SUM(cache_read), 0) AS bigint),
	CAST(COALESCE(SUM(cache_write), 0) AS bigint), CAST(COALESCE(SUM(refused), 0) AS bigint), COALESCE(MAX(held), ''), COALESCE(MAX(short), '')
	FROM forks WHERE run = $1`

// pendingOf is what is reserved for batches that are not settled.
const pendingOf = `SELECT CAST(COALESCE(SUM(c.reserved), 0) AS bigint) FROM batches b JOIN calls c ON c.batch = b.id AND c.batch <> ''
	WHERE b.state = 'open' AND c.state = 'in_flight' AND b.run = $1`

func (s *store) usage(ctx context.Context, run string, num int) (u Spent, err error) {
	query, args := usageOf, []any{run}
	pending := pendingOf
	if num != 0 {
		query, args = usageOf+" AND fork = $2", []any{run, num}
		pending += " AND b.fork = $2"
	}
	// Each fork that is followed asks this once in a second or two.
	// A batch that is settled between the two questions is counted twice for that
	// once, rather than not at all.
	stmt, err := s.asked(ctx, pending)
	if err != nil {
		return u, err
	}
	if err = stmt.QueryRowContext(ctx, args...).Scan(&u.Pending); err != nil {
		return u, err
	}
	if stmt, err = s.asked(ctx, query); err != nil {
		return u, err
	}
	err = stmt.QueryRowContext(ctx, args...).
		Scan(&u.Cost, &u.Calls, &u.InputTokens, &u.OutputTokens, &u.CacheReadTokens, &u.CacheWriteTokens, &u.Refused, &u.Held, &u.Short)
	if err != nil {
		return u, err
	}
	u.Cost += u.Pending
	return u, nil
}

// InFlight counts the calls of a fork that are reserved and not settled, in all
// gateways. Those of batches are not in it: nobody waits for them.
func (l *Ledger) InFlight(ctx context.Context, run string, num int) (n int, err error) {
	const op = "read ledger"
	if err := l.do(ctx, want{}, nil); err != nil {
		return 0, fault.Wrap(op, err)
	}
	err = l.store.read.QueryRowContext(ctx, "SELECT COUNT(*) FROM calls WHERE run = $1 AND fork = $2 AND state = 'in_flight' AND batch = ''", run, num).Scan(&n)
	if err != nil {
		return 0, l.store.fault(op, err)
	}
	return n, nil
}

// A Budget is how one budget stands.
type Budget struct {
	Limit    fork.USD `json:"budget_usd"` // 0: none
	Spent    fork.USD `json:"spent_usd"`
	Reserved fork.USD `json:"reserved_usd"` // for calls under way
}

// Left is what calls that begin now can use. It is meaningless without a limit.
func (b Budget) Left() fork.USD { return max(b.Limit-b.Spent-b.Reserved, 0) }

// Budgets is how the budgets of a run stand, those of its forks, and that of
// today.
type Budgets struct {
	Run   string       `json:"workflow_id"`
	Repo  string       `json:"repo"`
	Pause bool         `json:"pauses"` // calls that no budget covers are held
	Whole Budget       `json:"run"`
	Forks []ForkBudget `json:"forks"`
	Day   string       `json:"day"` // today's date, by UTC
	Today Budget       `json:"today"`
}

// A ForkBudget is a fork's.
type ForkBudget struct {
	Num int `json:"fork_num"`
	Budget
	Held string `json:"held,omitempty"` // why a call of the fork waits; empty: none does
}

// budgets reads how a run stands, or fails with sql.ErrNoRows.
func (s *store) budgets(ctx context.Context, run, day string) (b Budgets, err error) {
	b = Budgets{Run: run, Day: day, Forks: []ForkBudget{}}
	begun, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return b, err
	}
	defer begun.Rollback() // there is nothing to commit
	var pause int
	err = begun.QueryRowContext(ctx, "SELECT repo, pause, budget, spent, reserved FROM runs WHERE run = $1", run).
		Scan(&b.Repo, &pause, &b.Whole.Limit, &b.Whole.Spent, &b.Whole.Reserved)
	if err != nil {
		return b, err
	}
	b.Pause = pause != 0
	found, err := begun.QueryContext(ctx, "SELECT budget, spent, reserved FROM days WHERE day = $1", day)
	if err != nil {
		return b, err
	}
	defer found.Close() // Err tells
	if found.Next() {
		err = found.Scan(&b.Today.Limit, &b.Today.Spent, &b.Today.Reserved)
	}
	if err == nil {
		err = found.Err()
	}
	if err != nil {
		return b, err
	}
	found.Close() //nolint:errcheck // a second one is deferred
	forks, err := begun.QueryContext(ctx, "SELECT fork, budget, spent, reserved, held FROM forks WHERE run = $1 ORDER BY fork", run)
	if err != nil {
		return b, err
	}
	defer forks.Close() // Err tells
	for forks.Next() {
		var f ForkBudget
		if err := forks.Scan(&f.Num, &f.Limit, &f.Spent, &f.Reserved, &f.Held); err != nil {
			return b, err
		}
		b.Forks = append(b.Forks, f)
	}
	return b, forks.Err()
}
