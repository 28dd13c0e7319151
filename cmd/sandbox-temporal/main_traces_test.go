package main

import (
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/proto"
)

// A collector is a place for traces, over http/protobuf. It keeps all that it
// was sent.
type collector struct {
	mu     sync.Mutex
	bodies [][]byte
	spans  []span
	bad    error
}

// span is what the checks look at.
type span struct {
	trace, id, parent string
	service, name     string
	attributes        map[string]string
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.take(r); err != nil {
		c.bad = errors.Join(c.bad, fmt.Errorf("%s %s: %w", r.Method, r.URL.Path, err))
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

func (c *collector) take(r *http.Request) error {
	if r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		return fmt.Errorf("it sends %s", r.Header.Get("Content-Type"))
	}
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		unpacked, err := gzip.NewReader(body)
		if err != nil {
			return err
		}
		body = unpacked
	}
	b, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	var in coltrace.ExportTraceServiceRequest
	if err := proto.Unmarshal(b, &in); err != nil {
		return err
	}
	c.bodies = append(c.bodies, b)
	for _, rs := range in.ResourceSpans {
		service := texts(rs.Resource.Attributes)["service.name"]
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				c.spans = append(c.spans, span{
					trace: hex.EncodeToString(s.TraceId), id: hex.EncodeToString(s.SpanId), parent: hex.EncodeToString(s.ParentSpanId),
					service: service, name: s.Name, attributes: texts(s.Attributes),
				})
			}
		}
	}
	return nil
}

// texts are attributes as text.
func texts(attributes []*commonpb.KeyValue) map[string]string {
	m := map[string]string{}
	for _, kv := range attributes {
		switch v := kv.Value.Value.(type) {
		case *commonpb.AnyValue_StringValue:
			m[kv.Key] = v.StringValue
		case *commonpb.AnyValue_IntValue:
			m[kv.Key] = fmt.Sprint(v.IntValue)
		case *commonpb.AnyValue_DoubleValue:
			m[kv.Key] = fmt.Sprint(v.DoubleValue)
		case *commonpb.AnyValue_BoolValue:
			m[kv.Key] = fmt.Sprint(v.BoolValue)
		}
	}
	return m
}

// cmdCollector starts a place for traces and has the session's programs send
// theirs there: collector.
func cmdCollector(ts *testscript.TestScript, _ bool, _ []string) {
	c := &collector{}
	srv := httptest.NewServer(c)
	ts.Defer(srv.Close)
	of(ts).collector = c
	ts.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	ts.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
}

// cmdTraced checks that the run of a report is one trace, from the command
// down to each fork's calls of the model, and that no text is in what was
// sent: traced REPORT.json COMMAND TEXT…
func cmdTraced(ts *testscript.TestScript, _ bool, args []string) {
	var rep struct {
		Run     string `json:"workflow_id"`
		Results []struct {
			Num    int `json:"fork_num"`
			Turns  int `json:"num_turns"`
			Status string
		}
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &rep))
	if len(rep.Results) == 0 {
		ts.Fatalf("%s has no forks", args[0])
	}
	c := of(ts).collector
	c.mu.Lock()
	defer c.mu.Unlock()
	ts.Check(c.bad)
	for _, text := range append(args[2:], of(ts).key) {
		if slices.ContainsFunc(c.bodies, func(b []byte) bool { return bytes.Contains(b, []byte(text)) }) {
			ts.Fatalf("%q was sent to the collector", text)
		}
	}
	byID, err := c.byID()
	ts.Check(err)
	below := func(s span, id string) bool { return leads(byID, s, id) }
	all := func(ok func(span) bool) []span {
		var found []span
		for _, s := range c.spans {
			if ok(s) {
				found = append(found, s)
			}
		}
		return found
	}
	// The run's own start names its trace.
	starts := all(func(s span) bool {
		return strings.HasPrefix(s.name, "StartWorkflow:") && s.attributes["temporalWorkflowID"] == rep.Run
	})
	if len(starts) != 1 {
		ts.Fatalf("%d starts of %s: %v", len(starts), rep.Run, starts)
	}
	trace := all(func(s span) bool { return s.trace == starts[0].trace })
	roots := slices.DeleteFunc(slices.Clone(trace), func(s span) bool { return s.parent != "" })
	if len(roots) != 1 || roots[0].name != args[1] || roots[0].service != "sandbox-temporal-cli" {
		ts.Fatalf("the trace of %s begins with %v", rep.Run, roots)
	}
	for _, s := range trace {
		if s.id != roots[0].id && !below(s, roots[0].id) {
			ts.Fatalf("nothing leads from %q to the command: %+v", s.name, s)
		}
	}
	for _, s := range all(func(s span) bool {
		return s.attributes["sandbox.run"] == rep.Run || strings.HasPrefix(s.attributes["temporalWorkflowID"], rep.Run)
	}) {
		if s.trace != starts[0].trace {
			ts.Fatalf("%s belongs to %s and is in another trace: %+v", s.name, rep.Run, s)
		}
	}
	// However often it was repeated to answer questions.
	if runs := all(func(s span) bool {
		return s.name == "RunWorkflow:SandboxOrchestrationWorkflow" && s.trace == starts[0].trace
	}); len(runs) != 1 {
		ts.Fatalf("the run has %d spans: %v", len(runs), runs)
	}
	for _, r := range rep.Results {
		fork := fmt.Sprintf("%s-fork-%d", rep.Run, r.Num)
		// some returns the spans of the fork below another, of which there must be so many.
		some := func(name string, want int, under string, ok func(span) bool) []span {
			found := slices.DeleteFunc(slices.Clone(trace), func(s span) bool { return s.name != name || !below(s, under) || !ok(s) })
			if len(found) != want {
				ts.Fatalf("fork %d has %d spans %q, not %d, in\n%s", r.Num, len(found), name, want, describe(trace))
			}
			return found
		}
		ofFork := func(s span) bool { return s.attributes["temporalWorkflowID"] == fork }
		mine := func(s span) bool {
			return s.attributes["sandbox.run"] == rep.Run && s.attributes["sandbox.fork"] == fmt.Sprint(r.Num)
		}
		flow := some("RunWorkflow:ForkWorkflow", 1, roots[0].id, ofFork)[0]
		for _, name := range []string{"create_sandbox", "health_check", "run_agent", "collect_result", "cleanup_sandbox"} {
			some("StartActivity:"+name, 1, flow.id, ofFork)
			some("RunActivity:"+name, 1, flow.id, ofFork)
		}
		create := some("RunActivity:create_sandbox", 1, flow.id, ofFork)[0]
		some("create sandbox", 1, create.id, mine)
		work := some("RunActivity:run_agent", 1, flow.id, ofFork)[0]
		if r.Status != "success" {
			continue
		}
		agent := some("invoke_agent mini", 1, work.id, mine)[0]
		has(ts, agent, map[string]string{"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "mini", "gen_ai.request.model": "sonnet", "sandbox.status": "success"})
		some("agent turn", r.Turns, agent.id, func(span) bool { return true })
		chats := slices.DeleteFunc(slices.Clone(trace), func(s span) bool { return !strings.HasPrefix(s.name, "chat ") || !mine(s) })
		if len(chats) != r.Turns || r.Turns == 0 {
			ts.Fatalf("fork %d has %d calls in %d turns", r.Num, len(chats), r.Turns)
		}
		for _, s := range chats {
			if !below(s, agent.id) {
				ts.Fatalf("a call of fork %d is not below its agent: %+v", r.Num, s)
			}
			model := strings.TrimPrefix(s.name, "chat ")
			has(ts, s, map[string]string{"gen_ai.operation.name": "chat", "gen_ai.provider.name": "anthropic", "gen_ai.request.model": model, "gen_ai.response.model": model,
				"http.response.status_code": "200"})
			for _, name := range []string{"gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "sandbox.cost_usd"} {
				if v := s.attributes[name]; v == "" || v == "0" {
					ts.Fatalf("a call of fork %d has %s %q", r.Num, name, v)
				}
			}
		}
	}
	ts.Logf("%d spans in the trace of %s", len(trace), rep.Run)
}

// byID returns the spans by their ids, of which no two may be the same.
func (c *collector) byID() (map[string]span, error) {
	all := map[string]span{}
	for _, s := range c.spans {
		if other, again := all[s.id]; again {
			return nil, fmt.Errorf("two spans are %s: %s and %s", s.id, other.name, s.name)
		}
		all[s.id] = s
	}
	return all, nil
}

// leads says whether the span's parents lead to the one of the id.
func leads(byID map[string]span, s span, id string) bool {
	for n := 0; n < 50 && s.parent != ""; n++ {
		if s.parent == id {
			return true
		}
		up, ok := byID[s.parent]
		if !ok || up.trace != s.trace {
			return false
		}
		s = up
	}
	return false
}

// cmdSpans waits until a span of each name has arrived for the run that a file names, or with
// --connected checks that each leads to the command that began the run: spans
// [--connected] FILE NAME….
func cmdSpans(ts *testscript.TestScript, _ bool, args []string) {
	connected := args[0] == "--connected"
	if connected {
		args = args[1:]
	}
	run := strings.TrimSpace(ts.ReadFile(args[0]))
	c := of(ts).collector
	ts.Check(eventually(30*time.Second, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		byID, err := c.byID()
		if err != nil {
			return err
		}
		for _, name := range args[1:] {
			found := slices.ContainsFunc(c.spans, func(s span) bool {
				of := s.attributes["sandbox.run"] == run || strings.HasPrefix(s.attributes["temporalWorkflowID"], run)
				return s.name == name && of && (!connected || slices.ContainsFunc(c.spans, func(root span) bool {
					return root.parent == "" && root.service == "sandbox-temporal-cli" && leads(byID, s, root.id)
				}))
			})
			if !found {
				return fmt.Errorf("no span %q (connected: %v) in\n%s", name, connected, describe(c.spans))
			}
		}
		return nil
	}))
}

// has checks attributes of a span.
func has(ts *testscript.TestScript, s span, want map[string]string) {
	for name, value := range want {
		if s.attributes[name] != value || value == "" {
			ts.Fatalf("%q has %s %q, not %q: %v", s.name, name, s.attributes[name], value, s.attributes)
		}
	}
}

// describe is a line for each span, for whoever reads why a check failed.
func describe(spans []span) string {
	var b strings.Builder
	for _, s := range spans {
		fmt.Fprintf(&b, "%s < %s %s %v\n", s.id, s.parent, s.name, s.attributes)
	}
	return b.String()
}
