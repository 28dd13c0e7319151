//go:build !noembed

package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.temporal.io/server/common/log"
	"go.temporal.io/server/common/log/tag"
)

// A serverLogger gives slog what the server says.
type serverLogger struct {
	slog  *slog.Logger
	fatal func(error)
}

var (
	_ log.Logger      = (*serverLogger)(nil)
	_ log.WithLogger  = (*serverLogger)(nil)
	_ log.SLogWrapper = (*serverLogger)(nil)
)

func newServerLogger(l *slog.Logger, fatal func(error)) *serverLogger {
	return &serverLogger{slog: l, fatal: fatal}
}

// SLog returns the logger behind this one.
func (l *serverLogger) SLog() *slog.Logger { return l.slog }

// With returns a logger that puts tags on everything.
func (l *serverLogger) With(tags ...tag.Tag) log.Logger {
	return &serverLogger{slog: slog.New(l.slog.Handler().WithAttrs(attrs(tags))), fatal: l.fatal}
}

func (l *serverLogger) say(level slog.Level, msg string, tags []tag.Tag) {
	ctx := context.Background()
	h := l.slog.Handler()
	if !h.Enabled(ctx, level) {
		return
	}
	r := slog.NewRecord(time.Now(), level, msg, 0)
	r.AddAttrs(attrs(tags)...)
	_ = h.Handle(ctx, r) // there is nowhere to say that saying failed
}

func attrs(tags []tag.Tag) []slog.Attr {
	all := make([]slog.Attr, len(tags))
	for i, t := range tags {
		all[i] = slog.Any(t.Key(), t.Value())
	}
	return all
}

func (l *serverLogger) Debug(msg string, tags ...tag.Tag) { l.say(slog.LevelDebug, msg, tags) }
func (l *serverLogger) Info(msg string, tags ...tag.Tag)  { l.say(slog.LevelInfo, msg, tags) }
func (l *serverLogger) Warn(msg string, tags ...tag.Tag)  { l.say(slog.LevelWarn, msg, tags) }
func (l *serverLogger) Error(msg string, tags ...tag.Tag) { l.say(slog.LevelError, msg, tags) }

// DPanic is an error: the server means it to panic in development only.
func (l *serverLogger) DPanic(msg string, tags ...tag.Tag) { l.say(slog.LevelError, msg, tags) }

// Panic logs and panics, as the server expects: it recovers from some of them.
func (l *serverLogger) Panic(msg string, tags ...tag.Tag) {
	l.say(slog.LevelError, msg, tags)
	panic(msg)
}

// Fatal logs, reports, and never returns. The server expects that the process
// ends; that is for its owner to do, who has sandboxes to think of. So the
// goroutine waits for that: ended alone it would take what it runs under, like
// a sync.Once, into a panic.
func (l *serverLogger) Fatal(msg string, tags ...tag.Tag) {
	l.say(fatal, msg, tags)
	err := errors.New(msg)
	for _, t := range tags {
		err = fmt.Errorf("%w; %s: %v", err, t.Key(), t.Value())
	}
	l.fatal(err)
	select {}
}
