package ledger

import (
	"context"
	"database/sql"
	"errors"
	"net/url"
	"os"
	"path/filepath"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// file is SQLite's, in the ledger's folder.
const file = "ledger.db"

// sqliteStore is what is said of SQLite in a store.
func sqliteStore() *store {
	return &store{
		dialect: goose.DialectSQLite3, folder: "sqlite", versions: goose.DefaultTablename, fault: sqliteFault, missing: noSQLiteTable,
		alone: true, clock: "CAST(unixepoch('subsec') * 1000 AS INTEGER)", begin: []string{"BEGIN IMMEDIATE"},
	}
}

// openSQLite opens the file in dir, which is locked: nobody else writes.
func openSQLite(ctx context.Context, dir string) (_ *store, err error) {
	const op = "open ledger"
	path := filepath.Join(dir, file)
	// SQLite gives its other files the mode of this one.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, diskFault(op, err)
	}
	if err := f.Close(); err != nil {
		return nil, diskFault(op, err)
	}
	s := sqliteStore()
	defer func() {
		if err != nil {
			err = errors.Join(s.fault(op, err), s.close())
		}
	}()
	if s.write, err = sql.Open("sqlite", dsn(path, "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)")); err != nil {
		return nil, err
	}
	s.write.SetMaxOpenConns(1)
	if err := s.write.PingContext(ctx); err != nil { // it makes the WAL, which readers need
		return nil, err
	}
	s.read, err = sql.Open("sqlite", dsn(path, "query_only(1)"))
	if err != nil {
		return nil, err
	}
	s.read.SetMaxOpenConns(4)
	return s, nil
}

func dsn(path string, pragmas ...string) string {
	u := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{
		"_pragma": append([]string{"busy_timeout(5000)"}, pragmas...),
	}.Encode()}
	return u.String()
}

// sqliteFault gives an error of SQLite its kind.
func sqliteFault(op string, err error) error {
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
		case sqlite3.SQLITE_IOERR:
			kind = fault.Unavailable
		}
	}
	return &fault.Error{Op: op, Kind: kind, Err: err, Hint: hint}
}

// noSQLiteTable goes by the result code of an error in the statement itself:
// ours are right, so it is what they name that is not there.
func noSQLiteTable(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && e.Code() == sqlite3.SQLITE_ERROR
}
