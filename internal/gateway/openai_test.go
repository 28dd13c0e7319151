package gateway

import (
	"context"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

const openAIKey = "sk-proj-REAL-OPENAI-KEY-0123456789"

// newOpenAIRig is a rig whose other upstream speaks OpenAI's API, and takes the
// key of that only.
func newOpenAIRig(t *testing.T) (*rig, *standin.Server) {
	t.Helper()
	scripts, err := standin.ParseScripts(strings.NewReader(`{
		"say": {"steps": [{"text": "Hello.", "output_tokens": 500}]},
		"cut": {"steps": [{"text": "` + strings.Repeat("word ", 300) + `", "output_tokens": 500, "faults": [{"kind": "cut", "after": 3, "times": -1}]}]},
		"busy": {"steps": [{"text": "Hello.", "output_tokens": 500, "faults": [{"kind": "status", "status": 429, "headers": {"retry-after": "0"}, "times": 2}]}]}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	model := standin.New(standin.Options{Scripts: scripts, Keys: []string{openAIKey}})
	server := httptest.NewServer(model)
	t.Cleanup(server.Close)
	t.Cleanup(model.Close)
	r := newRig(t, func(o *Options) {
		o.Credentials = func(context.Context) (Credentials, error) {
			return Credentials{APIKey: realKey, BaseURL: "http://127.0.0.1:1", OpenAIKey: openAIKey, OpenAIBaseURL: server.URL + "/v1"}, nil
		}
	})
	return r, model
}

func responses(script, more string) string {
	return fmt.Sprintf(`{"model":"gpt-6.1-sol","stream":true,"prompt_cache_key":"s1","input":[{"type":"message","role":"user","content":[{"type":"input_text","text":"@script %s %s"}]}]%s}`,
		script, strings.Repeat("x", 3000), more)
}

func TestOpenAICallsCostWhatTheAPIBills(t *testing.T) {
	r, model := newOpenAIRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	bodies := []string{
		responses("say", ""), responses("say", ""), // the second finds the prompt in the cache
		strings.Replace(responses("say", ""), `"stream":true`, `"stream":false`, 1),
		responses("busy", ""),
	}
	for _, body := range bodies {
		if a := r.do(t.Context(), "POST", "/v1/responses", "", body, "Authorization", "Bearer "+token); a.status != 200 || strings.Contains(a.body, openAIKey) {
			t.Fatalf("%+v", a)
		}
	}
	r.idle("r")
	var want fork.USD
	cached := 0
	for _, q := range model.Requests() {
		want += testPrices.Cost(q.Model, Tokens{Input: int64(q.Usage.Input), CacheRead: int64(q.Usage.CacheRead), Output: int64(q.Usage.Output)})
		cached += q.Usage.CacheRead
		if q.Status == 200 && q.MaxTokens != defaultMaxOutput {
			t.Errorf("the call went out with %d tokens of output at most", q.MaxTokens)
		}
	}
	got := r.usage("r", 1)
	if got.Cost != want || got.Calls != len(bodies) || cached == 0 || got.CacheReadTokens != int64(cached) {
		t.Errorf("%+v, the API bills %s with %d tokens from the cache", got, want, cached)
	}
}

func TestAnOpenAIStreamThatIsCutCostsItsPromptAndMore(t *testing.T) {
	r, model := newOpenAIRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	r.do(t.Context(), "POST", "/v1/responses", token, responses("cut", ""))
	r.idle("r")
	q := model.Requests()[0]
	least := testPrices.Cost(q.Model, Tokens{Input: int64(q.Usage.Input)})
	ask, err := readOpenAI("/v1/responses", []byte(responses("cut", "")))
	if err != nil {
		t.Fatal(err)
	}
	most := testPrices.estimate(ask, defaultMaxOutput, false).Cost(defaultMaxOutput)
	if got := r.usage("r", 1).Cost; got <= least || got >= most/2 {
		t.Errorf("it cost %s, want more than %s and far less than the reservation of %s", got, least, most)
	}
}

func TestOpenAICallsStayWithinTheBudgetAndWithinWhatHasAPrice(t *testing.T) {
	r, model := newOpenAIRig(t)
	poor := r.grant(Account{Run: "poor", Fork: 1, RunBudget: fork.Dollar / 1000})
	rich := r.grant(Account{Run: "rich", Fork: 1})
	for _, row := range []struct {
		name, token, path, body string
		status                  int
		says                    string
	}{
		{"no money", poor, "/v1/responses", responses("say", ""), 402, "The budget of"},
		{"a search", rich, "/v1/responses", responses("say", `,"tools":[{"type":"web_search"}]`), 403, "web_search"},
		{"a model without a price", rich, "/v1/responses", strings.ReplaceAll(responses("say", ""), "gpt-6.1-sol", "gpt-7"), 404, "has no price"},
		{"no JSON", rich, "/v1/chat/completions", "x", 400, "cannot read"},
		{"what the API keeps", rich, "/v1/responses/resp_1", "{}", 404, "does not pass"},
		{"another part", rich, "/v1/embeddings", "{}", 404, "does not pass"},
	} {
		a := r.do(t.Context(), "POST", row.path, row.token, row.body)
		if a.status != row.status || !strings.Contains(a.body, row.says) {
			t.Errorf("%s: %d %s, want %d and %q", row.name, a.status, a.body, row.status, row.says)
		}
	}
	if n := len(model.Requests()); n != 0 {
		t.Errorf("%d calls went out", n)
	}
}

func TestEachMakerGetsItsOwnKeyOnly(t *testing.T) {
	r, _ := newOpenAIRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	// The other maker's address refuses connections: a call that took the
	// wrong way would be seen.
	if a := r.do(t.Context(), "POST", "/v1/responses", token, responses("say", "")); a.status != 200 {
		t.Errorf("%+v", a)
	}
	if a := r.send(token, message{max: 10}); a.status != 502 {
		t.Errorf("a call to Anthropic's API came to %+v", a)
	}
	for path, want := range map[string]string{"/v1/responses": "OPENAI_API_KEY", "/v1/messages": "ANTHROPIC_API_KEY"} {
		r := newRig(t, func(o *Options) {
			o.Credentials = func(context.Context) (Credentials, error) {
				if path == "/v1/messages" {
					return Credentials{OpenAIKey: openAIKey}, nil
				}
				return Credentials{APIKey: realKey}, nil
			}
		})
		body := responses("say", "")
		if path == "/v1/messages" {
			body = message{max: 10}.body()
		}
		a := r.do(t.Context(), "POST", path, r.grant(Account{Run: "r", Fork: 1}), body)
		if a.status != 401 || !strings.Contains(a.body, want) || a.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s without its key: %+v", path, a)
		}
	}
}
