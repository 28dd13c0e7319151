package standin_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// A body is a request as a client would build it.
type body map[string]any

func ask(messages ...any) body {
	return body{"model": "claude-sonnet-5-5", "max_tokens": 1000, "messages": messages}
}

func (b body) with(k string, v any) body {
	c := body{}
	for k, v := range b {
		c[k] = v
	}
	c[k] = v
	return c
}

func user(content any) any      { return map[string]any{"role": "user", "content": content} }
func assistant(content any) any { return map[string]any{"role": "assistant", "content": content} }

func result(id string) any {
	return user([]any{map[string]any{"type": "tool_result", "tool_use_id": id, "content": "done"}})
}

// A client is one conversation's.
type client struct {
	t       *testing.T
	url     string
	session string
	key     string
}

func (c client) post(ctx context.Context, path string, b body) (*http.Response, error) {
	raw, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+path, bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	req.Header.Set("anthropic-version", "2023-06-01")
	req.Header.Set("x-api-key", c.key)
	if c.session != "" {
		req.Header.Set("x-claude-code-session-id", c.session)
	}
	return http.DefaultClient.Do(req)
}

// say returns the status and the JSON of an answer.
func (c client) say(b body) (int, map[string]any) {
	c.t.Helper()
	return c.get("/v1/messages", b)
}

func (c client) get(path string, b body) (int, map[string]any) {
	c.t.Helper()
	res, err := c.post(c.t.Context(), path, b)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	var doc map[string]any
	if err := json.NewDecoder(res.Body).Decode(&doc); err != nil {
		c.t.Fatal(err)
	}
	return res.StatusCode, doc
}

// text is what an answer says, and "" when it is none.
func text(doc map[string]any) string {
	var s string
	content, _ := doc["content"].([]any)
	for _, b := range content {
		if b, ok := b.(map[string]any); ok && b["type"] == "text" {
			s += b["text"].(string)
		}
	}
	return s
}

func errorType(doc map[string]any) any {
	e, _ := doc["error"].(map[string]any)
	return e["type"]
}

type event struct {
	name string
	data map[string]any
}

// events reads a stream to its end; err is nil when the end was in order.
func events(r io.Reader) (es []event, err error) {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		name, ok := strings.CutPrefix(sc.Text(), "event: ")
		if !ok {
			continue
		}
		sc.Scan()
		var data map[string]any
		if err := json.Unmarshal([]byte(strings.TrimPrefix(sc.Text(), "data: ")), &data); err != nil {
			return es, err
		}
		es = append(es, event{name, data})
	}
	return es, sc.Err()
}

// whole puts a stream together to the message that it is.
func whole(t *testing.T, es []event) map[string]any {
	t.Helper()
	var msg map[string]any
	var blocks []map[string]any
	inputs := map[int]string{}
	for _, e := range es {
		i, _ := e.data["index"].(float64)
		n := int(i)
		switch e.name {
		case "message_start":
			msg = e.data["message"].(map[string]any)
		case "content_block_start":
			blocks = append(blocks, e.data["content_block"].(map[string]any))
		case "content_block_delta":
			switch d := e.data["delta"].(map[string]any); d["type"] {
			case "text_delta":
				blocks[n]["text"] = blocks[n]["text"].(string) + d["text"].(string)
			case "thinking_delta":
				blocks[n]["thinking"] = blocks[n]["thinking"].(string) + d["thinking"].(string)
			case "signature_delta":
				blocks[n]["signature"] = d["signature"]
			case "input_json_delta":
				inputs[n] += d["partial_json"].(string)
			}
		case "content_block_stop":
			if s, ok := inputs[n]; ok {
				var v any
				if err := json.Unmarshal([]byte(s), &v); err != nil {
					t.Fatal(err)
				}
				blocks[n]["input"] = v
			}
		case "message_delta":
			msg["stop_reason"], msg["usage"] = e.data["delta"].(map[string]any)["stop_reason"], e.data["usage"]
		}
	}
	content := []any{}
	for _, b := range blocks {
		content = append(content, b)
	}
	msg["content"] = content
	return msg
}

func one(steps ...standin.Step) map[string]standin.Script {
	return map[string]standin.Script{"s": {Steps: steps}}
}

func tool(name, input string) standin.Tool {
	return standin.Tool{Name: name, Input: json.RawMessage(input)}
}

func TestAnAnswerIsTheSameStreamedAndWhole(t *testing.T) {
	_, url := serve(t, standin.Options{Scripts: one(standin.Step{
		Thinking: strings.Repeat("Hmm, 世界. ", 40),
		Text:     strings.Repeat("Grüße an alle. ", 40),
		Tools:    []standin.Tool{tool("Bash", `{"command":"`+strings.Repeat("true; ", 60)+`"}`), {Name: "Empty"}},
	})})
	c := client{t: t, url: url, session: "a"}
	_, plain := c.say(ask(user("@script s")))
	res, err := c.post(t.Context(), "/v1/messages", ask(user("@script s")).with("stream", true))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	es, err := events(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	streamed := whole(t, es)
	if plain["id"] == streamed["id"] {
		t.Error("two messages share an id")
	}
	delete(plain, "id")
	delete(streamed, "id")
	if diff := cmp.Diff(plain, streamed); diff != "" {
		t.Error(diff)
	}
	if es[len(es)-1].name != "message_stop" || plain["stop_reason"] != "tool_use" {
		t.Errorf("ended with %v, %v", es[len(es)-1], plain["stop_reason"])
	}
}

func TestAStatusComesAsOftenAsItShouldInEachConversation(t *testing.T) {
	s, url := serve(t, standin.Options{Scripts: one(standin.Step{Text: "hello", Faults: []standin.Fault{
		{Kind: standin.FaultStatus, Status: 529, Times: 2, Headers: map[string]string{"retry-after": "7"}},
		{Kind: standin.FaultStatus, Status: 402, Message: "no money"},
	}})})
	for _, session := range []string{"a", "b"} {
		c := client{t: t, url: url, session: session}
		for i, want := range []int{529, 529, 402, 200} {
			status, doc := c.say(ask(user("@script s")))
			if status != want {
				t.Errorf("%s, call %d: %d, %v", session, i, status, doc)
			}
			if i == 0 && errorType(doc) != "overloaded_error" {
				t.Errorf("%v", doc)
			}
			if i == 2 && (errorType(doc) != "billing_error" || doc["error"].(map[string]any)["message"] != "no money") {
				t.Errorf("%v", doc)
			}
		}
	}
	res, err := client{t: t, url: url, session: "c"}.post(t.Context(), "/v1/messages", ask(user("@script s")))
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.Header.Get("retry-after") != "7" {
		t.Errorf("headers %v", res.Header)
	}
	for _, r := range s.Requests() {
		if r.Status != 200 && (r.Usage != standin.Usage{} || r.Outcome != standin.Refused) {
			t.Errorf("an error was charged: %+v", r)
		}
	}
}

func TestAStreamBreaksWhereItShould(t *testing.T) {
	long := standin.Step{Text: strings.Repeat("word ", 200)}
	for _, row := range []struct {
		fault standin.Fault
		sent  int // events before the fault
	}{
		{standin.Fault{Kind: standin.FaultCut, After: 5}, 5},
		{standin.Fault{Kind: standin.FaultCut, After: 0}, 0},
		{standin.Fault{Kind: standin.FaultError, After: 4}, 4},
	} {
		t.Run(fmt.Sprintf("%s after %d", row.fault.Kind, row.fault.After), func(t *testing.T) {
			step := long
			step.Faults = []standin.Fault{row.fault}
			s, url := serve(t, standin.Options{Scripts: one(step)})
			c := client{t: t, url: url, session: "a"}
			res, err := c.post(t.Context(), "/v1/messages", ask(user("@script s")).with("stream", true))
			var es []event
			if err == nil { // a stream that is cut at once may not even have a status
				defer func() { _ = res.Body.Close() }()
				es, err = events(res.Body)
			}
			if row.fault.Kind == standin.FaultError {
				last := es[len(es)-1]
				if err != nil || last.name != "error" || errorType(last.data) != "overloaded_error" {
					t.Errorf("%v, %v", last, err)
				}
				es = es[:len(es)-1]
			} else if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
				t.Errorf("the stream ended in order: %v", err)
			}
			if len(es) != row.sent {
				t.Errorf("%d events, want %d", len(es), row.sent)
			}
			rs := ended(t, s, 1)
			if rs[0].Outcome != standin.Broken || rs[0].Usage.Output >= 250 {
				t.Errorf("%+v", rs[0])
			}
			if status, doc := c.say(ask(user("@script s"))); status != 200 || text(doc) != step.Text {
				t.Errorf("the next call: %d, %v", status, doc)
			}
		})
	}
}

// ended waits until n requests have ended: a client knows earlier than the
// server that it is gone.
func ended(t *testing.T, s *standin.Server, n int) []standin.Request {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if rs := s.Requests(); len(rs) >= n {
			return rs
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%d requests have not ended", n)
		}
	}
}

func TestWhatHangsEndsWithTheClientOrTheStandIn(t *testing.T) {
	for _, kind := range []standin.FaultKind{standin.FaultHang, standin.FaultStall} {
		for _, stream := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s %v", kind, stream), func(t *testing.T) {
				arrived := make(chan struct{}, 100)
				s, url := serve(t, standin.Options{
					Scripts: one(standin.Step{Text: "hello", Faults: []standin.Fault{{Kind: kind, After: 2, Times: standin.Always}}}),
					Now:     func() time.Time { arrived <- struct{}{}; return time.Now() },
				})
				c := client{t: t, url: url, session: "a"}
				call := ask(user("@script s")).with("stream", stream)

				ctx, cancel := context.WithCancel(t.Context())
				first := make(chan error, 1)
				go func() {
					res, err := c.post(ctx, "/v1/messages", call)
					if err == nil {
						_, err = io.Copy(io.Discard, &canceller{r: res.Body, cancel: cancel})
						_ = res.Body.Close()
					}
					first <- err
				}()
				<-arrived
				if kind == standin.FaultHang {
					cancel() // nothing is ever sent that could be waited for
				}
				if err := <-first; !errors.Is(err, context.Canceled) {
					t.Errorf("the client left: %v", err)
				}
				cancel()
				// A client may be gone before its question was read.
				if rs := ended(t, s, 1); rs[0].Outcome != standin.Broken && rs[0].Outcome != standin.Left {
					t.Errorf("%+v", rs[0])
				}

				second := make(chan error, 1)
				go func() {
					res, err := c.post(t.Context(), "/v1/messages", call)
					if err == nil {
						_, err = io.Copy(io.Discard, res.Body)
						_ = res.Body.Close()
					}
					second <- err
				}()
				s.Close()
				s.Close()
				if err := <-second; err == nil {
					t.Error("the stand-in was closed, and the answer ended in order")
				}
			})
		}
	}
}

// A canceller leaves after the first bytes.
type canceller struct {
	r      io.Reader
	cancel func()
}

func (c *canceller) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.cancel()
	return n, err
}

func TestOnlyGoodKeysAreServedAndNoneIsLogged(t *testing.T) {
	var log bytes.Buffer
	s := standin.New(standin.Options{Scripts: one(standin.Step{Text: "hello"}), Keys: []string{"sk-ant-secret-key"}, Log: &log})
	for _, row := range []struct {
		key    string
		bearer bool
		want   int
	}{{"sk-ant-secret-key", false, 200}, {"sk-ant-secret-key", true, 200}, {"sk-ant-other-key", false, 401}, {"", false, 401}} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/messages", strings.NewReader(`{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"@script s"}]}`))
		req.Header.Set("anthropic-version", "2023-06-01")
		if row.bearer {
			req.Header.Set("authorization", "Bearer "+row.key)
		} else {
			req.Header.Set("x-api-key", row.key)
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		if w.Code != row.want {
			t.Errorf("key %q: %d", row.key, w.Code)
		}
	}
	if rs := s.Requests(); rs[0].Key != "sk-ant-secret-key" || rs[2].Key != "sk-ant-other-key" {
		t.Errorf("%+v", rs)
	}
	if n := strings.Count(log.String(), "\n"); n != 4 || strings.Contains(log.String(), "secret") || !strings.Contains(log.String(), `"key":"…-key"`) {
		t.Errorf("%d lines: %s", n, log.String())
	}
}

func TestCallsThatTheAPIRefusesAreRefused(t *testing.T) {
	_, url := serve(t, standin.Options{Scripts: map[string]standin.Script{"s": {Steps: []standin.Step{{Text: "hello"}}}, "wrong": {}}})
	c := client{t: t, url: url}
	hi := user("@script s")
	call := []any{map[string]any{"type": "tool_use", "id": "t1", "name": "Bash", "input": map[string]any{}}}
	for _, row := range []struct {
		name string
		body body
		want int
	}{
		{"no model", ask(hi).with("model", ""), 400},
		{"no tokens", ask(hi).with("max_tokens", 0), 400},
		{"no messages", ask(), 400},
		{"a strange role", ask(map[string]any{"role": "robot", "content": "x"}), 400},
		{"content of a strange form", ask(user(7)), 400},
		{"a call without result", ask(hi, assistant(call)), 400},
		{"a call answered with talk", ask(hi, assistant(call), user("well")), 400},
		{"a result without call", ask(hi, assistant("x"), result("t1")), 400},
		{"no script named", ask(user("hello")), 400},
		{"no such script", ask(user("@script nosuch")), 404},
		{"no such variant", ask(user("@script s#2")), 404},
		{"a script that cannot be played", ask(user("@script wrong")), 400},
		{"well formed", ask(hi, assistant(call), result("t1")), 200},
	} {
		if status, doc := c.say(row.body); status != row.want {
			t.Errorf("%s: %d, %v", row.name, status, doc)
		}
	}
	// A server that answers before it has read all may be heard or not, so
	// this goes over no wire.
	if w := serveOnce(t, standin.New(standin.Options{}), `"`+strings.Repeat("x", 33<<20)); w.Code != 413 {
		t.Errorf("too large: %d", w.Code)
	}
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/messages", strings.NewReader("{}"))
	w := httptest.NewRecorder()
	standin.New(standin.Options{}).ServeHTTP(w, req)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "anthropic-version") {
		t.Errorf("no anthropic-version: %d %s", w.Code, w.Body)
	}
}

func TestModelsAndTokensAreCounted(t *testing.T) {
	s, url := serve(t, standin.Options{Headers: map[string]string{"anthropic-ratelimit-requests-remaining": "3"}})
	read := func(path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
		return w
	}
	var models struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	w := read("/v1/models")
	if err := json.Unmarshal(w.Body.Bytes(), &models); err != nil || len(models.Data) == 0 {
		t.Fatal(w.Body, err)
	}
	if w.Header().Get("anthropic-ratelimit-requests-remaining") != "3" || w.Header().Get("request-id") == "" {
		t.Errorf("headers %v", w.Header())
	}
	for path, want := range map[string]int{"/v1/models/" + models.Data[0].ID: 200, "/v1/models/nosuch": 404, "/v1/nothing": 404} {
		if w := read(path); w.Code != want {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
	c := client{t: t, url: url}
	small, large := ask(user("x")), ask(user("x"+strings.Repeat("y", 4000)))
	delete(small, "max_tokens") // counting needs none
	_, a := c.get("/v1/messages/count_tokens", small)
	_, b := c.get("/v1/messages/count_tokens", large)
	if b["input_tokens"].(float64)-a["input_tokens"].(float64) != 1000 {
		t.Errorf("%v, %v", a, b)
	}
}

func TestMaxTokensCutsAnAnswerShortAndTheNextGoesOn(t *testing.T) {
	s, url := serve(t, standin.Options{Scripts: one(
		standin.Step{Text: strings.Repeat("abcd", 100), Tools: []standin.Tool{tool("Bash", `{}`)}},
		standin.Step{Text: "The end.", OutputTokens: 50},
	)})
	c := client{t: t, url: url, session: "a"}
	status, doc := c.say(ask(user("@script s")).with("max_tokens", 10))
	if status != 200 || doc["stop_reason"] != "max_tokens" || !strings.HasPrefix(text(doc), strings.Repeat("abcd", 10)+" [") {
		t.Errorf("%d, %v", status, doc)
	}
	_, doc = c.say(ask(user("@script s"), assistant(doc["content"]), user("Continue.")))
	if text(doc) != "The end." || doc["stop_reason"] != "end_turn" {
		t.Errorf("%v", doc)
	}
	if rs := s.Requests(); rs[0].Usage.Output != 10 || rs[1].Usage.Output != 50 {
		t.Errorf("%+v", rs)
	}
}
