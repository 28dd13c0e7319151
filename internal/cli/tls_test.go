package cli

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestBadConnectionSettingsAreNamed(t *testing.T) {
	for name, tc := range map[string]struct {
		vars map[string]string
		want string
	}{
		"certificate without key": {map[string]string{"TEMPORAL_TLS_CERT": "/c.pem"}, "TEMPORAL_TLS_KEY"},
		"no such certificate":     {map[string]string{"TEMPORAL_TLS_CERT": "/none.pem", "TEMPORAL_TLS_KEY": "/none.pem"}, "TEMPORAL_TLS_CERT"},
		"no such authority":       {map[string]string{"TEMPORAL_TLS_CA": "/none.pem"}, "TEMPORAL_TLS_CA"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &plugged{env: &Env{Getenv: func(n string) string { return tc.vars[n] }}}
			_, err := p.clusterOptions(&config.Config{TemporalAddress: "127.0.0.1:1"})
			if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestTheServerNameIsTaken(t *testing.T) {
	p := &plugged{env: &Env{Getenv: func(n string) string {
		return map[string]string{"TEMPORAL_TLS_SERVER_NAME": "temporal.example.com"}[n]
	}}}
	var o client.Options
	if err := p.trust(&o); err != nil || o.ConnectionOptions.TLS.ServerName != "temporal.example.com" {
		t.Errorf("%v", err)
	}
}

func TestAnExpiredCertificateIsNamed(t *testing.T) {
	leaf := &x509.Certificate{NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
	err := current(&tls.Config{Certificates: []tls.Certificate{{Leaf: leaf}}})
	if fault.KindOf(err) != fault.Denied || !strings.Contains(err.Error(), "TEMPORAL_TLS_CERT") {
		t.Errorf("%v", err)
	}
}
