package artifact

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const key = "runs/r/1/transcript"

// read returns the log from a byte on, and its size.
func read(t *testing.T, s *Store, from int64) (string, int64) {
	t.Helper()
	r, size, err := s.ReadLog(t.Context(), key, from)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), size
}

func add(t *testing.T, s *Store, offset int64, text string) {
	t.Helper()
	if err := s.Append(t.Context(), key, offset, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

func TestLogReadsBackFromAnyByte(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		_, _, err := s.ReadLog(t.Context(), key, 0)
		wantKind(t, err, fault.NotFound)
		add(t, s, 0, "hello ")
		add(t, s, 6, "world")
		for range 2 { // growing, then sealed
			for _, from := range []int64{0, 1, 2, 5, 6, 7, 10, 11, 12, segment, 3*segment + 1} {
				got, size := read(t, s, from)
				if want := "hello world"[min(from, 11):]; got != want || size != 11 {
					t.Errorf("from %d: %q of %d, want %q of 11", from, got, size, want)
				}
			}
			if err := s.Seal(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		if got := get(t, s, key); got != "hello world" {
			t.Errorf("sealed %q", got)
		}
	})
}

func TestAppendAgainChangesNothing(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		for range 2 {
			add(t, s, 0, "one")
			add(t, s, 3, "two")
			add(t, s, 6, "")
		}
		if got, size := read(t, s, 0); got != "onetwo" || size != 6 {
			t.Errorf("%q of %d", got, size)
		}
		wantKind(t, s.Append(t.Context(), key, 3, []byte("TWO")), fault.Conflict)
		wantKind(t, s.Append(t.Context(), key, -1, []byte("x")), fault.Invalid)
		if err := s.Seal(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		add(t, s, 3, "two")
		add(t, s, 2, "et") // any part of what is there
		add(t, s, 6, "")
		wantKind(t, s.Append(t.Context(), key, 6, []byte("x")), fault.Conflict)
		wantKind(t, s.Append(t.Context(), key, 3, []byte("TWO")), fault.Conflict)
		if got, size := read(t, s, 0); got != "onetwo" || size != 6 {
			t.Errorf("after sealing: %q of %d", got, size)
		}
	})
}

func TestChunksOfTwoWorkersMayOverlap(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		text := "abcdefghijklmnopqrstuvwxyz"
		for _, c := range [][2]int{{0, 10}, {0, 4}, {10, 12}, {4, 15}, {15, 26}, {12, 14}} {
			add(t, s, int64(c[0]), text[c[0]:c[1]])
		}
		for range 2 {
			for from := range int64(len(text)) {
				if got, size := read(t, s, from); got != text[from:] || size != int64(len(text)) {
					t.Errorf("from %d: %q of %d", from, got, size)
				}
			}
			if err := s.Seal(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestReadersStopBeforeAGapAndSealRefusesIt(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		add(t, s, 0, "abc")
		add(t, s, 5, "fg")
		if got, size := read(t, s, 0); got != "abc" || size != 3 {
			t.Errorf("%q of %d", got, size)
		}
		wantKind(t, s.Seal(t.Context(), key), fault.Conflict)
		if sealed, err := s.Sealed(t.Context(), key); sealed || err != nil {
			t.Errorf("sealed %t, %v", sealed, err)
		}
		add(t, s, 3, "de")
		if err := s.Seal(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if got := get(t, s, key); got != "abcdefg" {
			t.Errorf("sealed %q", got)
		}
	})
}

// A worker that is killed leaves an unfinished file; a machine that loses
// power may leave a chunk without its bytes.
func TestWritingGoesOnAfterACrashBetweenChunks(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	add(t, s, 0, "abc")
	add(t, s, 3, "def")
	torn := filepath.Join(dir, chunk{3, 3}.key(key))
	if err := os.Truncate(torn, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, chunk{6, 3}.key(key)+".1a2b.tmp"), []byte("gh"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, size := read(t, s, 0)
	if size != 3 {
		t.Fatalf("the log has %d bytes, want 3", size)
	}
	add(t, s, size, "defghi")
	if got, _ := read(t, s, 0); got != "abcdefghi" {
		t.Errorf("%q", got)
	}
	add(t, s, 3, "def") // the first worker was not dead after all
	if err := s.Seal(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s, key); got != "abcdefghi" {
		t.Errorf("sealed %q", got)
	}
	if left := unfinishedFiles(t, s); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	if diff := cmp.Diff([]string{key}, keys(t, s, "")); diff != "" {
		t.Error(diff)
	}
}

func TestSealFinishesWhatACrashInterrupted(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		add(t, s, 0, "abc")
		add(t, s, 3, "def")
		// As if killed after the sealed log was there and one chunk was gone.
		if err := s.Put(t.Context(), key, strings.NewReader("abcdef")); err != nil {
			t.Fatal(err)
		}
		if err := s.remove(t.Context(), chunk{0, 3}.key(key)); err != nil {
			t.Fatal(err)
		}
		if got, size := read(t, s, 1); got != "bcdef" || size != 6 {
			t.Errorf("half sealed: %q of %d", got, size)
		}
		for range 2 {
			if err := s.Seal(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		for o, err := range s.under(t.Context(), key+chunks) {
			t.Errorf("%s is left, %v", o.Key, err)
		}
		if _, err := os.Stat(filepath.Join(s.dir, key+chunks)); s.dir != "" && !os.IsNotExist(err) {
			t.Errorf("the folder of the chunks is left: %v", err)
		}
		if sealed, err := s.Sealed(t.Context(), key); !sealed || err != nil {
			t.Errorf("sealed %t, %v", sealed, err)
		}
	})
}

func TestAnEmptyLogSealsToAnEmptyObject(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		if err := s.Seal(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if got, size := read(t, s, 0); got != "" || size != 0 {
			t.Errorf("%q of %d", got, size)
		}
	})
}

func TestAnOpenReaderDoesNotNoticeTheSeal(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		var want bytes.Buffer
		for i := range 40 {
			p := bytes.Repeat([]byte{byte('a' + i%26)}, 50_000)
			add(t, s, int64(want.Len()), string(p))
			want.Write(p)
		}
		r, size, err := s.ReadLog(t.Context(), key, 10)
		if err != nil || size != int64(want.Len()) {
			t.Fatal(size, err)
		}
		defer r.Close()
		got := make([]byte, 70_000)
		if _, err := io.ReadFull(iotest.HalfReader(r), got); err != nil {
			t.Fatal(err)
		}
		if err := s.Seal(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(append(got, rest...), want.Bytes()[10:]) {
			t.Error("the reader saw other bytes")
		}
	})
}

// Fifty megabytes, three who follow from the start, a zombie that writes the
// same again, and a seal at the end.
func TestFollowersSeeEveryByteOnceWhileALogGrows(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		size := 8 << 20
		if s.dir == "" {
			size = 1 << 20 // a request for every chunk
		}
		want := make([]byte, size)
		chacha := rand.NewChaCha8([32]byte{1})
		_, _ = chacha.Read(want)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()

		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				pos := int64(0)
				for pos < int64(size) && ctx.Err() == nil {
					r, n, err := s.ReadLog(ctx, key, pos)
					if fault.KindOf(err) == fault.NotFound && pos == 0 {
						continue
					}
					if err != nil {
						t.Errorf("at %d: %v", pos, err)
						cancel()
						return
					}
					got, err := io.ReadAll(r)
					_ = r.Close()
					if err != nil || n < pos || int64(len(got)) != n-pos || !bytes.Equal(got, want[pos:n]) {
						t.Errorf("from %d to %d: %d bytes, %v", pos, n, len(got), err)
						cancel()
						return
					}
					pos = n
				}
			})
		}
		rnd := rand.New(chacha)
		for pos := 0; pos < size && ctx.Err() == nil; {
			n := min(1+rnd.IntN(300_000), size-pos)
			if err := s.Append(ctx, key, int64(pos), want[pos:pos+n]); err != nil {
				t.Fatal(err)
			}
			if rnd.IntN(10) == 0 {
				if err := s.Append(ctx, key, int64(pos), want[pos:pos+n/2]); err != nil {
					t.Fatal(err)
				}
			}
			pos += n
		}
		if err := s.Seal(ctx, key); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if got := get(t, s, key); got != string(want) {
			t.Error("the sealed log differs")
		}
	})
}

func TestManySealsAtOnceMakeOneLog(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		for i := range 50 {
			add(t, s, int64(i*4), "abc\n")
		}
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				if err := s.Seal(t.Context(), key); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() {
				r, size, err := s.ReadLog(t.Context(), key, 0)
				if err != nil {
					t.Error(err)
					return
				}
				defer r.Close()
				if b, err := io.ReadAll(r); err != nil || len(b) != 200 || size != 200 {
					t.Errorf("%d bytes of %d, %v", len(b), size, err)
				}
			})
		}
		wg.Wait()
		if got := get(t, s, key); got != strings.Repeat("abc\n", 50) {
			t.Errorf("%d bytes", len(got))
		}
	})
}

func TestTinyChunksCrossTheEdgeOfASegment(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		base := strings.Repeat("x", segment-3)
		add(t, s, 0, base)
		for i, c := range "abcdefg" {
			add(t, s, int64(segment-3+i), string(c))
		}
		for _, from := range []int64{0, segment - 4, segment - 1, segment, segment + 1, segment + 4, segment + 5} {
			got, size := read(t, s, from)
			if want := (base + "abcdefg")[min(from, segment+4):]; got != want || size != segment+4 {
				t.Errorf("from %d: %d bytes of %d, want %d of %d", from, len(got), size, len(want), segment+4)
			}
		}
		for o, err := range s.List(t.Context(), "runs") {
			if err != nil || o.Key != key || o.Size != segment+4 {
				t.Errorf("%+v, %v", o, err)
			}
		}
	})
}

func FuzzChunkNames(f *testing.F) {
	f.Add(chunk{0, 1}.key(key))
	f.Add(chunk{segment * 5, segment}.key("a"))
	f.Add("a.chunks/00000000/0-1")
	f.Fuzz(func(t *testing.T, name string) {
		if log, c, ok := parseChunk(name); ok && c.key(log) != name {
			t.Errorf("%q is %+v of %q, which is named %q", name, c, log, c.key(log))
		}
	})
}
