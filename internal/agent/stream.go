package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// streamLine is what we read of one line of Claude Code's "stream-json", as
// recorded from version 2.1.330. One struct serves all types of lines. A
// field of an unexpected type is left zero: see decodeStream.
type streamLine struct {
	Type      string          `json:"type"`
	Subtype   string          `json:"subtype"`
	SessionID string          `json:"session_id"`
	ParentID  string          `json:"parent_tool_use_id"` // set when a sub-agent speaks
	Message   json.RawMessage `json:"message"`            // an object, or the text of a notice
	Model     string          `json:"model"`              // system/init
	Content   json.RawMessage `json:"content"`            // the text of a notice
	Summary   string          `json:"summary"`            // system/task_notification

	// system/api_retry
	Attempt     int             `json:"attempt"`
	MaxRetries  int             `json:"max_retries"`
	DelayMS     int             `json:"retry_delay_ms"`
	ErrorStatus int             `json:"error_status"`
	Error       json.RawMessage `json:"error"`

	// result
	IsError        json.RawMessage `json:"is_error"`
	Result         string          `json:"result"`
	Errors         []string        `json:"errors"`
	Turns          int             `json:"num_turns"`
	Cost           json.RawMessage `json:"total_cost_usd"`
	Since          json.RawMessage `json:"model_usage_since_last_result"`
	TerminalReason string          `json:"terminal_reason"`
	StopReason     string          `json:"stop_reason"`
	APIErrorStatus int             `json:"api_error_status"`
}

type streamMessage struct {
	ID      string          `json:"id"`
	Model   string          `json:"model"`
	Content json.RawMessage `json:"content"` // blocks, or a text
}

type streamBlock struct {
	Type     string          `json:"type"`
	Text     string          `json:"text"`
	Thinking string          `json:"thinking"`
	Name     string          `json:"name"`
	Input    json.RawMessage `json:"input"`
	IsError  bool            `json:"is_error"`
	Content  json.RawMessage `json:"content"` // of a tool_result: blocks, or a text
}

// synthetic is the model that Claude Code names for messages which it wrote
// itself: the text of an API error, or a filler before a resumed prompt.
const synthetic = "<synthetic>"

// decodeStream reads one line of stream-json. Fields, types of lines and
// types of blocks that it does not know do not stop it.
func decodeStream(line []byte) []Event {
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return nil
	}
	var in streamLine
	if line[0] != '{' || !lenient(line, &in) {
		return []Event{{Kind: Other, Text: bounded(strings.ToValidUTF8(string(line), "\ufffd"))}}
	}
	var events []Event
	switch in.Type {
	case "assistant":
		events = in.assistant()
	case "user":
		events = in.answers()
	case "result":
		events = []Event{{Kind: Ended, End: in.account()}}
	case "system":
		switch in.Subtype {
		case "init":
			events = []Event{{Kind: Started, Model: word(in.Model)}}
		case "api_retry":
			events = []Event{{Kind: Retry, Text: in.retry(), Status: max(in.ErrorStatus, 0)}}
		}
	}
	if len(events) == 0 {
		events = []Event{{Kind: Other, Text: in.other()}}
	}
	for i := range events {
		events[i].Session = word(in.SessionID)
		events[i].Nested = in.ParentID != ""
	}
	return events
}

// lenient decodes data into v and reports whether data was JSON at all. A
// value of an unexpected type leaves its field zero and the others are read.
func lenient(data []byte, v any) bool {
	err := json.Unmarshal(data, v)
	var mismatch *json.UnmarshalTypeError
	return err == nil || errors.As(err, &mismatch)
}

// assistant returns one event for each block of a message of the model.
func (in *streamLine) assistant() []Event {
	var m streamMessage
	if !lenient(in.Message, &m) {
		return nil
	}
	if m.Model == synthetic {
		return []Event{{Kind: Other, Text: bounded(text(m.Content))}}
	}
	var events []Event
	for _, b := range blocks(m.Content) {
		e := Event{Message: word(m.ID), Model: word(m.Model)}
		switch b.Type {
		case "text":
			e.Kind, e.Text = Text, bounded(b.Text)
		case "thinking", "redacted_thinking":
			e.Kind, e.Text = Think, bounded(b.Thinking)
		case "tool_use", "server_tool_use":
			e.Kind, e.Tool, e.Text = Tool, word(b.Name), digest(b.Name, b.Input)
		default:
			e.Kind, e.Text = Other, "assistant/"+word(b.Type)
		}
		events = append(events, e)
	}
	return events
}

// answers returns one event for each answer of a tool.
func (in *streamLine) answers() []Event {
	var m streamMessage
	if !lenient(in.Message, &m) {
		return nil
	}
	var events []Event
	for _, b := range blocks(m.Content) {
		if b.Type == "tool_result" {
			events = append(events, Event{Kind: Output, Text: bounded(text(b.Content)), Failed: b.IsError})
		}
	}
	return events
}

// account reads a result. What does not clearly say that it is no error counts
// as one. The subtype is not looked at: it is "success" for most API
// errors too.
func (in *streamLine) account() *Account {
	a := &Account{
		Error:     string(in.IsError) != "false",
		Reason:    word(in.TerminalReason),
		APIStatus: max(in.APIErrorStatus, 0),
		Text:      in.Result,
		Turns:     max(in.Turns, 0),
	}
	if a.Text == "" {
		a.Text = strings.Join(in.Errors, "\n")
	}
	a.Text = fork.Cut(a.Text, fork.MaxText)
	if in.StopReason == "refusal" && a.Error {
		a.Reason = "refusal" // terminal_reason is "api_error", as for a lost connection
	}
	// A cost that is no amount is left out: the ledger has the true one.
	if err := a.Cost.UnmarshalJSON(in.Cost); err != nil || a.Cost < 0 {
		a.Cost = 0
	}
	a.Since = since(in.Since)
	return a
}

// since sums up what each model was used for since the last result. Nil: the
// line does not say, or nothing that can be.
func since(data json.RawMessage) *fork.Usage {
	var models map[string]struct {
		Cost       json.RawMessage `json:"costUSD"`
		Input      int64           `json:"inputTokens"`
		Output     int64           `json:"outputTokens"`
		CacheRead  int64           `json:"cacheReadInputTokens"`
		CacheWrite int64           `json:"cacheCreationInputTokens"`
	}
	if len(data) == 0 || json.Unmarshal(data, &models) != nil || models == nil {
		return nil
	}
	const most = 1 << 40 // tokens, and nano-dollars a thousand times that
	sum := &fork.Usage{}
	for _, m := range models {
		u := fork.Usage{InputTokens: m.Input, OutputTokens: m.Output, CacheReadTokens: m.CacheRead, CacheWriteTokens: m.CacheWrite}
		if err := u.Cost.UnmarshalJSON(m.Cost); err != nil || u.Cost < 0 || u.Cost > 1000*most {
			return nil
		}
		for _, n := range []int64{m.Input, m.Output, m.CacheRead, m.CacheWrite} {
			if n < 0 || n > most {
				return nil
			}
		}
		*sum = sum.Add(u)
	}
	return sum
}

func (in *streamLine) retry() string {
	why := word(text(in.Error))
	if why == "" || why == "unknown" {
		why = "the model API cannot be reached"
	}
	if in.ErrorStatus != 0 {
		why = fmt.Sprintf("HTTP %d %s", in.ErrorStatus, why)
	}
	try := fmt.Sprintf("try %d", in.Attempt)
	if in.MaxRetries > 0 {
		try += fmt.Sprintf(" of %d", in.MaxRetries)
	}
	return fmt.Sprintf("%s (%s, in %.1f s)", why, try, float64(in.DelayMS)/1000)
}

// other names a line that has no kind of its own, with its text if it has one.
func (in *streamLine) other() string {
	name := word(in.Type)
	if in.Subtype != "" {
		name += "/" + word(in.Subtype)
	}
	for _, s := range []string{text(in.Content), text(in.Message), in.Summary} {
		if s != "" {
			return bounded(name + ": " + s)
		}
	}
	return name
}

// blocks reads the content of a message: a list of blocks, or a bare text.
func blocks(content json.RawMessage) []streamBlock {
	if len(content) == 0 {
		return nil
	}
	if content[0] != '[' {
		return []streamBlock{{Type: "text", Text: text(content)}}
	}
	var raw []json.RawMessage
	lenient(content, &raw)
	list := make([]streamBlock, 0, min(len(raw), maxEvents))
	for _, r := range raw[:min(len(raw), maxEvents)] {
		var b streamBlock
		lenient(r, &b)
		list = append(list, b)
	}
	return list
}

// text reads a JSON string, or the texts of a list of blocks. Anything else
// is "".
func text(content json.RawMessage) string {
	if len(content) == 0 {
		return ""
	}
	switch content[0] {
	case '"':
		var s string
		lenient(content, &s)
		return s
	case '[':
		var parts []string
		for _, b := range blocks(content) {
			switch {
			case b.Type == "text":
				parts = append(parts, b.Text)
			case b.Type != "":
				parts = append(parts, "["+word(b.Type)+"]")
			}
		}
		return strings.Join(parts, "\n")
	}
	return ""
}

// digest says on one line what a tool is used for.
func digest(tool string, input json.RawMessage) string {
	var known struct {
		Command     string `json:"command"`
		Path        string `json:"path"`
		FilePath    string `json:"file_path"`
		Notebook    string `json:"notebook_path"`
		Pattern     string `json:"pattern"`
		Description string `json:"description"`
	}
	lenient(input, &known)
	s := ""
	switch strings.ToLower(tool) {
	case "bash":
		s = known.Command
	case "edit", "multiedit", "write", "read", "notebookedit":
		s = first(known.FilePath, known.Notebook, known.Path)
	case "glob", "grep":
		s = known.Pattern
	case "agent", "task":
		s = known.Description
	}
	if s == "" {
		var b bytes.Buffer
		if len(input) > 0 && json.Compact(&b, input) == nil && b.String() != "{}" {
			s = b.String()
		}
	}
	return bounded(flat(fork.Cut(s, 2*maxEventText)))
}

func first(words ...string) string {
	for _, w := range words {
		if w != "" {
			return w
		}
	}
	return ""
}
