package standin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"
)

// A content is one block of an answer.
type content struct {
	kind  string // "thinking", "text" or "tool_use"
	text  string // of "thinking" and "text"
	id    string // of "tool_use", as the following
	name  string
	input []byte
}

func (b content) size() int { return len(b.text) + len(b.input) }

func (b content) whole() map[string]any {
	switch b.kind {
	case "thinking":
		return map[string]any{"type": b.kind, "thinking": b.text, "signature": signature}
	case "tool_use":
		return map[string]any{"type": b.kind, "id": b.id, "name": b.name, "input": json.RawMessage(b.input)}
	}
	return map[string]any{"type": b.kind, "text": b.text}
}

// signature is that of all thinking: clients send it back unread.
const signature = "c3RhbmRpbg=="

// contents returns what the turn says with at most maxTokens, what it is
// charged, and why it stops.
func (t turn) contents(maxTokens int) (blocks []content, tokens int, stop string) {
	if t.step.Thinking != "" {
		blocks = append(blocks, content{kind: "thinking", text: t.step.Thinking})
	}
	if t.step.Text != "" {
		blocks = append(blocks, content{kind: "text", text: t.step.Text})
	}
	stop = "end_turn"
	for i, tool := range t.step.Tools {
		blocks = append(blocks, content{kind: "tool_use", id: t.part.toolID(t.index, i), name: tool.Name, input: tool.input()})
		stop = "tool_use"
	}
	if t.step.StopReason != "" {
		stop = t.step.StopReason
	}
	size := 0
	for _, b := range blocks {
		size += b.size()
	}
	tokens = t.step.OutputTokens
	if tokens == 0 {
		tokens = tokensOf(size)
	}
	if tokens <= maxTokens {
		return blocks, tokens, stop
	}
	// What the API cannot finish it leaves unfinished; a half-said tool call
	// is no use to any client and is left out here.
	text := cutText(t.step.Text, maxTokens*bytesPerToken)
	return []content{{kind: "text", text: text + cutMark}}, maxTokens, "max_tokens"
}

func tokensOf(bytes int) int { return max(1, (bytes+bytesPerToken-1)/bytesPerToken) }

func cutText(s string, limit int) string {
	if limit >= len(s) {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}

// play answers a call of /v1/messages.
func (s *Server) play(w http.ResponseWriter, r *http.Request, req *Request, c *call) {
	t, status, err := s.find(c)
	if err != nil {
		refuse(w, req, status, "", err.Error())
		return
	}
	req.Script, req.Step, req.Try = t.part.name, t.index+1, t.try+1
	fault, faulty := t.step.faultAt(t.try)
	if !s.wait(r.Context(), time.Duration(t.step.Delay)) {
		req.Outcome = Left
		panic(http.ErrAbortHandler)
	}
	if faulty && fault.Kind == FaultStatus {
		for k, v := range fault.Headers {
			w.Header().Set(k, v)
		}
		refuse(w, req, fault.Status, fault.Type, fault.Message)
		return
	}
	if faulty && fault.Kind == FaultHang {
		s.wait(r.Context(), -1)
		req.Outcome = Broken
		panic(http.ErrAbortHandler)
	}
	pieces, total := c.blocks()
	req.Usage = s.cache.charge(req.Key+"\x00"+c.Model, pieces, total, s.opts.Now())
	req.Usage.Tier = "standard"
	req.Status = http.StatusOK
	p := &player{server: s, w: w, ctx: r.Context(), req: req, turn: t}
	if faulty {
		p.fault = &fault
	}
	if c.Stream {
		p.stream(c.MaxTokens)
	} else {
		p.whole(c.MaxTokens)
	}
}

// wait waits for d, or for ever when d is negative, and reports whether the
// time passed before the client left or the stand-in was closed.
func (s *Server) wait(ctx context.Context, d time.Duration) bool {
	if d == 0 {
		return true
	}
	var timer <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
		return true
	case <-ctx.Done():
	case <-s.done:
	}
	return false
}

// A player sends one answer.
type player struct {
	server *Server
	w      http.ResponseWriter
	ctx    context.Context // of the request: a player does not outlive it
	req    *Request
	turn   turn
	fault  *Fault // nil: nothing goes wrong
}

// whole sends the answer as one JSON document. The faults of streams strike
// in the middle of it.
func (p *player) whole(maxTokens int) {
	blocks, tokens, stop := p.turn.contents(maxTokens)
	p.req.Usage.Output = tokens
	msg := p.message(p.req.Usage)
	all := make([]map[string]any, 0, len(blocks))
	for _, b := range blocks {
		all = append(all, b.whole())
	}
	msg["content"], msg["stop_reason"] = all, stop
	if p.fault == nil {
		answer(p.w, p.req, msg)
		return
	}
	if p.fault.Kind == FaultError {
		p.req.Usage = Usage{}
		refuse(p.w, p.req, statusOf(p.fault.errorType()), p.fault.errorType(), p.fault.Message)
		return
	}
	body := encode(msg)
	p.w.Header().Set("content-type", "application/json")
	if p.write(body[:len(body)/2]) {
		p.strike()
	}
	panic(http.ErrAbortHandler)
}

func (p *player) message(u Usage) map[string]any {
	return map[string]any{
		"id": "msg_" + p.server.id(p.req.N), "type": "message", "role": "assistant", "model": p.req.Model,
		"content": []any{}, "stop_reason": nil, "stop_sequence": nil, "usage": u,
	}
}

// An event is one of a stream.
type event struct {
	name string
	data map[string]any
	said int // bytes of content in it
}

// stream sends the answer as server-sent events.
func (p *player) stream(maxTokens int) {
	p.w.Header().Set("content-type", "text/event-stream; charset=utf-8")
	p.w.Header().Set("cache-control", "no-cache")
	blocks, tokens, stop := p.turn.contents(maxTokens)
	events := p.events(blocks, tokens, stop)
	strikes := len(events)
	if p.fault != nil {
		strikes = min(p.fault.After, len(events)-2) // the last two would end the answer well
	}
	said := 0
	for i, e := range events {
		if i == strikes {
			if p.strike() {
				return
			}
			panic(http.ErrAbortHandler)
		}
		e.data["type"] = e.name
		if !p.write(fmt.Appendf(nil, "event: %s\ndata: %s\n\n", e.name, encode(e.data))) {
			panic(http.ErrAbortHandler)
		}
		said += e.said
		p.req.Usage.Output = min(tokens, tokensOf(said))
	}
	p.req.Usage.Output = tokens
	p.req.Outcome = Answered
}

func (p *player) events(blocks []content, tokens int, stop string) []event {
	begin, end := p.req.Usage, p.req.Usage
	begin.Output, end.Output = 1, tokens
	events := []event{
		{name: "message_start", data: map[string]any{"message": p.message(begin)}},
		{name: "ping", data: map[string]any{}},
	}
	for i, b := range blocks {
		first := b.whole()
		switch b.kind {
		case "thinking":
			first["thinking"], first["signature"] = "", ""
		case "text":
			first["text"] = ""
		case "tool_use":
			first["input"] = struct{}{}
		}
		events = append(events, event{name: "content_block_start", data: map[string]any{"index": i, "content_block": first}})
		delta := func(said int, d map[string]any) {
			events = append(events, event{name: "content_block_delta", data: map[string]any{"index": i, "delta": d}, said: said})
		}
		for chunk := range chunks(b.text + string(b.input)) {
			switch b.kind {
			case "thinking":
				delta(len(chunk), map[string]any{"type": "thinking_delta", "thinking": chunk})
			case "tool_use":
				delta(len(chunk), map[string]any{"type": "input_json_delta", "partial_json": chunk})
			default:
				delta(len(chunk), map[string]any{"type": "text_delta", "text": chunk})
			}
		}
		if b.kind == "thinking" {
			delta(0, map[string]any{"type": "signature_delta", "signature": signature})
		}
		events = append(events, event{name: "content_block_stop", data: map[string]any{"index": i}})
	}
	return append(events,
		event{name: "message_delta", data: map[string]any{"delta": map[string]any{"stop_reason": stop, "stop_sequence": nil}, "usage": end}},
		event{name: "message_stop", data: map[string]any{}},
	)
}

// chunks yields s in pieces of a size as the API's, cut between runes.
func chunks(s string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for len(s) > 0 {
			chunk := cutText(s, 96)
			if chunk == "" { // no rune begins here: it is no text, so be it
				chunk = s
			}
			if !yield(chunk) {
				return
			}
			s = s[len(chunk):]
		}
	}
}

// strike lets the fault happen and reports whether the answer ends in order;
// otherwise the connection is to be broken.
func (p *player) strike() bool {
	p.req.Outcome = Broken
	switch p.fault.Kind {
	case FaultError:
		return p.write(fmt.Appendf(nil, "event: error\ndata: %s\n\n", encode(errorBody(p.fault.errorType(), p.fault.Message))))
	case FaultStall:
		p.server.wait(p.ctx, -1)
	}
	return false
}

// write reports whether the client is still there.
func (p *player) write(b []byte) bool {
	if _, err := p.w.Write(b); err != nil || p.ctx.Err() != nil {
		p.req.Outcome = Left
		return false
	}
	if f, ok := p.w.(http.Flusher); ok {
		f.Flush()
	}
	return true
}

// encode returns the JSON of what the stand-in made itself, which cannot fail
// but for a tool input that is no JSON, and that no valid script has.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return b
}

func (f Fault) errorType() string {
	if f.Type != "" {
		return f.Type
	}
	return errorTypes[529]
}

// errorTypes are the API's words, from Anthropic's documentation of errors.
var errorTypes = map[int]string{
	400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
	404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 504: "timeout_error", 529: "overloaded_error",
}

func statusOf(errorType string) int {
	for status, t := range errorTypes {
		if t == errorType {
			return status
		}
	}
	return http.StatusInternalServerError
}

func errorBody(kind, message string) map[string]any {
	if message == "" {
		message = strings.ReplaceAll(kind, "_", " ")
	}
	return map[string]any{"type": "error", "error": map[string]string{"type": kind, "message": message}}
}

// refuse answers with an error; an empty kind is the one of the status.
func refuse(w http.ResponseWriter, req *Request, status int, kind, message string) {
	if kind == "" {
		kind = errorTypes[status]
	}
	if kind == "" && status < 500 {
		kind = errorTypes[400]
	} else if kind == "" {
		kind = errorTypes[500]
	}
	req.Status, req.Outcome = status, Refused
	send(w, status, errorBody(kind, message))
}

func answer(w http.ResponseWriter, req *Request, body any) {
	req.Status, req.Outcome = http.StatusOK, Answered
	send(w, http.StatusOK, body)
}

func send(w http.ResponseWriter, status int, body any) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(status)
	// A client that is gone reads no answer, and there is nobody to tell.
	_, _ = w.Write(encode(body))
}
