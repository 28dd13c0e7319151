package gateway

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// marked reads a body and hashes it.
func marked(t *testing.T, p *prompts, body string) (*request, *marks) {
	t.Helper()
	q, err := readRequest([]byte(body))
	if err != nil {
		t.Fatalf("%v: %.200s", err, body)
	}
	return q, p.mark([]byte(body), q)
}

func conversation(turns []string, system string, rest string) string {
	var messages []string
	for i, text := range turns {
		messages = append(messages, fmt.Sprintf(`{"role":%q,"content":[{"type":"text","text":%q}]}`, []string{"user", "assistant"}[i%2], text))
	}
	return fmt.Sprintf(`{"model":"sonnet","messages":[%s],"system":%q%s,"max_tokens":10}`, strings.Join(messages, ","), system, rest)
}

// A model of the API that counts a token for each byte of text: whatever a
// conversation has in common with others, it has no more tokens than the bound.
func TestBoundHoldsForTheDensestText(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	text := func(n int) string {
		var b strings.Builder
		for range n {
			b.WriteByte("abcdefgh"[r.IntN(8)])
		}
		return b.String()
	}
	count := func(body string) (n int64) {
		var m struct {
			System   string
			Messages []struct {
				Content []struct{ Text string }
			}
		}
		if err := json.Unmarshal([]byte(body), &m); err != nil {
			t.Fatal(err)
		}
		n = int64(len(m.System))
		for _, msg := range m.Messages {
			for _, c := range msg.Content {
				n += int64(len(c.Text))
			}
		}
		return n
	}
	tight := 0
	for range 200 {
		p := newPrompts()
		key := tenantKey{"r", 1}
		var turns []string
		systems := []string{text(r.IntN(20_000)), text(r.IntN(20_000))}
		for range 8 {
			if len(turns) > 0 && r.IntN(4) == 0 { // an earlier turn is changed
				turns[r.IntN(len(turns))] = text(r.IntN(3000))
			}
			turns = append(turns, text(r.IntN(6000)))
			body := conversation(turns, systems[r.IntN(2)], "")
			q, m := marked(t, p, body)
			tokens := count(body)
			if bound, ok := p.bound(key, q, m); ok {
				if bound < tokens {
					t.Fatalf("%d tokens, the bound is %d", tokens, bound)
				}
				if bound < tokens+4*blockSize {
					tight++
				}
			}
			p.learn(key, q, m, tokens)
		}
	}
	if tight < 200 {
		t.Errorf("the bound was near the truth only %d times", tight)
	}
}

// What could be counted in one way and billed in another says nothing.
func TestNothingIsLearntFromWhatIsInDoubt(t *testing.T) {
	long := strings.Repeat("x", 10_000)
	for name, body := range map[string]string{
		"a picture":              `{"model":"m","max_tokens":5,"messages":[{"content":[{"type":"image","source":{"type":"base64","data":"` + long + `"}}]}]}`,
		"a document":             `{"model":"m","max_tokens":5,"messages":[{"content":[{"type":"document","source":{"type":"base64","data":"` + long + `"}}]}]}`,
		"a remote one":           `{"model":"m","max_tokens":5,"messages":[{"content":[{"type":"image","source":{"type":"url"}}]}]}`,
		"a key twice":            `{"model":"m","max_tokens":5,"messages":[{"content":"` + long + `","content":"short"}]}`,
		"a key twice, deep":      `{"model":"m","max_tokens":5,"tools":[{"input_schema":{"a":"` + long + `","b":1,"\u0061":2}}]}`,
		"a server tool":          `{"model":"m","max_tokens":5,"tools":[{"type":"web_search_20250305","name":"w"}],"system":"` + long + `"}`,
		"an edit of the context": `{"model":"m","max_tokens":5,"context_management":{"edits":[{"type":"clear_tool_uses_20250919"}]},"system":"` + long + `"}`,
		"a compaction":           `{"model":"m","max_tokens":5,"context_management":{"edits":[{"type":"compact_20260112"}]},"system":"` + long + `"}`,
		"a fallback":             `{"model":"m","max_tokens":5,"fallbacks":[{"model":"n"}],"system":"` + long + `"}`,
	} {
		p := newPrompts()
		q, m := marked(t, p, body)
		p.learn(tenantKey{"r", 1}, q, m, 1)
		if len(p.forks) > 0 {
			t.Errorf("%s: it was learnt from", name)
		}
		if !q.unsure {
			t.Errorf("%s is taken for sure", name)
		}
	}
	// Nor is a bound given for one, whatever is known.
	p := newPrompts()
	plain := `{"model":"m","max_tokens":5,"system":"` + long + `","messages":[]}`
	q, m := marked(t, p, plain)
	p.learn(tenantKey{"r", 1}, q, m, 1)
	if _, ok := p.bound(tenantKey{"r", 1}, q, m); !ok {
		t.Error("nothing is known")
	}
	q, m = marked(t, p, strings.Replace(plain, `"messages"`, `"mcp_servers":[{}],"messages"`, 1))
	if _, ok := p.bound(tenantKey{"r", 1}, q, m); ok {
		t.Error("a bound is given for what is in doubt")
	}
}

// The model's thoughts, or a tool that is loaded when it is asked for, may have
// been left out of an earlier prompt.
func TestWhatIsLeftOutAtTimesIsReservedByTheByte(t *testing.T) {
	long := strings.Repeat("hm ", 10_000)
	for name, body := range map[string]string{
		"thoughts": `{"model":"m","max_tokens":5,"context_management":{"edits":[{"type":"clear_thinking_20251015","keep":"all"}]},
			"messages":[{"role":"assistant","content":[{"type":"thinking","thinking":"` + long + `","signature":"s"},{"type":"text","text":"x"}]}]}`,
		"a tool": `{"model":"m","max_tokens":5,"tools":[{"name":"t","description":"` + long + `","defer_loading":true},{"name":"u"}]}`,
	} {
		p := newPrompts()
		q, m := marked(t, p, body)
		p.learn(tenantKey{"r", 1}, q, m, 100)
		if n, ok := p.bound(tenantKey{"r", 1}, q, m); !ok || n < int64(len(long)) || n > int64(len(long))+5000 {
			t.Errorf("%s: %d %v", name, n, ok)
		}
	}
}

func TestPromptsAreForgotten(t *testing.T) {
	p := newPrompts()
	q, m := marked(t, p, conversation([]string{"x"}, "y", ""))
	if _, ok := p.bound(tenantKey{"r", 1}, q, m); ok {
		t.Error("something is known of what nobody has seen")
	}
	name := func(run int) string { return fmt.Sprint("run ", run) }
	for run := range 2 * keptRuns {
		for num := range 3 * keptPrompts {
			key := tenantKey{name(run), num}
			p.learn(key, q, m, 100)
			p.learn(key, q, m, 101)
			p.forget(key)
		}
	}
	if len(p.forks) != 0 || len(p.runs) != keptRuns || len(p.order) != keptRuns {
		t.Errorf("%d forks, %d runs, %d in order", len(p.forks), len(p.runs), len(p.order))
	}
	last := name(2*keptRuns - 1)
	if n, ok := p.bound(tenantKey{last, 99}, q, m); !ok || n > 100+edges+blockSize || len(p.runs[last]) != keptPrompts {
		t.Errorf("%d %v", n, ok)
	}
	if _, ok := p.bound(tenantKey{name(0), 1}, q, m); ok {
		t.Error("the oldest run is still known")
	}
}
