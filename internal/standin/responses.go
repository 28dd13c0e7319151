package standin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// OpenAI's Responses API, for clients that speak it. The same scripts play: an
// item of the conversation is read as the message that it stands for.

// A responsesCall is the part of a body that the stand-in looks at.
type responsesCall struct {
	Model     string          `json:"model"`
	MaxOutput int             `json:"max_output_tokens"` // 0: no limit
	Stream    bool            `json:"stream"`
	Input     json.RawMessage `json:"input"` // a text, or items
	CacheKey  string          `json:"prompt_cache_key"`
}

type item struct {
	Type    string          `json:"type"`
	Role    string          `json:"role"`
	Content json.RawMessage `json:"content"` // a text, or parts
	CallID  string          `json:"call_id"`
}

// unlimited is the output of a call that names no limit.
const unlimited = 128_000

// readResponses takes the body of a call of /v1/responses.
func (s *Server) readResponses(w http.ResponseWriter, r *http.Request, req *Request) *call {
	b, ok := s.body(w, r, req)
	if !ok {
		return nil
	}
	var in responsesCall
	if err := json.Unmarshal(b, &in); err != nil {
		refuse(w, req, http.StatusBadRequest, "", "body: "+err.Error())
		return nil
	}
	c := &call{Model: in.Model, MaxTokens: in.MaxOutput, Stream: in.Stream, session: in.CacheKey, size: len(b)}
	if c.MaxTokens == 0 {
		c.MaxTokens = unlimited
	}
	var items []item
	if json.Unmarshal(in.Input, &items) != nil {
		items = []item{{Type: "message", Role: "user", Content: in.Input}}
	}
	for _, i := range items {
		m, ok := i.message()
		last := len(c.Messages) - 1
		switch {
		case !ok:
		case last >= 0 && c.Messages[last].Role == m.Role:
			c.Messages[last].blocks = append(c.Messages[last].blocks, m.blocks...)
		default:
			c.Messages = append(c.Messages, m)
		}
	}
	req.Model, req.MaxTokens, req.Stream, req.Session = c.Model, in.MaxOutput, c.Stream, c.session
	if err := c.check(); err != nil {
		refuse(w, req, http.StatusBadRequest, "", err.Error())
		return nil
	}
	return c
}

// message returns what the item stands for; false for one that stands for
// nothing, such as thoughts.
func (i item) message() (message, bool) {
	switch i.Type {
	case "message", "":
		m := message{Role: "user"}
		if i.Role == "assistant" {
			m.Role = "assistant"
		}
		var text string
		if json.Unmarshal(i.Content, &text) == nil {
			m.blocks = []block{{Type: "text", Text: text}}
			return m, true
		}
		var parts []struct {
			Text string `json:"text"`
		}
		if json.Unmarshal(i.Content, &parts) != nil {
			return m, false
		}
		for _, p := range parts {
			m.blocks = append(m.blocks, block{Type: "text", Text: p.Text})
		}
		return m, true
	case "function_call":
		return message{Role: "assistant", blocks: []block{{Type: "tool_use", ID: i.CallID}}}, true
	case "function_call_output":
		return message{Role: "user", blocks: []block{{Type: "tool_result", ToolUseID: i.CallID}}}, true
	}
	return message{}, false
}

// respond answers a call of /v1/responses.
func (s *Server) respond(w http.ResponseWriter, r *http.Request, req *Request, c *call) {
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
	blocks, tokens, stop := t.contents(c.MaxTokens)
	req.Usage = s.charged(req, c)
	req.Usage.Output = tokens
	req.Status = http.StatusOK
	p := &player{server: s, w: w, ctx: r.Context(), req: req, turn: t}
	if faulty {
		p.fault = &fault
	}
	p.responses(blocks, stop, c.Stream)
}

// charged splits the prompt as the API does, which caches by itself: what an
// earlier call of the conversation had is read from the cache, in steps of 128
// tokens.
func (s *Server) charged(req *Request, c *call) Usage {
	total := c.size / bytesPerToken
	s.mu.Lock()
	defer s.mu.Unlock()
	key := req.Key + "\x00responses\x00" + c.conversation()
	read := min(s.tries[key], total) / 128 * 128
	if len(s.tries) >= maxSessions {
		clear(s.tries)
	}
	s.tries[key] = total
	return Usage{Input: total - read, CacheRead: read}
}

// responses sends the answer, as events or as one document.
func (p *player) responses(blocks []content, stop string, stream bool) {
	id := "resp_" + p.server.id(p.req.N)
	u := p.req.Usage
	done := map[string]any{
		"id": id, "object": "response", "model": p.req.Model, "status": "completed",
		"usage": map[string]any{
			"input_tokens": u.Input + u.CacheRead, "input_tokens_details": map[string]int{"cached_tokens": u.CacheRead},
			"output_tokens": u.Output, "output_tokens_details": map[string]int{"reasoning_tokens": 0}, "total_tokens": u.Input + u.CacheRead + u.Output,
		},
	}
	last := "response.completed"
	if stop == "max_tokens" {
		last = "response.incomplete"
		done["status"], done["incomplete_details"] = "incomplete", map[string]string{"reason": "max_output_tokens"}
	}
	events := []event{{name: "response.created", data: map[string]any{"response": map[string]any{"id": id, "model": p.req.Model, "status": "in_progress"}}}}
	var output []any
	for n, b := range blocks {
		item := b.item(fmt.Sprintf("%s_%d", id, n))
		if item == nil {
			continue
		}
		output = append(output, item)
		events = append(events, event{name: "response.output_item.added", data: map[string]any{"output_index": n, "item": map[string]any{"type": item["type"], "id": item["id"], "role": "assistant", "content": []any{}, "name": item["name"], "call_id": item["call_id"], "arguments": ""}}})
		if b.kind == "text" {
			events = append(events, event{name: "response.output_text.delta", data: map[string]any{"output_index": n, "delta": b.text}})
		}
		events = append(events, event{name: "response.output_item.done", data: map[string]any{"output_index": n, "item": item}})
	}
	done["output"] = output
	if !stream {
		answer(p.w, p.req, done)
		return
	}
	events = append(events, event{name: last, data: map[string]any{"response": done}})
	p.w.Header().Set("content-type", "text/event-stream")
	for n, e := range events {
		if p.fault != nil && n == min(p.fault.After, len(events)-1) {
			p.req.Usage.Output = 0
			if p.fault.Kind == FaultStall {
				p.server.wait(p.ctx, -1)
			}
			p.req.Outcome = Broken
			panic(http.ErrAbortHandler)
		}
		e.data["type"] = e.name
		if !p.write(fmt.Appendf(nil, "event: %s\ndata: %s\n\n", e.name, encode(e.data))) {
			panic(http.ErrAbortHandler)
		}
	}
	p.req.Outcome = Answered
}

// item returns the block as the API's output has it; nil for thoughts.
func (b content) item(id string) map[string]any {
	switch b.kind {
	case "text":
		return map[string]any{"type": "message", "id": "msg_" + id, "role": "assistant", "status": "completed",
			"content": []any{map[string]any{"type": "output_text", "text": b.text, "annotations": []any{}}}}
	case "tool_use":
		name, input := codexTool(b.name, b.input)
		return map[string]any{"type": "function_call", "id": "fc_" + id, "call_id": b.id, "status": "completed", "name": name, "arguments": string(input)}
	}
	return nil
}

// codexTool translates Claude Code's shell tool to Codex's (measured with
// version 0.169.0), so that one script plays to both.
func codexTool(name string, input []byte) (string, []byte) {
	var bash struct {
		Command string `json:"command"`
	}
	if !strings.EqualFold(name, "Bash") || json.Unmarshal(input, &bash) != nil {
		return name, input
	}
	return "exec_command", encode(map[string]string{"cmd": bash.Command})
}
