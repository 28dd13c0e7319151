package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A batchesUpstream is what the upstream knows of batches. Everything in it is
// guarded by the upstream's mutex.
type batchesUpstream struct {
	list []*upBatch // the oldest first

	making  string // how the next ones are answered that are made: "", "cut", "500", "529", "400", "garbage", "same id", "unmade", "gate"
	reading string // how results are answered: "", "cut", "short", "twice", "type", "usage", "gone", "packed", "chatter"
	slow    bool   // who is cancelled goes on until end is called
}

// An upBatch is a batch of somebody who uses the key. Each request does what its
// script says: Out tokens, or a fault that is the type of its result.
type upBatch struct {
	id       string
	requests []upRequest
	status   string
	cancel   bool
	deleted  bool
}

type upRequest struct {
	ID     string `json:"custom_id"`
	Params struct {
		Model    string `json:"model"`
		Max      int64  `json:"max_tokens"`
		Metadata script `json:"metadata"`
	} `json:"params"`
	size   int
	result string
}

func (q *upRequest) tokens() Tokens {
	s := q.Params.Metadata
	return Tokens{Input: max(int64(q.size)/4-s.Read-s.Write, 0), CacheRead: s.Read, CacheWrite5m: s.Write, Output: min(s.Out, q.Params.Max)}
}

func (q *upRequest) model() string {
	if m := q.Params.Metadata.Model; m != "" {
		return m
	}
	return q.Params.Model
}

// batch answers what is asked about batches.
func (u *upstream) batch(w http.ResponseWriter, r *http.Request, body []byte) {
	u.mu.Lock()
	gate := r.Method == http.MethodPost && r.URL.Path == batchesPath && u.batches.making == "gate"
	u.mu.Unlock()
	if gate {
		select {
		case <-u.gate:
		case <-r.Context().Done():
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	bs := &u.batches
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Request-Id", "req_b")
	w.Header().Set("Anthropic-Ratelimit-Input-Tokens-Limit", "1000")
	w.Header().Set("Anthropic-Ratelimit-Input-Tokens-Remaining", "0")
	w.Header().Set("Anthropic-Ratelimit-Input-Tokens-Reset", time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	fail := func(status int) {
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"type":"error","error":{"type":"some_error","message":"status %d"}}`, status)
	}
	id, deed, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, batchesPath), "/"), "/")
	if id == "" && r.Method == http.MethodGet {
		fail(500) // nobody may ask for everybody's
		return
	}
	if id == "" {
		switch bs.making {
		case "529", "400":
			fail(map[string]int{"529": 529, "400": 400}[bs.making])
			return
		case "unmade":
			hijack(w)
			return
		}
		b := u.make(body)
		switch bs.making {
		case "cut":
			hijack(w)
			return
		case "500":
			fail(500)
			return
		case "garbage":
			io.WriteString(w, `{"id":"../x","type":"message_batch"}`)
			return
		case "same id":
			b.id = bs.list[0].id
		}
		io.WriteString(w, u.object(b))
		return
	}
	i := slices.IndexFunc(bs.list, func(b *upBatch) bool { return b.id == id && !b.deleted })
	if i < 0 {
		fail(404)
		return
	}
	b := bs.list[i]
	switch {
	case r.Method == http.MethodDelete && b.status != "ended":
		fail(400)
	case r.Method == http.MethodDelete:
		b.deleted = true
		fmt.Fprintf(w, `{"id":%q,"type":"message_batch_deleted"}`, id)
	case deed == "cancel":
		if b.status == "in_progress" {
			b.status, b.cancel = "canceling", true
			if !bs.slow {
				u.finish(b)
			}
		}
		io.WriteString(w, u.object(b))
	case deed == "results" && b.status != "ended":
		fail(404)
	case deed == "results":
		u.results(w, b)
	default:
		io.WriteString(w, u.object(b))
	}
}

// make begins a batch. The caller holds u.mu.
func (u *upstream) make(body []byte) *upBatch {
	var q struct {
		Requests []json.RawMessage `json:"requests"`
	}
	if err := json.Unmarshal(body, &q); err != nil {
		panic(err)
	}
	b := &upBatch{id: fmt.Sprintf("msgbatch_%04d", len(u.batches.list)+1), status: "in_progress"}
	for _, raw := range q.Requests {
		r := upRequest{size: len(raw)}
		if err := json.Unmarshal(raw, &r); err != nil {
			panic(err)
		}
		b.requests = append(b.requests, r)
	}
	u.batches.list = append(u.batches.list, b)
	return b
}

// finish ends a batch and bills it. The caller holds u.mu.
func (u *upstream) finish(b *upBatch) {
	if b.status == "ended" {
		return
	}
	for i := range b.requests {
		q := &b.requests[i]
		switch fault := q.Params.Metadata.Fault; {
		case fault == errored || fault == expired:
			q.result = fault
		case b.cancel && fault != "early":
			q.result = canceled
		default:
			q.result = succeeded
			u.spent += testPrices.BatchCost(q.model(), q.tokens())
		}
	}
	b.status = "ended"
}

// end ends all batches.
func (u *upstream) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, b := range u.batches.list {
		u.finish(b)
	}
}

// set changes how batches are answered.
func (u *upstream) set(change func(*batchesUpstream)) {
	u.mu.Lock()
	defer u.mu.Unlock()
	change(&u.batches)
}

func (u *upstream) object(b *upBatch) string {
	url, cancelled := "null", "null"
	if b.status == "ended" {
		url = fmt.Sprintf("%q", u.URL+batchesPath+"/"+b.id+"/results")
	}
	if b.cancel {
		cancelled = `"2026-11-29T10:00:00Z"`
	}
	return fmt.Sprintf(`{"id": %q, "type":"message_batch", "processing_status":%q, "cancel_initiated_at":%s, "results_url" : %s, "x":[1.50, {"results_url":"kept"}]}`,
		b.id, b.status, cancelled, url)
}

// results writes the results in another order than that of the requests.
func (u *upstream) results(w http.ResponseWriter, b *upBatch) {
	w.Header().Set("Content-Type", "application/x-jsonl")
	var lines []string
	for _, q := range slices.Backward(b.requests) {
		result := fmt.Sprintf(`{"type":%q}`, q.result)
		if q.result == succeeded {
			t := q.tokens()
			result = fmt.Sprintf(`{"type":"succeeded","message":{"type":"message","model":%q,"content":[{"type":"text","text":"\"usage\":{}\n"}],`+
				`"usage":{"input_tokens":%d,"cache_read_input_tokens":%d,"cache_creation_input_tokens":%d,"output_tokens":%d,"service_tier":"batch"}}}`,
				q.model(), t.Input, t.CacheRead, t.CacheWrite5m, t.Output)
		}
		lines = append(lines, fmt.Sprintf(`{"custom_id":%q,"result":%s}`, q.ID, result))
	}
	switch u.batches.reading {
	case "cut":
		w.Header().Set("Content-Length", "100000")
		lines = lines[:len(lines)/2]
	case "short":
		lines = lines[:len(lines)-1]
	case "twice":
		lines[0] = lines[1]
	case "type":
		lines[0] = strings.Replace(lines[0], succeeded, "half", 1)
	case "usage":
		lines[0] = strings.Replace(lines[0], "output_tokens", "outputs", 1)
		lines[0] = strings.Replace(lines[0], `"usage":{"`, `"used":{"`, 1)
	case "chatter":
		lines = append(lines, "this is no result")
	case "gone":
		w.WriteHeader(404)
		return
	case "packed":
		w.Header().Set("Content-Encoding", "zstd")
	}
	io.WriteString(w, strings.Join(lines, "\n"))
	if u.batches.reading == "" {
		io.WriteString(w, "\n")
	}
}

// A batchOf is the body of a new batch: of each model and script a request.
func batchOf(all ...message) string {
	var list []string
	for i, m := range all {
		list = append(list, fmt.Sprintf(`{"custom_id":"r-%d", "params": %s}`, i+1, strings.Replace(m.body(), `"stream":false,`, "", 1)))
	}
	return `{"requests":[` + strings.Join(list, ", ") + `]}`
}

// makeBatch makes a batch, which must succeed.
func (r *rig) makeBatch(token string, all ...message) (id string) {
	r.t.Helper()
	a := r.do(r.t.Context(), http.MethodPost, batchesPath, token, batchOf(all...))
	var b struct {
		ID string `json:"id"`
	}
	if json.Unmarshal([]byte(a.body), &b) != nil || a.status != 200 || b.ID == "" {
		r.t.Fatalf("%+v", a)
	}
	return b.ID
}

func (r *rig) get(token, path string) answer {
	return r.do(r.t.Context(), http.MethodGet, batchesPath+path, token, "")
}

func (r *rig) readBatch(token, id string) answer { return r.get(token, "/"+id+"/results") }

// reservedFor is what a batch is reserved for.
func reservedFor(all ...message) (sum fork.USD) {
	list, err := readBatch([]byte(batchOf(all...)))
	if err != nil {
		panic(err)
	}
	for _, p := range testPrices.parts(list, defaultMaxOutput) {
		sum += p.Most
	}
	return sum
}

// later is a clock that is ahead.
func later(by *time.Duration) func(*Options) {
	return func(o *Options) { o.now = func() time.Time { return time.Now().Add(*by) } }
}

func (r *rig) settle(run string, num int) {
	r.t.Helper()
	if err := r.Revoke(r.t.Context(), run, num); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Settle(context.Background(), run, num, 10*time.Millisecond); err != nil {
		r.t.Fatal(err)
	}
}
