package ledger

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pressly/goose/v3"
	gooselock "github.com/pressly/goose/v3/lock"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

//go:embed migrations
var migrations embed.FS

// A store is the database behind a ledger. The two that there are take the same
// statements; what differs stands in these fields.
type store struct {
	dialect  goose.Dialect
	folder   string                           // of the migrations
	versions string                           // the table of their versions
	clock    string                           // the database's, in Unix milliseconds
	begin    []string                         // the statements that begin a transaction of the writer
	fault    func(op string, err error) error // gives an error of the database its kind
	missing  func(err error) bool             // whether it says that a table is not there

	// alone: nobody else writes, so what was written need not be read again.
	// Otherwise rows are locked before they are read, in the same order by all:
	// days, runs, forks, calls, each by its key.
	alone bool

	// bulk: a statement carries any number of rows, because each is a message
	// to a server. Otherwise it carries one.
	bulk bool

	write *sql.DB
	read  *sql.DB

	mu       sync.Mutex
	prepared map[string]*sql.Stmt // of read, by text
}

// asked prepares a question that is asked again and again.
func (s *store) asked(ctx context.Context, query string) (*sql.Stmt, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if stmt := s.prepared[query]; stmt != nil {
		return stmt, nil
	}
	stmt, err := s.read.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	if s.prepared == nil {
		s.prepared = map[string]*sql.Stmt{}
	}
	s.prepared[query] = stmt
	return stmt, nil
}

func (s *store) close() error {
	var errs []error
	s.mu.Lock()
	for _, stmt := range s.prepared {
		errs = append(errs, stmt.Close())
	}
	clear(s.prepared)
	s.mu.Unlock()
	if s.read != nil {
		errs = append(errs, s.read.Close())
	}
	if s.write != nil {
		errs = append(errs, s.write.Close())
	}
	return errors.Join(errs...)
}

// provider knows the migrations.
func (s *store) provider(db *sql.DB) (*goose.Provider, error) {
	dir, err := fs.Sub(migrations, "migrations/"+s.folder)
	if err != nil {
		return nil, err
	}
	options := []goose.ProviderOption{goose.WithTableName(s.versions)}
	if !s.alone {
		locker, err := gooselock.NewPostgresSessionLocker() // two gateways may start at once
		if err != nil {
			return nil, err
		}
		options = append(options, goose.WithSessionLocker(locker))
	}
	return goose.NewProvider(s.dialect, db, dir, options...)
}

// migrate brings the tables to this version's shape.
func (s *store) migrate(ctx context.Context) error {
	const op = "upgrade ledger"
	p, err := s.provider(s.write)
	if err != nil {
		return fault.New(op, fault.Internal, "%w", err)
	}
	has, known, err := p.GetVersions(ctx)
	if err != nil {
		return s.fault(op, err)
	}
	if has > known {
		return newer(op, has, known)
	}
	if _, err := p.Up(ctx); err != nil {
		return s.fault(op, err)
	}
	return nil
}

func newer(op string, has, known int64) error {
	return fault.New(op, fault.Unsupported, "the ledger has version %d, this program knows up to %d", has, known).
		Hinted("Use the newer program that wrote it, or another ledger: SANDBOX_TEMPORAL_HOME, SANDBOX_TEMPORAL_LEDGER_URL.")
}

// The types of columns, in words that both databases know.
const (
	text   = "text"
	number = "bigint"
)

// A statement is said in two ways: for one row, with a parameter for each of its
// values, and for any number of rows, with a parameter for each column that is a
// list of its values.
type statement struct {
	one, many string   // as SQLite and as PostgreSQL understand it
	columns   []string // their types: text or number
	locks     bool     // it reads what will be changed
}

// insert adds rows; into names the table and its columns.
func insert(into, tail string, columns ...string) statement {
	return statement{
		one:     "INSERT INTO " + into + " VALUES (" + params(len(columns)) + ") " + tail,
		many:    "INSERT INTO " + into + " " + unnest(columns) + " " + tail,
		columns: columns,
	}
}

// find reads the rows that have one of the keys.
func find(query string, key []string, columns ...string) statement {
	names := "(" + strings.Join(key, ", ") + ")"
	return statement{
		one:     query + " WHERE " + names + " = (" + params(len(key)) + ")",
		many:    query + " WHERE " + names + " IN (" + unnest(columns) + ") ORDER BY " + strings.Join(key, ", "),
		columns: columns, locks: true,
	}
}

// update changes the rows that have one of the keys. The columns are the others
// and then those of the key.
func update(table string, others, key []string, columns ...string) statement {
	var where, on, one, many []string
	for i, name := range others {
		one = append(one, name+" = ?")
		many = append(many, fmt.Sprintf("%s = v.column%d", name, i+1))
	}
	for i, name := range key {
		where = append(where, name+" = ?")
		on = append(on, fmt.Sprintf("t.%s = v.column%d", name, len(others)+i+1))
	}
	return statement{
		one:     "UPDATE " + table + " SET " + strings.Join(one, ", ") + " WHERE " + strings.Join(where, " AND "),
		many:    "UPDATE " + table + " AS t SET " + strings.Join(many, ", ") + " FROM (" + unnest(columns) + ") AS v WHERE " + strings.Join(on, " AND "),
		columns: columns,
	}
}

// params are n parameters without names, which SQLite's driver need not look
// for.
func params(n int) string { return strings.Join(slices.Repeat([]string{"?"}, n), ", ") }

// unnest makes a table of lists, as PostgreSQL does.
func unnest(columns []string) string {
	var lists, names []string
	for i, c := range columns {
		lists = append(lists, fmt.Sprintf("CAST($%d AS %s[])", i+1, c))
		names = append(names, fmt.Sprintf("column%d", i+1))
	}
	return "SELECT * FROM unnest(" + strings.Join(lists, ", ") + ") AS u (" + strings.Join(names, ", ") + ")"
}

// lists turns rows into columns, for unnest.
func lists(columns []string, all [][]any) []any {
	args := make([]any, len(columns))
	for i, c := range columns {
		if c == text {
			list := make([]string, len(all))
			for j, row := range all {
				list[j] = row[i].(string)
			}
			args[i] = list
			continue
		}
		list := make([]int64, len(all))
		for j, row := range all {
			list[j] = row[i].(int64)
		}
		args[i] = list
	}
	return args
}

// A pen is the writer's connection, with everything that was prepared on it. It
// is thrown away when anything goes wrong with it.
type pen struct {
	store    *store
	conn     *sql.Conn
	prepared map[string]*sql.Stmt // by text
	reading  bool                 // of a look: nothing is made and nothing is locked
}

// begin starts a transaction, on a new connection if need be.
func (p *pen) begin(ctx context.Context) (err error) {
	if p.conn == nil {
		if p.conn, err = p.store.write.Conn(ctx); err != nil {
			p.conn = nil
			return err
		}
		p.prepared = map[string]*sql.Stmt{}
	}
	for _, query := range p.store.begin {
		if err = p.exec(ctx, query); err != nil {
			p.drop()
			return err
		}
	}
	return nil
}

// exec carries out a statement that neither takes nor returns anything.
func (p *pen) exec(ctx context.Context, query string) error {
	ready, err := p.prepare(ctx, query)
	if err == nil {
		_, err = ready.ExecContext(ctx)
	}
	return err
}

// rollback ends a transaction that came to nothing.
func (p *pen) rollback() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if _, err := p.conn.ExecContext(ctx, "ROLLBACK"); err != nil {
		p.drop()
	}
}

// drop closes the connection, and with it whatever it is in the middle of.
func (p *pen) drop() {
	if p.conn == nil {
		return
	}
	if p.store.alone { // SQLite keeps a connection, and its locks, for as long as it has statements
		for _, st := range p.prepared {
			st.Close() //nolint:errcheck // the connection goes with it
		}
	}
	p.conn.Raw(func(any) error { return driver.ErrBadConn }) //nolint:errcheck // that error closes it
	p.conn.Close()                                           //nolint:errcheck // it is closed
	p.conn = nil
}

// prepare returns a statement that is parsed once for all transactions.
func (p *pen) prepare(ctx context.Context, query string) (*sql.Stmt, error) {
	st := p.prepared[query]
	if st == nil {
		var err error
		if st, err = p.conn.PrepareContext(ctx, query); err != nil {
			return nil, err
		}
		p.prepared[query] = st
	}
	return st, nil
}

// put carries out st for all the rows.
func (p *pen) put(ctx context.Context, st statement, all [][]any) error {
	if p.reading {
		return nil
	}
	return p.each(ctx, st, all, func(ready *sql.Stmt, args []any) error {
		_, err := ready.ExecContext(ctx, args...)
		return err
	})
}

// get reads what st finds by keys, and locks it where that has a meaning.
func (p *pen) get(ctx context.Context, st statement, keys [][]any, scan func(*sql.Rows) error) error {
	return p.each(ctx, st, keys, func(ready *sql.Stmt, args []any) error {
		found, err := ready.QueryContext(ctx, args...)
		if err != nil {
			return err
		}
		defer found.Close() // Err tells
		for found.Next() {
			if err := scan(found); err != nil {
				return err
			}
		}
		return found.Err()
	})
}

// each prepares st and calls do with its arguments, once for all rows or once
// for each.
func (p *pen) each(ctx context.Context, st statement, all [][]any, do func(*sql.Stmt, []any) error) error {
	if len(all) == 0 {
		return nil
	}
	query := st.one
	if p.store.bulk {
		query = st.many
	}
	if st.locks && !p.store.alone && !p.reading {
		query += " FOR UPDATE"
	}
	ready, err := p.prepare(ctx, query)
	if err != nil {
		return err
	}
	if p.store.bulk {
		return do(ready, lists(st.columns, all))
	}
	for _, row := range all {
		if err := do(ready, row); err != nil {
			return err
		}
	}
	return nil
}

// peek reads the rows as they are, without the right to change them.
func (s *store) peek(ctx context.Context, wants []want) (*sheet, error) {
	conn, err := s.read.Conn(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close() // it goes back to the pool
	p := &pen{store: s, conn: conn, prepared: map[string]*sql.Stmt{}, reading: true}
	defer func() {
		for _, st := range p.prepared {
			st.Close() //nolint:errcheck // it only read
		}
	}()
	return p.load(ctx, wants, newCache())
}
