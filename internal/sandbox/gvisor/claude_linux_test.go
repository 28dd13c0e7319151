package gvisor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// claudeScripts are what the model says. In the first, the agent is at work
// with a tool for as long as nobody writes to its home; in the second, it
// waits for the model.
const claudeScripts = `{
"tool": {"steps": [
  {"text": "I wait and write.", "tools": [{"name": "Bash", "input": {"command": "echo waiting > waiting; while [ ! -s $HOME/name ]; do sleep 0.1; done; cat $HOME/name > said", "description": "wait"}}]},
  {"text": "I look.", "tools": [{"name": "Bash", "input": {"command": "cat said said > twice", "description": "look"}}]},
  {"text": "I have written it."}
]},
"model": {"steps": [
  {"text": "I begin.", "tools": [{"name": "Bash", "input": {"command": "echo waiting > waiting", "description": "begin"}}]},
  {"delay": "6s", "text": "I write.", "tools": [{"name": "Bash", "input": {"command": "while [ ! -s $HOME/name ]; do sleep 0.1; done; cat $HOME/name > said; cat said said > twice", "description": "write"}}]},
  {"text": "I have written it."}
]}}`

// TestTheRealClaudeCodeGoesOnInLiveForks forks the Claude Code CLI while it
// runs: its event loop, its sockets and its session are in another sandbox
// from one moment to the next.
func TestTheRealClaudeCodeGoesOnInLiveForks(t *testing.T) {
	claude := os.Getenv("SANDBOX_TEMPORAL_CLAUDE")
	if claude == "" {
		t.Skip("the real Claude Code is not there: set SANDBOX_TEMPORAL_CLAUDE")
	}
	for _, at := range []string{"tool", "model"} {
		t.Run(at, func(t *testing.T) { forkClaude(t, claude, at) })
	}
}

func forkClaude(t *testing.T, claude, at string) {
	p := newProvider(t)
	ctx := t.Context()
	scripts, err := standin.ParseScripts(strings.NewReader(claudeScripts))
	if err != nil {
		t.Fatal(err)
	}
	model := standin.New(standin.Options{Scripts: scripts})
	defer model.Close()
	t.Chdir(t.TempDir()) // the path as a whole may be too long for an address
	l, err := net.Listen("unix", "model.sock")
	if err != nil {
		t.Fatal(err)
	}
	var underway atomic.Int64
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		underway.Add(1)
		defer underway.Add(-1)
		model.ServeHTTP(w, r)
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	spec := func(key string) sandbox.Spec {
		s := testSpec(key)
		s.Gateway = "unix:" + filepath.Join(here, "model.sock")
		return s
	}
	s := spec("claude")
	s.Mounts = []sandbox.Mount{{Source: claude, Target: sandbox.ProgramDir + "/claude"}}
	ref, sb := newSandbox(t, p, s)
	_, err = sb.Start(ctx, "agent", sandbox.Cmd{
		Args: []string{
			"claude", "-p", "Play @script " + at, "--session-id", "6f1c9d52-6c5c-4a55-9c8d-0123456789ab",
			"--output-format", "stream-json", "--verbose", "--model", "sonnet", "--dangerously-skip-permissions",
		},
		Env: []string{
			"ANTHROPIC_BASE_URL=http://127.0.0.1:8484", "ANTHROPIC_API_KEY=a-token", "IS_SANDBOX=1",
			"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1", "DISABLE_AUTOUPDATER=1",
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	waiting := func() bool {
		f, err := sb.Download(ctx, sandbox.Workspace+"/waiting")
		if err == nil {
			f.Close()
		} else if fault.KindOf(err) != fault.NotFound {
			t.Fatal(err)
		}
		return err == nil
	}
	for deadline := time.Now().Add(2 * time.Minute); !waiting(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("claude does not get there: %s", said(t, sb))
		}
	}
	if at == "model" {
		eventually(t, "claude has asked the model, who is slow", func() bool { return underway.Load() > 0 })
	}
	start := time.Now()
	forks, err := p.ForkLive(ctx, ref, []sandbox.Spec{spec("claude-1"), spec("claude-2"), spec("claude-3")})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("3 live forks of claude in %v", time.Since(start).Round(time.Millisecond))
	all := map[string]*attached{"parent": sb}
	for i, f := range forks {
		if f.Err != nil {
			t.Fatalf("fork %d: %v", i+1, f.Err)
		}
		all[fmt.Sprintf("fork %d", i+1)] = attach(t, p, f.Ref)
	}
	for name, sb := range all {
		if err := sb.Upload(ctx, sandbox.Home+"/name", strings.NewReader(name+"\n")); err != nil {
			t.Fatal(err)
		}
	}
	for name, sb := range all {
		proc, err := sb.Process(ctx, "agent")
		if err != nil {
			t.Fatal(err)
		}
		exit, err := proc.Wait(ctx)
		if err != nil || exit != (sandbox.Exit{}) {
			t.Errorf("%s: claude ended with %+v, %v\n%s", name, exit, err, said(t, sb))
			continue
		}
		if out := script(t, sb, "look", "cat said twice"); out != strings.TrimSpace(strings.Repeat(name+"\n", 3)) {
			t.Errorf("%s: claude has written %q", name, out)
		}
		turns, retries := told(t, said(t, sb))
		if turns != 3 {
			t.Errorf("%s: %d turns", name, turns)
		}
		t.Logf("%s: %d calls were tried again", name, retries)
	}
}

func said(t *testing.T, sb *attached) []byte {
	t.Helper()
	proc, err := sb.Process(t.Context(), "agent")
	if err != nil {
		t.Fatal(err)
	}
	out, err := sandbox.ReadAll(t.Context(), proc, sandbox.Stdout, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// told reads claude's stream of events, every line of which must be whole.
func told(t *testing.T, out []byte) (turns, retries int) {
	t.Helper()
	ends := 0
	for line := range bytes.Lines(out) {
		var e struct {
			Type, Subtype string
			Turns         int `json:"num_turns"`
		}
		if err := json.Unmarshal(line, &e); err != nil {
			t.Errorf("claude said %q: %v", line, err)
		}
		if e.Type == "result" {
			ends++
			turns = e.Turns
			if e.Subtype != "success" {
				t.Errorf("claude ended with %s", line)
			}
		}
		if e.Subtype == "api_retry" {
			retries++
		}
	}
	if ends != 1 {
		t.Errorf("claude ended %d times", ends)
	}
	return turns, retries
}
