// Package ledger keeps the money: who may spend how much, what calls have cost,
// and what those under way may still cost. It is a database, SQLite by default
// and PostgreSQL where several gateways share one, and it outlives everything
// else that is known of a run.
//
// # The promise
//
// A call is paid from three budgets that lie inside one another: its fork's,
// its run's and that of the day (UTC) on which it began. [Ledger.Reserve] holds
// the most that the call can cost in all three, in one transaction, and returns
// when that is on the disk; [Call.Settle] puts what it did cost in the place of
// the reservation. So at every moment, for every budget,
//
//	spent + reserved <= budget
//
// as long as no call costs more than was reserved for it. The balances are rows
// of the database and are decided on under its locks: it makes no difference
// whether forks share one gateway or several, or how often any of them dies.
//
// # Crashes
//
// What is reserved stays so until it is settled. When a gateway dies, its calls
// are settled at their reservation, because nobody knows what they cost, and
// are marked "crashed": by the next start of the same gateway at once, by any
// other one when the dead one was not seen for a while. A settlement that comes
// after all, from a gateway that was only thought dead, puts the true cost in
// its place.
//
// A batch that the API has accepted goes on without its gateway and can be asked
// for: it stays reserved until somebody settles it. See [Batch].
//
// # Group commit
//
// A durable commit waits for a disk. Only one goroutine of a gateway writes at a
// time; what gathers while it waits goes into the next transaction, so many
// calls share one wait.
package ledger

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Options say which ledger is opened, and as whom.
type Options struct {
	// Dir is required: a folder, made with mode 0700 when it is missing and set
	// to that mode when it is there. One gateway at a time uses it. SQLite's
	// file is in it.
	Dir string

	// URL names a PostgreSQL database, as "postgres://user@host/database". The
	// tables are made in it when they are missing. Empty: SQLite in Dir.
	URL string

	// Name is this gateway among those that share a database: another one of
	// the same name can only be an earlier start of it, and is dead. Empty:
	// the absolute path of Dir, which is enough on one host.
	Name string

	// DayBudget is the most that all runs together may spend on one day, by
	// UTC. 0: no limit.
	DayBudget fork.USD

	// Lease is for how long a gateway that was not seen counts as alive. 0: half
	// a minute.
	Lease time.Duration

	// Revoked is called, from time to time, with each fork that has calls of this
	// gateway in flight and no good token any more: another gateway may have
	// revoked it, and waits for the calls to end. Nil: nothing is called.
	Revoked func(run string, num int)

	// Logger is told what goes wrong behind the callers' backs. Nil: nothing.
	Logger *slog.Logger
}

// A Ledger is open until Close. All its methods may be called from many
// goroutines.
type Ledger struct {
	o     Options
	store *store
	lock  *os.File
	log   *slog.Logger
	now   func() time.Time // tests set it
	owner int64            // this gateway's number

	closing chan struct{}  // closed when Close begins
	ended   chan struct{}  // closed when the writer has ended
	beats   sync.WaitGroup // the goroutine that says that we live

	mu      sync.Mutex
	queue   []*entry
	waiting []*waiter // calls that do not fit yet, oldest first
	lingers bool      // the writer is in lingerAwhile
	closed  bool
	wake    chan struct{} // holds one when there is something to do

	// Whoever writes holds writing, and takes it before mu.
	writing sync.Mutex
	pen     pen
	known   *cache
	seq     int64 // of calls, in the ids of this owner
	stuck   bool  // what must be written could not be, the last time
	unsure  bool  // whether the last transaction was committed is not known
}

// Open opens the ledger, making or upgrading it first, and settles what an
// earlier start of this gateway left in flight.
//
// The kind of the error is Invalid for options that cannot be and for a damaged
// file, Conflict when another gateway uses the folder, Unsupported for a ledger
// of a newer version, Denied when it may not be opened, Full when the disk is,
// Unavailable when the database does not answer, and Internal otherwise.
func Open(ctx context.Context, o Options) (_ *Ledger, err error) {
	const op = "open ledger"
	switch {
	case o.Dir == "":
		return nil, fault.New(op, fault.Invalid, "no folder for the ledger")
	case o.DayBudget < 0:
		return nil, fault.New(op, fault.Invalid, "a budget of %s a day", o.DayBudget)
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, diskFault(op, err)
	}
	if o.Name == "" {
		o.Name = o.Dir
	}
	if o.Lease == 0 {
		o.Lease = 30 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, diskFault(op, err)
	}
	if err := os.Chmod(o.Dir, 0o700); err != nil {
		return nil, diskFault(op, err)
	}
	l := &Ledger{
		o: o, log: o.Logger, now: time.Now,
		closing: make(chan struct{}), ended: make(chan struct{}), wake: make(chan struct{}, 1),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.release())
		}
	}()
	if l.lock, err = lock(filepath.Join(o.Dir, "ledger.lock")); err != nil {
		return nil, err
	}
	if o.URL == "" {
		l.store, err = openSQLite(ctx, o.Dir)
	} else {
		l.store, err = openPostgres(ctx, o.URL)
	}
	if err != nil {
		return nil, err
	}
	if err := l.store.migrate(ctx); err != nil {
		return nil, err
	}
	if err := l.enter(ctx); err != nil {
		return nil, err
	}
	l.pen, l.known = pen{store: l.store}, newCache()
	go l.write()
	if err := l.settleDead(ctx); err != nil {
		return nil, errors.Join(err, l.stop())
	}
	l.beats.Go(l.live)
	return l, nil
}

// Close writes what is left and closes the files. Calls that wait are told that
// the ledger is closed; those that were not settled stay in flight, and are
// charged at their reservation by the next Open, but for batches. A second Close
// does nothing.
func (l *Ledger) Close() error {
	const op = "close ledger"
	l.mu.Lock()
	closed := l.closed
	l.mu.Unlock()
	if closed {
		return nil
	}
	err := l.stop()
	if err == nil {
		err = l.leave(context.Background())
	}
	return fault.Wrap(op, errors.Join(err, l.release()))
}

// stop ends the goroutines; the writer when it has nothing left to write, or
// cannot.
func (l *Ledger) stop() error {
	l.mu.Lock()
	l.closed = true
	close(l.closing)
	l.mu.Unlock()
	l.beats.Wait()
	l.signal()
	<-l.ended
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.queue); n > 0 {
		return fault.New("write ledger", fault.Unavailable, "%d entries could not be written", n).
			Hinted("Their calls are charged at their reservation when the ledger is opened again.")
	}
	return nil
}

func (l *Ledger) release() error {
	var errs []error
	if l.store != nil {
		errs = append(errs, l.store.close())
	}
	if l.lock != nil {
		errs = append(errs, l.lock.Close())
	}
	return errors.Join(errs...)
}

// today is the day, by UTC, to whose budget a call belongs that begins now.
func today(now time.Time) string { return now.UTC().Format(time.DateOnly) }

func millis(t time.Time) int64 { return t.UnixMilli() }

var errClosed = fault.New("write ledger", fault.Unavailable, "the ledger is closed")
