package activities

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/tracing"
)

// startSpan begins a span below that of the activity. It records nothing when
// the activity is not traced.
func startSpan(ctx context.Context, name string, attributes ...attribute.KeyValue) (context.Context, trace.Span) {
	return trace.SpanFromContext(ctx).TracerProvider().Tracer(tracing.Scope).Start(ctx, name, trace.WithAttributes(attributes...))
}

// endSpan ends a span with what came of it. Of an error only the kind is said:
// its text may hold what an agent wrote.
func endSpan(span trace.Span, err error) {
	if err != nil {
		kind := string(fault.KindOf(err))
		span.SetStatus(codes.Error, kind)
		span.SetAttributes(semconv.ErrorTypeKey.String(kind))
	}
	span.End()
}

// forkAttributes say which fork a span belongs to.
func forkAttributes(spec fork.Spec) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.String("sandbox.run", spec.Run), attribute.Int("sandbox.fork", spec.Num), attribute.String("sandbox.provider", spec.Provider),
	}
}

// traceAgent begins the span of following an agent, under which its calls of
// the model are recorded too.
func (a *Activities) traceAgent(ctx context.Context, in orchestrator.RunAgentInput) (context.Context, func(orchestrator.RunAgentOutput, error)) {
	ctx, span := startSpan(ctx, "invoke_agent "+in.Spec.Agent, append(forkAttributes(in.Spec),
		semconv.GenAIOperationNameInvokeAgent, semconv.GenAIAgentName(in.Spec.Agent), semconv.GenAIRequestModel(in.Spec.Model),
		semconv.GenAIConversationID(session(in.Spec)), attribute.Int("sandbox.attempt", in.Attempt))...)
	if in.Spec.Agent == "claude" {
		span.SetAttributes(semconv.GenAIProviderNameAnthropic)
	}
	forget := a.Gateway.Trace(ctx, in.Spec.Run, in.Spec.Num)
	return ctx, func(out orchestrator.RunAgentOutput, err error) {
		forget()
		if err == nil {
			u := out.Usage
			span.SetAttributes(attribute.String("sandbox.status", string(out.Status)), attribute.Int("sandbox.turns", out.Turns),
				semconv.GenAIUsageInputTokens(int(u.InputTokens+u.CacheReadTokens+u.CacheWriteTokens)), semconv.GenAIUsageOutputTokens(int(u.OutputTokens)),
				attribute.Float64("sandbox.cost_usd", u.Cost.Float()))
		}
		endSpan(span, err)
	}
}

// turns records the turns of an agent: each from where the one before it was
// seen to end.
type turns struct {
	seen  int
	since time.Time
	begun bool
}

// note records the turns up to the count. What an agent did before it was
// followed here was recorded by whoever followed it then.
func (t *turns) note(ctx context.Context, count int, now time.Time, before bool) {
	if !trace.SpanFromContext(ctx).IsRecording() {
		return
	}
	if !t.begun {
		t.begun, t.since = true, now
		if before {
			t.seen = count
		}
	}
	for t.seen < count {
		t.seen++
		_, span := trace.SpanFromContext(ctx).TracerProvider().Tracer(tracing.Scope).Start(ctx, "agent turn",
			trace.WithTimestamp(t.since), trace.WithAttributes(attribute.Int("sandbox.turn", t.seen)))
		span.End(trace.WithTimestamp(now))
		t.since = now
	}
}
