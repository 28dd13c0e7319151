package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// realKey is what must never be seen anywhere but upstream.
const realKey = "sk-ant-api03-REAL-KEY-0123456789abcdef"

// An upstream stands in for the model API. What it answers is written in the
// request's metadata, so that calls which run side by side do not disturb each
// other. It counts tokens as the API is known to: four bytes each.
type upstream struct {
	*httptest.Server
	mu    sync.Mutex
	seen  []seen
	spent fork.USD // what the API would bill
	calls int

	gate chan struct{} // calls that say so wait here

	batches batchesUpstream
}

type seen struct {
	method, path, query string
	header              http.Header
	body                []byte
}

// A script says how one call is answered.
type script struct {
	Out    int64             `json:"out"`    // output tokens that the model would like
	Read   int64             `json:"read"`   // prompt tokens read from the cache
	Write  int64             `json:"write"`  // and written to it
	Status int               `json:"status"` // other than 200: an error
	Times  int               `json:"times"`  // how often Status is answered before the answer; 0: always
	Header map[string]string `json:"header"`
	Body   string            `json:"body"` // of an error, or instead of the answer
	Fault  string            `json:"fault"`
	Model  string            `json:"model"` // that answers; empty: the one asked
}

// again counts how often the same request came.
func (u *upstream) again(body string) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := 0
	for _, c := range u.seen {
		if string(c.body) == body {
			n++
		}
	}
	return n
}

func newUpstream(t testing.TB) *upstream {
	u := &upstream{gate: make(chan struct{})}
	u.Server = httptest.NewServer(u)
	t.Cleanup(func() {
		u.CloseClientConnections()
		u.Close()
	})
	return u
}

func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	u.mu.Lock()
	u.seen = append(u.seen, seen{r.Method, r.URL.Path, r.URL.RawQuery, r.Header.Clone(), body})
	u.calls++
	u.mu.Unlock()
	if r.Header.Get("X-Api-Key") != realKey && r.Header.Get("Authorization") != "Bearer "+realKey {
		w.WriteHeader(401)
		fmt.Fprintf(w, `{"type":"error","error":{"type":"authentication_error","message":"bad key %s%s"}}`, r.Header.Get("X-Api-Key"), r.Header.Get("Authorization"))
		return
	}
	if strings.HasPrefix(r.URL.Path, batchesPath) {
		u.batch(w, r, body)
		return
	}
	var q struct {
		Model    string `json:"model"`
		Max      int64  `json:"max_tokens"`
		Stream   bool   `json:"stream"`
		Metadata script `json:"metadata"`
	}
	if len(body) > 0 && json.Unmarshal(body, &q) != nil {
		w.WriteHeader(400)
		return
	}
	s := q.Metadata
	if s.Model == "" {
		s.Model = q.Model
	}
	w.Header().Set("Request-Id", "req_1")
	w.Header().Set("Set-Cookie", "session=1")
	w.Header().Set("Anthropic-Organization-Id", "org")
	w.Header().Set("Anthropic-Ratelimit-Requests-Remaining", "7")
	w.Header().Set("Connection", "X-Hop")
	w.Header().Set("X-Hop", "1")
	for k, v := range s.Header {
		w.Header().Set(k, v)
	}
	out := min(s.Out, q.Max)
	in := max(int64(len(body))/4-s.Read-s.Write, 0)
	bill := func(out int64) {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.spent += testPrices.Cost(s.Model, Tokens{Input: in, CacheRead: s.Read, CacheWrite5m: s.Write, Output: out})
	}
	switch s.Fault {
	case "gate":
		select {
		case <-u.gate:
		case <-r.Context().Done():
			bill(0)
			return
		}
	case "hang":
		<-r.Context().Done()
		return
	case "reset":
		hijack(w)
		return
	}
	usage := func(out int64) string {
		return fmt.Sprintf(`{"input_tokens":%d,"cache_read_input_tokens":%d,"cache_creation_input_tokens":%d,"output_tokens":%d}`, in, s.Read, s.Write, out)
	}
	switch {
	case s.Status != 0 && s.Status != 200 && (s.Times == 0 || u.again(string(body)) <= s.Times):
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(s.Status)
		io.WriteString(w, s.Body)
		return
	case s.Body != "":
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, s.Body)
		return
	case strings.HasSuffix(r.URL.Path, "count_tokens"):
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"input_tokens":%d}`, in)
		return
	case r.Method == http.MethodGet:
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"data":[{"id":"claude-opus-5-5"}]}`)
		return
	case !q.Stream:
		bill(out)
		w.Header().Set("Content-Type", "application/json")
		text := fmt.Sprintf(`{"type":"message","model":%q,"content":[{"type":"text","text":"ok"}],"usage":%s}`, s.Model, usage(out))
		if s.Fault == "cut" {
			w.Header().Set("Content-Length", "10000")
		}
		io.WriteString(w, text)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	say := func(text string) {
		io.WriteString(w, text)
		http.NewResponseController(w).Flush()
	}
	if s.Fault == "error first" {
		say(sseError)
		return
	}
	if s.Fault == "nothing" {
		http.NewResponseController(w).Flush()
		hijack(w)
		return
	}
	say(fmt.Sprintf("event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"model\":%q,\"usage\":%s}}\n\n", s.Model, usage(1)))
	said := int64(0)
	piece := strings.Repeat("word", 50)
	for said+50 <= out {
		say(fmt.Sprintf("event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":%q}}\n\n", piece))
		said += 50
		if said > out/2 {
			switch s.Fault {
			case "cut":
				bill(said)
				hijack(w)
				return
			case "error":
				bill(said)
				say(sseError)
				return
			case "stall":
				bill(said)
				<-r.Context().Done()
				return
			}
		}
		if r.Context().Err() != nil {
			bill(said)
			return
		}
	}
	bill(out)
	say(fmt.Sprintf("event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":%d}}\n\n", out))
	say(sseStop)
	if s.Fault == "linger" {
		<-r.Context().Done()
	}
}

// hijack cuts the connection under an answer.
func hijack(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		conn.Close()
	}
}

func (u *upstream) last() seen {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.seen[len(u.seen)-1]
}

func (u *upstream) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.calls
}

func (u *upstream) billed() fork.USD {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.spent
}

var testPrices = func() *Prices {
	p, err := LoadPrices(nil)
	if err != nil {
		panic(err)
	}
	return p
}()

// A rig is a gateway that listens, in front of an upstream.
type rig struct {
	*Gateway
	t    testing.TB
	dir  string
	up   *upstream
	url  string
	logs *safeBuffer
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newRig(t testing.TB, change ...func(*Options)) *rig {
	up := newUpstream(t)
	return openRig(t, t.TempDir(), up, change...)
}

func openRig(t testing.TB, dir string, up *upstream, change ...func(*Options)) *rig {
	t.Helper()
	logs := new(safeBuffer)
	o := Options{
		Ledger:      ledger.Options{Dir: dir},
		Prices:      testPrices,
		Rate:        2000, // tests do not wait for what they do not test
		Credentials: func(context.Context) (Credentials, error) { return Credentials{APIKey: realKey, BaseURL: up.URL}, nil },
		Logger:      slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, c := range change {
		c(&o)
	}
	g, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- g.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return &rig{Gateway: g, t: t, dir: dir, up: up, url: "http://" + ln.Addr().String(), logs: logs}
}

func (r *rig) grant(a Account) string {
	r.t.Helper()
	token, err := r.Grant(r.t.Context(), a)
	if err != nil {
		r.t.Fatal(err)
	}
	return token
}

func (r *rig) usage(run string, num int) Spent {
	r.t.Helper()
	s, err := r.Usage(r.t.Context(), run, num)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// idle waits until no call is under way.
func (r *rig) idle(run string) {
	r.t.Helper()
	until(r.t, "all calls are settled", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for key, t := range r.tenants {
			if key.run == run && t.active > 0 {
				return false
			}
		}
		return true
	})
}

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
		if ok() {
			tick.Stop()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}

// A message is a request to /v1/messages.
type message struct {
	model  string
	max    int64
	stream bool
	pad    int // bytes of prompt
	script script
}

func (m message) body() string {
	s, err := json.Marshal(m.script)
	if err != nil {
		panic(err)
	}
	if m.model == "" {
		m.model = "claude-sonnet-5-5"
	}
	return fmt.Sprintf(`{"model":%q,"max_tokens":%d,"stream":%v,"messages":[{"role":"user","content":%q}],"metadata":%s}`,
		m.model, m.max, m.stream, strings.Repeat("words ", m.pad/6), s)
}

// An answer is what came back.
type answer struct {
	status int
	header http.Header
	body   string
	err    error // the answer broke off
}

func (r *rig) do(ctx context.Context, method, path, token, body string, headers ...string) answer {
	req, err := http.NewRequestWithContext(ctx, method, r.url+path, strings.NewReader(body))
	if err != nil {
		return answer{err: err}
	}
	if token != "" {
		req.Header.Set("X-Api-Key", token)
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	for kv := range slices.Chunk(headers, 2) {
		req.Header.Set(kv[0], kv[1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(text), err}
}

func (r *rig) send(token string, m message, headers ...string) answer {
	return r.do(r.t.Context(), http.MethodPost, "/v1/messages?beta=true", token, m.body(), headers...)
}

func (a answer) kind() string {
	var e struct {
		Error struct {
			Type string `json:"type"`
		} `json:"error"`
	}
	if json.Unmarshal([]byte(a.body), &e) != nil {
		return "?"
	}
	return e.Error.Type
}
