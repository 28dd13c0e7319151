package gateway

import (
	"bufio"
	"context"
	"database/sql"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
	"github.com/sandbox-temporal/sandbox-temporal/internal/mini"
)

func testOptions(dir, upstream string) Options {
	return Options{Ledger: ledger.Options{Dir: dir, URL: os.Getenv("GATEWAY_TEST_LEDGER")}, Prices: testPrices, Credentials: func(context.Context) (Credentials, error) {
		return Credentials{APIKey: realKey, BaseURL: upstream}, nil
	}}
}

// TestMain runs a whole gateway, to be killed, when a test starts this program
// again; see TestKilledGatewayChargesWhatWasInFlight.
func TestMain(m *testing.M) {
	if os.Getenv("GATEWAY_TEST_MINI") != "" {
		os.Exit(mini.Main(context.Background(), os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
	}
	dir := os.Getenv("GATEWAY_TEST_DIR")
	if dir == "" {
		code := m.Run()
		if err := ledgertest.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(code)
	}
	g, err := Open(context.Background(), testOptions(dir, os.Getenv("GATEWAY_TEST_UPSTREAM")))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if n, err := strconv.Atoi(os.Getenv("GATEWAY_TEST_FORKS")); err == nil {
		fmt.Fprintln(os.Stderr, beGateway(g, n, os.Getenv("GATEWAY_TEST_ADDR"), os.Getenv("GATEWAY_TEST_TOKENS")))
		os.Exit(1)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	num := 1
	if s := os.Getenv("GATEWAY_TEST_FORK"); s != "" {
		num, err = strconv.Atoi(s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	token, err := g.Grant(context.Background(), Account{Run: "r", Fork: num, RunBudget: fork.Dollar, ForkBudget: fork.Dollar})
	fmt.Println(ln.Addr(), token, err)
	fmt.Fprintln(os.Stderr, g.Serve(context.Background(), ln))
}

// startChild runs a gateway in a process of its own.
func startChild(t *testing.T, dir, upstream string, env ...string) (url, token string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "GATEWAY_TEST_DIR="+dir, "GATEWAY_TEST_UPSTREAM="+upstream)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			cmd.Process.Kill() // it may have ended
			cmd.Wait()         // it was killed
		})
	}
	t.Cleanup(kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	f := strings.Fields(line)
	if err != nil || len(f) != 3 || f[2] != "<nil>" {
		t.Fatalf("the child said %q, %v", line, err)
	}
	return "http://" + f[0], f[1], kill
}

// A gateway that is killed in the middle of calls has told the disk of each of
// them before it went out. The next one charges them at their reservation and
// says so; the tokens work on, and a call that had ended is not charged twice.
func TestKilledGatewayChargesWhatWasInFlight(t *testing.T) {
	dir, up := t.TempDir(), newUpstream(t)
	url, token, kill := startChild(t, dir, up.URL)
	child := &rig{t: t, url: url}
	if a := child.send(token, message{max: 1000, stream: true, script: script{Out: 700}}); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	ended := up.billed()
	const flying = 3
	var calls sync.WaitGroup
	m := message{max: 9000, script: script{Fault: "gate", Out: 10}}
	for range flying {
		calls.Go(func() {
			if a := child.send(token, m); a.err == nil {
				t.Errorf("%+v", a)
			}
		})
	}
	until(t, "all calls are upstream", func() bool { return up.count() == 1+flying })
	kill()
	calls.Wait()

	r := openRig(t, dir, up)
	q, _ := readRequest([]byte(m.body()))
	hold := testPrices.estimate(q, 32000, -1).Cost(9000)
	got := r.usage("r", 1)
	if want := ended + flying*hold; got.Cost != want || got.Calls != 1+flying {
		t.Errorf("%+v, want a cost of %s", got, want)
	}
	var crashed int
	if err := r.read(`SELECT COUNT(*) FROM calls WHERE state = 'crashed' AND cost = reserved AND ended IS NOT NULL AND note LIKE '%died%'`).Scan(&crashed); err != nil || crashed != flying {
		t.Errorf("%d calls are marked, %v", crashed, err)
	}
	if a := r.send(token, message{max: 1000, script: script{Out: 5}}); a.status != 200 {
		t.Errorf("the token: %+v", a)
	}
	// The budget is the old one, and what was spent counts.
	if a := r.send(token, message{model: "claude-opus-4-1", max: 20_000, pad: 150_000}); a.status != 402 {
		t.Errorf("the budget: %d", a.status)
	}
	r.agree("r")
}

// Killed again and again at any moment, with many agents who try again, as they
// do: the budget holds over all of it, also when several gateways share it.
func TestBudgetHoldsOverManyCrashes(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) { crashOften(t, 1, "") })
	t.Run("postgres", func(t *testing.T) { crashOften(t, 3, ledgertest.Postgres(t)) })
}

func crashOften(t *testing.T, gateways int, ledgerURL string) {
	up := newUpstream(t)
	close(up.gate)
	shared := func(o *Options) { o.Ledger.URL = ledgerURL }
	var last string
	var all sync.WaitGroup
	if gateways > 1 {
		// One gateway lives through it all, and sees that the books are right.
		defer openRig(t, t.TempDir(), up, shared).watch()()
	}
	for n := range gateways {
		dir := t.TempDir()
		last = dir
		all.Go(func() {
			made := 0
			for round := range 4 {
				url, token, kill := startChild(t, dir, up.URL, "GATEWAY_TEST_LEDGER="+ledgerURL, fmt.Sprint("GATEWAY_TEST_FORK=", n+1))
				child := &rig{t: t, url: url}
				var calls sync.WaitGroup
				answered := make(chan struct{}, 1000)
				for range 8 {
					calls.Go(func() {
						for {
							a := child.send(token, message{max: 4000, stream: true, pad: 2000, script: script{Out: 600}})
							if a.err != nil || a.status == 402 {
								return
							}
							select {
							case answered <- struct{}{}:
							default:
							}
						}
					})
				}
				done := make(chan struct{})
				go func() { calls.Wait(); close(done) }()
				for some := true; some && made < 10+5*round; {
					select {
					case <-answered:
						made++
					case <-done:
						some = false // there is no money left
					}
				}
				kill()
				<-done
			}
		})
	}
	all.Wait()
	r := openRig(t, last, up, shared)
	until(t, "the calls of the dead are settled", func() bool {
		var open int
		if ledgerURL == "" {
			return r.read(`SELECT COUNT(*) FROM calls WHERE state = 'in_flight'`).Scan(&open) == nil && open == 0
		}
		for num := 1; num <= gateways; num++ {
			n, err := r.ledger.InFlight(t.Context(), "r", num)
			if err != nil {
				t.Fatal(err)
			}
			open += n
		}
		return open == 0
	})
	got := r.usage("r", 0)
	if got.Cost > fork.Dollar || up.billed() > got.Cost || got.Calls == 0 {
		t.Errorf("%+v, billed %s", got, up.billed())
	}
	if err := r.ledger.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestReopenedGatewayHasTheSameBalances(t *testing.T) {
	dir, up := t.TempDir(), newUpstream(t)
	var good, revoked string
	var want [3]Spent
	t.Run("first", func(t *testing.T) {
		r := openRig(t, dir, up)
		good = r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar / 10})
		revoked = r.grant(Account{Run: "r", Fork: 2, RunBudget: fork.Dollar / 10})
		for _, token := range []string{good, revoked} {
			r.send(token, message{max: 100, stream: true, script: script{Out: 100, Read: 20, Write: 10}})
			if a := r.send(token, message{model: "claude-opus-4-1", max: 32_000, pad: 30_000}); a.status != 402 {
				t.Errorf("%+v", a)
			}
		}
		if err := r.Revoke(t.Context(), "r", 2); err != nil {
			t.Fatal(err)
		}
		for i := range want {
			want[i] = r.usage("r", i)
		}
	})
	r := openRig(t, dir, up)
	for i := range want {
		if got := r.usage("r", i); got != want[i] || got.Calls == 0 || got.Refused == 0 {
			t.Errorf("fork %d: %+v, was %+v", i, got, want[i])
		}
	}
	if a := r.send(revoked, message{max: 10}); a.status != 403 {
		t.Errorf("revoked: %+v", a)
	}
	if a := r.send(good, message{max: 10, script: script{Out: 10}}); a.status != 200 {
		t.Errorf("good: %+v", a)
	}
	r.agree("r")
}

func TestOneGatewayAtATime(t *testing.T) {
	r := newRig(t)
	_, err := Open(t.Context(), testOptions(r.dir, r.up.URL))
	if fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
	if err := r.Gateway.Close(); err != nil {
		t.Fatal(err)
	}
	g, err := Open(t.Context(), testOptions(r.dir, r.up.URL))
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefusesWhatCannotBe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("not a folder"), 0o600); err != nil {
		t.Fatal(err)
	}
	garbage := t.TempDir()
	if err := os.WriteFile(filepath.Join(garbage, "ledger.db"), []byte(strings.Repeat("this is no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	newer := t.TempDir()
	g, err := Open(t.Context(), testOptions(newer, ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", filepath.Join(newer, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*Options)
		kind   fault.Kind
	}{
		"no folder":       {func(o *Options) { o.Ledger.Dir = "" }, fault.Invalid},
		"no credentials":  {func(o *Options) { o.Credentials = nil }, fault.Invalid},
		"no prices":       {func(o *Options) { o.Prices = nil }, fault.Invalid},
		"negative output": {func(o *Options) { o.MaxOutput = -1 }, fault.Invalid},
		"a file":          {func(o *Options) { o.Ledger.Dir = file }, fault.Invalid},
		"no database":     {func(o *Options) { o.Ledger.Dir = garbage }, fault.Invalid},
		"a newer version": {func(o *Options) { o.Ledger.Dir = newer }, fault.Unsupported},
	} {
		o := testOptions(t.TempDir(), "")
		c.change(&o)
		g, err := Open(t.Context(), o)
		if fault.KindOf(err) != c.kind {
			t.Errorf("%s: kind %s, %v", name, fault.KindOf(err), err)
		}
		if g != nil {
			g.Close() // it should not be there
		}
	}
}

func TestLedgerIsForItsOwnerOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "gateway with space?&#%")
	r := openRig(t, dir, newUpstream(t))
	r.grant(Account{Run: "r", Fork: 1})
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "ledger.db")); err != nil {
		t.Error(err)
	}
}

// lock keeps the ledger from writing, as a disk can, until it is unlocked.
func (r *rig) lock() (unlock func()) {
	r.t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(r.dir, "ledger.db"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { db.Close() })
	tx, err := db.Begin()
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := tx.Exec(`UPDATE runs SET repo = repo`); err != nil {
		r.t.Fatal(err)
	}
	return func() {
		if err := tx.Rollback(); err != nil {
			r.t.Error(err)
		}
	}
}

// What is settled while the ledger cannot be written is kept until it can, and
// nothing is forwarded meanwhile.
func TestLedgerThatCannotBeWrittenStopsForwarding(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	other := r.grant(Account{Run: "r", Fork: 2})
	done := make(chan answer, 1)
	go func() { done <- r.send(token, message{max: 10, script: script{Fault: "gate", Out: 7}}) }()
	until(t, "the call is upstream", func() bool { return r.up.count() == 1 })
	unlock := r.lock()
	close(r.up.gate)
	if a := <-done; a.status != 200 {
		t.Errorf("%+v", a)
	}
	a := r.send(other, message{max: 10})
	if a.status != 503 || a.kind() != "api_error" || a.header.Get("X-Should-Retry") == "false" || r.up.count() != 1 {
		t.Errorf("%d calls were forwarded: %+v", r.up.count(), a)
	}
	if _, err := r.Grant(t.Context(), Account{Run: "r", Fork: 3}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("grant: %v", err)
	}
	unlock()
	until(t, "calls go out again", func() bool {
		return r.send(other, message{max: 10, script: script{Out: 1}}).status == 200
	})
	r.agree("r")
	if got := r.usage("r", 0); got.Cost != r.up.billed() {
		t.Errorf("%s, billed %s", got.Cost, r.up.billed())
	}
	for _, line := range []string{"the ledger cannot be written", "can be written again"} {
		if !strings.Contains(r.logs.String(), line) {
			t.Errorf("nobody is told that %s", line)
		}
	}
}

func TestClosedGatewayRefuses(t *testing.T) {
	r := newRig(t)
	r.limits.drain = time.Hour
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	calls := make(chan answer, 2)
	for _, stream := range []bool{true, false} {
		go func() { calls <- r.send(token, message{max: 10_000, stream: stream, script: script{Fault: "hang"}}) }()
	}
	until(t, "the calls are upstream", func() bool { return r.up.count() == 2 })
	for range 2 {
		if err := r.Gateway.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if a := <-calls; a.status != 503 {
			t.Errorf("cut call: %+v", a)
		}
	}
	if a := r.send(token, message{max: 10}); a.status != 503 {
		t.Errorf("%+v", a)
	}
	if _, err := r.Grant(t.Context(), Account{Run: "r", Fork: 1}); fault.KindOf(err) != fault.Unavailable {
		t.Error(err)
	}
	if err := r.Revoke(t.Context(), "r", 1); fault.KindOf(err) != fault.Unavailable {
		t.Error(err)
	}
	again := openRig(t, r.dir, r.up)
	if got := again.usage("r", 0); got.Calls != 2 || got.Cost == 0 {
		t.Errorf("%+v", got)
	}
	again.agree("r")
}
