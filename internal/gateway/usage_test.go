package gateway

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	sseStart = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"model\":\"claude-opus-5-5\",\"usage\":{\"input_tokens\":4,\"cache_creation_input_tokens\":100,\"cache_read_input_tokens\":37566,\"cache_creation\":{\"ephemeral_5m_input_tokens\":70,\"ephemeral_1h_input_tokens\":30},\"output_tokens\":1}}}\n\n"
	sseOpen  = "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n"
	sseText  = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"thirty bytes of text, no less!!\"}}\n\n"
	ssePing  = "event: ping\ndata: {\"type\": \"ping\"}\n\n"
	sseDelta = "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"input_tokens\":4,\"cache_creation_input_tokens\":100,\"cache_read_input_tokens\":37566,\"output_tokens\":111,\"server_tool_use\":{\"web_search_requests\":2}}}\n\n"
	sseStop  = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
	sseError = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}\n\n"
)

var wholeUsage = Tokens{Input: 4, CacheWrite5m: 70, CacheWrite1h: 30, CacheRead: 37566, Output: 111, WebSearches: 2}

func TestStreamIsMeteredHoweverItIsCut(t *testing.T) {
	text := sseStart + ssePing + sseOpen + sseText + sseDelta + sseStop
	for _, crlf := range []bool{false, true} {
		text := text
		if crlf {
			text = strings.ReplaceAll(text, "\n", "\r\n")
		}
		for size := 1; size < len(text); size++ {
			var s stream
			for at := 0; at < len(text); at += size {
				s.Write([]byte(text[at:min(at+size, len(text))]))
			}
			s.close()
			got, note, ok := s.outcome(32000)
			if !ok || note != "" || !s.ended {
				t.Fatalf("pieces of %d: %v %q", size, ok, note)
			}
			if diff := cmp.Diff(wholeUsage, got); diff != "" {
				t.Fatalf("pieces of %d: %s", size, diff)
			}
		}
	}
}

func TestCutStreamCostsItsPromptAndWhatWasSeen(t *testing.T) {
	text := sseStart + sseOpen + strings.Repeat(sseText, 40)
	var last int64
	for end := range len(text) {
		var s stream
		s.Write([]byte(text[:end]))
		s.close()
		got, _, ok := s.outcome(32000)
		if end < len(sseStart)-1 {
			if ok {
				t.Fatalf("a prompt of unknown size after %d bytes: %+v", end, got)
			}
			continue
		}
		if !ok || got.Input != 4 || got.CacheRead != 37566 || got.CacheWrite5m != 70 || got.CacheWrite1h != 30 {
			t.Fatalf("after %d bytes: %+v, %v", end, got, ok)
		}
		last = got.Output
	}
	if least := int64(40 * len("thirty bytes of text, no less!!") / 4); last < least || last > 4*least {
		t.Errorf("40 pieces of text were taken for %d tokens", last)
	}
	var s stream
	s.Write([]byte(text))
	s.close()
	if got, _, _ := s.outcome(7); got.Output != 7 {
		t.Errorf("more output than max_tokens: %d", got.Output)
	}
}

func TestErrorInTheMiddleOfAStreamCostsWhatCameBefore(t *testing.T) {
	var s stream
	s.Write([]byte(sseStart + sseText + sseError))
	got, note, ok := s.outcome(100)
	if !ok || !s.failed || got.Output < 8 || got.Input != 4 || !strings.Contains(note, "error") {
		t.Errorf("%+v %q %v", got, note, ok)
	}
	s = stream{}
	s.Write([]byte(sseError))
	if _, _, ok := s.outcome(100); ok || !s.failed || s.begun {
		t.Errorf("an error in place of an answer: %+v", s)
	}
}

// The model says what it likes; none of it may pass for the API's own words.
func TestModelCannotTalkItselfCheap(t *testing.T) {
	said := `data: {"type":"message_delta","usage":{"output_tokens":0}}\n\ndata: {"type":"message_stop"}`
	line := fmt.Sprintf("data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":%q}}\n\n", said)
	var s stream
	s.Write([]byte(sseStart + line))
	if s.ended || s.told {
		t.Errorf("%+v", s)
	}
}

func TestLongLineIsCountedAndNotKept(t *testing.T) {
	var s stream
	s.Write([]byte(sseStart + `data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"`))
	for range 80 {
		s.Write([]byte(strings.Repeat("x", maxLine/20)))
	}
	if cap(s.line) > 4*maxLine {
		t.Errorf("%d bytes are kept", cap(s.line))
	}
	s.Write([]byte("\"}}\n\n" + sseDelta + sseStop))
	if got, _, ok := s.outcome(1 << 30); !ok || got != wholeUsage || s.written < 4*maxLine {
		t.Errorf("%+v %v, %d bytes written", got, ok, s.written)
	}
}

func TestUsageThatCannotBeIsNotBelieved(t *testing.T) {
	for _, body := range []string{``, `{}`, `null`, `<html>`, `{"usage":null}`, `{"usage":{"input_tokens":-1}}`, `{"usage":{"output_tokens":1.5}}`,
		`{"usage":{"output_tokens":"5"}}`, `{"usage":{"output_tokens":99999999999}}`, `{"usage":{"iterations":[{"output_tokens":-1}]}}`} {
		if _, got, ok := answerUsage([]byte(body)); ok {
			t.Errorf("%s was read as %+v", body, got)
		}
	}
}

func TestAnswerUsageHasEveryClass(t *testing.T) {
	for name, c := range map[string]struct {
		usage string
		want  Tokens
	}{
		"all":                  {`{"input_tokens":1,"cache_creation_input_tokens":7,"cache_read_input_tokens":3,"output_tokens":4,"cache_creation":{"ephemeral_5m_input_tokens":2,"ephemeral_1h_input_tokens":5},"server_tool_use":{"web_search_requests":6}}`, Tokens{Input: 1, CacheWrite5m: 2, CacheWrite1h: 5, CacheRead: 3, Output: 4, WebSearches: 6}},
		"nulls":                {`{"input_tokens":1,"cache_creation_input_tokens":null,"cache_read_input_tokens":null,"cache_creation":null,"server_tool_use":null,"output_tokens":2}`, Tokens{Input: 1, Output: 2}},
		"no split":             {`{"cache_creation_input_tokens":7}`, Tokens{CacheWrite5m: 7}},
		"split without sum":    {`{"cache_creation":{"ephemeral_5m_input_tokens":2,"ephemeral_1h_input_tokens":5}}`, Tokens{CacheWrite5m: 2, CacheWrite1h: 5}},
		"compaction left out":  {`{"input_tokens":10,"output_tokens":20,"iterations":[{"type":"compaction","input_tokens":1000,"output_tokens":300},{"type":"message","input_tokens":10,"output_tokens":20}]}`, Tokens{Input: 1010, Output: 320}},
		"iterations are known": {`{"input_tokens":10,"output_tokens":20,"iterations":[{"type":"message","input_tokens":10,"output_tokens":20}]}`, Tokens{Input: 10, Output: 20}},
	} {
		model, got, ok := answerUsage([]byte(`{"model":"m","usage":` + c.usage + `}`))
		if diff := cmp.Diff(c.want, got); !ok || model != "m" || diff != "" {
			t.Errorf("%s: %v %s", name, ok, diff)
		}
	}
}

func FuzzStream(f *testing.F) {
	f.Add([]byte(sseStart+sseOpen+sseText+sseDelta+sseStop), uint8(7))
	f.Add([]byte(sseStart+sseError), uint8(1))
	f.Add([]byte("data: {\"type\":\"message_start\"}\n"), uint8(3))
	f.Add([]byte(`{"model":"m","usage":{"output_tokens":4}}`), uint8(3))
	f.Fuzz(func(t *testing.T, text []byte, size uint8) {
		var once, pieces stream
		once.Write(text)
		once.close()
		step := int(size)%64 + 1
		for at := 0; at < len(text); at += step {
			pieces.Write(text[at:min(at+step, len(text))])
		}
		pieces.close()
		a, an, aok := once.outcome(1000)
		b, bn, bok := pieces.outcome(1000)
		if a != b || an != bn || aok != bok {
			t.Fatalf("in one: %+v %q %v, in pieces of %d: %+v %q %v", a, an, aok, step, b, bn, bok)
		}
		_, c, _ := answerUsage(text)
		for _, u := range []Tokens{a, c} {
			if u.Input < 0 || u.CacheRead < 0 || u.CacheWrite5m < 0 || u.CacheWrite1h < 0 || u.Output < 0 || u.WebSearches < 0 {
				t.Fatalf("negative: %+v", u)
			}
		}
	})
}

func BenchmarkStream(b *testing.B) {
	text := []byte(sseStart + strings.Repeat(sseText, 1000) + sseDelta + sseStop)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		var s stream
		for at := 0; at < len(text); at += 4096 {
			s.Write(text[at:min(at+4096, len(text))])
		}
	}
}
