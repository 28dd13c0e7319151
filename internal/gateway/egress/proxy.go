package egress

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Options say whom a proxy lets through and how it reaches them.
type Options struct {
	Policy Policy

	// Refused hears of every connection that was not opened. It must not
	// block. Nil: nobody does.
	Refused func(Refusal)

	// Lookup returns the addresses of a name. Nil: the system's resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	// Public judges an address. Nil: private, loopback, link-local and
	// metadata addresses are refused.
	Public func(netip.Addr) bool

	// Upstream returns the proxy that this host itself has to use for a URL,
	// or nil when it may connect directly. Behind one, the proxy looks names
	// up, so addresses cannot be judged here. Nil: [http.ProxyFromEnvironment].
	Upstream func(*http.Request) (*url.URL, error)
}

// A Refusal is a connection that was not opened.
type Refusal struct {
	Host   string // as the sandbox named it, cut to 255 bytes; a stranger's text
	Reason string // why, a sentence of ours
}

// A Proxy serves one sandbox. Its methods may be called from many goroutines.
type Proxy struct {
	o       Options
	slots   chan struct{}
	in, out atomic.Int64
}

var _ http.Handler = (*Proxy)(nil)

// Bounds of what one sandbox may take.
const (
	maxTunnels  = 128
	dialTimeout = 15 * time.Second
	helloTime   = 10 * time.Second
	idleTime    = 10 * time.Minute
)

// New returns a proxy.
func New(o Options) *Proxy {
	if o.Refused == nil {
		o.Refused = func(Refusal) {}
	}
	if o.Lookup == nil {
		o.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if o.Public == nil {
		o.Public = public
	}
	if o.Upstream == nil {
		o.Upstream = http.ProxyFromEnvironment
	}
	return &Proxy{o: o, slots: make(chan struct{}, maxTunnels)}
}

// Traffic returns the bytes that came in and went out so far.
func (p *Proxy) Traffic() (in, out int64) { return p.in.Load(), p.out.Load() }

// Handles reports whether r is meant for a proxy and not for a server: CONNECT,
// or a URL with a host.
func Handles(r *http.Request) bool { return r.Method == http.MethodConnect || r.URL.IsAbs() }

// ServeHTTP carries out CONNECT, and plain HTTP requests with an absolute URL.
// A connection is refused with 403 and a sentence, which most clients show.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	default:
		http.Error(w, "sandbox: too many connections at once", http.StatusServiceUnavailable)
		return
	}
	if r.Method == http.MethodConnect {
		p.tunnel(w, r)
		return
	}
	p.plain(w, r)
}

// target reads host and port and judges the name. Only the ports of HTTP are
// open: everything else is a protocol that nobody here knows.
func (p *Proxy) target(hostport, standard string) (host, port string, err error) {
	host, port, err = net.SplitHostPort(hostport)
	if err != nil {
		host, port = hostport, standard
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	switch {
	case port != "443" && port != "80":
		return host, port, refused("only ports 80 and 443 can be reached")
	case p.o.Policy.Closed():
		return host, port, refused("this run has no way out (--egress none)")
	case !hostName(host):
		return host, port, refused("only names can be reached, not addresses")
	case !p.o.Policy.allows(host):
		return host, port, refused("the host is not on the list of this run; --egress " + p.o.Policy.String() + "," + host + " would allow it")
	}
	return host, port, nil
}

// refused is why a connection is not opened, in words for people.
type refused string

func (r refused) Error() string { return string(r) }

// refuse tells the sandbox and whoever watches.
func (p *Proxy) refuse(w http.ResponseWriter, host string, err error) {
	if why, ok := errors.AsType[refused](err); ok {
		p.o.Refused(Refusal{Host: host[:min(len(host), 255)], Reason: string(why)})
		http.Error(w, "sandbox: "+strconv.Quote(host[:min(len(host), 255)])+": "+string(why), http.StatusForbidden)
		return
	}
	// What the network said may name hosts that the sandbox need not know.
	http.Error(w, "sandbox: the host cannot be reached", http.StatusBadGateway)
}

// dial connects to a host that was allowed by its name.
func (p *Proxy) dial(ctx context.Context, host, port string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	scheme := "https"
	if port == "80" {
		scheme = "http"
	}
	up, err := p.o.Upstream(&http.Request{URL: &url.URL{Scheme: scheme, Host: net.JoinHostPort(host, port)}})
	if err != nil {
		return nil, err
	}
	if up != nil {
		return dialThrough(ctx, up, net.JoinHostPort(host, port))
	}
	addrs, err := p.o.Lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	if len(addrs) == 0 {
		return nil, fault.New("look up", fault.NotFound, "%s has no address", host)
	}
	for _, a := range addrs {
		// One that is not public spoils them all: it is a mistake or an
		// attack, and which of them would be dialled is chance.
		if !p.o.Public(a) {
			return nil, refused("the name leads to an address that is not public")
		}
	}
	var last error
	for _, a := range addrs[:min(len(addrs), 4)] {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(a.Unmap().String(), port))
		if err == nil {
			return c, nil
		}
		last = err
	}
	return nil, last
}

// dialThrough asks the proxy that this host has to use.
func dialThrough(ctx context.Context, up *url.URL, target string) (net.Conn, error) {
	if up.Scheme != "http" {
		return nil, fault.New("dial", fault.Unsupported, "a proxy of scheme %q cannot be used", up.Scheme)
	}
	at := up.Host
	if up.Port() == "" {
		at = net.JoinHostPort(up.Hostname(), "80")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	q := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: target}, Host: target, Header: http.Header{}}
	if up.User != nil {
		password, _ := up.User.Password()
		q.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(up.User.Username()+":"+password)))
	}
	err = q.Write(c)
	if err == nil {
		br := bufio.NewReaderSize(io.LimitReader(c, 64<<10), 4096)
		var res *http.Response
		if res, err = http.ReadResponse(br, q); err == nil { //nolint:bodyclose // what follows is the tunnel
			switch {
			case res.StatusCode != http.StatusOK:
				err = fault.New("dial", fault.Unavailable, "the proxy of this host answers %d", res.StatusCode)
			case br.Buffered() > 0:
				err = fault.New("dial", fault.Unavailable, "the proxy of this host speaks out of turn")
			}
		}
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (p *Proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	host, port, err := p.target(r.Host, "443")
	if err != nil {
		p.refuse(w, host, err)
		return
	}
	server, err := p.dial(r.Context(), host, port)
	if err != nil {
		p.refuse(w, host, err)
		return
	}
	defer server.Close()
	rc := http.NewResponseController(w)
	client, buffered, err := rc.Hijack()
	if err != nil {
		http.Error(w, "sandbox: no tunnels on this connection", http.StatusInternalServerError)
		return
	}
	defer client.Close()
	_ = client.SetDeadline(time.Now().Add(helloTime))
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection Established\r\n\r\n"); err != nil {
		return
	}
	from := io.Reader(client)
	if n := buffered.Reader.Buffered(); n > 0 {
		from = io.MultiReader(io.LimitReader(buffered.Reader, int64(n)), client)
	}
	// A tunnel to an allowed host that then asks it for another one by name
	// would reach whatever shares its address.
	name, hello, err := readHello(r.Context(), from)
	if err != nil || name != host {
		reason := "the tunnel is used for something else than TLS"
		if err == nil {
			reason = "the tunnel is used for another host than it was opened for"
		}
		p.o.Refused(Refusal{Host: host, Reason: reason})
		return
	}
	_ = client.SetDeadline(time.Time{})
	p.relay(client, server, hello)
}

// relay copies both ways until both are done, or nothing moves any more.
func (p *Proxy) relay(client, server net.Conn, first []byte) {
	idle := time.AfterFunc(idleTime, func() { _, _ = client.Close(), server.Close() })
	defer idle.Stop()
	var both sync.WaitGroup
	both.Go(func() {
		n, err := server.Write(first)
		p.out.Add(int64(n))
		if err == nil {
			copyCounting(server, client, &p.out, idle)
		}
		closeWrite(server)
	})
	both.Go(func() {
		copyCounting(client, server, &p.in, idle)
		closeWrite(client)
	})
	both.Wait()
}

func copyCounting(to io.Writer, from io.Reader, count *atomic.Int64, idle *time.Timer) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			count.Add(int64(n))
			idle.Reset(idleTime)
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func closeWrite(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		_ = h.CloseWrite()
		return
	}
	_ = c.Close()
}

// hop are headers that concern one connection only (RFC 9110, section 7.6.1).
var hop = []string{"Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// plain passes on one request of plain HTTP, as package managers of systems
// send them.
func (p *Proxy) plain(w http.ResponseWriter, r *http.Request) {
	host, port, err := p.target(r.URL.Host, "80")
	if err == nil && (r.URL.Scheme != "http" || port != "80" || r.URL.User != nil) {
		err = refused("only http://host/ can be asked for without CONNECT")
	}
	if err != nil {
		p.refuse(w, host, err)
		return
	}
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, host, port) },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ResponseHeaderTimeout:  idleTime,
		MaxResponseHeaderBytes: 256 << 10,
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	idle := time.AfterFunc(idleTime, cancel)
	defer idle.Stop()
	out := r.Clone(ctx)
	out.Host, out.RequestURI = host, ""
	dropHop(out.Header)
	res, err := transport.RoundTrip(out)
	if err != nil {
		p.refuse(w, host, err)
		return
	}
	defer res.Body.Close()
	dropHop(res.Header)
	for k, v := range res.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(res.StatusCode)
	copyCounting(w, res.Body, &p.in, idle)
}

func dropHop(h http.Header) {
	for _, v := range h.Values("Connection") {
		for name := range strings.SplitSeq(v, ",") {
			h.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range hop {
		h.Del(name)
	}
}
