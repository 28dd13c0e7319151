package local

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func TestOutputsCanBeOpenedAgainAndNotTruncated(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), testSpec("reopen"))
	out, errs, exit, err := sandbox.Output(t.Context(), sb, "reopen", sandbox.Cmd{Args: []string{"sh", "-c",
		"echo one; echo two > /dev/stdout; echo three >> /dev/stdout; echo four > /dev/stderr; : > /proc/self/fd/1; echo five"}}, 1000)
	if err != nil || exit.Code != 0 || string(out) != "one\ntwo\nthree\nfive\n" || string(errs) != "four\n" {
		t.Errorf("%q, %q, %+v, %v", out, errs, exit, err)
	}
}

func TestWhatAProgramWroteIsThereWhenItHasEnded(t *testing.T) {
	// A child that it left behind keeps the pipe open and never stops writing.
	_, sb := newSandbox(t, newProvider(t), testSpec("orphan"))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p, err := sb.Start(ctx, "noisy", sandbox.Cmd{Args: []string{"sh", "-c", "(sleep 0.3; while :; do echo noise; done) & head -c 900000 /dev/zero; exit 3"}})
	if err != nil {
		t.Fatal(err)
	}
	exit, err := p.Wait(ctx)
	if err != nil || exit.Code != 3 {
		t.Fatalf("%+v, %v", exit, err)
	}
	got, err := sandbox.ReadAll(ctx, p, sandbox.Stdout, 900000)
	if err != nil || len(got) != 900000 || strings.Trim(string(got), "\x00") != "" {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := p.Signal(ctx, sandbox.Kill); err != nil {
		t.Error(err)
	}
}

func TestNoMoreThanTheBoundIsKeptOfAnOutput(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	o, w, err := newOutput(func() (*os.File, error) { return f, nil }, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("1"); err != nil {
		t.Fatal(err)
	}
	o.drain()
	o.mu.Lock()
	o.kept = maxOutput - 4
	o.mu.Unlock()
	for range 100 {
		o.drain() // an empty pipe makes no room
	}
	if _, err := w.WriteString("2345678"); err != nil {
		t.Fatal(err)
	}
	o.drain()
	if got, err := os.ReadFile(f.Name()); err != nil || string(got) != "12345" {
		t.Errorf("%q, %v", got, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the output to end", func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.over
	})
}

func TestAnOutputReachesAFileThatTheKernelMovesNothingTo(t *testing.T) {
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "out"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) // splice(2) refuses those
	if err != nil {
		t.Fatal(err)
	}
	o, w, err := newOutput(func() (*os.File, error) { return f, nil }, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, text := range []string{"one ", "two"} {
		if _, err := w.WriteString(text); err != nil {
			t.Fatal(err)
		}
		o.drain()
	}
	if got, err := os.ReadFile(f.Name()); err != nil || string(got) != "one two" {
		t.Errorf("%q, %v", got, err)
	}
}
