package engine

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// rebuild moves the rows of file into a new file of the wanted schema, checks
// that none was lost, and puts the new file in place; the old one stays beside
// it as .bak, in the place of an earlier one.
//
// Rows go over by the columns that both schemas have: upstream only ever adds
// tables and columns, or drops those it no longer reads. That is also what its
// own upgrade scripts for PostgreSQL and MySQL do, statement by statement.
func rebuild(ctx context.Context, file string, want schema, logger *slog.Logger) error {
	// What the last server wrote may be in the log beside the file.
	if err := checkpoint(ctx, file); err != nil {
		return err
	}
	if st, err := os.Stat(file + "-wal"); err == nil && st.Size() > 0 {
		return fmt.Errorf("%s-wal is in use", file)
	}
	fresh, err := build(ctx, file, want, func(ctx context.Context, conn *sql.Conn) error {
		return copyRows(ctx, conn, logger)
	})
	if err != nil {
		return err
	}
	if err := keep(file, file+".bak"); err != nil {
		return errors.Join(err, removeDatabase(fresh))
	}
	// Empty by now, and of no use to the new file.
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.Remove(file + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return install(fresh, file)
}

// copyRows fills the tables of conn's main database from those of its attached
// database "old".
func copyRows(ctx context.Context, conn *sql.Conn, logger *slog.Logger) error {
	from, err := tablesOf(ctx, conn, "old")
	if err != nil {
		return err
	}
	to, err := tablesOf(ctx, conn, "main")
	if err != nil {
		return err
	}
	for _, t := range from {
		if t.name == stampTable {
			continue
		}
		var rows int64
		if err := conn.QueryRowContext(ctx, `SELECT count(*) FROM old.`+quote(t.name)).Scan(&rows); err != nil {
			return fmt.Errorf("table %s: %w", t.name, err)
		}
		if !slices.ContainsFunc(to, func(n table) bool { return n.name == t.name }) {
			logger.Info("the new schema has no such table", "table", t.name, "rows", rows)
			continue
		}
		if err := copyTable(ctx, conn, t, rows); err != nil {
			return fmt.Errorf("table %s: %w", t.name, err)
		}
	}
	var verdict string
	if err := conn.QueryRowContext(ctx, `PRAGMA main.integrity_check(1)`).Scan(&verdict); err != nil {
		return err
	}
	if verdict != "ok" {
		return fmt.Errorf("the new file does not hold together: %s", verdict)
	}
	return nil
}

// A table, and whether its rows are numbered in the order they came in.
type table struct {
	name  string
	rowID bool
}

func tablesOf(ctx context.Context, conn *sql.Conn, db string) ([]table, error) {
	rows, err := conn.QueryContext(ctx, `SELECT name, wr = 0 FROM pragma_table_list WHERE schema = ? AND type = 'table' AND name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY name`, db)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []table
	for rows.Next() {
		var t table
		if err := rows.Scan(&t.name, &t.rowID); err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, rows.Err()
}

// A column that can be written to.
type column struct {
	name, kind string
	required   bool // it may not be NULL and has no default
}

// columnsOf leaves generated columns out: SQLite makes them from the others.
func columnsOf(ctx context.Context, conn *sql.Conn, db, name string) ([]column, error) {
	rows, err := conn.QueryContext(ctx, `SELECT name, type, ("notnull" OR pk > 0) AND dflt_value IS NULL FROM pragma_table_xinfo(?, ?) WHERE hidden = 0 ORDER BY cid`, name, db)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []column
	for rows.Next() {
		var c column
		if err := rows.Scan(&c.name, &c.kind, &c.required); err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, rows.Err()
}

// copyTable copies a table that both databases have, and fails when a row of
// the old one is missing afterwards.
func copyTable(ctx context.Context, conn *sql.Conn, t table, rows int64) error {
	old, err := columnsOf(ctx, conn, "old", t.name)
	if err != nil {
		return err
	}
	fresh, err := columnsOf(ctx, conn, "main", t.name)
	if err != nil {
		return err
	}
	var into, what []string
	for _, c := range fresh {
		switch {
		case slices.ContainsFunc(old, func(o column) bool { return o.name == c.name }):
			into, what = append(into, quote(c.name)), append(what, quote(c.name))
		case c.required:
			into, what = append(into, quote(c.name)), append(what, c.zero())
		}
	}
	if len(into) == 0 {
		return errors.New("the two schemas have no column in common")
	}
	order := ""
	if t.rowID {
		order = " ORDER BY rowid"
	}
	stmt := fmt.Sprintf(`INSERT OR REPLACE INTO main.%[1]s (%[2]s) SELECT %[3]s FROM old.%[1]s%[4]s`,
		quote(t.name), strings.Join(into, ", "), strings.Join(what, ", "), order)
	if _, err := conn.ExecContext(ctx, stmt); err != nil {
		return err
	}
	var have int64
	if err := conn.QueryRowContext(ctx, `SELECT count(*) FROM main.`+quote(t.name)).Scan(&have); err != nil {
		return err
	}
	if have < rows {
		return fmt.Errorf("%d of %d rows would be lost", rows-have, rows)
	}
	return nil
}

// zero is what a row from before the column was there gets, as upstream's
// upgrade scripts give it. The kind follows from the declared type by the
// rules of https://www.sqlite.org/datatype3.html.
func (c column) zero() string {
	kind := strings.ToUpper(c.kind)
	switch {
	case strings.Contains(kind, "INT"), strings.Contains(kind, "BOOL"), strings.Contains(kind, "DEC"), strings.Contains(kind, "REAL"):
		return "0"
	case strings.Contains(kind, "BLOB"), strings.Contains(kind, "BINARY"), kind == "":
		return "x''"
	}
	return "''"
}

func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// keep gives file a second name, so that it outlives its replacement. There is
// no moment in which file itself is not there.
func keep(file, as string) error {
	fresh := as + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(file, fresh); err != nil {
		// Not every file system has links.
		if err := copyFile(file, fresh); err != nil {
			return err
		}
	}
	if err := os.Rename(fresh, as); err != nil {
		return err
	}
	// Two links to one file, left by a rebuild that was killed here, are not
	// renamed into one.
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(as))
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}
