package gateway

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// A disk that is really full: nothing is forwarded until there is room, and what
// was under way meanwhile is in the books afterwards.
func TestFullDiskStopsForwarding(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size=4m"); err != nil {
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
			t.Skipf("mounting a small file system needs root: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r := openRig(t, dir, newUpstream(t))
	token, other := r.grant(Account{Run: "r", Fork: 1}), r.grant(Account{Run: "r", Fork: 2})
	done := make(chan answer, 1)
	go func() { done <- r.send(token, message{max: 10, script: script{Fault: "gate", Out: 7}}) }()
	until(t, "the call is upstream", func() bool { return r.up.count() == 1 })

	filler := filepath.Join(dir, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if closed := f.Close(); !errors.Is(err, syscall.ENOSPC) || closed != nil {
		t.Fatal(err, closed)
	}
	// What SQLite has of its log is used again, so a few calls may still fit.
	until(t, "calls are refused", func() bool {
		return r.send(other, message{max: 10, script: script{Out: 1}}).status == 503
	})
	before := r.up.count()
	for range 5 {
		if a := r.send(other, message{max: 10}); a.status != 503 || a.kind() != "api_error" || a.header.Get("X-Should-Retry") == "false" {
			t.Errorf("%+v", a)
		}
	}
	close(r.up.gate)
	if a := <-done; a.status != 200 {
		t.Errorf("%+v", a)
	}
	if n := r.up.count(); n != before {
		t.Errorf("%d calls were forwarded without a reservation", n-before)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	until(t, "calls go out again", func() bool {
		return r.send(other, message{max: 10, script: script{Out: 1}}).status == 200
	})
	r.agree("r")
	if got := r.usage("r", 0); got.Cost != r.up.billed() {
		t.Errorf("%s, billed %s", got.Cost, r.up.billed())
	}
	if got := r.usage("r", 1); got.Calls != 1 {
		t.Errorf("the call that was under way: %+v", got)
	}
}
