package local

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestAStateFolderWhereNothingCanLiveIsSaidSo(t *testing.T) {
	for kind, word := range map[int64]string{0x6969: "NFS", 0x01021997: "9p", 0xEF53: "", 0x01021994: ""} {
		err := fileSystemFault("test", "/state", kind)
		if word == "" {
			if err != nil {
				t.Errorf("%x: %v", kind, err)
			}
			continue
		}
		if fault.KindOf(err) != fault.Unsupported || !strings.Contains(err.Error(), word) || fault.HintOf(err) == "" {
			t.Errorf("%x: %v", kind, err)
		}
	}
	// As a number with a sign, where the kernel has one.
	if err := fileSystemFault("test", "/state", int64(int32(-0x00acb2be))); err == nil { // 0xff534d42
		t.Error("SMB passed as a number below zero")
	}
}

// TestAContainersOwnFilesAreNoStateFolder puts it on an overlay, as the root of
// a container is.
func TestAContainersOwnFilesAreNoStateFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting an overlay here needs root")
	}
	dir := t.TempDir()
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(dir, "merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+"/work"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(merged, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	o := testOptions(filepath.Join(merged, "state"))
	_, err := New(o).Create(t.Context(), testSpec("none"))
	if fault.KindOf(err) != fault.Unsupported || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_HOME") {
		t.Errorf("%v (%s)", err, fault.HintOf(err))
	}
	found := Check(t.Context(), o)
	last := found[len(found)-1]
	if last.Name != "file system" || last.OK || last.Hint == "" {
		t.Errorf("%+v", found)
	}
}

func TestAStateFolderInMemoryWorks(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "sandbox-local-")
	if err != nil {
		t.Skip(err)
	}
	p := New(testOptions(filepath.Join(dir, "state")))
	t.Cleanup(func() {
		dropAllBases(t, p)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	ref, sb := newSandbox(t, p, testSpec("one"))
	script(t, sb, "fill", makeTree)
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("fork")
	s.Base = "base"
	ref, sb = newSandbox(t, p, s)
	script(t, sb, "change", changeTree)
	want := script(t, sb, "look", describeScript)
	if err := p.Snapshot(t.Context(), ref, "snapshot"); err != nil {
		t.Fatal(err)
	}
	s = testSpec("again")
	s.Base = "snapshot"
	_, sb = newSandbox(t, p, s)
	if got := script(t, sb, "look", describeScript); got != want {
		t.Errorf("%s", difference(got, want))
	}
}
