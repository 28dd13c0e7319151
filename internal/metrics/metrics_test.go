package metrics

import (
	"flag"
	"math"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

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

func TestThousandForksAddNoSeries(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := New(reg, sets)
	// Once every label that there can be, strangers included.
	for _, model := range append(models, "x") {
		for _, status := range append(fork.Statuses, "x") {
			m.ForkEnded(result(status, model, 1, 1))
		}
	}
	before := strings.Count(scrape(t, reg), "\n")
	var all sync.WaitGroup
	for i := range 1000 {
		all.Go(func() {
			r := result(fork.Statuses[i%len(fork.Statuses)], "model-"+strconv.Itoa(i), float64(i), fork.USD(i)*fork.Dollar)
			r.SandboxID, r.Branch, r.ForkNum = strconv.Itoa(i), fork.Branch("run", i), i
			m.ForkEnded(r)
		})
	}
	all.Wait()
	text := scrape(t, reg)
	if after := strings.Count(text, "\n"); before != after || after > 250 {
		t.Errorf("%d lines, %d before", after, before)
	}
	// 125 of the thousand, one before.
	if line := `sandbox_fork_completed_total{model="other",status="success"} 126`; !strings.Contains(text, line+"\n") {
		t.Errorf("no line %s in\n%s", line, text)
	}
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
