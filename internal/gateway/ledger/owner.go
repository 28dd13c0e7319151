package ledger

import (
	"context"
	"errors"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// ownerShift is where the number of its owner begins in the id of a call: each
// start of a gateway has as many ids of its own as it will ever need. Those
// below were given by the ledger's first version.
const ownerShift = 40

// enter makes this gateway known to the ledger.
func (l *Ledger) enter(ctx context.Context) error {
	const op = "open ledger"
	var err error
	for range 10 { // two may come at once
		err = l.store.write.QueryRowContext(ctx, `INSERT INTO owners (num, name, started, seen)
			SELECT COALESCE(MAX(num), 0) + 1, CAST($1 AS text), `+l.store.clock+`, `+l.store.clock+` FROM owners RETURNING num`, l.o.Name).Scan(&l.owner)
		if err == nil {
			return nil
		}
		if err = l.store.fault(op, err); fault.KindOf(err) != fault.Conflict {
			break
		}
	}
	return err
}

// leave says that this gateway has ended, and has nothing left in flight.
func (l *Ledger) leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	_, err := l.store.write.ExecContext(ctx, "UPDATE owners SET ended = "+l.store.clock+" WHERE num = $1", l.owner)
	if err != nil {
		return l.store.fault("close ledger", err)
	}
	return nil
}

// live says, again and again, that this gateway is alive, and buries those that
// did not. Where nobody else writes there is nobody to say it to.
func (l *Ledger) live() {
	if l.store.alone {
		return
	}
	tick := time.NewTicker(l.o.Lease / 6)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.closing:
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), l.o.Lease/2)
		_, err := l.store.read.ExecContext(ctx, "UPDATE owners SET seen = "+l.store.clock+" WHERE num = $1", l.owner)
		if err == nil {
			err = l.settleDead(ctx)
		}
		if err == nil && l.o.Revoked != nil {
			err = l.tellRevoked(ctx)
		}
		cancel()
		if err != nil {
			l.log.Warn("the ledger's database does not answer", "error", err)
		}
	}
}

// dead is true for a call whose owner o is dead. The parameters are this
// gateway's number and name, and the lease.
func (l *Ledger) dead() (condition string, args []any) {
	if l.store.alone { // the lock says so
		return "c.owner <> $1", []any{l.owner}
	}
	return `c.owner <> $1 AND (o.num IS NULL OR o.name = $2 OR o.ended IS NOT NULL OR o.seen < ` + l.store.clock + ` - $3)`,
		[]any{l.owner, l.o.Name, l.o.Lease.Milliseconds()}
}

// settleDead charges what was in flight when other gateways, or earlier starts
// of this one, died. Calls of a batch go on without a gateway, and can be asked
// for: see Batch.
func (l *Ledger) settleDead(ctx context.Context) error {
	const op = "settle calls of the dead"
	where, args := l.dead()
	type left struct {
		id       int64
		day      string
		fork     forkKey
		reserved fork.USD
		model    string
	}
	found, err := l.store.read.QueryContext(ctx, `SELECT c.id, c.day, c.run, c.fork, c.reserved, c.model FROM calls c
		LEFT JOIN owners o ON o.num = c.owner WHERE c.state = 'in_flight' AND c.batch = '' AND `+where+` ORDER BY c.id LIMIT 10000`, args...)
	if err != nil {
		return l.store.fault(op, err)
	}
	defer found.Close() // Err tells
	var all []left
	for found.Next() {
		var c left
		if err := found.Scan(&c.id, &c.day, &c.fork.run, &c.fork.num, &c.reserved, &c.model); err != nil {
			return l.store.fault(op, err)
		}
		all = append(all, c)
	}
	if err := errors.Join(found.Err(), found.Close()); err != nil {
		return l.store.fault(op, err)
	}
	results := make(chan error, len(all))
	for _, c := range all {
		s := Settlement{Model: c.model, State: Crashed, Cost: c.reserved, Note: "in flight when its gateway died: charged at its reservation", ended: l.now()}
		e := &entry{
			want:   want{day: c.day, run: c.fork.run, num: c.fork.num, calls: []int64{c.id}}.itself,
			decide: func(sh *sheet) { sh.settle(c.id, c.day, c.fork, c.reserved, s) },
			answer: func(err error) { results <- err },
		}
		if !l.add(e) {
			return errClosed
		}
	}
	var errs []error
	for range all {
		select {
		case err := <-results:
			errs = append(errs, err)
		case <-ctx.Done():
			return &fault.Error{Op: op, Kind: fault.Cancelled, Err: ctx.Err()}
		}
	}
	if len(all) > 0 {
		l.log.Warn("calls were in flight when their gateway died; they are charged at their reservations", "calls", len(all))
	}
	return errors.Join(errs...)
}

// tellRevoked names the forks whose calls should end.
func (l *Ledger) tellRevoked(ctx context.Context) error {
	found, err := l.store.read.QueryContext(ctx, `SELECT DISTINCT c.run, c.fork FROM calls c JOIN forks f ON f.run = c.run AND f.fork = c.fork
		WHERE c.owner = $1 AND c.state = 'in_flight' AND c.batch = '' AND f.token_sha256 = ''`, l.owner)
	if err != nil {
		return l.store.fault("read ledger", err)
	}
	defer found.Close() // Err tells
	for found.Next() {
		var key forkKey
		if err := found.Scan(&key.run, &key.num); err != nil {
			return l.store.fault("read ledger", err)
		}
		l.o.Revoked(key.run, key.num)
	}
	return found.Err()
}
