package engine

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestServerIsQuietAndQuieterWhileItStops(t *testing.T) {
	var out bytes.Buffer
	quiet := newThreshold(slog.LevelWarn)
	// Made before the hush, as the server makes its loggers.
	log := slog.New(quiet.over(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))).With("a", 1).WithGroup("g")
	log.Info("one")
	log.Warn("two")
	quiet.hush()
	log.Error("three")
	log.Log(t.Context(), fatal, "four")
	quiet.unhush()
	log.Warn("five")
	got := out.String()
	for word, want := range map[string]bool{"one": false, "two": true, "three": false, "four": true, "five": true} {
		if strings.Contains(got, "msg="+word) != want {
			t.Errorf("%s: said %v\n%s", word, !want, got)
		}
	}
}

func TestHushSparesWhoWantsToHearEverything(t *testing.T) {
	for _, base := range []slog.Level{slog.LevelDebug, slog.LevelInfo, 100} {
		quiet := newThreshold(base)
		quiet.hush()
		if quiet.Level() != base {
			t.Errorf("%v became %v", base, quiet.Level())
		}
	}
}
