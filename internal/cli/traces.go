package cli

import (
	"context"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/codes"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/tracing"
)

// traceFlush bounds how long an engine or a worker that ends waits for the
// collector, commandFlush a command.
const (
	traceFlush   = 3 * time.Second
	commandFlush = time.Second
)

// startTraces returns what records spans, nil when none are wanted. Traces
// never stop anything: what is wrong with them is a warning.
func (p *plugged) startTraces(ctx context.Context, log *slog.Logger, part string) *tracing.Tracing {
	t, err := tracing.Start(ctx, tracing.Options{Getenv: p.env.Getenv, Service: program + "-" + part, Version: p.env.Version, Logger: log})
	if err != nil {
		log.Warn("There will be no traces", logs.Error, err, logs.Hint, fault.HintOf(err))
	}
	return t
}

// trace begins the span of a command.
func (p *plugged) trace(ctx context.Context, command string) (context.Context, func(error)) {
	if p.env.Getenv == nil {
		return ctx, func(error) {}
	}
	p.traces = p.startTraces(ctx, slog.New(slog.NewTextHandler(p.env.Stderr, nil)), "cli")
	if p.traces == nil {
		return ctx, func(error) {}
	}
	ctx, span := p.traces.Tracer().Start(ctx, program+" "+command)
	return ctx, func(err error) {
		if err != nil {
			span.SetStatus(codes.Error, string(fault.KindOf(err)))
		}
		span.End()
		p.traces.Stop(commandFlush)
	}
}
