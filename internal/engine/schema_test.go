package engine

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	_ "modernc.org/sqlite" // the full build has it from the server

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Two versions of a small schema with the traits of the server's: tables that
// every version has, a generated column, a row from the start, a table
// without a primary key that counts, and a table without row numbers.
var (
	oldSchema = schema{server: "1.30.9", statements: []string{
		`CREATE TABLE namespaces (id INT PRIMARY KEY, name VARCHAR(255) UNIQUE NOT NULL, data MEDIUMBLOB NOT NULL)`,
		`CREATE TABLE namespace_metadata (partition_id INT PRIMARY KEY, version BIGINT NOT NULL)`,
		`INSERT INTO namespace_metadata VALUES (54321, 1)`,
		`CREATE TABLE shards (shard_id INT PRIMARY KEY) WITHOUT ROWID`,
		`CREATE TABLE executions (id INT PRIMARY KEY, state TEXT, kind TEXT GENERATED ALWAYS AS (upper(state)), dropped TEXT)`,
		`CREATE TABLE history_node (note TEXT)`,
		`CREATE TABLE retired (x INT)`,
	}}
	newSchema = schema{server: "1.32.1", statements: []string{
		`CREATE TABLE namespaces (id INT PRIMARY KEY, name VARCHAR(255) UNIQUE NOT NULL, data MEDIUMBLOB NOT NULL, is_global TINYINT(1) NOT NULL, salt BINARY(16) NOT NULL, label VARCHAR(9) NOT NULL, note TEXT)`,
		`CREATE TABLE namespace_metadata (partition_id INT PRIMARY KEY, version BIGINT NOT NULL)`,
		`INSERT INTO namespace_metadata VALUES (54321, 1)`,
		`CREATE TABLE shards (shard_id INT PRIMARY KEY) WITHOUT ROWID`,
		`CREATE TABLE executions (id INT PRIMARY KEY, state TEXT, kind TEXT GENERATED ALWAYS AS (lower(state)) STORED, version BIGINT NOT NULL DEFAULT 7)`,
		`CREATE INDEX by_kind ON executions (kind)`,
		`CREATE TABLE history_node (note TEXT)`,
		`CREATE TABLE current_chasm_executions (id INT PRIMARY KEY)`,
	}}
)

var quietly = slog.New(slog.DiscardHandler)

func query(t *testing.T, file, stmt string) [][]any {
	t.Helper()
	db, err := openDatabase(file, "ro")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query(stmt)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var all [][]any
	for rows.Next() {
		cols, err := rows.Columns()
		if err != nil {
			t.Fatal(err)
		}
		row := make([]any, len(cols))
		into := make([]any, len(cols))
		for i := range row {
			into[i] = &row[i]
		}
		if err := rows.Scan(into...); err != nil {
			t.Fatal(err)
		}
		all = append(all, row)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func execute(t *testing.T, file string, stmts ...string) {
	t.Helper()
	db, err := openDatabase(file, "rwc")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, stmt := range stmts {
		if _, err := db.Exec(stmt); err != nil {
			t.Fatalf("%s: %v", stmt, err)
		}
	}
}

// old makes a database of the old schema with a few rows.
func old(t *testing.T) string {
	t.Helper()
	// The name has every byte that means something in a URI.
	dir := filepath.Join(t.TempDir(), "a b?c#d%41&e=f")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, DatabaseName)
	if err := prepare(t.Context(), file, oldSchema, quietly); err != nil {
		t.Fatal(err)
	}
	execute(t, file,
		`PRAGMA journal_mode = wal`,
		`INSERT INTO namespaces VALUES (1, 'default', x'00ff'), (2, 'other', x'')`,
		`UPDATE namespace_metadata SET version = 42`,
		`INSERT INTO shards VALUES (1)`,
		`INSERT INTO executions (id, state, dropped) VALUES (1, 'Running', 'x'), (2, NULL, 'y')`,
		`INSERT INTO history_node VALUES ('z'), ('a'), ('m'), ('a')`,
		`INSERT INTO retired VALUES (1)`,
	)
	return file
}

// content is all bytes of a folder, by name. The index of a log, and a log
// without an entry, hold nothing: reading makes them.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, n := range names {
		text, err := os.ReadFile(filepath.Join(dir, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(n.Name(), "-shm") || strings.HasSuffix(n.Name(), "-wal") && len(text) == 0 {
			continue
		}
		all[n.Name()] = string(text)
	}
	return all
}

func TestNewDatabaseHasSchemaAndStamp(t *testing.T) {
	file := filepath.Join(t.TempDir(), DatabaseName)
	for range 2 { // the second time there is nothing to do
		if err := prepare(t.Context(), file, newSchema, quietly); err != nil {
			t.Fatal(err)
		}
		s, tables, err := readStamp(t.Context(), file)
		if err != nil || s != (stamp{"1.32.1", newSchema.hash()}) || tables != 7 {
			t.Errorf("%+v, %d tables, %v", s, tables, err)
		}
	}
	st, err := os.Stat(file)
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if names := content(t, filepath.Dir(file)); len(names) != 1 {
		t.Errorf("%d files", len(names))
	}
}

func TestOldDatabaseIsRebuiltWithAllItsRows(t *testing.T) {
	for _, name := range []string{"older", "no stamp", "empty stamp", "same server, other schema"} {
		t.Run(name, func(t *testing.T) {
			file := old(t)
			switch name {
			case "no stamp":
				execute(t, file, `DROP TABLE `+stampTable)
			case "empty stamp":
				execute(t, file, `DELETE FROM `+stampTable)
			case "same server, other schema":
				execute(t, file, `UPDATE `+stampTable+` SET server = '1.32.1'`)
			}
			// What a rebuild that was killed leaves is in nobody's way.
			for _, left := range []string{".new", ".new-journal", ".bak.new"} {
				if err := os.WriteFile(file+left, []byte("half"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := prepare(t.Context(), file, newSchema, quietly); err != nil {
				t.Fatal(err)
			}
			for stmt, want := range map[string][][]any{
				`SELECT id, name, quote(data), is_global, quote(salt), label, note FROM namespaces ORDER BY id`: {
					{int64(1), "default", "X'00FF'", int64(0), "X''", "", nil},
					{int64(2), "other", "X''", int64(0), "X''", "", nil}},
				`SELECT * FROM namespace_metadata`:                    {{int64(54321), int64(42)}},
				`SELECT * FROM shards`:                                {{int64(1)}},
				`SELECT * FROM executions ORDER BY id`:                {{int64(1), "Running", "running", int64(7)}, {int64(2), nil, nil, int64(7)}},
				`SELECT note FROM history_node ORDER BY rowid`:        {{"z"}, {"a"}, {"m"}, {"a"}},
				`SELECT count(*) FROM current_chasm_executions`:       {{int64(0)}},
				`SELECT server FROM ` + stampTable:                    {{"1.32.1"}},
				`SELECT id FROM executions WHERE kind = 'running'`:    {{int64(1)}},
				`SELECT name FROM sqlite_master WHERE name='retired'`: nil,
			} {
				if diff := cmp.Diff(want, query(t, file, stmt)); diff != "" {
					t.Errorf("%s: %s", stmt, diff)
				}
			}
			if got := query(t, file+".bak", `SELECT count(*) FROM retired`); got[0][0] != int64(1) {
				t.Errorf("the old file lost its rows: %v", got)
			}
			names := content(t, filepath.Dir(file))
			for name := range names {
				if name != DatabaseName && name != DatabaseName+".bak" {
					t.Errorf("left behind: %s", name)
				}
			}
			before := names[DatabaseName]
			if err := prepare(t.Context(), file, newSchema, quietly); err != nil {
				t.Fatal(err)
			}
			if content(t, filepath.Dir(file))[DatabaseName] != before {
				t.Error("it was rebuilt again")
			}
		})
	}
}

func TestRebuildReadsWhatAKilledServerLeftInTheLog(t *testing.T) {
	file := old(t)
	db, err := openDatabase(file, "rw")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`INSERT INTO shards VALUES (2)`); err != nil {
		t.Fatal(err)
	}
	// While a connection is open the log stays: copied now, the files are
	// those of a process that was killed.
	killed := filepath.Join(t.TempDir(), DatabaseName)
	for _, suffix := range []string{"", "-wal"} {
		if err := copyFile(file+suffix, killed+suffix); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := prepare(t.Context(), killed, newSchema, quietly); err != nil {
		t.Fatal(err)
	}
	if got := query(t, killed, `SELECT count(*) FROM shards`); got[0][0] != int64(2) {
		t.Errorf("shards: %v", got)
	}
}

func TestDatabaseOfANewerServerIsRefusedUntouched(t *testing.T) {
	for _, version := range []string{"1.33", "1.32.2", "1.32.10", "2.0.0"} {
		file := old(t)
		execute(t, file, fmt.Sprintf(`UPDATE %s SET server = '%s'`, stampTable, version))
		before := content(t, filepath.Dir(file))
		err := prepare(t.Context(), file, newSchema, quietly)
		wantKind(t, err, fault.Unsupported)
		if !strings.Contains(err.Error(), version) || !strings.Contains(err.Error(), "1.32.1") {
			t.Errorf("%v does not name both versions", err)
		}
		if diff := cmp.Diff(before, content(t, filepath.Dir(file))); diff != "" {
			t.Error("something changed")
		}
	}
}

func TestDatabaseOfANewerServerWithOurSchemaIsUsed(t *testing.T) {
	file := filepath.Join(t.TempDir(), DatabaseName)
	if err := prepare(t.Context(), file, newSchema, quietly); err != nil {
		t.Fatal(err)
	}
	execute(t, file, `UPDATE `+stampTable+` SET server = '1.99.0'`)
	if err := prepare(t.Context(), file, newSchema, quietly); err != nil {
		t.Error(err)
	}
}

func TestFileThatIsNotOursIsKept(t *testing.T) {
	whole, err := os.ReadFile(old(t))
	if err != nil {
		t.Fatal(err)
	}
	pages := append([]byte{}, whole...)
	for i := 100; i < len(pages); i++ {
		pages[i] = 0x5a
	}
	middle := append([]byte{}, whole...)
	for i := 3 * 4096; i < 4*4096; i++ {
		middle[i] = 0x5a
	}
	for name, text := range map[string][]byte{
		"garbage":       []byte(strings.Repeat("garbage ", 1000)),
		"short":         []byte("SQLite format 3\x00"),
		"one byte":      {0},
		"zeroes":        make([]byte, 8192),
		"cut short":     whole[:len(whole)/2],
		"broken tables": pages,
		"a broken page": middle,
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), DatabaseName)
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
			err := prepare(t.Context(), file, newSchema, quietly)
			wantKind(t, err, fault.Invalid)
			if !strings.Contains(err.Error(), file) || fault.HintOf(err) == "" {
				t.Errorf("%v, hint %q", err, fault.HintOf(err))
			}
			if diff := cmp.Diff(map[string]string{DatabaseName: string(text)}, content(t, filepath.Dir(file))); diff != "" {
				t.Error("something changed")
			}
		})
	}
}

func TestDatabaseOfAnotherProgramIsKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), DatabaseName)
	execute(t, file, `CREATE TABLE bookmarks (url TEXT)`, `INSERT INTO bookmarks VALUES ('x')`)
	before := content(t, filepath.Dir(file))
	wantKind(t, prepare(t.Context(), file, newSchema, quietly), fault.Invalid)
	if diff := cmp.Diff(before, content(t, filepath.Dir(file))); diff != "" {
		t.Error("something changed")
	}
}

func TestEmptyFileBecomesADatabase(t *testing.T) {
	file := filepath.Join(t.TempDir(), DatabaseName)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := prepare(t.Context(), file, newSchema, quietly); err != nil {
		t.Fatal(err)
	}
	if got := query(t, file, `SELECT version FROM namespace_metadata`); got[0][0] != int64(1) {
		t.Error(got)
	}
}

func TestRebuildThatWouldLoseRowsChangesNothing(t *testing.T) {
	file := old(t)
	execute(t, file, `INSERT INTO history_node VALUES ('twice'), ('twice')`)
	before := content(t, filepath.Dir(file))
	strict := schema{server: newSchema.server, statements: append([]string{}, newSchema.statements...)}
	for i, stmt := range strict.statements {
		if strings.Contains(stmt, "history_node") {
			strict.statements[i] = `CREATE TABLE history_node (note TEXT UNIQUE)`
		}
	}
	err := prepare(t.Context(), file, strict, quietly)
	if err == nil || !strings.Contains(err.Error(), "would be lost") {
		t.Fatalf("got %v", err)
	}
	if diff := cmp.Diff(before, content(t, filepath.Dir(file))); diff != "" {
		t.Errorf("something changed: %d files before", len(before))
	}
}

func TestRebuildEndsWithItsContext(t *testing.T) {
	file := old(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantKind(t, prepare(ctx, file, newSchema, quietly), fault.Cancelled)
}

func TestDatabaseInUseIsAConflict(t *testing.T) {
	err := databaseFault("x", "f", sqliteCode(5|1<<8))
	wantKind(t, err, fault.Conflict)
	wantKind(t, databaseFault("x", "f", fmt.Errorf("a: %w", sqliteCode(11))), fault.Invalid)
	wantKind(t, databaseFault("x", "f", sqliteCode(13)), fault.Full)
	wantKind(t, databaseFault("x", "f", sqliteCode(8)), fault.Denied)
	wantKind(t, databaseFault("x", "f", io.ErrUnexpectedEOF), fault.Internal)
	wantKind(t, databaseFault("x", "f", fault.New("y", fault.Lost, "z")), fault.Lost)
	if databaseFault("x", "f", nil) != nil {
		t.Error("nothing is something")
	}
}

type sqliteCode int

func (c sqliteCode) Error() string { return "sqlite" }
func (c sqliteCode) Code() int     { return int(c) }

// TestDriverErrorsCarryTheirCode is what databaseFault counts on.
func TestDriverErrorsCarryTheirCode(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(file, []byte(strings.Repeat("garbage ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open(driver, file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	_, err = db.Exec(`SELECT * FROM sqlite_master`)
	var coded interface {
		error
		Code() int
	}
	if !errors.As(err, &coded) || coded.Code() != 26 {
		t.Errorf("%v", err)
	}
}

func TestNewer(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"1.32.2", "1.32.1", true}, {"1.32.10", "1.32.9", true}, {"2", "1.99.9", true}, {"1.32.1", "1.32", true},
		{"1.32.1", "1.32.1", false}, {"1.32.0", "1.32.1", false}, {"1.32", "1.32.0", false}, {"", "1.0", false}, {"nonsense", "1.0", false},
	} {
		if got := newer(tt.a, tt.b); got != tt.want {
			t.Errorf("newer(%q, %q) = %v", tt.a, tt.b, got)
		}
	}
}

func TestHashTellsStatementsApart(t *testing.T) {
	a := schema{statements: []string{"ab", "c"}}
	b := schema{statements: []string{"a", "bc"}}
	if a.hash() == b.hash() {
		t.Error("the border between statements is lost")
	}
}
