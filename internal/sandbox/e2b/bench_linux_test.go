package e2b

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// A poll that finds nothing new, as one is made four times a second for each
// fork.
func BenchmarkEmptyPoll(b *testing.B) {
	srv := serve(b, e2btest.Options{})
	_, box := create(b, provider(b, srv), sandbox.Spec{Key: "poll"})
	proc, err := box.Start(b.Context(), "say", shell("echo said; exec sleep 600"))
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 64<<10)
	for b.Loop() {
		if _, err := proc.ReadAt(b.Context(), sandbox.Stdout, buf, 5); !errors.Is(err, io.EOF) {
			b.Fatal(err)
		}
	}
}

// underWay measures for how long no request was under way.
type underWay struct {
	http.RoundTripper
	mu    sync.Mutex
	n     int
	since time.Time
	none  time.Duration
}

func (u *underWay) add(n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n == 0 {
		u.none += time.Since(u.since)
	}
	u.n += n
	u.since = time.Now()
}

func (u *underWay) RoundTrip(r *http.Request) (*http.Response, error) {
	u.add(1)
	resp, err := u.RoundTripper.RoundTrip(r)
	if err != nil {
		u.add(-1)
		return resp, err
	}
	resp.Body = &underWayBody{resp.Body, sync.OnceFunc(func() { u.add(-1) })}
	return resp, nil
}

type underWayBody struct {
	io.ReadCloser
	done func()
}

func (b *underWayBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.done()
	}
	return n, err
}

func (b *underWayBody) Close() error { b.done(); return b.ReadCloser.Close() }

// A sandbox from nothing to the end of its first command, and how much of that
// the client does not wait for an answer.
func BenchmarkFirstCommand(b *testing.B) {
	srv := serve(b, e2btest.Options{})
	p := provider(b, srv)
	c, err := p.connect()
	if err != nil {
		b.Fatal(err)
	}
	u := &underWay{RoundTripper: c.http.Transport}
	c.http.Transport = u
	var own []time.Duration
	n := 0
	for b.Loop() {
		n++
		u.since, u.none = time.Now(), 0
		ref, err := p.Create(b.Context(), sandbox.Spec{Key: fmt.Sprintf("first-%d", n), Deadline: time.Now().Add(time.Minute)})
		if err != nil {
			b.Fatal(err)
		}
		sb, err := p.Attach(b.Context(), ref)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, _, err := sandbox.Output(b.Context(), sb, "true", sandbox.Cmd{Args: []string{"true"}}, 10); err != nil {
			b.Fatal(err)
		}
		u.add(0)
		own = append(own, u.none)
		if err := p.Destroy(b.Context(), ref); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(own)
	b.ReportMetric(own[len(own)/2].Seconds()*1000, "own-ms/op")
}

// A thousand sandboxes, in pages of a hundred.
func BenchmarkListThousand(b *testing.B) {
	srv := serve(b, e2btest.Options{})
	p := provider(b, srv)
	c, err := p.connect()
	if err != nil {
		b.Fatal(err)
	}
	for i := range 1000 {
		spec := sandbox.Spec{Key: fmt.Sprintf("list-%d", i), Deadline: time.Now().Add(time.Hour), Labels: map[string]string{sandbox.LabelRun: "r"}}
		if _, err := c.create(b.Context(), newMachine{Template: DefaultTemplate, Timeout: 3600, Metadata: metadata(spec, newNonce())}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if all, err := p.List(b.Context(), map[string]string{sandbox.LabelRun: "r"}); err != nil || len(all) != 1000 {
			b.Fatal(len(all), err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// 200 MB into a sandbox, and out of it again.
func BenchmarkUpAndDown(b *testing.B) {
	const size = 200 << 20
	srv := serve(b, e2btest.Options{})
	_, box := create(b, provider(b, srv), sandbox.Spec{Key: "files"})
	const name = sandbox.Workspace + "/large"
	b.Run("up", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			if err := box.Upload(b.Context(), name, io.LimitReader(zeros{}, size)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("down", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			f, err := box.Download(b.Context(), name)
			if err != nil {
				b.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, f); err != nil || n != size {
				b.Fatal(n, err)
			}
			_ = f.Close()
		}
	})
}
