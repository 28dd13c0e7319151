package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/charmbracelet/lipgloss"
	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// ended is a memory that holds one run that ended so.
func ended(rep fork.Report) *memory {
	m := newMemory()
	m.order = []string{testRun}
	m.report = rep
	return m
}

func TestStatusOfARunThatEnded(t *testing.T) {
	s := newSession(t, ended(mixedReport()))
	s.want(t, exitOK, "status", "@last")
	golden(t, "status.golden", s.out.Bytes())
	s.want(t, exitOK, "status", "0123abcd", "-o", "json")
	golden(t, "status-json.golden", s.out.Bytes())
	if s.errors.Len() > 0 {
		t.Errorf("stderr %q", &s.errors)
	}
	var rep fork.Report
	if err := json.Unmarshal(s.out.Bytes(), &rep); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(mixedReport(), rep); diff != "" {
		t.Errorf("the JSON lost something:\n%s", diff)
	}
	s.want(t, exitOK, "status", "@last", "--color", "always")
	golden(t, "status-colour.golden", s.out.Bytes())
}

func TestStatusOfARunThatGoesOn(t *testing.T) {
	m := newMemory()
	m.order = []string{testRun}
	m.asked = 1 // Live answers for the step that was asked about
	st := at(map[int]fork.Live{2: working(3, 12_000_000, "Bash make")}, append([]fork.Status{fork.Success, fork.Running}, make([]fork.Status, 15)...)...)
	for i := range st.p.Statuses[2:] {
		st.p.Statuses[2+i] = fork.Pending
	}
	st.p.Pending, st.p.Failed = 15, 0
	st.p.Paused, st.p.Budget, st.p.Cost = true, 2*fork.Dollar, 5_000_000
	m.script = []step{st}
	m.report = fork.Report{Progress: st.p, Results: mixedReport().Results[:1]}
	s := newSession(t, m)
	s.want(t, exitOK, "status", testRun)
	golden(t, "status-running.golden", s.out.Bytes())
	s.want(t, exitOK, "status", testRun, "-o", "json")
	golden(t, "status-running-json.golden", s.out.Bytes())
}

func TestStatusOfARunThatCouldNotBegin(t *testing.T) {
	rep := fork.Report{Progress: fork.Progress{
		Run: testRun, Repo: remote, Status: fork.Failed, Total: 2, Failed: 2, Statuses: []fork.Status{fork.Failed, fork.Failed},
		Error: "prepare base: no branch \"dev\"", ErrorKind: "not_found", Hint: "It has main.",
	}}
	for n := 1; n <= 2; n++ {
		rep.Results = append(rep.Results, fork.Result{ForkNum: n, Status: fork.Failed, Error: rep.Error, Hint: rep.Hint})
	}
	s := newSession(t, ended(rep))
	s.want(t, exitNotFound, "status", "@last", "--watch")
	if strings.Count(s.out.String()+s.errors.String(), "no branch") != 1 {
		t.Errorf("not said once:\n%s%s", &s.out, &s.errors)
	}
	golden(t, "status-broken.golden", s.out.Bytes())
}

func TestStatusOfARunThatWasVerified(t *testing.T) {
	rep := mixedReport()
	verify := []*fork.Verify{
		{Status: fork.Success, Duration: 3.25}, nil,
		{Status: fork.TimedOut, ExitCode: fork.Unverified, Duration: 60, Output: "it did not end within 1m0s\n\x1b[31mwaiting"},
		{Status: fork.Failed, ExitCode: 1, Duration: 2, Output: "--- FAIL: TestParse\nFAIL"}, nil, nil,
	}
	for i := range rep.Results {
		rep.Results[i].Verify = verify[i]
	}
	rep.Results = append(rep.Results, rep.Results[3])
	rep.Results[6].ForkNum, rep.Total = 7, 7
	s := newSession(t, ended(rep))
	s.want(t, exitOK, "status", "@last")
	golden(t, "status-verified.golden", s.out.Bytes())
}

func TestLogsOfVerifications(t *testing.T) {
	rep := mixedReport()
	m := ended(rep)
	m.plans[testRun] = fork.Plan{Agent: "claude"}
	shown := &shelf{verified: map[int]string{1: "ok\n", 4: "--- FAIL\n\x1b]0;title\aend"}}
	s := newSession(t, m)
	s.env.Artifacts = func(context.Context, Globals) (Artifacts, error) { return shown, nil }
	s.want(t, exitOK, "logs", "@last", "--verify")
	if got := s.out.String(); got != "1| ok\n4| --- FAIL\n4| end\n" {
		t.Errorf("%q", got)
	}
	s.want(t, exitOK, "logs", "@last/4", "--verify")
	if got := s.out.String(); got != "--- FAIL\nend\n" {
		t.Errorf("%q", got)
	}
	s.want(t, exitOK, "logs", "@last/2", "--verify")
	if s.out.Len() > 0 || !strings.Contains(s.errors.String(), "started without --verify") {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	s.want(t, exitUsage, "logs", "@last", "--verify", "--follow")
}

func TestTheReportSaysWhatIsNotCertain(t *testing.T) {
	rep := fork.Report{Progress: fork.Progress{Run: "r", Status: fork.Success, Total: 2, Success: 2}, Results: []fork.Result{
		{ForkNum: 1, Status: fork.Success, Usage: fork.Usage{Cost: fork.Dollar, Pending: fork.Dollar / 4}},
		{ForkNum: 2, Status: fork.Success, Usage: fork.Usage{Cost: fork.Dollar, Pending: fork.Dollar / 8}},
	}}
	s := newSession(t, ended(rep))
	s.want(t, exitOK, "status", "@last")
	if want := "up to $0.3750 of the cost is that of message batches which had not ended"; !strings.Contains(s.out.String(), want) {
		t.Errorf("stdout:\n%s", &s.out)
	}
	s.want(t, exitOK, "status", "@last", "-o", "json")
	if !strings.Contains(s.out.String(), `"pending_usd": 0.125`) {
		t.Errorf("stdout:\n%s", &s.out)
	}
}

func TestReportWithoutResultsIsAListInJSON(t *testing.T) {
	s := newSession(t, ended(fork.Report{Progress: fork.Progress{Run: testRun, Status: fork.Running, Total: 1}}))
	s.want(t, exitOK, "status", "@last", "-o", "json")
	if !strings.Contains(s.out.String(), `"results": []`) {
		t.Errorf("%s", &s.out)
	}
}

func TestTenThousandPendingForksAreNotTenThousandLines(t *testing.T) {
	rep := fork.Report{Progress: fork.Progress{Run: testRun, Status: fork.Running, Total: fork.MaxForks, Pending: fork.MaxForks}}
	s := newSession(t, ended(rep))
	s.want(t, exitOK, "status", "@last")
	if n := strings.Count(s.out.String(), "\n"); n > maxPending+6 {
		t.Errorf("%d lines", n)
	}
}

func TestList(t *testing.T) {
	m := newMemory()
	s := newSession(t, m)
	s.want(t, exitOK, "list")
	if s.out.Len() > 0 || !strings.Contains(s.errors.String(), "no run yet") {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	s.want(t, exitOK, "list", "-o", "json")
	if s.out.String() != "[]\n" {
		t.Errorf("stdout %q", &s.out)
	}
	start := time.Date(2026, 3, 4, 5, 0, 0, 0, time.UTC)
	closed := start.Add(90 * time.Second)
	m.infos = []orchestrator.RunInfo{
		{Run: testRun, Name: "new one", Repo: remote, Forks: 3, Model: "sonnet", Status: fork.Running, Started: start},
		{Run: "sandbox-orch-ffffffff", Repo: "/home/me/src", Forks: 1000, Model: "claude-opus-9", Status: fork.BudgetExceeded, Started: start.Add(-50 * time.Hour), Closed: &closed},
	}
	s = newSession(t, m) // with a clock that was not looked at
	s.want(t, exitOK, "list")
	golden(t, "list.golden", s.out.Bytes())
	s.want(t, exitOK, "list", "-o", "json")
	golden(t, "list-json.golden", s.out.Bytes())
	s.want(t, exitOK, "list", "--limit", "1")
	if strings.Count(s.out.String(), "\n") != 2 {
		t.Errorf("%s", &s.out)
	}
}

func TestColour(t *testing.T) {
	coloured := func(terminal bool, vars map[string]string, args ...string) bool {
		s := newSession(t, ended(mixedReport()))
		for k, v := range vars {
			s.vars[k] = v
		}
		if terminal {
			s.env.IsTerminal = isTerminal(&s.out)
		}
		s.want(t, exitOK, append([]string{"status", "@last"}, args...)...)
		return bytes.ContainsRune(s.out.Bytes(), 0x1b)
	}
	for _, c := range []struct {
		terminal bool
		vars     map[string]string
		args     []string
		want     bool
	}{
		{false, nil, nil, false},
		{true, nil, nil, true},
		{true, map[string]string{"NO_COLOR": "1"}, nil, false},
		{true, map[string]string{"TERM": "dumb"}, nil, false},
		{true, nil, []string{"--color", "never"}, false},
		{false, nil, []string{"--color", "always"}, true},
		{true, map[string]string{"NO_COLOR": "1"}, []string{"--color=always"}, true},
		{true, nil, []string{"-o", "json"}, false},
	} {
		if got := coloured(c.terminal, c.vars, c.args...); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// isTerminal says that w, and nothing else, is a terminal.
func isTerminal(w *bytes.Buffer) func(any) bool {
	return func(x any) bool { return x == any(w) }
}

func TestTableLinesUp(t *testing.T) {
	var out bytes.Buffer
	err := writeTable(&out, false, []column{{"A", false}, {"NUMBER", true}, {"LAST", false}}, [][]cell{
		{{"日本語", plain}, {"1", plain}, {"x", plain}}, {{"abc", plain}, {"1000000", plain}, {"", plain}}, {{"", plain}, {"", plain}, {"", plain}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "A        NUMBER  LAST\n日本語        1  x\nabc     1000000\n\n"
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestFit(t *testing.T) {
	for _, s := range []string{"", "a", "abcdefghij", "日本語日本語", "a日b本c語", "e\u0301e\u0301e\u0301e\u0301"} {
		for width := range 12 {
			got := fit(s, width)
			if lipgloss.Width(got) > width {
				t.Errorf("fit(%q, %d) = %q", s, width, got)
			}
			if lipgloss.Width(s) <= width && got != s {
				t.Errorf("fit(%q, %d) cut what fits: %q", s, width, got)
			}
		}
	}
}

func TestWordsForNumbers(t *testing.T) {
	for u, want := range map[fork.USD]string{
		0: "$0.0000", 49_999: "$0.0000", 50_000: "$0.0001", fork.Dollar: "$1.0000", -fork.Dollar / 2: "-$0.5000", 999_999_999: "$1.0000",
		-1 << 63: "-$9223372036.8548", 1<<63 - 1: "$9223372036.8548",
	} {
		if got := dollars(u); got != want {
			t.Errorf("dollars(%d) = %s, want %s", int64(u), got, want)
		}
	}
	for s, want := range map[float64]string{0: "0s", 0.04: "0.0s", 4.04: "4.0s", 9.94: "9.9s", 9.96: "10s", 59.6: "1m00s", 61: "1m01s", 3599.7: "1h00m", 7325: "2h02m", -3: "0s"} {
		if got := seconds(s); got != want {
			t.Errorf("seconds(%v) = %s, want %s", s, got, want)
		}
	}
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{-time.Hour: "0s", 59 * time.Second: "59s", time.Hour: "1h", 47 * time.Hour: "47h", 48 * time.Hour: "2d"} {
		if got := age(now, now.Add(-d)); got != want {
			t.Errorf("age(%s) = %s, want %s", d, got, want)
		}
	}
}
