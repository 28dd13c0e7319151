package activities

import (
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/metrics"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/fake"
)

// TestEachEventIsOneLineWithRunForkAndSandbox also reads what was counted.
func TestEachEventIsOneLineWithRunForkAndSandbox(t *testing.T) {
	t.Parallel()
	w, ctx := setUp(t), t.Context()
	var out bytes.Buffer // all of it happens on this goroutine
	w.Logger = logs.New(&out, logs.Options{Format: logs.JSON})
	reg := prometheus.NewPedanticRegistry()
	w.Metrics = metrics.New(reg, metrics.Sets{Models: []string{"sonnet"}, Providers: []string{fake.ProviderName}})

	spec, ref := w.start(t, plan("", "Play @script slow")) // beats a few times
	ran, err := w.RunAgent(ctx, runInput(spec, ref))
	if err != nil || ran.Status != fork.Success {
		t.Fatalf("%+v, %v", ran, err)
	}
	if _, err := w.RunAgent(ctx, runInput(spec, ref)); err != nil { // as the next worker does
		t.Fatal(err)
	}
	if found, err := w.FindOrphanedSandboxes(ctx, orchestrator.FindOrphanedSandboxesInput{}); err != nil || len(found.Orphans) != 1 {
		t.Fatalf("%+v, %v", found, err)
	}
	for range 2 { // of which the second finds nothing to do
		if _, err := w.CleanupSandbox(ctx, orchestrator.CleanupSandboxInput{Provider: spec.Provider, Run: spec.Run, Num: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.RecordMetrics(ctx, orchestrator.RecordMetricsInput{Run: spec.Run, Cancelled: 2 * time.Second,
		Result: fork.Result{ForkNum: 1, SandboxID: ref.ID, Status: fork.Cancelled, Model: "sonnet"}}); err != nil {
		t.Fatal(err)
	}

	type line struct {
		Msg     string
		Run     string
		Fork    int
		Sandbox string
	}
	var got []line
	dec := json.NewDecoder(&out)
	for dec.More() {
		var l line
		if err := dec.Decode(&l); err != nil {
			t.Fatal(err)
		}
		if l.Fork == 0 && l.Sandbox != "" {
			l.Sandbox = "of the base"
		}
		got = append(got, l)
	}
	want := []line{
		{"Sandbox created", spec.Run, 0, "of the base"},
		{"Base ready", spec.Run, 0, ""},
		{"Sandbox created", spec.Run, 1, ref.ID},
		{"Agent started", spec.Run, 1, ref.ID},
		{"Agent ended", spec.Run, 1, ref.ID},
		{"Agent found again", spec.Run, 1, ref.ID},
		{"Agent ended", spec.Run, 1, ref.ID},
		{"Sandbox found that no run uses", spec.Run, 1, ref.ID},
		{"Sandbox removed", spec.Run, 1, ref.ID},
		{"Fork ended", spec.Run, 1, ref.ID},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	rec := httptest.NewRecorder()
	metrics.Handler(reg).ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	for _, line := range []string{
		`sandbox_created_total{outcome="success",provider="fake"} 2`,
		`sandbox_create_seconds_count{provider="fake"} 2`,
		`sandbox_orphans{provider="fake"} 1`,
		`sandbox_cancel_seconds_sum 2`,
		`sandbox_fork_completed_total{model="sonnet",status="cancelled"} 1`,
	} {
		if !strings.Contains(rec.Body.String(), line+"\n") {
			t.Errorf("no line %s in\n%s", line, rec.Body)
		}
	}
}
