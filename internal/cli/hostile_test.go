package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	tea "github.com/charmbracelet/bubbletea"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// hostile is what a terminal would obey, or show as something else: each in
// another form.
var hostile = []string{
	"\x1b[2J", "\x1b[31mred\x1b[0m", "\x1b[1;1Hover", "\x1b[?1049h", "\x1b[6n", "\x1b[21t", "\x1bc", "\x1b#8", "\x1b(0", "\x1b", // CSI and other escapes
	"\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07", "\x1b]52;c;?\x1b\\", "\x1b]8;;https://evil.example/\x1b\\click\x1b]8;;\x1b\\", "\x1b]1337;File=inline=1:AAAA\x07", "\x1b]9;4;1;50\x1b\\", // OSC: title, clipboard, links, files
	"\x1bP+q544e\x1b\\", "\x1b_Gf=24;AAAA\x1b\\", "\x1b^private\x1b\\", "\x1bXstring\x1b\\", // DCS, APC, PM, SOS
	"\u009b31m", "\u009d52;c;ZXZpbA==\u009c", "\u0090q\u009c", "\u0085", // C1, as characters
	"\x9b31m", "\x9d0;title\x9c", "\x90q\x9c", "\x85", // C1, as bytes: no UTF-8
	"\x1b]0;no end", "\u009d52;c;no end", "\x1b[", "\x1b]8;;https://evil.example/\x07", // cut off
	"a\rb", "a\bb", "a\vb", "a\fb", "a\ab", "a\x00b", "\x7f", "\u2028", "\u2029",
	"\u202eevil", "\u2066x\u2069", "\u200e\u200f\u061c", "\U000e0041\U000e007f", // turned, and hidden
	"\xff\xfe", "\xc3", "\xed\xa0\x80", "\xf8\x88\x80\x80\x80", "\xc0\x9b31m", "\xe0\x82\x9b31m", // no UTF-8, also of what would be a control
}

// An agent's words, and the names in a stranger's repository, reach the
// terminal in many places. Nowhere may they bring a character that a terminal
// obeys.
func FuzzHostileTextIsHarmlessWhereverItIsShown(f *testing.F) {
	for _, s := range append(hostile, "plain", "a\nb\tc", strings.Repeat("日", 300)) {
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

// TestEveryCommandShowsHostileTextHarmlessly goes through the commands as a
// user does, on a terminal, with hostile text wherever a stranger can put it:
// in what the agent said, in names of files, branches and runs, in errors.
func TestEveryCommandShowsHostileTextHarmlessly(t *testing.T) {
	work := newRepo(t, "main")
	for _, evil := range hostile {
		rep := mixedReport()
		rep.Run, rep.Name, rep.Repo, rep.Error, rep.Hint = evil, evil, evil, evil, evil
		for i := range rep.Results {
			r := &rep.Results[i]
			r.Branch, r.Error, r.Hint, r.Output, r.Model, r.SandboxID = evil, evil+r.Error, evil, evil, evil, evil
		}
		for _, row := range [][]string{
			{"status", "@last"}, {"status", "@last", "-o", "json"}, {"list"}, {"list", "-o", "json"},
			{"logs", "@last"}, {"logs", "@last/1"}, {"logs", "@last/1", "--raw"}, {"logs", "@last", "--follow"},
			{"diff", "@last/1"}, {"diff", "@last/1", "--stat"}, {"diff", "@last/4"}, {"apply", "@last/1", "--dir", work},
			{"pause", "@last"}, {"resume", "@last"}, {"cancel", "@last"}, {"cancel", "@last/1"}, {"status", "@last/" + evil}, {evil}, {"diff", evil + "/1"},
		} {
			m := ended(rep)
			if row[0] == "cancel" { // there is more to say of a run that goes on
				m = newMemory()
				m.report = rep
				m.script = []step{at(nil, fork.Running, fork.Running)}
				m.script[0].p.Run = evil
			}
			m.order = []string{evil}
			m.plans[evil] = fork.Plan{Agent: "claude"}
			m.infos = []orchestrator.RunInfo{{Run: evil, Name: evil, Repo: evil, Model: evil, Status: fork.Failed}}
			s := newSession(t, m)
			s.env.IsTerminal = func(any) bool { return true }
			s.vars["NO_COLOR"] = "1" // the colours are ours
			shelf := &shelf{grow: map[[2]int]string{}, transcripts: map[[2]int]string{{1, 1}: says(evil) + evil + "\n" + says("a\n"+evil), {2, 1}: evil}}
			s.env.Artifacts = func(context.Context, Globals) (Artifacts, error) { return shelf, nil }
			d := &desk{patch: "diff --git a/" + evil + " b/x\n+++ b/" + evil + "\n+" + evil + "\n"}
			s.env.Work = func(context.Context, Globals) (Work, error) { return d, nil }
			s.run(t, row...)
			if s.out.Len()+s.errors.Len() == 0 {
				t.Errorf("%q says nothing", row)
			}
			harmless(t, fmt.Sprintf("%q with %q", row, evil), s.out.String()+s.errors.String(), -1)
		}
	}
}

// harmless fails when text holds what a terminal obeys, or more lines than
// were asked for.
func harmless(t *testing.T, where, text string, lines int) {
	t.Helper()
	if i := strings.IndexFunc(text, func(r rune) bool {
		return r < 0x20 && r != '\n' && r != '\t' || r >= 0x7f && r <= 0x9f || r == 0x61c || r == 0x200e || r == 0x200f ||
			r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r >= 0xe0000 && r <= 0xe007f
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
