package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A quietBuffer may be written and read at the same time.
type quietBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (q *quietBuffer) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.b.Write(p)
}

func (q *quietBuffer) String() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.b.String()
}

// watching starts a watch that ends with the test.
func watching(t *testing.T, o Options, checks ...check) (*watch, *quietBuffer) {
	t.Helper()
	said := &quietBuffer{}
	o.Logger = slog.New(slog.NewTextHandler(said, nil))
	reg := prometheus.NewRegistry()
	reg.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "some_total", Help: "Some."}))
	w := newWatch(o, reg, checks...)
	w.again = 10 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	w.serve(ctx, &serving)
	t.Cleanup(func() { cancel(); serving.Wait() })
	return w, said
}

// look asks for a page.
func look(t *testing.T, w *watch, path string) (int, string) {
	t.Helper()
	at, err := w.url(path)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.Get(at)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func TestReadinessFollowsTheHost(t *testing.T) {
	var mu sync.Mutex
	var trouble error
	w, _ := watching(t, Options{}, check{"temporal", func(context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		return trouble
	}})
	want := func(status int, text string) {
		t.Helper()
		if got, said := look(t, w, readyPath); got != status || !strings.Contains(said, text) {
			t.Errorf("%d %s, want %d %s", got, said, status, text)
		}
		if got, said := look(t, w, healthPath); got != http.StatusOK || said != "ok\n" {
			t.Errorf("health: %d %s", got, said)
		}
	}
	want(http.StatusServiceUnavailable, `"worker":"it starts"`)
	w.started.Store(true)
	want(http.StatusOK, `"ready":true`)
	mu.Lock()
	trouble = fault.New("dial", fault.Unreachable, "the secret host 10.1.2.3 does not answer")
	mu.Unlock()
	want(http.StatusServiceUnavailable, `"temporal":"unreachable"`)
	if _, said := look(t, w, readyPath); strings.Contains(said, "10.1.2.3") {
		t.Errorf("it tells strangers %s", said)
	}
	mu.Lock()
	trouble = nil
	mu.Unlock()
	want(http.StatusOK, `"temporal":"ok"`)
	(&Host{watch: w}).Drain()
	want(http.StatusServiceUnavailable, `"worker":"it lets go of its work"`)
	if status, said := look(t, w, metricsPath); status != http.StatusOK || !strings.Contains(said, "some_total 0") {
		t.Errorf("metrics: %d %s", status, said)
	}
	if status, _ := look(t, w, "/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("another page: %d", status)
	}
}

func TestATakenPortStopsNothingAndIsTriedAgain(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := ln.Addr().(*net.TCPAddr).Port
	w, said := watching(t, Options{MetricsPort: port})
	if at, err := w.url(metricsPath); at != "" || fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "METRICS_PORT") {
		t.Errorf("%q, %v", at, err)
	}
	ln.Close()
	for end := time.Now().Add(20 * time.Second); ; {
		if at, _ := w.url(healthPath); at != "" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the port was free and nobody took it")
		}
		time.Sleep(5 * time.Millisecond) // until it is tried again
	}
	if status, _ := look(t, w, healthPath); status != http.StatusOK {
		t.Errorf("%d", status)
	}
	if text := said.String(); strings.Count(text, "level=WARN") != 1 || !strings.Contains(text, "--metrics-port") {
		t.Errorf("it said:\n%s", text)
	}
}

func TestWhatKeepsMetricsAwayNamesTheSetting(t *testing.T) {
	for _, c := range []struct {
		err  error
		kind fault.Kind
		want string
	}{
		{syscall.EADDRINUSE, fault.Conflict, "METRICS_PORT"},
		{syscall.EACCES, fault.Denied, "METRICS_PORT"},
		{syscall.EADDRNOTAVAIL, fault.Invalid, "METRICS_HOST"},
		{&net.DNSError{Err: "no such host"}, fault.Invalid, "METRICS_HOST"},
		{errors.New("something else"), fault.Internal, "METRICS_HOST"},
	} {
		err := MetricsFault("h", 80, fmt.Errorf("listen: %w", c.err))
		if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v", c.err, err)
		}
	}
	w, _ := watching(t, Options{MetricsHost: "192.0.2.1"})
	if _, err := w.url(metricsPath); fault.KindOf(err) != fault.Invalid {
		t.Errorf("an address that nobody has: %v", err)
	}
}

func TestMetricsForAllAreFoundOnThisHost(t *testing.T) {
	w, _ := watching(t, Options{MetricsHost: "0.0.0.0"})
	if at, err := w.url(metricsPath); err != nil || !strings.HasPrefix(at, "http://127.0.0.1:") {
		t.Errorf("%s, %v", at, err)
	}
	if status, _ := look(t, w, healthPath); status != http.StatusOK {
		t.Errorf("%d", status)
	}
}
