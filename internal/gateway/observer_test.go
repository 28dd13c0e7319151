package gateway

import (
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// seenCalls is what an observer was told.
type seenCalls struct {
	mu       sync.Mutex
	held     fork.USD // reserved and not settled yet
	settled  []Settled
	refused  map[int]int
	limited  map[int]int
	admitted int
	paced    int
	longest  time.Duration // of what a call was admitted in
}

func (s *seenCalls) observer() Observer {
	locked := func(f func()) {
		s.mu.Lock()
		defer s.mu.Unlock()
		f()
	}
	return Observer{
		Admitted: func(d time.Duration) { locked(func() { s.admitted++; s.longest = max(s.longest, d) }) },
		Reserved: func(held fork.USD) { locked(func() { s.held += held }) },
		Settled:  func(c Settled) { locked(func() { s.held -= c.Reserved; s.settled = append(s.settled, c) }) },
		Refused:  func(status int) { locked(func() { s.refused[status]++ }) },
		Limited:  func(status int) { locked(func() { s.limited[status]++ }) },
		Paced:    func(time.Duration) { locked(func() { s.paced++ }) },
	}
}

func newSeenCalls() *seenCalls { return &seenCalls{refused: map[int]int{}, limited: map[int]int{}} }

// left is what was reserved and not settled.
func (s *seenCalls) left() fork.USD {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

func TestTheObserverIsToldOfEveryCall(t *testing.T) {
	told := newSeenCalls()
	r := newRig(t, func(o *Options) { o.Observer = told.observer() })
	rich := r.grant(Account{Run: "r", Fork: 3})
	poor := r.grant(Account{Run: "poor", Fork: 1, RunBudget: 1})

	// Answered, after the API found it too fast twice.
	again := message{model: "opus", max: 50, stream: true, script: script{Out: 40, Read: 8, Status: 429, Times: 2, Header: map[string]string{"Retry-After": "0"}}}
	if a := r.send(rich, again); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	// Failed at the API, refused for want of money, refused for its token.
	if a := r.send(rich, message{max: 10, script: script{Status: 500}}); a.status != 500 {
		t.Fatalf("%+v", a)
	}
	if a := r.send(poor, message{max: 10}); a.status != 402 {
		t.Fatalf("%+v", a)
	}
	if a := r.send("sbxt-nobody", message{max: 10}); a.status != 403 {
		t.Fatalf("%+v", a)
	}
	r.idle("r")

	told.mu.Lock()
	defer told.mu.Unlock()
	if len(told.settled) != 2 {
		t.Fatalf("%+v", told.settled)
	}
	first, second := told.settled[0], told.settled[1]
	want, _ := testPrices.Resolve("opus")
	if first.Run != "r" || first.Fork != 3 || first.Model != want || !first.Answered || first.Tokens.Output != 40 || first.Tokens.CacheRead != 8 ||
		first.Cost <= 0 || first.Cost > first.Reserved || first.Cost != r.usage("r", 3).Cost {
		t.Errorf("%+v", first)
	}
	if second.Answered || second.Cost != 0 || second.Reserved <= 0 {
		t.Errorf("%+v", second)
	}
	if told.held != 0 {
		t.Errorf("%s are still reserved", told.held)
	}
	if told.limited[429] != 2 || len(told.limited) != 1 {
		t.Errorf("limited: %v", told.limited)
	}
	if told.refused[402] != 1 || told.refused[403] != 1 || len(told.refused) != 2 {
		t.Errorf("refused: %v", told.refused)
	}
	if told.admitted != 2 || told.paced != 2 || told.longest <= 0 {
		t.Errorf("admitted %d in at most %s, paced %d", told.admitted, told.longest, told.paced)
	}
}
