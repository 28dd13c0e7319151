package gateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

// serveNet opens the rig to sandboxes elsewhere, with a certificate, and returns
// a client that trusts it.
func (r *rig) serveNet() (url string, client *http.Client) {
	t := r.t
	t.Helper()
	lender := httptest.NewTLSServer(http.NotFoundHandler()) // it has a certificate for 127.0.0.1
	defer lender.Close()
	roots := x509.NewCertPool()
	roots.AddCert(lender.Certificate())
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.ServeNet(ctx, ln, &tls.Config{Certificates: lender.TLS.Certificates}) }()
	client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "https://" + ln.Addr().String(), client
}

func (r *rig) serveDoor(d Door) *http.Client {
	t := r.t
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.ServeDoor(ctx, ln, d) }()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return client
}

func statusWith(t testing.TB, c *http.Client, url, token string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/v1/messages", strings.NewReader(message{max: 10, script: script{Out: 5}}.body()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Api-Key", token)
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	io.Copy(io.Discard, res.Body) // only the status counts
	return res.StatusCode
}

func TestATokenIsGoodOnItsOwnWayOnly(t *testing.T) {
	r := newRig(t)
	near := r.grant(Account{Run: "r", Fork: 1})
	far, err := r.GrantFor(t.Context(), Account{Run: "r", Fork: 2}, ByNet)
	if err != nil {
		t.Fatal(err)
	}
	url, public := r.serveNet()
	door, other := r.serveDoor(Door{Run: "r", Fork: 1}), r.serveDoor(Door{Run: "r", Fork: 2})
	for name, c := range map[string]struct {
		client *http.Client
		url    string
		token  string
		want   int
	}{
		"a door's by its door":                   {door, "http://gateway", near, 200},
		"a door's by another door":               {other, "http://gateway", near, 403},
		"a door's by the net":                    {public, url, near, 403},
		"a door's dressed up for the net":        {public, url, tokenPrefixes[ByNet] + strings.TrimPrefix(near, tokenPrefixes[ByDoor]), 403},
		"the net's by the net":                   {public, url, far, 200},
		"the net's by the door of its own fork":  {other, "http://gateway", far, 403},
		"the net's dressed up for its own door":  {other, "http://gateway", tokenPrefixes[ByDoor] + strings.TrimPrefix(far, tokenPrefixes[ByNet]), 403},
		"nobody's by the net":                    {public, url, tokenPrefixes[ByNet] + strings.Repeat("x", 43), 403},
		"the real key, should an agent guess it": {public, url, realKey, 403},
	} {
		if got := statusWith(t, c.client, c.url, c.token); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	if err := r.Revoke(t.Context(), "r", 2); err != nil {
		t.Fatal(err)
	}
	if got := statusWith(t, public, url, far); got != 403 {
		t.Errorf("after its fork has ended: %d", got)
	}
}

// What comes by the net is called by anybody.
func TestTheNetIsNoProxyAndSpeaksNothingButTLS(t *testing.T) {
	r := newRig(t)
	far, err := r.GrantFor(t.Context(), Account{Run: "r", Fork: 1}, ByNet)
	if err != nil {
		t.Fatal(err)
	}
	url, public := r.serveNet()
	addr := strings.TrimPrefix(url, "https://")
	raw := func(c net.Conn, text string) string {
		t.Helper()
		defer c.Close()
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err.Error()
		}
		defer res.Body.Close()
		return res.Status
	}
	for _, text := range []string{
		"CONNECT " + addr + " HTTP/1.1\r\nHost: " + addr + "\r\nX-Api-Key: " + far + "\r\n\r\n",
		"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: 169.254.169.254\r\nX-Api-Key: " + far + "\r\n\r\n",
	} {
		c, err := tls.Dial("tcp", addr, public.Transport.(*http.Transport).TLSClientConfig)
		if err != nil {
			t.Fatal(err)
		}
		if got := raw(c, text); !strings.HasPrefix(got, "40") {
			t.Errorf("%q: %s", text, got)
		}
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if got := raw(c, "GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Api-Key: "+far+"\r\n\r\n"); strings.HasPrefix(got, "200") {
		t.Errorf("without TLS: %s", got)
	}
	if n := r.up.count(); n != 0 {
		t.Errorf("%d calls went out", n)
	}
}
