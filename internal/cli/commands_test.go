package cli

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

func TestPauseResumeAndCancelAnswerWhenDone(t *testing.T) {
	m := newMemory()
	m.order = []string{testRun, "sandbox-orch-01999999"}
	m.report.Progress = at(nil, fork.Success, fork.Running, fork.Pending).p
	s := newSession(t, m)
	s.want(t, exitOK, "pause", testRun)
	if want := testRun + ": running · 1 of 3 succeeded · 1 running · 1 pending · $0.0000 · 0s\n"; s.out.String() != want {
		t.Errorf("stdout %q, want %q", &s.out, want)
	}
	s.want(t, exitOK, "resume", "@last")
	s.want(t, exitOK, "cancel", "0123")
	s.want(t, exitOK, "cancel", "0123/2")
	want := []string{"pause " + testRun, "resume sandbox-orch-01999999", "cancel " + testRun, "cancel " + testRun + "/2"}
	if diff := cmp.Diff(want, m.done); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	s.want(t, exitUsage, "cancel", "01") // which of the two?
	s.want(t, exitNotFound, "cancel", "ffff")
	s.want(t, exitNotFound, "cancel", "0123/4")
	s.want(t, exitOK, "cancel", "0123/1")
	if !strings.Contains(s.errors.String(), "fork 1 has ended already: success") || len(m.done) != len(want) {
		t.Errorf("stderr %q, done %q", &s.errors, m.done)
	}
	if m.closed != 8 {
		t.Errorf("%d connections were closed", m.closed)
	}
}

func TestCancelOfWhatHasEndedIsNoError(t *testing.T) {
	s := newSession(t, ended(mixedReport()))
	s.want(t, exitOK, "cancel", "@last")
	if len(s.runs.done) > 0 || !strings.Contains(s.errors.String(), "has ended already: failed") {
		t.Errorf("done %q, stderr %q", s.runs.done, &s.errors)
	}
}

func TestCleanup(t *testing.T) {
	s := newSession(t, newMemory())
	s.want(t, exitOK, "cleanup")
	if got, want := s.runs.pause, [2]time.Duration{15 * time.Minute, 3 * time.Hour}; got != want {
		t.Errorf("%v, want %v", got, want)
	}
	s.want(t, exitOK, "cleanup", "--interval", "1", "--max-age", "2")
	if got, want := s.runs.pause, [2]time.Duration{time.Minute, 2 * time.Minute}; got != want {
		t.Errorf("%v, want %v", got, want)
	}
	s.want(t, exitOK, "stop-cleanup")
	s.want(t, exitNotFound, "stop-cleanup")
}

func TestDoctorFailsWhenSomethingIsBad(t *testing.T) {
	s := newSession(t, newMemory())
	found := []Finding{{"isolation", Good, "namespaces", ""}, {"claude", Poor, "not on PATH", "Install it."}}
	s.env.Doctor = func(_ context.Context, g Globals) []Finding {
		if g.Config == nil {
			t.Error("no configuration")
		}
		return found
	}
	s.want(t, exitOK, "doctor")
	text := s.out.String()
	if !strings.Contains(text, "ok       git            git version") || !strings.HasSuffix(text, "warning  claude         not on PATH\n                        Install it.\n") {
		t.Errorf("stdout:\n%s", text)
	}
	found = append(found, Finding{"key", Bad, "none", "Set ANTHROPIC_API_KEY."})
	s.want(t, exitFailed, "doctor")
	s.want(t, exitFailed, "doctor", "-o", "json")
	var got []Finding
	if err := json.Unmarshal(s.out.Bytes(), &got); err != nil || len(got) != 5 || got[4] != found[2] {
		t.Errorf("%v, %+v", err, got)
	}
}

func TestDoctorFindsABrokenConfiguration(t *testing.T) {
	s := newSession(t, newMemory())
	s.vars["SANDBOX_TEMPORAL_CONFIG"] = filepath.Join(t.TempDir(), "none.toml")
	s.want(t, exitFailed, "doctor")
	if !strings.Contains(s.out.String(), "problem  configuration  configuration: open ") {
		t.Errorf("stdout:\n%s", &s.out)
	}
}

func TestDoctorFindsAnOldGit(t *testing.T) {
	for said, want := range map[string]Health{"git version 2.39.0": Good, "git version 2.38.9": Bad, "git version 1.99": Bad, "git version 3.0.1 (Apple)": Good, "gut version 3": Poor} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "git"), "#!/bin/sh\necho '"+said+"'\n")
		if err := os.Chmod(filepath.Join(dir, "git"), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", dir)
		if got := checkGit(t.Context()); got.Health != want {
			t.Errorf("%s: %+v", said, got)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if got := checkGit(t.Context()); got.Health != Bad || got.Hint == "" {
		t.Errorf("no git: %+v", got)
	}
}

func TestPrices(t *testing.T) {
	s := newSession(t, newMemory())
	s.want(t, exitOK, "prices")
	if !strings.Contains(s.out.String(), "sonnet") || !strings.Contains(s.out.String(), "US dollars per million tokens, 50 % of it in message batches") {
		t.Errorf("stdout:\n%s", &s.out)
	}
	s.want(t, exitOK, "prices", "-o", "json")
	var got struct {
		Batch  float64
		Models []struct{ ID string }
	}
	if err := json.Unmarshal(s.out.Bytes(), &got); err != nil || len(got.Models) == 0 || got.Batch != 0.5 {
		t.Errorf("%v: %s", err, &s.out)
	}
	s.vars["SANDBOX_TEMPORAL_PRICES"] = filepath.Join(t.TempDir(), "none.json")
	s.want(t, exitUsage, "prices")
	for u, want := range map[fork.USD]string{3 * fork.Dollar: "$3.00", fork.Dollar / 10: "$0.10", 18_750_000_000: "$18.75", 125_000_000: "$0.125"} {
		if got := perMillion(u); got != want {
			t.Errorf("perMillion(%d) = %s, want %s", int64(u), got, want)
		}
	}
}

func TestConfigExplain(t *testing.T) {
	s := newSession(t, newMemory())
	s.vars["TEMPORAL_NAMESPACE"] = "team"
	s.vars["ANTHROPIC_API_KEY"] = "sk-very-secret"
	s.want(t, exitOK, "config", "explain", "--address", "temporal.example.com:7233", "-o", "json")
	var got []struct{ Key, Value, Source string }
	if err := json.Unmarshal(s.out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for _, g := range got {
		seen[g.Key] = g.Value + " from " + g.Source
	}
	for key, want := range map[string]string{"temporal_address": "temporal.example.com:7233 from flag --address", "namespace": "team from environment TEMPORAL_NAMESPACE", "fork.forks": "1 from default"} {
		if seen[key] != want {
			t.Errorf("%s: %q, want %q", key, seen[key], want)
		}
	}
	s.want(t, exitOK, "config", "explain")
	if strings.Contains(s.out.String(), "secret") || !strings.Contains(s.out.String(), "environment TEMPORAL_NAMESPACE") {
		t.Errorf("stdout:\n%s", &s.out)
	}
}

func TestCommandsOfMainAreThere(t *testing.T) {
	s := newSession(t, newMemory())
	s.env.Commands = []func(*Env) *cobra.Command{func(env *Env) *cobra.Command {
		cmd := &cobra.Command{Use: "up", Short: "Start", GroupID: groupService, Args: args(), Annotations: settings("port"), RunE: func(cmd *cobra.Command, _ []string) error {
			if env.Globals.Config.Port != 1234 {
				t.Errorf("port %d", env.Globals.Config.Port)
			}
			return fault.New("up", fault.Conflict, "it runs")
		}}
		cmd.Flags().String("port", "7233", "the port")
		return cmd
	}}
	s.want(t, exitFailed, "up", "--port", "1234")
	s.want(t, exitUsage, "up", "--port", "no")
}

func TestCompletionOfRunsNeverStartsAnEngine(t *testing.T) {
	m := newMemory()
	m.infos = []orchestrator.RunInfo{{Run: testRun, Status: fork.Running, Name: "mine"}, {Run: "sandbox-orch-ffffffff", Status: fork.Success}}
	s := newSession(t, m)
	s.env.Runs = func(_ context.Context, g Globals) (Runs, error) {
		if !g.NoStart {
			t.Error("a key press would start an engine")
		}
		return m, nil
	}
	s.want(t, exitOK, "__complete", "status", "")
	if want := "@last\tthe newest run\n" + testRun + "\trunning mine\nsandbox-orch-ffffffff\tsuccess\n:4\n"; s.out.String() != want {
		t.Errorf("stdout %q, want %q", &s.out, want)
	}
	s.want(t, exitOK, "__complete", "cancel", "sand")
	if strings.Contains(s.out.String(), "ffffffff") || !strings.Contains(s.out.String(), testRun) {
		t.Errorf("stdout %q", &s.out)
	}
	s.env.Runs = func(context.Context, Globals) (Runs, error) {
		return nil, fault.New("", fault.Unreachable, "no engine")
	}
	s.want(t, exitOK, "__complete", "status", "")
	if s.out.String() != ":4\n" {
		t.Errorf("stdout %q", &s.out)
	}
	s.want(t, exitOK, "__complete", "fork", "--model", "")
	if !strings.Contains(s.out.String(), "sonnet\n") {
		t.Errorf("stdout %q", &s.out)
	}
	s.want(t, exitOK, "__complete", "help", "ex")
	if !strings.Contains(s.out.String(), "exit-codes") {
		t.Errorf("stdout %q", &s.out)
	}
}
