package cli

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

func TestCleanupSaysWhatGoesWhyAndWhatItCosts(t *testing.T) {
	m := newMemory()
	s := newSession(t, m)
	price := fork.Dollar / 20
	born := time.Date(2026, 3, 4, 1, 0, 0, 0, time.UTC)
	m.swept = orchestrator.CleanupOutput{
		Found: 3, Removed: 2, Kept: map[string]int{"in use": 2, "of unknown age": 1},
		Items: []orchestrator.CleanupItem{
			{Kind: orchestrator.KindSandbox, Provider: "e2b", ID: "i1\x1b[2J", Run: testRun, ForkNum: 1, Since: born, Hourly: &price, Paused: true, Why: "its run ended", Removed: true},
			{Kind: orchestrator.KindBase, Provider: "local", ID: "base-1", Since: born, Bytes: 3 << 20, Why: "unused", Removed: true},
			{Kind: orchestrator.KindSandbox, Provider: "local", ID: "box", Since: born, Why: "its run ended", Kept: "busy"},
		},
	}
	s.want(t, exitOK, "cleanup", "--once", "--max-age", "0")
	if in := m.sweeps[0]; in.DryRun || in.MaxAge != 0 || m.cleanup {
		t.Errorf("%+v, scheduled %v", in, m.cleanup)
	}
	for _, want := range []string{"KIND", "$/H", "$0.05", "4h", "3.0 MiB", "left: busy", "its run ended; paused"} {
		if !strings.Contains(s.out.String(), want) {
			t.Errorf("no %q in\n%s", want, &s.out)
		}
	}
	if strings.Contains(s.out.String(), "\x1b") {
		t.Errorf("%q", &s.out)
	}
	if got, want := s.errors.String(), "2 things removed, 1 left, $0.0500 an hour; 2 kept: in use; 1 kept: of unknown age\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}

	// What could not be looked at is a failure, however it is printed.
	m.swept.Problems = []string{"the sandboxes of e2b could not be listed: outage"}
	s.want(t, exitFailed, "cleanup", "--dry-run")
	if in := m.sweeps[1]; !in.DryRun || in.MaxAge != 180*time.Minute {
		t.Errorf("%+v", in)
	}
	if got := s.errors.String(); !strings.Contains(got, "3 things would be removed") || !strings.Contains(got, "not done: the sandboxes of e2b") {
		t.Errorf("%q", got)
	}
	s.want(t, exitFailed, "cleanup", "--dry-run", "-o", "json")
	var out orchestrator.CleanupOutput
	if err := json.Unmarshal(s.out.Bytes(), &out); err != nil || !out.DryRun || len(out.Items) != 3 || *out.Items[0].Hourly != price || len(out.Problems) != 1 {
		t.Errorf("%s: %v", &s.out, err)
	}

	s.want(t, exitOK, "cleanup", "-o", "json")
	if !m.cleanup || !strings.Contains(s.out.String(), `"schedule_id": "sandbox-cleanup-scheduled"`) {
		t.Errorf("%s", &s.out)
	}
	if m.closed != 4 {
		t.Errorf("%d of 4 connections were closed", m.closed)
	}
}
