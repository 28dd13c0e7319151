package e2b

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Settings say where E2B is and who we are there. A service that speaks E2B's
// protocol is reached by other addresses.
type Settings struct {
	Key        string // E2B_API_KEY; its form is not looked at, as others have other forms
	APIURL     string // E2B_API_URL; empty: https://api.<Domain>
	Domain     string // E2B_DOMAIN, with a port or without; empty: e2b.app
	SandboxURL string // E2B_SANDBOX_URL, one for all sandboxes or with {sandbox} and {port} in it; empty: by the domain
	Debug      bool   // E2B_DEBUG: the API is at localhost:3000 and sandboxes at localhost:49983
	CAFile     string // of certificates that are trusted beside those of the system
	Template   string // empty: [DefaultTemplate]
	Plan       string // "hobby" or "pro"; empty: hobby, whose limits hold for all
}

// DefaultTemplate is E2B's own template with Claude Code in it.
const DefaultTemplate = "claude"

const (
	defaultDomain = "e2b.app"
	envdPort      = 49983
)

// A plan is what a customer of E2B may do.
type plan struct {
	pace     time.Duration // between two creations
	lifetime time.Duration // without a pause
}

var plans = map[string]plan{
	"":      {time.Second, time.Hour},
	"hobby": {time.Second, time.Hour},
	"pro":   {time.Second / 5, 24 * time.Hour},
}

// check finds what is wrong with the settings before anything is asked.
func (s Settings) check() error {
	const op = "e2b: settings"
	if s.Key == "" && !s.Debug {
		return fault.New(op, fault.Denied, "there is no API key of E2B").Hinted("Set E2B_API_KEY; keys are made at https://e2b.dev/dashboard.")
	}
	if _, ok := plans[s.Plan]; !ok {
		return fault.New(op, fault.Invalid, "there is no plan %q", s.Plan).Hinted("Set SANDBOX_TEMPORAL_E2B_PLAN to hobby or pro.")
	}
	for name, text := range map[string]string{"E2B_API_URL": s.APIURL, "E2B_SANDBOX_URL": s.fill("x", 1)} {
		if text == "" {
			continue
		}
		if u, err := url.Parse(text); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return fault.New(op, fault.Invalid, "%s is no address", name).Hinted("Set %s to an address such as https://api.example.com, or unset it.", name)
		}
	}
	return nil
}

func (s Settings) domain() string {
	if s.Domain != "" {
		return s.Domain
	}
	return defaultDomain
}

func (s Settings) api() string {
	switch {
	case s.APIURL != "":
		return strings.TrimRight(s.APIURL, "/")
	case s.Debug:
		return "http://localhost:3000"
	}
	return "https://api." + s.domain()
}

func (s Settings) fill(sandbox string, port int) string {
	return strings.NewReplacer("{sandbox}", url.PathEscape(sandbox), "{port}", fmt.Sprint(port)).Replace(strings.TrimRight(s.SandboxURL, "/"))
}

// sandbox is the address of a port of a sandbox. The domain is what the API
// said of the sandbox, if it did.
func (s Settings) sandbox(id, domain string, port int) string {
	switch {
	case s.SandboxURL != "":
		return s.fill(id, port)
	case s.Debug:
		return fmt.Sprintf("http://localhost:%d", port)
	case domain == "" || s.Domain != "":
		domain = s.domain()
	}
	return fmt.Sprintf("https://%d-%s.%s", port, id, domain)
}

// transport makes the connections. Each sandbox is a host of its own to it, or
// all are one: both keep their connections.
func (s Settings) transport() (*http.Transport, error) {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   15 * time.Second,
		IdleConnTimeout:       90 * time.Second,
		ResponseHeaderTimeout: 2 * time.Minute,
		MaxIdleConns:          1024,
		MaxIdleConnsPerHost:   256,
		DisableCompression:    true, // ranges are of the file's own bytes
		WriteBufferSize:       64 << 10,
		ReadBufferSize:        64 << 10,
	}
	if s.CAFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(s.CAFile)
	if err != nil {
		return nil, fault.New("e2b: settings", fault.Invalid, "%w", err).Hinted("SANDBOX_TEMPORAL_E2B_CA names a file of certificates.")
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fault.New("e2b: settings", fault.Invalid, "no certificate is in %s", s.CAFile).Hinted("SANDBOX_TEMPORAL_E2B_CA names a file of certificates, in PEM.")
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	return t, nil
}
