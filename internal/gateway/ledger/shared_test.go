package ledger

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

// two opens one PostgreSQL ledger for two gateways.
func two(t *testing.T, o Options) (a, b *Ledger) {
	t.Helper()
	o.URL = ledgertest.Postgres(t)
	o.Dir = t.TempDir()
	a = open(t, o)
	o.Dir = t.TempDir()
	return a, open(t, o)
}

func TestGatewaysShareBudgetsAndTokens(t *testing.T) {
	a, b := two(t, Options{})
	token := grant(t, a, Account{Run: "r", Fork: 1, RunBudget: 1000})
	if run, num, err := b.Holder(t.Context(), token); run != "r" || num != 1 || err != nil {
		t.Errorf("%s/%d %v", run, num, err)
	}
	grant(t, b, Account{Run: "r", Fork: 2, RunBudget: 1000})
	first := reserve(t, a, request("r", 1, ask(700)))
	waits := try(b, request("r", 2, ask(600)))
	until(t, "it waits", func() bool { return b.Waiting() == 1 })
	if n, err := b.InFlight(t.Context(), "r", 1); n != 1 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	// It hears of it without being told.
	first.Settle(Settlement{State: Settled, Cost: 100})
	c, err := waits.result()
	if err != nil {
		t.Fatal(err)
	}
	c.Settle(Settlement{State: Settled, Cost: 600})
	if got := usage(t, b, "r", 0); got.Cost != 700 {
		t.Errorf("%+v", got)
	}
	if err := b.Revoke(t.Context(), "r", 1); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Reserve(t.Context(), request("r", 1, ask(1))); !errors.Is(err, ErrRevoked) {
		t.Error(err)
	}
}

func TestBudgetAddedElsewhereLetsHeldCallsGoOn(t *testing.T) {
	a, b := two(t, Options{})
	grant(t, a, Account{Run: "r", Fork: 1, RunBudget: 100, Pause: true})
	held := try(a, request("r", 1, ask(300)))
	<-held.held
	if got := usage(t, b, "r", 1); got.Held == "" {
		t.Error("the other gateway does not see that the fork waits")
	}
	if err := b.SetBudget(t.Context(), "r", 0, 1000); err != nil {
		t.Fatal(err)
	}
	if _, err := held.result(); err != nil {
		t.Error(err)
	}
}

// To start a gateway, or to see one die, must not touch the calls of the
// living.
func TestOnlyTheDeadAreSettled(t *testing.T) {
	url := ledgertest.Postgres(t)
	o := Options{URL: url, Dir: t.TempDir(), Lease: time.Hour}
	a := open(t, o)
	grant(t, a, Account{Run: "r", Fork: 1})
	living := reserve(t, a, request("r", 1, ask(100)))

	other := Options{URL: url, Dir: t.TempDir(), Lease: time.Hour}
	b, err := Open(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	reserve(t, b, request("r", 1, ask(30)))
	b.crash()
	reserved := func() (n int) {
		if err := a.store.read.QueryRow("SELECT reserved FROM runs").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	// Not seen for less than an hour, it may be alive for all that others know.
	third := open(t, Options{URL: url, Dir: t.TempDir(), Lease: time.Hour})
	if got := reserved(); got != 130 {
		t.Errorf("%d are reserved", got)
	}
	// Its own next start knows better.
	b = open(t, other)
	if got := reserved(); got != 100 {
		t.Errorf("%d are reserved", got)
	}
	if got := usage(t, third, "r", 1); got.Cost != 30 || got.Calls != 1 {
		t.Errorf("%+v", got)
	}
	living.Settle(Settlement{State: Settled, Cost: 60})
	if got := usage(t, a, "r", 1); got.Cost != 90 || got.Calls != 2 {
		t.Errorf("%+v", got)
	}
	if err := b.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCallsOfAGatewayThatIsNotSeenAreSettledByOthers(t *testing.T) {
	url := ledgertest.Postgres(t)
	a := open(t, Options{URL: url, Dir: t.TempDir(), Lease: 200 * time.Millisecond})
	b, err := Open(t.Context(), Options{URL: url, Dir: t.TempDir(), Lease: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	grant(t, a, Account{Run: "r", Fork: 1})
	reserve(t, b, request("r", 1, ask(30)))
	b.crash()
	until(t, "the call is settled", func() bool { return usage(t, a, "r", 1).Cost == 30 })
}

// A gateway that was only slow puts its calls right when it is back.
func TestLateSettlementReplacesTheChargeOfACrash(t *testing.T) {
	a, b := two(t, Options{Lease: time.Hour})
	grant(t, a, Account{Run: "r", Fork: 1, RunBudget: 1000})
	c := reserve(t, a, request("r", 1, ask(500)))
	if _, err := a.store.read.Exec("UPDATE owners SET seen = 0 WHERE num = $1", a.owner); err != nil {
		t.Fatal(err)
	}
	if err := b.settleDead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := usage(t, b, "r", 1); got.Cost != 500 || got.Calls != 1 {
		t.Errorf("%+v", got)
	}
	c.Settle(Settlement{State: Settled, Cost: 200, Tokens: Tokens{Output: 7}})
	if got := usage(t, a, "r", 1); got.Cost != 200 || got.Calls != 1 || got.OutputTokens != 7 {
		t.Errorf("%+v", got)
	}
	if err := b.Check(t.Context()); err != nil {
		t.Error(err)
	}
	// It is said to be alive again, and its calls are.
	if _, err := a.store.read.Exec("UPDATE owners SET seen = "+a.store.clock+" WHERE num = $1", a.owner); err != nil {
		t.Fatal(err)
	}
	reserve(t, a, request("r", 1, ask(10)))
	if err := b.settleDead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, err := b.InFlight(t.Context(), "r", 1); n != 1 || err != nil {
		t.Errorf("%d %v", n, err)
	}
}

func TestRevokedElsewhereIsTold(t *testing.T) {
	told := make(chan int, 100)
	a, b := two(t, Options{Lease: 100 * time.Millisecond, Revoked: func(run string, num int) {
		if run == "r" {
			told <- num
		}
	}})
	grant(t, a, Account{Run: "r", Fork: 1})
	grant(t, a, Account{Run: "r", Fork: 2})
	reserve(t, a, request("r", 1, ask(1)))
	reserve(t, a, request("r", 2, ask(1)))
	if err := b.Revoke(t.Context(), "r", 2); err != nil {
		t.Fatal(err)
	}
	if num := <-told; num != 2 {
		t.Errorf("fork %d", num)
	}
}

// A server that crashes takes nothing with it that was promised: callers are
// told that the ledger cannot be written, settlements wait until it can.
func TestDatabaseServerCrashes(t *testing.T) {
	server := ledgertest.New(t, true)
	url, err := server.URL()
	if err != nil {
		t.Fatal(err)
	}
	l := open(t, Options{URL: url, Dir: t.TempDir()})
	grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1000})
	c := reserve(t, l, request("r", 1, ask(300)))
	server.Crash()
	c.Settle(Settlement{State: Settled, Cost: 200})
	if _, err := l.Reserve(t.Context(), request("r", 1, ask(1))); fault.KindOf(err) != fault.Unavailable || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	if _, err := l.Usage(t.Context(), "r", 1); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%v", err)
	}
	if _, _, err := l.Holder(t.Context(), token); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("%v", err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the ledger can be written again", func() bool {
		next, err := l.Reserve(context.Background(), request("r", 1, ask(10)))
		if err == nil {
			next.Settle(Settlement{State: Settled, Cost: 10})
		}
		return err == nil
	})
	if got := usage(t, l, "r", 1); got.Cost != 210 {
		t.Errorf("%+v", got)
	}
	if err := l.Check(t.Context()); err != nil {
		t.Error(err)
	}
}
