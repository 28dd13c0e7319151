package logs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// both calls f once for each format, with a logger and what it wrote.
func both(t *testing.T, secrets []string, f func(t *testing.T, log *slog.Logger, out *bytes.Buffer)) {
	t.Helper()
	for _, format := range []string{Text, JSON} {
		t.Run(format, func(t *testing.T) {
			var out bytes.Buffer
			f(t, New(&out, Options{Format: format, Level: slog.LevelDebug, Secrets: func() []string { return secrets }}), &out)
		})
	}
}

type loud struct{ Key, Nested any }

func (l loud) String() string { return fmt.Sprintf("loud %v", l.Key) }

func TestKnownSecretsAreInNoLine(t *testing.T) {
	const plain, odd = "correct-horse-battery", "with \"quotes\" & ünicode/+ \\ and\nlines"
	both(t, []string{plain, odd, ""}, func(t *testing.T, log *slog.Logger, out *bytes.Buffer) {
		for _, secret := range []string{plain, odd} {
			log.Info("message " + secret) //nolint:sloglint // that is what is tested
			log.Info("value", Name, secret)
			log.Info("key", slog.Group("g", slog.Any(secret, 1)))
			log.Info("error", Error, fmt.Errorf("wrapped: %w", errors.New("refused "+secret)))
			log.Info("structure", Name, loud{Key: secret, Nested: map[string]any{"k": []string{secret}}})
			log.Info("bytes", Name, json.RawMessage(`"`+plain+`"`))
			log.With(Name, secret).WithGroup("g").Warn("with")
			log.Log(context.Background(), slog.LevelDebug, "pointer", Name, &loud{Key: secret})
		}
		log.Info("in a URL", Address, "https://h/?q=with+%22quotes%22+%26+%C3%BCnicode%2F%2B+%5C+and%0Alines")
		text := out.String()
		for _, part := range []string{plain, "quotes", "nicode/+"} {
			if strings.Contains(text, part) {
				t.Errorf("%q is still there:\n%s", part, text)
			}
		}
		if n := strings.Count(text, removed); n < 17 {
			t.Errorf("%d were taken out:\n%s", n, text)
		}
		if n := strings.Count(text, "\n"); n != 17 {
			t.Errorf("%d lines", n)
		}
	})
}

// unknown are secrets that nobody told the logger of, and what must be left of
// each.
var unknown = []struct{ line, secret, left string }{
	{"sbxt-q83hf0aslkfh20f9_hf-29h3f9h293fh9", "q83hf0", ""},
	{"x-api-key: sk-ant-api03-AbCdEfGhIjKlMnOpQrStUvWxYz", "AbCdEf", "x-api-key: "},
	{"key sk-proj-AbCdEfGhIjKlMnOpQrSt.", "AbCdEf", "key "},
	{"push with ghp_0123456789abcdefABCDEF failed", "0123456789", "failed"},
	{"github_pat_11ABCDEFG0123456789_abcdefghij", "11ABCDEFG", ""},
	{"glpat-AbCdEfGhIjKlMnOpQrSt", "AbCdEf", ""},
	{"E2B_API_KEY=e2b_0123456789abcdef0123456789abcdef01234567", "0123456789", "E2B_API_KEY="},
	{"AKIAIOSFODNN7EXAMPLE in a line", "IOSFODNN7", "in a line"},
	{"token eyJhbGciOiJFUzI1NiJ9.eyJhY2NvdW50X2lkIjoiYTJkZDYifQ.c2lnbmF0dXJlLXZlcnktc2VjcmV0 end", "eyJhY2", "end"},
	{"Authorization: Bearer abcdef0123456789.~+/==", "abcdef0123", "Authorization: Bearer "},
	{"authorization: basic dXNlcjpwYXNzd29yZA==", "dXNlcjpw", "basic "},
	{"dial postgres://ledger:hunter22@db.example.com:5432/ledger", "hunter22", "@db.example.com"},
	{"-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIGLqnLhB\n-----END EC PRIVATE KEY-----", "MHcCAQEE", ""},
}

func TestWhatLooksLikeASecretIsInNoLine(t *testing.T) {
	both(t, nil, func(t *testing.T, log *slog.Logger, out *bytes.Buffer) {
		for _, c := range unknown {
			out.Reset()
			log.Info("it happened", Error, errors.New(c.line))
			if text := out.String(); strings.Contains(text, c.secret) || !strings.Contains(text, removed) || !strings.Contains(text, c.left) {
				t.Errorf("%s\nbecame %s", c.line, text)
			}
		}
	})
}

func TestOrdinaryLinesAreLeftAlone(t *testing.T) {
	both(t, nil, func(t *testing.T, log *slog.Logger, out *bytes.Buffer) {
		for _, line := range []string{
			"sandbox-orch-0123abcd-fork-12", "sandbox/sandbox-orch-0123abcd/3", "task-queue-of-the-whole-fleet-in-europe", "disk-0123456789abcdef0123456789",
			"0123456789abcdef0123456789abcdef01234567", "https://example.com:8443/a@b", "a basic problem with the disk", "127.0.0.1:9090",
			"git@github.com:owner/name.git", "claude-sonnet-5-5-20260930",
		} {
			out.Reset()
			log.Info("it happened", Name, line)
			if text := out.String(); strings.Contains(text, removed) || !strings.Contains(text, line) {
				t.Errorf("%s\nbecame %s", line, text)
			}
		}
	})
}

func TestLinesOfTemporalNameRunAndFork(t *testing.T) {
	var out bytes.Buffer
	log := New(&out, Options{Format: JSON})
	for _, c := range []struct {
		say       func()
		run, fork any
	}{
		{func() { log.Error("Activity error.", "WorkflowID", "sandbox-orch-0123abcd-fork-12") }, "sandbox-orch-0123abcd", 12.},   //nolint:sloglint // Temporal writes them so
		{func() { log.With("WorkflowID", "sandbox-orch-0123abcd-fork-3", "Attempt", 1).Warn("w") }, "sandbox-orch-0123abcd", 3.}, //nolint:sloglint // Temporal writes them so
		{func() { log.Info("i", "wf-id", "sandbox-orch-0123abcd") }, "sandbox-orch-0123abcd", nil},                               //nolint:sloglint // Temporal writes them so
		{func() { log.Info("i", "WorkflowID", "somebody-elses-fork-3") }, nil, nil},                                              //nolint:sloglint // Temporal writes them so
		{func() { log.Info("i") }, nil, nil},
	} {
		out.Reset()
		c.say()
		var line map[string]any
		if err := json.Unmarshal(out.Bytes(), &line); err != nil {
			t.Fatalf("%v: %s", err, out.String())
		}
		if line[Run] != c.run || line[Fork] != c.fork {
			t.Errorf("%s: want run %v, fork %v", out.String(), c.run, c.fork)
		}
	}
}

func TestLevelsAreKept(t *testing.T) {
	var out bytes.Buffer
	log := New(&out, Options{Level: slog.LevelWarn})
	log.Info("not wanted")
	log.Warn("wanted")
	if text := out.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, "level=WARN msg=wanted") {
		t.Error(text)
	}
}

func FuzzRedaction(f *testing.F) {
	for _, c := range unknown {
		f.Add(c.line, "a secret")
	}
	f.Add("a\"b\\c\nd", "a\"b\\c\nd")
	f.Fuzz(func(t *testing.T, text, secret string) {
		var out bytes.Buffer
		log := New(&out, Options{Format: JSON, Secrets: func() []string { return []string{secret} }})
		log.Info("x", Name, text+secret+text)
		if strings.ContainsAny(secret, "[]") {
			return // what takes its place could be a part of it
		}
		// Read back as a program reads it, the secret must be gone.
		var line map[string]any
		if len(secret) >= least && json.Unmarshal(out.Bytes(), &line) == nil {
			if said, _ := line[Name].(string); strings.Contains(said, secret) && !strings.Contains(removed, secret) {
				t.Errorf("%q is still in %s", secret, out.String())
			}
		}
	})
}
