package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with the file name below testdata, or rewrites that.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; -update rewrites it):\n%s", file, diff)
	}
}

// encode writes v as JSON that people can read in a diff.
func encode(t *testing.T, v any) string {
	t.Helper()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// play feeds a whole stream to an agent.
func play(a Agent, stream []byte) (events []Event, sum Summary) {
	var lines Lines
	take := func(line []byte) {
		for _, e := range a.Decode(line) {
			events = append(events, e)
			sum.Add(e)
		}
	}
	lines.Feed(stream, take)
	lines.Flush(take)
	return events, sum
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestClaudeEventsAreUnderstood decodes one recorded line of every type that
// Claude Code 2.1.330 was seen to write.
func TestClaudeEventsAreUnderstood(t *testing.T) {
	var got strings.Builder
	kinds := map[Kind]int{}
	for line := range bytes.Lines(read(t, "claude/events.jsonl")) {
		var kind struct {
			Kind string `json:"_kind"` // ours: which type of line this is
		}
		if err := json.Unmarshal(line, &kind); err != nil || kind.Kind == "" {
			t.Fatalf("%v in %s", err, line)
		}
		got.WriteString("# " + kind.Kind + "\n")
		for _, e := range (Claude{}).Decode(line) {
			kinds[e.Kind]++
			got.WriteString(encode(t, e))
		}
	}
	golden(t, "claude/events.golden", []byte(got.String()))
	for _, k := range []Kind{Started, Text, Think, Tool, Output, Retry, Ended, Other} {
		if kinds[k] == 0 {
			t.Errorf("no line of kind %s was seen", k)
		}
	}
}

// TestRunsAreJudged plays whole runs, made of recorded lines, with the exit
// codes and outputs that were measured.
func TestRunsAreJudged(t *testing.T) {
	type ending struct {
		exit   int
		stderr string
		status fork.Status
		again  bool
	}
	runs := map[string]ending{
		"success":         {0, "", fork.Success, false},
		"subagent":        {0, "", fork.Success, false},
		"subagent-killed": {137, "", fork.Failed, true}, // after a first result, in the turn that a sub-agent's end began
		"api-error-400":   {1, "", fork.Failed, false},
		"api-error-401":   {1, "", fork.Failed, false},
		"api-error-402":   {1, "", fork.BudgetExceeded, false},
		"api-error-404":   {1, "[claude-code:unrecognized_model] nosuch\n", fork.Failed, false},
		"api-error-529":   {1, "", fork.Failed, true},
		"unreachable":     {1, "", fork.Failed, true},
		"too-large":       {1, "", fork.Failed, false},
		"prompt-too-long": {1, "", fork.Failed, false},
		"max-turns":       {1, "", fork.Failed, false},
		"budget":          {1, "", fork.BudgetExceeded, false},
		"refusal":         {1, "", fork.Failed, false},
		"interrupted":     {0, "", fork.Cancelled, false},
		"killed":          {137, "", fork.Failed, true},
		"no-session":      {1, "", fork.Failed, false},
		"bad-flag":        {1, "error: unknown option '--modle'\n", fork.Failed, false},
		"cut-short":       {0, "", fork.Failed, false},
	}
	files, err := filepath.Glob("testdata/claude/run-*.jsonl")
	if err != nil || len(files) != len(runs) {
		t.Fatalf("%d recordings for %d endings, %v", len(files), len(runs), err)
	}
	for name, end := range runs {
		t.Run(name, func(t *testing.T) {
			_, sum := play(Claude{}, read(t, "claude/run-"+name+".jsonl"))
			out := Claude{}.Judge(sum, end.stderr, end.exit)
			if out.Status != end.status || out.Again != end.again {
				t.Errorf("judged %s, again %v; want %s, %v", out.Status, out.Again, end.status, end.again)
			}
			if (out.Status == fork.Success) != (out.Error == "") {
				t.Errorf("%s with error %q", out.Status, out.Error)
			}
			golden(t, "claude/run-"+name+".golden", []byte(encode(t, sum)+encode(t, out)))
		})
	}
}

func TestSignalsAreWorthAnotherTry(t *testing.T) {
	for _, a := range []Agent{Claude{}, Mini{}} {
		for code, again := range map[int]bool{0: false, 1: false, 2: false, 126: false, 127: false, 130: true, 137: true, 139: true, 143: true, 255: false} {
			out := a.Judge(Summary{}, "", code)
			if out.Status != fork.Failed || out.Again != again || out.Error == "" {
				t.Errorf("%s, exit %d: %+v", a.Name(), code, out)
			}
		}
	}
}

func TestOnlyATroubledAPIIsWorthAnotherTry(t *testing.T) {
	for status, again := range map[int]bool{0: true, 400: false, 401: false, 403: false, 404: false, 408: true, 409: true, 413: false, 418: false, 429: true, 500: true, 502: true, 529: true} {
		sum := Summary{End: &Account{Error: true, Reason: "api_error", APIStatus: status, Text: "no"}}
		if out := (Claude{}).Judge(sum, "", 1); out.Status != fork.Failed || out.Again != again || out.Error != "no" {
			t.Errorf("HTTP %d: %+v", status, out)
		}
	}
	for _, reason := range []string{"max_turns", "prompt_too_long", "refusal", "", "a new one"} {
		sum := Summary{End: &Account{Error: true, Reason: reason}}
		if out := (Claude{}).Judge(sum, "", 1); out.Status != fork.Failed || out.Again || out.Error == "" {
			t.Errorf("%q: %+v", reason, out)
		}
	}
}

// The sandbox is hostile, and its exit code comes after its word. But a word
// that says nothing is not taken for success.
func TestResultWithoutVerdictIsNoSuccess(t *testing.T) {
	for _, line := range []string{
		`{"type":"result"}`,
		`{"type":"result","subtype":"success","result":"done"}`,
		`{"type":"result","is_error":"false"}`,
		`{"type":"result","is_error":null,"terminal_reason":"completed"}`,
	} {
		_, sum := play(Claude{}, []byte(line))
		if out := (Claude{}).Judge(sum, "", 0); out.Status != fork.Failed || out.Error == "" {
			t.Errorf("%s: %+v", line, out)
		}
	}
}

func TestDecodeReadsAroundWhatItDoesNotKnow(t *testing.T) {
	for line, want := range map[string][]Event{
		"":                            nil,
		" \t":                         nil,
		"not JSON":                    {{Kind: Other, Text: "not JSON"}},
		"{cut":                        {{Kind: Other, Text: "{cut"}},
		"\xff{}":                      {{Kind: Other, Text: "\ufffd{}"}},
		"[]":                          {{Kind: Other, Text: "[]"}},
		"{}":                          {{Kind: Other}},
		`{"type":7,"session_id":"s"}`: {{Kind: Other, Session: "s"}},
		`{"type":"nova","subtype":"x","session_id":"s"}`:              {{Kind: Other, Text: "nova/x", Session: "s"}},
		`{"type":"assistant"}`:                                        {{Kind: Other, Text: "assistant"}},
		`{"type":"assistant","message":{"content":[]}}`:               {{Kind: Other, Text: "assistant"}},
		`{"type":"assistant","message":{"id":"m","content":"plain"}}`: {{Kind: Text, Text: "plain", Message: "m"}},
		// One block is strange, the next is read.
		`{"type":"assistant","message":{"id":"m","content":[7,{"type":"hologram"},{"type":"text","text":"hi"}]}}`: {
			{Kind: Other, Text: "assistant/", Message: "m"}, {Kind: Other, Text: "assistant/hologram", Message: "m"}, {Kind: Text, Text: "hi", Message: "m"}},
		// A field of a wrong type does not hide the others.
		`{"type":"assistant","session_id":{},"message":{"id":["m"],"model":"x","content":[{"type":"text","text":"hi","input":3}]},"num_turns":"many"}`: {
			{Kind: Text, Text: "hi", Model: "x"}},
		`{"type":"assistant","message":{"id":"m","content":[{"type":"tool_use","name":"Edit","input":{"file_path":"/a\nb","old_string":"x"}}]}}`: {
			{Kind: Tool, Tool: "Edit", Text: "/a b", Message: "m"}},
		`{"type":"assistant","message":{"id":"m","content":[{"type":"tool_use","name":"Fly","input":{ "to": "the moon" }}]}}`: {
			{Kind: Tool, Tool: "Fly", Text: `{"to":"the moon"}`, Message: "m"}},
		`{"type":"assistant","message":{"id":"m","content":[{"type":"tool_use","name":"Bash","input":"rm"}]}}`: {
			{Kind: Tool, Tool: "Bash", Text: `"rm"`, Message: "m"}},
		`{"type":"user","message":{"content":[{"type":"tool_result","is_error":true,"content":[{"type":"text","text":"a"},{"type":"image"},{"type":"text","text":"b"}]}]}}`: {
			{Kind: Output, Text: "a\n[image]\nb", Failed: true}},
		`{"type":"result","is_error":false,"total_cost_usd":0.1,"num_turns":3}`:   {{Kind: Ended, End: &Account{Turns: 3, Cost: fork.Dollar / 10}}},
		`{"type":"result","is_error":false,"total_cost_usd":-1,"num_turns":-3}`:   {{Kind: Ended, End: &Account{}}},
		`{"type":"result","is_error":false,"total_cost_usd":"1","num_turns":1e9}`: {{Kind: Ended, End: &Account{}}},
		`{"type":"result","is_error":false,"total_cost_usd":1e300}`:               {{Kind: Ended, End: &Account{}}},
		`{"type":"result","is_error":true,"api_error_status":-402}`:               {{Kind: Ended, End: &Account{Error: true}}},
	} {
		if diff := cmp.Diff(want, (Claude{}).Decode([]byte(line))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", line, diff)
		}
	}
}

func TestTurnsAreMessagesOfTheAgentItself(t *testing.T) {
	var s Summary
	for _, e := range []Event{
		{Kind: Think, Message: "m1", Model: "big"},
		{Kind: Text, Message: "m1", Text: "one"},
		{Kind: Text, Message: "m1", Text: "two"},
		{Kind: Text, Message: "n1", Text: "nested", Nested: true, Model: "small"},
		{Kind: Tool, Message: "m1", Tool: "Bash", Text: "ls"},
		{Kind: Output, Text: "file"},
		{Kind: Tool, Message: "m2", Tool: "Bash", Text: "ls"},
	} {
		s.Add(e)
	}
	if s.Turns != 2 || s.Said != "one\ntwo" || s.Model != "big" || s.Action != "Bash ls" || s.Doing != "Bash" {
		t.Errorf("%+v", s)
	}
}

func TestAToolsNameIsNoTextOfAStranger(t *testing.T) {
	for name, want := range map[string]string{"Bash": "Bash", "mcp__files__read-all": "mcp__files__read-all", "": "", "**you won** [here](http://x)": "a tool", strings.Repeat("a", 65): "a tool"} {
		var s Summary
		s.Add(Event{Kind: Tool, Tool: name, Text: "secret"})
		if s.Doing != want {
			t.Errorf("%q is shown as %q", name, s.Doing)
		}
	}
}

func TestSummaryStaysSmall(t *testing.T) {
	var s Summary
	for range 1000 {
		for _, e := range (Shell{}).Decode(bytes.Repeat([]byte("é\x1b[1m"), 1<<12)) {
			s.Add(e)
		}
	}
	if len(s.Said) > maxEventText || len(s.Action) > maxAction {
		t.Errorf("%d bytes said, %d of action", len(s.Said), len(s.Action))
	}
}

func TestByNameKnowsEveryAgent(t *testing.T) {
	for _, a := range All() {
		got, err := ByName(a.Name())
		if err != nil || got != a {
			t.Errorf("%q: %v, %v", a.Name(), got, err)
		}
	}
	_, err := ByName("clod")
	if fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), "claude, codex, opencode, mini, command") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
}

func spec() Spec {
	return Spec{Task: "do it", TaskFile: "/home/agent/task", Model: "sonnet", Session: "3f2b8c1e-5d47-4a6b-9e10-7c55d0a1b2c3",
		BaseURL: "http://127.0.0.1:8484", Token: "tok"}
}

func TestCommandLines(t *testing.T) {
	resumed, limited, unnamed := spec(), spec(), spec()
	resumed.Resume = true
	limited.Remaining = 1_234_500_000
	unnamed.Model = ""
	command := spec()
	command.Shell = "my-agent --task {prompt}"
	piped := spec()
	piped.Shell = "my-agent"
	var got strings.Builder
	for _, c := range []struct {
		name  string
		agent Agent
		spec  Spec
	}{
		{"claude", Claude{}, spec()}, {"claude resumed", Claude{}, resumed}, {"claude with a budget", Claude{}, limited}, {"claude without a model", Claude{}, unnamed},
		{"mini", Mini{}, spec()}, {"mini resumed", Mini{}, resumed},
		{"command", Shell{}, command}, {"command with the prompt on standard input", Shell{}, piped},
	} {
		cmd := c.agent.Command(c.spec)
		got.WriteString("# " + c.name + "\n")
		for _, arg := range cmd.Args {
			got.WriteString(encode(t, arg))
		}
		got.WriteString("stdin " + cmd.Stdin + "\n" + strings.Join(cmd.Env, "\n") + "\n\n")
		for _, kv := range cmd.Env {
			if strings.HasPrefix(kv, "PATH=") || strings.HasPrefix(kv, "HOME=") || !strings.Contains(kv, "=") {
				t.Errorf("%s: the environment holds %q", c.name, kv)
			}
		}
		// The token is in the environment and nowhere else: arguments can be
		// seen by every process.
		if slices.ContainsFunc(cmd.Args, func(a string) bool { return strings.Contains(a, "tok") }) {
			t.Errorf("%s: the token is an argument", c.name)
		}
	}
	golden(t, "commands.golden", []byte(got.String()))
}

func TestCheckRefusesWhatCannotStart(t *testing.T) {
	for name, c := range map[string]struct {
		agent Agent
		spoil func(*Spec)
		hint  bool
	}{
		"claude without a file":      {Claude{}, func(s *Spec) { s.TaskFile = "" }, false},
		"claude without a session":   {Claude{}, func(s *Spec) { s.Session = "" }, false},
		"a session that is a flag":   {Claude{}, func(s *Spec) { s.Session = "--help-me-0123456789-0123456789-0123" }, false},
		"mini without a session":     {Mini{}, func(s *Spec) { s.Session = "abc" }, false},
		"command without a line":     {Shell{}, func(s *Spec) { s.Shell = " " }, true},
		"a prompt of 97 KiB as word": {Shell{}, func(s *Spec) { s.Shell = "x {prompt}"; s.Task = strings.Repeat("a", 97<<10) }, true},
	} {
		s := spec()
		s.Shell = "agent"
		if err := c.agent.Check(s); err != nil {
			t.Fatal(err)
		}
		c.spoil(&s)
		err := c.agent.Check(s)
		if fault.KindOf(err) != fault.Invalid || (fault.HintOf(err) != "") != c.hint {
			t.Errorf("%s: %v (hint %q)", name, err, fault.HintOf(err))
		}
		var e *fault.Error
		if !errors.As(err, &e) {
			t.Errorf("%s: %T", name, err)
		}
	}
	s := spec()
	s.Shell, s.Task = "agent", strings.Repeat("a", fork.MaxPrompt)
	if err := (Shell{}).Check(s); err != nil {
		t.Errorf("the longest prompt on standard input: %v", err)
	}
}

func TestCommandIsJudgedByItsExitCode(t *testing.T) {
	_, sum := play(Shell{}, []byte("working\r\n\n  all \x1b[32mgreen\x1b[0m\nlast words"))
	for code, want := range map[int]Outcome{
		0:   {Status: fork.Success, Text: "working\n  all green\nlast words"},
		3:   {Status: fork.Failed, Text: "working\n  all green\nlast words", Error: "the agent's command exited with code 3: oh no"},
		127: {Status: fork.Failed, Text: "working\n  all green\nlast words", Error: "oh no", Hint: "The program must be in the sandbox: install it with --setup or mount it with --mount."},
		137: {Status: fork.Failed, Text: "working\n  all green\nlast words", Error: "the agent's command was killed by signal 9", Hint: "The sandbox may have run out of memory."},
	} {
		if diff := cmp.Diff(want, (Shell{}).Judge(sum, "oh \x1b[31mno\n", code)); diff != "" {
			t.Errorf("exit %d (-want +got):\n%s", code, diff)
		}
	}
	if out := (Shell{}).Judge(Summary{}, "only this", 0); out.Text != "only this" {
		t.Errorf("%+v", out)
	}
}

// check fails when an agent's events are not bounded.
func check(t *testing.T, line []byte, events []Event) {
	t.Helper()
	if len(events) > maxEvents {
		t.Fatalf("%d events of one line", len(events))
	}
	for _, e := range events {
		if e.Kind == "" || len(e.Text) > maxEventText || (e.End != nil) != (e.Kind == Ended) {
			t.Fatalf("%d bytes of %q, kind %q, end %v", len(e.Text), line, e.Kind, e.End)
		}
		for _, w := range []string{e.Tool, e.Message, e.Model, e.Session} {
			if len(w) > maxWord {
				t.Fatalf("a word of %d bytes", len(w))
			}
		}
		if e.End != nil && (len(e.End.Text) > fork.MaxText || len(e.End.Reason) > maxWord || e.End.Cost < 0 || e.End.Turns < 0) {
			t.Fatalf("%+v", e.End)
		}
		if _, err := json.Marshal(e); err != nil {
			t.Fatal(err)
		}
	}
}

func fuzzDecode(f *testing.F, a Agent) {
	for line := range bytes.Lines(read(f, "claude/events.jsonl")) {
		f.Add(line, "stderr\n", 0)
	}
	f.Add([]byte(`{"type":"result","is_error":false}`), "", 137)
	f.Add([]byte("0"), "\x00", -77) // once an error without a word
	f.Add([]byte("plain \x1b[1mwords\x00"), "", 1)
	f.Add(bytes.Repeat([]byte("{"), 1<<10), "", 1)
	f.Add([]byte(`{"type":"assistant","message":{"content":[`+strings.Repeat(`{},`, 1<<10)+`{}]}}`), "", 1)
	f.Fuzz(func(t *testing.T, line []byte, stderr string, code int) {
		events := a.Decode(line)
		check(t, line, events)
		var sum Summary
		for _, e := range events {
			sum.Add(e)
		}
		out := a.Judge(sum, stderr, code)
		if !out.Status.Ended() || len(out.Text) > fork.MaxText || len(out.Error) > maxEventText || (out.Status == fork.Success) != (out.Error == "") {
			t.Fatalf("outcome %+v", out)
		}
		if out.Again && out.Status != fork.Failed {
			t.Fatalf("again after %s", out.Status)
		}
		if Clean(out.Text) != out.Text || Clean(out.Error) != out.Error || Clean(sum.Action) != sum.Action || strings.Contains(sum.Action, "\n") {
			t.Fatalf("not safe to print: %+v, action %q", out, sum.Action)
		}
	})
}

func FuzzDecodeClaude(f *testing.F)  { fuzzDecode(f, Claude{}) }
func FuzzDecodeMini(f *testing.F)    { fuzzDecode(f, Mini{}) }
func FuzzDecodeCommand(f *testing.F) { fuzzDecode(f, Shell{}) }

// One line may be a megabyte of anything; what comes of it stays small.
func TestHugeLinesMakeSmallEvents(t *testing.T) {
	big := strings.Repeat("x", maxLine)
	many := strings.Repeat(`{"type":"text","text":"é"},`, maxLine/30)
	for _, line := range []string{
		big,
		`{"type":"` + big + `"}`,
		`{"type":"system","subtype":"` + big + `","content":"` + big + `"}`,
		`{"type":"assistant","session_id":"` + big + `","message":{"id":"` + big + `","model":"` + big + `","content":[{"type":"text","text":"` + big + `"}]}}`,
		`{"type":"assistant","message":{"content":[{"type":"tool_use","name":"` + big + `","input":{"command":"` + big + `"}}]}}`,
		`{"type":"assistant","message":{"content":[` + many + `{}]}}`,
		`{"type":"user","message":{"content":[{"type":"tool_result","content":[` + many + `{}]}]}}`,
		`{"type":"result","result":"` + big + `","terminal_reason":"` + big + `"}`,
		`{"type":"result","errors":["` + big + `","` + big + `"]}`,
		`{"type":"system","subtype":"api_retry","error":"` + big + `"}`,
		strings.Repeat(`{"message":`, maxLine/11),
		`{"type":"assistant","message":{"content":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `}}`,
	} {
		for _, a := range All() {
			events := a.Decode([]byte(line))
			check(t, []byte(line[:60]), events)
			if len(events) == 0 {
				t.Errorf("%s: nothing came of %.60s", a.Name(), line)
			}
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, name := range []string{"events", "run-success"} {
		stream := read(b, "claude/"+name+".jsonl")
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(stream)))
			b.ReportAllocs()
			for b.Loop() {
				if events, _ := play(Claude{}, stream); len(events) == 0 {
					b.Fatal("no events")
				}
			}
		})
	}
	// The answer of a tool, as long as they get.
	line, err := json.Marshal(map[string]any{"type": "user", "message": map[string]any{"content": []any{
		map[string]any{"type": "tool_result", "content": strings.Repeat("a line of output\n", 6<<10)}}}})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("output", func(b *testing.B) {
		b.SetBytes(int64(len(line)))
		for b.Loop() {
			(Claude{}).Decode(line)
		}
	})
}
