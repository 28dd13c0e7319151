package ledger

import (
	"context"
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
	if l.closed && e.answer != nil {
		l.mu.Unlock()
		return false
	}
	l.queue = append(l.queue, e)
	l.mu.Unlock()
	l.signal()
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
	known := newCache()
	p := &pen{store: l.store}
	defer p.drop()
	for {
		l.lingerAwhile()
		l.mu.Lock()
		n := min(len(l.queue), batchSize)
		batch := slices.Clone(l.queue[:n])
		l.queue = slices.Delete(l.queue, 0, n)
		closed := l.closed
		l.mu.Unlock()
		if n == 0 {
			if closed {
				return
			}
			select {
			case <-l.wake:
			case <-tick.C:
				l.look()
			}
			continue
		}
		kept := l.commit(batch, known, p)
		if len(kept) == 0 {
			if l.stuck {
				l.stuck = false
				l.log.Info("the ledger can be written again")
			}
			continue
		}
		l.mu.Lock()
		l.queue = append(kept, l.queue...)
		l.mu.Unlock()
		if closed {
			return // the calls stay in flight on the disk: the next Open charges their reservations
		}
		select {
		case <-l.wake:
		case <-time.After(retryEvery):
		}
	}
}

// lingerAwhile returns when there is something in the queue that somebody waits
// for, or when what is there has waited for long enough. An agent that makes one
// call after the other so waits for one write to the disk a call and not for two:
// how a call ended is written together with the reservation of the next.
func (l *Ledger) lingerAwhile() {
	if !l.idle() {
		return
	}
	late := time.NewTimer(linger)
	defer late.Stop()
	for l.idle() {
		select {
		case <-l.wake:
		case <-late.C:
			return
		}
	}
}

// idle reports whether nobody waits for anything in the queue, which is not
// empty.
func (l *Ledger) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.queue) == 0 || len(l.queue) >= batchSize || len(l.waiting) > 0 {
		return false
	}
	return !slices.ContainsFunc(l.queue, func(e *entry) bool { return e.answer != nil })
}

// commit writes a batch in one transaction. When that fails, the entries that
// must be kept are returned, and the others are told. An entry that the
// database does not take, because something is wrong with it and not with the
// database, is looked for and does not spoil the others.
func (l *Ledger) commit(batch []*entry, known *cache, p *pen) (kept []*entry) {
	s, err := l.transact(batch, known, p)
	for try := 0; try < 3 && fault.KindOf(err) == fault.Conflict && !l.store.alone; try++ {
		s, err = l.transact(batch, known, p) // another gateway was in the way
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
		return append(l.commit(batch[:half], known, p), l.commit(batch[half:], known, p)...)
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
func (l *Ledger) transact(batch []*entry, known *cache, p *pen) (*sheet, error) {
	const op = "write ledger"
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
		*known = *newCache()
	}
	if err := p.begin(ctx); err != nil {
		return nil, l.store.fault(op, err)
	}
	s, err := p.load(ctx, wants, known)
	if err == nil {
		for _, e := range batch {
			if e.decide != nil {
				e.decide(s)
			}
		}
		if s.empty() {
			p.rollback()
			return s, nil
		}
		err = p.save(ctx, s, l.owner)
	}
	if err != nil {
		p.rollback()
		return nil, l.store.fault(op, err)
	}
	if err := p.exec(ctx, "COMMIT"); err != nil {
		// A server may have committed and not have come to say so.
		l.unsure = !l.store.alone
		p.rollback()
		*known = *newCache()
		return nil, l.store.fault(op, err)
	}
	known.keep(s)
	return s, nil
}
