package activities

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.temporal.io/sdk/testsuite"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// told is what a run was told of its forks.
type told struct {
	mu    sync.Mutex
	holds []fork.Hold
	fail  bool // the first time
}

func (h *told) hold(_ context.Context, _ string, hold fork.Hold) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fail {
		h.fail = false
		return fault.New("", fault.Unreachable, "Temporal does not answer")
	}
	h.holds = append(h.holds, hold)
	return nil
}

func (h *told) list() []fork.Hold {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.holds)
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came true that %s", what)
		}
	}
}

// An agent whose next call no budget covers waits; the run hears of it, and the
// agent goes on when there is money, with its time back.
func TestForkWaitsForMoneyAndItsClockStandsStill(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	tell := &told{fail: true}
	w.Held = tell.hold
	p := plan("", "Play @script gated")
	p.Budget, p.OnBudget = 1, fork.OnBudgetPause
	spec, ref := w.start(t, p)
	in := runInput(spec, ref)
	in.Deadline, in.Slack = time.Now().Add(5*time.Second), 4*time.Second // for a first call on a busy machine

	var out orchestrator.RunAgentOutput
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		out, err = w.RunAgent(t.Context(), in)
	}()
	until(t, "the run hears that the fork waits", func() bool {
		l := tell.list()
		return len(l) > 0 && strings.Contains(l[len(l)-1].Why, "The budget of run ")
	})
	// Its time is up by the clock on the wall, and then that of the activity.
	<-done
	if err != nil || !out.Unended || out.Status != fork.Running || out.Held <= 0 || out.Held > 10*time.Second {
		t.Fatalf("%+v, %v", out, err)
	}
	in.Deadline = in.Deadline.Add(out.Held + time.Minute)
	in.Slack = time.Hour
	done = make(chan struct{})
	go func() {
		defer close(done)
		out, err = w.RunAgent(t.Context(), in)
	}()
	for range 2 { // an activity can be done twice
		if _, err := w.SetBudget(t.Context(), orchestrator.SetBudgetInput{Run: spec.Run, Budget: fork.Dollar}); err != nil {
			t.Fatal(err)
		}
	}
	// A fork that ends does not wait, and nobody is told: this one works until
	// the run has heard of it.
	until(t, "the run hears that the fork goes on", func() bool {
		l := tell.list()
		return l[len(l)-1].Why == ""
	})
	w.exec(t, ref, "touch go")
	<-done
	if err != nil || out.Status != fork.Success || out.Usage.Cost == 0 || out.Unended {
		t.Fatalf("%+v, %v", out, err)
	}
	l := tell.list()
	if last := l[len(l)-1]; last.ForkNum != 1 || last.Why != "" {
		t.Errorf("the run was told %+v", l)
	}
}

// The sandbox of a fork that waits lives on.
func TestSandboxOutlivesAHold(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	p := plan("", "Play @script write")
	p.Budget, p.OnBudget = 1, fork.OnBudgetPause
	spec, ref := w.start(t, p)
	sb, err := w.Providers.Attach(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(4 * time.Second)
	if err := sb.SetDeadline(t.Context(), soon); err != nil {
		t.Fatal(err)
	}
	in := runInput(spec, ref)
	in.Deadline, in.Slack = time.Now(), time.Hour
	// Another worker followed it before, for two minutes of waiting.
	var suite testsuite.WorkflowTestSuite
	env := suite.NewTestActivityEnvironment()
	env.SetHeartbeatDetails(fork.Live{Phase: "agent", Held: "no money", HeldFor: 2 * time.Minute})
	env.RegisterActivity(w.RunAgent)
	var out orchestrator.RunAgentOutput
	done := make(chan error, 1)
	go func() {
		v, err := env.ExecuteActivity(w.RunAgent, in)
		if err == nil {
			err = v.Get(&out)
		}
		done <- err
	}()
	until(t, "the sandbox's first deadline is over", func() bool { return time.Now().After(soon.Add(time.Second)) })
	if _, err := w.Providers.Attach(t.Context(), ref); err != nil {
		t.Errorf("the sandbox is gone: %v", err)
	}
	if _, err := w.SetBudget(t.Context(), orchestrator.SetBudgetInput{Run: spec.Run, Budget: fork.Dollar}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || out.Status != fork.Success || out.Held < 2*time.Minute {
		t.Errorf("%+v, %v", out, err)
	}
}

// A fork whose own budget is used up says so, and what to do.
func TestRefusedForkSaysWhoseBudgetItWas(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	p := plan("", "Play @script write")
	p.Budget, p.BudgetPerFork = fork.Dollar, 1
	spec, ref := w.start(t, p)
	out, err := w.RunAgent(t.Context(), runInput(spec, ref))
	if err != nil || out.Status != fork.BudgetExceeded || out.Short != fork.BudgetOfFork || !strings.Contains(out.Hint, "--budget-per-fork") {
		t.Errorf("%+v, %v", out, err)
	}
}
