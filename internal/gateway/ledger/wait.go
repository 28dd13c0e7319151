package ledger

import (
	"context"
	"slices"
)

// answer tells the waiter what was decided, or lets it wait on.
func (l *Ledger) answer(w *waiter, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		if l.unsure && w.verdict == pays {
			w.void()
		}
		if w.held && !w.gaveUp {
			// It waits for a person, who need not know of a moment's trouble.
			l.waiting = append(l.waiting, w)
			return
		}
	case w.verdict == later, w.verdict == never && w.hold:
		if w.gaveUp {
			return
		}
		l.waiting = append(l.waiting, w)
		if w.hold {
			l.hold(w)
		} else if !w.waited {
			w.waited = true
			w.waits <- struct{}{}
		}
		return
	case w.verdict == never:
		err = w.short
	case w.verdict == gone:
		err = ErrRevoked
	}
	if w.gaveUp {
		if err == nil {
			w.void()
		}
		return
	}
	w.answered <- err
}

// void takes back what was reserved. The caller has the ledger's mu.
func (w *waiter) void() {
	for _, c := range w.calls {
		c.void()
	}
}

// giveUp ends the wait, and reports false when there is an answer already.
func (l *Ledger) giveUp(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(w.answered) > 0 {
		return false
	}
	w.gaveUp = true
	l.waiting = slices.DeleteFunc(l.waiting, func(o *waiter) bool { return o == w })
	return true
}

// gaveUp reports whether nobody waits for w any more.
func (l *Ledger) gaveUp(w *waiter) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return w.gaveUp
}

// hold tells the caller of w that it waits for a person, when it is news. The
// caller has l.mu.
func (l *Ledger) hold(w *waiter) {
	if w.held && w.told == w.short.Whose {
		return
	}
	w.held, w.told = true, w.short.Whose
	select {
	case <-w.holding: //nolint:errcheck // nobody has read the last one
	default:
	}
	w.holding <- w.short
}

// retry lets the waiting calls be decided on again that may have a chance,
// before all new ones.
func (l *Ledger) retry(chance func(*waiter) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var again []*entry
	l.waiting = slices.DeleteFunc(l.waiting, func(w *waiter) bool {
		if !chance(w) {
			return false
		}
		again = append(again, w.entry(l))
		return true
	})
	l.queue = append(again, l.queue...)
}

// freed lets the calls be tried again that wait for what came free.
func (l *Ledger) freed(s *sheet) {
	if len(s.freed) == 0 {
		return
	}
	l.retry(func(w *waiter) bool {
		keys := w.keys()
		return s.freed[keys[0]] || w.lacks[1] && s.freed[keys[1]] || w.lacks[2] && s.freed[keys[2]]
	})
}

// look tries the waiting calls again, without an occasion: another day may have
// begun and, where others write too, another gateway may have settled. Those
// that have no chance are found out without taking a lock.
func (l *Ledger) look() {
	l.mu.Lock()
	waiting := slices.Clone(l.waiting)
	l.mu.Unlock()
	if len(waiting) == 0 {
		return
	}
	if l.store.alone {
		l.retry(func(*waiter) bool { return true })
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), writeTime)
	defer cancel()
	var wants []want
	for _, w := range waiting {
		wants = append(wants, w.want(l))
	}
	s, err := l.store.peek(ctx, wants)
	if err != nil {
		return // the next look comes soon
	}
	l.retry(func(w *waiter) bool {
		if !slices.Contains(waiting, w) {
			return false
		}
		was := w.verdict
		l.judge(s, w)
		f := s.forks[forkKey{w.request.Run, w.request.Fork}]
		return w.verdict != was || w.hold && f.held == ""
	})
}

// Waiting counts the calls that wait for others to settle or for money.
func (l *Ledger) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.waiting)
}
