package cli

import (
	"bytes"
	"context"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const testRun = "sandbox-orch-0123abcd"

// memory is Temporal for the tests: runs that go through the steps of a script,
// one with every question for their progress.
type memory struct {
	mu      sync.Mutex
	plans   map[string]fork.Plan
	order   []string // of plans
	taken   int      // how many ids are still said to exist
	script  []step
	asked   int // how often progress was asked for
	report  fork.Report
	infos   []orchestrator.RunInfo
	base    orchestrator.Base // what Prepare makes
	done    []string          // what was asked to be done
	failure error             // of everything but Start
	closed  int
	pause   [2]time.Duration
	cleanup bool
	swept   orchestrator.CleanupOutput // what Sweep says
	sweeps  []orchestrator.CleanupInput

	killed     bool          // at the end of the script the run is terminated
	terminated error         // what Wait says then
	end        chan struct{} // see over
}

// step is what one question for progress finds.
type step struct {
	p    fork.Progress
	live map[int]fork.Live
	err  error
}

var _ Runs = (*memory)(nil)

func newMemory() *memory { return &memory{plans: map[string]fork.Plan{}} }

func (m *memory) did(s string) { m.done = append(m.done, s) }

func (m *memory) Start(_ context.Context, run string, plan fork.Plan) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.taken > 0 {
		m.taken--
		return fault.New("start", fault.Conflict, "run %s exists", run)
	}
	m.plans[run] = plan
	m.order = append(m.order, run)
	for i := range m.script {
		m.script[i].p.Run = run
	}
	if m.report.Run == "" {
		m.report.Run = run
	}
	return nil
}

func (m *memory) Find(_ context.Context, word string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failure != nil {
		return "", m.failure
	}
	if word == "@last" && len(m.order) > 0 {
		return m.order[len(m.order)-1], nil
	}
	var hits []string
	for _, run := range m.order {
		if strings.HasPrefix(run, word) || strings.HasPrefix(run, fork.RunPrefix+word) {
			hits = append(hits, run)
		}
	}
	switch len(hits) {
	case 0:
		return "", fault.New("", fault.NotFound, "there is no run %s", word).Hinted("See the runs with: sandbox-temporal list")
	case 1:
		return hits[0], nil
	}
	return "", fault.New("", fault.Invalid, "more than one run begins with %q", word).Hinted("Write more of the id.")
}

func (m *memory) Plan(_ context.Context, run string) (fork.Plan, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.plans[run], m.failure
}

func (m *memory) Progress(_ context.Context, _ string) (fork.Progress, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failure != nil {
		return fork.Progress{}, m.failure
	}
	s := m.now()
	m.asked++
	if last := m.asked == len(m.script); last && (m.killed || s.p.Status.Ended()) {
		close(m.over())
	}
	return s.p, s.err
}

// now is the step that the run is at.
func (m *memory) now() step {
	if len(m.script) == 0 {
		return step{p: m.report.Progress}
	}
	return m.script[min(m.asked, len(m.script)-1)]
}

func (m *memory) Report(_ context.Context, _ string) (fork.Report, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.report, m.failure
}

func (m *memory) Live(_ context.Context, _ string, nums []int) (map[int]fork.Live, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	live := map[int]fork.Live{}
	if m.asked > 0 && len(m.script) > 0 {
		for num, l := range m.script[min(m.asked-1, len(m.script)-1)].live {
			if slices.Contains(nums, num) {
				live[num] = l
			}
		}
	}
	return live, m.failure
}

func (m *memory) Wait(ctx context.Context, _ string) (fork.Progress, error) {
	m.mu.Lock()
	over := m.over()
	m.mu.Unlock()
	select {
	case <-over:
		return m.report.Progress, m.terminated
	case <-ctx.Done():
		return fork.Progress{}, ctx.Err()
	}
}

// over is closed when the script has come to its end.
func (m *memory) over() chan struct{} {
	if m.end == nil {
		m.end = make(chan struct{})
	}
	return m.end
}

func (m *memory) tell(verb, run string) (fork.Progress, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.did(verb + " " + run)
	return m.report.Progress, m.failure
}

func (m *memory) Pause(_ context.Context, run string) (fork.Progress, error) {
	return m.tell("pause", run)
}
func (m *memory) Freeze(_ context.Context, run string) (fork.Progress, []int, error) {
	p, err := m.tell("freeze", run)
	return p, p.Active, err
}
func (m *memory) Resume(_ context.Context, run string) (fork.Progress, error) {
	return m.tell("resume", run)
}
func (m *memory) Cancel(_ context.Context, run string) (fork.Progress, error) {
	return m.tell("cancel", run)
}

func (m *memory) AddBudget(_ context.Context, run string, num int, add fork.USD) (fork.Progress, error) {
	return m.tell("add "+add.String()+" to", fork.Spec{Run: run, Num: num}.ID())
}

func (m *memory) CancelFork(_ context.Context, run string, num int) error {
	_, err := m.tell("cancel", fork.Spec{Run: run, Num: num}.ID())
	return err
}

func (m *memory) List(_ context.Context, limit int, _ string) ([]orchestrator.RunInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.infos[:min(limit, len(m.infos))], m.failure
}

func (m *memory) Prepare(_ context.Context, id string, plan fork.Plan) (orchestrator.Base, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.plans[id] = plan
	return m.base, m.failure
}

func (m *memory) StartCleanup(_ context.Context, interval, maxAge time.Duration) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pause, m.cleanup = [2]time.Duration{interval, maxAge}, true
	return m.failure
}

func (m *memory) Sweep(_ context.Context, in orchestrator.CleanupInput) (orchestrator.CleanupOutput, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sweeps = append(m.sweeps, in)
	out := m.swept
	out.DryRun = in.DryRun
	return out, m.failure
}

func (m *memory) StopCleanup(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.cleanup {
		return fault.New("stop cleanup", fault.NotFound, "no cleanup is scheduled")
	}
	m.cleanup = false
	return nil
}

func (m *memory) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed++
}

// session is one command line, and what it printed.
type session struct {
	env    *Env
	out    bytes.Buffer
	errors bytes.Buffer
	vars   map[string]string
	runs   *memory
}

// newSession is a program in a home of its own that looks at m without
// waiting.
func newSession(t *testing.T, m *memory) *session {
	t.Helper()
	home := t.TempDir()
	s := &session{runs: m, vars: map[string]string{"HOME": home, "SANDBOX_TEMPORAL_HOME": filepath.Join(home, "state")}}
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	var mu sync.Mutex
	s.env = &Env{
		Stdin: strings.NewReader(""), Stdout: &s.out, Stderr: &s.errors, Version: "v1.2.3",
		Getenv: func(name string) string { return s.vars[name] },
		Now: func() time.Time { // every look at the clock is two seconds later
			mu.Lock()
			defer mu.Unlock()
			now = now.Add(2 * time.Second)
			return now
		},
		Runs:   func(context.Context, Globals) (Runs, error) { return m, nil },
		timing: timing{poll: time.Microsecond, look: time.Minute, output: 5 * time.Millisecond, alive: 10 * time.Millisecond},
	}
	return s
}

// run runs one command line.
func (s *session) run(t *testing.T, args ...string) int {
	t.Helper()
	s.out.Reset()
	s.errors.Reset()
	s.env.Args = args
	return Main(t.Context(), s.env)
}

// want fails unless the command line ends with code; its output is shown then.
func (s *session) want(t *testing.T, code int, args ...string) {
	t.Helper()
	if got := s.run(t, args...); got != code {
		t.Fatalf("%q: exit %d, want %d\nstdout: %s\nstderr: %s", args, got, code, &s.out, &s.errors)
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got; go test -update rewrites it):\n%s", name, diff)
	}
}

// mixedReport is a run of which everything that can happen has happened.
func mixedReport() fork.Report {
	usage := func(cost fork.USD) fork.Usage { return fork.Usage{Cost: cost, InputTokens: 1200, OutputTokens: 340} }
	base := "1111111111111111111111111111111111111111"
	return fork.Report{
		Progress: fork.Progress{
			Run: testRun, Name: "port the parser", Repo: "https://github.com/user/repo", Status: fork.Failed, Total: 6, Success: 2, Failed: 4,
			Cost: 1_234_567_890, Budget: 10 * fork.Dollar, Duration: 754.2,
			Statuses: []fork.Status{fork.Success, fork.Failed, fork.TimedOut, fork.Success, fork.Failed, fork.Cancelled},
		},
		Results: []fork.Result{
			{
				ForkNum: 1, Status: fork.Success, Model: "sonnet", Agent: "claude", SandboxID: "sb-1", Branch: fork.Branch(testRun, 1), BaseCommit: base,
				Commit: "2222222222222222222222222222222222222222", FilesChanged: 3, Insertions: 42, Deletions: 7, Usage: usage(411_522_630),
				NumTurns: 12, Duration: 312.4, Output: "Done: the parser is ported.",
			},
			{
				ForkNum: 2, Status: fork.Failed, Model: "sonnet", Agent: "claude", BaseCommit: base, Usage: usage(50_000), NumTurns: 1, Duration: 4.04,
				Error: "the agent ended with exit code 1:\nno such tool", Hint: "Try another model.",
			},
			{ForkNum: 3, Status: fork.TimedOut, Model: "sonnet", Agent: "claude", Usage: usage(700_000_000), NumTurns: 101, Duration: 7200, Error: "the fork's time of 2h0m0s is used up"},
			{ForkNum: 4, Status: fork.Success, Model: "sonnet", Agent: "claude", Usage: usage(1_000_000), NumTurns: 2, Duration: 61, Output: "Nothing to do."},
			{
				ForkNum: 5, Status: fork.Failed, Model: "sonnet", Agent: "claude", BaseCommit: base, Usage: usage(50_000), NumTurns: 1, Duration: 0.4,
				Error: "the agent ended with exit code 1:\nno such tool", Hint: "Try another model.",
			},
			{ForkNum: 6, Status: fork.Cancelled, Model: "sonnet", Agent: "claude", Usage: usage(0), Error: "the run was cancelled before this fork started"},
		},
	}
}

// shelf is an artifact store in memory: transcripts by attempt.
type shelf struct {
	refused     string         // lines of fork.Refusal
	verified    map[int]string // by fork
	mu          sync.Mutex
	transcripts map[[2]int]string // by fork and attempt
	grow        map[[2]int]string // what the next question adds
}

func (s *shelf) Refused(context.Context, string, int) (io.ReadCloser, error) {
	if s.refused == "" {
		return nil, fault.New("find", fault.NotFound, "none")
	}
	return io.NopCloser(strings.NewReader(s.refused)), nil
}

func (s *shelf) Verified(_ context.Context, _ string, num int) (io.ReadCloser, error) {
	text, ok := s.verified[num]
	if !ok {
		return nil, fault.New("find", fault.NotFound, "none")
	}
	return io.NopCloser(strings.NewReader(text)), nil
}

func (s *shelf) Transcript(_ context.Context, _ string, num, attempt int, offset int64) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := [2]int{num, attempt}
	text, ok := s.transcripts[key]
	if !ok {
		return nil, fault.New("transcript", fault.NotFound, "none")
	}
	if offset > int64(len(text)) {
		return nil, fault.New("transcript", fault.Invalid, "offset %d of %d", offset, len(text))
	}
	r := io.NopCloser(strings.NewReader(text[offset:]))
	if more, ok := s.grow[key]; ok {
		s.transcripts[key] += more
		delete(s.grow, key)
	}
	return r, nil
}

// desk holds the branches of ended forks.
type desk struct {
	patch   string
	applied []string
	err     error
	options repo.DiffOptions

	brought, delivered []string
	away, undelivered  error // of Bring and Deliver
	stranger           bool  // it has carried nothing
}

func (d *desk) Bring(_ context.Context, run string, _ fork.Plan, r fork.Result, dir string) error {
	d.brought = append(d.brought, fork.Spec{Run: run, Num: r.ForkNum}.ID()+" beside "+dir)
	return d.away
}

func (d *desk) Carried(context.Context, string, string) bool { return !d.stranger }

func (d *desk) Deliver(_ context.Context, run string, num int, path string) error {
	d.delivered = append(d.delivered, fork.Spec{Run: run, Num: num}.ID()+" to "+path)
	return d.undelivered
}

func (d *desk) Diff(_ context.Context, _ string, _ int, w io.Writer, o repo.DiffOptions) error {
	d.options = o
	_, err := io.WriteString(w, d.patch)
	return err
}

func (d *desk) Apply(_ context.Context, run string, num int, dir string) (repo.ApplyResult, error) {
	d.applied = append(d.applied, fork.Spec{Run: run, Num: num}.ID()+" in "+dir)
	return repo.ApplyResult{Files: []string{"a.go", "b.go"}}, d.err
}
