package standin_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// toolOf returns the id of an answer's first tool call, or "".
func toolOf(doc map[string]any) string {
	content, _ := doc["content"].([]any)
	for _, b := range content {
		if b, ok := b.(map[string]any); ok && b["type"] == "tool_use" {
			return b["id"].(string)
		}
	}
	return ""
}

func TestTheNextStepIsReadFromTheConversation(t *testing.T) {
	scripts := map[string]standin.Script{
		"s": {Steps: []standin.Step{
			{Text: "one", Tools: []standin.Tool{tool("Bash", `{"command":"a","timeout":1}`)}},
			{Text: "two"},
			{Text: "three", Tools: []standin.Tool{tool("Bash", `{"command":"b"}`)}},
			{Text: "four"},
		}},
		"other": {Steps: []standin.Step{{Text: "another story"}}},
	}
	// Every call goes to a stand-in that has just been started.
	say := func(messages ...any) (string, map[string]any) {
		t.Helper()
		_, url := serve(t, standin.Options{Scripts: scripts, Default: "other"})
		_, doc := client{t: t, url: url}.say(ask(messages...))
		return text(doc), doc
	}
	prompt := user([]any{
		map[string]any{"type": "text", "text": "<system-reminder>\nA file says: @script other\n</system-reminder>"},
		map[string]any{"type": "text", "text": "Do it well. @script s."},
	})
	_, first := say(prompt)
	_, third := say(prompt, assistant(first["content"]), result(toolOf(first)), assistant("two"), user("go on"))
	if toolOf(first) == "" || toolOf(first) == toolOf(third) {
		t.Fatalf("tool ids %q and %q", toolOf(first), toolOf(third))
	}
	toolOnly := []any{map[string]any{"type": "tool_use", "id": toolOf(first), "name": "Bash", "input": map[string]any{}}}
	quoting := user([]any{map[string]any{"type": "tool_result", "tool_use_id": toolOf(first), "content": "@script other"}})
	for _, row := range []struct {
		name     string
		messages []any
		want     string
	}{
		{"begun", []any{prompt}, "one"},
		{"a step played", []any{prompt, assistant(first["content"]), result(toolOf(first))}, "two"},
		{"its text was dropped", []any{prompt, assistant(toolOnly), result(toolOf(first))}, "two"},
		{"a tool quotes a marker", []any{prompt, assistant(toolOnly), quoting}, "two"},
		{"a client's own message", []any{prompt, assistant(first["content"]), result(toolOf(first)), assistant("No response requested."), user("Continue.")}, "two"},
		{"a step's text with space around it", []any{prompt, assistant(toolOnly), result(toolOf(first)), assistant(" two\n"), user("Continue.")}, "three"},
		{"a step was dropped", []any{prompt, assistant(third["content"]), result(toolOf(third))}, "four"},
		{"over", []any{prompt, assistant("one"), user("x"), assistant("two"), user("x"), assistant(third["content"]), result(toolOf(third)), assistant("four"), user("And?")}, "four"},
		{"a new script in the same conversation", []any{prompt, assistant(first["content"]), result(toolOf(first)), assistant("two"), user("@script other")}, "another story"},
		{"a marker in a reminder only", []any{user("<system-reminder>@script s</system-reminder> hello")}, "one"},
		{"no marker", []any{user("hello")}, "another story"},
	} {
		if got, doc := say(row.messages...); got != row.want {
			t.Errorf("%s: %q, want %q: %v", row.name, got, row.want, doc)
		}
	}
}

func TestToolIDsDependOnWhatIsCalledOnly(t *testing.T) {
	id := func(name, input string, before int) string {
		steps := make([]standin.Step, before, before+1)
		messages := []any{user("@script " + name)}
		for i := range steps {
			steps[i].Text = fmt.Sprint("step ", i)
			messages = append(messages, assistant(steps[i].Text), user("go on"))
		}
		steps = append(steps, standin.Step{Tools: []standin.Tool{tool("Bash", input)}})
		_, url := serve(t, standin.Options{Scripts: map[string]standin.Script{name: {Steps: steps}}})
		_, doc := client{t: t, url: url}.say(ask(messages...))
		return toolOf(doc)
	}
	same := id("s", `{"command":"a","timeout":1}`, 0)
	if same == "" || id("s", `{ "timeout": 1, "command": "a" }`, 0) != same {
		t.Error("the same call has two ids")
	}
	for _, other := range []string{id("s2", `{"command":"a","timeout":1}`, 0), id("s", `{"command":"b","timeout":1}`, 0), id("s", `{"command":"a","timeout":1}`, 1)} {
		if other == same {
			t.Error("two calls share an id")
		}
	}
}

func vary(n int) standin.Script {
	s := standin.Script{Sessions: map[string]int{"chosen": n}}
	for i := range n {
		s.Variants = append(s.Variants, []standin.Step{
			{Text: "The same begin.", Tools: []standin.Tool{tool("Bash", `{"command":"same"}`)}},
			{Text: fmt.Sprint("variant ", i+1)},
		})
	}
	return s
}

func TestAConversationGetsOneVariantAndKeepsIt(t *testing.T) {
	opts := standin.Options{Scripts: map[string]standin.Script{"v": vary(3)}}
	_, url := serve(t, opts)
	begin := func(session, prompt string) map[string]any {
		t.Helper()
		_, doc := client{t: t, url: url, session: session}.say(ask(user(prompt)))
		return doc
	}
	// goOn asks for the second step, of a stand-in that knows nothing yet.
	goOn := func(session, prompt string, first map[string]any) string {
		t.Helper()
		_, url := serve(t, opts)
		_, doc := client{t: t, url: url, session: session}.say(ask(user(prompt), assistant(first["content"]), result(toolOf(first))))
		return text(doc)
	}
	if got := goOn("x", "@script v#2", begin("x", "@script v#2")); got != "variant 2" {
		t.Errorf("asked for: %s", got)
	}
	if got := goOn("chosen", "@script v", begin("chosen", "@script v")); got != "variant 3" {
		t.Errorf("mapped: %s", got)
	}
	dealt := map[string]int{}
	for i := range 9 {
		session := fmt.Sprint("session ", i)
		first := begin(session, "@script v")
		if again := begin(session, "@script v"); toolOf(again) != toolOf(first) {
			t.Errorf("%s got another variant when it asked again", session)
		}
		dealt[goOn(session, "@script v", first)]++
	}
	for v, n := range dealt {
		if n != 3 {
			t.Errorf("%s was dealt %d times: %v", v, n, dealt)
		}
	}
	if len(dealt) != 3 {
		t.Errorf("dealt %v", dealt)
	}
}

func TestTheSessionIsFoundInTheBodyToo(t *testing.T) {
	s, url := serve(t, standin.Options{Scripts: one(standin.Step{Text: "hello"})})
	c := client{t: t, url: url}
	for _, id := range []string{`{"device_id":"d","session_id":"abc"}`, "user_1_account_2_session_abc", "nobody"} {
		c.say(ask(user("@script s")).with("metadata", map[string]any{"user_id": id}))
	}
	rs := s.Requests()
	if rs[0].Session != "abc" || rs[1].Session != "abc" || rs[2].Session != "" {
		t.Errorf("%+v", rs)
	}
}

func FuzzServe(f *testing.F) {
	f.Add([]byte(`{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"@script s"}]}`))
	f.Add([]byte(`{"model":"m","max_tokens":1,"stream":true,"system":[{"type":"text","text":"x","cache_control":{"type":"ephemeral","ttl":"1h"}}],"messages":[{"role":"user","content":[{"type":"text","text":"@script v#1"}]}]}`))
	f.Add([]byte(`{"model":"m","max_tokens":9,"metadata":{"user_id":"{}"},"tools":[null],"messages":[{"role":"user","content":[null,7]}]}`))
	s := standin.New(standin.Options{Scripts: map[string]standin.Script{"s": {Steps: []standin.Step{{Text: "hello"}}}, "v": vary(2)}})
	f.Fuzz(func(t *testing.T, raw []byte) {
		w := serveOnce(t, s, string(raw))
		if w.Code != 200 && w.Code != 400 && w.Code != 404 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		if !strings.Contains(w.Body.String(), `"type":`) {
			t.Errorf("%s", w.Body)
		}
	})
}
