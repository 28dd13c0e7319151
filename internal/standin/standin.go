// Package standin is a stand-in for Anthropic's Messages API that real clients
// accept: it plays scripts instead of asking a model, and charges for them as
// the API would.
//
// # Scripts and steps
//
// The prompt names the script: "@script hello" anywhere in a user's text; the
// last such text counts. Which step comes next is read from the conversation
// itself: the assistant messages after that text are compared with the
// script's steps, and what others put into the conversation (a client's own
// "No response requested.", say) is passed over. So parallel, retried,
// resumed and forked conversations all play correctly, also when the
// stand-in was restarted in between. A conversation whose script is over hears
// the last step's text again.
//
// # Variants
//
// Several agents can be given one prompt and still do different things: a
// script can have variants. A conversation keeps the variant that its tool
// ids or texts belong to. One that has just begun gets, in this order:
//
//   - the variant that its prompt asks for: "@script hello#2" is the second;
//   - the variant that [Script].Sessions names for its session id;
//   - the variant that the fewest sessions have got so far; among equals, the
//     first from (hash of the session id) mod (number of variants) on.
//
// The session id is the header x-claude-code-session-id, or else the one in
// the body's metadata.user_id. Both pass through proxies.
//
// # Money
//
// A token is four bytes of tools, system and messages, or of what is said.
// cache_control is honoured with a simulated prompt cache. [Server.Requests]
// is the truth that a ledger can be compared with. A request of a batch that
// succeeded is one of them, with the tier "batch"; the batch itself charges
// nothing.
package standin

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options say what a stand-in knows. The zero value knows no script and takes
// any key.
type Options struct {
	Scripts map[string]Script // by name
	Default string            // the script of a conversation that names none; empty: such calls fail with status 400
	Keys    []string          // the API keys that are good; empty: any
	Headers map[string]string // sent with every answer, such as anthropic-ratelimit-requests-remaining
	Log     io.Writer         // gets one JSON line for every request that ended, with the key masked; nil: no log
	Now     func() time.Time  // for the age of what is cached; nil: time.Now
}

// The bounds of what the stand-in takes and remembers.
const (
	maxBody     = 32 << 20 // bytes of a request: the API's own limit
	maxRequests = 1 << 16
	maxSessions = 1 << 16
)

// A Server is one stand-in, as an [http.Handler]. Its methods can be called
// from any goroutine.
type Server struct {
	opts  Options
	wrong map[string]error // by script: why it cannot be played
	cache cache
	nonce string
	done  chan struct{}
	close sync.Once

	mu       sync.Mutex
	arrived  int
	requests []Request
	made     []*batch
	tries    map[string]int // calls so far, by session, script and step
	chosen   map[string]int // variant, by session and script
	uses     map[string]int // sessions, by script and variant
	logged   sync.Mutex
}

var _ http.Handler = (*Server)(nil)

// New returns a stand-in that plays opts.Scripts. A script that [Script.Validate]
// refuses makes the calls that name it fail with status 400.
func New(opts Options) *Server {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	s := &Server{
		opts:   opts,
		wrong:  map[string]error{},
		cache:  cache{entries: map[string]entry{}},
		nonce:  rand.Text(),
		done:   make(chan struct{}),
		tries:  map[string]int{},
		chosen: map[string]int{},
		uses:   map[string]int{},
	}
	for name, script := range opts.Scripts {
		if err := script.Validate(); err != nil {
			s.wrong[name] = err
		}
	}
	return s
}

// Close breaks off every call that waits, hangs or stalls, now and later. It
// does not wait for them. A second call does nothing.
func (s *Server) Close() { s.close.Do(func() { close(s.done) }) }

// An Outcome is how a request ended.
type Outcome string

// The outcomes.
const (
	Answered Outcome = "answered" // with all that there was to say
	Refused  Outcome = "refused"  // with an HTTP error
	Broken   Outcome = "broken"   // cut, stalled or hung by a fault, or ended by an error event
	Left     Outcome = "left"     // the client went away, or the stand-in was closed
)

// Usage is what a request is charged, in tokens. Its JSON is the API's own.
type Usage struct {
	Input      int      `json:"input_tokens"` // neither read from nor written to the cache
	CacheWrite int      `json:"cache_creation_input_tokens"`
	CacheRead  int      `json:"cache_read_input_tokens"`
	Creation   Creation `json:"cache_creation"` // CacheWrite by its time to live
	Output     int      `json:"output_tokens"`
	Tier       string   `json:"service_tier,omitempty"`
}

// Creation splits what was written to the cache by how long it stays there.
type Creation struct {
	FiveMinutes int `json:"ephemeral_5m_input_tokens"`
	OneHour     int `json:"ephemeral_1h_input_tokens"`
}

// A Request is one request that ended.
type Request struct {
	N         int       `json:"n"` // in order of arrival, from 1
	Time      time.Time `json:"time"`
	Method    string    `json:"method"`
	Path      string    `json:"path"`
	Key       string    `json:"-"`                    // the API key that was used, whole; the log has its end only
	Session   string    `json:"session,omitempty"`    // of the client; empty when it names none
	Model     string    `json:"model,omitempty"`      // as asked for
	MaxTokens int       `json:"max_tokens,omitempty"` // as asked for
	Stream    bool      `json:"stream,omitempty"`
	Script    string    `json:"script,omitempty"` // with its variant when it has several, as "hello#2"
	Step      int       `json:"step"`             // from 1; 0: none was reached
	Try       int       `json:"try"`              // how often this conversation has called for this step, from 1
	Status    int       `json:"status"`           // of the HTTP answer; 0: none was sent
	Outcome   Outcome   `json:"outcome"`
	Usage     Usage     `json:"usage"` // of a broken stream: the input, and the output that was sent
}

// Requests returns the requests that ended so far, in order of arrival. Only
// the newest 65,536 are kept.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	rs := slices.Clone(s.requests)
	s.mu.Unlock()
	slices.SortFunc(rs, func(a, b Request) int { return a.N - b.N })
	return rs
}

// ServeHTTP answers POST /v1/messages, POST /v1/messages/count_tokens,
// everything below /v1/messages/batches, POST /v1/responses (of OpenAI's API),
// GET /v1/models and GET /v1/models/ID; anything else is not found.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.arrived++
	req := &Request{N: s.arrived, Time: s.opts.Now(), Method: r.Method, Path: r.URL.Path, Key: keyOf(r)}
	s.mu.Unlock()
	defer s.ended(req)

	h := w.Header()
	h.Set("request-id", "req_"+s.id(req.N))
	for k, v := range s.opts.Headers {
		h.Set(k, v)
	}
	if len(s.opts.Keys) > 0 && !slices.Contains(s.opts.Keys, req.Key) {
		refuse(w, req, http.StatusUnauthorized, "", "invalid x-api-key")
		return
	}
	batches, ofBatches := strings.CutPrefix(r.URL.Path, batchesPath)
	model, oneModel := strings.CutPrefix(r.URL.Path, "/v1/models/")
	switch {
	case r.Method == http.MethodPost && r.URL.Path == "/v1/messages":
		if c := s.read(w, r, req); c != nil {
			s.play(w, r, req, c)
		}
	case r.Method == http.MethodPost && r.URL.Path == "/v1/responses":
		if c := s.readResponses(w, r, req); c != nil {
			s.respond(w, r, req, c)
		}
	case ofBatches:
		s.batches(w, r, req, batches)
	case r.Method == http.MethodPost && r.URL.Path == "/v1/messages/count_tokens":
		if c := s.read(w, r, req); c != nil {
			_, total := c.blocks()
			answer(w, req, map[string]int{"input_tokens": total / bytesPerToken})
		}
	case r.Method == http.MethodGet && r.URL.Path == "/v1/models":
		answer(w, req, map[string]any{"data": models(), "has_more": false, "first_id": modelIDs[0], "last_id": modelIDs[len(modelIDs)-1]})
	case r.Method == http.MethodGet && oneModel && slices.Contains(modelIDs, model):
		answer(w, req, modelOf(model))
	default:
		refuse(w, req, http.StatusNotFound, "", fmt.Sprintf("%s %s: not found", r.Method, r.URL.Path))
	}
}

// read takes the body of a call. It answers itself and returns nil when the
// API would refuse the call for its form.
func (s *Server) read(w http.ResponseWriter, r *http.Request, req *Request) *call {
	b, ok := s.body(w, r, req)
	if !ok {
		return nil
	}
	if r.Header.Get("anthropic-version") == "" {
		refuse(w, req, http.StatusBadRequest, "", "anthropic-version: header is required")
		return nil
	}
	c, err := parseCall(b)
	if err != nil {
		refuse(w, req, http.StatusBadRequest, "", err.Error())
		return nil
	}
	c.session = sessionOf(r.Header, c)
	c.counting = strings.HasSuffix(r.URL.Path, "/count_tokens")
	req.Model, req.MaxTokens, req.Stream, req.Session = c.Model, c.MaxTokens, c.Stream, c.session
	if err := c.check(); err != nil {
		refuse(w, req, http.StatusBadRequest, "", err.Error())
		return nil
	}
	return c
}

// body reads all of a body. It answers itself when there is too much of it.
func (s *Server) body(w http.ResponseWriter, r *http.Request, req *Request) ([]byte, bool) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		refuse(w, req, http.StatusRequestEntityTooLarge, "", "Request exceeds the maximum size")
		return nil, false
	}
	if err != nil {
		req.Outcome = Left
		panic(http.ErrAbortHandler)
	}
	return b, true
}

func keyOf(r *http.Request) string {
	if key := r.Header.Get("x-api-key"); key != "" {
		return key
	}
	key, _ := strings.CutPrefix(r.Header.Get("authorization"), "Bearer ")
	return key
}

// id returns a text that no other request of any stand-in gets: clients know
// messages again by their ids, also across a restart.
func (s *Server) id(n int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", s.nonce, n))
	return hex.EncodeToString(sum[:12])
}

func (s *Server) ended(req *Request) {
	s.mu.Lock()
	s.keep(req)
	s.mu.Unlock()
	if s.opts.Log == nil {
		return
	}
	line, err := json.Marshal(struct {
		*Request
		Key string `json:"key"`
	}{req, masked(req.Key)})
	if err != nil {
		return
	}
	s.logged.Lock()
	defer s.logged.Unlock()
	// A log that cannot be written is no reason to fail a request.
	_, _ = s.opts.Log.Write(append(line, '\n'))
}

// keep remembers a request that ended. The caller holds s.mu.
func (s *Server) keep(req *Request) {
	if len(s.requests) >= maxRequests {
		s.requests = slices.Delete(s.requests, 0, maxRequests/16)
	}
	s.requests = append(s.requests, *req)
}

func masked(key string) string {
	if len(key) < 12 {
		return strings.Repeat("*", len(key))
	}
	return "…" + key[len(key)-4:]
}

// modelIDs are the models that Claude Code 2.1.330 knows by an alias, and
// their predecessors. Calls may name any other.
var modelIDs = []string{
	"claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5", "claude-fable-5-2",
	"claude-opus-5", "claude-sonnet-5", "claude-haiku-4-5", "claude-sonnet-4-5",
}

func models() []map[string]any {
	ms := make([]map[string]any, 0, len(modelIDs))
	for _, id := range modelIDs {
		ms = append(ms, modelOf(id))
	}
	return ms
}

func modelOf(id string) map[string]any {
	return map[string]any{"type": "model", "id": id, "display_name": id, "created_at": "2026-01-01T00:00:00Z"}
}
