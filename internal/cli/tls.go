package cli

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"time"

	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// trust reads whom a connection to Temporal believes: TEMPORAL_TLS_CA, and the
// name that the server must prove, TEMPORAL_TLS_SERVER_NAME, which the SDK's
// own configuration knows too.
func (p *plugged) trust(o *client.Options) error {
	file := p.env.Getenv("TEMPORAL_TLS_CA")
	name := p.env.Getenv("TEMPORAL_TLS_SERVER_NAME")
	if file == "" && name == "" {
		return nil
	}
	if o.ConnectionOptions.TLS == nil {
		o.ConnectionOptions.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if name != "" {
		o.ConnectionOptions.TLS.ServerName = name
	}
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return fault.New("connect to Temporal", fault.Invalid, "TEMPORAL_TLS_CA: %w", err).Hinted("Name a file of certificates in PEM.")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(b) {
		return fault.New("connect to Temporal", fault.Invalid, "TEMPORAL_TLS_CA: no certificate is in %s", file).Hinted("Name a file of certificates in PEM.")
	}
	o.ConnectionOptions.TLS.RootCAs = roots
	return nil
}

// current refuses a client certificate that the server would refuse in words
// that name no setting.
func current(c *tls.Config) error {
	if c == nil {
		return nil
	}
	for _, pair := range c.Certificates {
		if pair.Leaf == nil {
			continue
		}
		now := time.Now()
		switch {
		case now.After(pair.Leaf.NotAfter):
			return fault.New("connect to Temporal", fault.Denied, "the client certificate of TEMPORAL_TLS_CERT expired on %s", pair.Leaf.NotAfter.UTC().Format(time.DateOnly)).
				Hinted("Name a newer one, and its key with TEMPORAL_TLS_KEY.")
		case now.Before(pair.Leaf.NotBefore):
			return fault.New("connect to Temporal", fault.Denied, "the client certificate of TEMPORAL_TLS_CERT is good from %s on", pair.Leaf.NotBefore.UTC().Format(time.DateOnly)).
				Hinted("Check the clock of this host.")
		}
	}
	return nil
}
