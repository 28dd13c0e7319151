package openai

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReadFindsWhatThePriceDependsOn(t *testing.T) {
	for _, row := range []struct {
		name string
		api  API
		body string
		want Request
	}{
		{"codex", Responses, `{"model":"gpt-6.1-sol","stream":true,"input":[{"type":"additional_tools","tools":[{"type":"namespace","tools":[{"type":"function"}]}]}],"store":false}`,
			Request{Model: "gpt-6.1-sol", Stream: true, Answers: 1}},
		{"a limit", Responses, `{"max_output_tokens": 77,"model":"m"}`, Request{Model: "m", MaxOutput: 77, Answers: 1}},
		{"no limit", Responses, `{"max_output_tokens":null,"model":"m"}`, Request{Model: "m", Answers: 1}},
		{"kept", Responses, `{"model":"m","previous_response_id":"resp_1"}`, Request{Model: "m", Answers: 1, Kept: true}},
		{"a template", Responses, `{"model":"m","prompt":{"id":"p"}}`, Request{Model: "m", Answers: 1, Kept: true}},
		{"the API searches", Responses, `{"model":"m","tools":[{"type":"function"},{"type":"web_search"}]}`, Request{Model: "m", Answers: 1, Unpriced: `the tool "web_search"`}},
		{"deep in a namespace", Responses, `{"model":"m","input":[{"tools":[{"type":"namespace","tools":[{"type":"code_interpreter"}]}]}]}`, Request{Model: "m", Answers: 1, Unpriced: `the tool "code_interpreter"`}},
		{"dear tier", Chat, `{"model":"m","service_tier":"priority"}`, Request{Model: "m", Answers: 1, Unpriced: `the service tier "priority"`}},
		{"background", Responses, `{"model":"m","background":true}`, Request{Model: "m", Answers: 1, Unpriced: "calls that go on in the background"}},
		{"chat", Chat, `{"model":"m","n":3,"max_completion_tokens":5,"stream":true,"stream_options":{"include_usage":true},"messages":[]}`, Request{Model: "m", Stream: true, Answers: 3, MaxOutput: 5}},
		{"the old limit", Chat, `{"model":"m","max_tokens":5}`, Request{Model: "m", Answers: 1, MaxOutput: 5}},
		{"words that are text", Responses, `{"model":"m","input":"{\"tools\":[{\"type\":\"web_search\"}],\"max_output_tokens\":1}"}`, Request{Model: "m", Answers: 1}},
	} {
		q, err := Read(row.api, []byte(row.body))
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		got := Request{Model: q.Model, Stream: q.Stream, MaxOutput: q.MaxOutput, Answers: q.Answers, Kept: q.Kept, Unpriced: q.Unpriced}
		if diff := cmp.Diff(row.want, got, cmp.AllowUnexported(Request{}, span{})); diff != "" {
			t.Errorf("%s: -want +got:\n%s", row.name, diff)
		}
	}
}

func TestReadRefusesWhatCannotBeMetered(t *testing.T) {
	for _, body := range []string{
		``, `[]`, `{"model":"m"`, `{"model":"m"} {}`, `{"model":"a","model":"b"}`, `{}`, `{"model":1}`, "{\"model\":\"\xff\"}",
		`{"model":"m","max_tokens":-1}`, `{"model":"m","max_tokens":1.5}`, `{"model":"m","max_tokens":"5"}`, `{"model":"m","max_tokens":5,"max_completion_tokens":6}`,
		`{"model":"m","n":0}`, `{"model":"m","n":1000}`, `{"model":"m","stream":"yes"}`, `{"model":"m","stream_options":5}`,
	} {
		if q, err := Read(Chat, []byte(body)); err == nil {
			t.Errorf("%s: read as %+v", body, q)
		}
	}
}

func TestClampChangesNothingButTheLimitAndTheUsage(t *testing.T) {
	for _, row := range []struct {
		api        API
		body, want string
	}{
		{Responses, ` {"model":"m", "max_output_tokens" : 100 ,"x":[1, 2]}`, ` {"model":"m", "max_output_tokens" : 7 ,"x":[1, 2]}`},
		{Responses, `{"model":"m","max_output_tokens":5}`, `{"model":"m","max_output_tokens":5}`},
		{Responses, `{"model":"m","stream":true}`, `{"max_output_tokens":7,"model":"m","stream":true}`},
		{Chat, `{"model":"m","stream":true,"max_tokens":9}`, `{"stream_options":{"include_usage":true},"model":"m","stream":true,"max_tokens":7}`},
		{Chat, `{"model":"m","stream":true,"stream_options":{"include_usage":false}}`, `{"max_completion_tokens":7,"model":"m","stream":true,"stream_options":{"include_usage":true}}`},
		{Chat, `{"stream_options":{"include_usage":true},"stream":true,"model":"m"}`, `{"max_completion_tokens":7,"stream_options":{"include_usage":true},"stream":true,"model":"m"}`},
	} {
		q, err := Read(row.api, []byte(row.body))
		if err != nil {
			t.Fatal(err)
		}
		if got := string(q.Clamp([]byte(row.body), 7)); got != row.want {
			t.Errorf("clamped\n%s, want\n%s", got, row.want)
		}
	}
}

const completed = `event: response.created
data: {"type":"response.created","response":{"id":"r","model":"gpt-6.1-sol","usage":null}}

data: {"type":"response.output_text.delta","delta":"hello"}

data: {"type":"response.completed","response":{"model":"gpt-6.1-sol-2026-09-30","output":[{"text":"\"usage\":{}"}],"usage":{"input_tokens":100,"input_tokens_details":{"cached_tokens":60,"cache_write_tokens":10},"output_tokens":20,"output_tokens_details":{"reasoning_tokens":5}}}}

`

const chatted = `data: {"model":"gpt-6-sol","choices":[{"delta":{"content":"hi"}}],"usage":null}

data: {"model":"gpt-6-sol","choices":[],"usage":{"prompt_tokens":100,"completion_tokens":20,"prompt_tokens_details":{"cached_tokens":60}}}

data: [DONE]

`

func TestStreamsTellTheirUsageHoweverTheyAreCut(t *testing.T) {
	for _, row := range []struct {
		name, text, model string
		want              Usage
	}{
		{"responses", completed, "gpt-6.1-sol-2026-09-30", Usage{Input: 30, CacheRead: 60, CacheWrite: 10, Output: 20}},
		{"chat", chatted, "gpt-6-sol", Usage{Input: 40, CacheRead: 60, Output: 20}},
	} {
		for size := 1; size < 200; size += 7 {
			var s Stream
			for p := []byte(row.text); len(p) > 0; p = p[min(size, len(p)):] {
				_, _ = s.Write(p[:min(size, len(p))])
			}
			s.Close()
			if s.Usage != row.want || s.Model != row.model || !s.Begun || !s.Told || !s.Ended || s.Failed || s.Broken {
				t.Fatalf("%s in pieces of %d: %+v", row.name, size, s)
			}
		}
	}
}

func TestAStreamThatBreaksOffSaysHowFarItCame(t *testing.T) {
	var s Stream
	_, _ = s.Write([]byte(completed[:strings.Index(completed, `,"usage":{"input`)]))
	s.Close()
	if s.Told || s.Ended || !s.Begun || s.Written == 0 {
		t.Errorf("%+v", s)
	}
	for text, want := range map[string]Stream{
		`data: {"type":"error","code":"server_error"}`:                                                                       {Failed: true},
		`data: {"error":{"message":"x"}}`:                                                                                    {Failed: true},
		`data: {"type":"response.failed","response":{"error":{}}}`:                                                           {Failed: true, Ended: true},
		`data: {"type":"response.completed","response":{"usage":{"input_tokens":-1,"output_tokens":1}}}`:                     {Broken: true, Ended: true},
		`data: {"type":"response.completed","response":{"usage":{"input_tokens":1,"output_tokens":1e99}}}`:                   {Broken: true},
		`data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":2}}}`: {Broken: true},
	} {
		var s Stream
		_, _ = s.Write([]byte(text + "\n"))
		if s.Failed != want.Failed || s.Broken != want.Broken || s.Ended != want.Ended || s.Told {
			t.Errorf("%s: %+v", text, s)
		}
	}
}

func TestAnswersTellTheirUsage(t *testing.T) {
	model, u, ok := Answer([]byte(`{"model":"m","usage":{"input_tokens":3,"output_tokens":4}}`))
	if !ok || model != "m" || u != (Usage{Input: 3, Output: 4}) {
		t.Errorf("%q %+v %v", model, u, ok)
	}
	for _, body := range []string{`{}`, `{"usage":null}`, `{"usage":{"input_tokens":3}}`, `x`, `{"usage":{"input_tokens":1,"output_tokens":1,"input_tokens_details":{"cached_tokens":9}}}`} {
		if _, u, ok := Answer([]byte(body)); ok {
			t.Errorf("%s: %+v", body, u)
		}
	}
}

// FuzzRead takes bodies that hostile agents made.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"model":"m","stream":true,"stream_options":{"include_usage":false},"max_tokens":5,"tools":[{"type":"function"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, api := range []API{Responses, Chat} {
			q, err := Read(api, body)
			if err != nil {
				continue
			}
			clamped := q.Clamp(body, 7)
			if !json.Valid(clamped) {
				t.Fatalf("%s became %s", body, clamped)
			}
			again, err := Read(api, clamped)
			if err != nil || again.MaxOutput > max(7, min(q.MaxOutput, 7)) || again.Model != q.Model || again.Stream != q.Stream {
				t.Fatalf("%s became %s: %+v, %v", body, clamped, again, err)
			}
		}
	})
}

// FuzzStream takes what an API, or somebody in its place, says.
func FuzzStream(f *testing.F) {
	f.Add([]byte(completed), 3)
	f.Add([]byte(chatted), 50)
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		var whole, pieces Stream
		_, _ = whole.Write(text)
		whole.Close()
		size = max(1, size%1000)
		for p := text; len(p) > 0; p = p[min(size, len(p)):] {
			_, _ = pieces.Write(p[:min(size, len(p))])
		}
		pieces.Close()
		whole.line, pieces.line = nil, nil
		if diff := cmp.Diff(whole, pieces, cmp.AllowUnexported(Stream{})); diff != "" {
			t.Errorf("it depends on how it is cut: %s", diff)
		}
	})
}
