package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// says is a line of stream-json in which the model says text.
func says(text string) string {
	b, err := json.Marshal(text)
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf(`{"type":"assistant","message":{"id":"m1","model":"claude","role":"assistant","content":[{"type":"text","text":%s}]}}`, b) + "\n"
}

// logged is a session in which the forks of a run have these transcripts.
func logged(t *testing.T, m *memory, transcripts map[[2]int]string) (*session, *shelf) {
	t.Helper()
	m.order = []string{testRun}
	m.plans[testRun] = fork.Plan{Agent: "claude"}
	s := newSession(t, m)
	store := &shelf{transcripts: transcripts, grow: map[[2]int]string{}}
	s.env.Artifacts = func(context.Context, Globals) (Artifacts, error) { return store, nil }
	return s, store
}

func TestLogsOfOneFork(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Success, fork.Success)}
	s, _ := logged(t, m, map[[2]int]string{
		{1, 1}: says("one"), {2, 1}: says("two,\n\x1b[2Jin two lines") + `{"type":"assistant","message":{"content":[{"type":"tool_use","id":"t","name":"Bash","input":{"command":"go test ./..."}}]}}` + "\n" + says("half a li")[:20],
	})
	s.want(t, exitOK, "logs", "@last/2")
	if diff := cmp.Diff("two,\nin two lines\n> Bash go test ./...\n", s.out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	s.want(t, exitNotFound, "logs", "@last/3")
	if !strings.Contains(s.errors.String(), "has no fork 3\nIt has 2 forks.\n") {
		t.Errorf("stderr %s", &s.errors)
	}
}

func TestLogsOfARunSayWhoseTheyAre(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Success, fork.Running, fork.Pending)}
	s, _ := logged(t, m, map[[2]int]string{{1, 1}: says("one\nuno"), {2, 1}: says("two")})
	s.want(t, exitOK, "logs", "@last")
	if diff := cmp.Diff("1| one\n1| uno\n2| two\n", s.out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLogsBeforeTheFirstWord(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Running)}
	s, _ := logged(t, m, map[[2]int]string{})
	s.want(t, exitOK, "logs", "@last/1")
	if s.out.Len() > 0 || !strings.Contains(s.errors.String(), "nothing yet") {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
}

func TestLogsShowWhatTheSandboxWasNotLetReach(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Success)}
	s, store := logged(t, m, map[[2]int]string{{1, 1}: says("done")})
	store.refused = `{"time":"2026-11-23T12:00:00Z","host":"evil.example\u001b[31m","reason":"the host is not on the list"}` + "\n{cut"
	s.want(t, exitOK, "logs", "@last/1")
	if got := s.out.String(); !strings.Contains(got, "! no connection to evil.example") || !strings.Contains(got, "not on the list") || strings.Contains(got, "\x1b") {
		t.Errorf("printed %q", got)
	}
}

func TestLogsGoOnWithTheNextAttempt(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Success)}
	s, _ := logged(t, m, map[[2]int]string{{1, 1}: says("first") + says("cut off")[:60], {1, 2}: says("second"), {1, 3}: says("third")})
	s.want(t, exitOK, "logs", "@last/1")
	if diff := cmp.Diff("first\nsecond\nthird\n", s.out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLogsFollowUntilTheForkHasEnded(t *testing.T) {
	m := newMemory()
	m.script = []step{
		at(nil, fork.Running, fork.Pending), at(nil, fork.Running, fork.Running), at(nil, fork.Running, fork.Running),
		at(nil, fork.Success, fork.Running), // and so it stays: nobody waits for fork 2
	}
	first := says("a long line")
	s, store := logged(t, m, map[[2]int]string{{1, 1}: says("begun") + first[:30]})
	store.grow[[2]int{1, 1}] = first[30:] + says("done")
	s.want(t, exitOK, "logs", "@last/1", "--follow")
	if diff := cmp.Diff("begun\na long line\ndone\n", s.out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLogsFollowAWholeRun(t *testing.T) {
	m := twoForks()
	s, _ := logged(t, m, map[[2]int]string{{1, 1}: says("one"), {2, 1}: says("two")})
	s.want(t, exitOK, "logs", "@last", "-f")
	if diff := cmp.Diff("1| one\n2| two\n", s.out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLogsInterruptedDetach(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Running)}
	s, _ := logged(t, m, map[[2]int]string{{1, 1}: says("one")})
	ctx, cancel := context.WithCancel(t.Context())
	s.env.Stdout = writerFunc(func(b []byte) (int, error) {
		cancel()
		return s.out.Write(b)
	})
	s.env.Args = []string{"logs", "@last/1", "--follow"}
	if got := Main(ctx, s.env); got != exitDetached || !strings.Contains(s.errors.String(), "The run goes on.") {
		t.Errorf("exit %d, stderr %s", got, &s.errors)
	}
}

func TestRawLogsAreAsTheyWereWritten(t *testing.T) {
	raw := says("one") + "\x1b[2J no JSON\r\n" + "no end"
	m := newMemory()
	m.script = []step{at(nil, fork.Success, fork.Success)}
	s, _ := logged(t, m, map[[2]int]string{{1, 1}: raw})
	s.want(t, exitOK, "logs", "@last/1", "--raw")
	if s.out.String() != raw {
		t.Errorf("stdout %q, want %q", &s.out, raw)
	}
	s.env.IsTerminal = isTerminal(&s.out)
	s.want(t, exitOK, "logs", "@last/1", "--raw", "--color=never")
	if want := says("one") + " no JSON\nno end\n"; s.out.String() != want {
		t.Errorf("on a terminal %q, want %q", &s.out, want)
	}
	s.want(t, exitUsage, "logs", "@last", "--raw")
}

func TestLogsSayWhatTheStoreSays(t *testing.T) {
	m := newMemory()
	m.script = []step{at(nil, fork.Success)}
	s, _ := logged(t, m, nil)
	s.env.Artifacts = func(context.Context, Globals) (Artifacts, error) {
		return nil, fault.New("open artifacts", fault.Denied, "no key")
	}
	s.want(t, exitDenied, "logs", "@last/1")
	s.env.Artifacts = nil
	s.want(t, exitFailed, "logs", "@last/1")
	m.plans[testRun] = fork.Plan{Agent: "of a later version"}
	s.want(t, exitUsage, "logs", "@last/1")
}

func TestEveryKindOfEventIsTold(t *testing.T) {
	long := strings.Repeat("line\n", 40)
	for _, e := range []agent.Event{
		{Kind: agent.Started, Model: "claude"}, {Kind: agent.Text, Text: "x"}, {Kind: agent.Think, Text: "x"}, {Kind: agent.Tool, Tool: "Bash"},
		{Kind: agent.Output, Text: long, Failed: true}, {Kind: agent.Retry, Text: "429"}, {Kind: agent.Ended, End: &agent.Account{Error: true, Reason: "max_turns", Turns: 3}}, {Kind: agent.Ended},
	} {
		text, _ := describeEvent(e)
		if text == "" || strings.Count(text, "\n") > maxAnswer {
			t.Errorf("%s: %q", e.Kind, text)
		}
	}
	for _, e := range []agent.Event{{}, {Kind: agent.Other, Text: "x"}, {Kind: agent.Text}, {Kind: agent.Output}, {Kind: "later", Text: "x"}} {
		if text, _ := describeEvent(e); text != "" {
			t.Errorf("%+v: %q", e, text)
		}
	}
}

func TestDiff(t *testing.T) {
	m := ended(mixedReport())
	s := newSession(t, m)
	d := &desk{patch: "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+new \x1b[31mred\rforged\n context\r\n"}
	s.env.Work = func(context.Context, Globals) (Work, error) { return d, nil }
	s.want(t, exitOK, "diff", "@last/1")
	if s.out.String() != d.patch || !d.options.Binary || d.options.Stat {
		t.Errorf("stdout %q, options %+v", &s.out, d.options)
	}
	s.env.IsTerminal = isTerminal(&s.out)
	s.want(t, exitOK, "diff", "@last/1", "--color", "never")
	if want := "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+new red␍forged\n context\n"; s.out.String() != want || d.options.Binary {
		t.Errorf("stdout %q, want %q, options %+v", &s.out, want, d.options)
	}
	s.want(t, exitOK, "diff", "@last/1")
	if !strings.Contains(s.out.String(), "\x1b[32m+new red") {
		t.Errorf("stdout %q", &s.out)
	}
	s.want(t, exitOK, "diff", "@last/1", "--stat")
	if !d.options.Stat || bytes.Contains(s.out.Bytes(), []byte("\x1b[32m")) {
		t.Errorf("stdout %q, options %+v", &s.out, d.options)
	}
	s.want(t, exitOK, "diff", "@last/4")
	if s.out.Len() > 0 || !strings.Contains(s.errors.String(), "fork 4 of "+testRun+" changed nothing (success)") {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	s.want(t, exitNotFound, "diff", "@last/7")
	m.report.Results = m.report.Results[1:]
	s.want(t, exitFailed, "diff", "@last/1")
	if !strings.Contains(s.errors.String(), "has not ended") {
		t.Errorf("stderr %q", &s.errors)
	}
}

func TestApply(t *testing.T) {
	s := newSession(t, ended(mixedReport()))
	d := &desk{}
	s.env.Work = func(context.Context, Globals) (Work, error) { return d, nil }
	repo := newRepo(t, "main")
	s.want(t, exitOK, "apply", "@last/1", "--dir", repo)
	if strings.Contains(s.errors.String(), "verification") {
		t.Errorf("stderr %q", &s.errors)
	}
	if want := "Applied fork 1 of " + testRun + " in " + repo + ": 2 files, +42/-7\n"; s.out.String() != want {
		t.Errorf("stdout %q, want %q", &s.out, want)
	}
	t.Chdir(repo)
	s.want(t, exitOK, "apply", "@last/1")
	unverified := mixedReport()
	unverified.Results[0].Verify = &fork.Verify{Status: fork.Failed, ExitCode: 1}
	s.runs.report = unverified
	s.want(t, exitOK, "apply", "@last/1")
	if !strings.Contains(s.errors.String(), "logs "+testRun+"/1 --verify") {
		t.Errorf("stderr %q", &s.errors)
	}
	if want := slices.Repeat([]string{testRun + "/1 in " + repo}, 3); !cmp.Equal(d.applied, want) {
		t.Errorf("applied %q, want %q", d.applied, want)
	}
	d.err = fault.New("apply", fault.Conflict, "README was changed").Hinted("Commit or stash it.")
	s.want(t, exitFailed, "apply", "@last/1")
	if s.out.Len() > 0 || s.errors.String() != "sandbox-temporal: apply: README was changed\nCommit or stash it.\n" {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	none := t.TempDir()
	t.Setenv("GIT_CEILING_DIRECTORIES", none)
	s.want(t, exitNotFound, "apply", "@last/1", "--dir", none)
}
