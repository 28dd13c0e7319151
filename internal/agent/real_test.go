package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// These tests run the real Claude Code CLI against a model of our own. They
// show that the command line is one that it takes and that the recordings in
// testdata still look like what it writes.

const (
	session = "3f2b8c1e-5d47-4a6b-9e10-7c55d0a1b2c3"
	token   = "token-of-one-fork"
)

// claudeBinary returns the native program of Claude Code, or skips.
func claudeBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("SANDBOX_TEMPORAL_CLAUDE")
	if path == "" {
		// The module root is two folders up.
		path = filepath.Join("..", "..", "tests", "node_modules", "@anthropic-ai", "claude-code-linux-x64", "claude")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("no Claude Code here: set SANDBOX_TEMPORAL_CLAUDE to its native program, from npm's @anthropic-ai/claude-code-linux-x64 (%v)", err)
	}
	return path
}

// A model answers the calls of one test, in order; the last answer is repeated.
type model struct {
	answers []http.HandlerFunc

	mu    sync.Mutex
	calls []string // the bodies
}

func (m *model) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/v1/messages" || r.Header.Get("X-Api-Key") != token {
		http.Error(w, fmt.Sprintf("unexpected %s %s", r.Method, r.URL), http.StatusTeapot)
		return
	}
	m.mu.Lock()
	answer := m.answers[min(len(m.calls), len(m.answers)-1)]
	m.calls = append(m.calls, string(body))
	m.mu.Unlock()
	answer(w, r)
}

func (m *model) seen() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.calls)
}

// refuse answers with an error of the Messages API.
func refuse(status int, kind, message string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Should-Retry", "false")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]any{"type": "error", "error": map[string]string{"type": kind, "message": message}})
	}
}

// say streams one message of the model; each block is of the Messages API.
func say(id, stop string, blocks ...map[string]any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		send := func(kind string, data map[string]any) {
			data["type"] = kind
			b, _ := json.Marshal(data)
			fmt.Fprintf(w, "event: %s\ndata: %s\n\n", kind, b)
		}
		send("message_start", map[string]any{"message": map[string]any{"id": id, "type": "message", "role": "assistant", "model": "claude-sonnet-5-5",
			"content": []any{}, "stop_reason": nil, "stop_sequence": nil, "usage": map[string]int{"input_tokens": 1000, "output_tokens": 1}}})
		for i, block := range blocks {
			start, delta := map[string]any{"type": "text", "text": ""}, map[string]any{"type": "text_delta", "text": block["text"]}
			if block["type"] == "tool_use" {
				input, _ := json.Marshal(block["input"])
				start = map[string]any{"type": "tool_use", "id": block["id"], "name": block["name"], "input": map[string]any{}}
				delta = map[string]any{"type": "input_json_delta", "partial_json": string(input)}
			}
			send("content_block_start", map[string]any{"index": i, "content_block": start})
			send("content_block_delta", map[string]any{"index": i, "delta": delta})
			send("content_block_stop", map[string]any{"index": i})
		}
		send("message_delta", map[string]any{"delta": map[string]any{"stop_reason": stop, "stop_sequence": nil}, "usage": map[string]int{"output_tokens": 500}})
		send("message_stop", map[string]any{})
	}
}

func text(s string) map[string]any { return map[string]any{"type": "text", "text": s} }

func bash(id, command string) map[string]any {
	return map[string]any{"type": "tool_use", "id": id, "name": "Bash", "input": map[string]string{"command": command}}
}

// A machine stands in for a sandbox: a home and a workspace.
type machine struct {
	t      *testing.T
	root   string
	binary string
	kill   chan struct{} // kills the running process when it is closed; nil: nothing does
}

func newMachine(t *testing.T) machine {
	m := machine{t: t, root: t.TempDir(), binary: claudeBinary(t)}
	for _, dir := range []string{"home", "workspace", "tmp"} {
		if err := os.Mkdir(filepath.Join(m.root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// recorded waits until Claude's session file holds the words.
func (m machine) recorded(words string) {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		files, _ := filepath.Glob(filepath.Join(m.root, "home", ".claude", "projects", "*", "*.jsonl"))
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(words)) {
				return
			}
		}
	}
	m.t.Errorf("the session never held %q", words)
}

// run carries out spec and returns what came of it. It fails the test when the
// process does not end.
func (m machine) run(spec agent.Spec) (events []agent.Event, sum agent.Summary, out agent.Outcome) {
	t := m.t
	t.Helper()
	claude := agent.Claude{}
	if err := claude.Check(spec); err != nil {
		t.Fatal(err)
	}
	command := claude.Command(spec)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	path := filepath.Dir(m.binary) + ":/usr/bin:/bin"
	program := command.Args[0]
	if program == "claude" {
		program = m.binary
	}
	cmd := exec.CommandContext(ctx, program, command.Args[1:]...)
	cmd.Dir = filepath.Join(m.root, "workspace")
	cmd.Env = []string{"PATH=" + path, "HOME=" + filepath.Join(m.root, "home"), "TMPDIR=" + filepath.Join(m.root, "tmp")}
	for _, kv := range command.Env {
		// The one path in it that is the sandbox's.
		if strings.HasPrefix(kv, "CLAUDE_CONFIG_DIR=") {
			kv = "CLAUDE_CONFIG_DIR=" + filepath.Join(m.root, "home", ".claude")
		}
		cmd.Env = append(cmd.Env, kv)
	}
	if command.Stdin != "" {
		f, err := os.Open(command.Stdin)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.Stdin = f
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		select {
		case <-m.kill:
			cmd.Cancel()
		case <-ended:
		}
	}()
	cmd.Wait()
	close(ended)
	if ctx.Err() != nil {
		t.Fatalf("claude did not end\n%s\n%s", stdout.String(), stderr.String())
	}
	code := cmd.ProcessState.ExitCode()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		code = 128 + int(ws.Signal()) // as a sandbox tells it
	}
	var lines agent.Lines
	take := func(line []byte) {
		for _, e := range claude.Decode(line) {
			events = append(events, e)
			sum.Add(e)
		}
	}
	lines.Feed(stdout.Bytes(), take)
	lines.Flush(take)
	return events, sum, claude.Judge(sum, stderr.String(), code)
}

// spec writes the prompt to a file and asks for it.
func (m machine) spec(url, prompt string) agent.Spec {
	file := filepath.Join(m.root, "prompt")
	if err := os.WriteFile(file, []byte(prompt), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return agent.Spec{Task: prompt, TaskFile: file, Model: "sonnet", Session: session, BaseURL: url, Token: token, Remaining: 5 * fork.Dollar}
}

func serve(t *testing.T, answers ...http.HandlerFunc) (*model, string) {
	m := &model{answers: answers}
	srv := httptest.NewServer(m)
	t.Cleanup(srv.Close)
	return m, srv.URL
}

func TestRealClaudeWorksAndIsUnderstood(t *testing.T) {
	m := newMachine(t)
	api, url := serve(t,
		say("msg_1", "tool_use", text("I look around."), bash("toolu_1", "echo found-$((40+2))")),
		say("msg_2", "end_turn", text("All done.")))
	events, sum, out := m.run(m.spec(url, "--help is what this prompt begins with, and it's \"quoted\" $(not run)\n"))

	if out.Status != fork.Success || out.Text != "All done." || out.Error != "" || out.Turns != 2 {
		t.Errorf("outcome %+v", out)
	}
	// 2 calls of 1,000 tokens in at $2 and 500 out at $10 a million.
	if want := fork.USD(14_000_000); out.Cost != want {
		t.Errorf("cost %s, want %s", out.Cost, want)
	}
	if sum.Session != session || sum.Model != "claude-sonnet-5-5" {
		t.Errorf("session %q, model %q", sum.Session, sum.Model)
	}
	want := []agent.Event{
		{Kind: agent.Text, Text: "I look around."},
		{Kind: agent.Tool, Tool: "Bash", Text: "echo found-$((40+2))"},
		{Kind: agent.Output, Text: "found-42"},
		{Kind: agent.Text, Text: "All done."},
	}
	got := 0
	for _, e := range events {
		if got < len(want) && e.Kind == want[got].Kind && e.Tool == want[got].Tool && e.Text == want[got].Text {
			got++
		}
	}
	if got < len(want) {
		t.Errorf("event %+v is missing in %+v", want[got], events)
	}
	if calls := api.seen(); len(calls) != 2 || !strings.Contains(calls[0], "--help is what this prompt begins with") {
		t.Errorf("%d calls", len(calls))
	}
}

func TestRealClaudeTakesTheLongestPrompt(t *testing.T) {
	m := newMachine(t)
	api, url := serve(t, say("msg_1", "end_turn", text("Read it all.")))
	prompt := "-p " + strings.Repeat("a long story ", fork.MaxPrompt/13-1) + "the end."
	_, _, out := m.run(m.spec(url, prompt))
	if out.Status != fork.Success {
		t.Errorf("outcome %+v", out)
	}
	if calls := api.seen(); len(calls) != 1 || !strings.Contains(calls[0], prompt) {
		t.Errorf("the prompt did not arrive whole, in %d calls", len(calls))
	}
}

func TestRealClaudeResumesItsSession(t *testing.T) {
	m := newMachine(t)
	api, url := serve(t, say("msg_1", "end_turn", text("The secret word is plum.")), say("msg_2", "end_turn", text("As I said: plum.")))
	spec := m.spec(url, "Think of a word.")
	if _, _, out := m.run(spec); out.Status != fork.Success {
		t.Fatalf("outcome %+v", out)
	}
	spec.Resume = true
	_, sum, out := m.run(spec)
	if out.Status != fork.Success || out.Text != "As I said: plum." || sum.Session != session {
		t.Errorf("session %q, outcome %+v", sum.Session, out)
	}
	calls := api.seen()
	if len(calls) != 2 || !strings.Contains(calls[1], "The secret word is plum.") || !strings.Contains(calls[1], "Continue where you left off.") {
		t.Errorf("%d calls; the last does not go on with the session", len(calls))
	}
}

func TestRealClaudeGoesOnAfterItWasKilled(t *testing.T) {
	m := newMachine(t)
	kill := make(chan struct{})
	m.kill = kill
	api, url := serve(t,
		say("msg_1", "tool_use", text("Step one."), bash("toolu_1", "echo found-$((40+2))")),
		func(_ http.ResponseWriter, r *http.Request) {
			m.recorded("found-42") // it writes its session while it goes on
			close(kill)
			<-r.Context().Done()
		},
		say("msg_3", "end_turn", text("Step two.")))
	spec := m.spec(url, "Do both steps.")
	if _, sum, out := m.run(spec); out.Status != fork.Failed || !out.Again || sum.End != nil {
		t.Fatalf("outcome %+v", out)
	}
	m.kill = nil
	spec.Resume = true
	_, _, out := m.run(spec)
	if out.Status != fork.Success || out.Text != "Step two." {
		t.Errorf("outcome %+v", out)
	}
	calls := api.seen()
	if last := calls[len(calls)-1]; len(calls) != 3 || !strings.Contains(last, "Do both steps.") || !strings.Contains(last, "Step one.") {
		t.Errorf("%d calls; the last does not go on with the session", len(calls))
	}
}

func TestRealClaudeGoesOnAfterItWasKilledInItsFirstCall(t *testing.T) {
	m := newMachine(t)
	kill := make(chan struct{})
	m.kill = kill
	api, url := serve(t,
		func(_ http.ResponseWriter, r *http.Request) {
			close(kill)
			<-r.Context().Done()
		},
		say("msg_2", "end_turn", text("Done.")))
	spec := m.spec(url, "Do the one step.")
	if _, _, out := m.run(spec); !out.Again {
		t.Fatalf("outcome %+v", out)
	}
	m.kill = nil
	spec.Resume = true
	_, _, out := m.run(spec)
	if out.Status != fork.Success || out.Text != "Done." {
		t.Errorf("outcome %+v", out)
	}
	calls := api.seen()
	if last := calls[len(calls)-1]; len(calls) != 2 || !strings.Contains(last, "Do the one step.") {
		t.Errorf("%d calls; the last does not hold the task", len(calls))
	}
}

// A process can die before it has written its session. Its next attempt is
// told to resume, finds nothing, and must do the task all the same.
func TestRealClaudeBeginsASessionThatIsNotThere(t *testing.T) {
	m := newMachine(t)
	api, url := serve(t, say("msg_1", "end_turn", text("Done at last.")))
	spec := m.spec(url, "-- do the task")
	spec.Resume = true
	_, sum, out := m.run(spec)
	if out.Status != fork.Success || out.Text != "Done at last." || sum.Session != session {
		t.Errorf("session %q, outcome %+v", sum.Session, out)
	}
	if calls := api.seen(); len(calls) != 1 || !strings.Contains(calls[0], "-- do the task") {
		t.Errorf("%d calls", len(calls))
	}
}

func TestRealClaudeStopsAtOnceWhenTheGatewayRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		status fork.Status
		text   string
		hint   string
		again  bool
	}{
		"402": {refuse(402, "billing_error", "the run's budget of $3.0000 is spent"), fork.BudgetExceeded, "the run's budget of $3.0000 is spent", "--budget", false},
		"401": {refuse(401, "authentication_error", "invalid x-api-key"), fork.Failed, "Invalid API key", "ANTHROPIC_API_KEY", false},
		"429": {refuse(429, "rate_limit_error", "slow down"), fork.Failed, "slow down", "busy", true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			api, url := serve(t, c.answer)
			_, _, out := m.run(m.spec(url, "do it"))
			if out.Status != c.status || !strings.Contains(out.Error, c.text) || !strings.Contains(out.Hint, c.hint) || out.Again != c.again {
				t.Errorf("outcome %+v", out)
			}
			if n := len(api.seen()); n != 1 {
				t.Errorf("%d calls", n)
			}
		})
	}
}

func TestRealClaudeKeepsToItsBudget(t *testing.T) {
	m := newMachine(t)
	_, url := serve(t, say("msg_1", "tool_use", bash("toolu_1", "true")))
	spec := m.spec(url, "do it")
	spec.Remaining = fork.Dollar / 1000
	_, _, out := m.run(spec)
	if out.Status != fork.BudgetExceeded || out.Error == "" || out.Again {
		t.Errorf("outcome %+v", out)
	}
}
