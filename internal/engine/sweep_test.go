//go:build !noembed

package engine

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// process is the test binary as an engine of its own.
type process struct {
	*exec.Cmd
	lines *bufio.Scanner
}

func spawn(t testing.TB, dir string, env ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(os.Args[0])}
	p.Env = append(append(os.Environ(), roleEnv+"="+dir), env...)
	p.Stderr = os.Stderr
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	p.lines = bufio.NewScanner(out)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.Process.Kill()
		_ = p.Wait()
	})
	return p
}

func (p *process) line(t testing.TB) string {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatalf("the engine ended: %v", p.lines.Err())
	}
	return p.lines.Text()
}

// TestActivityOfAKilledEngineStartsAgainAtOnce kills a whole engine with its
// worker. Without the sweep the activity would wait for a heartbeat for a
// minute.
func TestActivityOfAKilledEngineStartsAgainAtOnce(t *testing.T) {
	dir := stateDir(t)
	p := spawn(t, dir)
	c, err := client.Dial(client.Options{HostPort: p.line(t), Logger: sdkQuiet()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	run(t, c, "long")
	if got := p.line(t); got != "attempt 1" {
		t.Fatal(got)
	}
	// The heartbeat has to reach the server before the kill.
	if err := until(t.Context(), func() (bool, error) {
		d, err := c.DescribeWorkflowExecution(t.Context(), "long", "")
		a := d.GetPendingActivities()
		return err == nil && len(a) == 1 && a[0].GetHeartbeatDetails() != nil, err
	}); err != nil {
		t.Fatal(err)
	}
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.Wait()

	killed := time.Now()
	e := start(t, Options{Dir: dir, SearchAttributes: attributes, UIPort: NoUI})
	c = dialTest(t, e)
	type seen struct {
		attempt int32
		details string
		at      time.Time
	}
	begun := make(chan seen, 1)
	w := serveTest(t, c, func(ctx context.Context) (int32, error) {
		s := seen{attempt: activity.GetInfo(ctx).Attempt, at: time.Now()}
		_ = activity.GetHeartbeatDetails(ctx, &s.details) // none: the test says so below
		begun <- s
		return s.attempt, nil
	})
	defer w.Stop()
	up := time.Now()
	if n, err := Sweep(t.Context(), c, DefaultNamespace, "somebody-else", quietly); n != 0 || err != nil {
		t.Errorf("swept %d of a worker that never was, %v", n, err)
	}
	n, err := Sweep(t.Context(), c, DefaultNamespace, doomed, quietly)
	if n != 1 || err != nil {
		t.Fatalf("swept %d, %v", n, err)
	}
	s := <-begun
	if s.attempt != 2 || s.details != "here" {
		t.Errorf("%+v", s)
	}
	if took := s.at.Sub(up); took > 10*time.Second { // most of that for a machine that has much else to do
		t.Errorf("it started again %v after the server was up", took)
	}
	t.Logf("killed, up after %v, running again after %v", up.Sub(killed), s.at.Sub(killed))
	var got int32
	if err := c.GetWorkflow(t.Context(), "long", "").Get(t.Context(), &got); err != nil || got != 2 {
		t.Errorf("%d, %v", got, err)
	}
	// What has ended or runs elsewhere is nobody's to sweep.
	if n, err := Sweep(t.Context(), c, DefaultNamespace, doomed, quietly); n != 0 || err != nil {
		t.Errorf("swept again: %d, %v", n, err)
	}
	_, err = Sweep(t.Context(), c, DefaultNamespace, "", quietly)
	wantKind(t, err, fault.Invalid)
}

// TestSweepCopesWithManyRunningWorkflows gives a few activities to a worker
// that takes tasks and dies, and leaves many more to wait.
func TestSweepCopesWithManyRunningWorkflows(t *testing.T) {
	many, taken := 1000, 30
	if testing.Short() {
		many = 100
	}
	e := start(t, Options{Dir: stateDir(t), SearchAttributes: attributes, UIPort: NoUI})
	c := dialTest(t, e)
	// This worker schedules activities and does none.
	w := worker.New(c, queue, worker.Options{LocalActivityWorkerOnly: true})
	w.RegisterWorkflowWithOptions(func(ctx workflow.Context) error {
		ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{StartToCloseTimeout: time.Hour, TaskQueue: "deeds", RetryPolicy: &temporal.RetryPolicy{InitialInterval: time.Minute}})
		return workflow.ExecuteActivity(ctx, "act").Get(ctx, nil)
	}, workflow.RegisterOptions{Name: "Wf"})
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	var wg sync.WaitGroup
	ids := make(chan string)
	for range 8 {
		wg.Go(func() {
			for id := range ids {
				if _, err := c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: id, TaskQueue: queue}, "Wf"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	begun := time.Now()
	for i := range many {
		ids <- fmt.Sprint("wf-", i)
	}
	close(ids)
	wg.Wait()
	t.Logf("%d workflows started in %v", many, time.Since(begun))
	polling, stop := context.WithTimeout(t.Context(), time.Minute) // the server insists on a deadline
	defer stop()
	poll := func(identity string) *workflowservice.PollActivityTaskQueueResponse {
		for {
			task, err := c.WorkflowService().PollActivityTaskQueue(polling, pollRequest(identity))
			if err != nil {
				t.Fatal(err)
			}
			if len(task.GetTaskToken()) > 0 {
				return task
			}
		}
	}
	for range taken {
		poll(doomed)
	}
	alive := poll("another-worker")
	wantCount(t, c, many)

	begun = time.Now()
	n, err := Sweep(t.Context(), c, DefaultNamespace, doomed, quietly)
	if n != taken || err != nil {
		t.Errorf("swept %d of %d, %v", n, taken, err)
	}
	t.Logf("%d of %d workflows swept in %v", n, many, time.Since(begun))
	// The one that lives can still say that it is done.
	if _, err := c.WorkflowService().RespondActivityTaskCompleted(t.Context(), &workflowservice.RespondActivityTaskCompletedRequest{TaskToken: alive.GetTaskToken()}); err != nil {
		t.Errorf("an activity of another worker was swept: %v", err)
	}

	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Sweep(cancelled, c, DefaultNamespace, doomed, quietly); err == nil {
		t.Error("a sweep that could not look found nothing")
	}
}

func wantCount(t *testing.T, c client.Client, want int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got := int64(0)
	if err := until(ctx, func() (bool, error) {
		r, err := c.CountWorkflow(ctx, &workflowservice.CountWorkflowExecutionsRequest{Query: "ExecutionStatus = 'Running'"})
		got = r.GetCount()
		return err == nil && got == int64(want), err
	}); err != nil {
		t.Fatalf("%d of %d workflows run: %v", got, want, err)
	}
}
