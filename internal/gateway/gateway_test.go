package gateway

import (
	"bufio"
	"compress/gzip"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func TestBodyPassesByteForByte(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	body := "  {\"stream\" : false,\n\t\"max_tokens\":\t 100 , \"mo\\u0064el\":\"claude-sonnet-5-5\", \"metadata\":{\"out\":3},\"x\":[1.50,1e2,\"\\/\"] }\n\n"
	if a := r.do(t.Context(), "POST", "/v1/messages?beta=true&x=%20y", token, body); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	got := r.up.last()
	if diff := cmp.Diff(body, string(got.body)); diff != "" {
		t.Error(diff)
	}
	if got.method != "POST" || got.path != "/v1/messages" || got.query != "beta=true&x=%20y" {
		t.Errorf("%s %s?%s", got.method, got.path, got.query)
	}
	r.send(token, message{max: 100_000, script: script{Out: 1}})
	want := strings.Replace(message{max: 100_000, script: script{Out: 1}}.body(), `"max_tokens":100000`, `"max_tokens":32000`, 1)
	if diff := cmp.Diff(want, string(r.up.last().body)); diff != "" {
		t.Error(diff)
	}
}

func TestHeadersAreScrubbedBothWays(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	a := r.send(token, message{max: 10, script: script{Out: 1}},
		"Authorization", "Bearer other", "Cookie", "a=b", "Proxy-Authorization", "x", "X-Forwarded-For", "10.0.0.1", "Idempotency-Key", "k",
		"Accept-Encoding", "gzip", "Connection", "X-Drop, keep-alive", "X-Drop", "1", "Anthropic-Beta", "one,two", "Anthropic-Version", "2023-06-01",
		"X-Stainless-Retry-Count", "3", "X-Claude-Code-Session-Id", "s", "User-Agent", "claude-cli/1")
	if a.status != 200 {
		t.Fatalf("%+v", a)
	}
	got := r.up.last().header
	got.Del("Content-Length")
	want := http.Header{
		"X-Api-Key": {realKey}, "Accept-Encoding": {"identity"}, "Content-Type": {"application/json"}, "Anthropic-Beta": {"one,two"}, "Anthropic-Version": {"2023-06-01"},
		"X-Stainless-Retry-Count": {"3"}, "X-Claude-Code-Session-Id": {"s"}, "User-Agent": {"claude-cli/1"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("to the API: %s", diff)
	}
	for _, key := range []string{"Set-Cookie", "Anthropic-Organization-Id", "X-Hop"} {
		if a.header.Get(key) != "" {
			t.Errorf("the agent sees %s: %s", key, a.header.Get(key))
		}
	}
	if a.header.Get("Request-Id") != "req_1" || a.header.Get("Anthropic-Ratelimit-Requests-Remaining") != "7" {
		t.Errorf("the agent does not see what it needs: %v", a.header)
	}
}

func TestAuthTokenIsSentAsBearer(t *testing.T) {
	up := newUpstream(t)
	r := openRig(t, t.TempDir(), up, func(o *Options) {
		o.Credentials = func(context.Context) (Credentials, error) {
			return Credentials{AuthToken: realKey + "\n", BaseURL: up.URL + "/proxy/"}, nil
		}
	})
	token := r.grant(Account{Run: "r", Fork: 1})
	req, _ := http.NewRequestWithContext(t.Context(), "POST", r.url+"/v1/messages", strings.NewReader(message{max: 1}.body()))
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json; charset=utf-8")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	got := up.last()
	if res.StatusCode != 200 || got.header.Get("Authorization") != "Bearer "+realKey || got.header.Get("X-Api-Key") != "" || got.path != "/proxy/v1/messages" {
		t.Errorf("%d %s %v", res.StatusCode, got.path, got.header)
	}
}

func TestOnlyNamedCallsPass(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"POST", "/v1/messages/count_tokens", 200},
		{"GET", "/v1/models", 200},
		{"GET", "/v1/models?limit=5", 200},
		{"GET", "/v1/models/claude-opus-5-5", 200},
		{"GET", "/v1/messages", 404},
		{"PUT", "/v1/messages", 404},
		{"POST", "/v1/models", 404},
		{"POST", "/v1/batches", 404},
		{"GET", "/v1/batches/batch_1", 404},
		{"PUT", "/v1/messages/batches", 404},
		{"POST", "/v1/messages/batches/msgbatch_1", 404},
		{"GET", "/v1/messages/batches/msgbatch_1/cancel", 404},
		{"GET", "/v1/models/..", 404},
		{"GET", "/v1/models/a%2fb", 404},
		{"GET", "/v1/models/a/b", 404},
		{"POST", "/v1/messages/", 404},
		{"POST", "/v1//messages", 404},
		{"POST", "/v1/messages%2fcount_tokens", 404},
		{"GET", "/v1/organizations/me", 404},
		{"POST", "/v1/files", 404},
		{"GET", "/", 404},
		{"HEAD", "/v1/models", 404},
		{"DELETE", "/v1/models/x", 404},
	} {
		before := r.up.count()
		a := r.do(t.Context(), c.method, c.path, token, `{"model":"claude-opus-5-5"}`)
		if a.status != c.status {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, a.status, c.status)
		}
		if passed := r.up.count() > before; passed != (c.status == 200) {
			t.Errorf("%s %s: passed on: %v", c.method, c.path, passed)
		}
	}
	if s := r.usage("r", 0); s.Cost != 0 || s.Calls != 0 {
		t.Errorf("free calls are booked: %+v", s)
	}
}

func TestTokenIsGoodForItsForkOnlyAndUntilRevoked(t *testing.T) {
	r := newRig(t)
	first := r.grant(Account{Run: "r", Fork: 1})
	other := r.grant(Account{Run: "r", Fork: 2})
	if a := r.send(first, message{max: 10, script: script{Out: 10}}); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	if s := r.usage("r", 2); s.Calls != 0 {
		t.Errorf("another fork paid: %+v", s)
	}
	second := r.grant(Account{Run: "r", Fork: 1})
	for name, token := range map[string]string{"none": "", "invented": "sbxt-x", "replaced": first, "the real key": realKey} {
		a := r.send(token, message{max: 10})
		if a.status != 403 || a.kind() != "permission_error" || a.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s: %+v", name, a)
		}
	}
	if a := r.send(second, message{max: 10}); a.status != 200 {
		t.Errorf("%+v", a)
	}
	for range 2 {
		if err := r.Revoke(t.Context(), "r", 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Revoke(t.Context(), "nobody", 7); err != nil {
		t.Error(err)
	}
	if a := r.send(second, message{max: 10}); a.status != 403 {
		t.Errorf("revoked: %+v", a)
	}
	if a := r.send(other, message{max: 10}); a.status != 200 {
		t.Errorf("a sibling: %+v", a)
	}
	if s := r.usage("r", 0); s.Calls != 3 {
		t.Errorf("%+v", s)
	}
}

func TestUsageIsWhatTheAPITold(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 3})
	var want fork.USD
	for _, stream := range []bool{false, true} {
		m := message{model: "claude-opus-5-5", max: 4000, stream: stream, pad: 9000, script: script{Out: 111, Read: 1000, Write: 500}}
		a := r.send(token, m)
		if a.status != 200 || a.err != nil {
			t.Fatalf("%+v", a)
		}
		in := int64(len(m.body())/4) - 1500
		want += testPrices.Cost("opus", Tokens{Input: in, CacheRead: 1000, CacheWrite5m: 500, Output: 111})
	}
	got := r.usage("r", 3)
	if got.Cost != want || got.Cost != r.up.billed() || got.Calls != 2 || got.OutputTokens != 222 || got.CacheReadTokens != 2000 || got.CacheWriteTokens != 1000 {
		t.Errorf("%+v, want a cost of %s", got, want)
	}
	if got != r.usage("r", 0) {
		t.Errorf("the run has %+v", r.usage("r", 0))
	}
	if s := r.usage("nobody", 0); s != (Spent{}) {
		t.Errorf("%+v", s)
	}
}

// A model may answer that was not asked, when the API falls back.
func TestModelThatAnsweredIsBilled(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	m := message{model: "claude-haiku-5-5", max: 100, script: script{Out: 100, Model: "claude-opus-5-5-20260901"}}
	if a := r.send(token, m); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	if got, want := r.usage("r", 0).Cost, r.up.billed(); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestStreamPassesAsItComes(t *testing.T) {
	r := newRig(t)
	r.limits.drain = 20 * time.Millisecond
	token := r.grant(Account{Run: "r", Fork: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "POST", r.url+"/v1/messages", strings.NewReader(message{max: 1000, stream: true, script: script{Out: 200, Fault: "stall"}}.body()))
	req.Header.Set("X-Api-Key", token)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	// The upstream says half and then waits for ever: what it said must come.
	lines := bufio.NewScanner(res.Body)
	for n := 0; n < 3; {
		if !lines.Scan() {
			t.Fatal("the stream does not pass until its end")
		}
		if strings.Contains(lines.Text(), "content_block_delta") && strings.HasPrefix(lines.Text(), "data:") {
			n++
		}
	}
	cancel() // the agent goes away
	r.idle("r")
	s := r.usage("r", 1)
	if s.Calls != 1 || s.Cost < r.up.billed() || s.Cost > 2*r.up.billed() {
		t.Errorf("%+v, billed %s", s, r.up.billed())
	}
}

// An agent makes its next call when it sees the end of the last one, which may
// be before the connection is done.
func TestCallIsSettledBeforeItsAgentSeesTheEnd(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	m := message{max: 1000, stream: true, script: script{Out: 200, Fault: "linger"}}
	req, _ := http.NewRequestWithContext(t.Context(), "POST", r.url+"/v1/messages", strings.NewReader(m.body()))
	req.Header.Set("X-Api-Key", token)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() && !strings.Contains(lines.Text(), `"message_stop"`) {
	}
	if got := r.usage("r", 1); got.Calls != 1 || got.Cost != r.up.billed() {
		t.Errorf("%+v, billed %s", got, r.up.billed())
	}
}

// An agent that leaves its calls must not get them cheaper: what the model says
// after the agent has left is billed too.
func TestCallThatItsAgentLeftIsBilledToItsEnd(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	for n, stream := range []bool{false, true} {
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan answer)
		go func() {
			left <- r.do(ctx, "POST", "/v1/messages", token, message{max: 5000, stream: stream, script: script{Out: 4000, Fault: "gate"}}.body())
		}()
		until(t, "the call is upstream", func() bool { return r.up.count() == n+1 })
		cancel()
		if a := <-left; a.err == nil {
			t.Fatalf("%+v", a)
		}
		r.up.gate <- struct{}{}
		r.idle("r")
	}
	if got := r.usage("r", 1); got.Cost != r.up.billed() || got.OutputTokens != 8000 {
		t.Errorf("%+v, billed %s", got, r.up.billed())
	}
}

func TestCallThatItsAgentLeftDoesNotGoOnForEver(t *testing.T) {
	r := newRig(t)
	r.limits.drain = 20 * time.Millisecond
	token := r.grant(Account{Run: "r", Fork: 1})
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan answer)
	m := message{max: 5000, script: script{Fault: "hang"}}
	go func() { left <- r.do(ctx, "POST", "/v1/messages", token, m.body()) }()
	until(t, "the call is upstream", func() bool { return r.up.count() == 1 })
	cancel()
	<-left
	r.idle("r")
	q, _ := readRequest([]byte(m.body()))
	if got, want := r.usage("r", 1).Cost, testPrices.estimate(q, 32000, -1).Cost(5000); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestACallThatCameTooFastIsSentAgainAndPaidOnce(t *testing.T) {
	for _, status := range []int{429, 529} {
		r := newRig(t)
		token := r.grant(Account{Run: "r", Fork: 1})
		a := r.send(token, message{max: 1000, stream: true, script: script{Status: status, Times: 2, Out: 500, Header: map[string]string{"Retry-After": "0"}}})
		r.idle("r")
		if a.status != 200 || a.err != nil || r.up.count() != 3 {
			t.Errorf("%d: answered %d, %v after %d calls, want 200 after 3", status, a.status, a.err, r.up.count())
		}
		if got := r.usage("r", 1); got.Cost != r.up.billed() || got.Cost == 0 || got.Calls != 1 {
			t.Errorf("%d: %+v, billed %s", status, got, r.up.billed())
		}
	}
}

func TestACallThatAlwaysComesTooFastIsFreeAndItsAgentIsTold(t *testing.T) {
	for _, status := range []int{429, 529} {
		r := newRig(t)
		r.limits.wait = 50 * time.Millisecond
		token := r.grant(Account{Run: "r", Fork: 1})
		for _, stream := range []bool{false, true} {
			a := r.send(token, message{max: 1000, stream: stream, script: script{Status: status, Body: "x", Header: map[string]string{"Retry-After": "7"}}})
			want, after := status, "7"
			if stream { // the first one's answer holds this one back
				want, after = 429, "5"
			}
			if a.status != want || a.header.Get("Retry-After") != after || a.header.Get("X-Should-Retry") == "false" {
				t.Errorf("answered %d, %v, want %d and to come again after %s s", a.status, a.header, want, after)
			}
		}
		r.idle("r")
		if got := r.usage("r", 1); got.Cost != 0 || got.Calls != 2 || r.up.count() != 1 {
			t.Errorf("%+v of %d calls", got, r.up.count())
		}
	}
}

func TestEveryEndingHasItsPrice(t *testing.T) {
	r := newRig(t)
	for i, c := range []struct {
		name   string
		m      message
		status int // of the answer; 0: it breaks off before
		broken bool
		price  string // "free", "billed" (what the API bills, at least), "prompt" or "whole"
		state  string
	}{
		{"400", message{script: script{Status: 400, Body: `{"type":"error"}`}}, 400, false, "free", "failed"},
		{"503", message{stream: true, script: script{Status: 503, Body: `x`}}, 503, false, "free", "failed"},
		{"302", message{script: script{Status: 302, Header: map[string]string{"Location": "http://127.0.0.1:1/"}}}, 302, false, "free", "failed"},
		{"error event first", message{stream: true, script: script{Fault: "error first"}}, 200, false, "free", "failed"},
		{"error event later", message{stream: true, script: script{Fault: "error"}}, 200, false, "billed", "settled"},
		{"cut stream", message{stream: true, script: script{Fault: "cut"}}, 200, true, "billed", "settled"},
		{"stream cut before it began", message{stream: true, script: script{Fault: "nothing"}}, 200, true, "prompt", "failed"},
		{"reset, stream", message{stream: true, script: script{Fault: "reset"}}, 502, false, "prompt", "failed"},
		{"reset, no stream", message{script: script{Fault: "reset"}}, 502, false, "whole", "failed"},
		{"cut answer", message{script: script{Fault: "cut"}}, 502, false, "whole", "settled"},
		{"no usage", message{script: script{Body: `{"type":"message"}`}}, 200, false, "whole", "settled"},
		{"no JSON", message{script: script{Body: `<html>`}}, 200, false, "whole", "settled"},
		{"204", message{script: script{Status: 204}}, 204, false, "whole", "settled"},
		{"an odd encoding", message{script: script{Body: "x", Header: map[string]string{"Content-Encoding": "br"}}}, 200, false, "whole", "settled"},
	} {
		run := fmt.Sprintf("run%d", i)
		token := r.grant(Account{Run: run, Fork: 1})
		c.m.max, c.m.pad, c.m.script.Out = 2000, 5000, 1000
		before := r.up.billed()
		a := r.send(token, c.m)
		r.idle(run)
		got, billed := r.usage(run, 1), r.up.billed()-before
		if a.status != c.status || (a.err != nil) != c.broken {
			t.Errorf("%s: answered %d, %v", c.name, a.status, a.err)
		}
		q, _ := readRequest([]byte(c.m.body()))
		ask := testPrices.estimate(q, 32000, -1)
		ok := false
		switch c.price {
		case "free":
			ok = got.Cost == 0
		case "billed":
			ok = got.Cost >= billed && got.Cost < 3*billed && billed > 0
		case "prompt":
			ok = got.Cost == ask.Fixed
		case "whole":
			ok = got.Cost == ask.Cost(2000)
		}
		if !ok || got.Calls != 1 {
			t.Errorf("%s: %+v, billed %s, want %s (%s + %s)", c.name, got, billed, c.price, ask.Fixed, ask.Cost(2000)-ask.Fixed)
		}
		var state string
		if err := r.read(`SELECT state FROM calls WHERE run = ?`, run).Scan(&state); err != nil || state != c.state {
			t.Errorf("%s: state %q, %v", c.name, state, err)
		}
		if c.status == 302 && a.header.Get("Location") != "" {
			t.Errorf("the agent is sent elsewhere: %v", a.header)
		}
	}
}

// read asks the ledger's file, when all that happened is written.
func (r *rig) read(query string, args ...any) interface{ Scan(...any) error } {
	r.t.Helper()
	r.usage("nobody", 1)
	db, err := sql.Open("sqlite", filepath.Join(r.dir, "ledger.db")+"?_pragma=query_only(1)")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { db.Close() })
	return db.QueryRowContext(r.t.Context(), query, args...)
}

func TestCallThatNeverLeftCostsNothing(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := "http://" + ln.Addr().String()
	ln.Close()
	up := newUpstream(t)
	r := openRig(t, t.TempDir(), up, func(o *Options) {
		o.Credentials = func(context.Context) (Credentials, error) { return Credentials{APIKey: realKey, BaseURL: dead}, nil }
	})
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	for _, stream := range []bool{false, true} {
		a := r.send(token, message{max: 100, stream: stream})
		if a.status != 502 || a.kind() != "api_error" || strings.Contains(a.body, "127.0.0.1") {
			t.Errorf("%+v", a)
		}
	}
	if s := r.usage("r", 0); s.Cost != 0 || s.Calls != 2 {
		t.Errorf("%+v", s)
	}
}

func TestSilentUpstreamIsGivenUp(t *testing.T) {
	r := newRig(t)
	r.limits.header, r.limits.idle = 50*time.Millisecond, 50*time.Millisecond
	token := r.grant(Account{Run: "r", Fork: 1})
	if a := r.send(token, message{max: 100, stream: true, script: script{Fault: "hang"}}); a.status != 504 {
		t.Errorf("%+v", a)
	}
	if a := r.send(token, message{max: 1000, stream: true, script: script{Out: 500, Fault: "stall"}}); a.status != 200 || a.err == nil {
		t.Errorf("%+v", a)
	}
	r.idle("r")
	if s := r.usage("r", 0); s.Calls != 2 || s.Cost == 0 {
		t.Errorf("%+v", s)
	}
}

func TestRefusedKeyIsFinal(t *testing.T) {
	up := newUpstream(t)
	const wrong = "sk-ant-WRONG-key"
	r := openRig(t, t.TempDir(), up, func(o *Options) {
		o.Credentials = func(context.Context) (Credentials, error) { return Credentials{APIKey: wrong, BaseURL: up.URL}, nil }
	})
	a := r.send(r.grant(Account{Run: "r", Fork: 1}), message{max: 100})
	if a.status != 401 || a.header.Get("X-Should-Retry") != "false" || a.kind() != "authentication_error" {
		t.Errorf("%+v", a)
	}
	if strings.Contains(a.body, wrong) {
		t.Errorf("the API's answer carries the key into the sandbox: %s", a.body)
	}
	if s := r.usage("r", 0); s.Cost != 0 {
		t.Errorf("%+v", s)
	}
}

// Nobody gets the key, or hears of a call, whom the system's authorities do not
// know; and the agent is told not to try again.
func TestDistrustedAPIIsSentNothing(t *testing.T) {
	called := false
	api := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { called = true }))
	api.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshake
	t.Cleanup(api.Close)
	r := openRig(t, t.TempDir(), &upstream{Server: api})
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	a := r.send(token, message{max: 10})
	if a.status != 502 || a.header.Get("X-Should-Retry") != "false" || !strings.Contains(a.body, "SSL_CERT_FILE") || called {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r", 1); got.Cost != 0 || got.Calls != 1 {
		t.Errorf("%+v", got)
	}
}

func TestKeyThatComesLaterWorks(t *testing.T) {
	up := newUpstream(t)
	var cred Credentials
	var credErr error
	r := openRig(t, t.TempDir(), up, func(o *Options) {
		o.Credentials = func(context.Context) (Credentials, error) { return cred, credErr }
	})
	token := r.grant(Account{Run: "r", Fork: 1})
	a := r.send(token, message{max: 100})
	if a.status != 401 || a.header.Get("X-Should-Retry") != "false" || !strings.Contains(a.body, "no ANTHROPIC_API_KEY") {
		t.Errorf("no key: %+v", a)
	}
	credErr = errors.New("the file with " + realKey + " is away")
	cred.APIKey = realKey
	if a := r.send(token, message{max: 100}); a.status != 503 {
		t.Errorf("no answer: %+v", a)
	}
	credErr = fault.New("read key", fault.Denied, "no")
	if a := r.send(token, message{max: 100}); a.status != 401 {
		t.Errorf("denied: %+v", a)
	}
	credErr = nil
	cred = Credentials{APIKey: "a key\nX-Evil: 1", BaseURL: up.URL}
	if a := r.send(token, message{max: 100}); a.status != 401 {
		t.Errorf("odd key: %+v", a)
	}
	for _, base := range []string{"ftp://x", "/v1", "http://user:pass@x", "http://x?key=y", "http://%zz"} {
		cred = Credentials{APIKey: realKey, BaseURL: base}
		if a := r.send(token, message{max: 100}); a.status != 404 || strings.Contains(a.body, "pass") {
			t.Errorf("base %q: %+v", base, a)
		}
	}
	cred = Credentials{APIKey: realKey, BaseURL: up.URL}
	if a := r.send(token, message{max: 100}); a.status != 200 {
		t.Errorf("%+v", a)
	}
	if up.count() != 1 {
		t.Errorf("%d calls were forwarded", up.count())
	}
	if strings.Contains(r.logs.String(), realKey) {
		t.Error("the key is in the log")
	}
}

func TestWhatHasNoPriceIsRefused(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	with := func(members string) string {
		return `{"model":"claude-opus-5-5","max_tokens":10,` + members + `}`
	}
	for body, status := range map[string]int{
		message{model: "nosuch", max: 10}.body():          404,
		message{model: "claude-opus-5-7", max: 10}.body(): 404,
		`{"max_tokens":10}`:                               404,
		with(`"fallbacks":[{"model":"nosuch"}]`):          404,
		with(`"speed":"fast"`):                            403,
		with(`"inference_geo":"us"`):                      403,
		with(`"tools":[{"type":"advisor_20260301"}]`):     403,
		`{"model":"claude-opus-5-5"}`:                     400,
		`{"model":"claude-opus-5-5","max_tokens":0}`:      400,
		`not json`: 400,
	} {
		a := r.do(t.Context(), "POST", "/v1/messages", token, body)
		if a.status != status || a.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s: %+v", body, a)
		}
	}
	if r.up.count() != 0 {
		t.Errorf("%d calls were forwarded", r.up.count())
	}
}

func TestUnpricedModelPassesWhenAllowed(t *testing.T) {
	r := newRig(t, func(o *Options) { o.AllowUnpriced = true })
	token := r.grant(Account{Run: "r", Fork: 1})
	if a := r.send(token, message{model: "nosuch", max: 10, script: script{Out: 10}}); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	if got := r.usage("r", 0).Cost; got != r.up.billed() || got < testPrices.Cost("claude-opus-4-1", Tokens{Output: 10}) {
		t.Errorf("%s", got)
	}
}

func TestRequestsAreBounded(t *testing.T) {
	r := newRig(t)
	r.limits.body, r.limits.upload, r.limits.parallel = 1000, 50*time.Millisecond, 1
	token := r.grant(Account{Run: "r", Fork: 1})
	if a := r.send(token, message{max: 10, pad: 2000}); a.status != 413 || a.kind() != "request_too_large" {
		t.Errorf("too large: %+v", a)
	}
	chunked := func(body io.Reader, headers ...string) int {
		req, _ := http.NewRequestWithContext(t.Context(), "POST", r.url+"/v1/messages", body)
		req.ContentLength = -1
		req.Header.Set("X-Api-Key", token)
		req.Header.Set("Content-Type", "application/json")
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Logf("no answer: %v", err)
			return 0
		}
		res.Body.Close()
		return res.StatusCode
	}
	if got := chunked(strings.NewReader(strings.Repeat(" ", 3000))); got != 413 {
		t.Errorf("too large in chunks: %d", got)
	}
	slow, stop := io.Pipe()
	go stop.Write([]byte("{")) // closed below
	if got := chunked(slow); got != 408 && got != 0 {
		t.Errorf("never whole: %d", got)
	}
	slow.Close()
	if got := chunked(strings.NewReader("{}"), "Content-Encoding", "gzip"); got != 415 {
		t.Errorf("compressed: %d", got)
	}
	if got := chunked(strings.NewReader("{}"), "Content-Type", "multipart/form-data"); got != 415 {
		t.Errorf("no JSON: %d", got)
	}
	done := make(chan answer)
	go func() { done <- r.send(token, message{max: 10, script: script{Fault: "gate", Out: 1}}) }()
	until(t, "the first call is upstream", func() bool { return r.up.count() == 1 })
	if a := r.send(token, message{max: 10}); a.status != 429 || a.header.Get("Retry-After") == "" {
		t.Errorf("one too many: %+v", a)
	}
	close(r.up.gate)
	if a := <-done; a.status != 200 {
		t.Errorf("%+v", a)
	}
	if a := r.send(token, message{max: 10}); a.status != 200 {
		t.Errorf("after it: %+v", a)
	}
}

// An upstream that compresses although it was told not to.
func TestCompressedAnswerIsChargedAtItsReservation(t *testing.T) {
	var text strings.Builder
	z := gzip.NewWriter(&text)
	io.WriteString(z, `{"usage":{"input_tokens":1}}`)
	z.Close()
	up := newUpstream(t)
	r := openRig(t, t.TempDir(), up, func(o *Options) {
		o.Transport = roundTripper(func(req *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 200, Header: http.Header{"Content-Encoding": {"gzip"}}, ContentLength: int64(text.Len()), Body: io.NopCloser(strings.NewReader(text.String()))}, nil
		})
	})
	token := r.grant(Account{Run: "r", Fork: 1})
	a := r.send(token, message{max: 1000}, "Accept-Encoding", "gzip")
	if a.body != text.String() || a.header.Get("Content-Encoding") != "gzip" {
		t.Errorf("%+v", a)
	}
	if s := r.usage("r", 0); s.Cost < testPrices.Cost("sonnet", Tokens{Output: 1000}) {
		t.Errorf("%+v", s)
	}
}

// A transport that does not say whether it had a connection.
func TestUnclearErrorIsChargedAsIfProcessed(t *testing.T) {
	r := newRig(t, func(o *Options) {
		o.Transport = roundTripper(func(*http.Request) (*http.Response, error) { return nil, errors.New("something with " + realKey) })
	})
	token := r.grant(Account{Run: "r", Fork: 1})
	if a := r.send(token, message{max: 1000}); a.status != 502 || strings.Contains(a.body, realKey) {
		t.Errorf("%+v", a)
	}
	if s := r.usage("r", 0); s.Cost < testPrices.Cost("sonnet", Tokens{Output: 1000}) {
		t.Errorf("%+v", s)
	}
	if strings.Contains(r.logs.String(), realKey) || !strings.Contains(r.logs.String(), "[key]") {
		t.Errorf("the log: %s", r.logs)
	}
}

// A panic in the middle must not leave the money reserved, or the call free.
func TestPanicIsSettled(t *testing.T) {
	r := newRig(t, func(o *Options) {
		o.Transport = roundTripper(func(*http.Request) (*http.Response, error) { panic(http.ErrAbortHandler) })
	})
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	r.send(token, message{max: 1000})
	r.idle("r")
	if s := r.usage("r", 0); s.Calls != 1 || s.Cost < testPrices.Cost("sonnet", Tokens{Output: 1000}) {
		t.Errorf("%+v", s)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// The key is nowhere but upstream: not in an answer, a log, or any file.
func TestKeyIsNowhere(t *testing.T) {
	up := newUpstream(t)
	dir := t.TempDir()
	var logs string
	t.Run("calls", func(t *testing.T) {
		r := openRig(t, dir, up)
		token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
		for _, m := range []message{
			{max: 100, script: script{Out: 5}}, {max: 100, stream: true, script: script{Out: 50}}, {max: 100, stream: true, script: script{Fault: "reset"}},
			{max: 100, script: script{Status: 400, Body: "you sent " + realKey, Header: map[string]string{"Anthropic-Echo": realKey}}},
			{max: 100, model: realKey}, {max: 100, model: "nosuch"},
		} {
			a := r.send(token, m)
			if m.model != realKey && (strings.Contains(a.body, realKey) || strings.Contains(fmt.Sprint(a.header), realKey)) {
				t.Errorf("%+v", a)
			}
		}
		r.do(t.Context(), "GET", "/v1/models", token, "")
		if err := r.Gateway.Close(); err != nil {
			t.Error(err)
		}
		logs = r.logs.String()
		if strings.Contains(logs, token) {
			t.Error("the token is in the log")
		}
		found := false
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			b, err := os.ReadFile(path)
			found = found || strings.Contains(string(b), "claude-sonnet-5-5")
			for _, secret := range []string{realKey, token} {
				if strings.Contains(string(b), secret) {
					t.Errorf("%s holds %s", path, secret)
				}
			}
			return err
		})
		if err != nil || !found {
			t.Errorf("the files were not read: %v", err)
		}
	})
	// One line is the agent's own: it asked for a model of that name.
	if n := strings.Count(logs, realKey); n != 1 {
		t.Errorf("the key is %d times in the log", n)
	}
	if !strings.Contains(logs, "call settled") {
		t.Errorf("no line for settled calls: %s", logs)
	}
}

// open has the gateway serve one listener more, until the test has ended, and
// returns its address.
func (r *rig) open(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

func TestHeadersAreBounded(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	addr := r.open(t)
	for size, want := range map[int]int{10 << 10: 200, 100 << 10: 431} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+addr+"/v1/models", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", token)
		req.Header.Set("X-Long", strings.Repeat("x", size))
		before := r.up.count()
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Errorf("%d bytes: %v", size, err)
			continue
		}
		res.Body.Close()
		if res.StatusCode != want || r.up.count()-before != map[int]int{200: 1, 431: 0}[want] {
			t.Errorf("%d bytes of headers: %d, want %d", size, res.StatusCode, want)
		}
	}
}

// A sandbox cannot keep connections for nothing.
func TestAConnectionThatAsksNothingIsClosed(t *testing.T) {
	r := newRig(t)
	r.do(t.Context(), "GET", "/v1/models", "", "") // it has begun, with limits as they are
	r.limits.ask, r.limits.between = 100*time.Millisecond, 100*time.Millisecond
	addr := r.open(t)
	for name, said := range map[string]string{
		"half a header":   "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow",
		"nothing":         "",
		"one request":     "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
		"and half of one": "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/mod",
	} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, said); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection stays open", name)
		}
		_ = c.Close()
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	r := newRig(t)
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- r.Serve(ctx, ln) }()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", ln.Addr().String())
	}}}
	defer client.CloseIdleConnections()
	res, err := client.Get("http://gateway/v1/models")
	if err != nil || res.StatusCode != 403 {
		t.Fatalf("%v %v", res, err)
	}
	res.Body.Close()
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	ln.Close()
	if err := r.Serve(t.Context(), ln); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("on a closed listener: %v", err)
	}
}

func TestOnlyARushIsHeldBack(t *testing.T) {
	took := func(gap time.Duration, size int) time.Duration {
		var r rush
		now, begin := time.Now(), time.Now()
		for range 500 {
			r.calm(size, now)
			now = r.last.Add(gap)
		}
		return time.Since(begin)
	}
	if got := took(time.Millisecond, 150); got > 20*time.Millisecond {
		t.Errorf("a thousand events a second were held back for %v", got)
	}
	if got := took(time.Microsecond, 32<<10); got > 20*time.Millisecond {
		t.Errorf("large pieces were held back for %v", got)
	}
	if got := took(time.Microsecond, 150); got < 45*time.Millisecond {
		t.Errorf("a rush of 500 events was held back for %v", got)
	}
}
