package e2b

import (
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
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// An authority is one that no system knows.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{file: filepath.Join(t.TempDir(), "ca.pem")}
	var der []byte
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a company's own authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	der, a.key = a.sign(t, a.cert, nil)
	if err := os.WriteFile(a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

// sign makes a certificate for a new key; with no signer it is signed by itself.
func (a *authority) sign(t *testing.T, cert *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, a.cert, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return der, key
}

// front serves what is at target over TLS, with a certificate of the authority
// for 127.0.0.1.
func (a *authority) front(t *testing.T, target string) (at string, asked *atomic.Int64) {
	t.Helper()
	to, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	der, key := a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "a service"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, a.key)
	asked = &atomic.Int64{}
	proxy := &httputil.ReverseProxy{FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) { asked.Add(1); r.SetURL(to) }}
	srv := httptest.NewUnstartedServer(proxy)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return "https://" + srv.Listener.Addr().String(), asked
}

func TestACompanysOwnAuthorityIsTrustedWhenItIsNamedAndOnlyThen(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	ours, theirs := newAuthority(t), newAuthority(t)
	api, askedAPI := ours.front(t, srv.APIURL())
	box, askedBox := ours.front(t, srv.SandboxURL())
	for name, r := range map[string]struct {
		api, box, ca string
		refused      bool
	}{
		"named":                     {api, box, ours.file, false},
		"not named":                 {api, box, "", true},
		"not named, of the API":     {api, srv.SandboxURL(), "", true},
		"not named, of the sandbox": {srv.APIURL(), box, "", true},
		"another one named":         {api, box, theirs.file, true},
	} {
		t.Run(name, func(t *testing.T) {
			before := [2]int64{askedAPI.Load(), askedBox.Load()}
			s := settingsOf(srv)
			s.APIURL, s.SandboxURL, s.CAFile = r.api, r.box, r.ca
			p := New(Options{Settings: func() Settings { return s }, Pace: -1})
			begun := time.Now()
			ref, err := p.Create(t.Context(), sandbox.Spec{Key: "ca", Deadline: time.Now().Add(10 * time.Minute)})
			if r.refused {
				if fault.KindOf(err) != fault.Denied || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_E2B_CA") || strings.Contains(err.Error(), srv.Key) {
					t.Errorf("%v of kind %s, hint %q", err, fault.KindOf(err), fault.HintOf(err))
				}
				if d := time.Since(begun); d > 20*time.Second {
					t.Errorf("it was tried again for %v", d)
				}
				if askedAPI.Load()+askedBox.Load() != before[0]+before[1] {
					t.Error("something was said to a service that nobody trusts")
				}
				if left := srv.Sandboxes(); len(left) > 0 {
					t.Errorf("%d sandboxes are left", len(left))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			sb, err := p.Attach(t.Context(), ref)
			if err != nil {
				t.Fatal(err)
			}
			out, _, exit, err := sandbox.Output(t.Context(), sb, "say", shell("echo trusted"), 100)
			if err != nil || exit.Code != 0 || string(out) != "trusted\n" {
				t.Errorf("%q, %+v, %v", out, exit, err)
			}
			if err := p.Destroy(t.Context(), ref); err != nil {
				t.Error(err)
			}
			if askedAPI.Load() == before[0] || askedBox.Load() == before[1] {
				t.Errorf("the API was asked %d times by way of TLS, the sandbox %d times", askedAPI.Load()-before[0], askedBox.Load()-before[1])
			}
		})
	}
}

// As at E2B itself: every sandbox is a name of its own below the domain.
func TestNamesBelowADomainOfACompanysOwnAuthority(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, srv.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ca := range []string{file, ""} {
		s := Settings{Key: srv.Key, Domain: srv.Domain(), CAFile: ca, Plan: "pro"}
		p := New(Options{Settings: func() Settings { return s }, Pace: -1})
		c, err := p.connect()
		if err != nil {
			t.Fatal(err)
		}
		c.http.Transport.(*http.Transport).DialContext = srv.DialContext // no resolver knows the names
		if ca == "" {
			_, err := p.List(t.Context(), nil)
			if fault.KindOf(err) != fault.Denied || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_E2B_CA") {
				t.Errorf("%v of kind %s, hint %q", err, fault.KindOf(err), fault.HintOf(err))
			}
			continue
		}
		_, b := create(t, p, sandbox.Spec{Key: "names"})
		out, _, _, err := sandbox.Output(t.Context(), b, "say", shell("echo trusted"), 100)
		if err != nil || string(out) != "trusted\n" || !strings.Contains(b.envd().base, b.id+"."+srv.Domain()) {
			t.Errorf("%q of %s, %v", out, b.envd().base, err)
		}
	}
}

func TestAFileOfCertificatesThatIsNoneIsRefused(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none.pem")
	if err := os.WriteFile(none, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{none, none + ".not-there"} {
		s := Settings{Key: "k", CAFile: file}
		err := New(Options{Settings: func() Settings { return s }}).Ready(t.Context())
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_E2B_CA") {
			t.Errorf("%s: %v, hint %q", file, err, fault.HintOf(err))
		}
	}
}
