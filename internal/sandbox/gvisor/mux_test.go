package gvisor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// pair returns the two ends of a link that work.
func pair(t testing.TB, atGuardian, atInit func(*stream)) (guardian, init *mux) {
	t.Helper()
	gr, iw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ir, gw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	guardian, init = newMux(gr, gw, false, atGuardian), newMux(ir, iw, true, atInit)
	var both sync.WaitGroup
	both.Go(func() { _ = guardian.serve(); _ = gw.Close() })
	both.Go(func() { _ = init.serve(); _ = iw.Close() })
	t.Cleanup(func() {
		_ = gw.Close()
		_ = iw.Close()
		both.Wait()
		_ = gr.Close()
		_ = ir.Close()
	})
	return guardian, init
}

// echo sends back what arrives, and ends when it ends.
func echo(s *stream) {
	if _, err := io.Copy(s, s); err == nil {
		_ = s.CloseWrite()
	}
}

func TestStreamsCarryBothWaysAtOnce(t *testing.T) {
	guardian, inner := pair(t, echo, echo)
	var all sync.WaitGroup
	for i := range 40 {
		m := guardian
		if i%2 == 0 {
			m = inner
		}
		all.Go(func() {
			s, err := m.open()
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			want := bytes.Repeat([]byte{byte(i)}, i*50_000+1)
			go func() {
				_, _ = s.Write(want)
				_ = s.CloseWrite()
			}()
			if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, want) {
				t.Errorf("stream %d: %d bytes of %d, %v", i, len(got), len(want), err)
			}
		})
	}
	all.Wait()
	for _, m := range []*mux{guardian, inner} {
		eventuallyTrue(t, func() bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			return len(m.streams) == 0
		})
	}
}

func eventuallyTrue(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("in vain")
		}
	}
}

func TestAStreamThatNobodyReadsHoldsUpNoOther(t *testing.T) {
	guardian, _ := pair(t, nil, func(s *stream) {
		b := make([]byte, 1)
		if _, err := s.Read(b); err == nil && b[0] == 'e' {
			echo(s)
		}
	})
	stuck, err := guardian.open()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := stuck.Write(make([]byte, 2*window))
		ended <- err
	}()
	s, err := guardian.open()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = s.Write([]byte("e" + strings.Repeat("x", 3*window)))
		_ = s.CloseWrite()
	}()
	if got, err := io.ReadAll(s); err != nil || len(got) != 3*window {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if err := stuck.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, errReset) {
		t.Errorf("the writer of a stream that was closed: %v", err)
	}
}

func TestClosingAStreamIsTold(t *testing.T) {
	told := make(chan error, 1)
	guardian, _ := pair(t, nil, func(s *stream) {
		_, err := io.Copy(io.Discard, s)
		told <- err
	})
	s, err := guardian.open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	if err := <-told; !errors.Is(err, errReset) {
		t.Errorf("a stream that was closed in the middle ends with %v", err)
	}
}

// TestAHeldLinkIsBetweenFrames holds a link that is busy in both directions,
// and then does what a restored init sees: a new guardian on new pipes.
func TestAHeldLinkIsBetweenFrames(t *testing.T) {
	fromInit, answers := io.Pipe()
	orders, toInit := io.Pipe()
	var swap swapped
	swap.r, swap.w = orders, answers
	inner := newMux(&swap, &swap, true, echo)
	go func() { _ = inner.serve() }()
	guardian := newMux(fromInit, toInit, false, func(s *stream) { _, _ = io.Copy(io.Discard, s) })
	go func() { _ = guardian.serve() }()

	// Init writes without end, and so does somebody outside.
	busy, err := inner.open()
	if err != nil {
		t.Fatal(err)
	}
	broke := make(chan error, 1)
	go func() {
		for {
			if _, err := busy.Write(make([]byte, 1000)); err != nil {
				broke <- err
				return
			}
		}
	}()
	chat := func(m *mux, text string) error {
		s, err := m.open()
		if err != nil {
			return err
		}
		defer s.Close()
		go func() {
			_, _ = io.WriteString(s, text)
			_ = s.CloseWrite()
		}()
		got, err := io.ReadAll(s)
		if err == nil && string(got) != text {
			err = fmt.Errorf("%d bytes came back of %d", len(got), len(text))
		}
		return err
	}
	for range 20 {
		release, err := guardian.hold(10 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		release()
		if err := chat(guardian, strings.Repeat("x", 100_000)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := guardian.hold(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	// The pipes are others from now on; what init has of the old ones is gone.
	newFrom, newAnswers := io.Pipe()
	newOrders, newTo := io.Pipe()
	swap.mu.Lock()
	swap.r, swap.w = newOrders, newAnswers
	swap.mu.Unlock()
	toInit.CloseWithError(errSwapped)
	second := newMux(newFrom, newTo, false, nil)
	go func() { _ = second.serve() }()
	if err := second.takeOver(); err != nil {
		t.Fatal(err)
	}
	if err := <-broke; !errors.Is(err, errReset) {
		t.Errorf("a stream to the guardian before: %v", err)
	}
	if err := chat(second, strings.Repeat("y", 300_000)); err != nil {
		t.Error(err)
	}
	_ = newTo.Close()
	_ = newFrom.Close()
}

var errSwapped = errors.New("swapped")

// swapped is a pair of pipes that can be replaced while somebody reads.
type swapped struct {
	mu sync.Mutex
	r  io.Reader
	w  io.Writer
}

func (s *swapped) now() (io.Reader, io.Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.r, s.w
}

func (s *swapped) Read(p []byte) (int, error) {
	for {
		r, _ := s.now()
		n, err := r.Read(p)
		if !errors.Is(err, errSwapped) {
			return n, err
		}
	}
}

func (s *swapped) Write(p []byte) (int, error) {
	_, w := s.now()
	return w.Write(p)
}

func TestAnInitThatDoesNotHoldStillIsNotWaitedForForEver(t *testing.T) {
	r, _ := io.Pipe()
	m := newMux(r, io.Discard, false, nil)
	if _, err := m.hold(10 * time.Millisecond); err == nil {
		t.Error("it was held by nobody")
	}
	if err := m.send(frameReset, 1, nil); err != nil {
		t.Errorf("the link is not let go: %v", err)
	}
}

func TestADeadLinkEndsItsStreams(t *testing.T) {
	here, there := net.Pipe()
	m := newMux(here, here, false, nil)
	go func() { _, _ = io.Copy(io.Discard, there) }()
	served := make(chan error, 1)
	go func() { served <- m.serve() }()
	s, err := m.open()
	if err != nil {
		t.Fatal(err)
	}
	there.Close()
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, errLinkDead) {
		t.Error(err)
	}
	<-served
	if _, err := m.open(); !errors.Is(err, errLinkDead) {
		t.Error(err)
	}
}

// FuzzLink has a guardian hear what a hostile init may send: it must not
// panic, block, or keep more than the windows of its streams.
func FuzzLink(f *testing.F) {
	frame := func(kind byte, id uint32, data string) string {
		b := binary.BigEndian.AppendUint32([]byte{kind}, id)
		return string(binary.BigEndian.AppendUint32(b, uint32(len(data)))) + data
	}
	f.Add([]byte(frame(frameOpen, 2, "") + frame(frameData, 2, "hello") + frame(frameEnd, 2, "") + frame(frameReset, 2, "")))
	f.Add([]byte(frame(frameOpen, 2, "") + frame(frameOpen, 2, "")))
	f.Add([]byte(frame(frameHold, 0, "")))
	f.Add([]byte(frame(frameHeld, 0, "") + frame(frameGo, 0, "") + frame(frameRenew, 0, "")))
	f.Add([]byte(frame(frameCredit, 1, "\x7f\xff\xff\xff") + frame('?', 1, "")))
	f.Add([]byte("d\x00\x00\x00\x01\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := newMux(bytes.NewReader(b), io.Discard, false, func(s *stream) {
			defer s.Close()
			_, _ = io.Copy(io.Discard, s)
		})
		mine, err := m.open()
		if err != nil {
			t.Fatal(err)
		}
		if err := m.serve(); err == nil {
			t.Error("it ended without an error")
		}
		if _, err := io.ReadAll(mine); err != nil && !errors.Is(err, errLinkDead) && !errors.Is(err, errReset) {
			t.Error(err)
		}
	})
}
