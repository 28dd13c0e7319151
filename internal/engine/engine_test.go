//go:build !noembed

package engine

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/client"
	sdklog "go.temporal.io/sdk/log"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// roleEnv makes the test binary an engine that can be killed.
const roleEnv = "ENGINE_TEST_DIR"

func TestMain(m *testing.M) {
	dir := os.Getenv(roleEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := beEngine(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const (
	queue     = "test"
	doomed    = "doomed-worker"
	attribute = "TestRun"
	words     = "TestWords"
)

var attributes = map[string]enumspb.IndexedValueType{
	attribute: enumspb.INDEXED_VALUE_TYPE_KEYWORD,
	words:     enumspb.INDEXED_VALUE_TYPE_KEYWORD_LIST, // has a table of its own to be searched in
}

// beEngine runs an engine and a worker whose activity never ends, and says
// where it is and which attempt began.
func beEngine(dir string) error {
	e, err := Start(context.Background(), Options{Dir: dir, SearchAttributes: attributes, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	fmt.Println(e.Address())
	if os.Getenv(roleEnv+"_IDLE") != "" {
		// What it costs to be there: no worker.
		_, _ = io.Copy(io.Discard, os.Stdin)
		return e.Stop()
	}
	c, err := client.Dial(client.Options{HostPort: e.Address(), Identity: doomed, Logger: sdkQuiet()})
	if err != nil {
		return err
	}
	w := newWorker(c, func(ctx context.Context) (int32, error) {
		fmt.Println("attempt", activity.GetInfo(ctx).Attempt)
		for {
			activity.RecordHeartbeat(ctx, "here")
			select {
			case <-ctx.Done():
				return 0, ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	if err := w.Start(); err != nil {
		return err
	}
	select {}
}

func sdkQuiet() sdklog.Logger { return sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler)) }

// newWorker serves a workflow of one activity.
func newWorker(c client.Client, act func(context.Context) (int32, error)) worker.Worker {
	w := worker.New(c, queue, worker.Options{DefaultHeartbeatThrottleInterval: 100 * time.Millisecond, MaxHeartbeatThrottleInterval: 100 * time.Millisecond})
	w.RegisterWorkflowWithOptions(func(ctx workflow.Context) (n int32, err error) {
		ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
			StartToCloseTimeout: time.Hour,
			HeartbeatTimeout:    time.Minute,
			RetryPolicy:         &temporal.RetryPolicy{InitialInterval: time.Minute},
		})
		err = workflow.ExecuteActivity(ctx, "act").Get(ctx, &n)
		return n, err
	}, workflow.RegisterOptions{Name: "Wf"})
	w.RegisterActivityWithOptions(act, activity.RegisterOptions{Name: "act"})
	return w
}

func start(t testing.TB, o Options) *Engine {
	t.Helper()
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(&testWriter{t: t}, nil))
	}
	begun := time.Now()
	e, err := Start(t.Context(), o)
	if err != nil {
		t.Fatalf("%v\n%s", err, fault.HintOf(err))
	}
	t.Logf("ready in %v", time.Since(begun))
	t.Cleanup(func() {
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
		select {
		case err := <-e.Failed():
			t.Error(err)
		default:
		}
	})
	return e
}

// testWriter logs to a test for as long as it runs.
type testWriter struct {
	t    testing.TB
	mu   sync.Mutex
	seen bytes.Buffer
}

func (w *testWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return w.seen.Write(p)
}

func dialTest(t testing.TB, e *Engine) client.Client {
	t.Helper()
	c, err := client.Dial(client.Options{HostPort: e.Address(), Identity: "test-" + strconv.Itoa(os.Getpid()), Logger: sdkQuiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func serveTest(t testing.TB, c client.Client, act func(context.Context) (int32, error)) worker.Worker {
	t.Helper()
	w := newWorker(c, act)
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	return w
}

func attempt(ctx context.Context) (int32, error) { return activity.GetInfo(ctx).Attempt, nil }

func run(t testing.TB, c client.Client, id string) client.WorkflowRun {
	t.Helper()
	r, err := c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{
		ID: id, TaskQueue: queue,
		TypedSearchAttributes: temporal.NewSearchAttributes(
			temporal.NewSearchAttributeKeyKeyword(attribute).ValueSet(id),
			temporal.NewSearchAttributeKeyKeywordList(words).ValueSet([]string{"some", "about " + id}),
		),
	}, "Wf")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func stateDir(t testing.TB) string {
	dir := filepath.Join(t.TempDir(), "state")
	if err := endpoint.Prepare(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestHistorySurvivesARestart also walks through what a second start changes:
// a new search attribute and another retention.
func TestHistorySurvivesARestart(t *testing.T) {
	dir := stateDir(t)
	said := &testWriter{t: t}
	logger := slog.New(slog.NewTextHandler(said, nil))
	e := start(t, Options{Dir: dir, SearchAttributes: attributes, Logger: logger})
	c := dialTest(t, e)
	w := serveTest(t, c, attempt)
	var n int32
	if err := run(t, c, "one").Get(t.Context(), &n); err != nil || n != 1 {
		t.Fatalf("%d, %v", n, err)
	}
	wantListed(t, c, attribute+" = 'one'", "one")

	_, err := Start(t.Context(), Options{Dir: dir})
	wantKind(t, err, fault.Conflict)

	w.Stop()
	c.Close()
	begun := time.Now()
	if err := e.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Logf("stop: %v", time.Since(begun))
	if st, err := os.Stat(filepath.Join(dir, DatabaseName+"-wal")); err == nil && st.Size() > 0 {
		t.Errorf("%d bytes stay in the log", st.Size())
	}
	if said.seen.Len() > 0 {
		t.Errorf("a server that all went well with said:\n%s", said.seen.String())
	}

	more := maps.Clone(attributes)
	more["TestCost"] = enumspb.INDEXED_VALUE_TYPE_DOUBLE
	e = start(t, Options{Dir: dir, SearchAttributes: more, Retention: 48 * time.Hour})
	c = dialTest(t, e)
	w = serveTest(t, c, attempt)
	defer w.Stop()
	n = 0
	if err := c.GetWorkflow(t.Context(), "one", "").Get(t.Context(), &n); err != nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
	ns, err := c.WorkflowService().DescribeNamespace(t.Context(), &workflowservice.DescribeNamespaceRequest{Namespace: DefaultNamespace})
	if err != nil || ns.GetConfig().GetWorkflowExecutionRetentionTtl().AsDuration() != 48*time.Hour {
		t.Errorf("retention %v, %v", ns.GetConfig().GetWorkflowExecutionRetentionTtl(), err)
	}
	r, err := c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{
		ID: "two", TaskQueue: queue,
		TypedSearchAttributes: temporal.NewSearchAttributes(temporal.NewSearchAttributeKeyFloat64("TestCost").ValueSet(1.5)),
	}, "Wf")
	if err != nil {
		t.Fatalf("an attribute that was just added: %v", err)
	}
	if err := r.Get(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	wantListed(t, c, "TestCost > 1 AND ExecutionStatus = 'Completed'", "two")
	w.Stop()
	if err := e.Stop(); err != nil {
		t.Fatal(err)
	}

	_, err = Start(t.Context(), Options{Dir: dir, SearchAttributes: map[string]enumspb.IndexedValueType{attribute: enumspb.INDEXED_VALUE_TYPE_INT}})
	wantKind(t, err, fault.Conflict)
	if !strings.Contains(err.Error(), attribute) {
		t.Errorf("%v does not name %s", err, attribute)
	}
	// Nothing is held by a start that failed.
	l, err := endpoint.Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Release()
}

// wantListed waits until a query finds one workflow.
func wantListed(t *testing.T, c client.Client, query, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := until(ctx, func() (bool, error) {
		l, err := c.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{Query: query})
		if err != nil {
			return false, err
		}
		return len(l.GetExecutions()) == 1 && l.GetExecutions()[0].GetExecution().GetWorkflowId() == id, nil
	}); err != nil {
		t.Errorf("%s: %v", query, err)
	}
}

func TestTakenPortIsRefusedBeforeTheServerStarts(t *testing.T) {
	port := taken(t)
	dir := stateDir(t)
	_, err := Start(t.Context(), Options{Dir: dir, Port: port})
	wantTaken(t, err, port, grpcPort)
	_, err = Start(t.Context(), Options{Dir: dir, UIPort: port})
	wantTaken(t, err, port, uiPort)
	if _, err := os.Stat(filepath.Join(dir, DatabaseName)); err == nil {
		t.Error("the database was made all the same")
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	dir := stateDir(t)
	for name, o := range map[string]Options{
		"no folder": {},
		"a name":    {Dir: dir, Host: "localhost.example"},
		"port":      {Dir: dir, Port: 70000},
		"ui port":   {Dir: dir, UIPort: -2},
		"retention": {Dir: dir, Retention: time.Minute},
	} {
		if _, err := Start(t.Context(), o); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Options{Dir: dir})
	wantKind(t, err, fault.Denied)
}

func TestStartEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	<-ctx.Done()
	dir := stateDir(t)
	_, err := Start(ctx, Options{Dir: dir})
	if err == nil {
		t.Fatal("it started")
	}
	l, err := endpoint.Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Release()
}

// TestWorkflowsSurviveANewSchema runs the server of this build on a file with
// the schema that an older one left: without a table and a column.
func TestWorkflowsSurviveANewSchema(t *testing.T) {
	before := stateDir(t)
	e := start(t, Options{Dir: before, SearchAttributes: attributes, UIPort: NoUI})
	c := dialTest(t, e)
	w := serveTest(t, c, attempt)
	if err := run(t, c, "ended").Get(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.Stop()
	run(t, c, "waiting") // for a worker
	c.Close()
	if err := e.Stop(); err != nil {
		t.Fatal(err)
	}

	dir := stateDir(t)
	file := filepath.Join(dir, DatabaseName)
	if err := copyFile(filepath.Join(before, DatabaseName), file); err != nil {
		t.Fatal(err)
	}
	execute(t, file,
		`DROP TABLE current_chasm_executions`,
		`DROP INDEX by_temporal_worker_deployment`,
		`ALTER TABLE executions_visibility DROP COLUMN TemporalWorkerDeployment`,
		`ALTER TABLE current_executions DROP COLUMN data_encoding`,
		`UPDATE current_executions SET data = x''`,
		`UPDATE `+stampTable+` SET server = '1.30.9', hash = 'of another schema'`,
	)
	e = start(t, Options{Dir: dir, SearchAttributes: attributes, UIPort: NoUI})
	c = dialTest(t, e)
	w = serveTest(t, c, attempt)
	defer w.Stop()
	for _, id := range []string{"ended", "waiting"} {
		var n int32
		if err := c.GetWorkflow(t.Context(), id, "").Get(t.Context(), &n); err != nil || n != 1 {
			t.Errorf("%s: %d, %v", id, n, err)
		}
		wantListed(t, c, attribute+" = '"+id+"'", id)
		wantListed(t, c, words+" = 'about "+id+"'", id)
	}
	if err := run(t, c, "later").Get(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file + ".bak"); err != nil {
		t.Error(err)
	}
	// Schedules are what hangs when that table is missing.
	s, err := c.ScheduleClient().Create(t.Context(), client.ScheduleOptions{
		ID:     "often",
		Spec:   client.ScheduleSpec{Intervals: []client.ScheduleIntervalSpec{{Every: time.Hour}}},
		Action: &client.ScheduleWorkflowAction{ID: "scheduled", Workflow: "Wf", TaskQueue: queue},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Describe(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestGarbageInPlaceOfTheDatabaseIsKept(t *testing.T) {
	dir := stateDir(t)
	file := filepath.Join(dir, DatabaseName)
	if err := os.WriteFile(file, []byte("not a database"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Options{Dir: dir})
	wantKind(t, err, fault.Invalid)
	if text, err := os.ReadFile(file); err != nil || string(text) != "not a database" {
		t.Errorf("%q, %v", text, err)
	}
}
