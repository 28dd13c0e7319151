package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// watch checks, until it is stopped, that no budget is ever exceeded by what is
// spent and reserved together.
func (r *rig) watch() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := r.ledger.Check(ctx); err != nil && ctx.Err() == nil {
				r.t.Error(err)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() { cancel(); <-done }
}

func TestFourForksNeverSpendMoreThanTheirDollar(t *testing.T) {
	r := newRig(t)
	defer r.watch()()
	const budget = fork.Dollar
	var agents sync.WaitGroup
	for num := 1; num <= 4; num++ {
		token := r.grant(Account{Run: "r", Fork: num, RunBudget: budget})
		agents.Go(func() {
			for {
				// A turn costs up to $0.20, and asks for much more.
				a := r.send(token, message{max: 128_000, stream: true, pad: 40_000, script: script{Out: 15_000}})
				switch a.status {
				case 200:
				case 402:
					if a.kind() != "billing_error" || a.header.Get("X-Should-Retry") != "false" {
						t.Errorf("%+v", a)
					}
					return
				default:
					t.Errorf("%+v", a)
					return
				}
			}
		})
	}
	agents.Wait()
	got := r.usage("r", 0)
	if got.Cost > budget || r.up.billed() > budget || got.Cost != r.up.billed() {
		t.Errorf("spent %s, billed %s", got.Cost, r.up.billed())
	}
	if got.Cost < budget*9/10 {
		t.Errorf("only %s was spent: agents were refused too early", got.Cost)
	}
	if got.Refused != 4 {
		t.Errorf("%d refusals", got.Refused)
	}
}

// Whatever agents and the API do, in whatever order: nothing is ever spent that
// was not there.
func TestSpentNeverExceedsABudget(t *testing.T) {
	forks, calls := 12, 40
	if testing.Short() {
		forks, calls = 6, 10
	}
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			var turns atomic.Int64 // time flies, and batches are due
			r := newRig(t, func(o *Options) {
				o.now = func() time.Time { return time.Now().Add(time.Duration(turns.Add(1)) * time.Second) }
			})
			r.limits.wait = 300 * time.Millisecond
			// An API that falls silent is given up. A time-out this short can hit
			// one that does not, too: then nobody knows what it bills.
			silent := seed == 2
			if silent {
				r.limits.header, r.limits.idle = 30*time.Millisecond, 30*time.Millisecond
			}
			close(r.up.gate)
			stop := r.watch()
			var agents sync.WaitGroup
			runs := []string{"a", "b", "c"}
			budgets := map[string]fork.USD{"a": fork.Dollar / 2, "b": fork.Dollar / 20, "c": 0}
			forkBudgets := map[string]fork.USD{"a": fork.Dollar / 5, "b": 0, "c": fork.Dollar / 10}
			for n := range forks {
				run := runs[n%len(runs)]
				account := Account{Run: run, Fork: n + 1, RunBudget: budgets[run], ForkBudget: forkBudgets[run]}
				token := r.grant(account)
				rnd := rand.New(rand.NewPCG(seed, uint64(n)))
				agents.Go(func() {
					var side sync.WaitGroup // sub-agents
					defer side.Wait()
					for range calls {
						m := randomMessage(rnd, silent)
						ctx, cancel := context.WithCancel(t.Context())
						if rnd.IntN(6) == 0 {
							time.AfterFunc(time.Duration(rnd.IntN(5000))*time.Microsecond, cancel)
						}
						call := func() {
							defer cancel()
							if a := r.do(ctx, http.MethodPost, "/v1/messages", token, m.body()); a.status == 403 || a.status == 400 || a.status == 404 {
								t.Errorf("%+v", a)
							}
						}
						switch rnd.IntN(8) {
						case 0:
							side.Go(func() { defer cancel(); r.randomBatch(ctx, token, m) })
						case 1, 2:
							side.Go(call)
						default:
							call()
						}
						if rnd.IntN(30) == 0 {
							side.Wait()
							var err error
							if token, err = r.Grant(t.Context(), account); err != nil {
								t.Error(err)
								return
							}
						}
					}
				})
			}
			ended, ender := make(chan struct{}), make(chan struct{})
			go func() { // the API ends batches, and gateways look for them
				defer close(ender)
				for tick := time.NewTicker(5 * time.Millisecond); ; {
					select {
					case <-ended:
						tick.Stop()
						return
					case <-tick.C:
						r.up.end()
						r.sweep(t.Context())
					}
				}
			}()
			agents.Wait()
			for _, run := range runs {
				r.idle(run)
			}
			close(ended)
			<-ender
			bound := fork.USD(0) // what the forks are told in the end
			for n := range forks {
				r.settle(runs[n%len(runs)], n+1)
				bound += r.usage(runs[n%len(runs)], n+1).Cost
			}
			r.up.set(func(b *batchesUpstream) { b.reading = "" })
			r.up.end()
			r.sweep(t.Context())
			stop()
			if billed := r.up.billed(); bound < billed && !silent {
				t.Errorf("the forks were told %s, the API bills %s", bound, billed)
			}
			var total Spent
			for _, run := range runs {
				s := r.usage(run, 0)
				total.Cost, total.Calls, total.Refused = total.Cost+s.Cost, total.Calls+s.Calls, total.Refused+s.Refused
				if b := budgets[run]; b > 0 && s.Cost > b {
					t.Errorf("run %s spent %s of %s", run, s.Cost, b)
				}
			}
			// The gateway charges what cannot be known at a bound of it.
			if billed := r.up.billed(); total.Cost < billed && !silent {
				t.Errorf("the books say %s, the API bills %s", total.Cost, billed)
			}
			if total.Calls == 0 || total.Refused == 0 || len(r.up.batches.list) == 0 {
				t.Errorf("nothing was tried: %+v, %d batches", total, len(r.up.batches.list))
			}
			r.agree(runs...)
		})
	}
}

// randomBatch makes a batch, and reads or cancels it or forgets it.
func (r *rig) randomBatch(ctx context.Context, token string, m message) {
	m.max = m.max/20 + 1
	all := []message{m, {max: m.max/2 + 1, script: script{Out: m.script.Out, Fault: []string{"", errored, "early"}[m.pad%3]}}, {model: "opus", max: 10, script: script{Out: 5}}}
	all[0].script = script{Out: m.script.Out}
	if m.pad%7 == 0 {
		r.up.set(func(b *batchesUpstream) {
			b.making, b.slow = []string{"", "cut", "500", "unmade"}[m.pad%4], m.pad%2 == 0
			b.reading = []string{"", "", "cut", "short"}[m.pad%4]
		})
	}
	a := r.do(ctx, http.MethodPost, batchesPath, token, batchOf(all...))
	var b struct {
		ID string `json:"id"`
	}
	if a.err != nil || a.status != 200 || json.Unmarshal([]byte(a.body), &b) != nil {
		if a.status == 403 || a.status == 400 || a.status == 404 {
			r.t.Errorf("%+v", a)
		}
		return
	}
	switch m.pad % 5 {
	case 0:
		r.do(ctx, http.MethodPost, batchesPath+"/"+b.ID+"/cancel", token, "")
	case 1:
		r.do(ctx, http.MethodDelete, batchesPath+"/"+b.ID, token, "")
	}
	if m.pad%2 == 0 {
		r.do(ctx, http.MethodGet, batchesPath+"/"+b.ID+"/results", token, "")
	}
}

func randomMessage(r *rand.Rand, silent bool) message {
	m := message{
		model:  []string{"claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-5-5"}[r.IntN(3)],
		max:    r.Int64N(60_000) + 1,
		stream: r.IntN(3) > 0,
		pad:    r.IntN(20_000),
		script: script{Out: r.Int64N(8000)},
	}
	switch r.IntN(12) {
	case 0:
		m.script.Fault = "cut"
	case 1:
		m.script.Fault = "error"
	case 2:
		m.script.Status, m.script.Body = []int{413, 500, 503}[r.IntN(3)], "{}"
	case 3:
		m.script.Fault = []string{"reset", "nothing", "error first"}[r.IntN(3)]
		if silent {
			m.script.Fault = []string{"hang", "stall"}[r.IntN(2)]
		}
	case 4:
		m.script.Fault = "gate"
	}
	return m
}

// agree checks that the books are in order, and that nothing is in flight.
func (r *rig) agree(runs ...string) {
	r.t.Helper()
	if err := r.ledger.Check(r.t.Context()); err != nil {
		r.t.Error(err)
	}
	for _, run := range runs { // of a ledger in a file
		var open int
		if err := r.read(`SELECT COUNT(*) FROM calls WHERE run = ? AND state = 'in_flight'`, run).Scan(&open); err != nil || open != 0 {
			r.t.Errorf("run %s: %d calls are in flight, %v", run, open, err)
		}
	}
}

func TestTokensAreCountedForNothing(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 1}) // a nano-dollar
	if a := r.send(token, message{max: 1}); a.status != 402 {
		t.Errorf("%+v", a)
	}
	if a := r.do(t.Context(), http.MethodPost, "/v1/messages/count_tokens", token, message{pad: 600}.body()); a.status != 200 || !strings.Contains(a.body, "input_tokens") {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r", 1); got.Cost != 0 || got.Calls != 0 || got.Refused != 1 {
		t.Errorf("%+v", got)
	}
}

func TestWithoutABudgetNothingWaits(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	var calls sync.WaitGroup
	for range 20 {
		calls.Go(func() {
			if a := r.send(token, message{max: 32_000, script: script{Fault: "gate", Out: 1}}); a.status != 200 {
				t.Errorf("%+v", a)
			}
		})
	}
	until(t, "all calls are upstream at once", func() bool { return r.up.count() == 20 })
	close(r.up.gate)
	calls.Wait()
}

func TestCallWaitsForWhatOthersHold(t *testing.T) {
	r := newRig(t)
	a1 := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar / 2})
	a2 := r.grant(Account{Run: "r", Fork: 2, RunBudget: fork.Dollar / 2})
	first, second := make(chan answer, 1), make(chan answer, 1)
	go func() { first <- r.send(a1, message{max: 60_000, script: script{Fault: "gate", Out: 10}}) }()
	until(t, "the first call is upstream", func() bool { return r.up.count() == 1 })
	// The first holds $0.32 and more of $0.50; the second would get a clamped
	// answer now, and waits for a whole one instead.
	go func() { second <- r.send(a2, message{max: 32_000, pad: 60_000, script: script{Out: 10}}) }()
	until(t, "the second waits", func() bool {
		return r.ledger.Waiting() == 1
	})
	close(r.up.gate)
	for _, c := range []chan answer{first, second} {
		if a := <-c; a.status != 200 {
			t.Errorf("%+v", a)
		}
	}
	if got := r.usage("r", 0); got.Refused != 0 || got.Calls != 2 {
		t.Errorf("%+v", got)
	}
}

func TestCallThatWaitsTooLongIsToldToComeAgain(t *testing.T) {
	r := newRig(t)
	r.limits.wait = 30 * time.Millisecond
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar / 3})
	first := make(chan answer, 1)
	go func() { first <- r.send(token, message{max: 32_000, script: script{Fault: "gate", Out: 10}}) }()
	until(t, "the first call is upstream", func() bool { return r.up.count() == 1 })
	a := r.send(token, message{max: 32_000})
	if a.status != 429 || a.header.Get("Retry-After") != "5" || a.header.Get("X-Should-Retry") == "false" {
		t.Errorf("%+v", a)
	}
	close(r.up.gate)
	<-first
	if got := r.usage("r", 0); got.Refused != 0 {
		t.Errorf("%+v", got)
	}
	if n := r.ledger.Waiting(); n != 0 {
		t.Errorf("%d calls still wait", n)
	}
}

func TestWaitingCallsOfARevokedForkAreRefused(t *testing.T) {
	r := newRig(t)
	a1 := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar / 3})
	a2 := r.grant(Account{Run: "r", Fork: 2, RunBudget: fork.Dollar / 3})
	first, second := make(chan answer, 1), make(chan answer, 1)
	go func() { first <- r.send(a1, message{max: 32_000, script: script{Fault: "gate", Out: 10}}) }()
	until(t, "the first call is upstream", func() bool { return r.up.count() == 1 })
	go func() { second <- r.send(a2, message{max: 32_000}) }()
	until(t, "the second waits", func() bool {
		return r.ledger.Waiting() == 1
	})
	if err := r.Revoke(t.Context(), "r", 2); err != nil {
		t.Fatal(err)
	}
	if a := <-second; a.status != 403 {
		t.Errorf("%+v", a)
	}
	close(r.up.gate)
	<-first
}

func TestRefusalNamesTheBudgetAndWhatIsLeft(t *testing.T) {
	r := newRig(t)
	ofFork := r.grant(Account{Run: "r1", Fork: 7, RunBudget: fork.Dollar, ForkBudget: fork.Dollar / 100})
	a := r.send(ofFork, message{max: 10_000, pad: 100_000})
	want := "The budget of fork r1/7 does not cover this call: $0.0100 of $0.0100 is left, and the call may cost $0."
	if a.status != 402 || a.kind() != "billing_error" || a.header.Get("X-Should-Retry") != "false" || !strings.Contains(a.body, want) {
		t.Errorf("%+v", a)
	}
	ofRun := r.grant(Account{Run: "r2", Fork: 1, RunBudget: 1})
	if a := r.send(ofRun, message{max: 10_000}); a.status != 402 || !strings.Contains(a.body, "The budget of run r2 ") {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r1", 7); got.Refused != 1 || got.Calls != 0 || got.Cost != 0 {
		t.Errorf("%+v", got)
	}
	// More money for the run lets it go on.
	if err := r.SetBudget(t.Context(), "r2", 0, fork.Dollar); err != nil {
		t.Fatal(err)
	}
	if a := r.send(ofRun, message{max: 10_000}); a.status != 200 {
		t.Errorf("%+v", a)
	}
	if r.up.count() != 1 {
		t.Errorf("%d calls were forwarded", r.up.count())
	}
}

// A body of rare letters can have a token for every byte. No call costs more
// than what was reserved for it, the first one neither.
func TestDensePromptIsReservedByTheByte(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	m := message{max: 10, pad: 30_000, script: script{Read: 28_000, Out: 1}}
	if a := r.send(token, m); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	if !strings.Contains(r.logs.String(), "level=DEBUG msg=\"call settled\"") {
		t.Error("the call is not in the log")
	}
	if strings.Contains(r.logs.String(), "cost more than was reserved") {
		t.Errorf("it cost more than was reserved:\n%s", r.logs)
	}
	// By the byte this body may cost more than there is.
	if a := r.send(token, message{model: "claude-opus-5-5", max: 10, pad: 300_000, script: script{Out: 1}}); a.status != 402 {
		t.Errorf("%d", a.status)
	}
}

// What a conversation has in common with one that was answered is reserved by
// what that one had, and not by the byte.
func TestKnownPartOfAPromptIsReservedByWhatItCost(t *testing.T) {
	r := newRig(t)
	first := r.grant(Account{Run: "r", Fork: 1})
	other := r.grant(Account{Run: "r", Fork: 2})
	reserved := func(token string, m message) (n int64) {
		t.Helper()
		if a := r.send(token, m); a.status != 200 {
			t.Fatalf("%+v", a)
		}
		if err := r.read(`SELECT reserved FROM calls ORDER BY id DESC LIMIT 1`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	m := message{max: 1, pad: 200_000, script: script{Out: 1}}
	byByte := reserved(first, m)
	for name, c := range map[string]struct {
		token string
		m     message
	}{"the same again": {first, m}, "another fork that begins alike": {other, m}, "one that goes on": {first, message{max: 1, pad: 204_000, script: script{Out: 1}}}} {
		if n := reserved(c.token, c.m); n > byByte/3 || n < byByte/6 {
			t.Errorf("%s: %d are reserved, by the byte %d", name, n, byByte)
		}
	}
	for name, m := range map[string]message{"another model": {model: "claude-opus-5-5", max: 1, pad: 200_000, script: script{Out: 1}}} {
		if n := reserved(first, m); n < byByte {
			t.Errorf("%s: %d are reserved", name, n)
		}
	}
	if strings.Contains(r.logs.String(), "cost more than was reserved") {
		t.Errorf("it cost more than was reserved:\n%s", r.logs)
	}
}

func TestGrantRefusesAccountsThatCannotBe(t *testing.T) {
	r := newRig(t)
	for _, a := range []Account{{}, {Run: "r"}, {Fork: 1}, {Run: "r", Fork: -1}, {Run: "r", Fork: 1, RunBudget: -1}, {Run: "r", Fork: 1, ForkBudget: -1}} {
		if _, err := r.Grant(t.Context(), a); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%+v: %v", a, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Grant(ctx, Account{Run: "r", Fork: 1}); fault.KindOf(err) != fault.Cancelled {
		t.Error(err)
	}
}
