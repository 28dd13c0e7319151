// Package tracing sends OpenTelemetry traces to where the standard variables
// of the environment say. When they name no place nothing is made, recorded or
// sent.
//
// A trace is a help, never a condition: a collector that is down or slow costs
// a warning and the spans, and nothing waits for it.
package tracing

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.temporal.io/sdk/contrib/opentelemetry"
	"go.temporal.io/sdk/interceptor"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Scope is the name that this program's own spans are recorded under.
const Scope = "github.com/sandbox-temporal/sandbox-temporal"

// Options say who is traced.
type Options struct {
	Getenv  func(string) string // of the process; the exporters read the same variables themselves
	Service string              // unless OTEL_SERVICE_NAME is set
	Version string

	// Logger gets one warning, when spans are lost for the first time.
	Logger *slog.Logger
}

// A Tracing records spans and sends them. A nil one does nothing.
type Tracing struct {
	provider *sdktrace.TracerProvider
}

// Wanted reports whether the environment names a place for traces.
func Wanted(getenv func(string) string) bool {
	if getenv("OTEL_SDK_DISABLED") == "true" || getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	return getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != ""
}

// Start returns what records spans, or nil when none are wanted. It connects
// to nothing yet. An error is fault.Invalid and names the variable; whoever
// gets one warns, and goes on without traces.
func Start(ctx context.Context, o Options) (*Tracing, error) {
	if !Wanted(o.Getenv) {
		return nil, nil //nolint:nilnil // a nil Tracing is one that does nothing
	}
	exporter, err := newExporter(ctx, o.Getenv)
	if err != nil {
		return nil, err
	}
	// The variables come last: they win.
	res, err := resource.New(ctx, resource.WithAttributes(
		attribute.String("service.name", o.Service), attribute.String("service.version", o.Version)), resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil {
		return nil, fault.New("traces", fault.Invalid, "OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	return &Tracing{provider: sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(&lossy{SpanExporter: exporter, log: o.Logger}), sdktrace.WithResource(res), sdktrace.WithIDGenerator(ids{}))}, nil
}

// newExporter speaks the protocol that the environment names. It does not try
// twice: what cannot be sent now is lost, and nobody waits for it.
func newExporter(ctx context.Context, getenv func(string) string) (sdktrace.SpanExporter, error) {
	name := "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
	protocol := getenv(name)
	if protocol == "" {
		name = "OTEL_EXPORTER_OTLP_PROTOCOL"
		protocol = getenv(name)
	}
	var exporter sdktrace.SpanExporter
	var err error
	switch protocol {
	case "", "http/protobuf":
		exporter, err = otlptracehttp.New(ctx, otlptracehttp.WithRetry(otlptracehttp.RetryConfig{}))
	case "grpc":
		exporter, err = otlptracegrpc.New(ctx, otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{}))
	default:
		return nil, fault.New("traces", fault.Invalid, "%s is %q", name, protocol).Hinted("Use http/protobuf or grpc.")
	}
	if err != nil {
		return nil, fault.New("traces", fault.Invalid, "OTEL_EXPORTER_OTLP_ENDPOINT: %w", err).Hinted("Check the OTEL_ variables.")
	}
	return exporter, nil
}

// Tracer returns what this program's own spans are made with, nil when none
// are recorded.
func (t *Tracing) Tracer() trace.Tracer {
	if t == nil {
		return nil
	}
	return t.provider.Tracer(Scope)
}

// Interceptors are for a Temporal client, and with it for its workers: they
// carry the trace through workflows, their children and activities.
func (t *Tracing) Interceptors() ([]interceptor.ClientInterceptor, error) {
	if t == nil {
		return nil, nil
	}
	o := opentelemetry.TracerOptions{
		Tracer: t.Tracer(),
		// A command that waits asks several times a second.
		DisableQueryTracing: true,
		// Nothing but the ids of the span leaves this program.
		DisableBaggage: true, TextMapPropagator: propagation.TraceContext{},
		// A run may have been started by a client that traces differently.
		AllowInvalidParentSpans: true,
	}
	base, err := opentelemetry.NewTracer(o)
	if err != nil {
		return nil, fault.New("traces", fault.Internal, "%w", err)
	}
	traced := interceptor.NewTracingInterceptor(&tracer{Tracer: base, options: o})
	return []interceptor.ClientInterceptor{&both{Interceptor: traced}}, nil
}

// Stop sends what is left, for at most as long as patience.
func (t *Tracing) Stop(patience time.Duration) {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_ = t.provider.Shutdown(ctx) // the exporter has warned
}

// lossy is an exporter whose failures are a warning, once.
type lossy struct {
	sdktrace.SpanExporter
	log  *slog.Logger
	once sync.Once
}

// ExportSpans implements sdktrace.SpanExporter.
func (l *lossy) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	if err := l.SpanExporter.ExportSpans(ctx, spans); err != nil {
		l.once.Do(func() {
			l.log.Warn("Traces cannot be sent; check OTEL_EXPORTER_OTLP_ENDPOINT", "error", err)
		})
	}
	return nil
}
