// Package logs makes the logger of the engine and of workers: one line for
// each event, as text or as JSON, without secrets.
package logs

import (
	"context"
	"io"
	"log/slog"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// The formats of lines.
const (
	Text = "text"
	JSON = "json"
)

// Options say how lines are written.
type Options struct {
	Format string       // Text or JSON; empty: Text
	Level  slog.Leveler // nil: info

	// Secrets returns what must stand in no line. It is asked for each line,
	// so that a secret which came later is kept out too. Nil: there are none;
	// what looks like a secret is kept out all the same.
	Secrets func() []string
}

// New returns a logger that writes to w, one call of Write for each line.
func New(w io.Writer, o Options) *slog.Logger {
	ho := &slog.HandlerOptions{Level: o.Level}
	w = &redactor{to: w, secrets: o.Secrets}
	var h slog.Handler = slog.NewTextHandler(w, ho)
	if o.Format == JSON {
		h = slog.NewJSONHandler(w, ho)
	}
	return slog.New(&placed{h})
}

// placed says whose a line of Temporal is: its SDK and its server name the
// workflow, whose id tells run and fork.
type placed struct{ slog.Handler }

// Handle is part of [slog.Handler].
func (h *placed) Handle(ctx context.Context, r slog.Record) error {
	var more []slog.Attr
	r.Attrs(func(a slog.Attr) bool {
		more = append(more, place(a)...)
		return true
	})
	if len(more) > 0 {
		r = r.Clone()
		r.AddAttrs(more...)
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs is part of [slog.Handler].
func (h *placed) WithAttrs(attrs []slog.Attr) slog.Handler {
	all := append([]slog.Attr{}, attrs...)
	for _, a := range attrs {
		all = append(all, place(a)...)
	}
	return &placed{h.Handler.WithAttrs(all)}
}

// WithGroup is part of [slog.Handler].
func (h *placed) WithGroup(name string) slog.Handler { return &placed{h.Handler.WithGroup(name)} }

// place returns the run, and the fork if it is one, of Temporal's name for a
// workflow.
func place(a slog.Attr) []slog.Attr {
	if a.Key != "WorkflowID" && a.Key != "wf-id" {
		return nil
	}
	run, num, ok := fork.ParseWorkflowID(a.Value.String())
	if !ok {
		return nil
	}
	if num == 0 {
		return []slog.Attr{slog.String(Run, run)}
	}
	return []slog.Attr{slog.String(Run, run), slog.Int(Fork, num)}
}
