package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// at is a step of a run whose forks stand so.
func at(live map[int]fork.Live, statuses ...fork.Status) step {
	p := fork.Progress{Run: testRun, Repo: remote, Status: fork.Running, Total: len(statuses), Statuses: statuses}
	for i, s := range statuses {
		switch s {
		case fork.Pending:
			p.Pending++
		case fork.Running:
			p.Running++
			p.Active = append(p.Active, i+1)
		case fork.Success:
			p.Success++
		default:
			p.Failed++
		}
	}
	if p.Pending+p.Running == 0 {
		p.Status = fork.Success
		if p.Failed > 0 {
			p.Status = fork.Failed
		}
	}
	return step{p: p, live: live}
}

func working(turns int, cost fork.USD, action string) fork.Live {
	return fork.Live{Phase: "agent", Turns: turns, Cost: cost, Action: action}
}

// twoForks is a run of two forks that both succeed.
func twoForks() *memory {
	m := newMemory()
	m.script = []step{
		at(nil, fork.Pending, fork.Pending),
		at(map[int]fork.Live{1: {Phase: "create"}}, fork.Running, fork.Pending),
		at(map[int]fork.Live{1: working(1, 12_300_000, "Bash go test ./...")}, fork.Running, fork.Running),
		at(map[int]fork.Live{1: working(1, 12_300_000, "Bash go test ./..."), 2: working(4, 0, "thinking")}, fork.Running, fork.Running),
		at(map[int]fork.Live{2: {Phase: "collect_result", Turns: 5, Cost: 20_000_000}}, fork.Success, fork.Running),
		at(nil, fork.Success, fork.Success),
	}
	m.report = fork.Report{
		Progress: m.script[len(m.script)-1].p,
		Results: []fork.Result{
			{ForkNum: 1, Status: fork.Success, Commit: "c1", Branch: "sandbox/x/1", FilesChanged: 1, Insertions: 2, Usage: fork.Usage{Cost: 15_000_000}, NumTurns: 2, Duration: 3},
			{ForkNum: 2, Status: fork.Success, Usage: fork.Usage{Cost: 20_000_000}, NumTurns: 5, Duration: 4},
		},
	}
	m.report.Run = ""
	m.report.Cost, m.report.Duration = 35_000_000, 7
	return m
}

func TestForkWaitsShowsWhatChangesAndReports(t *testing.T) {
	s := newSession(t, twoForks())
	s.want(t, exitOK, "fork", remote, "--prompt", "x", "--forks", "2")
	id := s.runs.order[0]
	hide := func(b bytes.Buffer) string { return strings.ReplaceAll(b.String(), id, testRun) }
	want := testRun + `: 2 forks of https://example.com/user/repo · model sonnet · provider local
fork 1: running · creating its sandbox
fork 1: running · turn 1 · $0.0123 · Bash go test ./...
fork 2: running
fork 2: running · turn 4 · thinking
fork 1: success
fork 2: running · turn 5 · $0.0200 · collecting its work
fork 2: success

Look at one:  sandbox-temporal diff ` + testRun + `/1
Take one:     sandbox-temporal apply ` + testRun + `/1
`
	if diff := cmp.Diff(want, hide(s.errors)); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
	golden(t, "fork-wait.golden", []byte(hide(s.out)))
	if s.runs.closed != 1 {
		t.Errorf("the connection was closed %d times", s.runs.closed)
	}
}

func TestForkExitsAsTheRunEnded(t *testing.T) {
	m := twoForks()
	m.report.Status, m.report.Results[0].Status = fork.BudgetExceeded, fork.BudgetExceeded
	s := newSession(t, m)
	s.want(t, exitBudget, "fork", remote, "--prompt", "x", "--forks", "2", "-o", "json")
	if strings.Contains(s.errors.String(), "sandbox-temporal: ") {
		t.Errorf("what the report says was said again: %s", &s.errors)
	}
}

func TestInterruptedForkDetaches(t *testing.T) {
	m := twoForks()
	m.script = m.script[:3] // and there it stays
	s := newSession(t, m)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.env.Stderr = writerFunc(func(b []byte) (int, error) {
		if bytes.Contains(b, []byte("go test")) {
			cancel()
		}
		return s.errors.Write(b)
	})
	s.env.Args = []string{"fork", remote, "--prompt", "x", "--forks", "2"}
	if got := Main(ctx, s.env); got != exitDetached {
		t.Fatalf("exit %d, stderr %s", got, &s.errors)
	}
	id := m.order[0]
	if text := s.errors.String(); !strings.HasSuffix(text, "Detached. The run goes on.\nCome back with: sandbox-temporal status --watch "+id+"\nEnd it with:    sandbox-temporal cancel "+id+"\n") {
		t.Errorf("stderr %s", text)
	}
	if s.out.Len() > 0 || len(m.done) > 0 {
		t.Errorf("stdout %q, done %q", &s.out, m.done)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// The engine can be killed at any time; a command that waits connects anew,
// which starts it again.
func TestWatchOutlivesTheEngine(t *testing.T) {
	dead := twoForks()
	dead.script = []step{dead.script[1], {err: fault.New("read", fault.Unreachable, "connection refused")}}
	alive := twoForks()
	alive.script = alive.script[2:]
	dead.order, alive.order = []string{testRun}, []string{testRun}
	s := newSession(t, dead)
	connections := 0
	s.env.Runs = func(context.Context, Globals) (Runs, error) {
		connections++
		switch connections {
		case 1:
			return dead, nil
		case 2:
			return nil, fault.New("connect", fault.Unreachable, "not yet")
		}
		return alive, nil
	}
	s.want(t, exitOK, "status", "@last", "--watch")
	text := s.errors.String()
	if connections != 3 || strings.Count(text, "waiting for Temporal: read: connection refused\n") != 1 || !strings.Contains(text, "Temporal answers again\n") {
		t.Errorf("%d connections, stderr %s", connections, text)
	}
	if dead.closed != 1 || alive.closed != 1 {
		t.Errorf("closed %d and %d times", dead.closed, alive.closed)
	}
}

func TestWatchGivesUpInTheEnd(t *testing.T) {
	m := twoForks()
	m.order = []string{testRun}
	m.script = []step{m.script[1], {err: fault.New("read", fault.Unavailable, "no worker answered")}}
	s := newSession(t, m)
	s.want(t, exitUnreachable, "status", "@last", "--watch")
	if text := s.errors.String(); !strings.Contains(text, "cannot be followed: read: no worker answered\nThe run goes on as soon as Temporal does. Come back with: sandbox-temporal status --watch "+testRun) {
		t.Errorf("stderr %s", text)
	}
}

// Whoever terminates a run in Temporal itself leaves one that says "running"
// for ever when it is asked.
func TestWatchEndsWithARunThatWasTerminated(t *testing.T) {
	for _, c := range []struct {
		says error
		want string
	}{
		{nil, "was ended from outside"},
		{fault.New("", fault.Cancelled, "the run was terminated by root"), "terminated by root"},
	} {
		m := twoForks()
		m.order = []string{testRun}
		m.script, m.killed, m.terminated = m.script[:3], true, c.says
		s := newSession(t, m)
		s.want(t, exitFailed, "status", "@last", "--watch")
		if !strings.Contains(s.errors.String(), c.want) {
			t.Errorf("stderr %s", &s.errors)
		}
	}
}

func TestWatchEndsAtOnceWithWhatWillNotPass(t *testing.T) {
	m := twoForks()
	m.order = []string{testRun}
	m.script = []step{m.script[1], {err: fault.New("read", fault.NotFound, "there is no run")}}
	newSession(t, m).want(t, exitNotFound, "status", "@last", "--watch")
	m.script = []step{{err: fault.New("read", fault.Denied, "no")}}
	newSession(t, m).want(t, exitDenied, "status", "@last", "--watch")
}

// A look that hangs is cut off and counts as trouble.
func TestWatchCutsOffALookThatHangs(t *testing.T) {
	m := twoForks()
	m.order = []string{testRun}
	s := newSession(t, m)
	s.env.timing.look = time.Millisecond
	s.env.Runs = func(context.Context, Globals) (Runs, error) { return &hanging{memory: m, times: 2}, nil }
	s.want(t, exitOK, "status", "@last", "--watch")
	if !strings.Contains(s.errors.String(), "waiting for Temporal: context deadline exceeded") {
		t.Errorf("stderr %s", &s.errors)
	}
}

type hanging struct {
	*memory
	times int
}

func (h *hanging) Progress(ctx context.Context, run string) (fork.Progress, error) {
	if h.times > 0 {
		h.times--
		<-ctx.Done()
		return fork.Progress{}, ctx.Err()
	}
	return h.memory.Progress(ctx, run)
}

func TestLinesAreNotMoreThanOneASecondForEachFork(t *testing.T) {
	var out bytes.Buffer
	l := newLines(&out)
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 40 { // 10 seconds
		st := at(map[int]fork.Live{1: working(i+1, fork.USD(i)*1_000_000, fmt.Sprint("step ", i)), 2: working(1, 0, "same")}, fork.Running, fork.Running)
		l.show(sight{At: start.Add(time.Duration(i) * 250 * time.Millisecond), Progress: st.p, Live: st.live})
	}
	if n := strings.Count(out.String(), "fork 1:"); n != 10 {
		t.Errorf("%d lines about fork 1 in ten seconds", n)
	}
	if n := strings.Count(out.String(), "fork 2:"); n != 1 {
		t.Errorf("%d lines about fork 2, which does the same all the time", n)
	}
	// What was held back is said in the end, once.
	out.Reset()
	l.flush()
	l.flush()
	if got := out.String(); got != "fork 1: running · turn 40 · $0.0390 · step 39\n" {
		t.Errorf("flush wrote %q", got)
	}
}

func TestLinesTellOfPauses(t *testing.T) {
	var out bytes.Buffer
	l := newLines(&out)
	st := at(nil, fork.Pending)
	for _, paused := range []bool{false, true, true, false} {
		st.p.Paused = paused
		l.show(sight{Progress: st.p})
	}
	if got := out.String(); got != "paused: no further fork starts\nresumed\n" {
		t.Errorf("%q", got)
	}
}

func TestPassingTroubleIsToldFromTheRest(t *testing.T) {
	done, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx  context.Context
		err  error
		want bool
	}{
		{t.Context(), fault.New("", fault.Unavailable, "x"), true},
		{t.Context(), fault.New("", fault.Unreachable, "x"), true},
		{t.Context(), context.DeadlineExceeded, true},
		{t.Context(), fault.New("", fault.NotFound, "x"), false},
		{t.Context(), errors.New("x"), false},
		{done, fault.New("", fault.Unavailable, "x"), false},
	} {
		if got := passing(c.ctx, c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}
