package ledger

import (
	"context"
	"database/sql"
	"errors"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// checks find what must not be in a ledger. Each returns the name of the first
// account that breaks the rule.
var checks = []struct{ rule, query string }{
	{"a fork is over its budget", `SELECT run || '/' || fork FROM forks WHERE budget > 0 AND spent + reserved > budget`},
	{"a run is over its budget", `SELECT run FROM runs WHERE budget > 0 AND spent + reserved > budget`},
	{"a day is over its budget", `SELECT day FROM days WHERE budget > 0 AND spent + reserved > budget`},
	{"a fork is not the sum of its calls", `SELECT f.run || '/' || f.fork FROM forks f LEFT JOIN
		(SELECT run, fork, SUM(cost) AS cost, SUM(input) AS input, SUM(output) AS output, SUM(CASE WHEN state = 'in_flight' THEN reserved ELSE 0 END) AS held,
		SUM(CASE WHEN state = 'in_flight' THEN 0 ELSE 1 END) AS ended FROM calls GROUP BY run, fork) c ON c.run = f.run AND c.fork = f.fork
		WHERE f.spent <> COALESCE(c.cost, 0) OR f.reserved <> COALESCE(c.held, 0) OR f.calls <> COALESCE(c.ended, 0)
		OR f.input <> COALESCE(c.input, 0) OR f.output <> COALESCE(c.output, 0)`},
	{"a run is not the sum of its forks", `SELECT r.run FROM runs r LEFT JOIN (SELECT run, SUM(spent) AS spent, SUM(reserved) AS reserved FROM forks GROUP BY run) f
		ON f.run = r.run WHERE r.spent <> COALESCE(f.spent, 0) OR r.reserved <> COALESCE(f.reserved, 0)`},
	{"a day is not the sum of its calls", `SELECT d.day FROM days d LEFT JOIN (SELECT day, SUM(cost) AS cost,
		SUM(CASE WHEN state = 'in_flight' THEN reserved ELSE 0 END) AS held FROM calls GROUP BY day) c
		ON c.day = d.day WHERE d.spent <> COALESCE(c.cost, 0) OR d.reserved <> COALESCE(c.held, 0)`},
	{"a batch is settled and a call of it is not", `SELECT b.id FROM batches b JOIN calls c ON c.batch = b.id WHERE b.state = 'settled' AND c.state = 'in_flight'`},
	{"a call is of a batch that is not there, or is another fork's", `SELECT c.batch FROM calls c LEFT JOIN batches b ON b.id = c.batch AND b.run = c.run AND b.fork = c.fork
		WHERE c.batch <> '' AND b.id IS NULL`},
}

// Check reads the whole ledger as it stands at one moment and returns
// fault.Invalid for the first thing in it that must not be: a budget that is
// exceeded by what is spent and reserved, and a sum that is not that of its
// parts. A budget that was lowered below what had been spent is exceeded too.
func (l *Ledger) Check(ctx context.Context) error { return l.store.check(ctx) }

func (s *store) check(ctx context.Context) error {
	const op = "check ledger"
	o := &sql.TxOptions{ReadOnly: true}
	if !s.alone { // SQLite's readers always see one moment
		o.Isolation = sql.LevelRepeatableRead
	}
	begun, err := s.read.BeginTx(ctx, o)
	if err != nil {
		return s.fault(op, err)
	}
	defer begun.Rollback() // there is nothing to commit
	for _, c := range checks {
		var who string
		err := begun.QueryRowContext(ctx, c.query).Scan(&who)
		switch {
		case err == nil:
			return fault.New(op, fault.Invalid, "%s: %s", c.rule, who)
		case !errors.Is(err, sql.ErrNoRows):
			return s.fault(op, err)
		}
	}
	return nil
}
