package local

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// chain freezes bases on one another, each by fill, and returns their keys,
// lowest first.
func chain(t *testing.T, p *Provider, length int, fill func(i int) string) (keys []string) {
	t.Helper()
	below := ""
	for i := range length {
		s := testSpec(fmt.Sprintf("s-%d", i))
		s.Base = below
		ref, sb := newSandbox(t, p, s)
		script(t, sb, "fill", fill(i))
		below = fmt.Sprintf("b-%02d", i)
		if err := p.Freeze(t.Context(), ref, below); err != nil {
			t.Fatal(err)
		}
		if err := p.Destroy(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		keys = append(keys, below)
	}
	return keys
}

func infoOf(t *testing.T, p *Provider, key string) sandbox.BaseInfo {
	t.Helper()
	infos, err := p.Bases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		if i.Key == key {
			return i
		}
	}
	t.Fatalf("no base %s in %+v", key, infos)
	return sandbox.BaseInfo{}
}

// notFlattening waits until no process is left that makes chains shorter.
func notFlattening(t *testing.T, p *Provider) {
	t.Helper()
	eventually(t, "nobody shortens chains", func() bool { return !flattening(t, p) })
}

func flattening(t *testing.T, p *Provider) bool { return len(flatteners(t, p)) > 0 }

func flatteners(t *testing.T, p *Provider) []int {
	t.Helper()
	arg, err := json.Marshal(flattenOrder{p.dir, currentIdentity()})
	if err != nil {
		t.Fatal(err)
	}
	return pidsNaming(string(arg))
}

func TestALongChainOfBasesBecomesOneLayer(t *testing.T) {
	p := newProvider(t)
	keys := chain(t, p, maxChain, func(i int) string {
		switch i {
		case 0:
			return makeTree + " && " + deepPath
		case 5:
			return changeTree
		}
		return fmt.Sprintf("echo %d > f%d; echo %d > last; rm -f f%d", i, i, i, i-3)
	})
	top := keys[len(keys)-1]
	if flattening(t, p) || infoOf(t, p, top).Layers != maxChain {
		t.Fatalf("a chain of %d layers was touched: %+v", maxChain, infoOf(t, p, top))
	}
	// One more layer is too many. Whoever stands on the chain keeps it.
	s := testSpec("old")
	s.Base = top
	ref, old := newSandbox(t, p, s)
	const look = describeScript + "; cat /workspace/f* /workspace/last"
	want := script(t, old, "before", look)
	const inodes = "cd /workspace; stat -c '%n %i %Z' kept/* replaced/* last"
	wantInodes := script(t, old, "inodes", inodes)
	if err := p.Snapshot(t.Context(), ref, "long"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the chain is one layer", func() bool { return infoOf(t, p, "long").Layers == 1 })
	notFlattening(t, p)
	if got := script(t, old, "same", inodes); got != wantInodes {
		t.Errorf("a running sandbox saw it:\n%s", difference(got, wantInodes))
	}
	s = testSpec("new")
	s.Base = "long"
	newRef, fresh := newSandbox(t, p, s)
	if got := script(t, fresh, "look", look); got != want {
		t.Errorf("in a sandbox on the one layer:\n%s", difference(got, want))
	}
	if got := script(t, fresh, "deep", lookDeep); got != "bottom" {
		t.Errorf("at the end of a long path: %s", got)
	}
	// Chains begin anew on it.
	script(t, fresh, "change", "echo more > more")
	if err := p.Freeze(t.Context(), newRef, "next"); err != nil {
		t.Fatal(err)
	}
	if i := infoOf(t, p, "next"); i.Layers != 2 {
		t.Errorf("a base on the one layer: %+v", i)
	}
	if err := p.Destroy(t.Context(), newRef); err != nil {
		t.Fatal(err)
	}

	// What was copied is kept for as long as somebody stands on it, and gone
	// with the next look after that.
	list := func() {
		t.Helper()
		if _, err := p.List(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	list()
	if !isFolder(filepath.Join(basePath(p.dir, top), fsDir)) {
		t.Error("the chain was taken from under a running sandbox")
	}
	if err := p.RemoveBase(t.Context(), keys[0]); fault.KindOf(err) != fault.Conflict {
		t.Errorf("remove the lowest base: %v", err)
	}
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	list()
	if isFolder(filepath.Join(basePath(p.dir, "long"), fsDir)) {
		t.Error("what was copied is left though nobody stands on it")
	}
	for i := len(keys) - 1; i >= 0; i-- {
		if err := p.RemoveBase(t.Context(), keys[i]); err != nil {
			t.Errorf("remove %s: %v", keys[i], err)
		}
	}
	s = testSpec("last")
	s.Base = "next"
	_, sb := newSandbox(t, p, s)
	if got := script(t, sb, "look", "cat more last"); got != fmt.Sprintf("more\n%d", maxChain-1) {
		t.Error(got)
	}
	if err := p.RemoveBase(t.Context(), "long"); fault.KindOf(err) != fault.Conflict {
		t.Errorf("remove the one layer with a base on it: %v", err)
	}
}

// TestAKilledFlatteningIsDoneByTheNext kills it with kill -9 in the middle of
// the copy.
func TestAKilledFlatteningIsDoneByTheNext(t *testing.T) {
	p := newProvider(t)
	keys := chain(t, p, maxChain, func(i int) string {
		if i == 0 {
			return manyFiles
		}
		return fmt.Sprintf("echo %d > f%d", i, i)
	})
	top := keys[len(keys)-1]
	s := testSpec("user")
	s.Base = top
	ref, sb := newSandbox(t, p, s)
	want := script(t, sb, "sum", "cat $(find . -type f | sort) | sha256sum")
	if err := p.Freeze(t.Context(), ref, "long"); err != nil {
		t.Fatal(err)
	}
	var stages []string
	eventually(t, "a part is copied", func() bool {
		stages, _ = filepath.Glob(filepath.Join(p.dir, trashDir, "*", flatDir, "workspace", "*"))
		return len(stages) > 0
	})
	for _, pid := range flatteners(t, p) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "it is dead", func() bool { return !flattening(t, p) })
	if i := infoOf(t, p, "long"); i.Layers != maxChain+1 || i.Damaged {
		t.Fatalf("it was done, or did harm: %+v", i)
	}
	s = testSpec("next") // starts another one
	s.Base = "long"
	_, sb = newSandbox(t, p, s)
	if got := script(t, sb, "sum", "cat $(find . -type f | sort) | sha256sum"); got != want {
		t.Errorf("on the chain: %s, want %s", got, want)
	}
	eventually(t, "the chain is one layer", func() bool { return infoOf(t, p, "long").Layers == 1 })
	notFlattening(t, p)
	s = testSpec("flat")
	s.Base = "long"
	_, sb = newSandbox(t, p, s)
	if got := script(t, sb, "sum", "cat $(find . -type f | sort) | sha256sum"); got != want {
		t.Errorf("on the one layer: %s, want %s", got, want)
	}
	// newProvider wants an empty trash; a list takes what the dead one left.
	eventually(t, "the trash is empty", func() bool {
		if _, err := p.List(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		left, _ := os.ReadDir(filepath.Join(p.dir, trashDir))
		return len(left) == 0
	})
}

// TestAFlatteningDoesNotBringABaseBack removes the base while it is copied.
func TestAFlatteningDoesNotBringABaseBack(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("one"))
	script(t, sb, "fill", "echo one > file")
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	before, err := loadBase("test", p.dir, "base")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.RemoveBase(t.Context(), "base"); err != nil {
		t.Fatal(err)
	}
	o := flattenOrder{p.dir, currentIdentity()}
	flat := filepath.Join(t.TempDir(), "flat")
	if err := os.Mkdir(flat, 0o700); err != nil {
		t.Fatal(err)
	}
	swap := func() {
		t.Helper()
		if err := o.swap(t.Context(), before, flat, 1); err != nil {
			t.Error(err)
		}
	}
	swap()
	if left, err := os.ReadDir(filepath.Join(p.dir, basesDir)); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
	// The same when it was made anew meanwhile.
	ref, _ = newSandbox(t, p, testSpec("two"))
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	swap()
	if i := infoOf(t, p, "base"); i.Damaged || i.Layers != 1 || isFolder(filepath.Join(basePath(p.dir, "base"), flatDir)) {
		t.Errorf("%+v", i)
	}
}

// TestGitReadsNoFileAgainThatAForkDidNotChange asks git which entries of the
// index do not have the stat data that it remembers. Those it would read.
func TestGitReadsNoFileAgainThatAForkDidNotChange(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("no git")
	}
	p := newProvider(t)
	const stale = "git diff-files --name-only"
	stand := func(key, base string) (sandbox.Ref, *attached) {
		t.Helper()
		s := testSpec(key)
		s.Base = base
		return newSandbox(t, p, s)
	}
	ref, sb := stand("prepare", "")
	script(t, sb, "fill", `mkdir dir; for i in $(seq 50); do echo $i > dir/f$i; done; echo a > a; ln -s a link; touch -h -d '1 minute ago' a link dir/* # git looks twice at what is as young as its index
		git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm one && git status --porcelain`)
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	ref, sb = stand("fork", "base")
	if out := script(t, sb, "stale", stale); out != "" {
		t.Errorf("a fork of a frozen base reads again:\n%s", out)
	}
	if out := script(t, sb, "quiet", "stat -c %i.%Y.%Z .git/index > /tmp/i; git status --porcelain; stat -c %i.%Y.%Z .git/index | diff - /tmp/i"); out != "" {
		t.Errorf("git status wrote the index: %s", out)
	}
	script(t, sb, "change", "echo b > a; git add a; git status --porcelain")
	if err := p.Snapshot(t.Context(), ref, "snapshot"); err != nil {
		t.Fatal(err)
	}
	if out := script(t, sb, "after", stale); out != "" {
		t.Errorf("the sandbox that was copied reads again:\n%s", out)
	}
	_, sb = stand("fork-of-it", "snapshot")
	if out := script(t, sb, "stale", stale); out != "a" {
		t.Errorf("a fork of a snapshot reads again:\n%s\nwant only what was written in the sandbox: a", out)
	}
}

// TestAFrozenBaseIsWrittenByNobody tries what a fork could, and what others on
// the host could.
func TestAFrozenBaseIsWrittenByNobody(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("base"))
	script(t, sb, "fill", makeTree+` && echo 1 > open && chmod 666 open && chmod 777 kept && perl -e 'open F, ">>open"; sleep 1000' &
		while [ ! -e open ]; do :; done`)
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	look := func() string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "sh", "-c",
			`cd "$0" && find . -name used -o -printf '%p %y %m %U:%G %n %i %s %T@ %C@ %l\n' | sort && find . -type f ! -name used -exec sha256sum {} + | sort`, basePath(p.dir, "base")).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	want := look()

	s := testSpec("fork")
	s.Base = "base"
	_, fork := newSandbox(t, p, s)
	script(t, fork, "everything", `echo x >> open; echo x > kept/file; : > kept/changed; truncate -s 1M removed; chmod 600 link kept; touch -d 2000-01-01 kept kept/file
		ln kept/file another; mv moved moved-away; rm -r gone; rm -r replaced; mkdir replaced; touch replaced/new
		perl -e 'open F, "+<", "open"; seek F, 0, 0; print F "y"; close F; utime 1, 1, "open"; chmod 0, "open"; truncate "open", 0'
		perl -e 'use Fcntl; sysopen F, "/proc/self/fd/0", O_RDWR' < open
		grep overlay /proc/self/mounts | grep -c / > /dev/null; rm -rf .cache ~/.cache /tmp/*; true`)
	if mounts := script(t, fork, "mounts", "cat /proc/self/mountinfo"); strings.Contains(mounts, p.dir) {
		t.Errorf("a fork knows where its base is:\n%s", mounts)
	}
	if got := look(); got != want {
		t.Errorf("a fork has changed its base:\n%s", difference(got, want))
	}

	if os.Geteuid() != 0 {
		return // whoever runs the worker can write what is the worker's
	}
	// The agent's own id on the host, and nobody in particular. t.TempDir is
	// closed to others already: that is not what is tried here.
	for dir := p.dir; dir != "/"; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.Mode()&0o001 == 0 && dir != p.dir {
			if err := os.Chmod(dir, st.Mode()|0o011); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, uid := range []int{currentIdentity().agent(), ordinaryUser} {
		cmd := exec.CommandContext(context.Background(), "sh", "-c",
			`cd "$0" 2>&1; ls "$0" 2>&1; echo x 2>&1 >> "$0/fs/workspace/open"; echo x 2>&1 > "$0/fs/workspace/kept/new"; rm -rf "$0" 2>&1; chmod 777 "$0" 2>&1`, basePath(p.dir, "base"))
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		out, err := cmd.CombinedOutput()
		if err == nil || strings.Count(string(out), "ermission denied") < 5 {
			t.Errorf("uid %d: %v\n%s", uid, err, out)
		}
		if got := look(); got != want {
			t.Errorf("uid %d has changed the base:\n%s", uid, difference(got, want))
		}
	}
}

// TestABaseIsNotRemovedFromUnderACreate has both happen at once.
func TestABaseIsNotRemovedFromUnderACreate(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	started, refused := 0, 0
	for i := range 20 {
		key := fmt.Sprintf("base-%d", i)
		ref, sb := newSandbox(t, p, testSpec(key))
		script(t, sb, "fill", "echo "+key+" > file")
		if err := p.Freeze(ctx, ref, key); err != nil {
			t.Fatal(err)
		}
		if err := p.Destroy(ctx, ref); err != nil {
			t.Fatal(err)
		}
		s := testSpec(fmt.Sprintf("fork-%d", i))
		s.Base = key
		removed := make(chan error, 1)
		go func() { removed <- p.RemoveBase(ctx, key) }()
		ref, err := p.Create(ctx, s)
		removeErr := <-removed
		switch {
		case err == nil && fault.KindOf(removeErr) == fault.Conflict:
			started++
			fork, err := p.Attach(ctx, ref)
			if err != nil {
				t.Fatal(err)
			}
			if out := script(t, fork, "look", "cat file"); out != key {
				t.Errorf("%s", out)
			}
			fork.Close()
			if err := p.Destroy(ctx, ref); err != nil {
				t.Error(err)
			}
			if err := p.RemoveBase(ctx, key); err != nil {
				t.Errorf("when the fork is gone: %v", err)
			}
		case fault.KindOf(err) == fault.NotFound && removeErr == nil:
			refused++
		default:
			t.Errorf("create: %v, remove: %v", err, removeErr)
		}
	}
	t.Logf("%d were started, %d came too late", started, refused)
}

func TestTheDeadStandOnNothing(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("one"))
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("fork")
	s.Base = "base"
	ref, _ = newSandbox(t, p, s)
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(h.Supervisor.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the base can be removed", func() bool {
		err := p.RemoveBase(t.Context(), "base")
		if err != nil && fault.KindOf(err) != fault.Conflict {
			t.Fatal(err)
		}
		return err == nil
	})
}
