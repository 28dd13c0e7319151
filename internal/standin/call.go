package standin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
)

// A call is the part of a request's body that the stand-in looks at.
type call struct {
	Model     string            `json:"model"`
	MaxTokens int               `json:"max_tokens"`
	Stream    bool              `json:"stream"`
	System    json.RawMessage   `json:"system"`
	Tools     []json.RawMessage `json:"tools"`
	Messages  []message         `json:"messages"`
	Metadata  struct {
		UserID string `json:"user_id"`
	} `json:"metadata"`

	system   []block
	session  string
	size     int  // bytes of a body whose blocks are not kept
	counting bool // a call that counts tokens and says nothing
}

type message struct {
	Role    string          `json:"role"`
	Content json.RawMessage `json:"content"`

	blocks []block
}

// A block is one block of content: what is known of it, and its own bytes.
type block struct {
	Type      string `json:"type"`
	Text      string `json:"text"`
	Thinking  string `json:"thinking"`
	ID        string `json:"id"`
	ToolUseID string `json:"tool_use_id"`
	Cache     *struct {
		TTL string `json:"ttl"`
	} `json:"cache_control"`

	raw json.RawMessage
}

func parseCall(b []byte) (*call, error) {
	c := &call{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	var err error
	if c.system, err = parseContent(c.System); err != nil {
		return nil, fmt.Errorf("system: %w", err)
	}
	for i := range c.Messages {
		m := &c.Messages[i]
		if m.blocks, err = parseContent(m.Content); err != nil {
			return nil, fmt.Errorf("messages.%d.content: %w", i, err)
		}
	}
	return c, nil
}

// parseContent reads the API's two forms of content, a text or a list of
// blocks, as blocks.
func parseContent(raw json.RawMessage) ([]block, error) {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	if raw[0] == '"' {
		var text string
		if err := json.Unmarshal(raw, &text); err != nil {
			return nil, err
		}
		whole, err := json.Marshal(map[string]string{"type": "text", "text": text})
		return []block{{Type: "text", Text: text, raw: whole}}, err
	}
	var raws []json.RawMessage
	if err := json.Unmarshal(raw, &raws); err != nil {
		return nil, err
	}
	blocks := make([]block, len(raws))
	for i, r := range raws {
		if err := json.Unmarshal(r, &blocks[i]); err != nil {
			return nil, fmt.Errorf("block %d: %w", i, err)
		}
		blocks[i].raw = r
	}
	return blocks, nil
}

// check refuses what the API refuses.
func (c *call) check() error {
	switch {
	case c.Model == "":
		return errors.New("model: Field required")
	case c.MaxTokens < 1 && !c.counting:
		return errors.New("max_tokens: must be greater than or equal to 1")
	case len(c.Messages) == 0:
		return errors.New("messages: at least one message is required")
	}
	for i, m := range c.Messages {
		switch m.Role {
		case "user", "assistant", "system":
		default:
			return fmt.Errorf("messages.%d.role: unexpected role %q", i, m.Role)
		}
	}
	return c.checkTools()
}

// checkTools holds every tool call against the user message that follows it:
// the API refuses a conversation in which one has no result.
func (c *call) checkTools() error {
	open := map[string]bool{}
	for i, m := range c.Messages {
		switch m.Role {
		case "assistant":
			for _, b := range m.blocks {
				if b.Type == "tool_use" {
					open[b.ID] = true
				}
			}
		case "user":
			for _, b := range m.blocks {
				if b.Type == "tool_result" {
					if !open[b.ToolUseID] {
						return fmt.Errorf("messages.%d: unexpected `tool_use_id` found in `tool_result` blocks: %s", i, b.ToolUseID)
					}
					delete(open, b.ToolUseID)
				}
			}
			for id := range open {
				return fmt.Errorf("messages.%d: `tool_use` ids were found without `tool_result` blocks: %s", i, id)
			}
		}
	}
	for id := range open {
		return fmt.Errorf("messages: `tool_use` ids were found without `tool_result` blocks: %s", id)
	}
	return nil
}

const namePattern = `[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*`

var (
	marker   = regexp.MustCompile(`@script[ \t]+(` + namePattern + `)(?:#([0-9]{1,4}))?`)
	reminder = regexp.MustCompile(`(?s)<system-reminder>.*?</system-reminder>`)
)

// named finds the last text of the user that names a script, and returns the
// name, the variant (empty when none is asked for) and the messages after it.
// Texts that the client put between <system-reminder> tags count only when no
// other names one: files that a client quotes there are not the prompt.
func (c *call) named() (name, variant string, after []message, ok bool) {
	for _, strip := range []bool{true, false} {
		for i := len(c.Messages) - 1; i >= 0; i-- {
			if c.Messages[i].Role != "user" {
				continue
			}
			for _, b := range c.Messages[i].blocks {
				if b.Type != "text" {
					continue
				}
				text := b.Text
				if strip {
					text = reminder.ReplaceAllString(text, "")
				}
				if m := marker.FindStringSubmatch(text); m != nil {
					return m[1], m[2], c.Messages[i+1:], true
				}
			}
		}
	}
	return "", "", c.Messages, false
}

// sessionOf returns the client's session id, or "".
func sessionOf(h http.Header, c *call) string {
	if id := h.Get("x-claude-code-session-id"); id != "" {
		return id
	}
	var user struct {
		Session string `json:"session_id"`
	}
	if json.Unmarshal([]byte(c.Metadata.UserID), &user) == nil && user.Session != "" {
		return user.Session
	}
	// Older clients write user_HASH_account_ID_session_ID.
	if _, id, ok := strings.Cut(c.Metadata.UserID, "_session_"); ok {
		return id
	}
	return ""
}
