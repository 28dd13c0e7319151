package e2b

import (
	"errors"
	"fmt"
	"io"
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

// A sandbox from nothing to the end of its first command.
func BenchmarkFirstCommand(b *testing.B) {
	srv := serve(b, e2btest.Options{})
	p := provider(b, srv)
	n := 0
	for b.Loop() {
		n++
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
		if err := p.Destroy(b.Context(), ref); err != nil {
			b.Fatal(err)
		}
	}
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
