package tracing

import (
	"context"
	"errors"
	"log/slog"
	"net/http/httptest"
	"os"
	"slices"
	"testing"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.temporal.io/sdk/contrib/opentelemetry"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/temporal"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// newTracer returns a tracer whose spans a collector gets when stop is called.
func newTracer(t *testing.T) (tr *tracer, c *collector, stop func()) {
	t.Helper()
	c = &collector{}
	srv := httptest.NewServer(c)
	t.Cleanup(srv.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	all, err := Start(t.Context(), Options{Getenv: os.Getenv, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	o := opentelemetry.TracerOptions{Tracer: all.Tracer(), DisableBaggage: true, TextMapPropagator: propagation.TraceContext{}}
	base, err := opentelemetry.NewTracer(o)
	if err != nil {
		t.Fatal(err)
	}
	return &tracer{Tracer: base, options: o}, c, func() { all.Stop(10 * time.Second) }
}

// begin starts a span of the operation and returns its id too.
func begin(t *testing.T, tr *tracer, operation, key string) (interceptor.TracerSpan, trace.SpanContext) {
	t.Helper()
	span, err := tr.StartSpan(&interceptor.TracerStartSpanOptions{Operation: operation, Name: "x", IdempotencyKey: key, Time: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return span, trace.SpanContextFromContext(tr.ContextWithSpan(context.Background(), span))
}

func TestAWorkflowThatIsRunAgainHasTheSpanItHad(t *testing.T) {
	tr, c, stop := newTracer(t)
	_, first := begin(t, tr, runWorkflow, "run:1")
	again, second := begin(t, tr, runWorkflow, "run:1")
	_, other := begin(t, tr, runWorkflow, "run:2")
	if !first.Equal(second) || first.SpanID() == other.SpanID() {
		t.Errorf("%v, %v, %v", first, second, other)
	}
	one, a := begin(t, tr, "StartActivity", "run:1")
	_, b := begin(t, tr, "StartActivity", "run:1")
	if a.SpanID() == b.SpanID() {
		t.Errorf("two activities are %v", a)
	}
	one.Finish(&interceptor.TracerFinishSpanOptions{})
	again.Finish(&interceptor.TracerFinishSpanOptions{}) // nobody saw the workflow end
	stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.names, []string{"StartActivity:x"}) {
		t.Errorf("%q were recorded", c.names)
	}
}

func TestOfAnErrorOnlyTheKindIsTold(t *testing.T) {
	for want, err := range map[string]error{
		"denied":               fault.New("", fault.Denied, "Waldmeister"),
		"SandboxCreationError": temporal.NewApplicationError("Waldmeister", "SandboxCreationError", "Waldmeister"),
		"internal":             errors.New("Waldmeister"),
	} {
		tr, c, stop := newTracer(t)
		span, _ := begin(t, tr, "RunActivity", "")
		span.Finish(&interceptor.TracerFinishSpanOptions{Error: err})
		stop()
		c.mu.Lock()
		if !c.holds(want) || c.holds("Waldmeister") {
			t.Errorf("%v: %q", err, c.bodies)
		}
		c.mu.Unlock()
	}
}
