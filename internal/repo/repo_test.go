package repo

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const run1 = "sandbox-orch-0a1b2c3d"

// home gives git a user's configuration of our own.
func home(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "GIT_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	t.Setenv("HOME", dir)
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(dir, ".config"))
	t.Setenv("GIT_CONFIG_NOSYSTEM", "1")
	write(t, filepath.Join(dir, ".gitconfig"), "[user]\n\tname = Ada\n\temail = ada@example.org\n[init]\n\tdefaultBranch = main\n[gc]\n\tauto = 0\n")
	return dir
}

func newStore(t *testing.T) *Store {
	t.Helper()
	s := New(Options{Dir: filepath.Join(t.TempDir(), "state")})
	t.Cleanup(func() {
		left, _ := os.ReadDir(filepath.Join(s.dir, "tmp"))
		for _, e := range left {
			t.Errorf("work in progress is left: %s", e.Name())
		}
	})
	return s
}

// git runs the real thing for a test and returns its output without the last
// line break.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out, err := tryGit(dir, args...)
	if err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return out
}

func tryGit(dir string, args ...string) (string, error) {
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return strings.TrimSuffix(string(out), "\n"), err
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// repository makes one with a commit on main.
func repository(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "source")
	git(t, "/", "init", "-q", dir)
	write(t, filepath.Join(dir, "README"), "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n")
	commit(t, dir, "first")
	return dir
}

func commit(t *testing.T, dir, message string) string {
	t.Helper()
	git(t, dir, "add", "-A")
	git(t, dir, "commit", "-q", "--allow-empty", "-m", message)
	return git(t, dir, "rev-parse", "HEAD")
}

func resolve(t *testing.T, s *Store, source, branch string) Base {
	t.Helper()
	b, err := s.Resolve(t.Context(), source, branch)
	if err != nil {
		t.Fatalf("resolve %s: %v (hint: %s)", source, err, fault.HintOf(err))
	}
	return b
}

// sandbox is what a fork starts with: a clone of the base's bundle.
func sandbox(t *testing.T, s *Store, b Base) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "base.bundle")
	var out bytes.Buffer
	if err := s.Bundle(t.Context(), b, &out); err != nil {
		t.Fatal(err)
	}
	write(t, file, out.String())
	work := filepath.Join(dir, "work")
	git(t, "/", "clone", "-q", "-b", strings.TrimPrefix(b.Ref(), "refs/heads/"), file, work)
	if head := git(t, work, "rev-parse", "HEAD"); head != b.Commit {
		t.Fatalf("the bundle gives %s, want %s", head, b.Commit)
	}
	return work
}

// bundled makes the bundle that a fork hands back.
func bundled(t *testing.T, work string, b Base) ReceiveInput {
	t.Helper()
	file := filepath.Join(t.TempDir(), "fork.bundle")
	git(t, work, "update-ref", "refs/heads/fork", "HEAD")
	git(t, work, "bundle", "create", "-q", file, b.Commit+"..refs/heads/fork")
	return ReceiveInput{Run: run1, Num: 1, Base: b, Ref: "refs/heads/fork", Bundle: file}
}

func receive(t *testing.T, s *Store, in ReceiveInput) Received {
	t.Helper()
	got, err := s.Receive(t.Context(), in)
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	if got.Undelivered != nil {
		t.Fatalf("not delivered: %v", got.Undelivered)
	}
	return got
}

// madeFork lets a fork change something and takes in what it did.
func madeFork(t *testing.T, s *Store, b Base, change func(work string)) (ReceiveInput, Received) {
	t.Helper()
	work := sandbox(t, s, b)
	change(work)
	commit(t, work, "work of the fork")
	in := bundled(t, work, b)
	return in, receive(t, s, in)
}

func diff(t *testing.T, s *Store, o DiffOptions) string {
	t.Helper()
	var out bytes.Buffer
	if err := s.Diff(t.Context(), run1, 1, &out, o); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func wantFault(t *testing.T, err error, kind fault.Kind) {
	t.Helper()
	if fault.KindOf(err) != kind {
		t.Errorf("%v is of kind %q, want %q", err, fault.KindOf(err), kind)
	}
	if err != nil && kind != fault.Cancelled && kind != fault.Conflict && fault.HintOf(err) == "" {
		t.Errorf("%v has no hint", err)
	}
}

// snapshot reads every file under dir, except what skip says.
func snapshot(t *testing.T, dir string, skip func(rel string) bool) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if err != nil || skip(rel) || d.IsDir() {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			out[rel], err = os.Readlink(path)
			return err
		}
		b, err := os.ReadFile(path)
		out[rel] = info.Mode().String() + " " + string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAForkComesBackAsABranch(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	b := resolve(t, s, source, "")
	if b.Branch != "main" || b.Commit != git(t, source, "rev-parse", "HEAD") {
		t.Errorf("base %+v", b)
	}
	in, got := madeFork(t, s, b, func(work string) {
		write(t, filepath.Join(work, "README"), "one\ntwo\nTHREE\nfour\nfive\nsix\nseven\neight\nnine\nten\nmore\n")
		write(t, filepath.Join(work, "new"), "a\nb\n")
	})
	want := Received{Branch: "sandbox/" + run1 + "/1", Commit: got.Commit, FilesChanged: 2, Insertions: 4, Deletions: 1, Delivered: true}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if again := receive(t, s, in); again != got {
		t.Errorf("a second time: %+v, want %+v", again, got)
	}
	if id := git(t, source, "rev-parse", got.Branch); id != got.Commit {
		t.Errorf("the source has %s, want %s", id, got.Commit)
	}
	if d := diff(t, s, DiffOptions{}); !strings.Contains(d, "-three\n+THREE\n") || !strings.Contains(d, "+++ b/new\n") {
		t.Errorf("diff:\n%s", d)
	}
	if d := diff(t, s, DiffOptions{Stat: true}); !strings.Contains(d, " 2 files changed, 4 insertions(+), 1 deletion(-)\n") {
		t.Errorf("stat:\n%s", d)
	}
	if d := diff(t, s, DiffOptions{Color: true}); !strings.Contains(d, "\x1b[32m+") {
		t.Errorf("color: %q", d)
	}
}

// Everything that a tree can hold goes there and back unharmed.
func TestOddFilesGoThereAndBack(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	binary := strings.Repeat("\x00\x01\xff\xfe binary \x80", 500)
	odd := func(dir, suffix string) {
		for _, name := range []string{"-rf", "--upload-pack=x", "new\nline", `quo"te's`, "tab\there", "snow☃man", "latin\xe9", " lead and trail ",
			"back\\slash", "*?[x]", ":(top)magic", "deep/er/than/that", "HEAD", "refs/heads/main", "config"} {
			write(t, filepath.Join(dir, name+suffix), "text of "+name+suffix+"\n")
		}
		write(t, filepath.Join(dir, "binary"+suffix), binary+suffix)
		write(t, filepath.Join(dir, "empty"+suffix), "")
		write(t, filepath.Join(dir, "crlf"+suffix), "one\r\ntwo\r\n")
		write(t, filepath.Join(dir, "no-newline"+suffix), "no end")
		write(t, filepath.Join(dir, "run.sh"+suffix), "#!/bin/sh\n")
		if err := os.Chmod(filepath.Join(dir, "run.sh"+suffix), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, ".gitattributes"), "*.lfs filter=lfs diff=lfs merge=lfs -text\nbinary* diff=evil\n*.txt ident\n")
		write(t, filepath.Join(dir, "big"+suffix+".lfs"), "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")
		for name, to := range map[string]string{"out": "/etc/passwd", "up": "../../../..", "dangling": "nowhere", "loop": "loop" + suffix} {
			if err := os.Symlink(to, filepath.Join(dir, name+suffix)); err != nil {
				t.Fatal(err)
			}
		}
	}
	odd(source, "")
	commit(t, source, "odd")
	b := resolve(t, s, source, "main")
	work := sandbox(t, s, b)
	noGit := func(rel string) bool { return rel == ".git" || strings.HasPrefix(rel, ".git/") }
	if d := cmp.Diff(snapshot(t, source, noGit), snapshot(t, work, noGit)); d != "" {
		t.Errorf("in the sandbox: %s", d)
	}
	odd(work, "~2")
	for _, name := range []string{"-rf", "binary", "out", "new\nline"} {
		if err := os.Remove(filepath.Join(work, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(work, "binary"), binary+"changed")
	write(t, filepath.Join(work, "snow☃man"), "melted\n")
	if err := os.Chmod(filepath.Join(work, "run.sh"), 0o644); err != nil {
		t.Fatal(err)
	}
	git(t, work, "mv", "--", "back\\slash", "-renamed")
	head := commit(t, work, "odd work")
	got := receive(t, s, bundled(t, work, b))
	if got.Commit != head || got.FilesChanged == 0 {
		t.Errorf("%+v", got)
	}
	applied, err := s.Apply(t.Context(), run1, 1, source)
	if err != nil {
		t.Fatal(err)
	}
	if len(applied.Files) != got.FilesChanged || applied.ThreeWay {
		t.Errorf("applied %d files, received %d", len(applied.Files), got.FilesChanged)
	}
	if d := cmp.Diff(snapshot(t, work, noGit), snapshot(t, source, noGit)); d != "" {
		t.Errorf("applied: %s", d)
	}
	// The text of a diff is a patch that git can use.
	other := filepath.Join(t.TempDir(), "other")
	git(t, "/", "clone", "-q", "-b", "main", source, other)
	patch := filepath.Join(t.TempDir(), "p")
	write(t, patch, diff(t, s, DiffOptions{Binary: true}))
	git(t, other, "apply", "--whitespace=nowarn", patch)
	if d := cmp.Diff(snapshot(t, work, noGit), snapshot(t, other, noGit)); d != "" {
		t.Errorf("patched: %s", d)
	}
}

func TestResolveFindsTheBranch(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	main := git(t, source, "rev-parse", "HEAD")
	git(t, source, "tag", "-a", "-m", "tagged", "v1")
	git(t, source, "tag", "light")
	git(t, source, "checkout", "-q", "-b", "feature/login")
	feature := commit(t, source, "feature")
	for branch, want := range map[string]Base{
		"":                         {Branch: "main", Commit: main},
		"main":                     {Branch: "main", Commit: main},
		"feature/login":            {Branch: "feature/login", Commit: feature},
		"refs/heads/feature/login": {Branch: "feature/login", Commit: feature},
		"v1":                       {Branch: "v1", Commit: main},
		"light":                    {Branch: "light", Commit: main},
	} {
		got := resolve(t, s, source, branch)
		if got.Branch != want.Branch || got.Commit != want.Commit {
			t.Errorf("%q: %+v, want %+v", branch, got, want)
		}
		sandbox(t, s, got)
	}

	git(t, source, "branch", "-m", "main", "trunk")
	if got := resolve(t, s, source, ""); got.Branch != "feature/login" {
		t.Errorf("without main: %+v, want the branch that HEAD names", got)
	}
	git(t, source, "checkout", "-q", "--detach", "trunk")
	got := resolve(t, s, source, "")
	if got.Branch != "HEAD" || got.Commit != main {
		t.Errorf("detached: %+v", got)
	}
	sandbox(t, s, got)

	for _, branch := range []string{"main", "feature", "featur/login"} {
		_, err := s.Resolve(t.Context(), source, branch)
		wantFault(t, err, fault.NotFound)
		if hint := fault.HintOf(err); !strings.Contains(hint, "feature/login") || !strings.Contains(hint, "2 branches") {
			t.Errorf("hint %q", hint)
		}
	}
}

func TestEmptyRepositoriesAreSaidToBeEmpty(t *testing.T) {
	home(t)
	s := newStore(t)
	dir := filepath.Join(t.TempDir(), "empty")
	git(t, "/", "init", "-q", dir)
	for _, branch := range []string{"", "main"} {
		_, err := s.Resolve(t.Context(), dir, branch)
		wantFault(t, err, fault.NotFound)
		if !strings.Contains(fault.HintOf(err), "Commit something") {
			t.Errorf("hint %q", fault.HintOf(err))
		}
	}
}

func TestResolveFetchesOnlyWhatIsNew(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	resolve(t, s, source, "")
	packs := func() int {
		p, _ := filepath.Glob(filepath.Join(s.dir, "mirrors", "*.git", "objects", "pack", "*.pack"))
		return len(p)
	}
	before := packs()
	resolve(t, s, source, "")
	if packs() != before {
		t.Error("a second Resolve fetched again")
	}
	write(t, filepath.Join(source, "README"), "new\n")
	commit(t, source, "second")
	b := resolve(t, s, source, "")
	packed, _ := filepath.Glob(filepath.Join(b.Mirror, "objects", "pack", "*.idx"))
	if len(packed) != before+1 {
		t.Fatalf("%d packs, want %d", len(packed), before+1)
	}
	for _, idx := range packed {
		// The second pack: a commit, a tree and a blob, and not the first three.
		if n := len(strings.Split(git(t, b.Mirror, "verify-pack", "-v", idx), "\n")); n > 3+4 {
			t.Errorf("a pack of %d lines", n)
		}
	}
	sandbox(t, s, b)
}

// A remote may replace the branch "a" by "a/b", and rewrite its history.
func TestResolveFollowsARemoteThatIsRewritten(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	git(t, source, "branch", "a")
	old := resolve(t, s, source, "a")
	git(t, source, "branch", "-m", "a", "a/b")
	git(t, source, "checkout", "-q", "a/b")
	git(t, source, "commit", "-q", "--amend", "-m", "rewritten")
	b := resolve(t, s, source, "a/b")
	if b.Commit == old.Commit {
		t.Error("nothing was rewritten")
	}
	sandbox(t, s, b)
	git(t, source, "reflog", "expire", "--expire=now", "--all")
	git(t, source, "branch", "-D", "main")
	git(t, source, "gc", "-q", "--prune=now")
	if _, err := tryGit(source, "cat-file", "-e", old.Commit); err == nil {
		t.Fatal("the source still has the old commit")
	}
	sandbox(t, s, old) // the mirror keeps what a run started from
}

func TestManyResolveAndBundleAtOnce(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			b, err := s.Resolve(t.Context(), source, "main")
			if err != nil {
				t.Error(err)
				return
			}
			var out bytes.Buffer
			if err := s.Bundle(t.Context(), b, &out); err != nil || out.Len() == 0 {
				t.Errorf("%d bytes, %v", out.Len(), err)
			}
		})
	}
	wg.Wait()
}

func TestMirrorsArePackedTogetherAndRunsLiveOn(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	s.maxPacks = 3
	var first Base
	for i := range 8 {
		write(t, filepath.Join(source, "README"), fmt.Sprint(i))
		commit(t, source, "next")
		b := resolve(t, s, source, "")
		if i == 0 {
			first = b
			madeFork(t, s, b, func(work string) { write(t, filepath.Join(work, "x"), "x\n") })
		}
		packs, _ := filepath.Glob(filepath.Join(b.Mirror, "objects", "pack", "*.pack"))
		if len(packs) > 4 {
			t.Errorf("%d packs", len(packs))
		}
	}
	sandbox(t, s, first)
	git(t, s.runDir(run1), "fsck", "--strict")
	// The mirror may go away altogether.
	if err := os.RemoveAll(filepath.Join(s.dir, "mirrors")); err != nil {
		t.Fatal(err)
	}
	git(t, s.runDir(run1), "fsck", "--strict")
	if d := diff(t, s, DiffOptions{}); !strings.Contains(d, "+x\n") {
		t.Errorf("diff %q", d)
	}
	sandbox(t, s, first)
}

func TestRemoveTakesTheRunAndLeavesTheSource(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	_, got := madeFork(t, s, resolve(t, s, source, ""), func(work string) { write(t, filepath.Join(work, "x"), "x\n") })
	for range 2 {
		if err := s.Remove(t.Context(), run1); err != nil {
			t.Fatal(err)
		}
	}
	wantFault(t, s.Diff(t.Context(), run1, 1, &bytes.Buffer{}, DiffOptions{}), fault.NotFound)
	git(t, source, "rev-parse", got.Branch)
	left, err := os.ReadDir(filepath.Join(s.dir, "runs"))
	if err != nil || len(left) > 0 {
		t.Errorf("left in runs: %v, %v", left, err)
	}
	wantFault(t, s.Remove(t.Context(), "../x"), fault.Invalid)
}

func TestADiffOfNothingIsNotFound(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	wantFault(t, s.Diff(t.Context(), run1, 1, &bytes.Buffer{}, DiffOptions{}), fault.NotFound)
	madeFork(t, s, resolve(t, s, source, ""), func(work string) { write(t, filepath.Join(work, "x"), "x\n") })
	wantFault(t, s.Diff(t.Context(), run1, 2, &bytes.Buffer{}, DiffOptions{}), fault.NotFound)
	wantFault(t, s.Diff(t.Context(), "-rf", 1, &bytes.Buffer{}, DiffOptions{}), fault.Invalid)
}

func TestCancellingStopsGit(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Resolve(ctx, source, "")
	wantFault(t, err, fault.Cancelled)

	// A git that never ends: its helper hangs until it is killed.
	dir := t.TempDir()
	fifo := filepath.Join(dir, "started")
	write(t, filepath.Join(dir, "git"), "#!/bin/sh\ncase \"$*\" in *ls-remote*) : >'"+fifo+"'; exec sleep 1000;; esac\nexec /usr/bin/env -u X PATH=\"${PATH#*:}\" git \"$@\"\n")
	if err := os.Chmod(filepath.Join(dir, "git"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(fifo); err == nil {
				cancel()
			}
		}
	}()
	_, err = s.Resolve(ctx, source, "")
	wantFault(t, err, fault.Cancelled)
}

func TestWithoutGitNothingGoesAndItIsSaid(t *testing.T) {
	home(t)
	source := repository(t)
	old := t.TempDir()
	write(t, filepath.Join(old, "git"), "#!/bin/sh\necho git version 2.30.2\n")
	if err := os.Chmod(filepath.Join(old, "git"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	for _, p := range []string{t.TempDir(), old + ":" + path} {
		t.Setenv("PATH", p)
		_, err := newStore(t).Resolve(t.Context(), source, "")
		wantFault(t, err, fault.Unsupported)
	}
}

func TestOtherHashesWork(t *testing.T) {
	home(t)
	s := newStore(t)
	source := filepath.Join(t.TempDir(), "sha256")
	git(t, "/", "init", "-q", "--object-format=sha256", source)
	write(t, filepath.Join(source, "a"), "a\n")
	commit(t, source, "first")
	b := resolve(t, s, source, "")
	if len(b.Commit) != 64 {
		t.Fatalf("base %+v", b)
	}
	_, got := madeFork(t, s, b, func(work string) { write(t, filepath.Join(work, "a"), "b\n") })
	if !got.Delivered || got.FilesChanged != 1 {
		t.Errorf("%+v", got)
	}
	if _, err := s.Apply(t.Context(), run1, 1, source); err != nil {
		t.Error(err)
	}
}
