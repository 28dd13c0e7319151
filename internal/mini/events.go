package mini

import (
	"encoding/json"
	"io"
	"time"
)

// events writes Claude Code's stream-json, as version 2.1.330 does, as far as
// a loop without sub-agents and permissions has something to say.
type events struct {
	w       io.Writer
	session string
	model   string
	began   time.Time
	spent   usage
}

// write sends one line. A reader that went away does not stop the work: what
// was said is in the transcript.
func (e *events) write(fields map[string]any) {
	fields["session_id"] = e.session
	fields["uuid"] = newUUID()
	_, _ = e.w.Write(append(mustJSON(fields), '\n'))
}

func (e *events) init(dir string, tools []string) {
	e.began = time.Now()
	e.write(map[string]any{
		"type": "system", "subtype": "init", "cwd": dir, "model": e.model, "tools": tools, "mcp_servers": []string{},
		"permissionMode": "bypassPermissions", "apiKeySource": "ANTHROPIC_API_KEY",
	})
}

// assistant writes one line for each block; they share the message's id and
// usage.
func (e *events) assistant(r *reply) {
	var u usage
	if json.Unmarshal(r.Usage, &u) == nil {
		e.spent.Input += u.Input
		e.spent.CacheWrite += u.CacheWrite
		e.spent.CacheRead += u.CacheRead
		e.spent.Output += u.Output
	}
	for _, b := range r.Content {
		e.said(r.ID, r.Model, r.StopReason, b, r.Usage)
	}
}

// synthetic writes a message that no model said.
func (e *events) synthetic(text string) {
	e.said(newUUID(), "<synthetic>", "stop_sequence", textBlock(text), mustJSON(usage{}))
}

func (e *events) said(id, model, stop string, b, u json.RawMessage) {
	e.write(map[string]any{
		"type": "assistant", "parent_tool_use_id": nil,
		"message": map[string]any{
			"id": id, "type": "message", "role": "assistant", "model": model,
			"content": []json.RawMessage{b}, "stop_reason": stop, "stop_sequence": nil, "usage": u,
		},
	})
}

func (e *events) user(b json.RawMessage) {
	e.write(map[string]any{
		"type": "user", "parent_tool_use_id": nil,
		"message": map[string]any{"role": "user", "content": []json.RawMessage{b}},
	})
}

func (e *events) toolResult(b json.RawMessage) { e.user(b) }

func (e *events) interrupted() { e.user(textBlock("[Request interrupted by user]")) }

func (e *events) retry(r retry) {
	var status any
	if r.err.status != 0 {
		status = r.err.status
	}
	e.write(map[string]any{
		"type": "system", "subtype": "api_retry", "attempt": r.attempt, "max_retries": r.most,
		"retry_delay_ms": r.delay.Milliseconds(), "error_status": status, "error": r.err.word,
	})
}

// result writes the last line. The cost is left out: the gateway has it.
func (e *events) result(end ending) {
	fields := map[string]any{
		"type": "result", "subtype": end.subtype, "is_error": end.isError, "num_turns": end.turns,
		"duration_ms": time.Since(e.began).Milliseconds(), "terminal_reason": end.reason,
		"stop_reason": nil, "api_error_status": nil, "usage": e.spent, "permission_denials": []string{},
	}
	if end.stop != "" {
		fields["stop_reason"] = end.stop
	}
	if end.status != 0 {
		fields["api_error_status"] = end.status
	}
	switch {
	case end.subtype == "success":
		fields["result"] = end.text
	case end.text != "":
		fields["errors"] = []string{end.text}
	}
	e.write(fields)
}
