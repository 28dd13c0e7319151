package engine

import (
	"net"
	"net/http"
)

// guardHost lets only requests through that were meant for this server. The UI
// asks nobody who they are, so what keeps other web sites from reading it is
// the browser's same-origin rule, and that is got around by a name that
// resolves to 127.0.0.1 when the site says so (DNS rebinding). Such a request
// still carries the site's name as its Host.
//
// On a loopback address the Host must be a loopback name with our own port. An
// engine that listens elsewhere may stand behind a port mapping, so any port
// and any IP address will do there: an address cannot be rebound.
func guardHost(next http.Handler, listen, port string) http.Handler {
	ip := net.ParseIP(listen)
	local := ip != nil && ip.IsLoopback()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !hostAllowed(r.Host, port, local) {
			http.Error(w, "this server is reached as localhost only", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func hostAllowed(hostport, port string, local bool) bool {
	host, p, err := net.SplitHostPort(hostport)
	if err != nil {
		// Without a port it is 80, and an IPv6 address stands in brackets.
		host, p = hostport, "80"
		if n := len(host); n > 1 && host[0] == '[' && host[n-1] == ']' {
			host = host[1 : n-1]
		}
	}
	if !local {
		return host == "localhost" || net.ParseIP(host) != nil
	}
	return p == port && (host == "localhost" || host == "127.0.0.1" || host == "::1")
}
