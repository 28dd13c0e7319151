package local

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// TestAForkKeepsWhatAGitIndexRemembers compares all that git compares. When
// any of it differs, the first status in every fork reads every file again.
func TestAForkKeepsWhatAGitIndexRemembers(t *testing.T) {
	p := newProvider(t)
	const stat = "for f in a dir/b link; do stat -c '%n %i %s %X %Y %Z %u %g %a' $f | sed 's/ [0-9]* / /4'; done"
	ref, sb := newSandbox(t, p, testSpec("prepare"))
	script(t, sb, "fill", `mkdir dir; echo a > a; echo b > dir/b; ln -s a link
		git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm one`)
	want := script(t, sb, "stat", stat)
	if err := p.Freeze(t.Context(), ref, "first"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("between")
	s.Base = "first"
	ref, sb = newSandbox(t, p, s)
	if got := script(t, sb, "stat", stat); got != want {
		t.Errorf("in a fork:\n%s\nin the base:\n%s", got, want)
	}
	script(t, sb, "add", "echo c > c; stat -c '%i %Z' c > /tmp/c")
	if err := p.Freeze(t.Context(), ref, "second"); err != nil {
		t.Fatal(err)
	}
	s = testSpec("fork")
	s.Base = "second"
	_, sb = newSandbox(t, p, s)
	if got := script(t, sb, "stat", stat); got != want {
		t.Errorf("in a fork of a fork:\n%s\nin the base:\n%s", got, want)
	}
	if out := script(t, sb, "same", "stat -c '%i %Z' c | diff - /tmp/c && git status --porcelain"); out != "?? c" {
		t.Errorf("%s", out)
	}
}

func TestADamagedBaseIsNoBase(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"no description": func(b string) error { return os.Remove(filepath.Join(b, baseFile)) },
		"half described": func(b string) error { return os.Truncate(filepath.Join(b, baseFile), 10) },
		"no workspace":   func(b string) error { return os.Remove(filepath.Join(b, fsDir, "workspace")) },
		"another's":      func(b string) error { return replace(filepath.Join(b, baseFile), `"agent":`, `"agent":9`) },
		"of a later time": func(b string) error {
			return replace(filepath.Join(b, baseFile), fmt.Sprintf(`"version":%d`, baseVersion), fmt.Sprintf(`"version":%d`, baseVersion+1))
		},
		"names a way out": func(b string) error {
			return replace(filepath.Join(b, baseFile), `"agent"`, `"below":["../x"],"agent"`)
		},
		"on one not there": func(b string) error { return replace(filepath.Join(b, baseFile), `"agent"`, `"below":["x"],"agent"`) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t)
			freeze := func(key, base string) {
				t.Helper()
				ref, sb := newSandbox(t, p, testSpec(key))
				script(t, sb, "fill", "echo "+key+" > /tmp/who")
				if err := p.Freeze(t.Context(), ref, base); err != nil {
					t.Fatal(err)
				}
			}
			freeze("first", "base")
			if err := p.Base(t.Context(), "base"); err != nil {
				t.Fatal(err)
			}
			if err := damage(basePath(p.dir, "base")); err != nil {
				t.Fatal(err)
			}
			if err := p.Base(t.Context(), "base"); fault.KindOf(err) != fault.NotFound {
				t.Errorf("%v", err)
			}
			// It makes room for a whole one.
			freeze("second", "base")
			s := testSpec("fork")
			s.Base = "base"
			_, sb := newSandbox(t, p, s)
			if out := script(t, sb, "who", "cat /tmp/who"); out != "second" {
				t.Error(out)
			}
		})
	}
}

func replace(path, old, new string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed := strings.Replace(string(b), old, new, 1)
	if changed == string(b) {
		return fmt.Errorf("%s holds no %s: %s", path, old, b)
	}
	return os.WriteFile(path, []byte(changed), 0o600)
}

func TestAFrozenSandboxCanOnlyBeDestroyed(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("used"))
	ctx := t.Context()
	proc, err := sb.Start(ctx, "before", sandbox.Cmd{Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // a second time is no error: the base is there
		if err := p.Freeze(ctx, ref, "base"); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Freeze(ctx, ref, "other"); fault.KindOf(err) != fault.Conflict {
		t.Errorf("freeze under another key: %v", err)
	}
	if err := sb.Health(ctx); fault.KindOf(err) != fault.Conflict {
		t.Errorf("health: %v", err)
	}
	if _, err := sb.Start(ctx, "after", sandbox.Cmd{Args: []string{"true"}}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("start: %v", err)
	}
	if err := proc.Signal(ctx, sandbox.Kill); err != nil {
		t.Errorf("signal: %v", err)
	}
	if again, err := p.Create(ctx, testSpec("used")); err != nil || again != ref {
		t.Errorf("create again: %+v, %v", again, err)
	}
	if err := sb.SetDeadline(ctx, testSpec("").Deadline); err != nil {
		t.Errorf("set deadline: %v", err)
	}
}

// A folder that was renamed in the sandbox that became a base remembers its
// old path, in the base below, as an extended attribute.
func TestAFolderRenamedInABaseIsWholeInWhatStartsFromIt(t *testing.T) {
	p := newProvider(t)
	freeze := func(key, base, text string) {
		t.Helper()
		spec := testSpec(key)
		spec.Base = base
		ref, sb := newSandbox(t, p, spec)
		script(t, sb, "prepare", text)
		if err := p.Freeze(t.Context(), ref, key); err != nil {
			t.Fatal(err)
		}
	}
	freeze("one", "", "mkdir -p a/b ~/c && echo 1 >a/b/f && echo 2 >~/c/g")
	freeze("two", "one", "mv a z && mv ~/c ~/y && mkdir a && echo 3 >a/h")
	spec := testSpec("fork")
	spec.Base = "two"
	_, sb := newSandbox(t, p, spec)
	if got := script(t, sb, "look", "cat z/b/f ~/y/g a/h | tr '\\n' ' '; ls -d a/b ~/c 2>/dev/null || true"); got != "1 2 3" {
		t.Errorf("got %q", got)
	}
}
