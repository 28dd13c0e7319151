package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// TestRecordingsOfOtherAgentsAreUnderstood reads what the real programs wrote,
// see the versions in codex.go and opencode.go.
func TestRecordingsOfOtherAgentsAreUnderstood(t *testing.T) {
	for _, row := range []struct {
		agent  Agent
		file   string
		exit   int
		status fork.Status
		text   string // of the outcome, or of its error
		turns  int
		action string
	}{
		{Codex{}, "success", 0, fork.Success, "I wrote.", 3, "I wrote."},
		{Codex{}, "success", 1, fork.Failed, "codex exited with code 1 and without a result", 3, "I wrote."},
		{Codex{}, "refused", 1, fork.Failed, "unexpected status 402 Payment Required: The budget is used up., url: http://127.0.0.1:8484/v1/responses", 0, "retrying: unexpected status 402 Payment Required: The budget is used up., url: http://127.0.0.1:8484/v1/responses"},
		{OpenCode{}, "success", 0, fork.Success, "I wrote.", 2, "I wrote."},
		{OpenCode{}, "refused", 1, fork.BudgetExceeded, "The budget is used up.", 0, ""},
	} {
		b, err := os.ReadFile(filepath.Join("testdata", row.agent.Name(), row.file+".jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		var sum Summary
		for line := range bytes.Lines(b) {
			for _, e := range row.agent.Decode(line) {
				sum.Add(e)
			}
		}
		out := row.agent.Judge(sum, "", row.exit)
		text := out.Error
		if out.Status == fork.Success {
			text = out.Text
		}
		if out.Status != row.status || text != row.text || sum.Turns != row.turns || sum.Action != row.action || sum.Session == "" {
			t.Errorf("%s/%s, exit %d: %+v of %+v", row.agent.Name(), row.file, row.exit, out, sum)
		}
	}
}

// FuzzOtherAgents reads what a stranger may print in their place.
func FuzzOtherAgents(f *testing.F) {
	for _, name := range []string{"codex", "opencode"} {
		for _, file := range []string{"success", "refused"} {
			b, err := os.ReadFile(filepath.Join("testdata", name, file+".jsonl"))
			if err != nil {
				f.Fatal(err)
			}
			for line := range bytes.Lines(b) {
				f.Add(line)
			}
		}
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		for _, a := range []Agent{Codex{}, OpenCode{}} {
			for _, e := range a.Decode(line) {
				if len(e.Text) > maxEventText || len(e.Tool) > maxEventText {
					t.Errorf("%s: an event of %d bytes", a.Name(), len(e.Text))
				}
				var s Summary
				s.Add(e)
				a.Judge(s, "", 1)
			}
		}
	})
}
