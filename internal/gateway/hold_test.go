package gateway

import (
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

func TestCallIsHeldUntilThereIsMoney(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 1, Pause: true})
	for _, stream := range []bool{true, false} {
		if err := r.SetBudget(t.Context(), "r", 0, 1); err != nil {
			t.Fatal(err)
		}
		before := r.up.count()
		held := make(chan answer, 1)
		go func() { held <- r.send(token, message{max: 1000, stream: stream, script: script{Out: 10}}) }()
		until(t, "the fork waits", func() bool { return strings.Contains(r.usage("r", 1).Held, "The budget of run r ") })
		if r.up.count() != before {
			t.Error("it was forwarded")
		}
		if err := r.SetBudget(t.Context(), "r", 0, fork.Dollar); err != nil {
			t.Fatal(err)
		}
		if a := <-held; a.status != 200 || a.err != nil {
			t.Errorf("%+v", a)
		}
		if s := r.usage("r", 1); s.Held != "" || s.Refused != 0 {
			t.Errorf("%+v", s)
		}
	}
	if !strings.Contains(r.logs.String(), "a call is held until there is more money") {
		t.Error("nobody is told")
	}
}

// An agent that is held for longer than it waits in silence is told to come
// again, in a way that it takes for passing trouble.
func TestCallThatIsHeldLongIsToldToComeAgain(t *testing.T) {
	r := newRig(t)
	r.limits.hold = 20 * time.Millisecond
	r.limits.wait = time.Millisecond // which is not for those who wait for a person
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 1, Pause: true})
	for range 3 {
		a := r.send(token, message{max: 1000})
		if a.status != 503 || a.header.Get("Retry-After") != "1" || a.header.Get("X-Should-Retry") == "false" || !strings.Contains(a.body, "waits for more money") {
			t.Errorf("%+v", a)
		}
	}
	if s := r.usage("r", 1); s.Held == "" || s.Refused != 0 || r.up.count() != 0 {
		t.Errorf("%+v, %d calls were forwarded", s, r.up.count())
	}
	if n := r.ledger.Waiting(); n != 0 {
		t.Errorf("%d calls still wait", n)
	}
}

func TestHeldCallsOfARevokedForkAreRefused(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 1, Pause: true})
	held := make(chan answer, 1)
	go func() { held <- r.send(token, message{max: 1000}) }()
	until(t, "the fork waits", func() bool { return r.usage("r", 1).Held != "" })
	if err := r.Revoke(t.Context(), "r", 1); err != nil {
		t.Fatal(err)
	}
	if a := <-held; a.status != 403 {
		t.Errorf("%+v", a)
	}
	if err := r.Settle(t.Context(), "r", 1, time.Minute); err != nil {
		t.Error(err)
	}
}

// Gateways that share a ledger take each other's tokens, and end each other's
// calls.
func TestGatewaysShareALedger(t *testing.T) {
	url := ledgertest.Postgres(t)
	up := newUpstream(t)
	shared := func(o *Options) { o.Ledger.URL, o.Ledger.Lease = url, 300*time.Millisecond }
	a, b := openRig(t, t.TempDir(), up, shared), openRig(t, t.TempDir(), up, shared)
	a.limits.trust, b.limits.trust = 0, 0
	a.limits.drain = time.Hour
	token := a.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	for _, r := range []*rig{a, b} {
		if s := r.send(token, message{max: 100, stream: true, script: script{Out: 100}}); s.status != 200 {
			t.Fatalf("%+v", s)
		}
	}
	if err := b.Settle(t.Context(), "r", 1, time.Minute); err != nil { // the other gateway's calls too
		t.Fatal(err)
	}
	if got := b.usage("r", 1); got.Calls != 2 || got.Cost != up.billed() {
		t.Errorf("%+v, billed %s", got, up.billed())
	}
	// A call that hangs in one gateway, of a fork that the other one ends.
	hung := make(chan answer, 1)
	go func() { hung <- a.send(token, message{max: 100, script: script{Fault: "hang"}}) }()
	until(t, "the call is upstream", func() bool { return up.count() == 3 })
	if err := b.Revoke(t.Context(), "r", 1); err != nil {
		t.Fatal(err)
	}
	if err := b.Settle(t.Context(), "r", 1, 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	<-hung
	if n, err := b.ledger.InFlight(t.Context(), "r", 1); n != 0 || err != nil {
		t.Errorf("%d in flight, %v", n, err)
	}
	for name, r := range map[string]*rig{"the other": b, "the one that granted it": a} {
		if s := r.do(t.Context(), "GET", "/v1/models", token, ""); s.status != 403 {
			t.Errorf("the token is good in %s: %d", name, s.status)
		}
		r.agree()
	}
}
