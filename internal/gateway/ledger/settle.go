package ledger

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A State is what became of a call.
type State string

// The states.
const (
	Settled State = "settled" // answered and priced
	Failed  State = "failed"  // not answered, so at no cost or at a bound of it
	Crashed State = "crashed" // was in flight when its gateway died: charged at its reservation

	inFlight = "in_flight" // reserved, and maybe forwarded
)

// A Settlement is how a call ended.
type Settlement struct {
	Tokens    Tokens
	Cost      fork.USD
	Model     string // that answered; empty: the one that was asked
	State     State  // Settled or Failed
	Status    int    // HTTP, of the upstream; 0: it did not answer
	RequestID string // the upstream's
	Note      string // anything unusual

	ended time.Time
}

// Settle puts the cost in the place of the reservation. It does not wait: what
// must be written is kept until it is, and Reserve, Usage and Close find it
// done. Only the first settlement of a call counts; for others it returns false.
func (c *Call) Settle(s Settlement) (first bool) {
	select {
	case <-c.unsettled:
	default:
		return false
	}
	s = s.tidy(c)
	c.l.add(&entry{
		want:   want{day: c.day, run: c.fork.run, num: c.fork.num, calls: []int64{c.id}, ours: !c.elsewhere}.itself,
		decide: func(sh *sheet) { sh.settle(c.id, c.day, c.fork, c.Reserved, s) },
	})
	return true
}

// tidy makes the settlement of c fit for the books.
func (s Settlement) tidy(c *Call) Settlement {
	if s.Model == "" {
		s.Model = c.request.Model
	}
	s.Model, s.RequestID, s.Note = tidy(s.Model), tidy(s.RequestID), tidy(s.Note)
	s.Cost = max(s.Cost, 0)
	s.ended = c.l.now()
	return s
}

// Find returns the latest call that the fork made of that path at that attempt,
// whoever reserved it, to settle it once it is known what it cost; or
// fault.NotFound. What was settled already stays as it is, but for the charge of
// a crash.
func (l *Ledger) Find(ctx context.Context, run string, num int, path string, attempt int) (*Call, error) {
	const op = "find call"
	if err := l.do(ctx, want{}, nil); err != nil { // what was settled is written
		return nil, fault.Wrap(op, err)
	}
	c := &Call{l: l, fork: forkKey{run, num}, request: Request{Run: run, Fork: num, Path: path, Attempt: attempt}, elsewhere: true, unsettled: make(chan struct{}, 1)}
	c.unsettled <- struct{}{}
	err := l.store.read.QueryRowContext(ctx, `SELECT id, day, reserved, model, prices FROM calls
		WHERE run = $1 AND fork = $2 AND path = $3 AND attempt = $4 ORDER BY id DESC LIMIT 1`, run, num, tidy(path), attempt).
		Scan(&c.id, &c.day, &c.Reserved, &c.request.Model, &c.request.Prices)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fault.New(op, fault.NotFound, "fork %s/%d has no such call", run, num)
	}
	if err != nil {
		return nil, l.store.fault(op, err)
	}
	return c, nil
}

// ID is the call's in the ledger.
func (c *Call) ID() int64 { return c.id }

// Model is the one that the call was reserved for.
func (c *Call) Model() string { return c.request.Model }

// Prices is the version of the table that the call was reserved with.
func (c *Call) Prices() string { return c.request.Prices }

// void takes a reservation back that may or may not be on the disk, and was
// never used. The caller has the ledger's mu.
func (c *Call) void() {
	l := c.l
	s := Settlement{Model: c.request.Model, State: Failed, Note: "never forwarded", ended: l.now()}
	l.enqueue(&entry{
		want:   want{day: c.day, run: c.fork.run, num: c.fork.num, calls: []int64{c.id}}.itself,
		decide: func(sh *sheet) { sh.settle(c.id, c.day, c.fork, c.Reserved, s) },
	})
	l.signal()
}

// settle books the end of a call.
func (s *sheet) settle(id int64, day string, key forkKey, reserved fork.USD, e Settlement) {
	row := s.calls[id]
	if row == nil {
		return // the reservation never came to the disk
	}
	if row.known {
		row.state, row.reserved = inFlight, reserved
	}
	f := s.forks[key]
	switch {
	case row.state == inFlight:
		for _, b := range s.balances(day, key) {
			b.reserved -= row.reserved
			b.spent = plus(b.spent, e.Cost)
		}
		f.calls++
	case row.state == string(Crashed) && e.State != Crashed:
		// Its gateway was thought dead, and is not.
		for _, b := range s.balances(day, key) {
			b.spent = plus(max(b.spent-row.cost, 0), e.Cost)
		}
	default:
		return // it is settled
	}
	f.input += e.Tokens.Input
	f.output += e.Tokens.Output
	f.cacheRead += e.Tokens.CacheRead
	f.cacheWrite += e.Tokens.CacheWrite5m + e.Tokens.CacheWrite1h
	row.known, row.state, row.cost, row.settlement = false, string(e.State), e.Cost, &e
	s.closed = append(s.closed, row)
	s.change(day, key)
	s.free(day, key)
}
