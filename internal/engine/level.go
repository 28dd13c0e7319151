package engine

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// fatal is the level of what the server cannot go on from.
const fatal = slog.LevelError + 4

// A threshold is the least level that the server is listened to at. While its
// parts come up and go down they complain of each other's absence, as errors,
// so in that time nothing but fatal is heard, unless somebody wants to hear
// everything: what goes wrong then is returned by Start and Stop.
type threshold struct {
	base   slog.Leveler
	hushed atomic.Bool
}

var _ slog.Leveler = (*threshold)(nil)

func newThreshold(base slog.Leveler) *threshold { return &threshold{base: base} }

// hush begins such a time, and unhush ends it.
func (t *threshold) hush()   { t.hushed.Store(true) }
func (t *threshold) unhush() { t.hushed.Store(false) }

// Level returns what is the least now.
func (t *threshold) Level() slog.Level {
	base := t.base.Level()
	if t.hushed.Load() && base >= slog.LevelWarn {
		return max(fatal, base)
	}
	return base
}

// over returns next, hearing only what reaches the threshold.
func (t *threshold) over(next slog.Handler) slog.Handler { return &levelled{t, next} }

type levelled struct {
	*threshold
	next slog.Handler
}

var _ slog.Handler = (*levelled)(nil)

func (h *levelled) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= h.Level() && h.next.Enabled(ctx, l)
}

func (h *levelled) Handle(ctx context.Context, r slog.Record) error { return h.next.Handle(ctx, r) }

func (h *levelled) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &levelled{h.threshold, h.next.WithAttrs(attrs)}
}

func (h *levelled) WithGroup(name string) slog.Handler {
	return &levelled{h.threshold, h.next.WithGroup(name)}
}
