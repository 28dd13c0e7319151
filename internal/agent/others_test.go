package agent_test

import (
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"context"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// These tests run the real Codex and opencode CLIs against the stand-in.

// native returns the native program of an npm package, or skips.
func native(t *testing.T, variable, pattern string) string {
	t.Helper()
	if path := os.Getenv(variable); path != "" {
		return path
	}
	found, err := filepath.Glob(filepath.Join("..", "..", "tests", "node_modules", pattern))
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Skipf("it is not installed: run make test, or set %s to its native program", variable)
	}
	path, err := filepath.Abs(found[0])
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// attempt is what came of one start of an agent, and how often the model had
// been asked at its end.
type attempt struct {
	sum   agent.Summary
	out   agent.Outcome
	file  string // what stood in the agent's file at its end
	asked int
}

// runAgent carries out a spec on a machine of its own. The attempts after the
// first one go on with its session.
func runAgent(t *testing.T, ag agent.Agent, program, prompt, model string, attempts int) (all []attempt) {
	t.Helper()
	scripts, err := standin.ParseScripts(strings.NewReader(`{
		"write": {"steps": [
			{"text": "I write.", "tools": [{"name": "bash", "input": {"command": "echo more >> a.txt", "description": "write"}}]},
			{"text": "I wrote."}]},
		"poor": {"steps": [{"text": "never", "faults": [{"kind": "status", "status": 402, "message": "The budget is used up.", "times": -1, "headers": {"x-should-retry": "false"}}]}]}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	model2 := standin.New(standin.Options{Scripts: scripts, Keys: []string{token}})
	server := httptest.NewServer(model2)
	defer server.Close()
	defer model2.Close()
	root := t.TempDir()
	for _, d := range []string{"home", "workspace", "tmp", "bin"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(program, filepath.Join(root, "bin", ag.Program().Name)); err != nil {
		t.Fatal(err)
	}
	task := filepath.Join(root, "task")
	if err := os.WriteFile(task, []byte(prompt), 0o600); err != nil {
		t.Fatal(err)
	}
	for n := range attempts {
		spec := agent.Spec{Task: prompt, TaskFile: task, Model: model, ModelID: model, Session: session, Resume: n > 0, BaseURL: server.URL, Token: token}
		if err := ag.Check(spec); err != nil {
			t.Fatal(err)
		}
		c := ag.Command(spec)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		name := c.Args[0]
		if !strings.HasPrefix(name, "/") {
			name = filepath.Join(root, "bin", name)
		}
		cmd := exec.CommandContext(ctx, name, c.Args[1:]...)
		cmd.Dir = filepath.Join(root, "workspace")
		cmd.Env = []string{"PATH=" + filepath.Join(root, "bin") + ":/usr/bin:/bin", "HOME=" + filepath.Join(root, "home"), "TMPDIR=" + filepath.Join(root, "tmp")}
		for _, kv := range c.Env {
			cmd.Env = append(cmd.Env, strings.ReplaceAll(kv, "/home/agent", filepath.Join(root, "home")))
		}
		if c.Stdin != "" {
			f, err := os.Open(c.Stdin)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cmd.Stdin = f
		}
		cmd.WaitDelay = 5 * time.Second
		var stderr strings.Builder
		cmd.Stderr = &stderr
		stdout, _ := cmd.Output() // the exit code is judged below
		if ctx.Err() != nil {
			t.Fatalf("it did not end\n%s\n%s", stdout, stderr.String())
		}
		var lines agent.Lines
		var a attempt
		take := func(line []byte) {
			for _, e := range ag.Decode(line) {
				a.sum.Add(e)
			}
		}
		lines.Feed(stdout, take)
		lines.Flush(take)
		a.out = ag.Judge(a.sum, stderr.String(), cmd.ProcessState.ExitCode())
		file, _ := os.ReadFile(filepath.Join(root, "workspace", "a.txt")) // there may be none
		a.file, a.asked = string(file), len(model2.Requests())
		all = append(all, a)
		t.Logf("exit %d\n%s\n%s", cmd.ProcessState.ExitCode(), stdout, stderr.String())
	}
	return all
}

func others(t *testing.T, f func(t *testing.T, ag agent.Agent, program, model string)) {
	t.Run("codex", func(t *testing.T) {
		f(t, agent.Codex{}, native(t, "SANDBOX_TEMPORAL_CODEX", "@openai/codex-linux-*/vendor/*/bin/codex"), "gpt-6.1-sol")
	})
	t.Run("opencode", func(t *testing.T) {
		f(t, agent.OpenCode{}, native(t, "SANDBOX_TEMPORAL_OPENCODE", "opencode-linux-*/bin/opencode"), "claude-sonnet-5-5")
	})
}

func TestOtherAgentsDoTheWorkAndGoOnWithTheirSession(t *testing.T) {
	others(t, func(t *testing.T, ag agent.Agent, program, model string) {
		all := runAgent(t, ag, program, "Play @script write", model, 2)
		first, second := all[0], all[1]
		if first.out.Status != fork.Success || !strings.Contains(first.out.Text, "I wrote.") || first.sum.Turns == 0 {
			t.Errorf("%+v of %+v", first.out, first.sum)
		}
		if first.file != "more\n" {
			t.Errorf("the file holds %q", first.file)
		}
		if first.asked < 2 {
			t.Errorf("the model was asked %d times", first.asked)
		}
		if second.out.Status != fork.Success {
			t.Errorf("%+v", second.out)
		}
		if second.file != "more\n" {
			t.Errorf("the file holds %q: the work was done again", second.file)
		}
	})
}

func TestOtherAgentsSayWhyTheyFailed(t *testing.T) {
	others(t, func(t *testing.T, ag agent.Agent, program, model string) {
		out := runAgent(t, ag, program, "Play @script poor", model, 1)[0].out
		if out.Status == fork.Success || !strings.Contains(out.Error, "budget is used up") {
			t.Errorf("%+v", out)
		}
	})
}
