package repo

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// The user works in the repository while branches arrive in it.
func TestDeliveryTouchesNothingButTheBranch(t *testing.T) {
	dir := home(t)
	s, source := newStore(t), repository(t)
	b := resolve(t, s, source, "")
	ran := filepath.Join(dir, "ran")
	for _, h := range []string{"reference-transaction", "post-update", "update", "pre-receive", "post-receive", "pre-auto-gc", "post-index-change"} {
		write(t, filepath.Join(source, ".git", "hooks", h), "#!/bin/sh\necho "+h+" >>'"+ran+"'\nexit 1\n")
		if err := os.Chmod(filepath.Join(source, ".git", "hooks", h), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(source, "README"), "not committed\n")
	write(t, filepath.Join(source, "staged"), "staged\n")
	git(t, source, "-c", "core.hooksPath=/dev/null", "add", "staged")
	for _, kv := range []string{"gc.auto=1", "fetch.prune=true", "fetch.writeCommitGraph=true", "fetch.recurseSubmodules=true", "maintenance.auto=true",
		"remote.origin.url=/nowhere", "remote.origin.fetch=+refs/heads/*:refs/remotes/origin/*", "remote.pushDefault=origin"} {
		key, value, _ := strings.Cut(kv, "=")
		git(t, source, "config", key, value)
	}
	git(t, source, "-c", "core.hooksPath=/dev/null", "update-ref", "refs/remotes/origin/gone", "HEAD")
	// What git needs to write for a branch, and no more.
	except := func(rel string) bool {
		for _, p := range []string{".git/objects", ".git/refs/heads/sandbox", ".git/logs/refs/heads/sandbox"} {
			if rel == p || strings.HasPrefix(rel, p+"/") {
				return true
			}
		}
		return false
	}
	before := snapshot(t, source, except)
	if _, there := before[".git/index"]; !there {
		t.Fatal("the snapshot lacks the index")
	}
	_, got := madeFork(t, s, b, func(work string) { write(t, filepath.Join(work, "x"), "x\n") })
	if d := cmp.Diff(before, snapshot(t, source, except)); d != "" {
		t.Errorf("changed: %s", d)
	}
	if text, err := os.ReadFile(ran); err == nil {
		t.Errorf("hooks ran: %s", text)
	}
	if id := git(t, source, "rev-parse", got.Branch); id != got.Commit {
		t.Errorf("the branch is at %s", id)
	}
}

func TestManyForksDeliverAtOnce(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	b := resolve(t, s, source, "")
	const n = 8
	var ins [n]ReceiveInput
	for i := range n {
		work := sandbox(t, s, b)
		write(t, filepath.Join(work, "x"), fmt.Sprint(i))
		commit(t, work, "work")
		ins[i] = bundled(t, work, b)
		ins[i].Num = i + 1
	}
	other := New(Options{Dir: s.dir}) // as in another process
	var wg sync.WaitGroup
	var got [n]Received
	for i := range n {
		wg.Go(func() {
			var err error
			got[i], err = []*Store{s, other}[i%2].Receive(t.Context(), ins[i])
			if err != nil || !got[i].Delivered {
				t.Errorf("%d: %+v, %v", i, got[i], err)
			}
		})
	}
	wg.Wait()
	for i := range n {
		if text := git(t, source, "show", got[i].Branch+":x"); text != fmt.Sprint(i) {
			t.Errorf("%s holds %q", got[i].Branch, text)
		}
	}
	git(t, source, "fsck", "--strict")
}

// The work is kept, and it is said why the user's repository lacks it.
func TestWhatCannotBeDeliveredIsKept(t *testing.T) {
	home(t)
	s, source := newStore(t), repository(t)
	b := resolve(t, s, source, "")
	in, got := madeFork(t, s, b, func(work string) { write(t, filepath.Join(work, "x"), "x\n") })

	// The branch is checked out: the same again is fine, another one is not.
	git(t, source, "checkout", "-q", got.Branch)
	receive(t, s, in)
	work := sandbox(t, s, b)
	write(t, filepath.Join(work, "x"), "other\n")
	commit(t, work, "other")
	got, err := s.Receive(t.Context(), bundled(t, work, b))
	if err != nil || got.Delivered || fault.KindOf(got.Undelivered) != fault.Conflict || fault.HintOf(got.Undelivered) == "" {
		t.Errorf("%+v, %v", got, err)
	}
	if d := diff(t, s, DiffOptions{}); !strings.Contains(d, "+other") {
		t.Errorf("diff %q", d)
	}
	// Out of the way, the next call delivers.
	git(t, source, "checkout", "-q", "main")
	if got, err = s.Receive(t.Context(), bundled(t, work, b)); err != nil || !got.Delivered {
		t.Errorf("%+v, %v", got, err)
	}

	// A branch of the user stands where the folder of ours would be.
	git(t, source, "update-ref", "-d", "refs/heads/"+got.Branch)
	git(t, source, "branch", "sandbox")
	if got, err = s.Receive(t.Context(), bundled(t, work, b)); err != nil || got.Delivered || fault.KindOf(got.Undelivered) != fault.Conflict {
		t.Errorf("%+v, %v", got, err)
	}
	// The user's git holds a lock for a moment; here, for ever.
	git(t, source, "branch", "-D", "sandbox")
	lock := filepath.Join(source, ".git", "refs", "heads", got.Branch+".lock")
	write(t, lock, "")
	if got, err = s.Receive(t.Context(), bundled(t, work, b)); err != nil || got.Delivered {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := os.Stat(lock); err != nil {
		t.Errorf("a lock of the user was removed: %v", err)
	}
}
