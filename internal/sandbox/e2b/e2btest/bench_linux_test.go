package e2btest_test

import (
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// What the server itself takes is the floor of what a client can be measured
// against.

func BenchmarkCreateRunKill(b *testing.B) {
	c := client{b, serve(b, e2btest.Options{})}
	for b.Loop() {
		box := c.create(plain)
		box.run("true")
		c.must(http.StatusNoContent, http.MethodDelete, box.path(""), "")
	}
}

func BenchmarkRun(b *testing.B) {
	box := client{b, serve(b, e2btest.Options{})}.create(plain)
	for b.Loop() {
		box.run("true")
	}
}

func BenchmarkEmptyPoll(b *testing.B) {
	box := client{b, serve(b, e2btest.Options{})}.create(plain)
	box.write("/tmp/log", strings.Repeat("x", 5<<20))
	for b.Loop() {
		if a := box.read("/tmp/log", "bytes=5242880-"); a.status != http.StatusRequestedRangeNotSatisfiable {
			b.Fatal(a.status)
		}
	}
}

func BenchmarkDownload(b *testing.B) {
	box := client{b, serve(b, e2btest.Options{})}.create(plain)
	const size = 64 << 20
	box.run("head -c 67108864 /dev/zero > /tmp/file")
	b.SetBytes(size)
	for b.Loop() {
		req := box.data(http.MethodGet, "/files?path=/tmp/file", "")
		req.Header.Set("Range", "bytes=0-")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if err != nil || n != size {
			b.Fatal(n, err)
		}
	}
}

func BenchmarkUpload(b *testing.B) {
	box := client{b, serve(b, e2btest.Options{})}.create(plain)
	text := strings.Repeat("x", 64<<20)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		box.write("/tmp/file", text)
	}
}

func BenchmarkList1000(b *testing.B) {
	c := client{b, serve(b, e2btest.Options{})}
	for range 1000 {
		c.create(plain)
	}
	for b.Loop() {
		if n := len(c.listed(url.Values{}, nil)); n != 1000 {
			b.Fatal(n)
		}
	}
}
