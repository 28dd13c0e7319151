package gateway

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// instant answers at once, so that what is measured is the gateway.
func instant(b *testing.B, contentType, text string) *upstream {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", contentType)
		io.WriteString(w, text)
	}))
	b.Cleanup(s.Close)
	return &upstream{Server: s}
}

func quiet(o *Options) { o.Logger = nil }

func post(b *testing.B, c *http.Client, url, token string, body []byte) {
	req, _ := http.NewRequestWithContext(b.Context(), "POST", url+"/v1/messages", bytes.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Api-Key", token)
	res, err := c.Do(req)
	if err != nil {
		b.Error(err)
		return
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != 200 {
		b.Errorf("%d %v", res.StatusCode, err)
	}
}

// BenchmarkForward measures what one call takes with and without the gateway
// between, and reports the difference at the median and at the 99th percentile.
// The body is as large as an agent's first request.
func BenchmarkForward(b *testing.B) {
	up := instant(b, "application/json", `{"model":"claude-sonnet-5-5","usage":{"input_tokens":5,"output_tokens":7}}`)
	r := openRig(b, b.TempDir(), up, quiet)
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 1_000_000 * fork.Dollar})
	body := []byte(message{max: 1000, pad: 50_000}.body())
	c := &http.Client{Transport: defaultTransport()}
	var direct, through []time.Duration
	for b.Loop() {
		start := time.Now()
		post(b, c, up.URL, realKey, body)
		middle := time.Now()
		post(b, c, r.url, token, body)
		direct, through = append(direct, middle.Sub(start)), append(through, time.Since(middle))
	}
	slices.Sort(direct)
	slices.Sort(through)
	for name, p := range map[string]int{"p50": 50, "p99": 99} {
		i := len(direct) * p / 100
		b.ReportMetric(float64((through[i] - direct[i]).Microseconds()), "added-µs-"+name)
	}
}

// BenchmarkParallelCalls measures how many small calls a second get through,
// each with a durable reservation.
func BenchmarkParallelCalls(b *testing.B) {
	up := instant(b, "application/json", `{"model":"claude-sonnet-5-5","usage":{"input_tokens":5,"output_tokens":7}}`)
	r := openRig(b, b.TempDir(), up, quiet)
	r.limits.parallel = 1000
	token := r.grant(Account{Run: "r", Fork: 1, RunBudget: 1_000_000 * fork.Dollar})
	body := []byte(message{max: 1000, pad: 600}.body())
	c := &http.Client{Transport: defaultTransport()}
	b.SetParallelism(32)
	start := time.Now()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			post(b, c, r.url, token, body)
		}
	})
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "calls/s")
}

func BenchmarkStreaming(b *testing.B) {
	text := sseStart + strings.Repeat(sseText, 20_000) + sseDelta + sseStop
	up := instant(b, "text/event-stream", text)
	r := openRig(b, b.TempDir(), up, quiet)
	token := r.grant(Account{Run: "r", Fork: 1})
	c := &http.Client{Transport: defaultTransport()}
	body := []byte(message{max: 1000, stream: true}.body())
	for name, to := range map[string][2]string{"direct": {up.URL, realKey}, "gateway": {r.url, token}} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				post(b, c, to[0], to[1], body)
			}
		})
	}
}

func BenchmarkGrant(b *testing.B) {
	g, err := Open(context.Background(), testOptions(b.TempDir(), ""))
	if err != nil {
		b.Fatal(err)
	}
	defer g.Close() // only measured
	for b.Loop() {
		if _, err := g.Grant(context.Background(), Account{Run: "r", Fork: 1}); err != nil {
			b.Fatal(err)
		}
	}
}
