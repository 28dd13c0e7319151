package openai

import (
	"bytes"
	"encoding/json"
)

// Usage is what a call used, in tokens. Each token of the prompt is in one of
// the first three.
type Usage struct {
	Input      int64 // neither read from the cache nor written to it
	CacheRead  int64
	CacheWrite int64
	Output     int64 // what the model thought included
}

// usage is the API's object of that name, with the names of both APIs.
type usage struct {
	Input  *int64 `json:"input_tokens"`
	Output *int64 `json:"output_tokens"`

	Prompt     *int64 `json:"prompt_tokens"`
	Completion *int64 `json:"completion_tokens"`

	InputDetails  details `json:"input_tokens_details"`
	PromptDetails details `json:"prompt_tokens_details"`
}

type details struct {
	Cached  int64 `json:"cached_tokens"`
	Written int64 `json:"cache_write_tokens"`
}

// sum is false for counts that cannot be.
func (u *usage) sum() (Usage, bool) {
	in, out, d := u.Input, u.Output, u.InputDetails
	if in == nil {
		in, out, d = u.Prompt, u.Completion, u.PromptDetails
	}
	if in == nil || out == nil {
		return Usage{}, false
	}
	for _, n := range []int64{*in, *out, d.Cached, d.Written} {
		if n < 0 || n > maxCount {
			return Usage{}, false
		}
	}
	if d.Cached+d.Written > *in {
		return Usage{}, false
	}
	return Usage{Input: *in - d.Cached - d.Written, CacheRead: d.Cached, CacheWrite: d.Written, Output: *out}, true
}

// Answer reads the usage of an answer that is no stream. The model is the one
// that answered.
func Answer(body []byte) (model string, u Usage, ok bool) {
	var m struct {
		Model string `json:"model"`
		Usage *usage `json:"usage"`
	}
	if json.Unmarshal(body, &m) != nil || m.Usage == nil {
		return "", Usage{}, false
	}
	u, ok = m.Usage.sum()
	return m.Model, u, ok
}

// A Stream meters server-sent events as they pass. Its zero value is ready.
type Stream struct {
	Model   string // that answered; empty: not told
	Usage   Usage
	Begun   bool  // the model has begun to answer, so the prompt is billed
	Told    bool  // Usage holds what is billed
	Ended   bool  // nothing more will come
	Failed  bool  // an error was told
	Broken  bool  // something about usage could not be read
	Written int64 // bytes of output that were seen

	line []byte
	skip bool
}

// maxLine bounds what is kept of one line, in bytes. The last event of a
// response repeats all of it, so lines are long.
const maxLine = 32 << 20

// Write takes the next piece of the stream, cut anywhere. It never fails.
func (s *Stream) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			s.keep(p)
			break
		}
		if len(s.line) == 0 && !s.skip {
			s.event(p[:end])
		} else {
			s.keep(p[:end])
			s.flush()
		}
		p = p[end+1:]
	}
	return n, nil
}

func (s *Stream) keep(p []byte) {
	if s.skip {
		return
	}
	if len(s.line)+len(p) > maxLine {
		s.line, s.skip, s.Broken = nil, true, true
		return
	}
	s.line = append(s.line, p...)
}

func (s *Stream) flush() {
	if !s.skip {
		s.event(s.line)
	}
	s.line, s.skip = s.line[:0], false
}

// Close ends a stream that will not go on. What came of its last line counts
// as output; a sum in it cannot be trusted.
func (s *Stream) Close() {
	s.Written += int64(len(s.line))
	s.line = nil
}

// A quote inside a JSON string is escaped, so these cannot be said by the model.
var (
	wordUsage = []byte(`"usage":`)
	wordError = []byte(`"error"`)
	wordDelta = []byte(`"delta"`)
)

// event takes one line.
func (s *Stream) event(line []byte) {
	data, ok := bytes.CutPrefix(line, []byte("data:"))
	if !ok {
		return
	}
	data = bytes.TrimSpace(data)
	if bytes.Equal(data, []byte("[DONE]")) {
		s.Ended = true
		return
	}
	// Most events carry a piece of the answer and nothing else.
	if head := data[:min(len(data), 200)]; bytes.Contains(head, wordDelta) && !bytes.Contains(data, wordUsage) {
		s.Begun = true
		s.Written += int64(len(data))
		return
	}
	var e struct {
		Type     string `json:"type"` // of Responses only
		Model    string `json:"model"`
		Usage    *usage `json:"usage"`
		Response struct {
			Model string `json:"model"`
			Usage *usage `json:"usage"`
		} `json:"response"`
		Choices []json.RawMessage `json:"choices"`
		Error   json.RawMessage   `json:"error"`
	}
	if json.Unmarshal(data, &e) != nil {
		s.Broken = s.Broken || bytes.Contains(data, wordUsage)
		s.Failed = s.Failed || bytes.Contains(data, wordError)
		return
	}
	if e.Model == "" {
		e.Model = e.Response.Model
	}
	if e.Model != "" {
		s.Model = e.Model
	}
	switch e.Type {
	case "response.created", "response.queued", "":
	case "response.in_progress":
		s.Begun = true
	case "error":
		s.Failed = true
	case "response.failed":
		s.Failed, s.Ended = true, true
	case "response.completed", "response.incomplete":
		s.Ended = true
	default:
		s.Begun = true
	}
	if len(e.Choices) > 0 {
		s.Begun = true
		s.Written += int64(len(data))
	}
	if len(e.Error) > 0 && string(e.Error) != "null" {
		s.Failed = true
	}
	u := e.Usage
	if u == nil {
		u = e.Response.Usage
	}
	if u == nil {
		return
	}
	sum, ok := u.sum()
	if !ok {
		s.Broken = true
		return
	}
	s.Usage, s.Told, s.Begun = sum, true, true
}
