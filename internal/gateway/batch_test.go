package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

// mixed is a batch of several models whose requests end in every way there is.
var mixed = []message{
	{max: 100, pad: 3000, script: script{Out: 80, Read: 300, Write: 200}},
	{model: "claude-opus-5-5", max: 100, script: script{Out: 50}},
	{model: "sonnet", max: 100, script: script{Out: 1}},
	{model: "claude-haiku-5-5", max: 200, pad: 600_000, script: script{Out: 150}},
	{model: "claude-opus-5-5", max: 100, script: script{Fault: errored}},
	{max: 50_000, script: script{Fault: expired}},
}

func TestABatchCostsWhatItsResultsSay(t *testing.T) {
	r := newRig(t)
	defer r.watch()()
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 2 * fork.Dollar})
	id := r.makeBatch(token, mixed...)
	if got, want := r.usage("r", 1), reservedFor(mixed...); got.Cost != want || got.Pending != want || got.Calls != 0 {
		t.Errorf("while it goes on: %+v, want %s", got, want)
	}
	r.up.end()
	want := r.up.billed()
	for range 3 { // whoever reads it how often
		if a := r.readBatch(token, id); a.status != 200 || strings.Count(a.body, "\n") != len(mixed) {
			t.Fatalf("%+v", a)
		}
		got := r.usage("r", 1)
		if got.Cost != want || got.Cost == 0 || got.Pending != 0 || got.Calls != 3 || got.OutputTokens != 80+50+1+150 || got.CacheReadTokens != 300 || got.CacheWriteTokens != 200 {
			t.Errorf("%+v, billed %s", got, want)
		}
	}
	for model, c := range map[string]struct{ out, cost int64 }{
		"claude-opus-5-5":   {50, 0},
		"claude-haiku-5-5":  {150, 0},
		"claude-sonnet-5-5": {81, 0},
	} {
		var out, cost, rows int64
		var note, name string
		err := r.read(`SELECT output, cost, note, request_id, (SELECT COUNT(*) FROM calls WHERE batch = ?) FROM calls WHERE model = ? AND state = 'settled'`, id, model).Scan(&out, &cost, &note, &name, &rows)
		if err != nil && model == "claude-sonnet-5-5" { // the last one that answered
			err = r.read(`SELECT output, cost, note, request_id, (SELECT COUNT(*) FROM calls WHERE batch = ?) FROM calls WHERE model = 'sonnet' AND state = 'settled'`, id).Scan(&out, &cost, &note, &name, &rows)
		}
		if err != nil || out != c.out || cost == 0 || rows != 3 || name != id || note != "a batch: 4 succeeded, 1 errored, 1 expired" {
			t.Errorf("%s: %d tokens, %d, %d rows, %q %q, %v", model, out, cost, rows, name, note, err)
		}
	}
	if strings.Contains(r.logs.String(), "cost more than was reserved") {
		t.Errorf("%s", r.logs)
	}
	r.agree("r")
}

func TestBatchPassesByteForByteButForTheClamp(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	body := " {\"requests\" : [ {\"custom_id\":\"a\",\n\"params\":{\"max_tokens\": 64000, \"model\":\"sonnet\",\"x\":[1.50]}},{\"params\":{\"max_tokens\":7,\"model\":\"opus\"},\"custom_\\u0069d\":\"b\"}," +
		"{\"custom_id\":\"c\",\"params\":{\"thinking\":{\"budget_tokens\":40000},\"max_tokens\":50000,\"model\":\"opus\"}} ] }\n"
	if a := r.do(t.Context(), "POST", batchesPath+"?beta=true", token, body, "Anthropic-Workspace-Id", "wrkspc_2", "Anthropic-Beta", "b"); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	want := strings.Replace(strings.Replace(body, "64000", "32000", 1), "50000", "40001", 1)
	if got := r.up.last(); got.query != "beta=true" || got.path != batchesPath || got.header.Get("Anthropic-Beta") != "b" || got.header.Get("Anthropic-Workspace-Id") != "" {
		t.Errorf("%+v", got)
	} else if diff := cmp.Diff(want, string(got.body)); diff != "" {
		t.Error(diff)
	}
}

// A reading that broke off settles nothing, and neither does one that is not
// understood: the batch stays reserved until somebody has read it whole.
func TestOnlyAWholeReadingSettlesABatch(t *testing.T) {
	for _, fault := range []string{"cut", "short", "twice", "type", "usage", "chatter", "packed"} {
		t.Run(fault, func(t *testing.T) {
			r := newRig(t)
			token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
			all := mixed[:3]
			id := r.makeBatch(token, all...)
			r.up.end()
			r.up.set(func(b *batchesUpstream) { b.reading = fault })
			if a := r.readBatch(token, id); a.status != 200 || (a.err != nil) != (fault == "cut") {
				t.Errorf("%+v", a)
			}
			r.idle("r")
			if got := r.usage("r", 1); got.Pending != reservedFor(all...) || got.Cost != got.Pending {
				t.Errorf("%+v", got)
			}
			r.up.set(func(b *batchesUpstream) { b.reading = "" })
			r.readBatch(token, id)
			if got := r.usage("r", 1); got.Cost != r.up.billed() || got.Pending != 0 {
				t.Errorf("%+v", got)
			}
			r.agree("r")
		})
	}
}

func TestBatchesOfOthersAreNotThere(t *testing.T) {
	r := newRig(t)
	mine, other, elsewhere := r.grant(Account{Run: "r", Fork: 1}), r.grant(Account{Run: "r", Fork: 2}), r.grant(Account{Run: "s", Fork: 1})
	id := r.makeBatch(mine, mixed[0])
	deleted := r.makeBatch(mine, mixed[0])
	r.up.end()
	if a := r.do(t.Context(), "DELETE", batchesPath+"/"+deleted, mine, ""); a.status != 200 {
		t.Fatalf("%+v", a)
	}
	before := r.up.count()
	for _, c := range []struct{ token, id string }{{other, id}, {elsewhere, id}, {mine, "msgbatch_9999"}, {mine, deleted}} {
		for _, deed := range []struct{ method, path string }{{"GET", ""}, {"GET", "/results"}, {"POST", "/cancel"}, {"DELETE", ""}} {
			a := r.do(t.Context(), deed.method, batchesPath+"/"+c.id+deed.path, c.token, "")
			if a.status != 404 || a.body != `{"error":{"message":"There is no such message batch.","type":"not_found_error"},"type":"error"}` {
				t.Errorf("%s %s%s: %+v", deed.method, c.id, deed.path, a)
			}
		}
	}
	for _, token := range []string{other, elsewhere} {
		if a := r.get(token, ""); a.status != 200 || a.body != `{"data":[],"has_more":false,"first_id":null,"last_id":null}` {
			t.Errorf("%+v", a)
		}
		if a := r.get(token, "?after_id="+id); a.status != 400 || a.kind() != "invalid_request_error" {
			t.Errorf("%+v", a)
		}
	}
	if r.up.count() != before {
		t.Error("the API was asked")
	}
	if a := r.get(mine, "/"+id); a.status != 200 || !strings.Contains(a.body, id) {
		t.Errorf("%+v", a)
	}
}

func TestTheListIsTheForksOwnPageByPage(t *testing.T) {
	r := newRig(t)
	token, other := r.grant(Account{Run: "r", Fork: 1}), r.grant(Account{Run: "r", Fork: 2})
	var ids []string // the newest first
	for n := range 25 {
		ids = append([]string{r.makeBatch(token, mixed[0])}, ids...)
		if n%5 == 0 {
			r.makeBatch(other, mixed[0])
		}
	}
	rows, err := r.ledger.Batches(t.Context(), "r", 1)
	if err != nil || len(rows) != 25 {
		t.Fatal(len(rows), err)
	}
	ids = nil // those of one millisecond have the order of their names
	for _, b := range rows {
		ids = append(ids, b.ID)
	}
	type page struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
		More  bool   `json:"has_more"`
		First string `json:"first_id"`
		Last  string `json:"last_id"`
	}
	for query, want := range map[string]struct {
		ids  []string
		more bool
	}{
		"":                                    {ids[:20], true},
		"?limit=1000":                         {ids[:20], true},
		"?limit=2&beta=true":                  {ids[:2], true},
		"?limit=20&after_id=" + ids[19]:       {ids[20:], false},
		"?limit=3&after_id=" + ids[4]:         {ids[5:8], true},
		"?limit=3&before_id=" + ids[4]:        {ids[1:4], true},
		"?limit=5&before_id=" + ids[4]:        {ids[:4], false},
		"?after_id=" + ids[24]:                {nil, false},
		"?limit=4&before_id=" + ids[4] + "&x": {ids[:4], false},
	} {
		a := r.get(token, query)
		var got page
		if err := json.Unmarshal([]byte(a.body), &got); err != nil || a.status != 200 || len(got.Data) != len(want.ids) || got.More != want.more {
			t.Errorf("%s: %v %+v", query, err, a)
			continue
		}
		for i, b := range got.Data {
			if b.ID != want.ids[i] {
				t.Errorf("%s: %d is %s, want %s", query, i, b.ID, want.ids[i])
			}
		}
		if n := len(want.ids); n > 0 && (got.First != want.ids[0] || got.Last != want.ids[n-1]) {
			t.Errorf("%s: from %s to %s", query, got.First, got.Last)
		}
	}
	for _, query := range []string{"?limit=0", "?limit=x", "?after_id=nothing", "?before_id=nothing", "?after_id=" + ids[0] + "&before_id=" + ids[1]} {
		if a := r.get(token, query); a.status != 400 {
			t.Errorf("%s: %+v", query, a)
		}
	}
	if q := r.up.last(); q.query != "" && q.query != "beta=true" && q.query != "x=" {
		t.Errorf("the API was told %q", q.query)
	}
}

// Clients follow results_url: it leads to the gateway, as its caller sees it.
func TestResultsAreFoundAtTheGateway(t *testing.T) {
	r := newRig(t, func(o *Options) { o.NetURL = "https://gateway.example.com/" })
	token := r.grant(Account{Run: "r", Fork: 1})
	id := r.makeBatch(token, mixed[0])
	if a := r.get(token, "/"+id); !strings.Contains(a.body, `"results_url" : null,`) {
		t.Errorf("%+v", a)
	}
	r.up.end()
	a := r.get(token, "/"+id)
	r.up.mu.Lock()
	want := strings.Replace(r.up.object(r.up.batches.list[0]), r.up.URL, r.url, 1)
	r.up.mu.Unlock()
	if diff := cmp.Diff(want, a.body); diff != "" {
		t.Error(diff)
	}
	var b struct {
		URL string `json:"results_url"`
	}
	if err := json.Unmarshal([]byte(a.body), &b); err != nil {
		t.Fatal(err)
	}
	if a := r.do(t.Context(), "GET", strings.TrimPrefix(b.URL, r.url), token, ""); a.status != 200 || !strings.Contains(a.body, succeeded) {
		t.Errorf("%+v", a)
	}
	url, client := r.serveNet()
	far, err := r.GrantFor(t.Context(), Account{Run: "r", Fork: 1}, ByNet)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", url+batchesPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Api-Key", far)
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var list struct {
		Data []struct {
			URL string `json:"results_url"`
		} `json:"data"`
	}
	if err := json.NewDecoder(res.Body).Decode(&list); err != nil || len(list.Data) != 1 || list.Data[0].URL != "https://gateway.example.com"+batchesPath+"/"+id+"/results" {
		t.Errorf("%+v %v", list, err)
	}
}

func TestBatchThatCannotBeIsRefused(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	one := func(params string) string { return `{"requests":[{"custom_id":"a","params":` + params + `}]}` }
	const ok = `{"model":"sonnet","max_tokens":5}`
	many := `{"requests":[` + strings.Repeat(`{"custom_id":"`+strings.Repeat("x", 5)+`","params":{}},`, 3) + `]}`
	models := make([]message, maxBatchModels+1)
	for i := range models {
		models[i] = message{model: fmt.Sprintf("claude-sonnet-5-5-2026%04d", i), max: 1}
	}
	for name, c := range map[string]struct {
		body   string
		status int
		says   string
	}{
		"no JSON":             {`requests`, 400, "not one JSON object"},
		"an array":            {`[]`, 400, "not one JSON object"},
		"more than an object": {one(ok) + `{}`, 400, "not one JSON object"},
		"no requests":         {`{}`, 400, "has no requests"},
		"none of them":        {`{"requests":[]}`, 400, "has no requests"},
		"requests no list":    {`{"requests":{}}`, 400, "not one JSON object"},
		"requests twice":      {`{"requests":[],"requests":[]}`, 400, "twice"},
		"something unknown":   {`{"requests":[{"custom_id":"a","params":` + ok + `}],"speed":"fast"}`, 400, "does not know"},
		"unknown in one":      {`{"requests":[{"custom_id":"a","params":` + ok + `,"priority":1}]}`, 400, "request 1: it has"},
		"no custom_id":        {`{"requests":[{"params":` + ok + `}]}`, 400, "no custom_id"},
		"an odd custom_id":    {`{"requests":[{"custom_id":"a b","params":` + ok + `}]}`, 400, "letters, digits"},
		"a long custom_id":    {`{"requests":[{"custom_id":"` + strings.Repeat("a", 65) + `","params":` + ok + `}]}`, 400, "letters, digits"},
		"a number":            {`{"requests":[{"custom_id":1,"params":` + ok + `}]}`, 400, "no string"},
		"custom_id again":     {`{"requests":[{"custom_id":"a","params":` + ok + `},{"params":` + ok + `,"custom_id":"\u0061"}]}`, 400, "request 2: the custom_id"},
		"no params":           {`{"requests":[{"custom_id":"a"}]}`, 400, "no params"},
		"params twice":        {`{"requests":[{"custom_id":"a","params":` + ok + `,"params":` + ok + `}]}`, 400, "twice"},
		"params a list":       {one(`[]`), 400, "params are no object"},
		"no max_tokens":       {one(`{"model":"sonnet"}`), 400, "no max_tokens"},
		"max_tokens twice":    {one(`{"model":"sonnet","max_tokens":5,"max_tokens":500}`), 400, "twice"},
		"no more models":      {batchOf(append(models, message{model: "x", max: 1})...), 404, "no price"},
		"unknown model":       {one(`{"model":"claude-opus-99","max_tokens":5}`), 404, "Request 1 of the batch: The model"},
		"unknown fallback":    {one(`{"model":"sonnet","max_tokens":5,"fallbacks":[{"model":"gpt-0"}]}`), 404, "no price"},
		"fast mode":           {one(`{"model":"sonnet","max_tokens":5,"speed":"fast"}`), 403, "Fast mode"},
		"a place":             {one(`{"model":"sonnet","max_tokens":5,"inference_geo":"us"}`), 403, "chosen place"},
		"an endless tool":     {one(`{"model":"sonnet","max_tokens":5,"tools":[{"type":"web_search_20260209","name":"s"}]}`), 403, "no max_uses"},
		"servers":             {one(`{"model":"sonnet","max_tokens":5,"mcp_servers":[{"url":"https://x"}]}`), 403, "no max_uses"},
		"beyond the budget":   {one(`{"model":"opus","max_tokens":5,"fallbacks":[{"model":"claude-opus-4-1"}],"x":"` + strings.Repeat("x", 150_000) + `"}`), 402, "The budget of run r does not cover this call: $1.0000 of $1.0000 is left, and the call may cost $1."},
		"many bad ones":       {many, 400, "request 1: it has no max_tokens"},
	} {
		a := r.do(t.Context(), "POST", batchesPath, token, c.body)
		if a.status != c.status || !strings.Contains(a.body, c.says) || a.kind() == "?" || a.header.Get("X-Should-Retry") != "false" {
			t.Errorf("%s: %+v, want %d %q", name, a, c.status, c.says)
		}
	}
	if a := r.do(t.Context(), "POST", "/v1/batches", token, `{"input_file_id":"f"}`); a.status != 404 || !strings.Contains(a.body, "a batch of OpenAI's API is a file that was sent before") {
		t.Errorf("%+v", a)
	}
	r.limits.body = 1000
	if a := r.do(t.Context(), "POST", batchesPath, token, one(`"`+strings.Repeat("x", 1000)+`"`)); a.status != 413 || a.kind() != "request_too_large" {
		t.Errorf("%+v", a)
	}
	for _, path := range []string{"/..", "/a/b", "/a%2fb", "/" + strings.Repeat("a", 129), "/a/results/", "/a/cancel/x", "/a.b", "/"} {
		if a := r.get(token, path); a.status != 404 || !strings.Contains(a.body, "does not pass") {
			t.Errorf("%s: %+v", path, a)
		}
	}
	if r.up.count() != 0 {
		t.Error("something was passed on")
	}
	if got := r.usage("r", 0); got.Cost != 0 || got.Refused != 1 {
		t.Errorf("%+v", got)
	}
}

func TestABatchHasABoundNumberOfModelsAndRequests(t *testing.T) {
	r := newRig(t, func(o *Options) { o.AllowUnpriced = true })
	token := r.grant(Account{Run: "r", Fork: 1})
	var all []message
	for i := range maxBatchModels {
		all = append(all, message{model: fmt.Sprint("made-up-", i), max: 1, script: script{Out: 1}})
	}
	id := r.makeBatch(token, all...)
	r.up.end()
	r.readBatch(token, id)
	if got := r.usage("r", 1); got.Cost != r.up.billed() || got.Calls != maxBatchModels {
		t.Errorf("%+v, billed %s", got, r.up.billed())
	}
	if a := r.do(t.Context(), "POST", batchesPath, token, batchOf(append(all, message{model: "one more", max: 1})...)); a.status != 400 || !strings.Contains(a.body, "64 models") {
		t.Errorf("%+v", a)
	}
	var body strings.Builder
	body.WriteString(`{"requests":[`)
	for i := range maxBatch + 1 {
		if i > 0 {
			body.WriteByte(',')
		}
		fmt.Fprintf(&body, `{"custom_id":"%d","params":{"max_tokens":1}}`, i)
	}
	if _, err := readBatch([]byte(body.String() + "]}")); err == nil || !strings.Contains(err.Error(), "more than 100000") {
		t.Error(err)
	}
}

func TestBatchWaitsForWhatOthersHold(t *testing.T) {
	r := newRig(t)
	all := []message{{max: 20_000, script: script{Out: 10}}, {max: 20_000, script: script{Out: 10}}}
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: reservedFor(all...) * 3 / 2})
	first := r.makeBatch(token, all...)
	second := make(chan answer, 1)
	go func() { second <- r.do(t.Context(), http.MethodPost, batchesPath, token, batchOf(all...)) }()
	until(t, "the second waits", func() bool { return r.ledger.Waiting() == 1 })
	r.up.end()
	r.readBatch(token, first)
	if a := <-second; a.status != 200 {
		t.Errorf("%+v", a)
	}
	// A call waits for a batch in the same way.
	r.limits.wait = 10 * time.Millisecond
	if a := r.send(token, message{max: 4000, pad: 60_000, script: script{Out: 1}}); a.status != 429 {
		t.Errorf("%+v", a)
	}
}

// A batch that may have been made costs its reservation, whoever cut it off; what
// certainly was not made costs nothing.
func TestUncertainBatchIsChargedAtItsReservation(t *testing.T) {
	whole, all := reservedFor(mixed...), mixed
	for _, c := range []struct {
		making string
		status int
		cost   fork.USD
	}{
		{"cut", 502, whole},
		{"unmade", 502, whole},
		{"500", 500, whole},
		{"garbage", 502, whole},
		{"400", 400, 0},
		{"529", 529, 0},
	} {
		t.Run(c.making, func(t *testing.T) {
			r := newRig(t)
			r.limits.wait = 100 * time.Millisecond
			token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 2 * fork.Dollar})
			r.up.set(func(b *batchesUpstream) { b.making = c.making })
			if a := r.do(t.Context(), "POST", batchesPath, token, batchOf(all...)); a.status != c.status {
				t.Errorf("%+v", a)
			}
			if got := r.usage("r", 1); got.Cost != c.cost || got.Pending != 0 || got.Calls != 3 {
				t.Errorf("%+v, want %s", got, c.cost)
			}
			r.up.end()
			if got := r.usage("r", 1); r.up.billed() > got.Cost {
				t.Errorf("%s is billed, %+v", r.up.billed(), got)
			}
			r.agree("r")
		})
	}
}

// The API's name for a batch belongs to one fork: a second one of that name is
// not taken, and what was made is cancelled.
func TestABatchIsNotTakenTwice(t *testing.T) {
	r := newRig(t)
	token, other := r.grant(Account{Run: "r", Fork: 1}), r.grant(Account{Run: "r", Fork: 2})
	id := r.makeBatch(token, mixed[0])
	r.up.set(func(b *batchesUpstream) { b.making = "same id" })
	if a := r.do(t.Context(), "POST", batchesPath, other, batchOf(mixed[1])); a.status != 503 {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r", 2); got.Cost != reservedFor(mixed[1]) || got.Pending != 0 {
		t.Errorf("%+v", got)
	}
	if a := r.get(other, "/"+id); a.status != 404 {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r", 1); got.Pending != reservedFor(mixed[0]) {
		t.Errorf("%+v", got)
	}
}

// A batch outlives its gateway: the next one finds it and settles it by its
// results, without anybody asking.
func TestABatchOutlivesItsGateway(t *testing.T) {
	dir, up := t.TempDir(), newUpstream(t)
	url, token, kill := startChild(t, dir, up.URL)
	child := &rig{t: t, url: url}
	all := mixed[:3]
	id := child.makeBatch(token, all...)
	hung := message{max: 9000, script: script{Fault: "gate", Out: 10}}
	cut := make(chan answer, 1)
	go func() { cut <- child.send(token, hung) }()
	until(t, "a call is upstream too", func() bool { return up.count() == 2 })
	kill()
	<-cut
	until(t, "the API has billed what was cut", func() bool { return up.billed() > 0 })
	others := up.billed()
	q, err := readRequest([]byte(hung.body()))
	if err != nil {
		t.Fatal(err)
	}
	crashed := testPrices.estimate(q, defaultMaxOutput, -1).Cost(9000)

	var ahead time.Duration
	gauge := newSeenCalls()
	r := openRig(t, dir, up, later(&ahead), func(o *Options) { o.Observer = gauge.observer() })
	until(t, "the gateway has looked", func() bool { return up.count() >= 3 })
	if got := r.usage("r", 1); got.Cost != crashed+reservedFor(all...) || got.Pending != reservedFor(all...) || got.Calls != 1 {
		t.Errorf("%+v", got)
	}
	if a := r.get(token, "/"+id); a.status != 200 {
		t.Errorf("%+v", a)
	}
	up.end()
	r.sweep(t.Context()) // not yet
	if got := r.usage("r", 1); got.Pending == 0 {
		t.Errorf("it was looked at again at once: %+v", got)
	}
	ahead = 2 * time.Minute
	r.sweep(t.Context())
	if got := r.usage("r", 1); got.Cost != crashed+up.billed()-others || got.Pending != 0 || got.Calls != 3 {
		t.Errorf("%+v, billed %s", got, up.billed())
	}
	if n := gauge.left(); n != 0 {
		t.Errorf("the observer was told that %s is held", n)
	}
	r.agree("r")
}

// When a fork ends, nobody reads what its batches come to: they are cancelled,
// and its cost has what was done by then.
func TestTheEndOfAForkCancelsItsBatches(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	early := message{max: 100, script: script{Out: 40, Fault: "early"}}
	r.makeBatch(token, early, mixed[0])
	r.makeBatch(token, mixed[1])
	r.settle("r", 1)
	got := r.usage("r", 1)
	if got.Cost != r.up.billed() || got.Cost == 0 || got.Pending != 0 || got.OutputTokens != 40 || got.Calls != 3-1 {
		t.Errorf("%+v, billed %s", got, r.up.billed())
	}
	var failed int
	if err := r.read(`SELECT COUNT(*) FROM calls WHERE state = 'failed' AND cost = 0 AND note = 'a batch: 1 canceled'`).Scan(&failed); err != nil || failed != 1 {
		t.Errorf("%d, %v", failed, err)
	}
	r.agree("r")
}

// A batch that takes long to end is in the fork's last account at the most that
// it can cost, and in the books at what it did cost when that is known.
func TestTheLastAccountOfAForkIsNeverTooLow(t *testing.T) {
	var ahead time.Duration
	r := newRig(t, later(&ahead))
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	r.up.set(func(b *batchesUpstream) { b.slow = true })
	early := message{max: 100, script: script{Out: 40, Fault: "early"}}
	r.makeBatch(token, early, mixed[1])
	r.settle("r", 1)
	last := r.usage("r", 1)
	if want := reservedFor(early, mixed[1]); last.Cost != want || last.Pending != want {
		t.Errorf("%+v, want %s", last, want)
	}
	r.up.end()
	ahead = time.Hour
	r.sweep(t.Context())
	if got := r.usage("r", 1); got.Cost != r.up.billed() || got.Cost == 0 || got.Cost >= last.Cost || got.Pending != 0 {
		t.Errorf("%+v, billed %s", got, r.up.billed())
	}
	r.agree("r")
}

// What a fork has left when its gateway died before its end is cancelled by the
// next one, when the fork's token is gone.
func TestOrphanedBatchesAreCancelled(t *testing.T) {
	var ahead time.Duration
	r := newRig(t, later(&ahead))
	token := r.grant(Account{Run: "r", Fork: 1})
	r.makeBatch(token, mixed[0])
	ahead = time.Hour
	r.sweep(t.Context())
	if got := r.usage("r", 1); got.Pending == 0 || r.up.last().method != "GET" {
		t.Errorf("one that is wanted: %+v", got)
	}
	if err := r.Revoke(t.Context(), "r", 1); err != nil {
		t.Fatal(err)
	}
	ahead = 3 * time.Hour
	r.sweep(t.Context())
	if got := r.usage("r", 1); got.Pending != 0 || got.Cost != 0 || got.Calls != 1 {
		t.Errorf("%+v", got)
	}
}

func TestWhatABatchDidCostIsItsReservationWhenNobodyKnows(t *testing.T) {
	for name, c := range map[string]struct {
		trouble func(*batchesUpstream)
		soon    time.Duration // when it is not given up yet
		late    time.Duration // when it is
		says    string
	}{
		"the API forgot it": {func(b *batchesUpstream) { b.list[0].deleted = true }, 20 * time.Hour, 26 * time.Hour, "does not know it"},
		"it never ends":     {func(b *batchesUpstream) { b.list[0].status = "in_progress" }, 28 * 24 * time.Hour, 30 * 24 * time.Hour, "not kept"},
		"no results":        {func(b *batchesUpstream) { b.reading = "gone" }, 20 * time.Hour, 26 * time.Hour, "does not know it"},
		"too few results":   {func(b *batchesUpstream) { b.reading = "short" }, 28 * 24 * time.Hour, 30 * 24 * time.Hour, "not kept"},
		"no usage":          {func(b *batchesUpstream) { b.reading = "usage" }, -1, time.Hour, "cannot be read"},
		"an unknown type":   {func(b *batchesUpstream) { b.reading = "type" }, -1, time.Hour, "cannot be read"},
		"one came twice":    {func(b *batchesUpstream) { b.reading = "twice" }, -1, time.Hour, "cannot be read"},
	} {
		t.Run(name, func(t *testing.T) {
			var ahead time.Duration
			r := newRig(t, later(&ahead))
			token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
			all := mixed[:3]
			r.makeBatch(token, all...)
			r.up.end()
			r.up.set(c.trouble)
			if c.soon >= 0 {
				ahead = c.soon
				r.sweep(t.Context())
				if got := r.usage("r", 1); got.Pending != reservedFor(all...) {
					t.Errorf("it was given up: %+v", got)
				}
			}
			ahead = c.late
			r.sweep(t.Context())
			got := r.usage("r", 1)
			if got.Cost != reservedFor(all...) || got.Pending != 0 || got.Cost < r.up.billed() {
				t.Errorf("%+v", got)
			}
			var marked int
			if err := r.read(`SELECT COUNT(*) FROM calls WHERE state = 'failed' AND cost = reserved AND note LIKE ?`, "%"+c.says+"%: charged at its reservation").Scan(&marked); err != nil || marked != got.Calls {
				t.Errorf("%d of %d are marked, %v", marked, got.Calls, err)
			}
			r.agree("r")
		})
	}
}

// With a batch its agent deletes what says what it did cost, so that is read
// before.
func TestADeletedBatchIsPaid(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	remove := func(id string) answer { return r.do(t.Context(), "DELETE", batchesPath+"/"+id, token, "") }
	id := r.makeBatch(token, mixed[:3]...)
	if a := remove(id); a.status != 400 || !strings.Contains(a.body, "cancel it first") {
		t.Errorf("%+v", a)
	}
	r.up.end()
	r.up.set(func(b *batchesUpstream) { b.reading = "short" })
	if a := remove(id); a.status != 503 {
		t.Errorf("%+v", a)
	}
	r.up.set(func(b *batchesUpstream) { b.reading = "" })
	if a := remove(id); a.status != 200 || !strings.Contains(a.body, "message_batch_deleted") {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r", 1); got.Cost != r.up.billed() || got.Cost == 0 || got.Pending != 0 {
		t.Errorf("%+v", got)
	}
	if a := remove(id); a.status != 404 {
		t.Errorf("%+v", a)
	}
}

func TestACancelledBatchCostsWhatWasDone(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	id := r.makeBatch(token, message{max: 100, script: script{Out: 40, Fault: "early"}}, mixed[0])
	if a := r.do(t.Context(), "POST", batchesPath+"/"+id+"/cancel?beta=true", token, "", "Content-Type", ""); a.status != 200 || !strings.Contains(a.body, `"ended"`) {
		t.Errorf("%+v", a)
	}
	if q := r.up.last(); len(q.body) != 0 || q.query != "beta=true" {
		t.Errorf("%+v", q)
	}
	r.readBatch(token, id)
	if got := r.usage("r", 1); got.Cost != r.up.billed() || got.Cost == 0 {
		t.Errorf("%+v", got)
	}
}

// What the API says of tokens with a batch is not about those of calls: they do
// not wait for it.
func TestBatchesDoNotSlowCallsDown(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1})
	start := time.Now()
	for range 3 {
		id := r.makeBatch(token, mixed[1])
		r.get(token, "/"+id)
		if a := r.send(token, message{model: "claude-opus-5-5", max: 10, script: script{Out: 1}}); a.status != 200 {
			t.Errorf("%+v", a)
		}
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	if s := r.governor.Stats(); s.Calls != 9 {
		t.Errorf("%d calls went at the pace of the fleet", s.Calls)
	}
}

func TestModelThatNobodyAskedForCountsAsTheDearestOfABatch(t *testing.T) {
	for answered, as := range map[string]string{"claude-opus-4-1": "claude-opus-4-1", "claude-haiku-5-5": "claude-opus-5-5", "nobody-knows": "claude-opus-5-5"} {
		r := newRig(t)
		token := r.grant(Account{Run: "r", Fork: 1})
		id := r.makeBatch(token, message{max: 1000, script: script{Out: 500, Model: answered}}, mixed[1])
		r.up.end()
		r.readBatch(token, id)
		got := r.usage("r", 1)
		first := r.up.batches.list[0].requests
		want := testPrices.BatchCost(as, first[0].tokens()) + testPrices.BatchCost("claude-opus-5-5", first[1].tokens())
		if got.Cost != want {
			t.Errorf("%s: %s, want %s", answered, got.Cost, want)
		}
	}
}

// A batch that one gateway made is settled by another, once.
func TestGatewaysShareBatches(t *testing.T) {
	up, url := newUpstream(t), ledgertest.Postgres(t)
	var ahead time.Duration
	gauge := newSeenCalls()
	shared := func(o *Options) { o.Ledger.URL = url }
	a := openRig(t, t.TempDir(), up, shared, later(&ahead), func(o *Options) { o.Observer = gauge.observer() })
	b := openRig(t, t.TempDir(), up, shared, later(&ahead))
	token := a.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	id := a.makeBatch(token, mixed[:3]...)
	if got := b.usage("r", 1); got.Pending != reservedFor(mixed[:3]...) {
		t.Errorf("%+v", got)
	}
	up.end()
	var reads sync.WaitGroup
	for _, r := range []*rig{a, b, a, b} {
		reads.Go(func() {
			if got := r.readBatch(token, id); got.status != 200 {
				t.Errorf("%+v", got)
			}
		})
	}
	ahead = time.Hour
	for _, r := range []*rig{a, b} {
		reads.Go(func() { r.sweep(context.Background()) })
	}
	reads.Wait()
	a.sweep(t.Context())
	for _, r := range []*rig{a, b} {
		if got := r.usage("r", 1); got.Cost != up.billed() || got.Pending != 0 || got.Calls != 2 {
			t.Errorf("%+v, billed %s", got, up.billed())
		}
	}
	if n := gauge.left(); n != 0 {
		t.Errorf("the observer was told that %s is held", n)
	}
	b.makeBatch(token, mixed[0])
	a.settle("r", 1)
	if got := b.usage("r", 1); got.Cost != up.billed() || got.Pending != 0 {
		t.Errorf("%+v", got)
	}
	if err := a.ledger.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// The clamp and the estimate hold for whatever a batch is made of: no answer that
// the API may give costs more than was reserved.
func TestNoBatchCostsMoreThanItsReservation(t *testing.T) {
	list, err := readBatch([]byte(batchOf(mixed...)))
	if err != nil {
		t.Fatal(err)
	}
	parts := testPrices.parts(list, defaultMaxOutput)
	var reserved, most fork.USD
	for _, p := range parts {
		reserved += p.Most
	}
	for _, q := range list {
		// Every byte a token that is written to the cache, and all the output.
		most += testPrices.BatchCost(q.model, Tokens{CacheWrite5m: int64(q.body) + overhead, Output: q.want(defaultMaxOutput)})
	}
	if len(parts) != 3 || most > reserved || most < reserved*9/10 {
		t.Errorf("%d parts, %s reserved, %s at most", len(parts), reserved, most)
	}
}

func FuzzReadBatch(f *testing.F) {
	f.Add([]byte(batchOf(mixed[1], mixed[5])))
	f.Add([]byte(`{"requests":[{"custom_id":"a","params":{"model":"m","max_tokens":1e3}},]}`))
	f.Add([]byte(`{"requests":[{"params":{"max_tokens":64000},"custom_id":"\u0061"}]} `))
	f.Fuzz(func(t *testing.T, body []byte) {
		all, err := readBatch(body)
		if err != nil {
			return
		}
		var standard struct {
			Requests []struct {
				ID     string                     `json:"custom_id"`
				Params map[string]json.RawMessage `json:"params"` // of a struct it takes keys in any case
			} `json:"requests"`
		}
		if json.Unmarshal(body, &standard) != nil {
			return // lax about what upstream refuses
		}
		// What the standard library reads is what was read here.
		if len(standard.Requests) != len(all) {
			t.Fatalf("%d requests, standard %d: %s", len(all), len(standard.Requests), body)
		}
		for i, q := range standard.Requests {
			var model string
			if raw, ok := q.Params["model"]; ok && json.Unmarshal(raw, &model) != nil {
				continue
			}
			if q.ID != all[i].id || model != all[i].model || string(q.Params["max_tokens"]) != strconv.FormatInt(all[i].maxTokens, 10) {
				t.Fatalf("%+v, standard %+v: %s", all[i], q, body)
			}
		}
		clamped := clampBatch(body, all, 10)
		again, err := readBatch(clamped)
		if err != nil || len(again) != len(all) {
			t.Fatalf("%d requests became %d, %v: %q", len(all), len(again), err, clamped)
		}
		seen := map[string]bool{}
		for i, q := range again {
			if seen[q.id] || q.id != all[i].id || q.model != all[i].model || q.maxTokens > all[i].maxTokens || q.maxTokens > 10 && q.maxTokens > q.thinking+1 {
				t.Fatalf("%+v became %+v", all[i], q)
			}
			seen[q.id] = true
		}
		for _, p := range testPrices.parts(all, 32000) {
			if p.Most < 0 {
				t.Fatalf("%+v", p)
			}
		}
	})
}

func FuzzResults(f *testing.F) {
	f.Add([]byte(`{"custom_id":"a","result":{"type":"succeeded","message":{"model":"sonnet","usage":{"input_tokens":3,"output_tokens":4}}}}`+"\n"+`{"custom_id":"b","result":{"type":"expired"}}`), 7)
	f.Add([]byte("\n\r\n{}\n"), 1)
	f.Fuzz(func(t *testing.T, text []byte, at int) {
		b := &ledger.Batch{Requests: 2, Calls: make([]*ledger.Call, 2)}
		for i := range b.Calls {
			b.Calls[i] = new(ledger.Call)
		}
		one, two := newResults(testPrices, b), newResults(testPrices, b)
		one.Write(text)
		one.close()
		at = min(max(at, 0), len(text))
		two.Write(text[:at])
		two.Write(text[at:])
		two.close()
		if one.whole() != two.whole() || one.broken != two.broken {
			t.Fatalf("cut at %d: %v %q, %v %q", at, one.whole(), one.broken, two.whole(), two.broken)
		}
		if !one.whole() {
			return
		}
		s, again := one.settlements(), two.settlements()
		if diff := cmp.Diff(s[0].Cost, again[0].Cost); diff != "" || len(one.seen) != 2 {
			t.Fatal(diff)
		}
		for _, c := range s {
			if c.Cost < 0 || c.Tokens.Input < 0 || c.Tokens.Output < 0 {
				t.Fatalf("%+v", c)
			}
		}
	})
}

// A batch that was reserved with other prices than it is settled with costs no
// more than was there for it.
func TestDearerPricesDoNotOverspendABatch(t *testing.T) {
	dir, up := t.TempDir(), newUpstream(t)
	m := message{max: 1000, script: script{Out: 1000}}
	var id, token string
	t.Run("made", func(t *testing.T) {
		r := openRig(t, dir, up)
		token = r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
		id = r.makeBatch(token, m)
	})
	dearer, err := LoadPrices(strings.NewReader(`{"version": "dearer", "batch": "1", "models": {
		"claude-sonnet-5-5": {"input": "20", "cache_write_5m": "25", "cache_write_1h": "40", "cache_read": "1", "output": "100"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	r := openRig(t, dir, up, func(o *Options) { o.Prices = dearer })
	up.end()
	r.readBatch(token, id)
	if got := r.usage("r", 1); got.Cost != reservedFor(m) || got.Pending != 0 || got.OutputTokens != 1000 {
		t.Errorf("%+v, want %s", got, reservedFor(m))
	}
	var note string
	if err := r.read(`SELECT note FROM calls WHERE cost = reserved`).Scan(&note); err != nil || !strings.Contains(note, "at no more than was reserved") {
		t.Errorf("%q %v", note, err)
	}
}

// An agent that goes away while its batch is being made has made it.
func TestABatchIsMadeAlsoWhenItsAgentLeaves(t *testing.T) {
	r := newRig(t)
	r.limits.drain = time.Millisecond
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	r.up.set(func(b *batchesUpstream) { b.making = "gate" })
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan answer, 1)
	go func() { left <- r.do(ctx, http.MethodPost, batchesPath, token, batchOf(mixed[0])) }()
	until(t, "the batch is being made", func() bool { return r.up.count() == 1 })
	leave()
	if a := <-left; a.err == nil {
		t.Errorf("%+v", a)
	}
	close(r.up.gate)
	r.idle("r")
	if got := r.usage("r", 1); got.Pending != reservedFor(mixed[0]) || got.Calls != 0 {
		t.Errorf("%+v", got)
	}
	if a := r.get(token, ""); !strings.Contains(a.body, "msgbatch_0001") {
		t.Errorf("%+v", a)
	}
	r.settle("r", 1)
	r.agree("r")
}

func TestABatchIsHeldUntilThereIsMoney(t *testing.T) {
	r := newRig(t)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: reservedFor(mixed...) - 1, Pause: true})
	made := make(chan answer, 1)
	go func() { made <- r.do(t.Context(), http.MethodPost, batchesPath, token, batchOf(mixed...)) }()
	until(t, "the batch is held", func() bool { return r.usage("r", 1).Held != "" })
	if err := r.SetBudget(t.Context(), "r", 0, reservedFor(mixed...)); err != nil {
		t.Fatal(err)
	}
	if a := <-made; a.status != 200 {
		t.Errorf("%+v", a)
	}
	if got := r.usage("r", 1); got.Held != "" || got.Pending != reservedFor(mixed...) || got.Refused != 0 {
		t.Errorf("%+v", got)
	}
}
