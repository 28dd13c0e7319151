package gateway

import (
	"cmp"
	"context"
	"crypto/tls"
	"net"
	"net/http"

	"golang.org/x/net/netutil"
)

// maxConnections bounds the connections of sandboxes elsewhere. Whoever finds
// the address can open some; each may say nothing for ten seconds.
const maxConnections = 4096

// ServeNet answers on ln, which sandboxes on other hosts reach, as Serve does.
// Only tokens that were granted [ByNet] are good on it, and nothing of it is a
// proxy. A nil config is for a listener that only a proxy reaches which ends TLS
// itself.
func (g *Gateway) ServeNet(ctx context.Context, ln net.Listener, config *tls.Config) error {
	fits := func(token string, _ *tenant) bool { return ByNet.shaped(token) }
	ln = netutil.LimitListener(ln, maxConnections)
	if config != nil {
		ln = tls.NewListener(ln, config)
	}
	return g.serveOn(ctx, ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.handle(w, r, cmp.Or(g.netURL, "https://"+r.Host), fits)
	}))
}
