package e2btest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"strings"
	"time"
)

// domain is what E2B's own names end in here. No resolver knows it.
const domain = "e2b.test"

// secure is the server under names of its own.
type secure struct {
	listener net.Listener
	config   *tls.Config
	ca       []byte // PEM
}

func (t *secure) listen() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: domain},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, IsCA: true, DNSNames: []string{domain, "*." + domain},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		return err
	}
	t.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	t.config = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	t.listener, err = net.Listen("tcp", "127.0.0.1:0")
	return err
}

// split takes the sandbox and the port from a name like
// 49983-ID.e2b.test:8443, or ID-anything.
func (t *secure) split(host string) (id, port string) {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	label, ok := strings.CutSuffix(name, "."+domain)
	if !ok || label == "api" || label == "sandbox" {
		return "", ""
	}
	port, rest, _ := strings.Cut(label, "-")
	id, _, _ = strings.Cut(rest, "-")
	return id, port
}

// Domain is the value of E2B_DOMAIN: api.DOMAIN and PORT-SANDBOX.DOMAIN are
// served over TLS for who resolves names with [Server.DialContext] and trusts
// [Server.CA].
func (s *Server) Domain() string {
	_, port, _ := net.SplitHostPort(s.tls.listener.Addr().String())
	return domain + ":" + port
}

// CA is the certificate, in PEM, that the names below [Server.Domain] are
// served with.
func (s *Server) CA() []byte { return s.tls.ca }

// DialContext connects to the server under whatever name below
// [Server.Domain], and to others as ever.
func (s *Server) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if name, _, err := net.SplitHostPort(address); err == nil && (name == domain || strings.HasSuffix(name, "."+domain)) {
		address = s.tls.listener.Addr().String()
	}
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}

// quiet is for what net/http has to say of connections that tests cut.
func quiet() *log.Logger { return log.New(io.Discard, "", 0) }
