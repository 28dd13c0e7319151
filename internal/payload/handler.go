package payload

import (
	"net"
	"net/http"

	"go.temporal.io/sdk/converter"
)

// maxBody bounds a request of the UI: a page of a history.
const maxBody = 64 << 20

// Path is where Handler answers. It cannot be guessed without the key: whoever
// reaches the port may otherwise have everything decoded.
func (k *Keys) Path() string { return "/" + k.token }

// Handler decodes payloads for Temporal's web page at origin, as
// http://127.0.0.1:8080, below Path. Pages of other origins get nothing, nor
// does anything that was meant for another host.
func (k *Keys) Handler(origin string) http.Handler {
	codec := http.StripPrefix(k.Path(), converter.NewPayloadCodecHTTPHandler(k))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if ip := net.ParseIP(host); err != nil || host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			http.Error(w, "this server is reached as localhost only", http.StatusForbidden)
			return
		}
		w.Header().Add("Vary", "Origin")
		if r.Header.Get("Origin") != origin {
			http.Error(w, "this server is for Temporal's web page only", http.StatusForbidden)
			return
		}
		w.Header().Set("Access-Control-Allow-Origin", origin)
		w.Header().Set("Access-Control-Allow-Methods", "POST")
		w.Header().Set("Access-Control-Allow-Headers", "Content-Type, X-Namespace, Authorization, Authorization-Extras")
		switch {
		case r.Method == http.MethodOptions:
			w.WriteHeader(http.StatusNoContent)
		case r.URL.Path == k.Path()+"/decode" || r.URL.Path == k.Path()+"/encode":
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			codec.ServeHTTP(w, r)
		default:
			http.NotFound(w, r)
		}
	})
}
