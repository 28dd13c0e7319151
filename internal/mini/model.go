package mini

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The bounds of one call of the model.
const (
	callTimeout = 10 * time.Minute
	maxReply    = 32 << 20 // bytes
	firstWait   = 500 * time.Millisecond
	longestWait = 20 * time.Second
	longestAsk  = time.Minute // of what a server may ask us to wait
)

// Usage is the API's usage object, as far as it is summed up.
type usage struct {
	Input      int `json:"input_tokens"`
	CacheWrite int `json:"cache_creation_input_tokens"`
	CacheRead  int `json:"cache_read_input_tokens"`
	Output     int `json:"output_tokens"`
}

// A reply is one answer of the model.
type reply struct {
	ID         string            `json:"id"`
	Model      string            `json:"model"`
	Content    []json.RawMessage `json:"content"`
	StopReason string            `json:"stop_reason"`
	Usage      json.RawMessage   `json:"usage"`
}

func (r *reply) blocks() []block { return blocks(r.Content) }

// A callError is a call of the model that failed for good.
type callError struct {
	status int // of the HTTP answer; 0: there was none
	text   string
	again  bool
	after  time.Duration // how long the server asks to wait; negative: it does not say
	word   string        // the kind of trouble, as Claude Code names it
}

// Error returns the text as Claude Code would show it.
func (e *callError) Error() string {
	if e.status == 0 {
		return "API Error: " + e.text
	}
	return fmt.Sprintf("API Error: %d %s", e.status, e.text)
}

// A retry is a call that failed and will be repeated.
type retry struct {
	attempt int
	most    int // attempts, if the waits to come are as long as they get
	delay   time.Duration
	err     *callError
}

// A model asks the Messages API.
type model struct {
	name     string
	url      string
	key      string
	user     string // metadata.user_id
	session  string
	patience time.Duration
	client   *http.Client
}

func newModel(o options) *model {
	return &model{
		name:     o.model,
		url:      o.baseURL + "/v1/messages",
		key:      o.key,
		user:     string(mustJSON(map[string]string{"session_id": o.session})),
		session:  o.session,
		patience: o.patience,
		client: &http.Client{
			Timeout: callTimeout,
			// The key is for one server only.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// ask returns the model's answer to the conversation. Passing trouble (no
// connection, 408, 409, 429 and 5xx) is waited out for as long as the model
// is patient, and told to tell each time.
func (m *model) ask(ctx context.Context, messages []message, tools json.RawMessage, system string, tell func(retry)) (*reply, *callError) {
	body := mustJSON(map[string]any{
		"model": m.name, "max_tokens": maxTokens, "stream": false,
		"system":   []json.RawMessage{cached(textBlock(system))},
		"tools":    tools,
		"messages": cachedToEnd(messages),
		"metadata": map[string]string{"user_id": m.user},
	})
	deadline := time.Now().Add(m.patience)
	for attempt := 1; ; attempt++ {
		r, err := m.try(ctx, body, attempt-1)
		if err == nil || !err.again || ctx.Err() != nil {
			return r, err
		}
		delay := err.after
		if delay < 0 {
			delay = min(firstWait<<min(attempt-1, 10), longestWait)
			delay -= time.Duration(rand.Int64N(int64(delay) / 4)) // so that many agents do not come back at once
		}
		left := time.Until(deadline) - delay
		if left < 0 {
			return nil, err
		}
		tell(retry{attempt: attempt, most: attempt + int(left/longestWait), delay: delay, err: err})
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}

// cached marks a block as the end of a prefix to be cached.
func cached(b json.RawMessage) json.RawMessage {
	var fields map[string]json.RawMessage
	if json.Unmarshal(b, &fields) != nil {
		return b
	}
	fields["cache_control"] = json.RawMessage(`{"type":"ephemeral"}`)
	return mustJSON(fields)
}

// cachedToEnd marks the last block of a conversation that ends with the user:
// the next turn reads everything up to there from the cache.
func cachedToEnd(messages []message) []message {
	n := len(messages)
	if n == 0 || messages[n-1].Role != "user" || len(messages[n-1].Content) == 0 {
		return messages
	}
	last := messages[n-1]
	content := append([]json.RawMessage(nil), last.Content...)
	content[len(content)-1] = cached(content[len(content)-1])
	return append(append([]message(nil), messages[:n-1]...), message{Role: last.Role, Content: content})
}

// try makes one call.
func (m *model) try(ctx context.Context, body []byte, retries int) (*reply, *callError) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, m.url, bytes.NewReader(body))
	if err != nil {
		return nil, &callError{text: err.Error()}
	}
	h := req.Header
	h.Set("content-type", "application/json")
	h.Set("anthropic-version", "2023-06-01")
	h.Set("x-api-key", m.key)
	h.Set("x-claude-code-session-id", m.session)
	h.Set("x-stainless-retry-count", strconv.Itoa(retries))
	h.Set("user-agent", "sandbox-temporal-mini")
	res, err := m.client.Do(req)
	if err != nil {
		return nil, unreached(err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxReply+1))
	if err != nil {
		return nil, unreached(err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, refusal(res, b)
	}
	var r reply
	if len(b) > maxReply {
		return nil, &callError{text: fmt.Sprintf("the answer has more than %d bytes", maxReply)}
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, &callError{text: "the answer is no message: " + err.Error(), again: true, after: -1, word: "unknown"}
	}
	return &r, nil
}

// unreached is the trouble of a call without an answer.
func unreached(err error) *callError {
	if inner := errors.Unwrap(err); inner != nil {
		err = inner // without the method and the address, which everybody knows
	}
	return &callError{text: "Connection error: " + err.Error(), again: true, after: -1, word: "unknown"}
}

// refusal reads an answer that is an error. Whether to try again is what the
// server says in x-should-retry, or else what the status says, as in
// Anthropic's SDKs.
func refusal(res *http.Response, body []byte) *callError {
	e := &callError{status: res.StatusCode, after: -1, text: http.StatusText(res.StatusCode), word: "unknown"}
	var doc struct {
		Error struct {
			Message string `json:"message"`
		} `json:"error"`
	}
	if json.Unmarshal(body, &doc) == nil && doc.Error.Message != "" {
		e.text, _ = clip(doc.Error.Message, 4<<10)
	}
	switch s := res.StatusCode; {
	case s == http.StatusTooManyRequests:
		e.again, e.word = true, "rate_limit"
	case s == 529:
		e.again, e.word = true, "overloaded"
	case s >= 500:
		e.again, e.word = true, "server_error"
	case s == http.StatusRequestTimeout, s == http.StatusConflict:
		e.again = true
	}
	switch res.Header.Get("x-should-retry") {
	case "true":
		e.again = true
	case "false":
		e.again = false
	}
	if ms, err := strconv.ParseFloat(res.Header.Get("retry-after-ms"), 64); err == nil && ms >= 0 {
		e.after = min(time.Duration(min(ms, 1e6))*time.Millisecond, longestAsk)
	} else if s, err := strconv.ParseFloat(strings.TrimSpace(res.Header.Get("retry-after")), 64); err == nil && s >= 0 {
		e.after = min(time.Duration(min(s, 1e6)*float64(time.Second)), longestAsk)
	}
	return e
}
