package activities

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.temporal.io/sdk/testsuite"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/mini"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/fake"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// TestMain lets the test binary be the built-in agent.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "mini-agent" {
		os.Exit(mini.Main(context.Background(), os.Args[2:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// world is everything that activities touch, all of it real but for the
// isolation of the sandboxes and the mind of the model.
type world struct {
	*Activities
	dir   string
	model *standin.Server
	fake  *fake.Provider

	mu     sync.Mutex
	states map[string]orchestrator.RunState // by workflow; of others nothing is known
}

const step = `{"steps": [{"text": "I write.", "tools": [{"name": "Bash", "input": {"command": "%s"}}]}, {"text": "I wrote."}]}`

// newWorld needs no *testing.T, so that an example can have one too.
func newWorld(dir string) (w *world, done func(), err error) {
	scripts, err := standin.ParseScripts(strings.NewReader(`{
		"write": ` + fmt.Sprintf(step, "echo more >> a.txt") + `,
		"gated": ` + fmt.Sprintf(step, "while [ ! -e go ]; do sleep 0.05; done") + `,
		"slow": ` + fmt.Sprintf(step, "echo more >> a.txt; sleep 2") + `,
		"endless": ` + fmt.Sprintf(step, "sleep 1000") + `,
		"hung": {"steps": [{"text": "Never.", "delay": "10m"}]},
		"idle": {"steps": [{"text": "Nothing to do."}]}
	}`))
	if err != nil {
		return nil, nil, err
	}
	ctx := context.Background()
	w = &world{dir: dir, model: standin.New(standin.Options{Scripts: scripts}), states: map[string]orchestrator.RunState{}}
	upstream := httptest.NewServer(w.model)
	prices, err := gateway.LoadPrices(nil)
	if err != nil {
		return nil, nil, err
	}
	gw, err := gateway.Open(ctx, gateway.Options{Ledger: ledger.Options{Dir: filepath.Join(dir, "gateway")}, Prices: prices,
		Credentials: func(context.Context) (gateway.Credentials, error) {
			return gateway.Credentials{APIKey: "real-key", BaseURL: upstream.URL}, nil
		}})
	if err != nil {
		return nil, nil, err
	}
	socket := filepath.Join(dir, "gw.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	store, err := artifact.Open(ctx, filepath.Join(dir, "artifacts"))
	if err != nil {
		return nil, nil, err
	}
	for _, d := range []string{"sandboxes", "tmp"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			return nil, nil, err
		}
	}
	w.fake = fake.New(filepath.Join(dir, "sandboxes"))
	log := slog.New(slog.DiscardHandler)
	w.Activities = New(Options{
		Providers: sandbox.NewSet(w.fake), Gateway: gw, Repo: repo.New(repo.Options{Dir: filepath.Join(dir, "git"), Uploads: store.Get, Logger: log}), Artifacts: store,
		Doors: oneDoor("unix:" + socket), Deployment: "d", Namespace: "n", Queue: "q", HostQueue: "q@host", TempDir: filepath.Join(dir, "tmp"), Logger: log,
		Program: func(string) (string, error) { return os.Executable() },
		State: func(_ context.Context, run string, num int) (orchestrator.RunState, error) {
			if run == "unknown" {
				return orchestrator.RunState{}, errors.New("Temporal does not answer")
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			if s, ok := w.states[fork.WorkflowID(run, num)]; ok && num > 0 {
				return s, nil
			}
			return w.states[run], nil
		},
	})
	serving, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- gw.Serve(serving, ln) }()
	return w, func() {
		_ = w.fake.Close()
		stop()
		<-ended
		w.model.Close()
		upstream.Close()
		_ = gw.Close()
		_ = store.Close()
	}, nil
}

// oneDoor is a way in that all forks share.
type oneDoor string

func (d oneDoor) Open(context.Context, Door) (string, error) { return string(d), nil }
func (oneDoor) Refused(string, int) ([]byte, error)          { return nil, nil }
func (oneDoor) Close(string, int)                            {}

func setUp(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "act") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w, done, err := newWorld(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	return w
}

// newRepo makes a repository with one commit.
func newRepo(dir string) error {
	cmd := exec.Command("sh", "-c", `git init -q -b main . && echo one > a.txt && git add . &&
		git -c user.name=t -c user.email=t@example.invalid commit -q -m one`)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func plan(source, prompt string) fork.Plan {
	return fork.Plan{Repo: source, Prompt: prompt, Forks: 1, Model: "sonnet", MaxConcurrent: 1, Timeout: time.Minute, Provider: fake.ProviderName, Agent: "mini"}
}

// begin prepares a base and makes a sandbox for one fork of run.
func (w *world) begin(ctx context.Context, run string, p fork.Plan) (fork.Spec, sandbox.Ref, error) {
	base, err := w.PrepareBase(ctx, orchestrator.PrepareBaseInput{Run: run, Plan: p})
	if err != nil {
		return fork.Spec{}, sandbox.Ref{}, err
	}
	spec := fork.Spec{Run: run, Num: 1, Repo: p.Repo, Upload: p.Upload, BaseCommit: base.Commit, PromptKey: base.PromptKey, Model: p.Model,
		Timeout: p.Timeout, RunBudget: p.Budget, ForkBudget: p.BudgetPerFork, OnBudget: p.OnBudget, Provider: p.Provider, Agent: p.Agent, AgentCommand: p.AgentCommand}
	ref, err := w.CreateSandbox(ctx, orchestrator.CreateSandboxInput{Spec: spec, Base: base, Deadline: time.Now().Add(time.Hour)})
	return spec, ref, err
}

// start is begin for tests, with a repository of its own.
func (w *world) start(t *testing.T, p fork.Plan) (fork.Spec, sandbox.Ref) {
	t.Helper()
	p.Repo = t.TempDir()
	if err := newRepo(p.Repo); err != nil {
		t.Fatal(err)
	}
	spec, ref, err := w.begin(t.Context(), "sandbox-orch-00000001", p)
	if err != nil {
		t.Fatal(err)
	}
	return spec, ref
}

func runInput(spec fork.Spec, ref sandbox.Ref) orchestrator.RunAgentInput {
	return orchestrator.RunAgentInput{Spec: spec, Ref: ref, Attempt: 1, Deadline: time.Now().Add(time.Minute)}
}

func TestAForkFromBaseToBranchToNothingLeft(t *testing.T) {
	t.Parallel()
	w, ctx := setUp(t), t.Context()
	spec, ref := w.start(t, plan("", "Play @script write"))
	if again, err := w.CreateSandbox(ctx, orchestrator.CreateSandboxInput{Spec: spec, Deadline: time.Now().Add(time.Hour)}); err != nil || again != ref {
		t.Errorf("a second creation: %v, %v; want %v", again, err, ref)
	}
	if _, err := w.HealthCheck(ctx, orchestrator.HealthCheckInput{Spec: spec, Ref: ref}); err != nil {
		t.Error(err)
	}
	out, err := w.RunAgent(ctx, runInput(spec, ref))
	if err != nil || out.Status != fork.Success || out.Output != "I wrote." || out.Turns != 2 || out.Usage.Cost <= 0 || out.Usage.OutputTokens <= 0 {
		t.Fatalf("%+v, %v", out, err)
	}
	got, err := w.CollectResult(ctx, orchestrator.CollectResultInput{Spec: spec, Ref: ref})
	if err != nil || got.Branch != fork.Branch(spec.Run, 1) || got.FilesChanged != 1 || got.Insertions != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	if tip, err := exec.CommandContext(ctx, "git", "-C", spec.Repo, "rev-parse", got.Branch).Output(); err != nil || strings.TrimSpace(string(tip)) != got.Commit {
		t.Errorf("the user's repository has %s, %v", tip, err)
	}
	again, err := w.CollectResult(ctx, orchestrator.CollectResultInput{Spec: spec, Ref: ref})
	if err != nil || again != got {
		t.Errorf("a second time: %+v, %v", again, err)
	}
	clean := orchestrator.CleanupSandboxInput{Ref: ref, Provider: spec.Provider, Run: spec.Run, Num: 1}
	for range 2 {
		final, err := w.CleanupSandbox(ctx, clean)
		if err != nil || final.Usage != out.Usage {
			t.Errorf("%+v, %v; want %+v", final, err, out.Usage)
		}
	}
	if _, err := w.HealthCheck(ctx, orchestrator.HealthCheckInput{Spec: spec, Ref: ref}); fault.KindOf(err) != fault.Lost {
		t.Errorf("the sandbox is still there: %v", err)
	}
	if left, _ := os.ReadDir(w.TempDir); len(left) > 0 {
		t.Errorf("left on the way: %v", left)
	}
}

func TestAgentIsFollowedOnByTheNextWorker(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script slow"))
	var suite testsuite.WorkflowTestSuite
	env := suite.NewTestActivityEnvironment()
	stop := make(chan struct{})
	env.SetWorkerStopChannel(stop)
	env.RegisterActivity(w.RunAgent)
	go func() { // when the agent is in the middle of it
		for len(w.model.Requests()) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		close(stop)
	}()
	if _, err := env.ExecuteActivity(w.RunAgent, runInput(spec, ref)); err == nil || !strings.Contains(err.Error(), orchestrator.ErrWorkerStopping.Error()) {
		t.Fatalf("the first worker: %v", err)
	}
	out, err := w.RunAgent(t.Context(), runInput(spec, ref))
	if err != nil || out.Status != fork.Success || out.Turns != 2 {
		t.Fatalf("the second worker: %+v, %v", out, err)
	}
	if n := len(w.model.Requests()); n != 2 {
		t.Errorf("%d model calls, want 2: none is repeated", n)
	}
	r, size, err := w.Artifacts.ReadLog(t.Context(), artifact.RunKey(spec.Run, 1, fork.TranscriptName(1)), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	if err != nil || int64(len(text)) != size || strings.Count(string(text), `"type":"result"`) != 1 || strings.Count(string(text), "I write.") != 1 {
		t.Errorf("the transcript has %d bytes of %d, %v:\n%s", len(text), size, err, text)
	}
}

func TestAgentIsStoppedWhenItsTimeIsUp(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script endless"))
	in := runInput(spec, ref)
	in.Deadline = time.Now().Add(time.Second)
	out, err := w.RunAgent(t.Context(), in)
	if err != nil || out.Status != fork.TimedOut || out.Again || out.Hint == "" {
		t.Fatalf("%+v, %v", out, err)
	}
	sb, err := w.Providers.Attach(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	p, err := sb.Process(t.Context(), "agent-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, ended, err := p.Exit(t.Context()); !ended || err != nil {
		t.Errorf("the agent lives: %v, %v", ended, err)
	}
}

func TestCallUnderWayAtTheEndIsInTheFinalAccount(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script hung"))
	in := runInput(spec, ref)
	in.Deadline = time.Now().Add(2 * time.Second)
	if out, err := w.RunAgent(t.Context(), in); err != nil || out.Status != fork.TimedOut {
		t.Fatalf("%+v, %v", out, err)
	}
	final, err := w.CleanupSandbox(t.Context(), orchestrator.CleanupSandboxInput{Ref: ref, Provider: spec.Provider, Run: spec.Run, Num: 1})
	if err != nil || final.Usage.Cost <= 0 {
		t.Errorf("%+v, %v: the call may have cost something", final, err)
	}
	again, err := w.CleanupSandbox(t.Context(), orchestrator.CleanupSandboxInput{Ref: ref, Provider: spec.Provider, Run: spec.Run, Num: 1})
	if err != nil || again != final {
		t.Errorf("%+v and then %+v, %v: the final account changed", final, again, err)
	}
}

func TestCancelledAgentIsStoppedAndItsCostKnown(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script endless"))
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for len(w.model.Requests()) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
	}()
	out, err := w.RunAgent(ctx, runInput(spec, ref))
	if err != nil || out.Status != fork.Cancelled || out.Usage.Cost <= 0 {
		t.Errorf("%+v, %v", out, err)
	}
}

func TestSecondAttemptResumesWhatTheFirstBegan(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script slow"))
	done := make(chan struct{})
	go func() { // kills the agent in the middle, as an out-of-memory killer would
		defer close(done)
		for len(w.model.Requests()) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		if sb, err := w.Providers.Attach(context.Background(), ref); err == nil {
			defer sb.Close()
			if p, err := sb.Process(context.Background(), "agent-1"); err == nil {
				_ = p.Signal(context.Background(), sandbox.Kill)
			}
		}
	}()
	first, err := w.RunAgent(t.Context(), runInput(spec, ref))
	<-done
	if err != nil || first.Status != fork.Failed || !first.Again {
		t.Fatalf("first: %+v, %v", first, err)
	}
	in := runInput(spec, ref)
	in.Attempt = 2
	second, err := w.RunAgent(t.Context(), in)
	if err != nil || second.Status != fork.Success || second.Usage.Cost <= first.Usage.Cost {
		t.Errorf("second: %+v, %v", second, err)
	}
}

func TestRefusedMoneyEndsAForkAsOverBudget(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	p := plan("", "x")
	p.Agent, p.AgentCommand, p.Budget = "command", `curl -s -o answer -w '%{http_code}' -H "x-api-key: $ANTHROPIC_API_KEY" -H 'content-type: application/json' `+
		`-d '{"model":"sonnet","max_tokens":10,"messages":[{"role":"user","content":"@script idle"}]}' $ANTHROPIC_BASE_URL/v1/messages; exit 1`, 1
	spec, ref := w.start(t, p)
	out, err := w.RunAgent(t.Context(), runInput(spec, ref))
	if err != nil || out.Status != fork.BudgetExceeded || out.Usage.Cost != 0 || !strings.Contains(out.Output+out.Error, "402") {
		t.Errorf("%+v, %v", out, err)
	}
	if len(w.model.Requests()) != 0 {
		t.Error("the call was forwarded")
	}
}

// exec runs a shell line in the sandbox as an agent could.
func (w *world) exec(t *testing.T, ref sandbox.Ref, line string) {
	t.Helper()
	out, err := w.ExecuteCommand(t.Context(), orchestrator.ExecuteCommandInput{Ref: ref, ID: "evil", Args: []string{"sh", "-c", line}})
	if err != nil || out.ExitCode != 0 {
		t.Fatalf("%+v, %v", out, err)
	}
}

func TestCollectWhateverTheAgentDidToGit(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		line  string
		files int
		fails bool
	}{
		"nothing":             {"true", 0, false},
		"ignored files only":  {"echo x > .git/info/exclude; echo x > x", 0, false},
		"left uncommitted":    {"echo x > x; rm a.txt", 2, false},
		"committed itself":    {"echo x > x; git add x; git commit -q -m mine", 1, false},
		"undid its commit":    {"echo x > x; git add x; git commit -q -m mine; git revert --no-edit HEAD", 0, false},
		"on another branch":   {"git checkout -q -b other; echo x > x", 1, false},
		"detached":            {"git checkout -q --detach; echo x > x; git add x; git commit -q -m mine", 1, false},
		"in mid-merge":        {"git checkout -q -b o; echo o > a.txt; git commit -qam o; git checkout -q main; echo m > a.txt; git commit -qam m; git merge o || true", 1, false},
		"hooks that refuse":   {"echo x > x; printf '#!/bin/sh\\nexit 1\\n' > .git/hooks/pre-commit; chmod +x .git/hooks/pre-commit", 1, false},
		"a filter that fails": {"echo x > x; git config filter.f.clean false; git config filter.f.required true; echo 'y filter=f' > .git/info/attributes", 1, false},
		"a lock left over":    {"echo x > x; touch .git/index.lock", 1, false},
		"no repository":       {"rm -rf .git", 0, true},
		"a rewritten base":    {"echo x > x; git add x; git commit -q --amend -m rewritten", 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := setUp(t)
			spec, ref := w.start(t, plan("", "x"))
			w.exec(t, ref, row.line)
			got, err := w.CollectResult(t.Context(), orchestrator.CollectResultInput{Spec: spec, Ref: ref})
			if row.fails {
				if fault.KindOf(err) != fault.Invalid || fault.HintOf(err) == "" {
					t.Errorf("%+v, %v", got, err)
				}
				return
			}
			if err != nil || got.FilesChanged != row.files || (got.Branch == "") != (row.files == 0) {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}

func TestBaseIsPreparedOnceAndSaysWhySetupFailed(t *testing.T) {
	t.Parallel()
	w, dir := setUp(t), t.TempDir()
	if err := newRepo(dir); err != nil {
		t.Fatal(err)
	}
	p := plan(dir, "x")
	p.Setup = "date +%s%N > made; cat a.txt"
	var stamps []string
	for _, run := range []string{"sandbox-orch-00000001", "sandbox-orch-00000002"} {
		_, ref, err := w.begin(t.Context(), run, p)
		if err != nil {
			t.Fatal(err)
		}
		out, err := w.ExecuteCommand(t.Context(), orchestrator.ExecuteCommandInput{Ref: ref, ID: "look", Args: []string{"cat", "made"}})
		if err != nil || out.ExitCode != 0 {
			t.Fatalf("%+v, %v", out, err)
		}
		stamps = append(stamps, out.Stdout)
	}
	if stamps[0] != stamps[1] {
		t.Errorf("setup ran twice: %q", stamps)
	}
	p.Setup = "echo no such package >&2; exit 3"
	_, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000003", Plan: p})
	if fault.KindOf(err) != fault.Invalid || !strings.Contains(fmt.Sprint(err), "no such package") || !strings.Contains(fmt.Sprint(err), "status 3") {
		t.Errorf("%v", err)
	}
	if left, err := w.fake.List(t.Context(), map[string]string{sandbox.LabelFork: "base"}); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestMissingAgentSaysHowToInstallIt(t *testing.T) {
	t.Parallel()
	w, dir := setUp(t), t.TempDir()
	if err := newRepo(dir); err != nil {
		t.Fatal(err)
	}
	w.Program = func(string) (string, error) { return "", errors.New("not on PATH") }
	p := plan(dir, "x")
	p.Agent = "claude"
	_, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000001", Plan: p})
	if fault.KindOf(err) != fault.Unsupported || !strings.Contains(fault.HintOf(err), "npm install -g @anthropic-ai/claude-code") {
		t.Errorf("%v (%s)", err, fault.HintOf(err))
	}
}

func TestCleanupFindsASandboxWhoseRefWasNeverHeardOf(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, _ := w.start(t, plan("", "x"))
	if _, err := w.CleanupSandbox(t.Context(), orchestrator.CleanupSandboxInput{Provider: spec.Provider, Run: spec.Run, Num: spec.Num}); err != nil {
		t.Fatal(err)
	}
	if left, err := w.fake.List(t.Context(), nil); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestVanishedSandboxIsLost(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	spec, ref := w.start(t, plan("", "Play @script write"))
	if err := w.fake.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	_, err := w.RunAgent(t.Context(), runInput(spec, ref))
	if fault.KindOf(err) != fault.Lost {
		t.Errorf("%v", err)
	}
	_, err = w.CollectResult(t.Context(), orchestrator.CollectResultInput{Spec: spec, Ref: ref})
	if fault.KindOf(err) != fault.Lost {
		t.Errorf("%v", err)
	}
}
