package e2btest_test

import (
	"bytes"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// naming returns the processes of this host that have word in their command
// line.
func naming(t *testing.T, word string) (ids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		// One that cannot be read has ended.
		if line, err := os.ReadFile(name); err == nil && bytes.Contains(line, []byte(word)) {
			ids = append(ids, name)
		}
	}
	return ids
}

func TestFaultsHappenWhereAndAsOftenAsPlanned(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	f := e2btest.RateLimited("POST /v2/sandboxes", 1500*time.Millisecond)
	f.Skip, f.Times = 1, 2
	c.s.Fault(f)
	forget := c.s.Fault(e2btest.Fault{On: "GET /sandboxes/*", Status: http.StatusInternalServerError, Times: -1})
	b := c.create(plain)
	for range 2 {
		a := c.must(http.StatusTooManyRequests, http.MethodPost, "/v2/sandboxes", plain)
		if a.header.Get("Retry-After") != "2" || a.header.Get("RateLimit-Remaining") != "0" {
			t.Errorf("%v", a.header)
		}
	}
	c.create(plain)
	for range 3 {
		c.must(http.StatusInternalServerError, http.MethodGet, b.path(""), "")
	}
	forget()
	c.must(http.StatusOK, http.MethodGet, b.path(""), "")
	if n := len(c.s.Sandboxes()); n != 2 {
		t.Errorf("%d sandboxes", n)
	}
}

func TestASandboxThatRunsMayBeSaidNotTo(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b, other := c.create(plain), c.create(plain)
	c.s.Fault(e2btest.NotRunning("", b.ID))
	if a := other.send(other.data(http.MethodGet, "/health", "")); a.status != http.StatusNoContent {
		t.Errorf("the other: %d", a.status)
	}
	if a := b.send(b.data(http.MethodGet, "/health", "")); a.status != http.StatusBadGateway || !strings.Contains(a.body, b.ID) {
		t.Errorf("%d: %s", a.status, a.body)
	}
	if a := b.send(b.data(http.MethodGet, "/health", "")); a.status != http.StatusNoContent {
		t.Errorf("afterwards: %d", a.status)
	}
}

func TestAnAnswerMayBeLostAfterTheDeed(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	c.s.Fault(e2btest.Fault{On: "POST /v2/sandboxes", Lose: true})
	c.s.Fault(e2btest.Fault{On: "DELETE /sandboxes/*", Lose: true}) // its answer has no body
	lost := func(method, path, body string) {
		t.Helper()
		req := c.request(method, c.s.APIURL()+path, body)
		req.Header.Set("X-API-Key", c.s.Key)
		// One that could not be sent again by itself.
		req.GetBody = nil
		if res, err := http.DefaultClient.Do(req); err == nil {
			_ = res.Body.Close()
			t.Errorf("%s %s was answered: %s", method, path, res.Status)
		}
	}
	lost(http.MethodPost, "/v2/sandboxes", plain)
	left := c.s.Sandboxes()
	if len(left) != 1 {
		t.Fatalf("sandboxes %v", left)
	}
	lost(http.MethodDelete, "/sandboxes/"+left[0].ID, "")
	if left := c.s.Sandboxes(); len(left) != 0 {
		t.Errorf("sandboxes %v", left)
	}
}

func TestAnAnswerMayBeCutOrSlow(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(plain)
	text := strings.Repeat("x", 1000)
	b.write("/tmp/file", text)
	c.s.Fault(e2btest.Fault{On: "GET /files", CutAfter: 600})
	req := b.data(http.MethodGet, "/files?path=/tmp/file", "")
	req.Header.Set("Range", "bytes=0-")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	_, err = got.ReadFrom(res.Body)
	_ = res.Body.Close()
	if err == nil || got.Len() != 600 {
		t.Errorf("%d bytes came, %v", got.Len(), err)
	}
	c.s.Fault(e2btest.Fault{On: "GET /files", BytesPerSecond: 4000})
	begin := time.Now()
	if a := b.read("/tmp/file", "bytes=0-"); a.body != text || time.Since(begin) < 200*time.Millisecond {
		t.Errorf("%d bytes came after %v", len(a.body), time.Since(begin))
	}
	// A stream of messages is cut in the middle of one.
	c.s.Fault(e2btest.Fault{On: "POST /process.Process/Start", CutAfter: 100})
	if _, _, _, _, err := b.start("echo a lot; echo more; sleep 0.1; echo and more").rest(); err == nil {
		t.Error("the stream ended well")
	}
}

func TestSandboxesMayBeLateInLists(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	c.s.LateLists(2)
	b := c.create(plain)
	for i, want := range []int{0, 0, 1, 1} {
		if got := len(c.listed(url.Values{}, nil)); got != want {
			t.Errorf("list %d shows %d, want %d", i, got, want)
		}
	}
	c.must(http.StatusOK, http.MethodGet, b.path(""), "")
}

func TestASandboxMayGoWhileItIsWorkedIn(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(plain)
	s := b.start("while :; do echo x; sleep 0.01; done")
	s.pid()
	c.s.Fault(e2btest.Fault{On: "GET /files", Do: func(id string) { c.s.Kill(id) }})
	if a := b.read("/etc/hostname", ""); a.status != http.StatusBadGateway {
		t.Errorf("%d: %s", a.status, a.body)
	}
	if _, _, _, _, err := s.rest(); err == nil {
		t.Error("the stream ended well")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	t.Parallel()
	if err := e2btest.Supported(); err != nil {
		t.Skipf("no sandbox can be made here: %v", err)
	}
	dir := t.TempDir()
	s := e2btest.New(e2btest.Options{Dir: dir})
	c := client{t, s}
	const word = "e2btest-close-leaves-nothing"
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			b := c.create(plain)
			b.start("sh -c 'while :; do sleep 0.05; done' " + word).pid()
			c.must(http.StatusCreated, http.MethodPost, b.path("/snapshots"), "{}")
		})
	}
	all.Wait()
	c.must(http.StatusNoContent, http.MethodPost, "/sandboxes/"+s.Sandboxes()[0].ID+"/pause", "")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if alive := naming(t, word); len(alive) > 0 {
		t.Errorf("%v live on", alive)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}

func TestOtherFormsOfURLs(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(plain)
	b.write("/tmp/file", "text")
	req := c.request(http.MethodGet, c.s.PathURL(b.ID, 49983)+"/files?path=/tmp/file", "")
	req.Header.Set("X-Access-Token", b.Token)
	if a := c.send(req); a.body != "text" {
		t.Errorf("by path: %d: %s", a.status, a.body)
	}
	// A port where nobody listens: 1 is nobody's.
	if a := c.send(c.request(http.MethodGet, c.s.PathURL(b.ID, 1)+"/", "")); a.status != http.StatusBadGateway || !strings.Contains(a.body, "port is not open") {
		t.Errorf("closed port: %d: %s", a.status, a.body)
	}
}
