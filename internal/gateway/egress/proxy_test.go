package egress

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
)

// A world is a proxy, two servers behind it and who was refused.
type world struct {
	proxy   *httptest.Server
	site    *httptest.Server // TLS, for example.com
	lookups map[string][]netip.Addr

	mu      sync.Mutex
	refused []Refusal
	asked   []string // names that were looked up
}

// newWorld lets example.com stand on the loopback, which only this test calls
// public.
func newWorld(t *testing.T, policy string) *world {
	t.Helper()
	w := &world{}
	w.site = httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(rw, "hello from "+r.Host)
	}))
	t.Cleanup(w.site.Close)
	here := netip.MustParseAddr("127.0.0.1")
	w.lookups = map[string][]netip.Addr{
		"example.com":     {here},
		"inside.test":     {netip.MustParseAddr("10.0.0.1")},
		"two-faced.test":  {here, netip.MustParseAddr("169.254.169.254")},
		"www.example.com": {here},
	}
	p, err := ParsePolicy(policy, "")
	if err != nil {
		t.Fatal(err)
	}
	proxy := New(Options{
		Policy: p,
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.asked = append(w.asked, host)
			if a, ok := w.lookups[host]; ok {
				return a, nil
			}
			return nil, errors.New("no such host")
		},
		Public:   func(a netip.Addr) bool { return a == here },
		Upstream: func(*http.Request) (*url.URL, error) { return nil, nil },
		Refused: func(r Refusal) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.refused = append(w.refused, r)
		},
	})
	// The proxy opens ports 443 and 80 only; the servers of a test have others.
	handler := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !Handles(r) {
			t.Errorf("%s %s is not for a proxy", r.Method, r.URL)
		}
		proxy.ServeHTTP(rw, r)
	})
	w.proxy = httptest.NewServer(handler)
	t.Cleanup(w.proxy.Close)
	return w
}

// tunnel opens a tunnel and returns it with the proxy's answer.
func (w *world) tunnel(t *testing.T, target string) (c net.Conn, status int, said string) {
	t.Helper()
	c, err := net.Dial("tcp", w.proxy.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := io.WriteString(c, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() // does nothing to a tunnel
	if res.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(res.Body, 1000))
		said = string(body)
	}
	return c, res.StatusCode, said
}

func (w *world) refusals() []Refusal {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.refused)
}

func TestTunnelsAreRefused(t *testing.T) {
	for _, row := range []struct{ name, policy, target, why string }{
		{"not on the list", "registries", "example.com:443", "not on the list"},
		{"closed", "none", "example.com:443", "no way out"},
		{"another port", "open", "example.com:22", "only ports 80 and 443"},
		{"an address", "open", "8.8.8.8:443", "only names"},
		{"an address in brackets", "open", "[::1]:443", "only names"},
		{"a number that is an address", "open", "2130706433:443", "only names"},
		{"localhost", "open", "localhost:443", "only names"},
		{"a private address", "open", "inside.test:443", "not public"},
		{"one private address of two", "open", "two-faced.test:443", "not public"},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld(t, row.policy)
			_, status, body := w.tunnel(t, row.target)
			if status != http.StatusForbidden || !strings.Contains(body, row.why) {
				t.Errorf("%d %q, want 403 and %q", status, body, row.why)
			}
			if r := w.refusals(); len(r) != 1 || !strings.Contains(r[0].Reason, row.why) {
				t.Errorf("heard %+v, want one refusal that says %q", r, row.why)
			}
		})
	}
}

// A name is looked up once for a connection, and what is dialled is the address
// that was judged. Whoever lets the name lead inside a moment later gains nothing:
// the next connection is judged anew.
func TestANameThatIsReboundIsJudgedForEveryConnection(t *testing.T) {
	w := newWorld(t, "open")
	for _, address := range []string{"127.0.0.1", "169.254.169.254", "127.0.0.1", "10.0.0.1"} {
		w.mu.Lock()
		w.asked, w.refused = nil, nil
		w.lookups["rebound.test"] = []netip.Addr{netip.MustParseAddr(address)}
		w.mu.Unlock()
		_, status, _ := w.tunnel(t, "rebound.test:443")
		// Nothing need answer on the loopback; it was tried.
		if public := address == "127.0.0.1"; public == (status == http.StatusForbidden) || public == (len(w.refusals()) > 0) {
			t.Errorf("%s: %d, refused %v", address, status, w.refusals())
		}
		w.mu.Lock()
		if !slices.Equal(w.asked, []string{"rebound.test"}) {
			t.Errorf("%s: looked up %v", address, w.asked)
		}
		w.mu.Unlock()
	}
}

func TestANameThatDoesNotExistIsNoRefusal(t *testing.T) {
	w := newWorld(t, "open")
	_, status, body := w.tunnel(t, "nowhere.test:443")
	if status != http.StatusBadGateway || strings.Contains(body, "no such host") {
		t.Errorf("%d %q", status, body)
	}
	if r := w.refusals(); len(r) != 0 {
		t.Errorf("refused %+v", r)
	}
}

// on443 lets the proxy of a test reach the site as if it stood on port 443.
func on443(w *world, t *testing.T, policy string) *Proxy {
	t.Helper()
	p, err := ParsePolicy(policy, "")
	if err != nil {
		t.Fatal(err)
	}
	// The proxy of this host, which knows where the site is.
	next := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic bWU6c2VjcmV0" {
			http.Error(rw, "no", http.StatusProxyAuthRequired)
			return
		}
		c, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		s, err := net.Dial("tcp", w.site.Listener.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer s.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(s, c); closeWrite(s) }()
		_, _ = io.Copy(c, s)
	}))
	t.Cleanup(next.Close)
	up, err := url.Parse(next.URL)
	if err != nil {
		t.Fatal(err)
	}
	up.User = url.UserPassword("me", "secret")
	return New(Options{Policy: p, Upstream: func(*http.Request) (*url.URL, error) { return up, nil }, Refused: func(r Refusal) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.refused = append(w.refused, r)
	}})
}

func TestAnAllowedHostIsReachedThroughTheHostsOwnProxy(t *testing.T) {
	w := newWorld(t, "none")
	proxy := on443(w, t, "example.com")
	front := httptest.NewServer(proxy)
	defer front.Close()
	at, err := url.Parse(front.URL)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(w.site.Certificate())
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(at), TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	res, err := client.Get("https://example.com/x")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || string(body) != "hello from example.com" {
		t.Errorf("%q, %v", body, err)
	}
	if in, out := proxy.Traffic(); in == 0 || out == 0 {
		t.Errorf("traffic %d in, %d out", in, out)
	}
	if res, err := client.Get("https://www.example.com/x"); err == nil {
		_ = res.Body.Close()
		t.Error("a host that is not on the list was reached")
	}
}

func TestATunnelIsForTheHostItWasOpenedForAndForTLS(t *testing.T) {
	for name, speak := range map[string]func(c net.Conn){
		"another host": func(c net.Conn) {
			_ = tls.Client(c, &tls.Config{ServerName: "www.example.com", InsecureSkipVerify: true}).Handshake()
		},
		"no name": func(c net.Conn) {
			_ = tls.Client(c, &tls.Config{InsecureSkipVerify: true}).Handshake()
		},
		"no TLS": func(c net.Conn) { _, _ = io.WriteString(c, "SSH-2.0-x\r\n\r\n") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "none")
			front := httptest.NewServer(on443(w, t, "example.com"))
			defer front.Close()
			w.proxy = front
			c, status, _ := w.tunnel(t, "example.com:443")
			if status != http.StatusOK {
				t.Fatalf("status %d", status)
			}
			speak(c)
			rest, _ := io.ReadAll(c) // until the proxy closes it
			if len(rest) != 0 {
				t.Errorf("the tunnel answered %q", rest)
			}
			if r := w.refusals(); len(r) != 1 || r[0].Host != "example.com" {
				t.Errorf("heard %+v, want one refusal", r)
			}
		})
	}
}

func TestPlainRequestsAreJudgedAlike(t *testing.T) {
	w := newWorld(t, "example.com")
	at, err := url.Parse(w.proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(at), DisableKeepAlives: true}}
	for target, refused := range map[string]bool{
		"http://www.example.com/":  true,
		"http://127.0.0.1/":        true,
		"http://example.com:8080/": true,
		"http://example.com/":      false, // whoever may listen on port 80 of this machine
	} {
		res, err := client.Get(target)
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		_ = res.Body.Close()
		if got := res.StatusCode == http.StatusForbidden; got != refused {
			t.Errorf("%s: status %d, refused %v, want %v", target, res.StatusCode, got, refused)
		}
	}
}

func TestPlainRequestsArePassedOnWithoutWhatIsTheConnections(t *testing.T) {
	var seen http.Header
	site := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		seen = r.Header.Clone()
		rw.Header().Set("Proxy-Authenticate", "Basic")
		_, _ = io.WriteString(rw, "packages of "+r.Host+r.URL.Path)
	}))
	defer site.Close()
	h := http.Header{"Connection": {"X-Hop, close"}, "X-Hop": {"1"}, "Proxy-Authorization": {"Basic x"}, "Accept": {"*/*"}}
	dropHop(h)
	if len(h) != 1 {
		t.Errorf("left over: %v", h)
	}
	p, err := ParsePolicy("example.com", "")
	if err != nil {
		t.Fatal(err)
	}
	proxy := New(Options{Policy: p, Upstream: func(*http.Request) (*url.URL, error) {
		return &url.URL{Scheme: "http", Host: tunnelTo(t, site.Listener.Addr().String())}, nil
	}})
	front := httptest.NewServer(proxy)
	defer front.Close()
	at, err := url.Parse(front.URL)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodGet, "http://example.com/list", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Proxy-Authorization", "Basic secret")
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(at), DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	if string(body) != "packages of example.com/list" {
		t.Errorf("body %q", body)
	}
	if seen.Get("Proxy-Authorization") != "" || res.Header.Get("Proxy-Authenticate") != "" {
		t.Errorf("the proxy's headers went through: %v, %v", seen, res.Header)
	}
}

// tunnelTo starts a proxy that leads every CONNECT to addr.
func tunnelTo(t *testing.T, addr string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		c, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		to, err := net.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer to.Close()
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(to, c); closeWrite(to) }()
		_, _ = io.Copy(c, to)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// FuzzReadHello reads what a sandbox sends first.
func FuzzReadHello(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, read, err := readHello(t.Context(), strings.NewReader(string(b)))
		if !strings.HasPrefix(string(b), string(read)) {
			t.Errorf("read %d bytes that are not the first ones", len(read))
		}
		if err == nil && len(read) == 0 {
			t.Error("a hello of nothing")
		}
	})
}
