package gateway

import (
	"cmp"
	"context"
	"net"
	"net/http"

	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/egress"
)

// A Door is the way of one sandbox to the gateway, and through it to the
// world. Whoever comes in by it can be nobody else: the token of another fork
// is refused.
type Door struct {
	Run  string
	Fork int // 0: a base, which has no token

	// Proxy gets what is meant for a proxy. Nil: that is refused.
	Proxy http.Handler

	// Inside is the address of the door as the sandbox sees it, "host:port".
	// What names it is meant for the gateway, whatever form it comes in.
	Inside string
}

// ServeDoor answers on ln, which only one sandbox can reach, as Serve does.
func (g *Gateway) ServeDoor(ctx context.Context, ln net.Listener, d Door) error {
	fits := func(token string, owner *tenant) bool {
		return ByDoor.shaped(token) && (owner == nil || owner.run == d.Run && owner.num == d.Fork)
	}
	return g.serveOn(ctx, ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		outside := "http://" + cmp.Or(d.Inside, r.Host)
		switch {
		case !egress.Handles(r) || r.Method != http.MethodConnect && r.URL.Host == d.Inside:
			g.handle(w, r, outside, fits)
		case d.Proxy == nil:
			forbid(http.StatusForbidden, "permission_error", "There is no way out of this sandbox.").write(w)
		default:
			d.Proxy.ServeHTTP(w, r)
		}
	}))
}
