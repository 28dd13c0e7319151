package gateway

import (
	"net/http"

	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/openai"
)

// A Maker is who made the API that a call is for: its paths, its key and its
// words for usage.
type Maker int

// The makers.
const (
	Anthropic Maker = iota
	OpenAI
)

const (
	anthropicURL = "https://api.anthropic.com"
	openAIURL    = "https://api.openai.com/v1"
)

// openAIPath is where OpenAI's API begins for agents. In the address of the
// real one it is a part of the base URL.
const openAIPath = "/v1"

// reads a call of OpenAI's API as a request of ours.
func readOpenAI(path string, body []byte) (*request, error) {
	q, err := openai.Read(openai.API(path), body)
	if err != nil {
		return nil, err
	}
	r := &request{
		model: q.Model, maxTokens: q.MaxOutput, stream: q.Stream, body: len(body),
		answers: q.Answers, unpriced: q.Unpriced, openai: q,
		unsure: true,
	}
	if q.Kept {
		r.remote = 1 // the API knows the rest of the prompt
	}
	if r.maxTokens == 0 {
		r.maxTokens = maxCount // as many as are allowed
	}
	return r, nil
}

func openAITokens(u openai.Usage) Tokens {
	return Tokens{Input: u.Input, CacheRead: u.CacheRead, CacheWrite5m: u.CacheWrite, Output: u.Output}
}

// A meter reads the usage of a stream as it passes.
type meter interface {
	Write(p []byte) (int, error)
	state() *stream // what was read so far
	close()         // no more will come
}

// An openAIStream is a meter of OpenAI's events.
type openAIStream struct {
	openai.Stream
	prompt int64 // what the prompt was reserved for, in tokens
}

var _ meter = (*openAIStream)(nil)

func (s *openAIStream) close() { s.Close() }

// state says it in the words of the other API. That one tells at the beginning
// how long the prompt is; this one at the end. When the end never comes, the
// prompt is taken for as long as was reserved, and written to the cache.
func (s *openAIStream) state() *stream {
	m := &stream{
		model: s.Model, sums: openAITokens(s.Usage), begun: s.Begun, told: s.Told,
		ended: s.Ended && (s.Told || s.Failed), failed: s.Failed, broken: s.Broken, written: s.Written,
	}
	if m.begun && !m.told {
		m.sums.CacheWrite5m = s.prompt
	}
	return m
}

func (s *stream) state() *stream { return s }

// meterOf returns the meter for the call's stream.
func (f *forwarding) meterOf() meter {
	if f.maker == OpenAI {
		return &openAIStream{prompt: f.call.ask.prompt}
	}
	return &stream{}
}

// usageOf reads the usage of an answer that is no stream.
func (f *forwarding) usageOf(text []byte) (model string, t Tokens, ok bool) {
	if f.maker == OpenAI {
		model, u, ok := openai.Answer(text)
		return model, openAITokens(u), ok
	}
	return answerUsage(text)
}

// requestID is the API's name for the answer.
func requestID(h http.Header) string {
	id := h.Get("Request-Id")
	if id == "" {
		id = h.Get("X-Request-Id")
	}
	return id[:min(len(id), 128)]
}
