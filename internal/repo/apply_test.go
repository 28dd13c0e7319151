package repo

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func all(string) bool { return false }

// objectsOf lists what a repository stores.
func objectsOf(t *testing.T, source string) map[string]string {
	t.Helper()
	return snapshot(t, filepath.Join(source, ".git"), all)
}

// applied is a source, and a fork that changed line three and added a file.
func applied(t *testing.T) (s *Store, source string) {
	t.Helper()
	home(t)
	s, source = newStore(t), repository(t)
	madeFork(t, s, resolve(t, s, source, ""), func(work string) {
		write(t, filepath.Join(work, "README"), "one\ntwo\nTHREE\nfour\nfive\nsix\nseven\neight\nnine\nten\n")
		write(t, filepath.Join(work, "dir", "new"), "new\n")
	})
	return s, source
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestApplyChangesTheWorkTreeAndNothingElse(t *testing.T) {
	s, source := applied(t)
	write(t, filepath.Join(source, "mine"), "untracked\n")
	before := objectsOf(t, source)
	sub := filepath.Join(source, "a", "sub")
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := s.Apply(t.Context(), run1, 1, sub)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(ApplyResult{Files: []string{"README", "dir/new"}}, got); d != "" {
		t.Error(d)
	}
	if !strings.Contains(content(t, filepath.Join(source, "README")), "THREE") || content(t, filepath.Join(source, "dir/new")) != "new\n" {
		t.Error("the changes are not there")
	}
	if d := cmp.Diff(before, objectsOf(t, source)); d != "" {
		t.Errorf("the repository changed: %s", d)
	}
	if st := git(t, source, "status", "--porcelain"); st != " M README\n?? dir/\n?? mine" {
		t.Errorf("status %q", st)
	}
}

func TestApplyWorksInACloneWithoutTheBase(t *testing.T) {
	s, source := applied(t)
	other := filepath.Join(t.TempDir(), "other")
	git(t, "/", "init", "-q", other)
	write(t, filepath.Join(other, "README"), content(t, filepath.Join(source, "README")))
	if _, err := s.Apply(t.Context(), run1, 1, other); err != nil { // nothing is committed there
		t.Fatal(err)
	}
	if !strings.Contains(content(t, filepath.Join(other, "README")), "THREE") {
		t.Error("the changes are not there")
	}
}

func TestApplyMergesWithAWorkTreeThatMovedOn(t *testing.T) {
	s, source := applied(t)
	// The user changed a line that the patch shows as context, renamed the
	// file, and committed both.
	write(t, filepath.Join(source, "README"), "ONE\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n")
	git(t, source, "mv", "README", "README.md")
	commit(t, source, "moved on")
	write(t, filepath.Join(source, "mine"), "untracked\n")
	before := objectsOf(t, source)
	got, err := s.Apply(t.Context(), run1, 1, source)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(ApplyResult{Files: []string{"README.md", "dir/new"}, ThreeWay: true}, got); d != "" {
		t.Error(d)
	}
	if text := content(t, filepath.Join(source, "README.md")); !strings.HasPrefix(text, "ONE\ntwo\nTHREE\nfour\n") {
		t.Errorf("merged to %q", text)
	}
	if d := cmp.Diff(before, objectsOf(t, source)); d != "" {
		t.Errorf("the repository changed: %s", d)
	}
}

// A work tree that is behind the base gets the fork's changes and not what
// others did in between.
func TestApplyToAnOlderCommitBringsTheForksChangesOnly(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	old := git(t, source, "rev-parse", "HEAD")
	write(t, filepath.Join(source, "between"), "between\n")
	write(t, filepath.Join(source, "README"), "one\ntwo\nthree\nFOUR\nfive\nsix\nseven\neight\nnine\nten\n")
	commit(t, source, "between")
	madeFork(t, s, resolve(t, s, source, ""), func(work string) {
		write(t, filepath.Join(work, "README"), "one\nTWO\nthree\nFOUR\nfive\nsix\nseven\neight\nnine\nten\n")
	})
	git(t, source, "checkout", "-q", "--detach", old)
	got, err := s.Apply(t.Context(), run1, 1, source)
	if err != nil || !got.ThreeWay {
		t.Fatalf("%+v, %v", got, err)
	}
	if text := content(t, filepath.Join(source, "README")); !strings.HasPrefix(text, "one\nTWO\nthree\nfour\n") {
		t.Errorf("merged to %q", text)
	}
	if _, err := os.Stat(filepath.Join(source, "between")); err == nil {
		t.Error("the work of others came along")
	}
}

func TestApplyIsAllOrNothing(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, source string){
		"committed conflict": func(t *testing.T, source string) {
			write(t, filepath.Join(source, "README"), "one\ntwo\nDREI\nfour\nfive\nsix\nseven\neight\nnine\nten\n")
			commit(t, source, "conflict")
		},
		"change that is not committed": func(t *testing.T, source string) {
			write(t, filepath.Join(source, "README"), "one\ntwo\nDREI\nfour\nfive\nsix\nseven\neight\nnine\nten\n")
		},
		"untracked file in the way": func(t *testing.T, source string) { write(t, filepath.Join(source, "dir", "new"), "mine\n") },
		"file where a folder goes":  func(t *testing.T, source string) { write(t, filepath.Join(source, "dir"), "mine\n") },
		"link where a folder goes": func(t *testing.T, source string) {
			if err := os.Symlink(t.TempDir(), filepath.Join(source, "dir")); err != nil {
				t.Fatal(err)
			}
		},
		"deleted file": func(t *testing.T, source string) {
			if err := os.Remove(filepath.Join(source, "README")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, source := applied(t)
			spoil(t, source)
			before := snapshot(t, source, all)
			_, err := s.Apply(t.Context(), run1, 1, source)
			wantFault(t, err, fault.Conflict)
			if !strings.Contains(fault.HintOf(err), "Nothing was changed") {
				t.Errorf("hint %q", fault.HintOf(err))
			}
			if d := cmp.Diff(before, snapshot(t, source, all)); d != "" {
				t.Errorf("changed: %s", d)
			}
		})
	}
}

func TestApplyTwiceIsAConflictUntilCommittedAndThenNothing(t *testing.T) {
	s, source := applied(t)
	if _, err := s.Apply(t.Context(), run1, 1, source); err != nil {
		t.Fatal(err)
	}
	_, err := s.Apply(t.Context(), run1, 1, source)
	wantFault(t, err, fault.Conflict)
	commit(t, source, "taken")
	got, err := s.Apply(t.Context(), run1, 1, source)
	if err != nil || len(got.Files) > 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestApplyNeedsAWorkTree(t *testing.T) {
	s, source := applied(t)
	bare := filepath.Join(t.TempDir(), "bare.git")
	git(t, "/", "clone", "-q", "--bare", source, bare)
	for _, dir := range []string{t.TempDir(), "/nowhere/at/all", bare} {
		if _, err := s.Apply(t.Context(), run1, 1, dir); err == nil || fault.KindOf(err) == fault.Internal || fault.HintOf(err) == "" {
			t.Errorf("%s: %v of kind %q, hint %q", dir, err, fault.KindOf(err), fault.HintOf(err))
		}
	}
	if _, err := s.Apply(t.Context(), run1, 7, source); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
}

// The path of a repository may hold what separates paths in a list.
func TestApplyInAFolderWithAnOddName(t *testing.T) {
	home(t)
	s := newStore(t)
	source := filepath.Join(t.TempDir(), `a:b "c" \d`)
	git(t, "/", "init", "-q", source)
	write(t, filepath.Join(source, "a"), "1\n2\n3\n")
	commit(t, source, "first")
	madeFork(t, s, resolve(t, s, source, ""), func(work string) { write(t, filepath.Join(work, "a"), "1\n2\nTHREE\n") })
	write(t, filepath.Join(source, "a"), "ONE\n2\n3\n")
	commit(t, source, "moved on")
	if got, err := s.Apply(t.Context(), run1, 1, source); err != nil || !got.ThreeWay || content(t, filepath.Join(source, "a")) != "ONE\n2\nTHREE\n" {
		t.Errorf("%+v, %v", got, err)
	}
}

// A disk that fills while files are written leaves the work tree as it was.
func TestApplyOnAFullDiskPutsEverythingBack(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	madeFork(t, s, resolve(t, s, source, ""), func(work string) {
		write(t, filepath.Join(work, "README"), "changed\n")
		write(t, filepath.Join(work, "a", "b", "c"), "c\n")
		write(t, filepath.Join(work, "zz"), strings.Repeat("0123456789abcdef\n", 200_000))
	})
	small := filepath.Join(smallDisk(t, "2m"), "clone")
	git(t, "/", "clone", "-q", "-b", "main", source, small)
	before := snapshot(t, small, all)
	_, err := s.Apply(t.Context(), run1, 1, small)
	if err == nil {
		t.Fatal("it fits")
	}
	if d := cmp.Diff(before, snapshot(t, small, all)); d != "" {
		t.Errorf("changed: %s", d)
	}
	if _, err := os.Stat(filepath.Join(small, "a")); err == nil {
		t.Error("a folder is left")
	}
	if fault.KindOf(err) != fault.Conflict && fault.KindOf(err) != fault.Full {
		t.Errorf("%v of kind %q", err, fault.KindOf(err))
	}
}
