package cli

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
)

// Who interrupts a command while it connects is not told to look at the cluster.
func TestInterruptWhileConnectingSaysNothingOfTemporal(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		conn, err := ln.Accept() // and never an answer
		cancel()
		if err == nil {
			<-t.Context().Done()
			conn.Close()
		}
	}()
	p := &plugged{env: &Env{Getenv: func(string) string { return "" }}}
	_, err = p.dial(ctx, &config.Config{Namespace: "default"}, ln.Addr().String(), slog.New(slog.DiscardHandler), "")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
