package ledger

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := ledgertest.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// everywhere runs a test with each of the databases.
func everywhere(t *testing.T, f func(t *testing.T, o Options)) {
	t.Run("sqlite", func(t *testing.T) { f(t, Options{Dir: t.TempDir()}) })
	t.Run("postgres", func(t *testing.T) {
		f(t, Options{URL: ledgertest.Postgres(t), Dir: t.TempDir()})
	})
}

// open opens a ledger that the test may close or crash.
func open(t testing.TB, o Options) *Ledger {
	t.Helper()
	l, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// crash ends the ledger as the death of its process does: what was not
// committed is lost.
func (l *Ledger) crash() {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return
	}
	l.closed = true
	close(l.closing)
	l.mu.Unlock()
	l.forget()
	l.beats.Wait()
	for ended := false; !ended; {
		select {
		case <-l.ended:
			ended = true
		case <-time.After(time.Millisecond):
			l.forget() // settlements that came in the last moment
			l.signal()
		}
	}
	l.release()
}

// forget drops what is not written yet. Who waits for it would have died with
// the process, and is told.
func (l *Ledger) forget() {
	l.mu.Lock()
	lost := l.queue
	l.queue = nil
	l.mu.Unlock()
	for _, e := range lost {
		e.done(errClosed)
	}
}

var token = HashOf("token")

func grant(t testing.TB, l *Ledger, a Account) Hash {
	t.Helper()
	h := HashOf(fmt.Sprint(a.Run, "/", a.Fork))
	if err := l.Grant(t.Context(), a, h); err != nil {
		t.Fatal(err)
	}
	return h
}

func usage(t testing.TB, l *Ledger, run string, num int) Spent {
	t.Helper()
	s, err := l.Usage(t.Context(), run, num)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ask is a call that costs amount at most, whatever its answer.
func ask(amount fork.USD) Ask { return Ask{Fixed: amount} }

func request(run string, num int, a Ask) Request {
	return Request{Run: run, Fork: num, Token: HashOf(fmt.Sprint(run, "/", num)), Model: "m", Path: "/", Prices: "p", Ask: a, Patience: 20 * time.Second}
}

// reserve must succeed.
func reserve(t testing.TB, l *Ledger, r Request) *Call {
	t.Helper()
	c, err := l.Reserve(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// watch checks the ledger again and again until it is stopped.
func watch(t *testing.T, l *store) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			if err := l.check(ctx); err != nil && ctx.Err() == nil {
				t.Errorf("look %d: %v", n, err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Millisecond): // leaves the others some of the processor
			}
		}
	}()
	return func() { cancel(); <-done }
}

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}
