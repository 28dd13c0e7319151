package main

import (
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"sync/atomic"

	"github.com/rogpeppe/go-internal/testscript"
)

// A relay is a proxy that leads everything to one address, and counts.
type relay struct {
	to    string
	calls atomic.Int64
}

func (p *relay) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.Host != "example.com:443" {
		http.Error(w, "only CONNECT example.com:443", http.StatusForbidden)
		return
	}
	p.calls.Add(1)
	there, err := net.Dial("tcp", p.to)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer there.Close()
	here, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer here.Close()
	if _, err := io.WriteString(here, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	go func() {
		_, _ = io.Copy(there, here) // until either goes away
		_ = there.Close()
	}()
	_, _ = io.Copy(here, there)
}

// cmdFar puts the stand-in far away: at https://example.com, with a certificate
// of an authority that only SSL_CERT_FILE knows, behind the proxy that
// HTTPS_PROXY names. It comes after standin. With a number it checks that the
// proxy was asked for at least that many connections: far [N].
func cmdFar(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	if len(args) == 1 {
		n, err := strconv.ParseInt(args[0], 10, 64)
		ts.Check(err)
		if got := s.relay.calls.Load(); (got < n) != neg {
			ts.Fatalf("the proxy was asked for %d connections, want %d (negated: %v)", got, n, neg)
		}
		return
	}
	site := httptest.NewTLSServer(s.model)
	s.relay = &relay{to: site.Listener.Addr().String()}
	proxy := httptest.NewServer(s.relay)
	ts.Defer(func() { s.model.Close(); proxy.Close(); site.Close() })
	roots, err := os.Create(ts.MkAbs("roots.pem"))
	ts.Check(err)
	err = pem.Encode(roots, &pem.Block{Type: "CERTIFICATE", Bytes: site.Certificate().Raw})
	ts.Check(errors.Join(err, roots.Close()))
	ts.Setenv("SSL_CERT_FILE", roots.Name())
	ts.Setenv("HTTPS_PROXY", proxy.URL)
	ts.Setenv("ANTHROPIC_BASE_URL", "https://example.com")
}
