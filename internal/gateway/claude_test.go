package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// realClaude returns the Claude Code program, or skips the test.
func realClaude(t *testing.T) string {
	t.Helper()
	p := os.Getenv("SANDBOX_TEMPORAL_CLAUDE")
	if p == "" {
		p = "../../tests/node_modules/@anthropic-ai/claude-code-linux-x64/claude"
	}
	p, err := filepath.Abs(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Skip("the real Claude Code is not installed: run make tools, or set SANDBOX_TEMPORAL_CLAUDE")
	}
	return p
}

// The ledger and Claude Code agree to the last digit, also about sub-agents and
// about sessions that were resumed and forked: those tell what went before them
// too, which is another account's.
func TestLedgerAgreesWithTheRealClaudeToTheLastDigit(t *testing.T) {
	claude := realClaude(t)
	scripts, err := standin.ParseScripts(strings.NewReader(`{
		"lead": {"steps": [
			{"text": "I ask a helper.", "tools": [{"name": "Agent", "input": {"description": "help", "prompt": "Play @script helper", "subagent_type": "general-purpose"}}]},
			{"text": "The helper has helped.", "output_tokens": 333}]},
		"helper": {"steps": [
			{"text": "I look.", "tools": [{"name": "Bash", "input": {"command": "echo looked", "description": "look"}}]},
			{"text": "I have looked.", "output_tokens": 77}]},
		"more": {"steps": [{"text": "There is more to say.", "output_tokens": 123}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	model := standin.New(standin.Options{Scripts: scripts, Keys: []string{realKey}})
	api := httptest.NewServer(model)
	defer api.Close()
	defer model.Close() // before api.Close, which waits for calls
	r := openRig(t, t.TempDir(), &upstream{Server: api})
	home, dir := t.TempDir(), t.TempDir()

	const session = "00000000-0000-4000-8000-000000000001"
	before := 0.0
	for i, step := range []struct {
		name   string
		prompt string
		args   []string
		calls  int // at least
	}{
		{"with a sub-agent", "Play @script lead", []string{"--session-id", session}, 4},
		{"resumed", "Play @script more", []string{"--resume", session}, 1},
		{"forked", "Play @script more", []string{"--resume", session, "--fork-session"}, 1},
	} {
		token := r.grant(Account{Run: "r", Fork: i + 1, RunBudget: 20 * fork.Dollar})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		cmd := exec.CommandContext(ctx, claude, append([]string{"-p", step.prompt, "--output-format", "stream-json", "--verbose", "--model", "sonnet", "--dangerously-skip-permissions"}, step.args...)...)
		cmd.Dir, cmd.WaitDelay = dir, 5*time.Second
		cmd.Env = []string{
			"PATH=" + os.Getenv("PATH"), "HOME=" + home, "CLAUDE_CONFIG_DIR=" + filepath.Join(home, "claude"), "CLAUDE_CODE_TMPDIR=" + home, "IS_SANDBOX=1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1",
			"DISABLE_AUTOUPDATER=1", "CLAUDE_CODE_MAX_OUTPUT_TOKENS=32000", "ANTHROPIC_BASE_URL=" + r.url, "ANTHROPIC_API_KEY=" + token,
		}
		out, err := cmd.Output()
		cancel()
		if err != nil {
			t.Fatalf("%s: %v\n%s", step.name, err, out)
		}
		total := -1.0
		for line := range bytes.Lines(out) {
			var e struct {
				Type string
				Cost float64 `json:"total_cost_usd"`
			}
			if json.Unmarshal(line, &e) == nil && e.Type == "result" {
				total = e.Cost // the last one counts
			}
		}
		r.idle("r")
		got := r.usage("r", i+1)
		// Nano-dollars are all digits there are: prices are per million tokens.
		if said := fork.USD(math.Round((total - before) * float64(fork.Dollar))); total <= 0 || got.Cost != said || got.Calls < step.calls {
			t.Errorf("%s: the ledger says %s after %d calls, Claude Code %s", step.name, got.Cost, got.Calls, said)
		}
		t.Log(step.name, got.Cost, got.Calls, fmt.Sprintf("%.9f", total))
		if i == 0 || i == 1 {
			before = total
		}
	}
}
