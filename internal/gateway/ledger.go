package gateway

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

//go:embed migrations/*.sql
var migrations embed.FS

// A ledger writes what happens into SQLite, in the order in which it happened.
//
// One goroutine does all the writing and commits what has gathered since its
// last commit in one transaction, because a durable commit waits for the disk
// and many calls can share one. The order is what makes a crash safe: a
// reservation that was made with the money of a settled call is never on the
// disk without that settlement.
type ledger struct {
	db   *sql.DB
	lock *os.File
	log  *slog.Logger

	insert, update, refuse, grant, revoke *sql.Stmt

	mu     sync.Mutex
	queue  []*entry
	wake   chan struct{} // holds one when there is something to do
	closed bool
	done   chan struct{} // closed when the writer has ended; nil before start
	held   int           // entries that must be written and could not be, so far
}

// An entry is one thing that happened.
type entry struct {
	write func(context.Context, *sql.Tx) error
	done  chan error // gets the result, once; nil for entries that must be kept
}

// batchSize is the most entries in one transaction.
const batchSize = 512

// retryEvery is how often a ledger that cannot write tries again by itself.
const retryEvery = time.Second

func openLedger(ctx context.Context, dir string, log *slog.Logger) (_ *ledger, err error) {
	const op = "open ledger"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, diskFault(op, err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, diskFault(op, err)
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, diskFault(op, err)
	}
	l := &ledger{log: log, wake: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.release())
		}
	}()
	if l.lock, err = lock(filepath.Join(dir, "ledger.lock")); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "ledger.db")
	// SQLite gives its other files the mode of this one.
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, diskFault(op, err)
	}
	if err := f.Close(); err != nil {
		return nil, diskFault(op, err)
	}
	dsn := url.URL{Scheme: "file", Path: file, RawQuery: url.Values{
		"_pragma": {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)"},
		"_txlock": {"immediate"},
	}.Encode()}
	if l.db, err = sql.Open("sqlite", dsn.String()); err != nil {
		return nil, ledgerFault(op, err)
	}
	l.db.SetMaxOpenConns(1)
	if err := l.migrate(ctx); err != nil {
		return nil, err
	}
	if err := l.prepare(ctx); err != nil {
		return nil, err
	}
	return l, nil
}

// migrate brings the tables to this version's shape.
func (l *ledger) migrate(ctx context.Context) error {
	const op = "upgrade ledger"
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fault.New(op, fault.Internal, "%w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, l.db, dir)
	if err != nil {
		return fault.New(op, fault.Internal, "%w", err)
	}
	has, known, err := p.GetVersions(ctx)
	if err != nil {
		return ledgerFault(op, err)
	}
	if has > known {
		return fault.New(op, fault.Unsupported, "the ledger has version %d, this program knows up to %d", has, known).
			Hinted("Use the newer program that wrote it, or another SANDBOX_TEMPORAL_HOME.")
	}
	if _, err := p.Up(ctx); err != nil {
		return ledgerFault(op, err)
	}
	return nil
}

func (l *ledger) prepare(ctx context.Context) error {
	for _, s := range []struct {
		to   **sql.Stmt
		text string
	}{
		{&l.insert, `INSERT INTO calls (id, run, fork, model, path, prices, attempt, reserved, state, started)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'in_flight', ?)`},
		{&l.update, `UPDATE calls SET model = ?, input = ?, cache_write_5m = ?, cache_write_1h = ?, cache_read = ?, output = ?,
			web_searches = ?, cost = ?, state = ?, status = ?, request_id = ?, note = ?, ended = ? WHERE id = ?`},
		{&l.refuse, `UPDATE grants SET refused = refused + 1 WHERE token_sha256 = ?`},
		{&l.grant, `INSERT INTO grants (token_sha256, run, fork, run_budget, fork_budget, created) VALUES (?, ?, ?, ?, ?, ?)`},
		{&l.revoke, `UPDATE grants SET revoked = ? WHERE run = ? AND fork = ? AND revoked IS NULL`},
	} {
		stmt, err := l.db.PrepareContext(ctx, s.text)
		if err != nil {
			return ledgerFault("open ledger", err)
		}
		*s.to = stmt
	}
	return nil
}

// start begins to write.
func (l *ledger) start() {
	l.done = make(chan struct{})
	go l.run()
}

// append puts an entry behind all earlier ones and does not wait. Whoever
// appends under the gateway's mutex gets the order of the memory on the disk.
func (l *ledger) append(e *entry) {
	l.mu.Lock()
	l.queue = append(l.queue, e)
	l.mu.Unlock()
	l.signal()
}

func (l *ledger) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// run writes until the ledger is closed and nothing is left, or what is left
// cannot be written.
func (l *ledger) run() {
	defer close(l.done)
	for {
		l.mu.Lock()
		n := min(len(l.queue), batchSize)
		batch := l.queue[:n:n]
		l.queue = l.queue[n:]
		closed := l.closed
		l.mu.Unlock()
		if n == 0 {
			if closed {
				return
			}
			<-l.wake
			continue
		}
		held := l.commit(batch)
		l.mu.Lock()
		if len(held) > 0 {
			l.queue = append(held, l.queue...)
		}
		was := l.held
		l.held = len(held)
		l.mu.Unlock()
		switch {
		case len(held) == 0 && was > 0:
			l.log.Info("the ledger can be written again")
		case len(held) > 0 && closed:
			return // the calls stay in flight on the disk: the next Open charges their reservations
		case len(held) > 0:
			select {
			case <-l.wake:
			case <-time.After(retryEvery):
			}
		}
	}
}

// commit writes a batch in one transaction or, when that fails, entry by entry
// up to the first that must be kept and cannot be written. Entries that must be
// kept are returned from there on; for the others, whoever waits is told.
func (l *ledger) commit(batch []*entry) (held []*entry) {
	err := l.transact(batch)
	if err == nil {
		for _, e := range batch {
			e.answer(nil)
		}
		return nil
	}
	if len(batch) > 1 {
		for i, e := range batch {
			rest := l.commit(batch[i : i+1])
			if len(rest) == 0 {
				continue
			}
			// Nothing behind it may be written before it.
			held = append(held, e)
			for _, later := range batch[i+1:] {
				if later.done == nil {
					held = append(held, later)
				}
				later.answer(errBehind)
			}
			return held
		}
		return nil
	}
	if e := batch[0]; e.done == nil {
		l.mu.Lock()
		first := l.held == 0
		l.mu.Unlock()
		if first {
			l.log.Error("the ledger cannot be written; no call is forwarded until it can", "error", err)
		}
		return batch
	}
	batch[0].answer(err)
	return nil
}

var errBehind = fault.New("write ledger", fault.Unavailable, "earlier entries could not be written")

func (e *entry) answer(err error) {
	if e.done != nil {
		e.done <- err
	}
}

func (l *ledger) transact(batch []*entry) error {
	ctx := context.Background()
	tx, err := l.db.BeginTx(ctx, nil)
	if err != nil {
		return ledgerFault("write ledger", err)
	}
	for _, e := range batch {
		if err := e.write(ctx, tx); err != nil {
			return ledgerFault("write ledger", errors.Join(err, tx.Rollback()))
		}
	}
	if err := tx.Commit(); err != nil {
		tx.Rollback() //nolint:errcheck // the failed commit is the news
		return ledgerFault("write ledger", err)
	}
	return nil
}

// close writes what is left and closes the files.
func (l *ledger) close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	if l.done != nil {
		l.signal()
		<-l.done
	}
	l.mu.Lock()
	left := len(l.queue)
	l.mu.Unlock()
	err := l.release()
	if left > 0 {
		return errors.Join(fault.New("close ledger", fault.Unavailable, "%d entries could not be written", left).
			Hinted("Their calls are charged at their reservation when the ledger is opened again."), err)
	}
	return err
}

func (l *ledger) release() error {
	var errs []error
	if l.db != nil {
		errs = append(errs, l.db.Close())
	}
	if l.lock != nil {
		errs = append(errs, l.lock.Close())
	}
	return errors.Join(errs...)
}

// ledgerFault gives an error of the database its kind.
func ledgerFault(op string, err error) error {
	kind, hint := fault.Internal, ""
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		switch e.Code() & 0xff {
		case sqlite3.SQLITE_FULL:
			kind, hint = fault.Full, "Free some space on the disk that holds the ledger."
		case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
			kind, hint = fault.Conflict, "Another program holds the ledger open for writing."
		case sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT:
			kind, hint = fault.Invalid, "The ledger is damaged: move ledger.db away and keep it, a new one is made."
		case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
			kind = fault.Denied
		}
	}
	return &fault.Error{Op: op, Kind: kind, Err: err, Hint: hint}
}

// The rest says what the entries write.

func millis(t time.Time) int64 { return t.UnixMilli() }

func (l *ledger) insertCall(c *call) *entry {
	return &entry{done: make(chan error, 1), write: func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.StmtContext(ctx, l.insert).ExecContext(ctx, c.id, c.fork.run.name, c.fork.num, c.model, c.path, c.prices, c.attempt, c.hold, millis(c.started))
		return err
	}}
}

func (l *ledger) settleCall(id int64, s settlement) *entry {
	return &entry{write: func(ctx context.Context, tx *sql.Tx) error {
		t := s.tokens
		_, err := tx.StmtContext(ctx, l.update).ExecContext(ctx, s.model, t.Input, t.CacheWrite5m, t.CacheWrite1h, t.CacheRead, t.Output,
			t.WebSearches, s.cost, s.state, s.status, s.requestID, s.note, millis(s.ended), id)
		return err
	}}
}

func (l *ledger) countRefusal(h tokenHash) *entry {
	return &entry{write: func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.StmtContext(ctx, l.refuse).ExecContext(ctx, h[:])
		return err
	}}
}

func (l *ledger) grantToken(h tokenHash, a Account, now time.Time) *entry {
	return &entry{done: make(chan error, 1), write: func(ctx context.Context, tx *sql.Tx) error {
		if _, err := tx.StmtContext(ctx, l.revoke).ExecContext(ctx, millis(now), a.Run, a.Fork); err != nil {
			return err
		}
		_, err := tx.StmtContext(ctx, l.grant).ExecContext(ctx, h[:], a.Run, a.Fork, a.RunBudget, a.ForkBudget, millis(now))
		return err
	}}
}

func (l *ledger) revokeFork(run string, num int, now time.Time) *entry {
	return &entry{done: make(chan error, 1), write: func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.StmtContext(ctx, l.revoke).ExecContext(ctx, millis(now), run, num)
		return err
	}}
}

// settleCrashed charges what was in flight when the last gateway died.
func (l *ledger) settleCrashed(ctx context.Context, now time.Time) (calls int64, err error) {
	r, err := l.db.ExecContext(ctx, `UPDATE calls SET state = 'crashed', cost = reserved, ended = ?,
		note = 'in flight when the gateway died: charged at its reservation' WHERE state = 'in_flight'`, millis(now))
	if err != nil {
		return 0, ledgerFault("settle calls of the last run", err)
	}
	return r.RowsAffected()
}

// lastCall returns the greatest id that was given.
func (l *ledger) lastCall(ctx context.Context) (id int64, err error) {
	err = l.db.QueryRowContext(ctx, `SELECT COALESCE(MAX(id), 0) FROM calls`).Scan(&id)
	return id, err
}

// balances calls f with what each fork has used.
func (l *ledger) balances(ctx context.Context, f func(run string, num int, s Spent)) error {
	rows, err := l.db.QueryContext(ctx, `SELECT run, fork, COUNT(*), SUM(cost), SUM(input), SUM(output), SUM(cache_read),
		SUM(cache_write_5m + cache_write_1h) FROM calls GROUP BY run, fork`)
	if err != nil {
		return err
	}
	defer rows.Close() // Err tells
	for rows.Next() {
		var (
			run string
			num int
			s   Spent
		)
		if err := rows.Scan(&run, &num, &s.Calls, &s.Cost, &s.InputTokens, &s.OutputTokens, &s.CacheReadTokens, &s.CacheWriteTokens); err != nil {
			return err
		}
		f(run, num, s)
	}
	return rows.Err()
}

// A granted is one row of grants.
type granted struct {
	hash    tokenHash
	account Account
	refused int
	revoked bool
}

// grants calls f with every token, oldest first.
func (l *ledger) grants(ctx context.Context, f func(granted)) error {
	rows, err := l.db.QueryContext(ctx, `SELECT token_sha256, run, fork, run_budget, fork_budget, refused, revoked IS NOT NULL FROM grants ORDER BY id`)
	if err != nil {
		return err
	}
	defer rows.Close() // Err tells
	for rows.Next() {
		var (
			g    granted
			hash []byte
			run  fork.USD
			one  fork.USD
		)
		if err := rows.Scan(&hash, &g.account.Run, &g.account.Fork, &run, &one, &g.refused, &g.revoked); err != nil {
			return err
		}
		if copy(g.hash[:], hash) != len(g.hash) || len(hash) != len(g.hash) {
			return fault.New("read ledger", fault.Invalid, "a grant's hash has %d bytes", len(hash))
		}
		g.account.RunBudget, g.account.ForkBudget = run, one
		f(g)
	}
	return rows.Err()
}
