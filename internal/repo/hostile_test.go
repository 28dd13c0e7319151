package repo

import (
	"bytes"
	"compress/zlib"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// victim is a store with a base, and a fork's honest bundle to spoil.
func victim(t *testing.T) (s *Store, in ReceiveInput, work string) {
	t.Helper()
	home(t)
	s = newStore(t)
	b := resolve(t, s, repository(t), "")
	work = sandbox(t, s, b)
	write(t, filepath.Join(work, "x"), strings.Repeat("x\n", 100))
	commit(t, work, "work")
	return s, bundled(t, work, b), work
}

// refuses checks that a bundle is refused as Invalid and that nothing of it
// stays, in the store or in the source.
func refuses(t *testing.T, s *Store, in ReceiveInput) {
	t.Helper()
	before := everything(t, s)
	got, err := s.Receive(t.Context(), in)
	wantFault(t, err, fault.Invalid)
	if err == nil {
		t.Errorf("taken: %+v", got)
	}
	if d := cmp.Diff(before, everything(t, s)); d != "" && len(before) > 0 {
		t.Errorf("something stayed: %s", d)
	}
	if _, err := tryGit(in.Base.Source, "rev-parse", "--verify", "-q", fork.Branch(in.Run, in.Num)); err == nil {
		t.Error("the source has the branch")
	}
}

// everything lists the files of the run's repository.
func everything(t *testing.T, s *Store) []string {
	t.Helper()
	var out []string
	if _, err := os.Stat(s.runDir(run1)); err != nil {
		return nil
	}
	for path := range snapshot(t, s.runDir(run1), func(string) bool { return false }) {
		out = append(out, path)
	}
	return sorted(out)
}

func sorted(s []string) []string {
	for i := range s {
		for j := i; j > 0 && s[j] < s[j-1]; j-- {
			s[j], s[j-1] = s[j-1], s[j]
		}
	}
	return s
}

func TestDamagedBundlesAreRefused(t *testing.T) {
	s, in, work := victim(t)
	good, err := os.ReadFile(in.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	// An honest fork came first, so that the run's repository is there.
	other := in
	other.Num = 2
	receive(t, s, other)

	head := git(t, work, "rev-parse", "HEAD")
	packed := good[bytes.Index(good, []byte("PACK")):]
	flipped := bytes.Clone(good)
	flipped[len(flipped)-40] ^= 0xff
	base := in.Base.Commit
	header := func(lines ...string) []byte {
		return append([]byte(strings.Join(lines, "\n")+"\n\n"), packed...)
	}
	ref := head + " refs/heads/fork"
	zero := strings.Repeat("0", 40)
	for name, b := range map[string][]byte{
		"nothing":             {},
		"garbage":             []byte("garbage"),
		"zeros":               make([]byte, 4096),
		"other version":       header("# v4 git bundle", "-"+base, ref),
		"header only":         []byte("# v2 git bundle\n-" + base + "\n" + ref + "\n\n"),
		"no end of header":    []byte("# v2 git bundle\n-" + base + "\n" + ref + "\n"),
		"truncated":           good[:len(good)-30],
		"half":                good[:len(good)/2],
		"flipped":             flipped,
		"more than a pack":    append(bytes.Clone(good), "PACK and more"...),
		"wrong prerequisite":  header("# v2 git bundle", "-"+strings.Repeat("12", 20)+" x", ref),
		"zero prerequisite":   header("# v2 git bundle", "-"+zero, ref),
		"own prerequisite":    header("# v2 git bundle", "-"+head, ref),
		"blob prerequisite":   header("# v2 git bundle", "-"+git(t, work, "rev-parse", in.Base.Commit+":README"), ref),
		"odd prerequisite":    header("# v2 git bundle", "---all", ref),
		"late prerequisite":   header("# v2 git bundle", ref, "-"+base),
		"extra ref":           header("# v2 git bundle", "-"+base, ref, head+" refs/heads/main"),
		"extra HEAD":          header("# v2 git bundle", "-"+base, head+" HEAD", ref),
		"same ref twice":      header("# v2 git bundle", "-"+base, ref, base+" refs/heads/fork"),
		"other ref":           header("# v2 git bundle", "-"+base, head+" refs/heads/other"),
		"no ref":              header("# v2 git bundle", "-"+base),
		"ref to nothing":      header("# v2 git bundle", "-"+base, strings.Repeat("ab", 20)+" refs/heads/fork"),
		"ref to zero":         header("# v2 git bundle", "-"+base, zero+" refs/heads/fork"),
		"ref to a tree":       header("# v2 git bundle", "-"+base, git(t, work, "rev-parse", "HEAD^{tree}")+" refs/heads/fork"),
		"ref to a blob":       header("# v2 git bundle", "-"+base, git(t, work, "rev-parse", "HEAD:x")+" refs/heads/fork"),
		"short id":            header("# v2 git bundle", "-"+base, head[:39]+" refs/heads/fork"),
		"capability in v2":    header("# v2 git bundle", "@filter=blob:none", "-"+base, ref),
		"filtered":            header("# v3 git bundle", "@object-format=sha1", "@filter=blob:none", "-"+base, ref),
		"unknown capability":  header("# v3 git bundle", "@core.hooksPath=/tmp", "-"+base, ref),
		"other hash":          header("# v3 git bundle", "@object-format=sha256", ref),
		"endless header line": append([]byte("# v2 git bundle\n-"+base+" "), bytes.Repeat([]byte("x"), 2<<20)...),
		"endless header":      bytes.Repeat([]byte("# v2 git bundle\n"), 200_000),
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(in.Bundle, b, 0o600); err != nil {
				t.Fatal(err)
			}
			refuses(t, s, in)
		})
	}
	if err := os.WriteFile(in.Bundle, good, 0o600); err != nil {
		t.Fatal(err)
	}
	receive(t, s, in) // the honest one is still welcome
}

func TestABundleMustBeAPlainFileOfABearableSize(t *testing.T) {
	s, in, _ := victim(t)
	dir := t.TempDir()
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := os.Symlink(in.Bundle, link); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, fifo, dir} {
		bad := in
		bad.Bundle = path
		refuses(t, s, bad)
	}
	s.maxBundle = 200
	refuses(t, s, in)
	s.maxBundle = defaultMaxBundle
	bad := in
	bad.Bundle = filepath.Join(dir, "nothing")
	if _, err := s.Receive(t.Context(), bad); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
}

func TestReceiveRefusesOddNames(t *testing.T) {
	s, in, _ := victim(t)
	for _, change := range []func(*ReceiveInput){
		func(in *ReceiveInput) { in.Run = "../up" },
		func(in *ReceiveInput) { in.Run = "a/b" },
		func(in *ReceiveInput) { in.Run = "" },
		func(in *ReceiveInput) { in.Run = "-x" },
		func(in *ReceiveInput) { in.Run = "a..b" },
		func(in *ReceiveInput) { in.Run = "x.lock" },
		func(in *ReceiveInput) { in.Num = 0 },
		func(in *ReceiveInput) { in.Num = -1 },
		func(in *ReceiveInput) { in.Ref = "HEAD" },
		func(in *ReceiveInput) { in.Ref = "--all" },
		func(in *ReceiveInput) { in.Ref = "refs/heads/../x" },
		func(in *ReceiveInput) { in.Base.Commit = "HEAD" },
		func(in *ReceiveInput) { in.Base.Commit = in.Base.Commit[:10] },
		func(in *ReceiveInput) { in.Base.Commit = "--all" },
	} {
		bad := in
		change(&bad)
		if _, err := s.Receive(t.Context(), bad); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// object is one entry of a pack that no git would write.
type object struct {
	kind  int // 1 commit, 2 tree, 3 blob
	data  []byte
	claim int // the size that the pack says; 0: the true one
}

func (o object) id() string {
	h := sha1.New()
	fmt.Fprintf(h, "%s %d\x00", [...]string{"", "commit", "tree", "blob"}[o.kind], len(o.data))
	h.Write(o.data)
	return hex.EncodeToString(h.Sum(nil))
}

func blob(text string) object { return object{kind: 3, data: []byte(text)} }

// tree takes mode, name and id in turn.
func tree(entries ...string) object {
	var b bytes.Buffer
	for i := 0; i < len(entries); i += 3 {
		raw, _ := hex.DecodeString(entries[i+2])
		fmt.Fprintf(&b, "%s %s\x00%s", entries[i], entries[i+1], raw)
	}
	return object{kind: 2, data: b.Bytes()}
}

func commitOf(tree object, parent string) object {
	return object{kind: 1, data: fmt.Appendf(nil, "tree %s\nparent %s\nauthor E <e@x> 1700000000 +0000\ncommitter E <e@x> 1700000000 +0000\n\nevil\n", tree.id(), parent)}
}

// craft writes a bundle of these objects; the last is the commit.
func craft(t *testing.T, in ReceiveInput, objects ...object) ReceiveInput {
	t.Helper()
	head := fmt.Sprintf("# v2 git bundle\n-%s\n%s %s\n\n", in.Base.Commit, objects[len(objects)-1].id(), in.Ref)
	in.Bundle = filepath.Join(t.TempDir(), "crafted.bundle")
	if err := os.WriteFile(in.Bundle, append([]byte(head), packed(objects...)...), 0o600); err != nil {
		t.Fatal(err)
	}
	return in
}

// packed is a pack of these objects, as no git would write it.
func packed(objects ...object) []byte {
	var b bytes.Buffer
	b.WriteString("PACK")
	_ = binary.Write(&b, binary.BigEndian, []uint32{2, uint32(len(objects))})
	for _, o := range objects {
		size := max(len(o.data), o.claim)
		c := byte(o.kind<<4 | size&15)
		for size >>= 4; size > 0; size >>= 7 {
			b.WriteByte(c | 0x80)
			c = byte(size & 0x7f)
		}
		b.WriteByte(c)
		z := zlib.NewWriter(&b)
		_, _ = z.Write(o.data)
		_ = z.Close()
	}
	sum := sha1.Sum(b.Bytes())
	b.Write(sum[:])
	return b.Bytes()
}

func TestCraftedObjectsAreRefused(t *testing.T) {
	s, in, _ := victim(t)
	other := in
	other.Num = 2
	receive(t, s, other)
	base := in.Base.Commit
	evil := blob("[core]\n\tfsmonitor = touch /tmp/pwned\n")
	dir := tree("100644", "config", evil.id())

	fine := tree("100644", "ok", evil.id())
	honest := craft(t, in, evil, fine, commitOf(fine, base))
	honest.Num = 3
	receive(t, s, honest) // the smith knows his trade

	plain := func(t object) []object { return []object{evil, dir, t, commitOf(t, base)} }
	modules := func(text string) []object {
		m := blob(text)
		t := tree("100644", ".gitmodules", m.id())
		return []object{m, t, commitOf(t, base)}
	}
	link := blob(".git/config")
	linked := tree("120000", ".gitmodules", link.id())
	missing := strings.Repeat("ab", 20)
	for name, objects := range map[string][]object{
		"a .git folder":           plain(tree("40000", ".git", dir.id())),
		"a .GIT folder":           plain(tree("40000", ".GIT", dir.id())),
		"git~1":                   plain(tree("40000", "git~1", dir.id())),
		".git in Unicode":         plain(tree("40000", ".g\u200cit", dir.id())),
		"dot dot":                 plain(tree("40000", "..", dir.id())),
		"dot":                     plain(tree("40000", ".", dir.id())),
		"a slash in a name":       plain(tree("100644", "../../x", evil.id())),
		"an empty name":           plain(tree("100644", "", evil.id())),
		"the same name twice":     plain(tree("100644", "a", evil.id(), "100644", "a", evil.id())),
		"wrong order":             plain(tree("100644", "b", evil.id(), "100644", "a", evil.id())),
		"an odd mode":             plain(tree("777", "a", evil.id())),
		"a missing blob":          plain(tree("100644", "a", missing)),
		"a missing tree":          plain(tree("40000", "a", missing)),
		"a zero id":               plain(tree("100644", "a", strings.Repeat("0", 40))),
		"a blob as tree":          plain(tree("40000", "a", evil.id())),
		"a tree as blob":          plain(tree("100644", "a", dir.id())),
		"a torn tree":             plain(object{kind: 2, data: []byte("100644 a\x00short")}),
		"a missing parent":        {evil, fine, commitOf(fine, missing)},
		"a blob as parent":        {evil, fine, commitOf(fine, evil.id())},
		"a commit without a tree": {evil, object{kind: 1, data: []byte("parent " + base + "\n\nx")}},
		"a blob as its tree":      {evil, commitOf(evil, base)},
		"submodule url option":    modules("[submodule \"x\"]\n\tpath = x\n\turl = --upload-pack=touch /tmp/pwned\n"),
		"submodule path option":   modules("[submodule \"x\"]\n\tpath = -x\n\turl = https://host/x\n"),
		"submodule update":        modules("[submodule \"x\"]\n\tpath = x\n\turl = https://host/x\n\tupdate = !touch /tmp/pwned\n"),
		"submodule name":          modules("[submodule \"../../.git/modules\"]\n\tpath = x\n\turl = https://host/x\n"),
		"linked .gitmodules":      {link, linked, commitOf(linked, base)},
	} {
		t.Run(name, func(t *testing.T) { refuses(t, s, craft(t, in, objects...)) })
	}
}

// A few hundred bytes of pack can stand for more files or bytes than any
// machine has.
func TestBombsAreRefusedInBoundedTime(t *testing.T) {
	s, in, _ := victim(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	leaf := blob("x")
	objects := []object{leaf}
	mode, id := "100644", leaf.id()
	for range 12 { // ten to the twelfth files
		var entries []string
		for i := range 10 {
			entries = append(entries, mode, fmt.Sprintf("f%d", i), id)
		}
		level := tree(entries...)
		objects = append(objects, level)
		mode, id = "40000", level.id()
	}
	top := objects[len(objects)-1]
	bomb := craft(t, in, append(objects, commitOf(top, in.Base.Commit))...)
	_, err := s.Receive(ctx, bomb)
	wantFault(t, err, fault.Invalid)
	if err == nil || !strings.Contains(err.Error(), "2000000 files") {
		t.Errorf("it was not the number of files that was refused: %v", err)
	}

	// A tree that says it has two gigabytes is refused before there is room
	// made for it.
	_, err = s.Receive(ctx, craft(t, in, object{kind: 2, data: []byte("x"), claim: 2 << 30}, commitOf(leaf, in.Base.Commit)))
	wantFault(t, err, fault.Invalid)
	if err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("no limit was met: %v", err)
	}
}

func TestReceiveAcceptsWhatAnHonestAgentMayDo(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	root := git(t, source, "rev-parse", "HEAD")
	write(t, filepath.Join(source, "a"), "a\n")
	commit(t, source, "second")
	b := resolve(t, s, source, "")

	// It goes back before the base, merges, and begins a history of its own.
	work := sandbox(t, s, b)
	git(t, work, "checkout", "-q", "-b", "side", root)
	write(t, filepath.Join(work, "side"), "side\n")
	commit(t, work, "before the base")
	in := bundled(t, work, b)
	got := receive(t, s, in)
	if got.FilesChanged != 2 || got.Insertions != 1 || got.Deletions != 1 {
		t.Errorf("from an older commit: %+v", got)
	}
	git(t, work, "merge", "-q", "--no-edit", b.Commit)
	in = bundled(t, work, b)
	if got = receive(t, s, in); got.FilesChanged != 1 {
		t.Errorf("merged: %+v", got)
	}
	git(t, work, "checkout", "-q", "--orphan", "fresh")
	commit(t, work, "alone")
	in = bundled(t, work, b)
	if got = receive(t, s, in); got.FilesChanged != 1 {
		t.Errorf("orphan: %+v", got)
	}
	// The branch was replaced each time, in the source too.
	if id := git(t, source, "rev-parse", got.Branch); id != got.Commit {
		t.Errorf("the source has %s, want %s", id, got.Commit)
	}
	git(t, s.runDir(run1), "fsck", "--strict")
}

// A worker on another host, or one whose state was lost, gets the base anew.
func TestReceiveOnAWorkerThatNeverSawTheRepository(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	b := resolve(t, s, source, "")
	work := sandbox(t, s, b)
	write(t, filepath.Join(work, "x"), "x\n")
	commit(t, work, "work")
	in := bundled(t, work, b)
	write(t, filepath.Join(source, "later"), "later\n")
	commit(t, source, "later")

	server := serve(t, filepath.Dir(source), false)
	for _, where := range []string{source, server.URL + "/source"} {
		in.Base = Base{Source: where, Commit: b.Commit}
		receive(t, newStore(t), in)
	}
	git(t, source, "checkout", "-q", "--orphan", "else")
	commit(t, source, "else")
	git(t, source, "branch", "-D", "main")
	git(t, source, "update-ref", "-d", "refs/heads/"+fork.Branch(run1, 1))
	git(t, source, "reflog", "expire", "--expire=now", "--all")
	git(t, source, "gc", "-q", "--prune=now")
	for _, where := range []string{source, server.URL + "/source"} {
		in.Base = Base{Source: where, Commit: b.Commit}
		_, err := newStore(t).Receive(t.Context(), in)
		wantFault(t, err, fault.NotFound)
	}
	// The worker that has the base does not need the source any more.
	in.Base = b
	receive(t, s, in)
	if err := os.RemoveAll(source); err != nil {
		t.Fatal(err)
	}
	got, err := s.Receive(t.Context(), in)
	if err != nil || got.Delivered || fault.KindOf(got.Undelivered) != fault.NotFound {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestNothingOfAForkRunsOnTheWorker(t *testing.T) {
	dir := home(t)
	s, source := newStore(t), repository(t)
	ran := filepath.Join(dir, "ran")
	// Drivers that the user has, for attributes that the fork writes.
	config := filepath.Join(dir, ".gitconfig")
	for _, key := range []string{"diff.evil.textconv", "diff.evil.command", "merge.evil.driver", "diff.external", "core.pager", "core.fsmonitor", "filter.evil.smudge", "filter.evil.process"} {
		git(t, "/", "config", "--file", config, key, "touch '"+ran+"'; cat")
	}
	hooks := filepath.Join(dir, "hooks")
	for _, h := range []string{"reference-transaction", "post-checkout", "post-update", "update", "pre-receive", "post-merge", "post-index-change", "pre-auto-gc"} {
		write(t, filepath.Join(hooks, h), "#!/bin/sh\ntouch '"+ran+"'\n")
		if err := os.Chmod(filepath.Join(hooks, h), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := resolve(t, s, source, "")
	work := sandbox(t, s, b)
	write(t, filepath.Join(work, ".gitattributes"), "* diff=evil merge=evil\n")
	write(t, filepath.Join(work, "README"), "changed\n")
	cmd := exec.Command("git", "-c", "diff.external=", "commit", "-q", "-a", "-m", "x")
	cmd.Dir = work
	git(t, work, "add", "-A")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	in := bundled(t, work, b)
	git(t, "/", "config", "--file", config, "core.hooksPath", hooks)
	if err := os.RemoveAll(ran); err != nil {
		t.Fatal(err)
	}
	receive(t, s, in)
	for _, o := range []DiffOptions{{}, {Stat: true}, {Binary: true}} {
		diff(t, s, o)
	}
	if _, err := s.Apply(t.Context(), run1, 1, source); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("a program of the fork's choice ran")
	}
}

func FuzzBundleHeaders(f *testing.F) {
	id := strings.Repeat("ab", 20)
	f.Add([]byte("# v2 git bundle\n-" + id + " x\n" + id + " refs/heads/a\n\nPACK"))
	f.Add([]byte("# v3 git bundle\n@object-format=sha256\n" + id + id[:24] + " refs/heads/a\n\nPACK"))
	f.Add([]byte("# v3 git bundle\n@filter=x\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHeader(bytes.NewReader(b))
		if err != nil {
			return
		}
		if h.size > int64(len(b)) || !bytes.HasSuffix(b[:h.size], []byte("\n\n")) && h.size > 17 {
			t.Errorf("the pack begins at %d of %q", h.size, b)
		}
		for _, id := range h.requires {
			if checkCommit(id) != nil || objectFormat(id) != h.format {
				t.Errorf("builds on %q", id)
			}
		}
		for _, id := range h.refs {
			if checkCommit(id) != nil || objectFormat(id) != h.format {
				t.Errorf("names %q", id)
			}
		}
	})
}

func FuzzNumstat(f *testing.F) {
	f.Add([]byte("1\t2\ta\x00-\t-\tb\x003\t4\t\x00old\x00new\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		_ = readNumstat(bytes.NewReader(b), func(c change) {
			n++
			if len(c.path) > maxPath {
				t.Errorf("a path of %d bytes", len(c.path))
			}
		})
		if most := bytes.Count(b, []byte{0}) + 1; n > most {
			t.Errorf("%d files from %d fields", n, most)
		}
	})
}
