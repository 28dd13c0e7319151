//go:build !noembed

package engine

import (
	"bytes"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestFatalIsReportedAndDoesNotReturn is how a server that cannot go on is
// told to its owner.
func TestFatalIsReportedAndDoesNotReturn(t *testing.T) {
	var out bytes.Buffer
	got, returned := make(chan error, 1), make(chan struct{})
	l := newServerLogger(slog.New(slog.NewTextHandler(&out, nil)), func(err error) { report(got, err) })
	go func() {
		defer close(returned)
		l.With(pair{"service", "frontend"}).Fatal("no listener", pair{"error", "in use"})
	}()
	if err := <-got; !strings.Contains(err.Error(), "no listener; error: in use") {
		t.Error(err)
	}
	select {
	case <-returned:
		t.Error("Fatal returned")
	default:
	}
	if !strings.Contains(out.String(), "service=frontend") || !strings.Contains(out.String(), "level=ERROR+4") {
		t.Error(out.String())
	}
}

type pair struct {
	key   string
	value any
}

func (p pair) Key() string { return p.key }
func (p pair) Value() any  { return p.value }

// TestPortLostInTheLastMomentIsReported takes a port of the server's away
// behind the back of the check.
func TestPortLostInTheLastMomentIsReported(t *testing.T) {
	dir := stateDir(t)
	file := filepath.Join(dir, DatabaseName)
	want, err := builtSchema()
	if err != nil {
		t.Fatal(err)
	}
	if err := prepare(t.Context(), file, want, quietly); err != nil {
		t.Fatal(err)
	}
	p, err := choosePorts(t.Context(), loopback, 0)
	if err != nil {
		t.Fatal(err)
	}
	p.frontend = taken(t)
	o, err := Options{Dir: dir}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	_, err = launch(t.Context(), launchOptions{Options: o, file: file, address: net.JoinHostPort(loopback, strconv.Itoa(p.frontend)), ports: p, logger: quietly, failed: failed})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("got %v", err)
	}
}
