package engine

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// The server neither checks nor upgrades the schema of a SQLite file: on a
// file of two versions ago it starts, runs workflows, and lets everything
// that needs a missing table hang until its deadline. So each file carries a
// stamp of ours, and Start compares:
//
//	no file                     a new one is made
//	stamp has our hash          nothing to do
//	stamp of an older server,   the file is rebuilt; the old one stays as
//	or no stamp at all          temporal.db.bak
//	stamp of a newer server     refused, nothing is touched
//	not a Temporal database     refused, nothing is touched
//
// A file comes to be, or is replaced, in one rename: whoever is killed on the
// way leaves the old state, whole.

// A schema is what the server of this build wants to find.
type schema struct {
	server     string   // the server's version, as 1.32.1
	statements []string // what makes the tables in an empty file
}

// hash names the schema. Upstream's own number is not raised with every
// change, so it is taken over the statements.
func (s schema) hash() string {
	h := sha256.New()
	for _, stmt := range s.statements {
		fmt.Fprintf(h, "%d:%s", len(stmt), stmt)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// stampTable is ours; its one row is the stamp.
const stampTable = "sandbox_temporal_schema"

// A stamp says which schema a file has.
type stamp struct{ server, hash string }

// driver is registered by the SQLite plugin of the server.
const driver = "sqlite"

// openDatabase opens the one file at path with one connection. mode is as in
// https://www.sqlite.org/uri.html.
func openDatabase(path, mode string) (*sql.DB, error) {
	q := url.Values{"mode": {mode}, "_pragma": {"busy_timeout=10000"}}
	db, err := sql.Open(driver, "file:"+escapePath(path)+"?"+q.Encode())
	if err == nil {
		db.SetMaxOpenConns(1)
	}
	return db, err
}

// escapePath makes a path fit for a SQLite URI, in which these three bytes
// mean something.
func escapePath(path string) string {
	return strings.NewReplacer("%", "%25", "?", "%3f", "#", "%23").Replace(path)
}

// prepare sees to it that the file has the wanted schema. The caller holds the
// lock of the state folder.
func prepare(ctx context.Context, file string, want schema, logger *slog.Logger) error {
	const op = "engine: database"
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return databaseFault(op, file, create(ctx, file, want))
	} else if err != nil {
		return databaseFault(op, file, err)
	}
	found, tables, err := readStamp(ctx, file)
	if err != nil {
		return databaseFault(op, file, err)
	}
	if found.hash == want.hash() {
		return nil
	}
	if found.hash == "" && tables > 0 && !temporalTables(ctx, file) {
		return fault.New(op, fault.Invalid, "%s is a database, but not Temporal's", file).
			Hinted("Move the file away, or set SANDBOX_TEMPORAL_HOME to another folder.")
	}
	if newer(found.server, want.server) {
		return fault.New(op, fault.Unsupported, "%s was written by Temporal server %s, newer than the %s of this build", file, found.server, want.server).
			Hinted("Update this program, or set SANDBOX_TEMPORAL_HOME to another folder.")
	}
	logger.Info("rebuilding the database for a new server version", "file", file, "from", found.server, "to", want.server)
	return databaseFault(op, file, rebuild(ctx, file, want, logger))
}

// databaseFault classes an error of the database at file.
func databaseFault(op, file string, err error) error {
	if err == nil {
		return nil
	}
	if errors.As(err, new(*fault.Error)) {
		return fault.Wrap(op, err)
	}
	// The driver's errors carry a result code: https://www.sqlite.org/rescode.html.
	var coded interface {
		error
		Code() int
	}
	code := 0
	if errors.As(err, &coded) {
		code = coded.Code() & 0xff
	}
	const busy, readonly, corrupt, full, cantOpen, notADB = 5, 8, 11, 13, 14, 26
	switch {
	case code == corrupt, code == notADB, errors.Is(err, errDamaged):
		return fault.New(op, fault.Invalid, "%s is damaged or not a database: %w", file, err).
			Hinted("The file is left as it is. Move it away to start anew, or put a copy from a backup in its place.")
	case code == full, errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fault.New(op, fault.Full, "%s: %w", file, err).
			Hinted("Free some space; a rebuild needs as much again as the file has.")
	case code == readonly, code == cantOpen, errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return fault.New(op, fault.Denied, "%s: %w", file, err).
			Hinted("The file must be readable and writable: set SANDBOX_TEMPORAL_HOME to another folder.")
	case code == busy:
		return fault.New(op, fault.Conflict, "%s is in use by another process: %w", file, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fault.New(op, fault.Timeout, "%s: %w", file, err)
	case errors.Is(err, context.Canceled):
		return fault.New(op, fault.Cancelled, "%s: %w", file, err)
	}
	return fault.New(op, fault.Internal, "%s: %w", file, err)
}

// errDamaged is a database that reads without an error and does not hold
// together.
var errDamaged = errors.New("damaged")

// create makes a database at file, which must not be there.
func create(ctx context.Context, file string, want schema) error {
	fresh, err := build(ctx, file, want, nil)
	if err != nil {
		return err
	}
	return install(fresh, file)
}

// build makes a database with the wanted schema and stamp beside file and
// returns its path. fill, which may be nil, puts rows in; all is one
// transaction.
func build(ctx context.Context, file string, want schema, fill func(context.Context, *sql.Conn) error) (_ string, err error) {
	fresh := file + ".new"
	if err := removeDatabase(fresh); err != nil {
		return "", err
	}
	// SQLite would give it the mode that the umask leaves.
	f, err := os.OpenFile(fresh, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	db, err := openDatabase(fresh, "rw")
	if err != nil {
		return "", err
	}
	defer func() {
		if err = errors.Join(err, db.Close()); err != nil {
			err = errors.Join(err, removeDatabase(fresh))
		}
	}()
	conn, err := db.Conn(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	run := func(stmt string, args ...any) {
		if err == nil {
			if _, err = conn.ExecContext(ctx, stmt, args...); err != nil {
				err = fmt.Errorf("%.60q: %w", stmt, err)
			}
		}
	}
	// Nothing is worth keeping of a file that was not finished, and install
	// syncs it: no journal.
	run(`PRAGMA journal_mode = off`)
	run(`PRAGMA synchronous = off`)
	if fill != nil {
		run(`ATTACH DATABASE ? AS old`, "file:"+escapePath(file)+"?mode=ro")
	}
	run(`BEGIN`)
	for _, stmt := range want.statements {
		run(stmt)
	}
	run(`CREATE TABLE ` + stampTable + ` (one INTEGER PRIMARY KEY CHECK (one = 1), server TEXT NOT NULL, hash TEXT NOT NULL)`)
	run(`INSERT INTO `+stampTable+` VALUES (1, ?, ?)`, want.server, want.hash())
	if err == nil && fill != nil {
		err = fill(ctx, conn)
	}
	run(`COMMIT`)
	if fill != nil {
		run(`DETACH DATABASE old`)
	}
	return fresh, err
}

// install puts the database at fresh in the place of file, in one step.
func install(fresh, file string) error {
	f, err := os.OpenFile(fresh, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(fresh, file); err != nil {
		return err
	}
	return syncDir(filepath.Dir(file))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// removeDatabase takes a database and what SQLite puts beside it away.
func removeDatabase(path string) error {
	for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
		if err := os.Remove(path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// checkWithin bounds how long a start looks for damage; that is enough for
// some hundred megabytes. The server would start on a damaged file and then
// fail whoever needs the damaged part.
const checkWithin = 200 * time.Millisecond

// check looks for damage as far as it gets in that time.
func check(ctx context.Context, db *sql.DB) error {
	short, stop := context.WithTimeout(ctx, checkWithin)
	defer stop()
	var verdict string
	err := db.QueryRowContext(short, `PRAGMA quick_check(1)`).Scan(&verdict)
	switch {
	case short.Err() != nil:
		return ctx.Err()
	case err == nil && verdict != "ok":
		return fmt.Errorf("%w: %s", errDamaged, verdict)
	}
	return err
}

// readStamp returns the stamp of a file, the zero stamp when it has none, and
// how many tables it has. It fails on a file that is damaged or no database.
func readStamp(ctx context.Context, file string) (_ stamp, tables int, err error) {
	if err := wholePages(file); err != nil {
		return stamp{}, 0, err
	}
	db, err := openDatabase(file, "ro")
	if err != nil {
		return stamp{}, 0, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := check(ctx, db); err != nil {
		return stamp{}, 0, err
	}
	stamped := 0
	err = db.QueryRowContext(ctx, `SELECT count(*), coalesce(sum(name = ?), 0) FROM sqlite_master WHERE type = 'table'`, stampTable).Scan(&tables, &stamped)
	if err != nil || stamped == 0 {
		return stamp{}, tables, err
	}
	var s stamp
	err = db.QueryRowContext(ctx, `SELECT server, hash FROM `+stampTable).Scan(&s.server, &s.hash)
	if errors.Is(err, sql.ErrNoRows) {
		return stamp{}, tables, nil
	}
	return s, tables, err
}

// wholePages refuses a file that was cut short, which SQLite itself may not
// see before it reads the page that is missing. The header says how many pages
// there are: https://www.sqlite.org/fileformat.html. A log beside the file can
// hold the newer header, so then there is nothing to compare.
func wholePages(file string) error {
	if st, err := os.Stat(file + "-wal"); err == nil && st.Size() > 0 {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() == 0 {
		return nil // to SQLite that is a database without tables
	}
	var head [100]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return fmt.Errorf("%w: shorter than a header", errDamaged)
	}
	if string(head[:16]) != "SQLite format 3\x00" {
		return fmt.Errorf("%w: it does not begin as one", errDamaged)
	}
	size := int64(head[16])<<8 | int64(head[17])
	if size == 1 {
		size = 65536
	}
	count := int64(head[28])<<24 | int64(head[29])<<16 | int64(head[30])<<8 | int64(head[31])
	// The count is only to be believed when it was written together with the
	// change counter.
	if string(head[24:28]) == string(head[92:96]) && st.Size() < count*size {
		return fmt.Errorf("%w: %d bytes where there should be %d", errDamaged, st.Size(), count*size)
	}
	return nil
}

// temporalTables reports whether the file has the tables that every version of
// the server has had.
func temporalTables(ctx context.Context, file string) bool {
	db, err := openDatabase(file, "ro")
	if err != nil {
		return false
	}
	defer db.Close()
	n := 0
	err = db.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('namespaces', 'shards', 'executions', 'history_node')`).Scan(&n)
	return err == nil && n == 4
}

// checkpoint moves what is in the log beside the file into the file, as far as
// nobody holds on to it. What stays there is found at the next start.
func checkpoint(ctx context.Context, file string) error {
	db, err := openDatabase(file, "rw")
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`)
	return errors.Join(err, db.Close())
}

// newer reports whether version a is above b. A part that is not a number
// counts as 0, so that a stamp nobody understands is never newer.
func newer(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(as), len(bs)) {
		x, y := 0, 0
		if i < len(as) {
			x, _ = strconv.Atoi(as[i])
		}
		if i < len(bs) {
			y, _ = strconv.Atoi(bs[i])
		}
		if x != y {
			return x > y
		}
	}
	return false
}
