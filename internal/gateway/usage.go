package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// usage is the API's object of that name. A field that is null or absent
// counts as zero.
type usage struct {
	Input      int64 `json:"input_tokens"`
	CacheWrite int64 `json:"cache_creation_input_tokens"`
	CacheRead  int64 `json:"cache_read_input_tokens"`
	Output     int64 `json:"output_tokens"`
	Creation   struct {
		FiveMinutes int64 `json:"ephemeral_5m_input_tokens"`
		Hour        int64 `json:"ephemeral_1h_input_tokens"`
	} `json:"cache_creation"`
	ServerTools struct {
		WebSearches int64 `json:"web_search_requests"`
	} `json:"server_tool_use"`

	// Iterations are the calls of the model that make up one answer. The sums
	// above leave some of them out, such as the one that compacts the prompt.
	Iterations []struct {
		Input      int64 `json:"input_tokens"`
		CacheWrite int64 `json:"cache_creation_input_tokens"`
		CacheRead  int64 `json:"cache_read_input_tokens"`
		Output     int64 `json:"output_tokens"`
		Creation   struct {
			Hour int64 `json:"ephemeral_1h_input_tokens"`
		} `json:"cache_creation"`
	} `json:"iterations"`
}

// tokens sorts u into the classes that have a price. It is false for counts
// that cannot be.
func (u *usage) tokens() (Tokens, bool) {
	var it usage
	sane := true
	check := func(counts ...int64) {
		for _, n := range counts {
			sane = sane && n >= 0 && n <= maxCount
		}
	}
	check(u.Input, u.CacheWrite, u.CacheRead, u.Output, u.Creation.FiveMinutes, u.Creation.Hour, u.ServerTools.WebSearches)
	for _, i := range u.Iterations {
		check(i.Input, i.CacheWrite, i.CacheRead, i.Output, i.Creation.Hour)
		it.Input += i.Input
		it.CacheWrite += i.CacheWrite
		it.CacheRead += i.CacheRead
		it.Output += i.Output
		it.Creation.Hour += i.Creation.Hour
		check(it.Input, it.CacheWrite, it.CacheRead, it.Output, it.Creation.Hour)
	}
	if !sane {
		return Tokens{}, false
	}
	hour := max(u.Creation.Hour, it.Creation.Hour)
	writes := max(u.CacheWrite, it.CacheWrite, u.Creation.FiveMinutes+hour)
	return Tokens{
		Input:        max(u.Input, it.Input),
		CacheWrite5m: writes - hour,
		CacheWrite1h: hour,
		CacheRead:    max(u.CacheRead, it.CacheRead),
		Output:       max(u.Output, it.Output),
		WebSearches:  u.ServerTools.WebSearches,
	}, true
}

// larger returns the greater of each class. The usage of a stream comes in parts,
// each of which tells the sums so far of some of the classes.
func larger(t, v Tokens) Tokens {
	// How the writes split is told once, their sum again at the end; what the
	// end tells without a split is taken for short writes.
	writes := max(t.CacheWrite5m+t.CacheWrite1h, v.CacheWrite5m+v.CacheWrite1h)
	hour := max(t.CacheWrite1h, v.CacheWrite1h)
	return Tokens{
		Input:        max(t.Input, v.Input),
		CacheWrite5m: writes - hour,
		CacheWrite1h: hour,
		CacheRead:    max(t.CacheRead, v.CacheRead),
		Output:       max(t.Output, v.Output),
		WebSearches:  max(t.WebSearches, v.WebSearches),
	}
}

// answerUsage reads the usage of an answer that is no stream. The model is the
// one that answered, which need not be the one that was asked.
func answerUsage(body []byte) (model string, t Tokens, ok bool) {
	var m struct {
		Model string `json:"model"`
		Usage *usage `json:"usage"`
	}
	if json.Unmarshal(body, &m) != nil || m.Usage == nil {
		return "", Tokens{}, false
	}
	t, ok = m.Usage.tokens()
	return m.Model, t, ok
}

// A stream meters server-sent events as they pass. Its zero value is ready;
// feed it with Write and then ask Tokens.
type stream struct {
	model   string // that answered
	sums    Tokens
	begun   bool  // message_start was seen, so the prompt is billed
	told    bool  // the sum of the output was told
	ended   bool  // message_stop was seen: nothing more will be billed
	failed  bool  // an error event was seen
	broken  bool  // something about usage could not be read
	written int64 // bytes of text, thoughts and arguments that were seen

	line []byte // the part of a line that has come so far
	skip bool   // the line is longer than maxLine: what follows is counted only
}

// maxLine bounds what is kept of one line, in bytes. The lines that tell usage
// are far shorter.
const maxLine = 1 << 20

// Write takes the next piece of the stream, cut anywhere. It never fails.
func (s *stream) Write(p []byte) (int, error) {
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

func (s *stream) keep(p []byte) {
	if s.skip {
		s.written += int64(len(p))
		return
	}
	if len(s.line)+len(p) > maxLine {
		s.written += int64(len(s.line) + len(p))
		s.line, s.skip = s.line[:0], true
		return
	}
	s.line = append(s.line, p...)
}

func (s *stream) flush() {
	if !s.skip {
		s.event(s.line)
	}
	s.line, s.skip = s.line[:0], false
}

// close ends a stream that will not go on. What came of its last line counts
// as output when it looks like that; a sum in it cannot be trusted.
func (s *stream) close() {
	if s.skip || len(s.line) == 0 {
		return
	}
	s.written += delta(s.line)
	s.line = nil
}

// A quote inside a JSON string is escaped, so these cannot be said by the model.
var (
	wordStart = []byte(`"message_start"`)
	wordDelta = []byte(`"message_delta"`)
	wordStop  = []byte(`"message_stop"`)
	wordError = []byte(`"error"`)
	wordBlock = []byte(`"content_block_`) // delta or start

	// What carries output, the most frequent first.
	wordsOutput = [][]byte{[]byte(`"text":`), []byte(`"partial_json":`), []byte(`"thinking":`), []byte(`"signature":`), []byte(`"data":`), []byte(`"name":`)}
)

// event takes one line.
func (s *stream) event(line []byte) {
	data, ok := bytes.CutPrefix(line, []byte("data:"))
	if !ok {
		return
	}
	if n := delta(data); n > 0 {
		s.written += n
		return
	}
	if !bytes.Contains(data, wordStart) && !bytes.Contains(data, wordDelta) && !bytes.Contains(data, wordStop) && !bytes.Contains(data, wordError) {
		return
	}
	var e struct {
		Type    string `json:"type"`
		Message struct {
			Model string `json:"model"`
			Usage *usage `json:"usage"`
		} `json:"message"`
		Usage *usage `json:"usage"`
	}
	if json.Unmarshal(data, &e) != nil {
		s.broken = true
		return
	}
	switch e.Type {
	case "message_start":
		s.begun = true
		s.model = e.Message.Model
		s.add(e.Message.Usage)
	case "message_delta":
		if e.Usage != nil {
			s.add(e.Usage)
			s.told = true
		}
	case "message_stop":
		s.ended = true
	case "error":
		s.failed = true
	}
}

func (s *stream) add(u *usage) {
	if u == nil {
		s.broken = true
		return
	}
	t, ok := u.tokens()
	s.broken = s.broken || !ok
	s.sums = larger(s.sums, t)
}

// delta returns how many bytes of output a line carries, escapes and all, and
// 0 for a line of another kind.
func delta(line []byte) int64 {
	const head = 160 // an event names its type before its content
	h := line[:min(len(line), head)]
	if !bytes.Contains(h, wordBlock) {
		return 0
	}
	for _, key := range wordsOutput {
		if i := bytes.Index(h, key); i >= 0 {
			return int64(max(len(line)-i-len(key)-len(` ""}}`), 1))
		}
	}
	return int64(len(line))
}

// outcome returns what the stream has to be billed for, and false when that
// cannot be told: the prompt's size was never said, or not in a way that could
// be read. A stream that ended before it told its output is billed for what was
// seen of it, a token for every three bytes, at least; limit is the max_tokens
// it was given.
func (s *stream) outcome(limit int64) (t Tokens, note string, ok bool) {
	t = s.sums
	switch {
	case s.broken:
		return t, "usage could not be read", false
	case !s.begun:
		return t, "no usage was told", false
	case s.told && s.ended:
		return t, "", true
	case s.told:
		return t, "cut off after its usage was told", true
	}
	seen := (s.written + bytesPerToken - 1) / bytesPerToken
	t.Output = max(t.Output, min(seen, max(limit, 0)))
	note = "cut off"
	if s.failed {
		note = "ended by an error event"
	}
	return t, fmt.Sprintf("%s, output of %d bytes estimated", note, s.written), true
}
