package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
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

// probeTime bounds how long whyNot looks.
const probeTime = 2 * time.Second

// whyNot looks whether it is for the certificates that nobody answers at the
// address, which the SDK says in no form that a program can tell. It returns
// nil when it is not, or when it cannot tell.
func whyNot(ctx context.Context, address string, c *tls.Config) error {
	const op = "connect to Temporal"
	// The time of the attempt that failed may be used up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTime)
	defer cancel()
	plain := c == nil
	if plain {
		c = &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} //nolint:gosec // nothing is said over it: does the server speak TLS at all?
	}
	c = c.Clone()
	c.NextProtos = []string{"h2"}
	conn, err := (&tls.Dialer{Config: c}).DialContext(ctx, "tcp", address)
	if err == nil {
		// With TLS 1.3 a server refuses a client only after the handshake.
		defer conn.Close()
		deadline, _ := ctx.Deadline()
		_ = conn.SetReadDeadline(deadline)
		_, err = conn.Read(make([]byte, 1))
	}
	var unproved *tls.CertificateVerificationError
	var name x509.HostnameError
	var refused *net.OpError
	var noTLS tls.RecordHeaderError
	switch {
	case plain:
		if noTLS := errors.As(err, &noTLS); noTLS || conn == nil && !alerted(err, &refused) {
			return nil
		}
		return fault.New(op, fault.Denied, "the server at %s wants TLS, and no TEMPORAL_TLS_ setting is there", address).
			Hinted("Set TEMPORAL_TLS_CERT and TEMPORAL_TLS_KEY, TEMPORAL_TLS_CA or TEMPORAL_TLS=true.")
	case errors.As(err, &name):
		return fault.New(op, fault.Denied, "the server at %s proves another name: %w", address, err).Hinted("Check TEMPORAL_TLS_SERVER_NAME.")
	case errors.As(err, &unproved):
		return fault.New(op, fault.Denied, "the server at %s is not believed: %w", address, err).
			Hinted("Check TEMPORAL_TLS_CA: it names the authority that the server's certificate is from.")
	case alerted(err, &refused):
		if len(c.Certificates) == 0 && c.GetClientCertificate == nil {
			return fault.New(op, fault.Denied, "the server at %s wants a client certificate: %w", address, err).Hinted("Set TEMPORAL_TLS_CERT and TEMPORAL_TLS_KEY.")
		}
		return fault.New(op, fault.Denied, "the server at %s refuses the client certificate: %w", address, err).Hinted("Check TEMPORAL_TLS_CERT and TEMPORAL_TLS_KEY.")
	case errors.As(err, &noTLS):
		return fault.New(op, fault.Invalid, "the server at %s does not speak TLS", address).Hinted("Unset the TEMPORAL_TLS_ variables, or check TEMPORAL_ADDRESS.")
	}
	return nil
}

// alerted reports whether err is a refusal in the words of TLS.
func alerted(err error, alert **net.OpError) bool {
	return errors.As(err, alert) && (*alert).Op == "remote error"
}
