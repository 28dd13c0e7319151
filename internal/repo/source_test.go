package repo

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestSourcesThatAreRefused(t *testing.T) {
	home(t)
	s := newStore(t)
	for _, source := range []string{
		"", "-", "--upload-pack=touch /tmp/x", "-rf",
		"ext::sh -c touch% /tmp/pwned", "fd::17", "ext::x:y", "foo::bar",
		"ftp://host/x", "rsync://host/x", "file+ssh://host/x", "javascript://x/y",
		"https://user:hunter2@host/a/b", "https://hunter2@host/a/b", "http://hunter2:@host/a", "ssh://u:hunter2@host/x",
		"https://host/a?access_token=hunter2", "https://host/a#hunter2", "https://host", "https://host/", "https:///a/b",
		"https://ho st/hunter2", "https://host:port/hunter2", "https://host/a\nb", "host:a\x00b",
		"ssh://-oProxyCommand=hunter2/x", "ssh://-oProxyCommand=x@host/y", "-oProxyCommand=x:y", "git@-oProxyCommand=x:y",
		"relative/path", "./x", ".", "..", "C:", "file://otherhost/x", "file:///x?y", "~somebody/x",
	} {
		_, err := s.Resolve(t.Context(), source, "")
		if fault.KindOf(err) != fault.Invalid || fault.HintOf(err) == "" {
			t.Errorf("%q: %v of kind %q, hint %q", source, err, fault.KindOf(err), fault.HintOf(err))
		}
		if err != nil && strings.Contains(err.Error()+fault.HintOf(err), "hunter2") && !strings.Contains(source, "ProxyCommand") {
			t.Errorf("%q: the error repeats the secret: %v", source, err)
		}
	}
	if _, err := os.Stat("/tmp/pwned"); err == nil {
		t.Error("a transport ran a program")
	}
}

func TestBranchesThatAreRefused(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	bad := []string{"--upload-pack=x", "-rf", "-", "a..b", "@{-1}", "@", "refs/../x", "HEAD", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[b", `a\b`,
		"/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock", "a.lock/b", "a@{b", "a\nb", "a\x7fb", "main^{tree}", "refs/heads/-x", "refs/heads/", strings.Repeat("x", 300)}
	for _, branch := range bad {
		_, err := s.Resolve(t.Context(), source, branch)
		wantFault(t, err, fault.Invalid)
	}
}

// The rules are git's own: git is asked about every name.
func FuzzBranchNamesAreJudgedAsGitDoes(f *testing.F) {
	for _, name := range []string{"main", "a/b", "-x", "a..b", "@{-1}", "@", "a@b", "a.lock", ".x", "x.", "é", "\xff", "a\tb", "HEAD", "heads/x", "{", "a{b}", "refs/x"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if strings.ContainsRune(name, 0) || name == "" || name == "@" || len(name) > 200 || strings.HasPrefix(name, "refs/heads/") {
			t.Skip()
		}
		out, err := tryGit("/", "check-ref-format", "--branch", name)
		if err == nil && out != name {
			err = fmt.Errorf("it means %q", out)
		}
		_, ours := branchName(name)
		if (err == nil) != (ours == nil) {
			t.Errorf("%q: git says %v, we say %v", name, err, ours)
		}
	})
}

func TestLocalSourcesInAllTheirForms(t *testing.T) {
	dir := home(t)
	s := newStore(t)
	source := filepath.Join(dir, "my repo")
	git(t, "/", "init", "-q", source)
	write(t, filepath.Join(source, "sub", "a"), "a\n")
	head := commit(t, source, "first")
	bare := filepath.Join(dir, "bare.git")
	git(t, "/", "clone", "-q", "--bare", source, bare)
	tree := filepath.Join(dir, "linked")
	git(t, source, "worktree", "add", "-q", "-b", "side", tree)
	side := commit(t, tree, "on the side")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(source, link); err != nil {
		t.Fatal(err)
	}
	for _, form := range []string{source, "~/my repo", "file://" + strings.ReplaceAll(source, " ", "%20"), source + "/.git", bare, "file://" + bare, tree, link, source + "/"} {
		b := resolve(t, s, form, "")
		if b.Commit != head || b.Source != form || !IsLocal(form) {
			t.Errorf("%s: %+v", form, b)
		}
		in, got := madeFork(t, s, b, func(work string) { write(t, filepath.Join(work, "x"), form) })
		if !got.Delivered {
			t.Errorf("%s: not delivered", form)
		}
		to := source
		if strings.HasSuffix(form, "bare.git") {
			to = bare
		}
		if id := git(t, to, "rev-parse", got.Branch); id != got.Commit {
			t.Errorf("%s: has %s, want %s", form, id, got.Commit)
		}
		_ = in
	}
	if b := resolve(t, s, tree, "side"); b.Commit != side {
		t.Errorf("%+v, want %s", b, side)
	}
	mirrors, _ := filepath.Glob(filepath.Join(s.dir, "mirrors", "*.git"))
	if len(mirrors) != 2 {
		t.Errorf("%d mirrors of two repositories", len(mirrors))
	}

	_, err := s.Resolve(t.Context(), filepath.Join(source, "sub"), "")
	wantFault(t, err, fault.NotFound)
	if !strings.Contains(fault.HintOf(err), source) {
		t.Errorf("hint %q does not name the top", fault.HintOf(err))
	}
	for source, kind := range map[string]fault.Kind{
		dir: fault.NotFound, dir + "/nothing": fault.NotFound, dir + "/bare.git/HEAD": fault.Invalid, dir + "/bare.git/HEAD/x": fault.NotFound,
	} {
		_, err := s.Resolve(t.Context(), source, "")
		wantFault(t, err, kind)
	}
	write(t, filepath.Join(dir, "broken", ".git"), "gitdir: /nowhere\n")
	_, err = s.Resolve(t.Context(), filepath.Join(dir, "broken"), "")
	wantFault(t, err, fault.Invalid)
}

func TestARepositoryOfAnotherUserNeedsTheUsersTrust(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a repository to another user")
	}
	dir := home(t)
	s, source := newStore(t), repository(t)
	err := filepath.WalkDir(source, func(path string, _ os.DirEntry, err error) error {
		if err == nil {
			err = os.Lchown(path, 65534, 65534)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Resolve(t.Context(), source, "")
	wantFault(t, err, fault.Denied)
	if !strings.Contains(fault.HintOf(err), "safe.directory "+source) {
		t.Errorf("hint %q", fault.HintOf(err))
	}
	_, err = s.Dirty(t.Context(), source)
	wantFault(t, err, fault.Denied)
	git(t, "/", "config", "--file", filepath.Join(dir, ".gitconfig"), "--add", "safe.directory", source)
	git(t, "/", "config", "--file", filepath.Join(dir, ".gitconfig"), "--add", "safe.directory", source+"/.git")
	_, got := madeFork(t, s, resolve(t, s, source, ""), func(work string) { write(t, filepath.Join(work, "x"), "x\n") })
	if !got.Delivered {
		t.Error("not delivered")
	}
}

func TestHistoriesThatAreCutShortAreRefused(t *testing.T) {
	dir := home(t)
	s, source := newStore(t), repository(t)
	commit(t, source, "second")
	shallow := filepath.Join(dir, "shallow")
	git(t, "/", "clone", "-q", "--depth=1", "file://"+source, shallow)
	_, err := s.Resolve(t.Context(), shallow, "")
	wantFault(t, err, fault.Unsupported)
	server := serve(t, dir, false)
	_, err = s.Resolve(t.Context(), server.URL+"/shallow", "")
	if err == nil {
		t.Error("a shallow remote was taken")
	}
	git(t, source, "config", "uploadpack.allowFilter", "true")
	partial := filepath.Join(dir, "partial")
	git(t, "/", "clone", "-q", "--filter=blob:none", "--no-checkout", "file://"+source, partial)
	_, err = s.Resolve(t.Context(), partial, "")
	wantFault(t, err, fault.Unsupported)
}

func TestDirtyTellsOfChangesThatAForkWouldNotSee(t *testing.T) {
	dir := home(t)
	s, source := newStore(t), repository(t)
	dirty := func(want bool) {
		t.Helper()
		if got, err := s.Dirty(t.Context(), source); err != nil || got != want {
			t.Errorf("dirty %t, %v; want %t", got, err, want)
		}
	}
	dirty(false)
	write(t, filepath.Join(source, "new"), "x")
	dirty(true)
	b := resolve(t, s, source, "")
	if _, err := os.Stat(filepath.Join(sandbox(t, s, b), "new")); err == nil {
		t.Error("a file that is not committed reached the sandbox")
	}
	write(t, filepath.Join(source, ".git", "info", "exclude"), "new\n")
	dirty(false)
	write(t, filepath.Join(source, "README"), "x")
	dirty(true)
	git(t, source, "add", "-A")
	dirty(true)
	// A hostile repository cannot make us run its monitor.
	git(t, source, "config", "core.fsmonitor", "touch "+dir+"/ran; false")
	dirty(true)
	if _, err := os.Stat(dir + "/ran"); err == nil {
		t.Error("the monitor ran")
	}
	git(t, source, "reset", "-q", "--hard")
	dirty(false)
	if got, err := s.Dirty(t.Context(), "https://github.com/a/b"); got || err != nil {
		t.Errorf("a URL is dirty: %t, %v", got, err)
	}
	if got, err := s.Dirty(t.Context(), filepath.Join(source, ".git")); got || err != nil {
		t.Errorf("a git folder is dirty: %t, %v", got, err)
	}
}
