package tracing

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// collector is a place for traces, over http/protobuf.
type collector struct {
	mu     sync.Mutex
	names  []string
	bodies [][]byte
}

// holds says whether the text was sent.
func (c *collector) holds(text string) bool {
	return slices.ContainsFunc(c.bodies, func(b []byte) bool { return bytes.Contains(b, []byte(text)) })
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	var in coltrace.ExportTraceServiceRequest
	if err != nil || proto.Unmarshal(b, &in) != nil {
		http.Error(w, "no", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bodies = append(c.bodies, b)
	for _, rs := range in.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				c.names = append(c.names, s.Name)
			}
		}
	}
}

func TestSpansArriveAtTheCollector(t *testing.T) {
	c := &collector{}
	srv := httptest.NewServer(c)
	defer srv.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	tr, err := Start(t.Context(), Options{Getenv: os.Getenv, Service: "test", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	_, span := tr.Tracer().Start(context.Background(), "one")
	span.End()
	tr.Stop(10 * time.Second)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.names) != 1 || c.names[0] != "one" {
		t.Errorf("got %q", c.names)
	}
}

func TestWithoutAPlaceNothingIsTraced(t *testing.T) {
	for _, vars := range []map[string]string{{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}} {
		tr, err := Start(t.Context(), Options{Getenv: func(n string) string { return vars[n] }})
		if tr != nil || err != nil || tr.Tracer() != nil {
			t.Errorf("%v, %v", tr, err)
		}
		if i, err := tr.Interceptors(); i != nil || err != nil {
			t.Errorf("%v, %v", i, err)
		}
		tr.Stop(time.Second)
	}
}

func TestACollectorThatIsDownCostsOneWarning(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	srv.Close() // nobody listens there any more
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	var log bytes.Buffer
	tr, err := Start(t.Context(), Options{Getenv: os.Getenv, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	for range 3000 { // more than one batch
		_, span := tr.Tracer().Start(context.Background(), "lost")
		span.End()
	}
	tr.Stop(10 * time.Second)
	if n := strings.Count(log.String(), "OTEL_EXPORTER_OTLP_ENDPOINT"); n != 1 {
		t.Errorf("%d warnings: %s", n, log.String())
	}
}

func TestAProtocolThatIsUnknownIsNamed(t *testing.T) {
	vars := map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"}
	_, err := Start(t.Context(), Options{Getenv: func(n string) string { return vars[n] }})
	if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "OTEL_EXPORTER_OTLP_PROTOCOL") {
		t.Errorf("%v", err)
	}
}
