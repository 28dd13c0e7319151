package ledger

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// An Ask is the most that a call can cost: Fixed for its prompt, and PerToken
// for each token of its answer.
type Ask struct {
	Fixed    fork.USD // for the prompt and everything else that is not the answer
	PerToken fork.USD
	Want     int64 // output tokens, as asked for and capped
	Enough   int64 // with fewer than this, it is better to wait for others to settle
	Least    int64 // with fewer than this, the call is of no use
}

// Cost is the most that the call costs with an answer of that many tokens.
func (a Ask) Cost(output int64) fork.USD {
	if output > 0 && a.PerToken > (most-a.Fixed)/fork.USD(output) {
		return most
	}
	return a.Fixed + fork.USD(max(output, 0))*a.PerToken
}

// tooMuch is more than any call costs, and so little that the reservations of
// some ten thousand of them can be added up.
const tooMuch fork.USD = 1 << 49

// A Request says who wants to call what.
type Request struct {
	Run   string
	Fork  int
	Token Hash // the one that the call came with; it must still be good

	Model   string // for the books: these are cut and cleaned
	Path    string
	Prices  string // the version of the table that the ask was made with
	Attempt int    // the caller's own count of its retries
	Ask     Ask

	parts []Part // of a batch

	// Patience is how long the call waits for others to settle, when it would
	// fit then.
	Patience time.Duration

	// Held is called when the call is held, because no budget covers it and the
	// run is to pause then; see Account. It waits from then on until there is
	// money or its context ends. Held is called again when another budget is
	// short. It may be nil.
	Held func(Shortage)
}

// A Call is a reservation, until it is settled.
type Call struct {
	Output   int64    // the most tokens that the answer may have
	Reserved fork.USD // what is held for the call

	l       *Ledger
	id      int64
	fork    forkKey
	day     string
	started time.Time
	request Request

	elsewhere bool          // it may not be this gateway's, or be settled already
	unsettled chan struct{} // holds one until somebody settles
}

// A Shortage is the error of a call that no budget covers.
type Shortage struct {
	Of     string   // one of fork.Budgets
	Whose  string   // "run sandbox-orch-1", "fork sandbox-orch-1/2" or "2026-11-23 (UTC)"
	Budget fork.USD // all of it
	Left   fork.USD // of it, when the calls under way cost nothing; not negative
	Need   fork.USD // by the smallest call that would be of use
}

// Error says which budget does not suffice, and how much of it is left.
func (s Shortage) Error() string {
	return fmt.Sprintf("The budget of %s does not cover this call: %s of %s is left, and the call may cost %s.",
		s.Whose, s.Left, s.Budget, s.Need)
}

// The other errors of Reserve that callers tell apart.
var (
	// ErrRevoked: the token is not good, or not any more.
	ErrRevoked = errors.New("the token is not good")
	// ErrBusy: the call would fit if others had settled; its patience is up.
	ErrBusy = errors.New("what is left of the budget is held by other calls")
)

// A verdict says whether a call can be paid.
type verdict int

const (
	pays  verdict = iota
	later         // when other calls have settled, it may fit
	never         // it does not fit, even if all others cost nothing
	gone          // its token is not good
)

// A waiter is a call that wants to be reserved.
type waiter struct {
	request Request
	gaveUp  bool // guarded by the ledger's mu
	held    bool // likewise: its caller was told that it is held
	told    string
	waited  bool

	// What the writer decided, guarded by its being the only one until the
	// waiter is answered.
	day     string
	verdict verdict
	hold    bool // of never: it may wait for more money
	short   Shortage
	lacks   [3]bool // which budgets are short: of the fork, the run, the day
	calls   []*Call

	answered chan error    // gets one, when there is a verdict that stands
	waits    chan struct{} // gets one when the call begins to wait for others
	holding  chan Shortage // gets one when the call is held; the latest
}

// Reserve holds the most that the call can cost in every budget that it is paid
// from, and returns when that is on the disk. A call that fits only after others
// have settled waits for them; they get what is left in the order in which they
// came. The number of output tokens is lowered to what fits.
//
// The error is a [Shortage] when the call never fits, [ErrRevoked], [ErrBusy],
// or a fault: Cancelled when ctx is done, Invalid for a call that costs more than
// any account covers, and whatever keeps the ledger from being written.
func (l *Ledger) Reserve(ctx context.Context, r Request) (*Call, error) {
	const op = "reserve"
	if r.Ask.Fixed < 0 || r.Ask.PerToken < 0 || r.Ask.Want < 0 || r.Ask.Cost(r.Ask.Want) > tooMuch {
		return nil, fault.New(op, fault.Invalid, "the call may cost more than any account covers")
	}
	r.Model, r.Path, r.Prices = tidy(r.Model), tidy(r.Path), tidy(r.Prices)
	calls, err := l.reserve(ctx, r)
	if err != nil {
		return nil, err
	}
	return calls[0], nil
}

// reserve is Reserve for all calls of a request.
func (l *Ledger) reserve(ctx context.Context, r Request) ([]*Call, error) {
	const op = "reserve"
	w := &waiter{request: r, answered: make(chan error, 1), waits: make(chan struct{}, 1), holding: make(chan Shortage, 1)}
	if !l.hurry(w.entry(l)) {
		return nil, errClosed
	}
	var expired <-chan time.Time
	for {
		var err error
		select {
		case err = <-w.answered:
			if err != nil {
				return nil, err
			}
			return w.calls, nil
		case <-w.waits:
			late := time.NewTimer(r.Patience)
			defer late.Stop()
			expired = late.C
			continue
		case short := <-w.holding:
			expired = nil // it waits for a person now
			if r.Held != nil {
				r.Held(short)
			}
			continue
		case <-expired:
			err = ErrBusy
		case <-ctx.Done():
			err = &fault.Error{Op: op, Kind: fault.Cancelled, Err: ctx.Err()}
		case <-l.closing:
			err = errClosed
		}
		if l.giveUp(w) {
			return nil, err
		}
		if err := <-w.answered; err != nil { // in the very moment
			return nil, err
		}
		return w.calls, nil
	}
}

func (w *waiter) entry(l *Ledger) *entry {
	return &entry{
		want:   func() want { return w.want(l) },
		decide: func(s *sheet) { l.decide(s, w) },
		answer: func(err error) { l.answer(w, err) },
	}
}

// want names what the call is paid from, today.
func (w *waiter) want(l *Ledger) want {
	w.day = today(l.now())
	return want{day: w.day, run: w.request.Run, num: w.request.Fork}
}

// keys are the marks of the budgets, in the order of lacks.
func (w *waiter) keys() [3]string {
	return marks(w.day, forkKey{w.request.Run, w.request.Fork})
}

// judge says whether the call can be paid, and with how many output tokens.
func (l *Ledger) judge(s *sheet, w *waiter) (out int64) {
	r := w.request
	key := forkKey{r.Run, r.Fork}
	f, run, day := s.forks[key], s.runs[r.Run], s.days[w.day]
	w.hold = false
	if f == nil || run == nil || f.token == "" || f.token != r.Token.text() {
		w.verdict = gone
		return 0
	}
	limit := balance{budget: l.o.DayBudget}
	if day != nil {
		limit.spent, limit.reserved = day.spent, day.reserved
	}
	out = w.fit(&f.balance, &run.balance, &limit)
	w.hold = w.verdict == never && run.pause
	return out
}

// decide books the call if it can be paid now.
func (l *Ledger) decide(s *sheet, w *waiter) {
	w.calls = nil
	if l.gaveUp(w) {
		w.verdict = gone
		return
	}
	out := l.judge(s, w)
	r := w.request
	key := forkKey{r.Run, r.Fork}
	switch {
	case w.verdict == pays:
		for _, p := range r.each(out) {
			l.seq++
			c := &Call{
				Output: out, Reserved: p.Most, l: l, id: l.owner<<ownerShift | l.seq, fork: key, day: w.day,
				started: l.now(), request: r, unsettled: make(chan struct{}, 1),
			}
			c.request.Model, c.request.parts = p.Model, nil
			c.unsettled <- struct{}{}
			for _, b := range s.balances(w.day, key) {
				b.reserved += c.Reserved
			}
			s.opened = append(s.opened, c)
			w.calls = append(w.calls, c)
		}
		s.days[w.day].budget = l.o.DayBudget
		s.forks[key].held = ""
		s.change(w.day, key)
	case w.hold:
		if f, why := s.forks[key], w.short.Error(); f.held != why {
			f.held = why
			s.changedForks[key] = true
		}
	case w.verdict == never:
		s.forks[key].refused++
		s.forks[key].short = w.short.Of
		s.changedForks[key] = true
	}
}

// each lists the calls to be reserved: one, or those of a batch.
func (r *Request) each(out int64) []Part {
	if len(r.parts) > 0 {
		return r.parts
	}
	return []Part{{Model: r.Model, Most: r.Ask.Cost(out)}}
}

// fit finds the verdict, and how many output tokens can be had.
func (w *waiter) fit(budgets ...*balance) (out int64) {
	a := w.request.Ask
	now, settled := fork.USD(math.MaxInt64), fork.USD(math.MaxInt64)
	helps, limited := false, false // waiting could; there is a budget
	w.lacks = [3]bool{}
	for i, b := range budgets {
		if b.budget == 0 {
			continue
		}
		limited = true
		left := b.budget - b.spent
		now = min(now, left-b.reserved)
		if left-b.reserved < a.Cost(a.Enough) {
			w.lacks[i] = true
			helps = helps || b.reserved > 0
		}
		if left < settled {
			settled = left
			w.short = Shortage{Of: fork.Budgets[i], Whose: w.whose(i), Budget: b.budget, Left: max(left, 0), Need: a.Cost(a.Least)}
		}
	}
	w.verdict = later
	switch {
	case !limited:
		w.verdict = pays
		return a.Want
	case settled < a.Cost(a.Least):
		w.verdict = never
	case now >= a.Cost(a.Enough), now >= a.Cost(a.Least) && !helps:
		w.verdict = pays
		out = a.Want
		if a.PerToken > 0 {
			out = min(out, int64((now-a.Fixed)/a.PerToken))
		}
	}
	return out
}

// whose names the budget at place i of fit.
func (w *waiter) whose(i int) string {
	switch i {
	case 0:
		return fmt.Sprintf("fork %s/%d", w.request.Run, w.request.Fork)
	case 1:
		return "run " + w.request.Run
	}
	return w.day + " (UTC)"
}

// tidy makes a text fit for the books, whoever wrote it: PostgreSQL takes no
// NUL and no broken UTF-8.
func tidy(s string) string {
	const longest = 200
	s = strings.ReplaceAll(strings.ToValidUTF8(s[:min(len(s), longest)], ""), "\x00", "")
	for len(s) > 0 && !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s
}
