package engine

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestOnlyRequestsThatWereMeantForUsPass(t *testing.T) {
	for _, tt := range []struct {
		listen, host string
		pass         bool
	}{
		{"127.0.0.1", "localhost:8080", true},
		{"127.0.0.1", "127.0.0.1:8080", true},
		{"127.0.0.1", "[::1]:8080", true},
		{"::1", "[::1]:8080", true},

		{"127.0.0.1", "evil.example:8080", false},
		{"127.0.0.1", "localhost.evil.example:8080", false},
		{"127.0.0.1", "127.0.0.1.evil.example:8080", false},
		{"127.0.0.1", "localhost:9090", false},
		{"127.0.0.1", "localhost", false},
		{"127.0.0.1", "LOCALHOST.:8080", false},
		{"127.0.0.1", "192.168.1.7:8080", false},
		{"127.0.0.1", "::1:8080", false},
		{"127.0.0.1", "", false},
		{"127.0.0.1", ":8080", false},

		// Behind a port mapping.
		{"0.0.0.0", "192.168.1.7:9999", true},
		{"0.0.0.0", "localhost:9999", true},
		{"0.0.0.0", "192.168.1.7", true},
		{"0.0.0.0", "[fe80::1]", true},
		{"0.0.0.0", "evil.example:8080", false},
		{"192.168.1.7", "evil.example:8080", false},
		{"0.0.0.0", "", false},
	} {
		passed := false
		h := guardHost(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { passed = true }), tt.listen, "8080")
		r := httptest.NewRequest(http.MethodGet, "/api/v1/namespaces", nil)
		r.Host = tt.host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if passed != tt.pass || (w.Code == http.StatusForbidden) == tt.pass {
			t.Errorf("listening on %s, Host %q: passed %v, status %d", tt.listen, tt.host, passed, w.Code)
		}
	}
	if !hostAllowed("localhost", "80", true) {
		t.Error("port 80 goes without saying")
	}
}

func FuzzHostAllowed(f *testing.F) {
	for _, s := range []string{"localhost:8080", "[::1]:8080", "[::1", "a]:b", "[", ":"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, host string) {
		if !hostAllowed(host, "8080", true) {
			return
		}
		switch host {
		case "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "[localhost]:8080", "[127.0.0.1]:8080":
		default:
			t.Errorf("%q passed", host)
		}
	})
}
