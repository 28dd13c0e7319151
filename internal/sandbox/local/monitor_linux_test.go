package local

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// manyFolders makes a repository whose git asks what has changed, where it is
// started from the base.
var manyFolders = `git init -q -b main .; git config user.name a; git config user.email a@b
for d in a b a/s a/s/t b/s; do mkdir -p $d; for f in 1 2 3; do echo $d/$f > $d/$f; done; done; echo top > top; echo '*.o' > .gitignore
git add -A && git commit -qm one
` + sandbox.SettleIndex(1)

// newMonitored returns a sandbox on a base with such a repository.
func newMonitored(t *testing.T, p *Provider) (sandbox.Ref, *attached) {
	t.Helper()
	s := testSpec("fork")
	s.Base = chain(t, p, 1, func(int) string { return manyFolders })[0]
	return newSandbox(t, p, s)
}

// fullStatus neither asks nor writes anything down.
const fullStatus = "GIT_OPTIONAL_LOCKS=0 git -c core.fsmonitor=false -c core.untrackedCache=false status --porcelain"

// bothStatuses shows what git sees that is told what has changed, and what it
// sees by itself, when the two are not the same.
const bothStatuses = `told=$(git status --porcelain); full=$(` + fullStatus + `)
[ "$told" = "$full" ] || printf 'told what changed:\n%s\nby itself:\n%s\n' "$told" "$full"
`

// query asks as git does, and shows zero bytes as spaces. Without a token it
// asks since the base.
const query = `query() { bash -c 'exec 3<>/dev/tcp/127.0.0.1/8485; echo "${1-$(cut -d\  -f 1 .git/sandbox-temporal-changes)}" >&3; cat <&3' query "$@" | tr '\0' ' '; }
`

func TestGitIsToldWhatHasChangedSinceTheBase(t *testing.T) {
	if sandbox.ChangesPort != 8485 {
		t.Fatal("the scripts here name another port")
	}
	_, sb := newMonitored(t, newProvider(t))
	ask := func(id, deeds string, args ...string) (token string, paths []string) {
		t.Helper()
		out := strings.Fields(script(t, sb, id, query+deeds+"\nquery "+strings.Join(args, " ")))
		if len(out) == 0 {
			t.Fatalf("%s: no answer", id)
		}
		slices.Sort(out[1:])
		return out[0], out[1:]
	}
	if out := script(t, sb, "valid", "git ls-files -f | grep -cv '^h' || true"); out != "0" {
		t.Errorf("git has to look at %s files of an untouched base", out)
	}
	first, paths := ask("first", "")
	if len(paths) > 0 {
		t.Errorf("changed from the first: %s", paths)
	}
	const of = "/" + nobodys
	step := func(id, deeds, since string, want ...string) string {
		t.Helper()
		// Times of files are a tick of the kernel apart, and what changed just
		// now is told again.
		token, got := ask(id, deeds+"\nsleep 0.2", since)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: told %q, want %q", id, got, want)
		}
		return token
	}
	second := step("change", "echo x >> a/1", first, nobodys, "a"+of, "a/1", "a/1/")
	step("nothing", "", second)
	step("again", "echo x >> a/1", second, "a/1", "a/1/")
	third := step("both", "echo new > b/new", first, nobodys, "a"+of, "a/1", "a/1/", "b"+of, "b/new", "b/new/")
	// No trace of it is left but in what was told before.
	fourth := step("traceless", "rm b/new", third, "b"+of, "b/new", "b/new/")
	fifth := step("whole", "rm -rf a/s; mkdir a/s; echo other > a/s/1", fourth, "a"+of, "a/s", "a/s/", "a/s"+of, "a/s/1", "a/s/1/")
	step("removed", "rm a/2", fifth, "a"+of, "a/2", "a/2/")
	for id, token := range map[string]string{"strange": "strange", "empty": "''", "later": first[:strings.LastIndex(first, ".")] + ".999999", "negative": first[:strings.LastIndex(first, ".")] + ".-1"} {
		step(id, "", token, everything)
	}
	// What is in a folder that was moved is in no upper layer.
	if script(t, sb, "move", "perl -e 'print rename(\"b/s\", \"c\") || 0'") == "1" {
		step("moved", "", first, everything)
	}
}

func TestGitIsToldThatAnythingMayHaveChanged(t *testing.T) {
	_, sb := newMonitored(t, newProvider(t))
	for i, row := range []struct{ what, deeds, undo string }{
		{"a folder that nobody may look into", "mkdir x; chmod 0 x", "chmod 700 x; rmdir x"},
		{"more files than are worth it", fmt.Sprintf("mkdir x; seq -f x/%%g %d | xargs touch", maxFound+10), "rm -r x"},
	} {
		id := fmt.Sprintf("row-%d", i)
		out := script(t, sb, id, query+row.deeds+"\nquery; echo; git status --porcelain; git -c core.fsmonitor=false status --porcelain")
		told, rest, _ := strings.Cut(out, "\n")
		switch lines := strings.Split(rest, "\n"); {
		case i == 0 && currentIdentity().Root: // who supervises may
		case strings.TrimSpace(told) != sandbox.Unsure+" "+everything:
			t.Errorf("%s: told %s", row.what, told)
		case len(lines)%2 != 0 || !slices.Equal(lines[:len(lines)/2], lines[len(lines)/2:]):
			t.Errorf("%s: git says\n%s", row.what, rest)
		}
		script(t, sb, id+"-undo", row.undo)
	}
}

// TestWhatChangedJustNowIsToldAgain: another change could have the same time.
func TestWhatChangedJustNowIsToldAgain(t *testing.T) {
	dir := t.TempDir()
	var u upperLayer
	if !u.begin(dir) {
		t.Fatal("the folder cannot be opened")
	}
	defer u.root.Close()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	told := func() []string {
		t.Helper()
		since := u.looks
		if _, err := u.look(); err != nil {
			t.Fatal(err)
		}
		return u.since(since)
	}
	for range 2 {
		if got := told(); !slices.Contains(got, "file") || !slices.Contains(got, nobodys) {
			t.Errorf("told %q", got)
		}
	}
	eventually(t, "it is told no more", func() bool { return len(told()) == 0 })
}

// TestGitSeesWhatChangedBelow has work frozen that git was never asked about: its
// index is that of a lower layer then.
func TestGitSeesWhatChangedBelow(t *testing.T) {
	p := newProvider(t)
	keys := chain(t, p, maxChain, func(i int) string {
		if i == 0 {
			return manyFolders
		}
		deed := fmt.Sprintf("echo %[1]d >> a/1; echo %[1]d > new%[1]d; echo more >> b/s/%[2]d; rm -f a/s/%[2]d", i, i%3+1)
		if i%3 == 0 {
			deed += "; git add new1; git status > /dev/null"
		}
		if i == 1 {
			deed += "; chmod -R g-w ." // copies all files up
		}
		return deed
	})
	look := func(base string) {
		t.Helper()
		s := testSpec("on-" + base)
		s.Base = base
		ref, sb := newSandbox(t, p, s)
		want := len(strings.Split(script(t, sb, "full", fullStatus), "\n"))
		for _, id := range []string{"first", "second"} {
			if out := script(t, sb, id, bothStatuses); out != "" || want < 3 {
				t.Errorf("on %s, %s: %d changes, %s", base, id, want, out)
			}
		}
		if base == keys[len(keys)-1] {
			if err := p.Snapshot(t.Context(), ref, "long"); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, key := range keys[1:] {
		look(key)
	}
	eventually(t, "the chain is one layer", func() bool { return infoOf(t, p, "long").Layers == 1 })
	notFlattening(t, p)
	look("long")
}

func TestWhoHangsOnAtTheMonitorHoldsNobodyUp(t *testing.T) {
	p := newProvider(t)
	ref, sb := newMonitored(t, p)
	if _, err := sb.Start(t.Context(), "crowd", sandbox.Cmd{Args: []string{"bash", "-c", `
		for i in $(seq 40); do exec {fd}<>/dev/tcp/127.0.0.1/8485 || break; printf 'no end of line' >&$fd; done
		(cat /dev/zero > /dev/tcp/127.0.0.1/8485) & touch /tmp/ready; wait`}}); err != nil {
		t.Fatal(err)
	}
	script(t, sb, "ready", "until [ -e /tmp/ready ]; do sleep 0.01; done; git status --porcelain")
	mustDestroy(t, p, ref)
}

// gitDeeds are what an agent does to a work tree. %[1]s and %[2]s are paths that
// may or may not be there, of files or folders. The last ones move folders: what
// follows is asked without an answer then, where the kernel can move them.
var gitDeeds = []string{
	"echo $n >> %[1]s", "mkdir -p $(dirname %[1]s); echo $n > %[1]s", "echo . > %[1]s", "rm -f %[1]s", "rm -rf %[1]s", "mkdir -p %[1]s",
	"cp -r %[1]s %[2]s", "ln -sf %[1]s %[2]s", "ln -f %[1]s %[2]s", "chmod +x %[1]s", "touch %[1]s", "rm -rf %[1]s; mkdir -p %[1]s; echo $n > %[1]s/1",
	"[ -d %[1]s ] || mv -T %[1]s %[2]s", "echo $n > %[1]s; echo $n > .gitignore",
	"git add -A", "git add %[1]s", "git commit -qm $n", "git commit -qam $n", "git checkout -q HEAD -- %[1]s", "git reset -q --hard", "git reset -q",
	"git stash -q", "git stash pop -q", "git rm -rqf %[1]s", "git clean -fdq", "git checkout -q -B side HEAD~1", "git checkout -q main", "git rm -q --cached %[1]s",
	"cp -p .git/index .git/kept", "cp -p .git/kept .git/index", "git -c core.fsmonitor=false status", "git update-index -q --refresh", "git diff",

	"mv -T %[1]s %[2]s", "mv %[1]s %[2]s", "git mv -f %[1]s %[2]s", "perl -e 'rename($ARGV[0], $ARGV[1])' %[1]s %[2]s",
	"perl -e 'rename($ARGV[0], \"swap\") && rename($ARGV[1], $ARGV[0]) && rename(\"swap\", $ARGV[1])' %[1]s %[2]s",
}

const movingDeeds = 5

// TestGitThatIsToldWhatChangedSeesWhatItSeesWithout compares the two after
// random deeds.
func TestGitThatIsToldWhatChangedSeesWhatItSeesWithout(t *testing.T) {
	for what, deeds := range map[string][]string{"all deeds": gitDeeds, "folders stay": gitDeeds[:len(gitDeeds)-movingDeeds]} {
		t.Run(what, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			_, sb := newMonitored(t, newProvider(t))
			out := script(t, sb, "deeds", randomDeeds(rand.New(rand.NewPCG(seed, 0)), deeds))
			if strings.Contains(out, "\n") {
				t.Error(out)
			}
			t.Logf("%s files need not be looked at in the end", out)
		})
	}
}

func randomDeeds(random *rand.Rand, deeds []string) string {
	paths := []string{"a", "b", "a/s", "a/s/t", "b/s", "a/1", "a/2", "b/1", "a/s/1", "a/s/t/2", "b/s/3", "top", "new", "new/1", "new/s/2", "a/new", "b/s/new", "x.o", "a/y.o"}
	var text strings.Builder
	text.WriteString("exec 2> /dev/null\ncheck() {\n" + bothStatuses + `
	[ "$told" = "$full" ] || { echo "after $n, $1"; exit 0; }
}
`)
	for n := range sized(120, 1000) {
		deed := fmt.Sprintf(deeds[random.IntN(len(deeds))]+"%.0[1]s%.0[2]s", paths[random.IntN(len(paths))], paths[random.IntN(len(paths))])
		fmt.Fprintf(&text, "n=%d; { %s; } > /dev/null\n", n, deed)
		if random.IntN(2) == 0 {
			fmt.Fprintf(&text, "check %s\n", "'"+strings.ReplaceAll(deed, "'", `'\''`)+"'")
		}
	}
	text.WriteString("check 'the end'\ngit ls-files -f | grep -c '^h' || true")
	return text.String()
}
