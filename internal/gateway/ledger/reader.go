package ledger

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Reader reads a ledger, whether or not a gateway uses it, and changes
// nothing.
type Reader struct{ store *store }

// OpenReader opens a ledger to read it: that of o.URL, or SQLite's in o.Dir.
//
// The kind of the error is NotFound when there is no ledger yet, Unsupported for
// one of another version than this program's, and otherwise as with [Open].
func OpenReader(ctx context.Context, o Options) (_ *Reader, err error) {
	const op = "open ledger"
	var s *store
	if o.URL != "" {
		s, err = openPostgres(ctx, o.URL)
	} else {
		s, err = readSQLite(o.Dir)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	// The migrations' own table tells; asking goose would make it.
	p, err := s.provider(s.read)
	if err != nil {
		return nil, fault.New(op, fault.Internal, "%w", err)
	}
	sources := p.ListSources()
	known := sources[len(sources)-1].Version
	var has int64
	err = s.read.QueryRowContext(ctx, "SELECT COALESCE(MAX(version_id), 0) FROM "+s.versions).Scan(&has)
	if err == nil && has == 0 || err != nil && s.missing(err) {
		return nil, nothing(op)
	}
	switch {
	case err != nil:
		return nil, s.fault(op, err)
	case has > known:
		return nil, newer(op, has, known)
	case has < known:
		return nil, fault.New(op, fault.Unsupported, "the ledger has version %d, this program reads version %d", has, known).
			Hinted("Start the engine, or a worker, of this version: it upgrades the ledger.")
	}
	return &Reader{s}, nil
}

func nothing(op string) error {
	return fault.New(op, fault.NotFound, "there is no ledger yet").
		Hinted("The first run makes it. A worker keeps its ledger on its own host, unless SANDBOX_TEMPORAL_LEDGER_URL names a database.")
}

// readSQLite opens the file in dir without the lock and without making one.
func readSQLite(dir string) (*store, error) {
	const op = "open ledger"
	path := filepath.Join(dir, file)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nothing(op)
	} else if err != nil {
		return nil, diskFault(op, err)
	}
	s := sqliteStore()
	var err error
	if s.read, err = sql.Open("sqlite", dsn(path, "query_only(1)")); err != nil {
		return nil, s.fault(op, err)
	}
	return s, nil
}

// Close lets go of the database.
func (r *Reader) Close() error { return r.store.close() }

// Report sums up the calls.
func (r *Reader) Report(ctx context.Context, q Query) ([]Line, error) { return r.store.report(ctx, q) }

// Budgets says how the budgets of a run stand. A run that the ledger does not
// know, because no fork of it has begun, is fault.NotFound.
func (r *Reader) Budgets(ctx context.Context, run string) (Budgets, error) {
	b, err := r.store.budgets(ctx, run, today(time.Now()))
	if errors.Is(err, sql.ErrNoRows) {
		return b, fault.New("read budgets", fault.NotFound, "the ledger does not know run %s", run).
			Hinted("A run is in the ledger from the moment its first fork calls the model.")
	}
	if err != nil {
		return b, r.store.fault("read budgets", err)
	}
	return b, nil
}
