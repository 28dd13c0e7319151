package mini

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// maxTranscript bounds the file of a session, in bytes.
const maxTranscript = 64 << 20

// A message is one of the conversation. Its blocks are kept as they came:
// some, such as signed thinking, must go back unchanged.
type message struct {
	Role    string            `json:"role"`
	Content []json.RawMessage `json:"content"`
}

// A block is what is looked at of a block of content.
type block struct {
	Type      string          `json:"type"`
	Text      string          `json:"text"`
	ID        string          `json:"id"`
	Name      string          `json:"name"`
	Input     json.RawMessage `json:"input"`
	ToolUseID string          `json:"tool_use_id"`
}

// blocks reads content; a block that cannot be read is left out.
func blocks(content []json.RawMessage) []block {
	bs := make([]block, 0, len(content))
	for _, raw := range content {
		var b block
		if json.Unmarshal(raw, &b) == nil {
			bs = append(bs, b)
		}
	}
	return bs
}

func textBlock(text string) json.RawMessage {
	return mustJSON(struct {
		Type string `json:"type"`
		Text string `json:"text"`
	}{"text", text})
}

func toolResult(id, text string, failed bool) json.RawMessage {
	return mustJSON(struct {
		Type      string `json:"type"`
		ToolUseID string `json:"tool_use_id"`
		Content   string `json:"content"`
		IsError   bool   `json:"is_error,omitempty"`
	}{"tool_result", id, text, failed})
}

// A transcript is a session, as it is kept in its file.
type transcript struct {
	Prompt   string    `json:"prompt"`
	Messages []message `json:"messages"`
	Turns    int       `json:"turns"`           // answers of the model to Prompt, or to what was asked last
	Results  int       `json:"results"`         // of tools, so far
	Ended    string    `json:"ended,omitempty"` // why the model stopped for good; empty: it has not

	path string
}

// openTranscript begins a session or goes on with one.
func openTranscript(o options) (*transcript, error) {
	const op = "open session"
	t := &transcript{path: filepath.Join(o.home, ".mini", o.session+".json")}
	found, err := t.load()
	if err != nil {
		return nil, err
	}
	switch {
	case found && !o.resume:
		return nil, fault.New(op, fault.Conflict, "session %s is already in use", o.session)
	case !found && o.prompt == "":
		return nil, fault.New(op, fault.NotFound, "no conversation found with session ID %s", o.session)
	case !found:
		t.Prompt = o.prompt
		t.say(textBlock(o.prompt))
	default:
		t.goOn(o.prompt)
	}
	return t, t.save()
}

// goOn prepares a session that was broken off for its next turn. A prompt
// that is the session's own is not said twice.
func (t *transcript) goOn(prompt string) {
	fresh := prompt != "" && prompt != t.Prompt
	if t.Ended != "" && !fresh {
		return
	}
	t.Ended = ""
	if fresh {
		t.Turns = 0
	} else {
		prompt = goOn
	}
	var say []json.RawMessage
	if n := len(t.Messages); n > 0 && t.Messages[n-1].Role == "assistant" {
		// The API wants a result for every call, and commands are not run
		// twice: they may have been half done.
		for _, b := range blocks(t.Messages[n-1].Content) {
			if b.Type == "tool_use" {
				say = append(say, toolResult(b.ID, "[Tool call interrupted: the session ended before this call's result was recorded, so its outcome is unknown.]", true))
				t.Results++
			}
		}
		t.say(append(say, textBlock(prompt))...)
	} else if fresh {
		t.say(textBlock(prompt))
	}
	// Otherwise the model was being asked: the same call is made again.
}

// say appends content of the user's side.
func (t *transcript) say(content ...json.RawMessage) {
	if n := len(t.Messages); n > 0 && t.Messages[n-1].Role == "user" {
		t.Messages[n-1].Content = append(t.Messages[n-1].Content, content...)
		return
	}
	t.Messages = append(t.Messages, message{Role: "user", Content: content})
}

// hear appends a reply. An empty one is left out: the API takes none back.
// A reply that calls no tool and was not cut short is the last.
func (t *transcript) hear(r *reply) {
	t.Turns++
	if len(r.Content) > 0 {
		t.Messages = append(t.Messages, message{Role: "assistant", Content: r.Content})
	}
	if r.StopReason == "max_tokens" || r.StopReason == "pause_turn" || slices.ContainsFunc(r.blocks(), func(b block) bool { return b.Type == "tool_use" }) {
		return
	}
	t.Ended = cmp.Or(r.StopReason, "end_turn")
}

func (t *transcript) lastText() string {
	for i := len(t.Messages) - 1; i >= 0; i-- {
		if t.Messages[i].Role != "assistant" {
			continue
		}
		var texts []string
		for _, b := range blocks(t.Messages[i].Content) {
			if b.Type == "text" {
				texts = append(texts, b.Text)
			}
		}
		return strings.Join(texts, "\n")
	}
	return ""
}

func (t *transcript) load() (found bool, err error) {
	const op = "read session"
	f, err := os.Open(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, &fault.Error{Op: op, Kind: fault.Unavailable, Err: err}
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxTranscript+1))
	if err != nil {
		return false, &fault.Error{Op: op, Kind: fault.Unavailable, Err: err}
	}
	if len(b) > maxTranscript {
		return false, fault.New(op, fault.Invalid, "%s has more than %d bytes", t.path, maxTranscript)
	}
	if err := json.Unmarshal(bytes.TrimSpace(b), t); err != nil {
		return false, &fault.Error{Op: op, Kind: fault.Invalid, Err: err}
	}
	return true, nil
}

// save replaces the session's file. Whoever dies in between leaves the one
// before.
func (t *transcript) save() error {
	const op = "save session"
	b, err := json.Marshal(t)
	if err != nil {
		return &fault.Error{Op: op, Kind: fault.Internal, Err: err}
	}
	if len(b) > maxTranscript {
		return fault.New(op, fault.Full, "the conversation has more than %d bytes", maxTranscript)
	}
	dir := filepath.Dir(t.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return &fault.Error{Op: op, Kind: fault.Unavailable, Err: err}
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return &fault.Error{Op: op, Kind: fault.Unavailable, Err: err}
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), t.path)
	}
	if err != nil {
		return &fault.Error{Op: op, Kind: fault.Unavailable, Err: errors.Join(err, os.Remove(f.Name()))}
	}
	return nil
}
