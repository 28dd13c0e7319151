package standin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Batches of messages. Each request plays the step that its conversation has come
// to, and is done when the step's delay has passed since the batch was made; the
// batch ends with the last of them, when it is cancelled, or after a day. A
// request that is nearly done is not interrupted. What is done by then succeeded, or errored where the step has a fault; what is
// not was canceled or expired. Nothing but what succeeded is charged.

const (
	batchesPath = "/v1/messages/batches"
	batchLasts  = 24 * time.Hour
	nearlyDone  = 10 * time.Second // before a request is ready
	maxBatches  = 1 << 10
)

// A batch is one that a client made.
type batch struct {
	id        string
	key       string
	made      time.Time
	cancelled time.Time
	ended     time.Time
	requests  []batched
}

// A batched is one request of a batch.
type batched struct {
	ID     string          `json:"custom_id"`
	Params json.RawMessage `json:"params"`

	call   *call
	turn   turn
	ready  time.Time
	wrong  string // why it errors, when it is ready
	result map[string]any
}

// batches answers everything about batches; path is what follows their own.
func (s *Server) batches(w http.ResponseWriter, r *http.Request, req *Request, path string) {
	if path == "" && r.Method == http.MethodPost {
		if b := s.readBatch(w, r, req); b != nil {
			s.mu.Lock()
			if len(s.made) >= maxBatches {
				s.made = slices.Delete(s.made, 0, maxBatches/16)
			}
			s.made = append(s.made, b)
			text := s.batchBody(b, r)
			s.mu.Unlock()
			answer(w, req, text)
		}
		return
	}
	id, deed, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	now := s.opts.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.made {
		s.playBatch(b, now)
	}
	if path == "" && r.Method == http.MethodGet {
		list := []any{}
		for _, b := range slices.Backward(s.made) {
			if b.key == req.Key {
				list = append(list, s.batchBody(b, r))
			}
		}
		answer(w, req, map[string]any{"data": list, "has_more": false})
		return
	}
	at := slices.IndexFunc(s.made, func(b *batch) bool { return b.id == id && b.key == req.Key })
	if at < 0 {
		refuse(w, req, http.StatusNotFound, "", "batch not found")
		return
	}
	b := s.made[at]
	switch over := !b.ended.IsZero(); {
	case deed == "" && r.Method == http.MethodGet:
		answer(w, req, s.batchBody(b, r))
	case deed == "" && r.Method == http.MethodDelete && over:
		s.made = slices.Delete(s.made, at, at+1)
		answer(w, req, map[string]any{"id": id, "type": "message_batch_deleted"})
	case deed == "" && r.Method == http.MethodDelete:
		refuse(w, req, http.StatusBadRequest, "", "the batch has not ended")
	case deed == "cancel" && r.Method == http.MethodPost:
		if !over && b.cancelled.IsZero() {
			b.cancelled = now
			s.playBatch(b, now)
		}
		answer(w, req, s.batchBody(b, r))
	case deed == "results" && r.Method == http.MethodGet && over:
		var lines bytes.Buffer
		for _, q := range slices.Backward(b.requests) { // in no order that a client may trust
			lines.Write(encode(map[string]any{"custom_id": q.ID, "result": q.result}))
			lines.WriteByte('\n')
		}
		req.Status, req.Outcome = http.StatusOK, Answered
		w.Header().Set("content-type", "application/x-jsonl")
		_, _ = w.Write(lines.Bytes()) // as in send
	default:
		refuse(w, req, http.StatusNotFound, "", fmt.Sprintf("%s %s: not found", r.Method, r.URL.Path))
	}
}

// readBatch takes the body of a new batch. It answers itself and returns nil when
// the API would refuse it for its form. What is wrong with one request makes that
// one error, when the batch has ended.
func (s *Server) readBatch(w http.ResponseWriter, r *http.Request, req *Request) *batch {
	raw, ok := s.body(w, r, req)
	if !ok {
		return nil
	}
	var body struct {
		Requests []batched `json:"requests"`
	}
	if err := json.Unmarshal(raw, &body); err != nil || len(body.Requests) == 0 {
		refuse(w, req, http.StatusBadRequest, "", "requests: at least one is required")
		return nil
	}
	b := &batch{id: "msgbatch_" + s.id(req.N), key: req.Key, made: req.Time, requests: body.Requests}
	seen := map[string]bool{}
	for i := range b.requests {
		q := &b.requests[i]
		if q.ID == "" || seen[q.ID] {
			refuse(w, req, http.StatusBadRequest, "", fmt.Sprintf("requests.%d.custom_id: must be unique", i))
			return nil
		}
		seen[q.ID], q.ready = true, b.made
		c, err := parseCall(q.Params)
		if err == nil {
			err = c.check()
		}
		if err == nil && c.Stream {
			err = fmt.Errorf("stream: not supported in a batch")
		}
		if err == nil {
			q.call = c
			c.session = sessionOf(r.Header, c)
			q.turn, _, err = s.find(c)
		}
		if err != nil {
			q.wrong = err.Error()
			continue
		}
		q.ready = b.made.Add(time.Duration(q.turn.step.Delay))
		if f, faulty := q.turn.step.faultAt(q.turn.try); faulty {
			q.wrong = f.Message
			if q.wrong == "" {
				q.wrong = "the script has it fail"
			}
		}
	}
	return b
}

// playBatch ends the batch if it is over at that time. The caller holds s.mu.
func (s *Server) playBatch(b *batch, now time.Time) {
	until := b.made.Add(batchLasts)
	if !b.cancelled.IsZero() {
		until = b.cancelled
		for _, q := range b.requests {
			if q.ready.After(until) && !q.ready.After(b.cancelled.Add(nearlyDone)) {
				until = q.ready
			}
		}
	}
	last := slices.MaxFunc(b.requests, func(a, c batched) int { return a.ready.Compare(c.ready) }).ready
	if until.After(last) {
		until = last
	}
	if !b.ended.IsZero() || now.Before(until) {
		return
	}
	b.ended = now
	for i := range b.requests {
		q := &b.requests[i]
		switch {
		case q.ready.After(until) && !b.cancelled.IsZero():
			q.result = map[string]any{"type": "canceled"}
		case q.ready.After(until):
			q.result = map[string]any{"type": "expired"}
		case q.wrong != "":
			q.result = map[string]any{"type": "errored", "error": errorBody("invalid_request_error", q.wrong)}
		default:
			q.result = map[string]any{"type": "succeeded", "message": s.message(b, q, now)}
		}
	}
}

// message is the answer to one request, which is charged for it. The caller holds
// s.mu.
func (s *Server) message(b *batch, q *batched, now time.Time) map[string]any {
	c := q.call
	s.arrived++
	req := &Request{
		N: s.arrived, Time: now, Method: http.MethodPost, Path: batchesPath, Key: b.key, Session: c.session, Model: c.Model, MaxTokens: c.MaxTokens,
		Script: q.turn.part.name, Step: q.turn.index + 1, Try: q.turn.try + 1, Status: http.StatusOK, Outcome: Answered,
	}
	pieces, total := c.blocks()
	blocks, tokens, stop := q.turn.contents(c.MaxTokens)
	req.Usage = s.cache.charge(b.key+"\x00"+c.Model, pieces, total, now)
	req.Usage.Tier, req.Usage.Output = "batch", tokens
	p := &player{server: s, req: req}
	msg := p.message(req.Usage)
	all := make([]map[string]any, 0, len(blocks))
	for _, block := range blocks {
		all = append(all, block.whole())
	}
	msg["content"], msg["stop_reason"] = all, stop
	s.keep(req)
	return msg
}

// batchBody is the batch as its client sees it. The caller holds s.mu.
func (s *Server) batchBody(b *batch, r *http.Request) map[string]any {
	stamp := func(t time.Time) any {
		if t.IsZero() {
			return nil
		}
		return t.UTC().Format(time.RFC3339Nano)
	}
	counts := map[string]int{"processing": 0, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
	status, results := "in_progress", any(nil)
	switch {
	case !b.ended.IsZero():
		status, results = "ended", "http://"+r.Host+batchesPath+"/"+b.id+"/results"
		for _, q := range b.requests {
			counts[q.result["type"].(string)]++
		}
	case !b.cancelled.IsZero():
		status, counts["processing"] = "canceling", len(b.requests)
	default:
		counts["processing"] = len(b.requests)
	}
	return map[string]any{
		"id": b.id, "type": "message_batch", "processing_status": status, "request_counts": counts, "created_at": stamp(b.made),
		"expires_at": stamp(b.made.Add(batchLasts)), "ended_at": stamp(b.ended), "cancel_initiated_at": stamp(b.cancelled), "archived_at": nil, "results_url": results,
	}
}
