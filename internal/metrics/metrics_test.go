package metrics

import (
	"context"
	"flag"
	"math"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

var update = flag.Bool("update", false, "rewrite the golden file")

var (
	models    = []string{"sonnet", "claude-sonnet-5-5"}
	providers = []string{"local", "remote"}
	sets      = Sets{Models: models, Providers: providers}
)

func result(status fork.Status, model string, seconds float64, cost fork.USD) fork.Result {
	return fork.Result{Status: status, Model: model, Duration: seconds, Usage: fork.Usage{Cost: cost}}
}

// played returns a registry after a few forks.
func played(t *testing.T) *prometheus.Registry {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	m := New(reg, sets)
	for _, r := range []fork.Result{
		result(fork.Success, "sonnet", 61, fork.Dollar/4),
		result(fork.Success, "sonnet", 3600, 2*fork.Dollar),
		result(fork.Failed, "claude-sonnet-5-5", .5, 0),
		result(fork.BudgetExceeded, "a model\nof a \"user\"", 7200, 30*fork.Dollar),
		result("exploded", "sonnet", 8000, fork.Dollar),
	} {
		m.ForkEnded(r)
	}
	return reg
}

// scrape asks the handler as Prometheus does.
func scrape(t *testing.T, reg prometheus.Gatherer) string {
	t.Helper()
	rec := httptest.NewRecorder()
	Handler(reg).ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	if rec.Code != 200 || !strings.HasPrefix(rec.Header().Get("Content-Type"), "text/plain") {
		t.Fatalf("status %d, %s", rec.Code, rec.Header().Get("Content-Type"))
	}
	return rec.Body.String()
}

func TestMetricsAreNamedAsPrometheusAsks(t *testing.T) {
	problems, err := promlint.New(strings.NewReader(scrape(t, played(t)))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestForksAreCountedAsTheyEnd(t *testing.T) {
	const golden = "testdata/metrics.golden"
	got := scrape(t, played(t))
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got; -update rewrites it):\n%s", golden, diff)
	}
	// What no -update may change.
	for _, line := range []string{
		`sandbox_fork_completed_total{model="sonnet",status="success"} 2`,
		`sandbox_fork_completed_total{model="sonnet",status="cancelled"} 0`,
		`sandbox_fork_completed_total{model="other",status="budget_exceeded"} 1`,
		`sandbox_fork_completed_total{model="sonnet",status="other"} 1`,
		`sandbox_fork_duration_seconds_sum{status="success"} 3661`,
		`sandbox_fork_cost_usd_sum{model="sonnet"} 3.25`,
		`sandbox_fork_cost_usd_count{model="sonnet"} 3`,
	} {
		if !strings.Contains(string(want), line+"\n") {
			t.Errorf("%s holds no line %s", golden, line)
		}
	}
}

// everything is a registry as an engine has it.
func everything(t *testing.T) (*prometheus.Registry, *Metrics, client.MetricsHandler) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	m := New(reg, sets)
	BuildInfo(reg, "1.2.3")
	sdk, err := Temporal(reg)
	if err != nil {
		t.Fatal(err)
	}
	return reg, m, sdk
}

// fork does all that a fork can make to be counted, with names of its own.
func (p player) fork(i int) {
	id := strconv.Itoa(i)
	r := result(fork.Statuses[i%len(fork.Statuses)], "model-"+id, float64(i), fork.USD(i)*fork.Dollar)
	r.SandboxID, r.Branch, r.ForkNum = id, fork.Branch("run", i), i
	p.m.ForkEnded(r)
	p.m.ForkCancelled(time.Duration(i) * time.Millisecond)
	p.m.SandboxCreated("provider-"+id, time.Second, nil)
	p.m.SandboxCreated("local", time.Second, fault.New("", fault.Kind("kind-"+id), "x"))
	p.m.OrphansFound("provider-"+id, i)
	p.m.CallReserved(fork.Dollar)
	p.m.CallSettled(Call{Model: "model-" + id, Answered: i%2 == 0, Input: 1, Output: 2, CacheRead: 3, CacheWrite: 4, Cost: fork.Dollar / 100, Reserved: fork.Dollar})
	p.m.CallRefused(i)
	p.m.CallLimited(i)
	p.m.CallAdmitted(time.Duration(i))
	p.m.CallPaced(time.Duration(i))
	sdk := p.sdk.WithTags(map[string]string{"task_queue": "q@host-" + id, "workflow_id": id, "client_name": id})
	sdk.Counter("temporal_request").Inc(1)
	sdk.Gauge("temporal_num_pollers").Update(1)
	sdk.Timer("temporal_request_latency").Record(time.Second)
}

type player struct {
	m   *Metrics
	sdk client.MetricsHandler
}

func TestThousandForksAddNoSeries(t *testing.T) {
	reg, m, sdk := everything(t)
	p := player{m, sdk}
	// Once every label that there can be, strangers included.
	for _, model := range append(models, "x") {
		for _, status := range append(fork.Statuses, "x") {
			m.ForkEnded(result(status, model, 1, 1))
		}
		for _, answered := range []bool{true, false} {
			m.CallSettled(Call{Model: model, Answered: answered})
		}
	}
	for _, provider := range append(providers, "x") {
		m.SandboxCreated(provider, 0, nil)
		m.SandboxCreated(provider, 0, fault.New("", "x", "x"))
		m.OrphansFound(provider, 0)
	}
	p.fork(0)
	before := strings.Count(scrape(t, reg), "\n")
	var all sync.WaitGroup
	for i := range 1000 {
		all.Go(func() { p.fork(i) })
	}
	all.Wait()
	text := scrape(t, reg)
	if after := strings.Count(text, "\n"); before != after || after > 500 {
		t.Errorf("%d lines, %d before", after, before)
	}
	for _, line := range []string{
		// 125 of the thousand, one before, and the first once more.
		`sandbox_fork_completed_total{model="other",status="success"} 126`,
		`temporal_request_total{task_queue="q@host"} 1001`,
		`sandbox_gateway_reserved_usd 0`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
}

func TestEverythingIsNamedAsPrometheusAsks(t *testing.T) {
	reg, m, sdk := everything(t)
	m.ActiveSandboxes(reg, func(context.Context) map[string]int { return map[string]int{"local": 3, "a stranger": 1} })
	player{m, sdk}.fork(3)
	for _, name := range []string{
		"workflow_completed", "workflow_task_queue_poll_empty", "activity_execution_failed", "worker_start", "poller_start",
		"request_failure", "long_request", "sticky_cache_hit", "sticky_cache_total_forced_eviction", "unregistered_activity_invocation",
	} {
		sdk.Counter("temporal_" + name).Inc(1)
	}
	for _, name := range []string{"worker_task_slots_available", "worker_task_slots_used", "sticky_cache_size", "workflow_active_thread_count"} {
		sdk.Gauge("temporal_" + name).Update(1)
	}
	for _, name := range []string{"workflow_endtoend_latency", "activity_schedule_to_start_latency", "workflow_task_replay_latency"} {
		sdk.Timer("temporal_" + name).Record(time.Second)
	}
	text := scrape(t, reg)
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, line := range []string{
		`sandbox_active{provider="local"} 3`, `sandbox_active{provider="other"} 1`, `sandbox_build_info{version="1.2.3"} 1`,
		`temporal_workflow_active_threads 1`, `temporal_activity_execution_failed_total 1`,
		`temporal_workflow_endtoend_latency_seconds_bucket{le="1"} 1`, `temporal_workflow_endtoend_latency_seconds_bucket{le="0.5"} 0`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
}

func TestCallsAndSandboxesAreCounted(t *testing.T) {
	reg, m, _ := everything(t)
	m.CallReserved(2 * fork.Dollar)
	m.CallReserved(3 * fork.Dollar)
	m.CallSettled(Call{Model: "sonnet", Answered: true, Input: 10, Output: 20, CacheRead: 30, CacheWrite: 40, Cost: fork.Dollar / 2, Reserved: 2 * fork.Dollar})
	m.CallRefused(402)
	m.CallLimited(529)
	m.CallAdmitted(3 * time.Millisecond)
	m.CallPaced(2 * time.Second)
	m.SandboxCreated("local", 40*time.Millisecond, nil)
	m.SandboxCreated("local", time.Second, fault.New("make", fault.Full, "no space"))
	m.OrphansFound("local", 2)
	m.OrphansFound("local", 1)
	for _, v := range []fork.Verify{
		{Status: fork.Success, Duration: 2}, {Status: fork.Failed, ExitCode: 1, Duration: 3}, {Status: fork.TimedOut, ExitCode: fork.Unverified, Duration: 60},
		{Status: fork.Failed, ExitCode: fork.Unverified}, {Status: fork.Success, Duration: math.NaN()},
	} {
		r := result(fork.Success, "sonnet", 5, fork.Dollar)
		r.Verify = &v
		m.ForkEnded(r)
	}
	m.ForkCancelled(3 * time.Second)
	m.ForkCancelled(-time.Second) // a clock that was set back
	text := scrape(t, reg)
	for _, line := range []string{
		`sandbox_gateway_reserved_usd 3`,
		`sandbox_gateway_calls_total{model="sonnet",outcome="answered"} 1`,
		`sandbox_gateway_tokens_total{kind="cache_write",model="sonnet"} 40`,
		`sandbox_gateway_cost_usd_total{model="sonnet"} 0.5`,
		`sandbox_gateway_refused_total{code="402"} 1`,
		`sandbox_gateway_rate_limited_total{code="529"} 1`,
		`sandbox_gateway_added_seconds_bucket{le="0.005"} 1`,
		`sandbox_gateway_paced_seconds_sum 2`,
		`sandbox_created_total{outcome="success",provider="local"} 1`,
		`sandbox_created_total{outcome="full",provider="local"} 1`,
		`sandbox_create_seconds_count{provider="local"} 1`,
		`sandbox_orphans{provider="local"} 1`,
		`sandbox_orphans_found_total{provider="local"} 3`,
		`sandbox_cancel_seconds_count 1`,
		`sandbox_fork_verified_total{outcome="passed"} 2`,
		`sandbox_fork_verified_total{outcome="failed"} 1`,
		`sandbox_fork_verified_total{outcome="timeout"} 1`,
		`sandbox_fork_verified_total{outcome="error"} 1`,
		`sandbox_fork_verify_seconds_sum 5`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
}

func TestNothingIsCountedWithoutMetrics(t *testing.T) {
	var m *Metrics
	player{m, client.MetricsNopHandler}.fork(1) // it does not panic
}

func TestStrangeNumbersDoNotSpoilTheSums(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := New(reg, sets)
	m.ForkEnded(result(fork.Success, "sonnet", math.NaN(), -fork.Dollar))
	m.ForkEnded(result(fork.Success, "sonnet", -5, fork.Dollar))
	m.ForkEnded(result(fork.Success, "sonnet", 5, fork.Dollar))
	text := scrape(t, reg)
	for _, line := range []string{
		`sandbox_fork_completed_total{model="sonnet",status="success"} 3`,
		`sandbox_fork_duration_seconds_sum{status="success"} 5`,
		`sandbox_fork_cost_usd_sum{model="sonnet"} 2`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
}
