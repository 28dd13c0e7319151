package ledger

import (
	"context"
	"database/sql"
	"maps"
	"slices"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A Batch is calls that the API carries out by itself, hours after it was asked:
//
//	ReserveBatch -> the request -> Accept(id) ... Settle
//
// There is one call for each model that may answer, so that the books are right
// by model. Until Accept they are calls like any others: a gateway that dies
// before leaves them at their reservation. From then on they outlive their
// gateway: they stay reserved until somebody, in any gateway, learns what became
// of the batch and settles all of them at once.
type Batch struct {
	ID       string // the API's; empty until Accept
	Run      string
	Fork     int
	Requests int     // in it
	Calls    []*Call // in the order of their parts

	Open     bool      // it is not settled
	Orphaned bool      // its fork has no good token any more
	Created  time.Time // when it was accepted
	Looked   time.Time // when somebody asked the API about it last; zero: nobody did

	l *Ledger
}

// A Part is the share of one model in a batch.
type Part struct {
	Model string
	Most  fork.USD // that it can cost
}

// ReserveBatch is [Ledger.Reserve] for a batch: it holds all parts or none. A
// batch is not made smaller to fit.
func (l *Ledger) ReserveBatch(ctx context.Context, r Request, parts []Part) (*Batch, error) {
	const op = "reserve"
	r.Ask, r.parts = Ask{}, slices.Clone(parts)
	for i, p := range r.parts {
		if p.Most < 0 || p.Most > tooMuch {
			return nil, fault.New(op, fault.Invalid, "the batch may cost more than any account covers")
		}
		r.parts[i].Model = tidy(p.Model)
		r.Ask.Fixed = plus(r.Ask.Fixed, p.Most)
	}
	if len(parts) == 0 || r.Ask.Fixed > tooMuch {
		return nil, fault.New(op, fault.Invalid, "the batch may cost more than any account covers")
	}
	r.Path, r.Prices = tidy(r.Path), tidy(r.Prices)
	calls, err := l.reserve(ctx, r)
	if err != nil {
		return nil, err
	}
	return &Batch{Run: r.Run, Fork: r.Fork, Calls: calls, Open: true, l: l}, nil
}

// Reserved is what is held for the batch, or was.
func (b *Batch) Reserved() (sum fork.USD) {
	for _, c := range b.Calls {
		sum += c.Reserved
	}
	return sum
}

// The states of a batch.
const (
	batchOpen    = "open"
	batchSettled = "settled"
)

// A batchRow is a batch in the database.
type batchRow struct {
	id       string
	run      string
	num      int
	requests int
	state    string
	deleted  bool
	created  int64
	looked   int64
}

// A joining is a call that belongs to a batch from now on.
type joining struct {
	batch string
	call  int64
}

// want names everything that the end of the batch changes.
func (b *Batch) want() want {
	w := want{day: b.Calls[0].day, run: b.Run, num: b.Fork, batch: b.ID}
	for _, c := range b.Calls {
		w.calls = append(w.calls, c.id)
	}
	return w
}

// Accept writes down the API's name for the batch and how many requests are in
// it, and returns when that is on the disk. It is fault.Conflict for a name that
// is known. After an error the calls are to be settled one by one.
func (b *Batch) Accept(ctx context.Context, id string, requests int) error {
	const op = "accept batch"
	if id == "" || id != tidy(id) || requests < 1 {
		return fault.New(op, fault.Invalid, "batch %q of %d requests", id, requests)
	}
	b.ID, b.Requests, b.Created = id, requests, b.l.now()
	row := &batchRow{id: id, run: b.Run, num: b.Fork, requests: requests, state: batchOpen, created: millis(b.Created)}
	w := b.want()
	w.ours = true
	known := new(bool)
	err := b.l.do(ctx, w, func(s *sheet) {
		if *known = s.batches[id] != nil; *known {
			return
		}
		fresh := *row
		s.batches[id], s.changedBatches[id] = &fresh, true
		for _, c := range b.Calls {
			s.joined = append(s.joined, joining{id, c.id})
		}
	})
	if err != nil || *known {
		b.ID = ""
	}
	if err == nil && *known {
		return fault.New(op, fault.Conflict, "batch %s is known already", id)
	}
	return fault.Wrap(op, err)
}

// Settle puts what each call did cost in the place of its reservation, in the
// order of b.Calls and all at once, and returns when that is on the disk. Only
// the first settlement of a batch counts, whoever makes it; for others it
// returns false.
func (b *Batch) Settle(ctx context.Context, each []Settlement) (first bool, err error) {
	const op = "settle batch"
	if len(each) != len(b.Calls) {
		return false, fault.New(op, fault.Internal, "%d settlements of %d calls", len(each), len(b.Calls))
	}
	each = slices.Clone(each)
	for i := range each {
		each[i] = each[i].tidy(b.Calls[i])
	}
	counts := new(bool)
	err = b.l.do(ctx, b.want(), func(s *sheet) {
		row := s.batches[b.ID]
		if *counts = row != nil && row.state == batchOpen; !*counts {
			return
		}
		was := len(s.closed)
		for i, c := range b.Calls {
			s.settle(c.id, c.day, c.fork, c.Reserved, each[i])
		}
		*counts = len(s.closed) > was // it may have been charged when it was made
		row.state, s.changedBatches[b.ID] = batchSettled, true
	})
	if err != nil {
		return false, fault.Wrap(op, err)
	}
	b.Open = false
	return *counts, nil
}

// Look takes down that the API is asked about the batch now. It returns false
// when somebody else has asked, or settled it, since b was read.
func (b *Batch) Look(ctx context.Context) (mine bool, err error) {
	now, got := b.l.now(), new(bool)
	err = b.l.do(ctx, want{batch: b.ID}, func(s *sheet) {
		row := s.batches[b.ID]
		if *got = row != nil && row.state == batchOpen && row.looked == unixMillis(b.Looked); !*got {
			return
		}
		row.looked, s.changedBatches[b.ID] = millis(now), true
	})
	if err != nil || !*got {
		return false, fault.Wrap("look at batch", err)
	}
	b.Looked = now
	return true, nil
}

// Delete takes the batch out of what its fork sees. What it did cost stays.
func (b *Batch) Delete(ctx context.Context) error {
	return fault.Wrap("delete batch", b.l.do(ctx, want{batch: b.ID}, func(s *sheet) {
		if row := s.batches[b.ID]; row != nil {
			row.deleted, s.changedBatches[b.ID] = true, true
		}
	}))
}

// unixMillis is millis, and 0 for the zero time.
func unixMillis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return millis(t)
}

// Batch returns the fork's batch of that name, or fault.NotFound for one that is
// another fork's, was deleted or never was.
func (l *Ledger) Batch(ctx context.Context, run string, num int, id string) (*Batch, error) {
	const op = "find batch"
	all, err := l.batches(ctx, op, "b.run = $1 AND b.fork = $2 AND b.id = $3 AND b.deleted = 0", run, num, tidy(id))
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fault.New(op, fault.NotFound, "fork %s/%d has no such batch", run, num)
	}
	return all[0], nil
}

// Batches lists the batches of a fork that were not deleted, the newest first.
func (l *Ledger) Batches(ctx context.Context, run string, num int) ([]*Batch, error) {
	return l.batches(ctx, "list batches", "b.run = $1 AND b.fork = $2 AND b.deleted = 0", run, num)
}

// OpenBatches lists the batches that are not settled: of a fork, or with run ""
// of all of them. The newest come first.
func (l *Ledger) OpenBatches(ctx context.Context, run string, num int) ([]*Batch, error) {
	const op, open = "list batches", "b.state = '" + batchOpen + "'"
	if run == "" {
		return l.batches(ctx, op, open)
	}
	return l.batches(ctx, op, open+" AND b.run = $1 AND b.fork = $2", run, num)
}

// BatchSettled reports whether a batch is settled, whoever did it.
func (l *Ledger) BatchSettled(ctx context.Context, id string) (bool, error) {
	all, err := l.batches(ctx, "find batch", "b.id = $1", id)
	return len(all) == 1 && !all[0].Open, err
}

// batches reads those that the condition is true for, with their calls.
func (l *Ledger) batches(ctx context.Context, op, condition string, args ...any) ([]*Batch, error) {
	found, err := l.store.read.QueryContext(ctx, `SELECT b.id, b.run, b.fork, b.requests, b.state, b.created, b.looked, f.token_sha256,
			c.id, c.day, c.reserved, c.model, c.path, c.prices, c.attempt, c.started
		FROM batches b JOIN forks f ON f.run = b.run AND f.fork = b.fork JOIN calls c ON c.batch = b.id AND c.batch <> ''
		WHERE `+condition+` ORDER BY b.created DESC, b.id DESC, c.id`, args...)
	if err != nil {
		return nil, l.store.fault(op, err)
	}
	defer found.Close() // Err tells
	var all []*Batch
	for found.Next() {
		b, c := &Batch{l: l}, &Call{l: l, elsewhere: true}
		var state, token string
		var created, looked, started int64
		r := &c.request
		if err := found.Scan(&b.ID, &b.Run, &b.Fork, &b.Requests, &state, &created, &looked, &token,
			&c.id, &c.day, &c.Reserved, &r.Model, &r.Path, &r.Prices, &r.Attempt, &started); err != nil {
			return nil, l.store.fault(op, err)
		}
		if n := len(all); n > 0 && all[n-1].ID == b.ID {
			b = all[n-1]
		} else {
			all = append(all, b)
		}
		b.Open, b.Orphaned, b.Created = state == batchOpen, token == "", time.UnixMilli(created)
		if looked != 0 {
			b.Looked = time.UnixMilli(looked)
		}
		r.Run, r.Fork, c.fork, c.started = b.Run, b.Fork, forkKey{b.Run, b.Fork}, time.UnixMilli(started)
		b.Calls = append(b.Calls, c)
	}
	if err := found.Err(); err != nil {
		return nil, l.store.fault(op, err)
	}
	return all, nil
}

var (
	findBatch = find("SELECT id, run, fork, requests, state, deleted, created, looked FROM batches", []string{"id"}, text)
	saveBatch = insert("batches (id, run, fork, requests, state, deleted, created, looked)",
		"ON CONFLICT (id) DO UPDATE SET state = excluded.state, deleted = excluded.deleted, looked = excluded.looked",
		text, text, number, number, text, number, number, number)
	joinCall = update("calls", []string{"batch"}, []string{"id"}, text, number)
)

func (p *pen) loadBatches(ctx context.Context, s *sheet, batches map[string]bool) error {
	var keys [][]any
	for _, id := range slices.Sorted(maps.Keys(batches)) {
		keys = append(keys, []any{id})
	}
	return p.get(ctx, findBatch, keys, func(r *sql.Rows) error {
		row, deleted := new(batchRow), 0
		err := r.Scan(&row.id, &row.run, &row.num, &row.requests, &row.state, &deleted, &row.created, &row.looked)
		row.deleted = deleted != 0
		s.batches[row.id] = row
		return err
	})
}
