package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// shelf is a store that several hosts share.
type shelf struct {
	mu    sync.Mutex
	held  map[string][]byte
	reads int
}

func (h *shelf) open(_ context.Context, key string) (io.ReadCloser, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	b, ok := h.held[key]
	if !ok {
		return nil, fault.New("", fault.NotFound, "no %s", key)
	}
	h.reads++
	return io.NopCloser(bytes.NewReader(b)), nil
}

// host is a worker that reads from the shelf.
func (h *shelf) host(t *testing.T) *Store {
	t.Helper()
	s := newStore(t)
	s.uploads = h.open
	return s
}

// carry uploads what b names, as a command does.
func (h *shelf) carry(t *testing.T, s *Store, b Base) (key string) {
	t.Helper()
	key, err := s.UploadKey(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := s.Carry(t.Context(), b, &out); err != nil {
		t.Fatal(err)
	}
	if h.held == nil {
		h.held = map[string][]byte{}
	}
	h.held[key] = out.Bytes()
	return key
}

func imported(t *testing.T, s *Store, source, key, branch string) Base {
	t.Helper()
	b, err := s.Import(t.Context(), source, key, branch)
	if err != nil {
		t.Fatalf("%v (hint: %s)", err, fault.HintOf(err))
	}
	return b
}

// One host has the folder, one prepares the base, a third collects, and the
// first gets the branch.
func TestAFolderIsWorkedOnByHostsThatCannotSeeIt(t *testing.T) {
	home(t)
	for _, format := range []string{"sha1", "sha256"} {
		t.Run(format, func(t *testing.T) {
			source := filepath.Join(t.TempDir(), "source")
			git(t, "/", "init", "-q", "--object-format="+format, source)
			write(t, filepath.Join(source, "a"), "a\n")
			commit(t, source, "first")
			git(t, source, "branch", "secret")
			git(t, source, "checkout", "-q", "-b", "topic/x")
			write(t, filepath.Join(source, "b"), "b\n")
			tip := commit(t, source, "second")
			git(t, source, "checkout", "-q", "secret")
			write(t, filepath.Join(source, "key"), "hidden\n")
			hidden := commit(t, source, "not asked for")

			mine, h := newStore(t), &shelf{}
			b := resolve(t, mine, source, "topic/x")
			key := h.carry(t, mine, b)
			if _, commit, err := ParseUpload(key); err != nil || commit != tip {
				t.Errorf("key %q: %v", key, err)
			}

			const name = "/home/ada/not/here"
			theirs := h.host(t)
			got := imported(t, theirs, name, key, b.Branch)
			if got.Commit != tip || got.Branch != "topic/x" || got.Source != name {
				t.Errorf("%+v", got)
			}
			work := sandbox(t, theirs, got)
			if _, err := tryGit(work, "cat-file", "-e", hidden); err == nil {
				t.Error("a branch that nobody asked for was carried along")
			}
			write(t, filepath.Join(work, "c"), "c\n")
			made := commit(t, work, "work")
			in := bundled(t, work, got)
			in.Base = Base{Source: name, Upload: key, Commit: tip} // as a plan says it
			for range 2 {                                          // a retry, too
				if r := receive(t, h.host(t), in); r.Delivered || r.Commit != made || r.FilesChanged != 1 {
					t.Errorf("%+v", r)
				}
			}

			in.Base, in.Keep = Base{Source: source, Commit: tip}, true
			if r := receive(t, mine, in); r.Delivered {
				t.Errorf("%+v", r)
			}
			if _, err := tryGit(source, "rev-parse", "--verify", "-q", fork.Branch(run1, 1)); err == nil {
				t.Error("the source that was only to be read has the branch")
			}
			if !strings.Contains(diff(t, mine, DiffOptions{}), "+c") {
				t.Error("the diff lacks the work")
			}
			for range 2 {
				if err := mine.Deliver(t.Context(), run1, 1, source); err != nil {
					t.Fatal(err)
				}
			}
			if id := git(t, source, "rev-parse", fork.Branch(run1, 1)); id != made {
				t.Errorf("the branch is at %s, want %s", id, made)
			}
		})
	}
}

func TestUploadsAreReadOnceAndShareAMirror(t *testing.T) {
	home(t)
	mine, h, source := newStore(t), &shelf{}, repository(t)
	first := h.carry(t, mine, resolve(t, mine, source, ""))
	copied := filepath.Join(t.TempDir(), "elsewhere")
	git(t, "/", "clone", "-q", source, copied)
	if key := h.carry(t, mine, resolve(t, mine, copied, "")); key != first {
		t.Errorf("the same commit of a clone has the key %s, not %s", key, first)
	}
	write(t, filepath.Join(source, "x"), "x\n")
	commit(t, source, "second")
	second := h.carry(t, mine, resolve(t, mine, source, ""))

	worker := h.host(t)
	other := New(Options{Dir: worker.dir, Uploads: h.open}) // as in another process
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for _, key := range []string{first, second} {
				if _, err := []*Store{worker, other}[i%2].Import(t.Context(), fmt.Sprint("/by/", i), key, "main"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if mirrors := glob(t, worker.dir, "mirrors", "*.git"); len(mirrors) != 1 || h.reads != 2 {
		t.Errorf("%d mirrors, %d uploads read", len(mirrors), h.reads)
	}
	git(t, glob(t, worker.dir, "mirrors", "*.git")[0], "fsck", "--strict")

	// What is in the mirror is not asked for again; what is not there is said.
	h.held = nil
	imported(t, worker, source, second, "")
	_, err := h.host(t).Import(t.Context(), source, second, "")
	wantFault(t, err, fault.NotFound)
	_, err = newStore(t).Import(t.Context(), source, second, "")
	if fault.KindOf(err) != fault.Unsupported {
		t.Errorf("a worker without a store: %v", err)
	}
	h.held = map[string][]byte{}
	s := newStore(t)
	s.uploads = func(context.Context, string) (io.ReadCloser, error) {
		return nil, fault.New("", fault.Unavailable, "not now")
	}
	if _, err := s.Import(t.Context(), source, second, ""); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("a store that is not there now: %v", err)
	}
}

func TestADetachedHeadIsUploaded(t *testing.T) {
	home(t)
	mine, h, source := newStore(t), &shelf{}, repository(t)
	git(t, source, "checkout", "-q", "--detach")
	git(t, source, "branch", "-D", "main")
	b := resolve(t, mine, source, "")
	if got := imported(t, h.host(t), source, h.carry(t, mine, b), b.Branch); got.Branch != "HEAD" || got.Commit != b.Commit {
		t.Errorf("%+v", got)
	}
}

// An upload lies in a place where others may write.
func TestHostileUploadsAreRefused(t *testing.T) {
	home(t)
	mine, h, source := newStore(t), &shelf{}, repository(t)
	b := resolve(t, mine, source, "")
	key := h.carry(t, mine, b)
	good := h.held[key]
	body := good[bytes.Index(good, []byte("PACK")):]
	bundle := func(head string, pack []byte) []byte { return append([]byte("# v2 git bundle\n"+head+"\n"), pack...) }
	ref := b.Commit + " refs/heads/base\n"

	evil := blob("[core]\n\tfsmonitor = touch /tmp/pwned\n")
	dir := tree("100644", "config", evil.id())
	root := func(t object) object {
		return object{kind: 1, data: fmt.Appendf(nil, "tree %s\nauthor E <e@x> 1700000000 +0000\ncommitter E <e@x> 1700000000 +0000\n\nx\n", t.id())}
	}
	crafted := func(objects ...object) (string, []byte) {
		id := objects[len(objects)-1].id()
		return Uploads + "/" + id + "/" + id + uploadEnd, bundle(id+" refs/heads/base\n", packed(objects...))
	}
	fine := tree("100644", "ok", evil.id())
	honest, pack := crafted(evil, fine, root(fine))
	h.held[honest] = pack
	imported(t, h.host(t), source, honest, "") // the smith knows his trade

	cases := map[string][]byte{
		"nothing":              {},
		"no bundle":            []byte("hello\n"),
		"a header without end": []byte("# v2 git bundle\n" + ref),
		"no pack":              bundle(ref, nil),
		"half a pack":          good[:len(good)-30],
		"a flipped byte":       append(bytes.Clone(good[:len(good)-40]), append([]byte{good[len(good)-40] ^ 1}, good[len(good)-39:]...)...),
		"another commit":       bundle(strings.Repeat("ab", 20)+" refs/heads/base\n", body),
		"a second ref":         bundle(ref+b.Commit+" refs/heads/main\n", body),
		"no ref":               bundle("", body),
		"something before it":  bundle("-"+strings.Repeat("ab", 20)+"\n"+ref, body),
		"another pack":         bundle(ref, packed(evil, fine, root(fine))),
		"another hash":         append([]byte("# v3 git bundle\n@object-format=sha256\n"+ref+"\n"), body...),
		"a filter":             append([]byte("# v3 git bundle\n@filter=blob:none\n"+ref+"\n"), body...),
	}
	keys := map[string]string{}
	for name, objects := range map[string][]object{
		"a .git folder":         {evil, dir, tree("40000", ".git", dir.id())},
		"a .git in Unicode":     {evil, dir, tree("40000", ".g\u200cit", dir.id())},
		"dot dot":               {evil, dir, tree("40000", "..", dir.id())},
		"a slash in a name":     {evil, tree("100644", "../../x", evil.id())},
		"the same name twice":   {evil, tree("100644", "a", evil.id(), "100644", "a", evil.id())},
		"a missing blob":        {tree("100644", "a", strings.Repeat("ab", 20))},
		"a missing tree":        {tree("40000", "a", strings.Repeat("ab", 20))},
		"a tree as blob":        {evil, dir, tree("100644", "a", dir.id())},
		"a torn tree":           {{kind: 2, data: []byte("100644 a\x00short")}},
		"a submodule that runs": {},
	} {
		if name == "a submodule that runs" {
			m := blob("[submodule \"x\"]\n\tpath = x\n\turl = https://host/x\n\tupdate = !touch /tmp/pwned\n")
			objects = []object{m, tree("100644", ".gitmodules", m.id())}
		}
		keys[name], cases[name] = crafted(append(objects, root(objects[len(objects)-1]))...)
	}
	missing := commitOf(fine, strings.Repeat("ab", 20))
	keys["a missing parent"], cases["a missing parent"] = crafted(evil, fine, missing)
	keys["a blob as the commit"], cases["a blob as the commit"] = crafted(evil)

	// The mirror that all share keeps working, and gets nothing of it.
	shared := h.host(t)
	imported(t, shared, source, key, "")
	for name, data := range cases {
		t.Run(name, func(t *testing.T) {
			at := key
			if keys[name] != "" {
				at = keys[name]
			}
			_, commit, _ := ParseUpload(at)
			evil := &shelf{held: map[string][]byte{at: data}}
			s := evil.host(t)
			for range 2 {
				got, err := s.Import(t.Context(), source, at, "")
				wantFault(t, err, fault.Invalid)
				if err == nil {
					t.Fatalf("taken: %+v", got)
				}
			}
			for _, mirror := range glob(t, s.dir, "mirrors", "*.git") {
				if refs := git(t, mirror, "for-each-ref"); refs != "" {
					t.Errorf("refs stayed: %s", refs)
				}
				if packs := glob(t, mirror, "objects", "pack", "*.pack"); len(packs) > 0 {
					t.Errorf("objects stayed: %v", packs)
				}
			}
			if err := mine.Bundle(t.Context(), Base{Source: source, Upload: at, Commit: commit}, io.Discard); err == nil && at != key {
				t.Error("a worker without it has it")
			}
		})
	}
	imported(t, shared, source, key, "")
}

func TestKeysOfUploadsAreTakenApartWithCare(t *testing.T) {
	home(t)
	a, b := strings.Repeat("a", 40), strings.Repeat("b", 40)
	if root, commit, err := ParseUpload("sources/" + a + "/" + b + ".bundle"); err != nil || root != a || commit != b {
		t.Error(root, commit, err)
	}
	s := (&shelf{}).host(t)
	for _, key := range []string{
		"x", "sources", "sources/", "sources/" + a + ".bundle", "sources/" + a + "/" + b, "runs/" + a + "/" + b + ".bundle",
		"sources/../" + b + ".bundle", "sources/" + a + "/" + b + "/c.bundle", "sources/" + a + "/" + strings.Repeat("b", 64) + ".bundle",
		"sources/" + strings.ToUpper(a) + "/" + b + ".bundle", "sources/" + a + "/--help.bundle", strings.Repeat("sources/", 1000),
	} {
		if _, _, err := ParseUpload(key); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%q: %v", cut(key, 80), err)
		}
		if _, err := s.Import(t.Context(), "/x", key, ""); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%q: %v", cut(key, 80), err)
		}
	}
	key := "sources/" + a + "/" + b + ".bundle"
	if err := s.Bundle(t.Context(), Base{Source: "/x", Upload: key, Commit: a}, io.Discard); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a commit that the key does not name: %v", err)
	}
	if _, err := s.Import(t.Context(), "/x", key, "-x"); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a branch that is none: %v", err)
	}
}

func TestAnUploadHasABearableSize(t *testing.T) {
	home(t)
	source := repository(t)
	noise := make([]byte, 64<<10)
	for i := range noise {
		noise[i] = byte(i*i>>3 ^ i*7919>>5)
	}
	write(t, filepath.Join(source, "noise"), string(noise))
	commit(t, source, "large")
	mine, h := newStore(t), &shelf{}
	b := resolve(t, mine, source, "")
	key := h.carry(t, mine, b)

	tight := h.host(t)
	tight.maxBundle = 1 << 10
	_, err := tight.Import(t.Context(), source, key, "")
	wantFault(t, err, fault.Invalid)
	mine.maxBundle = 1 << 10
	var out bytes.Buffer
	err = mine.Carry(t.Context(), b, &out)
	wantFault(t, err, fault.Invalid)
	if err == nil || !strings.Contains(err.Error(), source) || out.Len() > 1<<10 {
		t.Errorf("%v, after %d bytes", err, out.Len())
	}
	mine.maxBundle = defaultMaxBundle
	full := errors.New("the store is full")
	if err := mine.Carry(t.Context(), b, failing{full}); !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestABranchIsNotDeliveredIntoAnotherRepository(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	b := resolve(t, s, source, "")
	work := sandbox(t, s, b)
	write(t, filepath.Join(work, "x"), "x\n")
	commit(t, work, "work")
	in := bundled(t, work, b)
	in.Keep = true
	got := receive(t, s, in)

	other := filepath.Join(t.TempDir(), "other")
	git(t, "/", "init", "-q", other)
	write(t, filepath.Join(other, "y"), "y\n")
	commit(t, other, "unrelated")
	before := snapshot(t, other, func(string) bool { return false })
	wantFault(t, s.Deliver(t.Context(), run1, 1, other), fault.NotFound)
	wantFault(t, s.Deliver(t.Context(), run1, 1, "https://example.invalid/x"), fault.Invalid)
	wantFault(t, s.Deliver(t.Context(), run1, 2, source), fault.NotFound)
	if d := cmp.Diff(before, snapshot(t, other, func(string) bool { return false })); d != "" {
		t.Errorf("changed: %s", d)
	}
	if there, err := s.Knows(t.Context(), other, b.Commit); there || err != nil {
		t.Error(there, err)
	}
	if there, err := s.Knows(t.Context(), source, b.Commit); !there || err != nil {
		t.Error(there, err)
	}
	if s.Mirrors(t.Context(), other, b.Commit) || !s.Mirrors(t.Context(), source, b.Commit) || s.Mirrors(t.Context(), source, got.Commit) ||
		s.Mirrors(t.Context(), filepath.Join(source, "nowhere"), b.Commit) || newStore(t).Mirrors(t.Context(), source, b.Commit) {
		t.Error("it is not known what was taken from where")
	}
	for num, want := range map[int]bool{1: true, 2: false} {
		if has, err := s.Has(t.Context(), run1, num, got.Commit); has != want || err != nil {
			t.Errorf("%d: %v, %v", num, has, err)
		}
	}
	if has, err := s.Has(t.Context(), run1, 1, b.Commit); has || err != nil {
		t.Errorf("another commit: %v, %v", has, err)
	}
}

func TestAMirrorOfUploadsWithHolesIsFilledFromTheStore(t *testing.T) {
	home(t)
	mine, h, source := newStore(t), &shelf{}, repository(t)
	first := h.carry(t, mine, resolve(t, mine, source, ""))
	write(t, filepath.Join(source, "next"), "x\n")
	commit(t, source, "next")
	second := h.carry(t, mine, resolve(t, mine, source, ""))
	s := h.host(t)
	holes := glob(t, imported(t, s, source, first, "").Mirror, "objects", "pack", "*.pack")
	b := imported(t, s, source, second, "")
	for _, p := range append(holes, glob(t, b.Mirror, "objects", "pack", "*.pack")...) {
		if err := os.Remove(p); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	sandbox(t, s, b)
	sandbox(t, s, imported(t, s, source, first, ""))
	if h.reads != 3 { // the second holds the first, too
		t.Errorf("%d uploads read", h.reads)
	}
}

func TestAnUploadThatIsCutShortDoesNoHarm(t *testing.T) {
	home(t)
	mine, h, source := newStore(t), &shelf{}, repository(t)
	key := h.carry(t, mine, resolve(t, mine, source, ""))
	s := h.host(t)
	ctx, cancel := context.WithCancel(t.Context())
	s.uploads = func(context.Context, string) (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			_, _ = w.Write(h.held[key][:100])
			cancel()
			w.CloseWithError(context.Canceled)
		}()
		return r, nil
	}
	if _, err := s.Import(ctx, source, key, ""); fault.KindOf(err) != fault.Cancelled {
		t.Errorf("%v", err)
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "tmp", "left"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(s.dir, "tmp", "left.lock"), "")
	s.uploads = h.open
	imported(t, s, source, key, "")
}
