package ledger

import (
	"time"

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
	if s.Model == "" {
		s.Model = c.request.Model
	}
	s.Model, s.RequestID, s.Note = tidy(s.Model), tidy(s.RequestID), tidy(s.Note)
	s.Cost = max(s.Cost, 0)
	s.ended = c.l.now()
	c.l.add(&entry{
		want:   want{day: c.day, run: c.fork.run, num: c.fork.num, call: c.id, ours: true}.itself,
		decide: func(sh *sheet) { sh.settle(c.id, c.day, c.fork, c.Reserved, s) },
	})
	return true
}

// ID is the call's in the ledger.
func (c *Call) ID() int64 { return c.id }

// void takes a reservation back that may or may not be on the disk, and was
// never used. The caller has the ledger's mu.
func (c *Call) void() {
	l := c.l
	s := Settlement{Model: c.request.Model, State: Failed, Note: "never forwarded", ended: l.now()}
	l.queue = append(l.queue, &entry{
		want:   want{day: c.day, run: c.fork.run, num: c.fork.num, call: c.id}.itself,
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
