package host

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// listen opens the gateway to sandboxes on other hosts, where it is to be.
func (h *Host) listen(ctx, serve context.Context) error {
	const op = "gateway"
	o := h.o
	if o.GatewayURL == "" || o.GatewayListen == "" {
		return nil
	}
	config, err := serverTLS(o.GatewayCert, o.GatewayKey)
	if err != nil {
		return err
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", o.GatewayListen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fault.New(op, fault.Conflict, "%s is taken", o.GatewayListen).
			Hinted("Choose another address with SANDBOX_TEMPORAL_GATEWAY_LISTEN.")
	}
	if err != nil {
		return fault.New(op, fault.Invalid, "%w", err).Hinted("Set SANDBOX_TEMPORAL_GATEWAY_LISTEN to an address of this host.")
	}
	if at, ok := ln.Addr().(*net.TCPAddr); config == nil && (!ok || !at.IP.IsLoopback()) {
		_ = ln.Close() // nothing came by it
		return fault.New(op, fault.Invalid, "without a certificate, tokens could be read on their way to %s", o.GatewayListen).
			Hinted("Set SANDBOX_TEMPORAL_GATEWAY_CERT and SANDBOX_TEMPORAL_GATEWAY_KEY, or listen on 127.0.0.1 for a proxy that ends TLS.")
	}
	h.serving.Go(func() {
		if err := h.gateway.ServeNet(serve, ln, config); err != nil && serve.Err() == nil {
			h.fail(err)
		}
	})
	o.Logger.Info("The gateway answers sandboxes on other hosts", logs.URL, o.GatewayURL, logs.Address, ln.Addr().String(), logs.TLS, config != nil)
	return nil
}

// serverTLS reads a certificate; without any it returns nil. A renewed one is
// taken when the files have changed.
func serverTLS(cert, key string) (*tls.Config, error) {
	const op = "gateway certificate"
	switch {
	case cert == "" && key == "":
		return nil, nil
	case cert == "" || key == "":
		return nil, fault.New(op, fault.Invalid, "only one of the certificate and its key is named").
			Hinted("Set both SANDBOX_TEMPORAL_GATEWAY_CERT and SANDBOX_TEMPORAL_GATEWAY_KEY.")
	}
	p := &keyPair{cert: cert, key: key}
	if err := p.read(); err != nil {
		return nil, fault.New(op, fault.Invalid, "%w", err).Hinted("Name a certificate, with what it was signed by, and its key, both in PEM.")
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: p.get}, nil
}

// lookEvery is how often the files of a certificate are looked at, when
// somebody connects.
const lookEvery = 10 * time.Second

// A keyPair is a certificate that may be renewed at any time.
type keyPair struct {
	cert, key string

	mu      sync.Mutex
	pair    *tls.Certificate
	changed time.Time // the files
	looked  time.Time
}

// read reads the files. The caller holds mu, or is alone.
func (p *keyPair) read() error {
	changed, err := p.newest()
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		return err
	}
	p.pair, p.changed, p.looked = &pair, changed, time.Now()
	return nil
}

func (p *keyPair) newest() (t time.Time, err error) {
	for _, name := range []string{p.cert, p.key} {
		info, err := os.Stat(name)
		if err != nil {
			return t, err
		}
		if info.ModTime().After(t) {
			t = info.ModTime()
		}
	}
	return t, nil
}

func (p *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.looked) > lookEvery {
		p.looked = time.Now()
		if t, err := p.newest(); err == nil && !t.Equal(p.changed) {
			_ = p.read() // half of it may have been written: the old one serves until the next look
		}
	}
	return p.pair, nil
}
