package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// A gateway that is killed in the middle of the calls of twenty agents, and
// started again: every agent tries again by itself and comes to its end, and the
// books hold each call that reached the API once: as what it cost, or where its
// gateway died in the middle of it, as what was reserved.
func TestTwentyAgentsOutliveTheirGateway(t *testing.T) {
	const forks = 20
	scripts, err := standin.ParseScripts(strings.NewReader(`{"work": {"steps": [
		{"text": "One.", "delay": "200ms", "tools": [{"name": "Bash", "input": {"command": "true"}}]},
		{"text": "Two.", "delay": "3s", "tools": [{"name": "Bash", "input": {"command": "true"}}]},
		{"text": "Three."}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	model := standin.New(standin.Options{Scripts: scripts, Keys: []string{realKey}})
	var (
		mu      sync.Mutex
		reached int // calls that the API has seen
	)
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		reached++
		mu.Unlock()
		model.ServeHTTP(w, r)
	}))
	defer api.Close()
	defer model.Close() // before api.Close, which waits for calls
	dir := t.TempDir()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String() // the gateway is found at the same place again
	ln.Close()
	env := []string{"GATEWAY_TEST_ADDR=" + addr, fmt.Sprint("GATEWAY_TEST_FORKS=", forks)}
	tokens, kill := startGateway(t, dir, api.URL, env...)

	outputs, errs := make([]bytes.Buffer, forks), make([]bytes.Buffer, forks)
	var agents sync.WaitGroup
	for i := range forks {
		home := t.TempDir()
		cmd := exec.CommandContext(t.Context(), os.Args[0], "--session-id", fmt.Sprintf("00000000-0000-4000-8000-%012d", i), "--model", "sonnet")
		cmd.Env = []string{"GATEWAY_TEST_MINI=1", "PATH=" + os.Getenv("PATH"), "HOME=" + home, "ANTHROPIC_BASE_URL=http://" + addr, "ANTHROPIC_API_KEY=" + tokens[i]}
		cmd.Dir = home
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("Play @script work"), &outputs[i], &errs[i]
		agents.Go(func() {
			if err := cmd.Run(); err != nil {
				t.Errorf("agent %d: %v\n%s", i, err, errs[i].String())
			}
		})
	}
	// All of them are in their second call, which takes a while.
	untilLong(t, "all agents are in the middle of a call", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return reached >= 2*forks
	})
	kill()
	_, kill = startGateway(t, dir, api.URL, env...)
	agents.Wait()
	kill()

	for i := range forks {
		var last struct {
			Type    string `json:"type"`
			IsError bool   `json:"is_error"`
			Result  string `json:"result"`
		}
		lines := bytes.Split(bytes.TrimSpace(outputs[i].Bytes()), []byte("\n"))
		if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil || last.Type != "result" || last.IsError || last.Result != "Three." {
			t.Errorf("agent %d: %+v %v\n%s", i, last, err, errs[i].String())
		}
	}
	up := &upstream{Server: api}
	r := openRig(t, dir, up)
	var rows, crashed, settled, more int
	err = r.read(`SELECT COUNT(*), SUM(state = 'crashed'), SUM(state = 'settled'), SUM(state = 'crashed' AND cost <> reserved) FROM calls`).Scan(&rows, &crashed, &settled, &more)
	mu.Lock()
	defer mu.Unlock()
	// A call can have been reserved and not have left when the gateway died; none
	// that left is missing.
	if err != nil || rows < reached || rows > reached+forks || crashed == 0 || settled < 3*forks-crashed || more != 0 {
		t.Errorf("%d calls reached the API; in the books are %d: %d crashed, %d settled, %d crashed ones not at their reservation, %v", reached, rows, crashed, settled, more, err)
	}
	var billed fork.USD
	for _, q := range model.Requests() {
		billed += testPrices.Cost("sonnet", Tokens{Input: int64(q.Usage.Input), CacheRead: int64(q.Usage.CacheRead), CacheWrite5m: int64(q.Usage.Creation.FiveMinutes),
			CacheWrite1h: int64(q.Usage.Creation.OneHour), Output: int64(q.Usage.Output)})
	}
	if got := r.usage("r", 0); got.Cost < billed || got.Cost == 0 {
		t.Errorf("the books say %s, the API bills %s", got.Cost, billed)
	}
	for num := 1; num <= forks; num++ {
		if got := r.usage("r", num); got.Calls < 3 || got.Calls > 6 {
			t.Errorf("fork %d made %d calls", num, got.Calls)
		}
	}
	r.agree("r")
}

// startGateway is startChild for many forks. The second start finds their tokens
// in the ledger.
func startGateway(t *testing.T, dir, upstream string, env ...string) (tokens []string, kill func()) {
	t.Helper()
	kept := filepath.Join(dir, "tokens")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), "GATEWAY_TEST_DIR="+dir, "GATEWAY_TEST_UPSTREAM="+upstream, "GATEWAY_TEST_TOKENS="+kept), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		cmd.Process.Kill() // it may have ended
		cmd.Wait()         // it was killed
	})
	t.Cleanup(kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the gateway said %q, %v", line, err)
	}
	return strings.Fields(line), kill
}

// beGateway is the process that startGateway starts.
func beGateway(g *Gateway, forks int, addr, kept string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(kept)
	if err != nil {
		var tokens []string
		for num := range forks {
			token, err := g.Grant(context.Background(), Account{Run: "r", Fork: num + 1, RunBudget: 20 * fork.Dollar, ForkBudget: fork.Dollar})
			if err != nil {
				return err
			}
			tokens = append(tokens, token)
		}
		text = []byte(strings.Join(tokens, " "))
		if err := os.WriteFile(kept, text, 0o600); err != nil {
			return err
		}
	}
	fmt.Println(string(text))
	return g.Serve(context.Background(), ln)
}

func untilLong(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for tick := time.NewTicker(10 * time.Millisecond); ; <-tick.C {
		if ok() {
			tick.Stop()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}

// Fifty agents as fast as they can, and an API that takes ten calls a second: it
// has to refuse next to none of them, no agent sees a refusal, and all get on at
// the same pace.
func TestFiftyForksShareTenCallsASecond(t *testing.T) {
	const (
		forks  = 50
		each   = 5
		perSec = 10.0
		burst  = 10.0
	)
	var (
		mu            sync.Mutex
		left          = burst
		last          = time.Now()
		seen, refused int
	)
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		mu.Lock()
		now := time.Now()
		left = min(burst, left+now.Sub(last).Seconds()*perSec)
		last = now
		seen++
		ok := left >= 1
		if ok {
			left--
		} else {
			refused++
		}
		mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		if !ok {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			io.WriteString(w, `{"type":"error","error":{"type":"rate_limit_error","message":"slow down"}}`)
			return
		}
		io.WriteString(w, `{"model":"claude-sonnet-5-5","usage":{"input_tokens":5,"output_tokens":7}}`)
	}))
	defer api.Close()
	r := openRig(t, t.TempDir(), &upstream{Server: api}, func(o *Options) {
		o.Rate = 0 // as in a worker
		o.Ledger = ledger.Options{Dir: o.Ledger.Dir}
	})
	ends := make([]time.Duration, forks)
	var agents sync.WaitGroup
	start := time.Now()
	for i := range forks {
		token := r.grant(Account{Run: "r", Fork: i + 1, RunBudget: 100 * fork.Dollar})
		agents.Go(func() {
			for range each {
				if a := r.send(token, message{max: 100}); a.status != 200 {
					t.Errorf("fork %d: %d %s %v", i+1, a.status, a.body, a.err)
					return
				}
			}
			ends[i] = time.Since(start)
		})
	}
	agents.Wait()
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(ends)
	t.Logf("%d calls, %d refused, forks ended after %s to %s", seen, refused, ends[0].Round(time.Millisecond), ends[forks-1].Round(time.Millisecond))
	if refused*50 > seen {
		t.Errorf("%d of %d calls were refused: more than 2 %%", refused, seen)
	}
	// Without fairness the first fork is done after its own five calls, within a
	// second or two. With it, it waits for all others in each of its turns; the
	// pace is jittered, so which of fifty is first, and by how much, is chance.
	if ends[0]*5 < ends[forks-1] {
		t.Errorf("the first fork ended after %s, the last after %s", ends[0], ends[forks-1])
	}
}
