package e2btest

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options are those of [New]. The zero value is good.
type Options struct {
	Dir           string        // where files are kept; empty: a temporary folder of the server's own
	Key           string        // the API key; empty: one is made up
	Templates     []string      // that exist; empty: those of E2B that are spoken of here
	Mounts        []Mount       // what every sandbox sees of the host beside its system
	MaxConcurrent int           // sandboxes that may run at once; 0: any number
	MaxLifetime   time.Duration // how long one may run without a pause; 0: for ever
	ExitRetention time.Duration // how long the exit of a process is remembered; 0: 30 s, as E2B
	EnvdVersion   string        // that is claimed; empty: one that has everything that is served

	// Observe, when set, is told of every request before it is answered,
	// with the sandbox that its headers or its host name. It is called by
	// many goroutines.
	Observe func(r *http.Request, sandbox string)
}

// A Mount is a file or folder of the host that sandboxes see read-only.
type Mount struct {
	Source string // absolute, on the host
	Target string // absolute, in the sandbox
}

// A Server speaks E2B's protocol. It must be made by [New].
type Server struct {
	// Key is the API key that is accepted.
	Key string

	opts  Options
	dir   string
	ours  bool            // dir is to be removed
	http  [2]*http.Server // without and with TLS
	plain net.Listener
	tls   secure
	done  sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	making    int
	late      int
	vms       map[string]*vm
	snapshots map[string]*snapshot
	faults    []*planned
}

// New starts a server on the loopback. Like those of httptest it panics when
// there is none. [Supported] says whether its sandboxes can work.
func New(opts Options) *Server {
	s := &Server{Key: opts.Key, opts: opts, dir: opts.Dir, vms: map[string]*vm{}, snapshots: map[string]*snapshot{}}
	if s.Key == "" {
		s.Key = randomID("e2b_", 20)
	}
	if len(opts.Templates) == 0 {
		s.opts.Templates = []string{"base", "claude", "anthropic-claude-code"}
	}
	s.opts.ExitRetention = cmp.Or(opts.ExitRetention, 30*time.Second)
	s.opts.EnvdVersion = cmp.Or(opts.EnvdVersion, "0.6.13")
	if err := s.start(); err != nil {
		panic(fmt.Sprintf("e2btest: start a server: %v", err))
	}
	return s
}

func (s *Server) start() (err error) {
	if s.dir == "" {
		s.ours = true
		if s.dir, err = os.MkdirTemp("", "e2btest-"); err != nil {
			return err
		}
	}
	for _, sub := range []string{"sandboxes", "snapshots"} {
		if err := os.MkdirAll(filepath.Join(s.dir, sub), 0o700); err != nil {
			return err
		}
	}
	if s.plain, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	if err := s.tls.listen(); err != nil {
		return err
	}
	// Two, as one that serves both knows HTTP/2 for neither.
	for i := range s.http {
		s.http[i] = &http.Server{
			Handler:           http.HandlerFunc(s.serve),
			ReadHeaderTimeout: time.Minute,
			ErrorLog:          quiet(),
			ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		}
	}
	s.http[1].TLSConfig = s.tls.config
	s.done.Go(func() { _ = s.http[0].Serve(s.plain) })
	s.done.Go(func() { _ = s.http[1].ServeTLS(s.tls.listener, "", "") })
	return nil
}

// connKey is where a request's context holds its connection.
type connKey struct{}

// APIURL is the value of E2B_API_URL.
func (s *Server) APIURL() string { return "http://" + s.plain.Addr().String() }

// SandboxURL is the value of E2B_SANDBOX_URL: one URL for all sandboxes,
// which are told apart by headers.
func (s *Server) SandboxURL() string { return s.APIURL() }

// PathURL is the URL of a sandbox for clients that put sandbox and port into
// the path, as some services have it.
func (s *Server) PathURL(sandbox string, port int) string {
	return fmt.Sprintf("%s/kruise/%s/%d", s.APIURL(), sandbox, port)
}

// Close kills all that is left and removes every file. It fails when
// something stays.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	vms := s.sorted()
	s.mu.Unlock()
	for _, v := range vms {
		v.kill()
	}
	err := errors.Join(s.http[0].Close(), s.http[1].Close())
	s.done.Wait()
	if s.ours {
		return errors.Join(err, os.RemoveAll(s.dir))
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(s.dir, "sandboxes")), os.RemoveAll(filepath.Join(s.dir, "snapshots")))
}

// Sandboxes returns what lives now, oldest first.
func (s *Server) Sandboxes() []Sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Sandbox
	for _, v := range s.sorted() {
		all = append(all, v.info())
	}
	return all
}

// Snapshots returns the ids of the snapshots that are stored, oldest first.
func (s *Server) Snapshots() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for _, n := range s.sortedSnapshots() {
		ids = append(ids, n.id)
	}
	return ids
}

// Kill ends a sandbox behind everybody's back. It reports whether there was
// one.
func (s *Server) Kill(sandbox string) bool {
	v := s.find(sandbox)
	return v != nil && v.kill()
}

// RestartEnvd has the agent process of the sandbox crash and start again:
// connections are cut, the processes that it started are forgotten and lose
// their pipes, but live on when they can do without.
func (s *Server) RestartEnvd(sandbox string) bool {
	v := s.find(sandbox)
	if v == nil {
		return false
	}
	v.hangUp()
	v.forget()
	return true
}

// Drop cuts every connection that carries a request to the sandbox.
func (s *Server) Drop(sandbox string) {
	if v := s.find(sandbox); v != nil {
		v.hangUp()
	}
}

// LateLists keeps each sandbox that is made from now on out of the next n
// lists.
func (s *Server) LateLists(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.late = n
}

func (s *Server) find(id string) *vm {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vms[id]
}

// sorted returns the sandboxes, oldest first. The caller holds mu.
func (s *Server) sorted() []*vm {
	var all []*vm
	for _, v := range s.vms {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b *vm) int { return cmp.Or(a.created.Compare(b.created), strings.Compare(a.id, b.id)) })
	return all
}

func (s *Server) sortedSnapshots() []*snapshot {
	var all []*snapshot
	for _, n := range s.snapshots {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b *snapshot) int {
		return cmp.Or(a.created.Compare(b.created), strings.Compare(a.id, b.id))
	})
	return all
}

func randomID(prefix string, n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return prefix + hex.EncodeToString(b)
}

// serve finds out what is asked for: the control plane, or a sandbox that is
// named by headers, by the host or by the path.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	id, port := r.Header.Get("E2b-Sandbox-Id"), r.Header.Get("E2b-Sandbox-Port")
	if id == "" {
		id, port = s.tls.split(r.Host)
	}
	if rest, ok := strings.CutPrefix(r.URL.Path, "/kruise/"); ok {
		first, rest, _ := strings.Cut(rest, "/")
		if first != "api" {
			id = first
			port, rest, _ = strings.Cut(rest, "/")
		}
		r.URL.Path, r.URL.RawPath = "/"+rest, ""
	}
	if id == "" && r.URL.Path == "/files" {
		id, port = s.signed(r), envdPort
	}
	if s.opts.Observe != nil {
		s.opts.Observe(r, id)
	}
	w, ok := s.strike(w, r, id)
	if !ok {
		return
	}
	defer lose(w)
	if id != "" {
		s.data(w, r, id, cmp.Or(port, envdPort))
		return
	}
	s.control(w, r)
}
