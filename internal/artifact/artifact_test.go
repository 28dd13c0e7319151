package artifact

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// liveStore names a bucket of a real server, with its endpoint or region and
// without a folder, to run the same tests against: its keys are those of the
// environment.
const liveStore = "SANDBOX_TEMPORAL_TEST_S3"

// A kind is one of the stores that there are.
type kind struct {
	name string
	open func(*testing.T) *Store
}

// each runs a test against every kind of store.
func each(t *testing.T, test func(t *testing.T, s *Store)) {
	t.Helper()
	run(t, test, kind{"folder", openDir}, kind{"s3", func(t *testing.T) *Store { return onServer(t, server(t), "") }})
	onServers(t, test)
}

// onServers runs a test, which may be a large one, against a folder of a
// bucket, and of a real one when there is one.
func onServers(t *testing.T, test func(t *testing.T, s *Store)) {
	t.Helper()
	run(t, test, kind{"s3 folder", func(t *testing.T) *Store { return onServer(t, server(t), "team-a/x") }})
	if where := os.Getenv(liveStore); where != "" {
		run(t, test, kind{"live", func(t *testing.T) *Store { return openLive(t, where) }})
	}
}

func run(t *testing.T, test func(t *testing.T, s *Store), kinds ...kind) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			test(t, kind.open(t))
		})
	}
}

// openLive opens a folder of the bucket that goes with the test.
func openLive(t *testing.T, where string) *Store {
	t.Helper()
	folder := "test-" + rand.Text()
	whole, err := Open(t.Context(), where)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), where+"&prefix="+folder)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(whole.Delete(context.Background(), folder), s.Close(), whole.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func openDir(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.Context(), filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left := unfinishedFiles(t, s); len(left) > 0 {
			t.Errorf("unfinished files are left: %q", left)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func unfinishedFiles(t *testing.T, s *Store) (left []string) {
	t.Helper()
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if strings.HasSuffix(path, unfinished) {
			left = append(left, path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return left
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s *Store, key string) string {
	t.Helper()
	r, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func keys(t *testing.T, s *Store, prefix string) []string {
	t.Helper()
	out := []string{}
	for o, err := range s.List(t.Context(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, o.Key)
	}
	return out
}

func wantKind(t *testing.T, err error, want fault.Kind) {
	t.Helper()
	if fault.KindOf(err) != want {
		t.Errorf("%v is of kind %q, want %q", err, fault.KindOf(err), want)
	}
}

func TestPutReplacesWhole(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		for _, text := range []string{"first and long", "second"} {
			if err := s.Put(t.Context(), "a/b", strings.NewReader(text)); err != nil {
				t.Fatal(err)
			}
			if got := get(t, s, "a/b"); got != text {
				t.Errorf("got %q, want %q", got, text)
			}
		}
	})
}

type failing struct {
	text string
	err  error
}

func (f *failing) Read(p []byte) (int, error) {
	n := copy(p, f.text)
	f.text = f.text[n:]
	if n == 0 {
		return 0, f.err
	}
	return n, nil
}

func TestPutStoresNothingWhenItsSourceFails(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		broken := fault.New("far away", fault.Unavailable, "gone")
		err := s.Put(t.Context(), "k", &failing{strings.Repeat("x", 1<<20), broken})
		wantKind(t, err, fault.Unavailable)
		if !errors.Is(err, broken) {
			t.Errorf("the cause is lost: %v", err)
		}
		_, err = s.Get(t.Context(), "k")
		wantKind(t, err, fault.NotFound)
		if got := keys(t, s, ""); len(got) > 0 {
			t.Errorf("the store holds %q", got)
		}
	})
}

func TestTextsAreStoredOnce(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		a, err := s.PutText(t.Context(), "do it")
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.PutText(t.Context(), "do it")
		if err != nil {
			t.Fatal(err)
		}
		const want = "texts/cf671d4156fe293d41bef0c1ff85dde48a1abde6f15d31dd0774f4bf8a3519b0"
		if a != b || !strings.HasPrefix(a, "texts/") || len(a) != len(want) {
			t.Errorf("keys %q and %q", a, b)
		}
		if got := get(t, s, a); got != "do it" {
			t.Errorf("got %q", got)
		}
		if got := keys(t, s, "texts"); len(got) != 1 {
			t.Errorf("stored %q", got)
		}
		// What a crash of the machine tore is written again.
		if err := s.write(t.Context(), a, strings.NewReader(""), false); err != nil {
			t.Fatal(err)
		}
		if _, err := s.PutText(t.Context(), "do it"); err != nil {
			t.Fatal(err)
		}
		if got := get(t, s, a); got != "do it" {
			t.Errorf("after repair: %q", got)
		}
	})
}

func TestATryLeavesNothing(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		if err := s.Try(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := keys(t, s, ""); len(got) > 0 {
			t.Errorf("the store holds %q", got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantKind(t, s.Try(ctx), fault.Cancelled)
	})
}

func TestDeleteTakesAFolderAndNotItsNeighbour(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		for _, k := range []string{"runs/a/1/x", "runs/a/2/x", "runs/ab/1/x", "texts/t"} {
			if err := s.Put(t.Context(), k, strings.NewReader(k)); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Append(t.Context(), "runs/a/1/log", 0, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"runs/a/1/log", "runs/a/1/x", "runs/a/2/x"}, keys(t, s, "runs/a")); diff != "" {
			t.Error(diff)
		}
		for range 2 {
			if err := s.Delete(t.Context(), "runs/a"); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff([]string{"runs/ab/1/x", "texts/t"}, keys(t, s, "")); diff != "" {
			t.Error(diff)
		}
		if _, err := os.Stat(filepath.Join(s.dir, "runs", "a")); s.dir != "" && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("an empty folder is left: %v", err)
		}
		wantKind(t, s.Delete(t.Context(), ""), fault.Invalid)
	})
}

func TestKeysCannotLeaveTheStore(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		for _, k := range []string{"", "/etc/x", "../x", "a/../../x", "a//b", "a/", ".hidden", "a/.x", "a b", "a\x00b", "ä",
			"x.tmp", "x.attrs", "x.chunks", "x.chunks/00000000/y", `a\b`, strings.Repeat("a/", 500) + "a", strings.Repeat("a", 201)} {
			wantKind(t, s.Put(t.Context(), k, strings.NewReader("x")), fault.Invalid)
			_, err := s.Get(t.Context(), k)
			wantKind(t, err, fault.Invalid)
			wantKind(t, s.Append(t.Context(), k, 0, []byte("x")), fault.Invalid)
			wantKind(t, s.Seal(t.Context(), k), fault.Invalid)
			wantKind(t, s.Delete(t.Context(), k), fault.Invalid)
			_, _, err = s.ReadLog(t.Context(), k, 0)
			wantKind(t, err, fault.Invalid)
		}
		if got := RunKey("sandbox-orch-0a1b2c3d", 12, "transcript.jsonl"); got != "runs/sandbox-orch-0a1b2c3d/12/transcript.jsonl" || checkKey(got) != nil {
			t.Errorf("run key %q", got)
		}
	})
}

func TestOpenTakesAFolderByPathAndByURL(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "store")
	for _, where := range []string{"file://" + dir, "file://localhost" + dir, dir} {
		s, err := Open(t.Context(), where)
		if err != nil {
			t.Fatal(err)
		}
		if s.dir != dir {
			t.Errorf("%s is at %s", where, s.dir)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder is open to others: %v, %v", info.Mode(), err)
	}
	for where, want := range map[string]fault.Kind{
		"gs://bucket": fault.Unsupported, "azblob://c": fault.Unsupported, "mem://": fault.Unsupported,
		"": fault.Invalid, "file://host/x": fault.Invalid, "file:///x?create_dir=1": fault.Invalid,
	} {
		_, err := Open(t.Context(), where)
		if fault.KindOf(err) != want || fault.HintOf(err) == "" {
			t.Errorf("%q: %v of kind %q, hint %q", where, err, fault.KindOf(err), fault.HintOf(err))
		}
	}
}

func TestWhatAKilledWriterLeftIsNotSeenAndGoes(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Put(t.Context(), "runs/a/1/x", strings.NewReader("x")); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(dir, "runs/a/1/y.17b0.tmp")
	fresh := filepath.Join(dir, "runs/a/1/z.17b1.tmp")
	for _, f := range []string{stale, fresh} {
		if err := os.WriteFile(f, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	old := time.Now().Add(-2 * sweepAge)
	for _, f := range []string{stale, filepath.Join(dir, sweptMark)} {
		if err := os.Chtimes(f, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"runs/a/1/x"}, keys(t, s, "")); diff != "" {
		t.Error(diff)
	}
	again, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if diff := cmp.Diff([]string{fresh}, unfinishedFiles(t, s)); diff != "" {
		t.Errorf("after a day: %s", diff)
	}
	if err := s.Delete(t.Context(), "runs/a"); err != nil {
		t.Fatal(err)
	}
	if left := unfinishedFiles(t, s); len(left) > 0 {
		t.Errorf("after Delete: %q", left)
	}
}

func TestManyWritersOfOneKeyLeaveOneWholeObject(t *testing.T) {
	each(t, func(t *testing.T, s *Store) {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				if err := s.Put(t.Context(), "k", bytes.NewReader(bytes.Repeat([]byte{byte('a' + i)}, 100_000))); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		got := get(t, s, "k")
		if len(got) != 100_000 || strings.Trim(got, got[:1]) != "" {
			t.Errorf("%d bytes that start with %q", len(got), got[:1])
		}
	})
}

func TestAFullDiskIsSaidAndLeavesNothing(t *testing.T) {
	dir := smallDisk(t, "1m")
	s, err := Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	err = s.Put(t.Context(), "a/k", bytes.NewReader(make([]byte, 4<<20)))
	wantKind(t, err, fault.Full)
	if fault.HintOf(err) == "" {
		t.Error("no hint")
	}
	if left := unfinishedFiles(t, s); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	if err := s.Put(t.Context(), "a/k", strings.NewReader("small")); err != nil {
		t.Errorf("after that nothing goes any more: %v", err)
	}
}
