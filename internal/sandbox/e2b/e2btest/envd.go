package e2btest

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// envdPort is where the agent process of a sandbox listens.
const envdPort = "49983"

// unauthorized is not of the protocol of those who get it, as with E2B: the
// code is a number.
const unauthorized = `{"code":401,"message":"invalid access token"}`

// data answers what is sent to a port of a sandbox, as E2B's proxy and the
// agent process behind it do.
func (s *Server) data(w http.ResponseWriter, r *http.Request, id, port string) {
	v := s.find(id)
	if v == nil {
		notRunning(w, id)
		return
	}
	if c, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		v.carry(c, 1)
		defer v.carry(c, -1)
	}
	if err := v.enter(); err != nil {
		if !errors.Is(err, errPaused) || !v.spec.AutoResume.Enabled {
			notRunning(w, id)
			return
		}
		if _, err := v.resume(300 * time.Second); err != nil {
			notRunning(w, id)
			return
		}
	} else {
		v.leave()
	}
	if port != envdPort {
		forward(w, r, id, port)
		return
	}
	switch r.URL.Path {
	case "/health":
		w.WriteHeader(http.StatusNoContent)
		return
	case "/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade":
		fail(w, http.StatusNotFound, "not found")
		return
	}
	if !v.mayEnter(r) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = w.Write([]byte(unauthorized))
		return
	}
	v.envd(w, r)
}

func notRunning(w http.ResponseWriter, id string) {
	answer(w, http.StatusBadGateway, map[string]any{"sandboxId": id, "message": "The sandbox was not found", "code": http.StatusBadGateway})
}

// forward passes a request on to another port. Sandboxes share the loopback
// of the host.
func forward(w http.ResponseWriter, r *http.Request, id, port string) {
	n, err := strconv.Atoi(port)
	if err != nil || n < 1 || n > 65535 {
		fail(w, http.StatusBadRequest, "invalid port")
		return
	}
	p := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", port)})
	p.ErrorLog = quiet()
	p.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) {
		answer(w, http.StatusBadGateway, map[string]any{"sandboxId": id, "message": "The sandbox is running but port is not open", "port": n, "code": http.StatusBadGateway})
	}
	p.ServeHTTP(w, r)
}

// mayEnter looks at the token of a request, or at the signature of its URL.
func (v *vm) mayEnter(r *http.Request) bool {
	if v.token == "" || r.Header.Get("X-Access-Token") == v.token {
		return true
	}
	return r.URL.Path == "/files" && v.verifies(r)
}

// verifies reports whether the URL of a file was signed with the sandbox's
// token.
func (v *vm) verifies(r *http.Request) bool {
	q := r.URL.Query()
	operation := "write"
	if r.Method == http.MethodGet {
		operation = "read"
	}
	raw := fmt.Sprintf("%s:%s:%s:%s", q.Get("path"), operation, q.Get("username"), v.token)
	if until := q.Get("signature_expiration"); until != "" {
		n, err := strconv.ParseInt(until, 10, 64)
		if err != nil || time.Now().Unix() > n {
			return false
		}
		raw += ":" + until
	}
	sum := sha256.Sum256([]byte(raw))
	return v.token != "" && strings.TrimRight(q.Get("signature"), "=") == "v1_"+base64.RawStdEncoding.EncodeToString(sum[:])
}

// signed finds the sandbox whose token signed the URL of a file: one URL for
// all sandboxes says nothing else of which is meant.
func (s *Server) signed(r *http.Request) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, v := range s.vms {
		if v.verifies(r) {
			return id
		}
	}
	return ""
}
