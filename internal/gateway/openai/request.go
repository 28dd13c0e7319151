// Package openai reads what OpenAI's API bills from the bodies of its two ways
// to ask a model: Responses and Chat Completions. It is pure: bytes in, numbers
// out.
package openai

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// An API is one of the two ways to ask.
type API string

// The two ways, by their paths.
const (
	Responses API = "/v1/responses"
	Chat      API = "/v1/chat/completions"
)

// A Request is what the price of a call depends on.
type Request struct {
	Model     string
	Stream    bool
	MaxOutput int64 // tokens for each answer; 0: the body names no limit
	Answers   int64 // how many are asked for; at least 1
	Kept      bool  // goes on with a conversation that the API keeps: the prompt is longer than the body

	// Unpriced is what the body asks for and has no price here, in words;
	// empty: nothing.
	Unpriced string

	api     API
	limit   span // of the number under the limit's key
	options span // of the value of stream_options
	usage   bool // the stream will tell its usage
}

// A span is where a value stands in the body; empty: nowhere.
type span struct{ at, end int }

// errJSON is a body that is not one JSON object.
var errJSON = errors.New("the body is not one JSON object")

// maxCount is more tokens than any call has.
const maxCount = 1 << 32

// limits are the keys that bound the output. The newer one of Chat Completions
// counts what the model thinks, the older one is deprecated but read.
var limits = map[API][]string{
	Responses: {"max_output_tokens"},
	Chat:      {"max_completion_tokens", "max_tokens"},
}

// Read finds everything in body that the price depends on. The error says what
// is wrong with the body, for the agent to read.
func Read(api API, body []byte) (*Request, error) {
	if !utf8.Valid(body) {
		return nil, errJSON
	}
	q := &Request{api: api, Answers: 1}
	seen := map[string]bool{}
	err := members(body, func(key string, raw json.RawMessage, at span) error {
		// Which of two equal keys counts is up to the reader. What is metered
		// must be what is billed.
		if seen[key] {
			return fmt.Errorf("the body has %q twice", key)
		}
		seen[key] = true
		return q.member(key, raw, at)
	})
	if err != nil {
		return nil, err
	}
	if q.Model == "" {
		return nil, errors.New("the body names no model")
	}
	return q, nil
}

// members calls f for each member of the object.
func members(body []byte, f func(key string, raw json.RawMessage, at span) error) error {
	d := json.NewDecoder(bytes.NewReader(body))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return errJSON
	}
	for d.More() {
		t, err := d.Token()
		key, ok := t.(string)
		if err != nil || !ok {
			return errJSON
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return errJSON
		}
		end := int(d.InputOffset())
		if err := f(key, raw, span{end - len(raw), end}); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return errJSON
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errJSON
	}
	return nil
}

func (q *Request) member(key string, raw json.RawMessage, at span) error {
	null := string(raw) == "null"
	if slices.Contains(limits[q.api], key) && !null {
		n, err := count(raw)
		if err != nil {
			return err
		}
		if q.limit != (span{}) {
			return errors.New("the body has two limits of its output")
		}
		q.MaxOutput, q.limit = n, at
		return nil
	}
	switch key {
	case "model":
		if json.Unmarshal(raw, &q.Model) != nil {
			return errors.New("the model is not a string")
		}
	case "stream":
		if !null && json.Unmarshal(raw, &q.Stream) != nil {
			return errors.New("stream is neither true nor false")
		}
	case "stream_options":
		var o struct {
			Usage bool `json:"include_usage"`
		}
		if json.Unmarshal(raw, &o) != nil {
			return errors.New("stream_options is not an object")
		}
		if !null {
			q.options, q.usage = at, o.Usage
		}
	case "n":
		if null {
			return nil
		}
		n, err := count(raw)
		if err != nil || n < 1 || n > 128 {
			return errors.New("n is not a number of answers")
		}
		q.Answers = n
	case "previous_response_id", "conversation", "prompt":
		q.Kept = q.Kept || !null && string(raw) != `""`
	case "background":
		if string(raw) == "true" {
			q.Unpriced = "calls that go on in the background"
		}
	case "service_tier":
		var tier string
		if !null && (json.Unmarshal(raw, &tier) != nil || tier != "auto" && tier != "default" && tier != "flex") {
			q.Unpriced = "the service tier " + strconv.Quote(tier[:min(len(tier), 40)])
		}
	case "web_search_options":
		q.Unpriced = "web searches"
	case "modalities", "audio":
		if strings.Contains(string(raw), "audio") {
			q.Unpriced = "sound"
		}
	case "tools":
		q.tools(raw, 0)
	case "input":
		q.inputTools(raw)
	}
	return nil
}

// agentTools run where the agent does, so they cost nothing but the tokens that
// the bodies show.
var agentTools = []string{"function", "custom", "local_shell", "shell", "apply_patch", "namespace", "tool_search"}

// tools looks for one that the API would run, at a price.
func (q *Request) tools(raw json.RawMessage, depth int) {
	var list []struct {
		Type  string          `json:"type"`
		Tools json.RawMessage `json:"tools"`
	}
	if len(raw) == 0 || string(raw) == "null" {
		return
	}
	if json.Unmarshal(raw, &list) != nil || depth > 8 {
		q.Unpriced = "tools that cannot be read"
		return
	}
	for _, t := range list {
		if !slices.Contains(agentTools, t.Type) {
			q.Unpriced = "the tool " + strconv.Quote(t.Type[:min(len(t.Type), 40)])
		}
		q.tools(t.Tools, depth+1)
	}
}

// inputTools looks at tools that the input adds in the middle of it.
func (q *Request) inputTools(raw json.RawMessage) {
	if !bytes.Contains(raw, []byte(`"tools"`)) {
		return
	}
	var items []json.RawMessage
	if json.Unmarshal(raw, &items) != nil {
		return // a text
	}
	for _, item := range items {
		var i struct {
			Tools json.RawMessage `json:"tools"`
		}
		if json.Unmarshal(item, &i) == nil {
			q.tools(i.Tools, 0)
		}
	}
}

func count(raw json.RawMessage) (int64, error) {
	n, err := strconv.ParseInt(string(raw), 10, 64)
	if err != nil || n < 0 || n > maxCount {
		return 0, fmt.Errorf("%.40q is not a number of tokens", raw)
	}
	return n, nil
}

// Clamp returns body with n as the most output tokens of each answer, and with
// the usage asked for when a stream would not tell it. No other byte changes.
func (q *Request) Clamp(body []byte, n int64) []byte {
	type edit struct {
		span
		text string
	}
	var edits []edit
	open := bytes.IndexByte(body, '{') + 1
	switch {
	case q.limit == span{}:
		edits = append(edits, edit{span{open, open}, strconv.Quote(limits[q.api][0]) + ":" + strconv.FormatInt(n, 10) + ","})
	case n < q.MaxOutput:
		edits = append(edits, edit{q.limit, strconv.FormatInt(n, 10)})
	}
	if q.api == Chat && q.Stream && !q.usage {
		if q.options == (span{}) {
			edits = append(edits, edit{span{open, open}, `"stream_options":{"include_usage":true},`})
		} else {
			edits = append(edits, edit{q.options, `{"include_usage":true}`})
		}
	}
	slices.SortStableFunc(edits, func(a, b edit) int { return a.at - b.at })
	out := make([]byte, 0, len(body)+128)
	from := 0
	for _, e := range edits {
		out = append(append(out, body[from:e.at]...), e.text...)
		from = e.end
	}
	return append(out, body[from:]...)
}
