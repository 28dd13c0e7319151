package cli

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	tea "github.com/charmbracelet/bubbletea"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// An agent's words, and the names in a stranger's repository, reach the
// terminal in many places. Nowhere may they bring a character that a terminal
// obeys.
func FuzzHostileTextIsHarmlessWhereverItIsShown(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[2J", "\x1b]0;title\x07", "\u009b31m", "a\rb", "a\nb\tc", "\xff\xfe", "\u202eevil", "\U000e0041", strings.Repeat("日", 300), "\x7f", "\u2028"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, evil string) {
		rep := mixedReport()
		rep.Run, rep.Name, rep.Repo, rep.Status, rep.Error, rep.Hint = evil, evil, evil, fork.Status(evil), evil, evil
		for i := range rep.Results {
			r := &rep.Results[i]
			r.Status, r.Branch, r.Error, r.Hint, r.Output, r.Model, r.Commit = fork.Status(evil), evil, evil+r.Error, evil, evil, evil, evil
			rep.Statuses[i] = fork.Status(evil)
		}
		live := map[int]fork.Live{1: {Phase: evil, Action: evil, Turns: 1, Cost: 1}, 2: {Phase: "agent", Action: evil}}
		running := at(live, fork.Running, fork.Running, fork.Status(evil))
		running.p.Run = evil

		for _, output := range []string{"table", "json"} {
			s := newSession(t, ended(rep))
			s.env.complete()
			if err := printReport(s.env.complete(), rep, live, output); err != nil {
				t.Fatal(err)
			}
			s.out.WriteString(heading(false, rep))
			harmless(t, output, s.out.String()+s.errors.String(), -1)
		}
		s := newSession(t, newMemory())
		s.runs.infos = []orchestrator.RunInfo{{Run: evil, Name: evil, Repo: evil, Model: evil, Status: fork.Status(evil)}}
		s.want(t, exitOK, "list")
		harmless(t, "list", s.out.String(), 2)
		s.runs.failure = fault.New(evil, fault.Internal, "%s", evil).Hinted("%s", evil)
		s.want(t, exitFailed, "list")
		harmless(t, "error", s.errors.String(), -1)

		m, _ := feed(t, newLiveModel(false), tea.WindowSizeMsg{Width: 70, Height: 10}, sight{Progress: running.p, Live: live, Trouble: flat(evil)})
		harmless(t, "live view", m.View(), 4)
		var out bytes.Buffer
		l := newLines(&out)
		l.show(sight{Progress: running.p, Live: live})
		l.flush()
		harmless(t, "lines", out.String(), 3)

		for _, kind := range []agent.Kind{agent.Started, agent.Text, agent.Think, agent.Tool, agent.Output, agent.Retry, agent.Ended, agent.Other} {
			text, _ := describeEvent(agent.Event{Kind: kind, Text: evil, Tool: evil, Model: evil, Nested: true, End: &agent.Account{Error: true, Reason: evil, Text: evil}})
			harmless(t, string(kind), text, -1)
		}
		out.Reset()
		c := &diffCleaner{w: &out}
		if _, err := c.Write([]byte("+" + evil + "\n")); err != nil {
			t.Fatal(err)
		}
		harmless(t, "diff", out.String(), 1+strings.Count(evil, "\n"))
	})
}

// harmless fails when text holds what a terminal obeys, or more lines than
// were asked for.
func harmless(t *testing.T, where, text string, lines int) {
	t.Helper()
	if i := strings.IndexFunc(text, func(r rune) bool {
		return r < 0x20 && r != '\n' && r != '\t' || r >= 0x7f && r <= 0x9f || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r >= 0xe0000 && r <= 0xe007f
	}); i >= 0 {
		t.Errorf("%s: a terminal would obey %q", where, text[i:min(len(text), i+20)])
	}
	if !utf8.ValidString(text) {
		t.Errorf("%s: not UTF-8: %q", where, text)
	}
	if n := strings.Count(text, "\n"); lines >= 0 && n > lines {
		t.Errorf("%s: %d lines, want %d at most: %q", where, n, lines, text)
	}
}

// JSON is for programs: what is harmless to look at must still be the same.
func FuzzJSONKeepsEveryCharacter(f *testing.F) {
	for _, s := range []string{"plain", "<a href=\"x\">&</a>", "\x1b\u009b\x7f\u202e\U000e0041\u2028", "日本語 \\ \"", "\U0010ffff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		s = strings.ToValidUTF8(s, "?")
		var out bytes.Buffer
		if err := writeJSON(&out, map[string]string{"x": s}); err != nil {
			t.Fatal(err)
		}
		var got map[string]string
		if err := json.Unmarshal(out.Bytes(), &got); err != nil || got["x"] != s {
			t.Errorf("%q came back as %q from %q: %v", s, got["x"], out.String(), err)
		}
		harmless(t, "JSON", out.String(), 3)
	})
}
