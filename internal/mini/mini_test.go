package mini

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// TestMain makes the test's own program the agent, for the tests that kill it.
func TestMain(m *testing.M) {
	if os.Getenv("MINI_TEST_IS_AGENT") == "1" {
		os.Exit(Main(context.Background(), os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

const session = "00000000-0000-4000-8000-000000000001"

// A world is a stand-in and the folders of one agent.
type world struct {
	t    *testing.T
	api  *standin.Server
	url  string
	dir  string
	home string

	calls atomic.Int32
	hold  atomic.Int32  // the number of a call that is not answered
	held  chan struct{} // closed when that call has come
}

func newWorld(t *testing.T, steps ...standin.Step) *world {
	t.Helper()
	api := standin.New(standin.Options{Scripts: map[string]standin.Script{"test": {Steps: steps}}, Keys: []string{"the-key-of-the-test"}})
	w := &world{t: t, api: api, dir: t.TempDir(), home: t.TempDir(), held: make(chan struct{})}
	h := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if w.calls.Add(1) == w.hold.Load() {
			close(w.held)
			_, _ = io.Copy(io.Discard, r.Body) // a server sees a client leave only after its body
			<-r.Context().Done()
			return
		}
		api.ServeHTTP(rw, r)
	}))
	t.Cleanup(h.Close)
	t.Cleanup(api.Close)
	w.url = h.URL
	return w
}

func (w *world) env(name string) string {
	return map[string]string{"ANTHROPIC_BASE_URL": w.url, "ANTHROPIC_API_KEY": "the-key-of-the-test", "HOME": w.home}[name]
}

type ran struct {
	code   int
	lines  [][]byte
	stderr string
}

// run plays the agent in this process.
func (w *world) run(prompt string, args ...string) ran {
	w.t.Helper()
	w.t.Chdir(w.dir)
	var stdout, stderr bytes.Buffer
	code := Main(w.t.Context(), args, w.env, strings.NewReader(prompt), &stdout, &stderr)
	return ran{code: code, lines: lines(stdout.Bytes()), stderr: stderr.String()}
}

func lines(b []byte) [][]byte {
	var ls [][]byte
	for l := range bytes.Lines(b) {
		ls = append(ls, bytes.TrimSpace(l))
	}
	return ls
}

// events are the lines as the product's own decoder reads them.
func (r ran) events() []agent.Event {
	var es []agent.Event
	for _, l := range r.lines {
		es = append(es, agent.Mini{}.Decode(l)...)
	}
	return es
}

func (r ran) outcome() agent.Outcome {
	var sum agent.Summary
	for _, e := range r.events() {
		sum.Add(e)
	}
	return agent.Mini{}.Judge(sum, r.stderr, r.code)
}

// result is the last line, which must be a result.
func (r ran) result(t *testing.T) map[string]any {
	t.Helper()
	var last map[string]any
	if len(r.lines) == 0 || json.Unmarshal(r.lines[len(r.lines)-1], &last) != nil || last["type"] != "result" {
		t.Fatalf("no result: exit %d, %s%s", r.code, r.stderr, bytes.Join(r.lines, []byte("\n")))
	}
	return last
}

func (r ran) kinds() []string {
	var ks []string
	for _, e := range r.events() {
		k := string(e.Kind)
		if e.Tool != "" {
			k += " " + e.Tool
		}
		if e.Failed {
			k += " failed"
		}
		ks = append(ks, k)
	}
	return ks
}

func call(name, input string) standin.Step {
	return standin.Step{Tools: []standin.Tool{{Name: name, Input: json.RawMessage(input)}}}
}

func bash(command string) standin.Step {
	return call("Bash", string(mustJSON(map[string]string{"command": command})))
}

func (w *world) file(name string) string {
	b, err := os.ReadFile(filepath.Join(w.dir, name))
	if err != nil {
		return ""
	}
	return string(b)
}

func TestAgentRunsItsToolsAndSpeaksClaudeCodesStreamJSON(t *testing.T) {
	w := newWorld(t,
		standin.Step{Thinking: "Hm.", Text: "I begin.", Tools: call("Write", `{"file_path":"a/b.txt","content":"hello\n"}`).Tools},
		call("Read", `{"file_path":"a/b.txt"}`),
		call("Edit", `{"file_path":"a/b.txt","old_string":"hello","new_string":"bye"}`),
		standin.Step{Tools: append(bash("cat a/b.txt; seq 3000; exit 3").Tools, bash("pwd >here.txt").Tools...)},
		standin.Step{Text: "All is done."},
	)
	r := w.run("@script test", "--session-id", session, "--model", "haiku")
	res := r.result(t)
	if r.code != 0 || res["is_error"] != false || res["subtype"] != "success" || res["result"] != "All is done." ||
		res["terminal_reason"] != "completed" || res["stop_reason"] != "end_turn" || res["num_turns"] != 6.0 || res["session_id"] != session {
		t.Errorf("exit %d, %v", r.code, res)
	}
	want := []string{"started", "think", "text", "tool Write", "output", "tool Read", "output", "tool Edit", "output",
		"tool Bash", "tool Bash", "output failed", "output", "text", "ended"}
	if diff := cmp.Diff(want, r.kinds()); diff != "" {
		t.Error(diff)
	}
	if got := w.file("a/b.txt"); got != "bye\n" {
		t.Errorf("file %q", got)
	}
	if o := r.outcome(); o.Status != fork.Success || o.Text != "All is done." || o.Turns != 5 {
		t.Errorf("outcome %+v", o)
	}
	rs := w.api.Requests()
	var in, out int
	for _, q := range rs {
		in += q.Usage.Input + q.Usage.CacheWrite + q.Usage.CacheRead
		out += q.Usage.Output
		if q.Model != "claude-haiku-5-5" || q.Session != session || q.Stream {
			t.Errorf("request %+v", q)
		}
	}
	u, _ := res["usage"].(map[string]any)
	said := func(k string) int { n, _ := u[k].(float64); return int(n) }
	if len(rs) != 5 || said("output_tokens") != out || said("input_tokens")+said("cache_creation_input_tokens")+said("cache_read_input_tokens") != in {
		t.Errorf("agent reckons %v, the stand-in %d in and %d out in %d calls", u, in, out, len(rs))
	}
	if last := rs[len(rs)-1].Usage; last.CacheWrite == 0 || last.Input != 0 {
		t.Errorf("the prompt was not cached: %+v", last)
	}
}

func TestAFinalAnswerOfTheAPIIsNotAskedForTwice(t *testing.T) {
	for _, row := range []struct {
		status int
		header map[string]string
		want   fork.Status
	}{
		{status: 400, want: fork.Failed},
		{status: 401, want: fork.Failed},
		{status: 402, want: fork.BudgetExceeded},
		{status: 403, want: fork.Failed},
		{status: 404, want: fork.Failed},
		{status: 413, want: fork.Failed},
		{status: 529, header: map[string]string{"x-should-retry": "false"}, want: fork.Failed},
	} {
		t.Run(strconv.Itoa(row.status), func(t *testing.T) {
			w := newWorld(t, standin.Step{Text: "never said", Faults: []standin.Fault{
				{Kind: standin.FaultStatus, Status: row.status, Headers: row.header, Message: "because", Times: standin.Always}}})
			r := w.run("@script test")
			res := r.result(t)
			if r.code != 1 || res["is_error"] != true || res["subtype"] != "success" || res["terminal_reason"] != "api_error" ||
				res["api_error_status"] != float64(row.status) || res["result"] != fmt.Sprintf("API Error: %d because", row.status) {
				t.Errorf("exit %d, %v", r.code, res)
			}
			if o := r.outcome(); o.Status != row.want {
				t.Errorf("outcome %+v", o)
			}
			if n := len(w.api.Requests()); n != 1 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

func TestPassingTroubleIsWaitedOut(t *testing.T) {
	soon := map[string]string{"retry-after-ms": "1"}
	w := newWorld(t, standin.Step{Text: "Made it.", Faults: []standin.Fault{
		{Kind: standin.FaultCut},
		{Kind: standin.FaultStatus, Status: 529, Headers: soon, Times: 2},
		{Kind: standin.FaultStatus, Status: 429, Headers: map[string]string{"retry-after": "0"}},
		{Kind: standin.FaultStatus, Status: 500, Headers: soon},
		{Kind: standin.FaultStatus, Status: 404, Headers: map[string]string{"x-should-retry": "true", "retry-after-ms": "1"}},
	}})
	r := w.run("@script test")
	if res := r.result(t); r.code != 0 || res["result"] != "Made it." {
		t.Errorf("exit %d, %v", r.code, res)
	}
	want := []string{"started", "retry", "retry", "retry", "retry", "retry", "retry", "text", "ended"}
	if diff := cmp.Diff(want, r.kinds()); diff != "" {
		t.Error(diff)
	}
}

func TestAnAPIThatIsNotThereYetIsWaitedFor(t *testing.T) {
	w := newWorld(t, standin.Step{Text: "Made it."})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	w.url = "http://" + addr
	w.t.Chdir(w.dir)
	r, out := io.Pipe()
	code := make(chan int, 1)
	go func() {
		code <- Main(t.Context(), nil, w.env, strings.NewReader("@script test"), out, io.Discard)
		_ = out.Close()
	}()
	var got ran
	var srv *http.Server
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		got.lines = append(got.lines, bytes.Clone(sc.Bytes()))
		if bytes.Contains(sc.Bytes(), []byte("api_retry")) && srv == nil {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			srv = &http.Server{Handler: w.api, ReadHeaderTimeout: time.Minute}
			go func() { _ = srv.Serve(l) }()
			t.Cleanup(func() { _ = srv.Close() })
		}
	}
	if c := <-code; c != 0 || got.result(t)["result"] != "Made it." {
		t.Errorf("exit %d, %s", c, got.lines)
	}
}

func TestPatienceEnds(t *testing.T) {
	w := newWorld(t, standin.Step{Text: "never said", Faults: []standin.Fault{
		{Kind: standin.FaultStatus, Status: 529, Headers: map[string]string{"retry-after-ms": "1"}, Times: standin.Always}}})
	var stdout, stderr bytes.Buffer
	o, err := parse([]string{"@script test"}, w.env, nil, &stderr)
	if err != nil {
		t.Fatal(err)
	}
	if o.patience < time.Minute {
		t.Errorf("an outage of a minute would end the agent: %s", o.patience)
	}
	o.patience = 20 * time.Millisecond
	r := ran{code: run(t.Context(), o, &stdout, &stderr), lines: lines(stdout.Bytes())}
	if res := r.result(t); r.code != 1 || res["api_error_status"] != 529.0 {
		t.Errorf("exit %d, %v", r.code, res)
	}
	if o := r.outcome(); o.Status != fork.Failed || !o.Again {
		t.Errorf("outcome %+v", o)
	}
}

func TestAnswersThatAreCutShortAreContinued(t *testing.T) {
	w := newWorld(t,
		standin.Step{Text: "A long story", OutputTokens: maxTokens + 1},
		standin.Step{Text: "A tool", Tools: bash("touch never").Tools, OutputTokens: maxTokens + 1},
		standin.Step{Text: "Paused", StopReason: "pause_turn"},
		standin.Step{Text: "The end."},
	)
	r := w.run("@script test")
	if res := r.result(t); r.code != 0 || res["result"] != "The end." {
		t.Errorf("exit %d, %v", r.code, res)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "never")); err == nil {
		t.Error("a tool call that was cut short was run")
	}
}

func TestARefusalAndTooManyTurnsAreErrors(t *testing.T) {
	w := newWorld(t, standin.Step{Text: "No.", StopReason: "refusal"})
	r := w.run("@script test")
	if res := r.result(t); r.code != 1 || res["is_error"] != true || res["stop_reason"] != "refusal" || res["terminal_reason"] != "api_error" {
		t.Errorf("exit %d, %v", r.code, res)
	}
	w = newWorld(t, bash("echo 1 >>n"), bash("echo 2 >>n"), bash("echo 3 >>n"), standin.Step{Text: "done"})
	r = w.run("@script test", "--max-turns", "2")
	if res := r.result(t); r.code != 1 || res["subtype"] != "error_max_turns" || res["terminal_reason"] != "max_turns" || w.file("n") != "1\n2\n" {
		t.Errorf("exit %d, %v, %q", r.code, res, w.file("n"))
	}
}

func TestTheKeyIsNotInTheEnvironmentOfCommands(t *testing.T) {
	t.Setenv("ANTHROPIC_API_KEY", "the-key-of-the-test")
	w := newWorld(t, bash("env >env.txt"), standin.Step{Text: "done"})
	w.run("@script test")
	if env := w.file("env.txt"); strings.Contains(env, "the-key") || !strings.Contains(env, "HOME="+w.home+"\n") {
		t.Error(env)
	}
}

func TestASessionIsBegunOnceAndCanAlwaysBeResumed(t *testing.T) {
	w := newWorld(t, bash("echo 1 >>n"), standin.Step{Text: "The end."})
	if r := w.run("", "--resume", session); r.code != 1 || len(r.lines) != 0 || !strings.Contains(r.stderr, "no conversation found") {
		t.Errorf("resumed nothing: exit %d, %s", r.code, r.stderr)
	}
	if r := w.run("@script test", "--resume", session); r.code != 0 || r.result(t)["result"] != "The end." {
		t.Errorf("resuming what was not begun: exit %d, %s", r.code, r.stderr)
	}
	before := len(w.api.Requests())
	if r := w.run("@script test", "--session-id", session); r.code != 1 || len(r.lines) != 0 || !strings.Contains(r.stderr, "already in use") {
		t.Errorf("begun twice: exit %d, %s", r.code, r.stderr)
	}
	r := w.run("@script test", "--resume", session)
	if res := r.result(t); r.code != 0 || res["result"] != "The end." || res["num_turns"] != 2.0 || len(w.api.Requests()) != before {
		t.Errorf("resuming what had ended: exit %d, %v, %d requests", r.code, res, len(w.api.Requests())-before)
	}
	if w.file("n") != "1\n" {
		t.Errorf("commands ran as %q", w.file("n"))
	}
	if r := w.run("@script test", "--session-id", "../../../etc/passwd"); r.code != 1 || len(r.lines) != 0 {
		t.Errorf("a path was taken for a session: exit %d", r.code)
	}
}

// An outside is the agent in a process of its own.
type outside struct {
	*exec.Cmd
	out *bufio.Scanner
	got ran
	err bytes.Buffer
}

func (w *world) start(prompt string, args ...string) *outside {
	w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	p := &outside{Cmd: exec.Command(self, args...)}
	p.Dir = w.dir
	p.Env = append(os.Environ(), "MINI_TEST_IS_AGENT=1", "GOCOVERDIR="+w.home)
	for _, k := range []string{"ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", "HOME"} {
		p.Env = append(p.Env, k+"="+w.env(k))
	}
	p.Stdin, p.Stderr = strings.NewReader(prompt), &p.err
	stdout, err := p.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	p.out = bufio.NewScanner(stdout)
	p.out.Buffer(nil, 1<<20)
	if err := p.Start(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = p.Process.Kill(); _ = p.Wait() })
	return p
}

// until reads the agent's output up to a line with mark.
func (p *outside) until(t *testing.T, mark string) {
	t.Helper()
	for p.out.Scan() {
		p.got.lines = append(p.got.lines, bytes.Clone(p.out.Bytes()))
		if bytes.Contains(p.out.Bytes(), []byte(mark)) {
			return
		}
	}
	t.Fatalf("the agent ended before it said %q: %s", mark, p.err.String())
}

// end waits for the agent and returns all it said.
func (p *outside) end() ran {
	for p.out.Scan() {
		p.got.lines = append(p.got.lines, bytes.Clone(p.out.Bytes()))
	}
	_ = p.Wait()
	p.got.stderr = p.err.String()
	ws, _ := p.ProcessState.Sys().(syscall.WaitStatus)
	p.got.code = p.ProcessState.ExitCode()
	if ws.Signaled() {
		p.got.code = 128 + int(ws.Signal())
	}
	return p.got
}

// eventually waits for a condition that other processes bring about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func TestAKilledAgentResumesWithoutRunningACommandTwice(t *testing.T) {
	w := newWorld(t,
		bash("echo 1 >>n"),
		standin.Step{Text: "Next.", Tools: bash("echo 2 >>n").Tools},
		standin.Step{Text: "The end."},
	)
	w.hold.Store(2)
	p := w.start("@script test", "--session-id", session)
	p.until(t, "tool_result")
	<-w.held
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if r := p.end(); r.code != 137 {
		t.Errorf("exit %d", r.code)
	}
	r := w.start("@script test", "--resume", session).end()
	if res := r.result(t); r.code != 0 || res["result"] != "The end." || res["num_turns"] != 3.0 {
		t.Errorf("exit %d, %v %s", r.code, res, r.stderr)
	}
	if got := w.file("n"); got != "1\n2\n" {
		t.Errorf("commands ran as %q", got)
	}
}

// sleeper is a command that says its process id and then waits for ever; it
// is killed at the test's end whatever happens.
func (w *world) sleeper() standin.Step {
	w.t.Cleanup(func() {
		if pid, err := strconv.Atoi(strings.TrimSpace(w.file("pid"))); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return bash("echo $$ >pid.new; mv pid.new pid; exec sleep 600")
}

func (w *world) sleeps() bool {
	pid, err := strconv.Atoi(strings.TrimSpace(w.file("pid")))
	return err == nil && syscall.Kill(pid, 0) == nil
}

func TestACommandThatWasInterruptedIsReportedAsUnknown(t *testing.T) {
	w := newWorld(t)
	w = newWorldAt(w, w.sleeper(), standin.Step{Text: "The end."})
	p := w.start("@script test", "--session-id", session)
	eventually(t, "the command runs", w.sleeps)
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.end()
	r := w.start("@script test", "--resume", session).end()
	if res := r.result(t); r.code != 0 || res["result"] != "The end." {
		t.Errorf("exit %d, %v %s", r.code, res, r.stderr)
	}
	b, err := os.ReadFile(filepath.Join(w.home, ".mini", session+".json"))
	if err != nil || !bytes.Contains(b, []byte("outcome is unknown")) || !bytes.Contains(b, []byte(goOn)) {
		t.Errorf("transcript: %s, %v", b, err)
	}
}

// newWorldAt gives the folders of w another script.
func newWorldAt(w *world, steps ...standin.Step) *world {
	n := newWorld(w.t, steps...)
	n.dir, n.home = w.dir, w.home // the cleanup of w looks there
	return n
}

func TestSignalsEndTheAgentAndItsCommand(t *testing.T) {
	for _, row := range []struct {
		signal syscall.Signal
		code   int
		result bool
	}{
		{syscall.SIGINT, 0, true},
		{syscall.SIGTERM, 143, false},
	} {
		t.Run(row.signal.String(), func(t *testing.T) {
			w := newWorld(t)
			w = newWorldAt(w, w.sleeper(), standin.Step{Text: "never said"})
			p := w.start("@script test")
			eventually(t, "the command runs", w.sleeps)
			if err := p.Process.Signal(row.signal); err != nil {
				t.Fatal(err)
			}
			r := p.end()
			if r.code != row.code {
				t.Errorf("exit %d: %s", r.code, r.stderr)
			}
			if row.result {
				if res := r.result(t); res["subtype"] != "error_during_execution" || res["terminal_reason"] != "aborted_tools" || res["is_error"] != true {
					t.Errorf("%v", res)
				}
				if o := r.outcome(); o.Status != fork.Cancelled {
					t.Errorf("outcome %+v", o)
				}
			} else if bytes.Contains(bytes.Join(r.lines, nil), []byte(`"result"`)) {
				t.Error("there is a result")
			}
			eventually(t, "the command is gone", func() bool { return !w.sleeps() })
		})
	}
}

func TestAnInterruptWhileTheModelIsAskedEndsWithAResult(t *testing.T) {
	w := newWorld(t, bash("true"), standin.Step{Text: "never said"})
	w.hold.Store(2)
	p := w.start("@script test")
	<-w.held
	if err := p.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	r := p.end()
	if res := r.result(t); r.code != 0 || res["terminal_reason"] != "aborted_streaming" {
		t.Errorf("exit %d, %v", r.code, res)
	}
}

func TestAReaderThatGoesAwayDoesNotStopTheWork(t *testing.T) {
	w := newWorld(t, bash("echo 1 >>n"), bash("echo 2 >>n"), standin.Step{Text: "The end."})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Dir, cmd.Stdin, cmd.Stdout = w.dir, strings.NewReader("@script test"), out
	cmd.Env = append(os.Environ(), "MINI_TEST_IS_AGENT=1", "HOME="+w.home, "ANTHROPIC_BASE_URL="+w.url, "ANTHROPIC_API_KEY=the-key-of-the-test")
	err = cmd.Run()
	_ = out.Close()
	if err != nil || w.file("n") != "1\n2\n" {
		t.Errorf("%v, %q", err, w.file("n"))
	}
}

func FuzzReply(f *testing.F) {
	f.Add([]byte(`{"id":"m","content":[{"type":"text","text":"hi"}],"stop_reason":"end_turn","usage":{"input_tokens":1}}`))
	f.Add([]byte(`{"content":[null,7,{"type":"tool_use","id":"t"}],"usage":3}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var r reply
		if json.Unmarshal(body, &r) != nil {
			return
		}
		e := &events{w: io.Discard, session: session}
		e.assistant(&r)
		tr := &transcript{}
		tr.hear(&r)
		tr.goOn("again")
		mustJSON(cachedToEnd(tr.Messages))
		_ = tr.lastText()
	})
}
