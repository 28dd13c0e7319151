//go:build !noembed

package engine

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// TestUIServesNobodyElsesNames talks to the UI as browsers do.
func TestUIServesNobodyElsesNames(t *testing.T) {
	e := start(t, Options{Dir: stateDir(t)})
	u, err := url.Parse(e.UIAddress())
	if err != nil || u.Hostname() != "127.0.0.1" {
		t.Fatalf("%s, %v", e.UIAddress(), err)
	}
	get := func(method, path, host string, header http.Header) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), method, e.UIAddress()+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		for key, values := range header {
			req.Header[key] = values
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if allowed := resp.Header.Get("Access-Control-Allow-Origin"); allowed != "" {
			t.Errorf("%s %s: origin %s is let in", method, path, allowed)
		}
		return resp.StatusCode, string(body)
	}
	for _, host := range []string{u.Host, "localhost:" + u.Port()} {
		if status, body := get(http.MethodGet, "/", host, nil); status != http.StatusOK || !strings.Contains(body, "<html") {
			t.Errorf("%s: %d, %.200s", host, status, body)
		}
		if status, body := get(http.MethodGet, "/api/v1/namespaces/default", host, nil); status != http.StatusOK || !strings.Contains(body, `"default"`) {
			t.Errorf("%s: %d, %.200s", host, status, body)
		}
	}
	if status, _ := get(http.MethodGet, "/api/v1/namespaces/default", "rebound.example:"+u.Port(), nil); status != http.StatusForbidden {
		t.Errorf("a rebound name got %d", status)
	}
	for name, header := range map[string]http.Header{
		"without a token":   nil,
		"from another site": {"Origin": {"https://evil.example"}, "Sec-Fetch-Site": {"cross-site"}},
	} {
		status, body := get(http.MethodPost, "/api/v1/namespaces/default/workflows/x", u.Host, header)
		if status != http.StatusBadRequest && status != http.StatusForbidden {
			t.Errorf("a write %s got %d, %s", name, status, body)
		}
	}
	// Nothing else listens: what is on the port of the UI is the guard.
	if err := e.Stop(); err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", u.Host); err == nil {
		_ = conn.Close()
		t.Error("the UI is there after Stop")
	}
}
