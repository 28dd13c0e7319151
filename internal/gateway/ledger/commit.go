package ledger

import (
	"context"
	"runtime/debug"
	"slices"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// An entry is one thing to be written. Entries are carried out in the order in
// which they came.
type entry struct {
	// want names the rows that decide reads. It is asked anew for every try.
	want func() want

	// decide changes the rows of the sheet. It may be called several times, each
	// time with rows as they are on the disk; only the last time counts. Nil:
	// nothing is written, the entry only waits for its turn.
	decide func(*sheet)

	// answer is called once, with how it went. Nil: the entry must be kept and
	// is written again until it is written.
	answer func(error)

	came time.Time // into the queue; only of those without an answer
}

const (
	// batchSize is the most entries in one transaction.
	batchSize = 512

	// lookEvery is how often calls that wait are tried again without an occasion.
	lookEvery = time.Second

	// retryEvery is how often a ledger that cannot write tries again by itself.
	retryEvery = time.Second

	// linger is how long settlements wait for something that somebody waits for,
	// to go to the disk together with it. A crash meanwhile charges their calls at
	// the reservation, as at any other moment before they are written.
	linger = 5 * time.Millisecond

	// writeTime bounds one transaction with a server: one that does not answer
	// must not hold calls forever.
	writeTime = 15 * time.Second
)

// add puts an entry behind all earlier ones, and reports false when the ledger
// is closed. It does not wait.
func (l *Ledger) add(e *entry) bool {
	l.mu.Lock()
	added := l.enqueue(e)
	awake := e.answer == nil && l.lingers && !l.urgent() // the writer looks again by itself
	l.mu.Unlock()
	if added && !awake {
		l.signal()
	}
	return added
}

// hurry adds an entry and, when nobody writes at this moment, writes the queue
// in its own goroutine: an agent that makes one call after the other is answered
// without waking another goroutine and being woken by it. Those who come
// meanwhile are left to the writer, and so is everything where a server may take
// its time to answer.
func (l *Ledger) hurry(e *entry) (added bool) {
	if !l.store.alone || !l.writing.TryLock() {
		return l.add(e)
	}
	defer l.writing.Unlock()
	l.mu.Lock()
	added = l.enqueue(e)
	l.mu.Unlock()
	if added {
		if kept, more := l.round(); more && !kept {
			l.signal()
		}
	}
	return added
}

// enqueue is add for those who see to it that the entry is written. The caller
// has l.mu.
func (l *Ledger) enqueue(e *entry) bool {
	if e.answer == nil {
		e.came = time.Now()
	} else if l.closed {
		return false
	}
	l.queue = append(l.queue, e)
	return true
}

// do adds an entry and waits until it is on the disk.
func (l *Ledger) do(ctx context.Context, want want, decide func(*sheet)) error {
	done := make(chan error, 1)
	e := &entry{want: want.itself, decide: decide, answer: func(err error) { done <- err }}
	if !l.add(e) {
		return errClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return &fault.Error{Op: "write ledger", Kind: fault.Cancelled, Err: ctx.Err()}
	}
}

func (w want) itself() want { return w }

func (l *Ledger) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write carries out entries until the ledger is closed and nothing is left, or
// what is left cannot be written.
func (l *Ledger) write() {
	defer close(l.ended)
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		l.lingerAwhile()
		l.mu.Lock()
		closed := l.closed
		l.mu.Unlock()
		l.writing.Lock()
		kept, more := l.round()
		last := closed && (kept || !more)
		if last {
			l.pen.drop()
		}
		l.writing.Unlock()
		switch {
		case last:
			return // what is kept stays in flight on the disk: the next Open charges its reservations
		case kept:
			select {
			case <-l.wake:
			case <-time.After(retryEvery):
			}
		case !more:
			select {
			case <-l.wake:
			case <-tick.C:
				l.writing.Lock()
				l.look()
				l.writing.Unlock()
			}
		}
	}
}

// round writes what is in the queue, as far as one transaction takes it. It
// reports whether there was something that cannot be written for now and is in
// the queue again, and whether there is more. The caller holds l.writing.
func (l *Ledger) round() (kept, more bool) {
	l.mu.Lock()
	n := min(len(l.queue), batchSize)
	batch := slices.Clone(l.queue[:n])
	l.queue = slices.Delete(l.queue, 0, n)
	l.mu.Unlock()
	var again []*entry
	if n > 0 {
		if again = l.commit(batch); len(again) == 0 && l.stuck {
			l.stuck = false
			l.log.Info("the ledger can be written again")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(again, l.queue...)
	return len(again) > 0, len(l.queue) > 0
}

// lingerAwhile returns when there is something in the queue that somebody waits
// for, or when what is there has waited for long enough. An agent that makes one
// call after the other so waits for one write to the disk a call and not for two:
// how a call ended is written together with the reservation of the next.
func (l *Ledger) lingerAwhile() {
	late := time.NewTimer(linger)
	defer late.Stop()
	for {
		left := l.idle()
		if left <= 0 {
			return
		}
		late.Reset(left)
		select {
		case <-l.wake:
		case <-late.C:
		}
	}
}

// idle returns for how long what is in the queue can wait: not at all when
// somebody waits for it, or it is empty.
func (l *Ledger) idle() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lingers = len(l.queue) > 0 && !l.urgent(); !l.lingers {
		return 0
	}
	left := linger - time.Since(l.queue[0].came)
	l.lingers = left > 0
	return left
}

// urgent reports whether the queue must be written at once. The caller has l.mu.
func (l *Ledger) urgent() bool {
	return l.closed || len(l.queue) >= batchSize || len(l.waiting) > 0 || slices.ContainsFunc(l.queue, func(e *entry) bool { return e.answer != nil })
}

// commit writes a batch in one transaction. When that fails, the entries that
// must be kept are returned, and the others are told. An entry that the
// database does not take, because something is wrong with it and not with the
// database, is looked for and does not spoil the others.
func (l *Ledger) commit(batch []*entry) (kept []*entry) {
	s, err := l.transact(batch)
	for try := 0; try < 3 && fault.KindOf(err) == fault.Conflict && !l.store.alone; try++ {
		s, err = l.transact(batch) // another gateway was in the way
	}
	switch kind := fault.KindOf(err); {
	case err == nil:
		for _, e := range batch {
			e.done(nil)
		}
		if s != nil {
			l.freed(s)
		}
		return nil
	case len(batch) > 1 && (kind == fault.Internal || kind == fault.Invalid || kind == fault.Full):
		half := len(batch) / 2
		return append(l.commit(batch[:half]), l.commit(batch[half:])...)
	}
	for _, e := range batch {
		if e.answer == nil {
			kept = append(kept, e)
		}
		e.done(err)
	}
	if len(kept) > 0 && !l.stuck {
		l.stuck = true
		l.log.Error("the ledger cannot be written; no call is forwarded until it can", "error", err)
	}
	return kept
}

func (e *entry) done(err error) {
	if e.answer != nil {
		e.answer(err)
	}
}

// transact carries out a batch: it reads the rows, decides, writes and commits.
func (l *Ledger) transact(batch []*entry) (*sheet, error) {
	const op = "write ledger"
	p := &l.pen
	l.unsure = false
	var wants []want
	for _, e := range batch {
		if e.decide != nil {
			wants = append(wants, e.want())
		}
	}
	if len(wants) == 0 {
		return nil, nil
	}
	ctx := context.Background()
	if !l.store.alone {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, writeTime)
		defer cancel()
		*l.known = *newCache()
	}
	if err := p.begin(ctx); err != nil {
		return nil, l.store.fault(op, err)
	}
	s, err := l.carryOut(ctx, batch, wants)
	if err != nil || s.empty() {
		p.rollback()
		return s, err
	}
	if err := p.exec(ctx, "COMMIT"); err != nil {
		// A server may have committed and not have come to say so.
		l.unsure = !l.store.alone
		p.rollback()
		*l.known = *newCache()
		return nil, l.store.fault(op, err)
	}
	l.known.keep(s)
	return s, nil
}

// carryOut does what a batch says, inside of a transaction. A panic on the way is
// an error like any other: commit finds the entry that is to blame, and the
// others, among them how calls ended, are not lost with it.
func (l *Ledger) carryOut(ctx context.Context, batch []*entry, wants []want) (s *sheet, err error) {
	const op = "write ledger"
	defer func() {
		if v := recover(); v != nil {
			l.log.Error("a transaction of the ledger panicked", "panic", v, "stack", string(debug.Stack()))
			s, err = nil, fault.New(op, fault.Internal, "panic: %v", v)
		}
	}()
	if s, err = l.pen.load(ctx, wants, l.known); err != nil {
		return nil, l.store.fault(op, err)
	}
	for _, e := range batch {
		if e.decide != nil {
			e.decide(s)
		}
	}
	if s.empty() {
		return s, nil
	}
	if err := l.pen.save(ctx, s, l.owner); err != nil {
		return nil, l.store.fault(op, err)
	}
	return s, nil
}
