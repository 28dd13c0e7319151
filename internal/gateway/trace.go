package gateway

import (
	"context"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// spans knows under which span the calls of each fork are recorded. Nothing of
// a prompt, an answer or a key is in an attribute.
type spans struct {
	tracer  trace.Tracer // nil: nothing is recorded
	parents sync.Map     // of *trace.SpanContext, by tenantKey
}

// Trace records the calls of the fork under the span of ctx, until forget is
// called or another Trace of the same fork. Without a span it does nothing.
func (g *Gateway) Trace(ctx context.Context, run string, num int) (forget func()) {
	parent := trace.SpanContextFromContext(ctx)
	if g.spans.tracer == nil || !parent.IsValid() {
		return func() {}
	}
	key := tenantKey{run, num}
	g.spans.parents.Store(key, &parent)
	return func() { g.spans.parents.CompareAndDelete(key, &parent) }
}

// traced begins the span of a call that was let through; the call's
// settlement says what it came to.
func (f *forwarding) traced() (end func()) {
	s := &f.g.spans
	if s.tracer == nil || f.call == nil && f.batch == nil {
		return func() {}
	}
	ctx := context.Background()
	if parent, ok := s.parents.Load(tenantKey{f.tenant.run, f.tenant.num}); ok {
		ctx = trace.ContextWithRemoteSpanContext(ctx, *parent.(*trace.SpanContext)) //nolint:forcetypeassert // only Trace stores
	}
	if o := f.batch; o != nil {
		_, span := s.tracer.Start(ctx, "make batch", trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
			semconv.GenAIProviderNameAnthropic, semconv.ServerAddress(f.base.Hostname()),
			attribute.String("sandbox.run", f.tenant.run), attribute.Int("sandbox.fork", f.tenant.num),
			attribute.Int("sandbox.batch.requests", o.requests), attribute.Float64("sandbox.reserved_usd", o.Reserved().Float())))
		return func() {
			if o.ID == "" {
				span.SetStatus(codes.Error, "not made")
			}
			span.End()
		}
	}
	// The name that the call gives its model is the agent's to choose: only
	// one that the price list knows is shown.
	model := f.g.ModelID(f.call.model)
	provider := semconv.GenAIProviderNameAnthropic
	if f.maker == OpenAI {
		provider = semconv.GenAIProviderNameOpenAI
	}
	_, span := s.tracer.Start(ctx, "chat "+model, trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(f.call.started), trace.WithAttributes(
		semconv.GenAIOperationNameChat, provider, semconv.GenAIRequestModel(model), semconv.GenAIRequestStream(f.request.stream),
		semconv.ServerAddress(f.base.Hostname()),
		attribute.String("sandbox.run", f.tenant.run), attribute.Int("sandbox.fork", f.tenant.num)))
	f.call.span = span
	return func() { span.End() }
}

// record puts the settlement of a call into its span.
func (c *call) record(s ledger.Settlement) {
	if c.span == nil {
		return
	}
	c.span.SetAttributes(
		// The convention counts what was read from a cache as input too.
		semconv.GenAIUsageInputTokens(int(s.Tokens.Prompt())), semconv.GenAIUsageOutputTokens(int(s.Tokens.Output)),
		semconv.GenAIUsageCacheReadInputTokens(int(s.Tokens.CacheRead)),
		semconv.GenAIUsageCacheCreationInputTokens(int(s.Tokens.CacheWrite5m+s.Tokens.CacheWrite1h)),
		attribute.Float64("sandbox.cost_usd", s.Cost.Float()))
	if model := c.g.ModelID(s.Model); model != "" {
		c.span.SetAttributes(semconv.GenAIResponseModel(model))
	}
	if s.Status != 0 {
		c.span.SetAttributes(semconv.HTTPResponseStatusCode(s.Status))
	}
	if s.State != ledger.Settled {
		c.span.SetStatus(codes.Error, string(s.State))
	}
}
