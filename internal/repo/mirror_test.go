package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// TestMain lets a test start this program as a worker that can be killed.
func TestMain(m *testing.M) {
	if source := os.Getenv("REPO_TEST_RESOLVE"); source != "" {
		if _, err := New(Options{Dir: os.Getenv("REPO_TEST_DIR")}).Resolve(context.Background(), source, ""); err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// large makes a repository of some megabytes that cannot be compressed.
func large(t *testing.T, size int) string {
	t.Helper()
	source := repository(t)
	b := make([]byte, size)
	_, _ = rand.Read(b)
	if err := os.WriteFile(filepath.Join(source, "large"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	commit(t, source, "large")
	return source
}

// slow passes requests on to a server and lets a part of the answer through
// until it is told to let go: then those connections break, and new ones work.
func slow(t *testing.T, to string, part int64) (addr string, release func(), stalled func() bool) {
	t.Helper()
	target, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	var open, waits atomic.Bool
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.FlushInterval = -1
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	proxy.ModifyResponse = func(r *http.Response) error {
		r.Body = &stall{ReadCloser: r.Body, left: part, open: &open, waits: &waits, ctx: r.Request.Context().Done()}
		return nil
	}
	srv := httptest.NewServer(proxy)
	t.Cleanup(func() { open.Store(true); srv.CloseClientConnections(); srv.Close() })
	return srv.URL, func() { open.Store(true); srv.CloseClientConnections() }, waits.Load
}

type stall struct {
	io.ReadCloser
	left        int64
	open, waits *atomic.Bool
	ctx         <-chan struct{}
}

func (s *stall) Read(p []byte) (int, error) {
	for s.left <= 0 && !s.open.Load() {
		s.waits.Store(true)
		select {
		case <-s.ctx:
			return 0, io.ErrUnexpectedEOF
		case <-time.After(10 * time.Millisecond):
		}
	}
	n, err := s.ReadCloser.Read(p[:min(len(p), 64<<10)])
	s.left -= int64(n)
	return n, err
}

func waitFor(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}

func glob(t *testing.T, parts ...string) []string {
	t.Helper()
	out, err := filepath.Glob(filepath.Join(parts...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// gitsOf returns the command lines of the processes that work on a repository.
func gitsOf(t *testing.T, dir string) (names []string) {
	t.Helper()
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		t.Skipf("needs /proc: %v", err)
	}
	for _, file := range glob(t, "/proc/[0-9]*/environ") {
		env, _ := os.ReadFile(file)
		if bytes.Contains(env, []byte("GIT_DIR="+dir+"\x00")) {
			args, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			names = append(names, strings.ReplaceAll(string(args), "\x00", " "))
		}
	}
	return names
}

func TestAWorkerThatIsKilledInMidFetchDoesNoHarm(t *testing.T) {
	home(t)
	s, source := newStore(t), large(t, 8<<20)
	server := serve(t, filepath.Dir(source), false)
	addr, release, stalled := slow(t, server.URL, 2<<20)
	worker := exec.Command(os.Args[0])
	worker.Env = append(os.Environ(), "REPO_TEST_RESOLVE="+addr+"/source", "REPO_TEST_DIR="+s.dir)
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = worker.Process.Kill(); _ = worker.Wait() }()
	halfPack := func() []string { return glob(t, s.dir, "mirrors", "*.git", "objects", "pack", "tmp_pack_*") }
	waitFor(t, "half a pack is there", time.Minute, func() bool { return stalled() && len(halfPack()) > 0 })
	if err := worker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = worker.Wait()
	mirror := filepath.Dir(filepath.Dir(filepath.Dir(halfPack()[0])))
	// A git that outlived its worker would still write into the mirror. The
	// one that talks to the network, and the wrapper that waits for it, do
	// not; they end when the connection does, after http.lowSpeedTime at the
	// latest. The limit is below that, which would end the others too.
	waitFor(t, "its git is dead", 20*time.Second, func() bool {
		for _, name := range gitsOf(t, mirror) {
			if !strings.Contains(name, "remote-http ") {
				return false
			}
		}
		return true
	})
	for _, name := range []string{"HEAD.lock", "config.lock", "packed-refs.lock", "refs/incoming/tip.lock", "shallow.lock", "objects/pack/tmp_idx_x"} {
		write(t, filepath.Join(mirror, name), "stale")
	}
	release()
	waitFor(t, "the last of its git is dead", time.Minute, func() bool { return len(gitsOf(t, mirror)) == 0 })
	b := resolve(t, s, addr+"/source", "")
	if b.Mirror != mirror {
		t.Errorf("another mirror: %s", b.Mirror)
	}
	sandbox(t, s, b)
	if left := halfPack(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestABrokenMirrorIsMadeAgain(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, mirror string){
		"truncated pack": func(t *testing.T, mirror string) {
			for _, p := range glob(t, mirror, "objects", "pack", "*.pack") {
				if err := os.Chmod(p, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(p, 50); err != nil {
					t.Fatal(err)
				}
			}
		},
		"no packs": func(t *testing.T, mirror string) {
			if err := os.RemoveAll(filepath.Join(mirror, "objects", "pack")); err != nil {
				t.Fatal(err)
			}
		},
		"zeros in a pack": func(t *testing.T, mirror string) {
			for _, p := range glob(t, mirror, "objects", "pack", "*.pack") {
				info, _ := os.Stat(p)
				if err := os.Chmod(p, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(p, make([]byte, info.Size()), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		},
		"no HEAD":       func(t *testing.T, mirror string) { _ = os.Remove(filepath.Join(mirror, "HEAD")) },
		"empty HEAD":    func(t *testing.T, mirror string) { write(t, filepath.Join(mirror, "HEAD"), "") },
		"broken config": func(t *testing.T, mirror string) { write(t, filepath.Join(mirror, "config"), "[[[") },
		"broken refs": func(t *testing.T, mirror string) {
			for _, p := range glob(t, mirror, "refs", "bases", "*") {
				write(t, p, "\x00\x00\x00")
			}
		},
		"an empty folder": func(t *testing.T, mirror string) {
			if err := os.RemoveAll(mirror); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(mirror, 0o700); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			home(t)
			s, source := newStore(t), repository(t)
			b := resolve(t, s, source, "")
			spoil(t, b.Mirror)
			write(t, filepath.Join(source, "next"), "x\n")
			commit(t, source, "next")
			next := resolve(t, s, source, "")
			sandbox(t, s, next)

			// The same when the commit is one that the mirror says it has: the
			// first who needs it finds out, the second has a new mirror.
			spoil(t, next.Mirror)
			var out bytes.Buffer
			err := s.Bundle(t.Context(), next, &out)
			if err != nil && fault.KindOf(err) != fault.Unavailable {
				t.Errorf("%v of kind %q", err, fault.KindOf(err))
			}
			sandbox(t, s, resolve(t, s, source, ""))
		})
	}
}

// The mirror says that it has the commit, and part of the history is gone.
func TestAMirrorWithHolesIsFoundOutAndMadeAgain(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	first := glob(t, resolve(t, s, source, "").Mirror, "objects", "pack", "*.pack")
	write(t, filepath.Join(source, "next"), "x\n")
	commit(t, source, "next")
	b := resolve(t, s, source, "")
	work := sandbox(t, s, b)
	write(t, filepath.Join(work, "x"), "x\n")
	commit(t, work, "work")
	in := bundled(t, work, b)
	for _, p := range first {
		for _, end := range []string{".pack", ".idx"} {
			if err := os.Remove(strings.TrimSuffix(p, ".pack") + end); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A run made of it: it is not the fork that is to blame.
	_, err := s.Receive(t.Context(), in)
	wantFault(t, err, fault.Unavailable)
	receive(t, s, in)

	for _, p := range glob(t, b.Mirror, "objects", "pack", "*") {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
	sandbox(t, s, resolve(t, s, source, ""))
}

// Bundle is where holes show that Resolve does not look for.
func TestABundleOfAMirrorWithHolesIsUnavailableOnce(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	first := glob(t, resolve(t, s, source, "").Mirror, "objects", "pack", "*.pack")
	write(t, filepath.Join(source, "next"), "x\n")
	commit(t, source, "next")
	b := resolve(t, s, source, "")
	for _, p := range first {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
	wantFault(t, s.Bundle(t.Context(), b, io.Discard), fault.Unavailable)
	sandbox(t, s, b)
}

func TestAConnectionThatBreaksIsUnavailableAndKeepsTheMirror(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	server := serve(t, filepath.Dir(source), false)
	var cutting atomic.Bool
	target, _ := url.Parse(server.URL)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if cutting.Load() && r.Method == http.MethodPost && r.ContentLength > 250 { // the wants, not the listing
			panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	old := resolve(t, s, front.URL+"/source", "")
	commit(t, source, "next")
	cutting.Store(true)
	_, err := s.Resolve(t.Context(), front.URL+"/source", "")
	wantFault(t, err, fault.Unavailable)
	sandbox(t, s, old)
	cutting.Store(false)
	sandbox(t, s, resolve(t, s, front.URL+"/source", ""))
}

func TestAFullDiskIsSaidAndLeavesNothingHalfMade(t *testing.T) {
	home(t)
	source := large(t, 6<<20)
	disk := smallDisk(t, "4m")
	s := New(Options{Dir: filepath.Join(disk, "state")})
	_, err := s.Resolve(t.Context(), source, "")
	wantFault(t, err, fault.Full)
	if left := glob(t, s.dir, "mirrors", "*.git", "objects", "pack", "*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if left := glob(t, s.dir, "tmp", "*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	// With a smaller repository it goes on at once.
	small := repository(t)
	b := resolve(t, s, small, "")
	work := sandbox(t, s, b)
	noise := make([]byte, 6<<20)
	_, _ = rand.Read(noise)
	write(t, filepath.Join(work, "noise"), string(noise))
	commit(t, work, "noise")
	_, err = s.Receive(t.Context(), bundled(t, work, b))
	wantFault(t, err, fault.Full)
	if left := glob(t, s.dir, "tmp", "*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	git(t, s.runDir(run1), "fsck", "--strict")
}

func TestWhatAKilledWorkerLeftIsSweptAway(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	write(t, filepath.Join(s.dir, "tmp", "0123.lock"), "")
	write(t, filepath.Join(s.dir, "tmp", "0123", "bundle.git", "HEAD"), "x")
	busy, err := s.scratch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sandbox(t, s, resolve(t, s, source, ""))
	left := glob(t, s.dir, "tmp", "*")
	if strings.Contains(strings.Join(left, " "), "0123") || len(left) != 2 {
		t.Errorf("left: %q, want the folder in use and its lock", left)
	}
	busy.close()
}
