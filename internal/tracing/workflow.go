package tracing

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.temporal.io/sdk/contrib/opentelemetry"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A workflow is run again whenever somebody asks about it or a worker takes it
// over, and its span would be recorded each time, under another id: what was
// done below it before would hang on a span that nobody ever sent. So its id
// follows from the workflow, and it is recorded by whoever sees it end.

// runWorkflow is the operation of a workflow's own span.
const runWorkflow = "RunWorkflow"

// tracer is the SDK's, with spans of our kind.
type tracer struct {
	interceptor.Tracer
	options opentelemetry.TracerOptions
}

// StartSpan implements interceptor.Tracer.
func (t *tracer) StartSpan(o *interceptor.TracerStartSpanOptions) (interceptor.TracerSpan, error) {
	options := t.options
	options.SpanStarter = func(ctx context.Context, tr trace.Tracer, name string, opts ...trace.SpanStartOption) trace.Span {
		if o.Operation == runWorkflow {
			ctx = context.WithValue(ctx, idKey{}, o.IdempotencyKey)
		}
		_, span := tr.Start(ctx, name, opts...)
		return &quiet{Span: span, held: o.Operation == runWorkflow}
	}
	once, err := opentelemetry.NewTracer(options)
	if err != nil {
		return nil, err
	}
	return once.StartSpan(o)
}

// quiet is a span that says of an error only its kind: the text may hold what
// an agent wrote.
type quiet struct {
	trace.Span
	held bool // it is not recorded
}

// RecordError implements trace.Span.
func (q *quiet) RecordError(err error, _ ...trace.EventOption) {
	if err != nil {
		q.SetAttributes(attribute.String("error.type", kind(err)))
	}
}

// SetStatus implements trace.Span.
func (q *quiet) SetStatus(code codes.Code, _ string) { q.Span.SetStatus(code, "") }

// End implements trace.Span.
func (q *quiet) End(o ...trace.SpanEndOption) {
	if !q.held {
		q.Span.End(o...)
	}
}

// kind is the word for an error, also for one that went through Temporal.
func kind(err error) string {
	var app *temporal.ApplicationError
	if errors.As(err, &app) {
		return app.Type()
	}
	return string(fault.KindOf(err))
}

// idKey is where a context holds what the id of the next span follows from.
type idKey struct{}

// ids makes the ids of spans.
type ids struct{}

// NewIDs implements sdktrace.IDGenerator.
func (i ids) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	var id trace.TraceID
	if name, ok := ctx.Value(idKey{}).(string); ok {
		sum := sha256.Sum256([]byte("trace " + name))
		copy(id[:], sum[:])
	} else {
		rand.Read(id[:]) // it crashes the program rather than fail
	}
	return id, i.NewSpanID(ctx, id)
}

// NewSpanID implements sdktrace.IDGenerator.
func (ids) NewSpanID(ctx context.Context, of trace.TraceID) trace.SpanID {
	var id trace.SpanID
	if name, ok := ctx.Value(idKey{}).(string); ok {
		sum := sha256.Sum256(fmt.Appendf(nil, "span %s %s", of, name))
		copy(id[:], sum[:])
	} else {
		rand.Read(id[:])
	}
	return id
}

// both is the SDK's interceptor, and inside it one that knows which spans are
// those of a repetition.
type both struct{ interceptor.Interceptor }

// InterceptWorkflow implements interceptor.WorkerInterceptor.
func (b *both) InterceptWorkflow(ctx workflow.Context, next interceptor.WorkflowInboundInterceptor) interceptor.WorkflowInboundInterceptor {
	return b.Interceptor.InterceptWorkflow(ctx, &watching{interceptor.WorkflowInboundInterceptorBase{Next: next}})
}

type watching struct {
	interceptor.WorkflowInboundInterceptorBase
}

// ExecuteWorkflow has the span of a workflow recorded that ends here and now.
// One that is only dropped from memory does not come back from Next.
func (w *watching) ExecuteWorkflow(ctx workflow.Context, in *interceptor.ExecuteWorkflowInput) (any, error) {
	out, err := w.Next.ExecuteWorkflow(ctx, in)
	hold(ctx, workflow.IsReplaying(ctx))
	return out, err
}

// ExecuteUpdate has the span of an update recorded by who carries it out first.
func (w *watching) ExecuteUpdate(ctx workflow.Context, in *interceptor.UpdateInput) (any, error) {
	if workflow.IsReplaying(ctx) {
		hold(ctx, true)
	}
	return w.Next.ExecuteUpdate(ctx, in)
}

func hold(ctx workflow.Context, held bool) {
	if span, ok := opentelemetry.SpanFromWorkflowContext(ctx); ok {
		if q, ok := span.(*quiet); ok {
			q.held = held
		}
	}
}
