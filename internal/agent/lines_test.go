package agent

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
)

// split feeds the pieces and returns the lines and the offset after each.
func split(pieces [][]byte, flush bool) (lines []string, consumed []int64) {
	var l Lines
	take := func(line []byte) {
		lines = append(lines, string(line))
		consumed = append(consumed, l.Consumed())
	}
	for _, p := range pieces {
		l.Feed(p, take)
	}
	if flush {
		l.Flush(take)
		l.Flush(take)
	}
	return lines, consumed
}

func TestLinesComeWholeHoweverTheyArrive(t *testing.T) {
	stream := []byte("one\n\ntwo\r\nthree")
	for i := range len(stream) + 1 {
		for j := i; j <= len(stream); j++ {
			lines, at := split([][]byte{stream[:i], stream[i:j], stream[j:]}, true)
			if !slices.Equal(lines, []string{"one", "", "two\r", "three"}) || !slices.Equal(at, []int64{4, 5, 10, 15}) {
				t.Fatalf("cut at %d and %d: %q, %d", i, j, lines, at)
			}
		}
	}
	if lines, at := split([][]byte{stream}, false); len(lines) != 3 || at[2] != 10 {
		t.Errorf("the unfinished line was yielded: %q, %d", lines, at)
	}
	if lines, _ := split([][]byte{[]byte("a\n")}, true); len(lines) != 1 {
		t.Errorf("an empty rest is a line: %q", lines)
	}
}

func TestLongLinesAreCutAndCounted(t *testing.T) {
	long := bytes.Repeat([]byte("x"), 3*maxLine)
	stream := append(append([]byte("a\n"), long...), "\nb\n"...)
	for _, size := range []int{7777, 64 << 10, len(stream)} {
		lines, at := split(slices.Collect(slices.Chunk(stream, size)), true)
		if len(lines) != 3 || lines[0] != "a" || len(lines[1]) != maxLine || lines[2] != "b" {
			t.Fatalf("pieces of %d: %d lines", size, len(lines))
		}
		if !slices.Equal(at, []int64{2, int64(3 + len(long)), int64(len(stream))}) {
			t.Errorf("pieces of %d: consumed %d", size, at)
		}
	}
	var l Lines
	for range 64 {
		l.Feed(long, func([]byte) { t.Error("a line without an end") })
	}
	if cap(l.begun) > 2*maxLine {
		t.Errorf("%d bytes are held", cap(l.begun))
	}
}

// A follower that stops after any line and begins again at Consumed sees the
// same lines as one that never stopped.
func TestReadingGoesOnWhereItStopped(t *testing.T) {
	stream := []byte("one\n\nthree\nfour\nunfinished")
	want, at := split([][]byte{stream}, true)
	for i, offset := range at {
		rest, _ := split([][]byte{stream[offset:]}, true)
		if !slices.Equal(rest, want[i+1:]) {
			t.Errorf("from %d: %q, want %q", offset, rest, want[i+1:])
		}
	}
}

func FuzzLines(f *testing.F) {
	f.Add([]byte("one\ntwo\n\nthree"), uint64(1))
	f.Add([]byte("\n\n\n"), uint64(2))
	f.Add(bytes.Repeat([]byte("long"), 1<<10), uint64(3))
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		want, wantAt := split([][]byte{stream}, true)
		rng := rand.New(rand.NewPCG(seed, 0))
		var pieces [][]byte
		for rest := stream; len(rest) > 0; {
			n := 1 + rng.IntN(min(len(rest), 1+rng.IntN(64)))
			pieces = append(pieces, rest[:n])
			rest = rest[n:]
		}
		got, gotAt := split(pieces, true)
		if !slices.Equal(got, want) || !slices.Equal(gotAt, wantAt) {
			t.Fatalf("%d pieces: %q at %d, at once %q at %d", len(pieces), got, gotAt, want, wantAt)
		}
		if n := len(wantAt); n > 0 && wantAt[n-1] != int64(len(stream)) {
			t.Fatalf("%d of %d bytes", wantAt[n-1], len(stream))
		}
	})
}
