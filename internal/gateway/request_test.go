package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// randomJSON makes a value that is full of what a careless search for
// "max_tokens" would find.
func randomJSON(r *rand.Rand, depth int) any {
	traps := []string{"max_tokens", `"max_tokens": 7`, `max_tokens\":9`, "ü\u2028\\", "", "model", "ttl", "}{", `\`}
	switch n := r.IntN(9); {
	case n < 3 && depth > 0:
		m := make(map[string]any)
		for range r.IntN(4) {
			m[traps[r.IntN(len(traps))]] = randomJSON(r, depth-1)
		}
		return m
	case n < 5 && depth > 0:
		l := make([]any, r.IntN(4))
		for i := range l {
			l[i] = randomJSON(r, depth-1)
		}
		return l
	case n == 5:
		return r.IntN(100000)
	case n == 6:
		return r.Float64() * 1e9
	case n == 7:
		return []any{true, false, nil}[r.IntN(3)]
	}
	return traps[r.IntN(len(traps))]
}

// randomBody writes the members of an object in any order with any space
// between, and some keys with escapes, and tells where the number stands.
func randomBody(r *rand.Rand, max int64) (body []byte, at int) {
	space := func() string { return []string{"", " ", "\n\t", "\r\n  "}[r.IntN(4)] }
	members := map[string]any{"model": "claude-sonnet-5-5", "messages": randomJSON(r, 4), "system": randomJSON(r, 3), "metadata": randomJSON(r, 3)}
	keys := append(slices.Collect(maps.Keys(members)), "max_tokens")
	r.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	var b bytes.Buffer
	b.WriteString(space() + "{" + space())
	for i, k := range keys {
		if i > 0 {
			b.WriteString("," + space())
		}
		if k == "max_tokens" {
			name := []string{`"max_tokens"`, `"max\u005ftokens"`, `"\u006dax_tokens"`}[r.IntN(3)]
			b.WriteString(name + space() + ":" + space())
			at = b.Len()
			fmt.Fprint(&b, max)
		} else {
			v, _ := json.Marshal(members[k])
			fmt.Fprintf(&b, "%q%s:%s%s", k, space(), space(), v)
		}
		b.WriteString(space())
	}
	b.WriteString("}" + space())
	return b.Bytes(), at
}

func TestClampChangesOneNumberAndNothingElse(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		asked := r.Int64N(1e6) + 1
		body, at := randomBody(r, asked)
		q, err := readRequest(body)
		if err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		if q.maxTokens != asked || q.model != "claude-sonnet-5-5" {
			t.Fatalf("read %d and %q from %s", q.maxTokens, q.model, body)
		}
		to := r.Int64N(1e6)
		got := q.clamp(slices.Clone(body), to)
		if to >= asked {
			if !bytes.Equal(got, body) {
				t.Fatalf("a body that needs no clamp changed")
			}
			continue
		}
		end := at + len(fmt.Sprint(asked))
		want := string(body[:at]) + fmt.Sprint(to) + string(body[end:])
		if string(got) != want {
			t.Fatalf("clamped to %d:\n%s\n%s", to, body, got)
		}
	}
}

// Two readers may take different ones of two equal keys: an agent could have
// the cheap model metered and the dear one answer.
func TestBodyWithTwoReadingsIsRefused(t *testing.T) {
	for _, body := range []string{
		`{"model":"claude-haiku-5-5","model":"claude-opus-5-5","max_tokens":1}`,
		`{"model":"claude-haiku-5-5","mod\u0065l":"claude-opus-5-5","max_tokens":1}`,
		`{"max_tokens":1,"max_tokens":100000}`,
		`{"speed":"standard","speed":"fast"}`,
		`{"max_tokens":1}{"max_tokens":2}`,
		`{"max_tokens":1} x`,
		`[{"max_tokens":1}]`,
		`"max_tokens"`, ``, `{`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,}`, `{,}`, `{"a" 1}`, `{"a":[1,]}`, `{"a":[1 2]}`, `{"a":tru}`, `{"a":01}`, `{"a":1.}`, `{"a":-}`, `{"a":1e}`,
		`{"a":"x}`, `{"a":"x\"}`, `{a:1}`, "\xef\xbb\xbf{}", `{"a":NaN}`, "{\x00\"a\":1}", "{\"a\":\"\xbe\"}",
		`{"max_tokens":"100"}`, `{"max_tokens":1.5}`, `{"max_tokens":1e3}`, `{"max_tokens":-1}`, `{"max_tokens":99999999999999999999}`,
		`{"thinking":{"budget_tokens":"9"}}`,
		`{"a":` + strings.Repeat("[", 600) + strings.Repeat("]", 600) + `}`,
	} {
		if q, err := readRequest([]byte(body)); err == nil {
			t.Errorf("%s was read as %+v", body, q)
		}
	}
}

func TestReadingFindsWhatCostsMoney(t *testing.T) {
	picture := `{"type":"image","source":{"type":"base64","media_type":"image/png","data":"AAAAAAAAAA"}}`
	paper := `{"type":"document","source":{"data":"BBBBBBBB","type":"base64"}}`
	in := func(block string) string {
		return `{"messages":[{"role":"user","content":[` + block + `]}]}`
	}
	for name, c := range map[string]struct {
		body string
		ok   func(q *request) bool
	}{
		"stream":             {`{"stream":true}`, func(q *request) bool { return q.stream }},
		"no stream":          {`{"stream":false,"x":{"stream":true}}`, func(q *request) bool { return !q.stream }},
		"hour":               {`{"system":[{"cache_control":{"type":"ephemeral","ttl":"1h"}}]}`, func(q *request) bool { return q.hour }},
		"hour, escaped":      {`{"system":[{"cache_control":{"tt\u006c":"1\u0068"}}]}`, func(q *request) bool { return q.hour }},
		"five minutes":       {`{"cache_control":{"ttl":"5m"}}`, func(q *request) bool { return !q.hour }},
		"thinking":           {`{"thinking":{"type":"enabled","budget_tokens":5000}}`, func(q *request) bool { return q.thinking == 5000 }},
		"fast":               {`{"speed":"fast"}`, func(q *request) bool { return q.fast }},
		"standard":           {`{"speed":"standard"}`, func(q *request) bool { return !q.fast }},
		"place":              {`{"inference_geo":"us"}`, func(q *request) bool { return q.regional }},
		"fallbacks":          {`{"fallbacks":[{"model":"a"},{"model":"b"}]}`, func(q *request) bool { return slices.Equal(q.fallbacks, []string{"a", "b"}) }},
		"compaction":         {`{"context_management":{"edits":[{"type":"compact_20260112"}]}}`, func(q *request) bool { return q.compacts }},
		"no compaction":      {`{"context_management":{"edits":[{"type":"clear_thinking_20251015"}]}}`, func(q *request) bool { return !q.compacts }},
		"searches":           {`{"tools":[{"type":"web_search_20250305","max_uses":8}]}`, func(q *request) bool { return q.uses == 8 }},
		"searches, unsaid":   {`{"tools":[{"type":"web_search_20250305"}]}`, func(q *request) bool { return q.uses == defaultUses }},
		"searches, endless":  {`{"tools":[{"type":"web_search_20250305","max_uses":999999999}]}`, func(q *request) bool { return q.uses == maxUses }},
		"agent's tools":      {`{"tools":[{"name":"Bash"},{"type":"custom"},{"type":"bash_20250124"}]}`, func(q *request) bool { return q.uses == 0 }},
		"advisor":            {`{"tools":[{"type":"advisor_20260301"}]}`, func(q *request) bool { return q.advisor }},
		"mcp":                {`{"mcp_servers":[{"url":"x"}]}`, func(q *request) bool { return q.uses == defaultUses }},
		"picture":            {in(picture), func(q *request) bool { return q.pictures == 1 && q.pixels == 10 }},
		"picture in result":  {in(`{"type":"tool_result","content":[` + picture + `,` + picture + `]}`), func(q *request) bool { return q.pictures == 2 && q.pixels == 20 }},
		"picture as text":    {in(`{"type":"tool_use","input":` + picture + `}`), func(q *request) bool { return q.pictures == 0 && q.pixels == 0 }},
		"picture in a tool":  {`{"tools":[` + picture + `]}`, func(q *request) bool { return q.pixels == 0 }},
		"picture or not":     {in(`{"type":"image","type":"text","source":{"type":"base64","data":"AAAA"}}`), func(q *request) bool { return q.pixels == 0 }},
		"text or not":        {in(`{"type":"text","type":"image","source":{"type":"base64","data":"AAAA"}}`), func(q *request) bool { return q.pixels == 0 }},
		"two sources":        {in(`{"type":"image","source":{"type":"base64","data":"AAAA"},"source":{"type":"base64","data":"A"}}`), func(q *request) bool { return q.pixels == 0 }},
		"data twice":         {in(`{"type":"image","source":{"type":"base64","data":"AAAA","data":"A"}}`), func(q *request) bool { return q.pixels == 0 }},
		"paper":              {in(paper), func(q *request) bool { return q.papers == 8 && q.pixels == 0 }},
		"remote picture":     {in(`{"type":"image","source":{"type":"url","url":"x"}}`), func(q *request) bool { return q.remote == 1 }},
		"remote paper":       {in(`{"type":"document","source":{"type":"file","file_id":"x"}}`), func(q *request) bool { return q.remote == 1 }},
		"nothing, of course": {`{}`, func(q *request) bool { return q.maxTokens == 0 && q.model == "" }},
	} {
		q, err := readRequest([]byte(c.body))
		if err != nil || !c.ok(q) {
			t.Errorf("%s: %s is read as %+v, %v", name, c.body, q, err)
		}
	}
}

func TestEstimateCoversEveryClass(t *testing.T) {
	p := loadPrices(t)
	body := func(members string) *request {
		q, err := readRequest([]byte(`{"model":"claude-sonnet-5-5","max_tokens":10000,` + members + `}`))
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	text := strings.Repeat("x", 30_000)
	plain := p.estimate(body(`"system":"`+text+`"`), 32000, false)
	for name, a := range map[string]ask{
		"an hour's cache": p.estimate(body(`"system":"`+text+`","cache_control":{"ttl":"1h"}`), 32000, false),
		"a dense fork":    p.estimate(body(`"system":"`+text+`"`), 32000, true),
		"a web search":    p.estimate(body(`"system":"`+text+`","tools":[{"type":"web_search_1"}]`), 32000, false),
		"a fallback":      p.estimate(body(`"system":"`+text+`","fallbacks":[{"model":"claude-opus-5-5"}]`), 32000, false),
		"a compaction":    p.estimate(body(`"system":"`+text+`","context_management":{"edits":[{"type":"compact_1"}]}`), 32000, false),
		"a remote paper":  p.estimate(body(`"system":"`+text+`","messages":[{"content":[{"type":"document","source":{"type":"url"}}]}]`), 32000, false),
		"another model":   p.estimate(&request{model: "nobody-knows", body: 30_000, maxTokens: 10000}, 32000, false),
	} {
		if a.Cost(a.Want) < plain.Cost(plain.Want)*11/10 {
			t.Errorf("%s is asked for %s, without it %s", name, a.Cost(a.Want), plain.Cost(plain.Want))
		}
	}
	if want := p.Cost("sonnet", Tokens{CacheWrite5m: 10_000, Output: 10_000}); plain.Cost(plain.Want) < want {
		t.Errorf("%s is asked for what may cost %s", plain.Cost(plain.Want), want)
	}
	if a := p.estimate(body(`"system":""`), 4000, false); a.Want != 4000 || a.Least != leastOutput || a.Enough != 4000 {
		t.Errorf("capped: %+v", a)
	}
	// The API refuses a call whose thinking could use up max_tokens.
	if a := p.estimate(body(`"thinking":{"type":"enabled","budget_tokens":8000}`), 4000, false); a.Want != 8001 || a.Least != 8001 {
		t.Errorf("thinking: %+v", a)
	}
	pictures := `"messages":[{"content":[{"type":"image","source":{"type":"base64","data":"` + strings.Repeat("A", 1<<20) + `"}}]}]`
	if a := p.estimate(body(pictures), 32000, false); a.prompt > 2*pictureTokens {
		t.Errorf("a picture is reserved as %d tokens", a.prompt)
	}
}

func FuzzReadRequest(f *testing.F) {
	for _, s := range []string{`{"model":"m","max_tokens":5}`, `{"max\u005ftokens":5,"x":[{"type":"image"}]}`, `{"a":"\\\"","b":[1e9,-0.5,null]}`,
		`{"messages":[{"content":[{"type":"image","source":{"type":"base64","data":"AAAA"}}]}]}`, `{"max_tokens":5}`} {
		f.Add([]byte(s))
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		b, _ := randomBody(r, 77)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		q, err := readRequest(body)
		var m map[string]json.RawMessage
		standard := json.Unmarshal(body, &m)
		if err != nil {
			return
		}
		if q.body != len(body) || q.pixels+q.papers > len(body) || q.pixels < 0 || q.papers < 0 {
			t.Fatalf("%+v of %d bytes", q, len(body))
		}
		if standard != nil {
			return // lax about what upstream refuses
		}
		// What the standard library reads is what was read here.
		var n int64
		if raw, ok := m["max_tokens"]; ok && json.Unmarshal(raw, &n) == nil && n != q.maxTokens {
			t.Fatalf("max_tokens %d, standard %d: %s", q.maxTokens, n, body)
		}
		var name string
		if raw, ok := m["model"]; ok && json.Unmarshal(raw, &name) == nil && name != q.model {
			t.Fatalf("model %q, standard %q: %s", q.model, name, body)
		}
		if q.maxTokens > 1 {
			clamped := q.clamp(body, 1)
			again, err := readRequest(clamped)
			if err != nil || again.maxTokens != 1 {
				t.Fatalf("clamped to %s: %v", clamped, err)
			}
			if len(body)-len(clamped) != q.maxEnd-q.maxAt-1 {
				t.Fatalf("more than the number changed: %s", clamped)
			}
		}
	})
}

func BenchmarkReadRequest(b *testing.B) {
	body := []byte(`{"model":"claude-sonnet-5-5","max_tokens":32000,"messages":[` + strings.Repeat(`{"role":"user","content":[{"type":"text","text":"some words \"quoted\" and\nmore of them, as agents write"}]},`, 5000) + `{}]}`)
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if _, err := readRequest(body); err != nil {
			b.Fatal(err)
		}
	}
}
