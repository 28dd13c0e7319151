package standin_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

func serveOnce(t *testing.T, s *standin.Server, body string) *httptest.ResponseRecorder {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/messages", strings.NewReader(body))
	req.Header.Set("anthropic-version", "2023-06-01")
	req.Header.Set("x-api-key", "key")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, req)
	return w
}

// A clock is one that a test sets.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

// A prompt of blocks that are a thousand tokens and a little each. A block
// with a TTL has a mark.
type prompt []struct {
	text string
	ttl  string
}

func (p prompt) body() body {
	blocks := []any{map[string]any{"type": "text", "text": "@script s"}}
	for _, b := range p {
		m := map[string]any{"type": "text", "text": b.text + strings.Repeat(".", 4100)}
		if b.ttl != "" {
			m["cache_control"] = map[string]any{"type": "ephemeral", "ttl": b.ttl}
		}
		blocks = append(blocks, m)
	}
	return ask(user(blocks))
}

func blocksOf(n int, marked map[int]string) prompt {
	p := make(prompt, n)
	for i := range p {
		p[i].text, p[i].ttl = fmt.Sprint("block ", i), marked[i]
	}
	return p
}

func TestTheCacheWritesReadsAndForgets(t *testing.T) {
	c := &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	s := standin.New(standin.Options{Scripts: one(standin.Step{Text: "ok"}), Now: c.Now})
	charge := func(b body) standin.Usage {
		t.Helper()
		raw, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		if w := serveOnce(t, s, string(raw)); w.Code != 200 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		rs := s.Requests()
		u := rs[len(rs)-1].Usage
		if u.CacheWrite != u.Creation.FiveMinutes+u.Creation.OneHour {
			t.Errorf("%+v", u)
		}
		return u
	}
	two := blocksOf(2, map[int]string{0: "1h", 1: "5m"})
	first := charge(two.body())
	if first.CacheRead != 0 || first.Creation.OneHour < 1000 || first.Creation.FiveMinutes < 1000 || first.Input != 0 {
		t.Errorf("first: %+v", first)
	}
	all := first.CacheWrite
	if u := charge(two.body()); u.CacheRead != all || u.CacheWrite != 0 {
		t.Errorf("again: %+v", u)
	}
	if u := charge(two.body().with("model", "claude-opus-5-5")); u.CacheRead != 0 {
		t.Errorf("another model: %+v", u)
	}
	c.now = c.now.Add(4 * time.Minute)
	charge(two.body()) // renews both
	c.now = c.now.Add(4 * time.Minute)
	if u := charge(two.body()); u.CacheRead != all {
		t.Errorf("not renewed by reading: %+v", u)
	}
	c.now = c.now.Add(6 * time.Minute)
	if u := charge(two.body()); u.CacheRead != first.Creation.OneHour || u.Creation.FiveMinutes != first.Creation.FiveMinutes {
		t.Errorf("after 6 minutes: %+v", u)
	}
	c.now = c.now.Add(61 * time.Minute)
	if u := charge(two.body()); u.CacheRead != 0 {
		t.Errorf("after an hour: %+v", u)
	}
	if u := charge(blocksOf(3, nil).body()); u.CacheRead != 0 || u.CacheWrite != 0 || u.Input < 3000 {
		t.Errorf("without marks: %+v", u)
	}
}

func TestTheCacheLooksTwentyBlocksBack(t *testing.T) {
	s := standin.New(standin.Options{Scripts: one(standin.Step{Text: "ok"})})
	charge := func(b body) standin.Usage {
		t.Helper()
		raw, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		serveOnce(t, s, string(raw))
		rs := s.Requests()
		return rs[len(rs)-1].Usage
	}
	wrote := charge(blocksOf(5, map[int]string{4: "5m"}).body()).CacheWrite
	// The places looked at from block 24 end with block 5, those from 23 with 4.
	if u := charge(blocksOf(25, map[int]string{24: "5m"}).body()); u.CacheRead != 0 {
		t.Errorf("20 blocks on: %+v", u)
	}
	if u := charge(blocksOf(24, map[int]string{23: "5m"}).body()); u.CacheRead != wrote {
		t.Errorf("19 blocks on: %+v, want %d read", u, wrote)
	}
}

func TestTheCacheKnowsAPromptHoweverItIsSpelt(t *testing.T) {
	s := standin.New(standin.Options{Scripts: one(standin.Step{Text: "ok"})})
	filler := strings.Repeat("x", 5000)
	spelt := []string{
		`{"model":"m","max_tokens":9,"system":[{"type":"text","text":"` + filler + `","cache_control":{"type":"ephemeral"}}],"messages":[{"role":"user","content":"@script s"}]}`,
		`{"messages":[{"content":[{"text":"@script s","type":"text"}],"role":"user"}],"system":[{"cache_control":{"type":"ephemeral"},"text":"` + filler + `","type":"text"}],"max_tokens":9,"model":"m"}`,
		`{"model":"m","max_tokens":9,"system":[{"type":"text","text":"` + filler + `"}],"messages":[{"role":"user","content":[{"type":"text","text":"@script s","cache_control":{"type":"ephemeral"}}]}]}`,
		`{"model":"m","max_tokens":9,"system":"` + filler + `","messages":[{"role":"user","content":[{"type":"text","text":"@script s","cache_control":{"type":"ephemeral"}}]}]}`,
	}
	for _, body := range spelt {
		serveOnce(t, s, body)
	}
	rs := s.Requests()
	wrote := rs[0].Usage.CacheWrite
	for i, r := range rs[1:] {
		if wrote == 0 || r.Usage.CacheRead < wrote {
			t.Errorf("spelling %d: %+v", i+1, r.Usage)
		}
	}
	serveOnce(t, s, strings.ReplaceAll(spelt[0], filler, "small"))
	rs = s.Requests()
	if u := rs[len(rs)-1].Usage; u.CacheWrite != 0 {
		t.Errorf("a small prompt was cached: %+v", u)
	}
}
