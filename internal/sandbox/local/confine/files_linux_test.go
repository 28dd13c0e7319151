package confine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// With this word as its first argument the test binary confines itself and
// says what it can still do.
const confinedWord = "test-confined"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == confinedWord {
		os.Exit(beConfined(os.Args[2]))
	}
	os.Exit(m.Run())
}

func beConfined(dir string) int {
	inside, outside := filepath.Join(dir, "inside"), filepath.Join(dir, "outside")
	if err := Files(Places{Folders: []string{inside}, Devices: []string{"/dev"}, Process: []string{"/proc"}}); err != nil {
		panic(err)
	}
	can := map[string]bool{}
	try := func(what string, err error) { can[what] = err == nil }
	write := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, fmt.Sprint("by-", unix.Gettid())), nil, 0o600)
	}
	try("write inside", write(inside))
	try("write outside", write(outside))
	try("write to a device", os.WriteFile(os.DevNull, []byte("x"), 0))
	try("write to the process", os.WriteFile("/proc/self/comm", []byte("x"), 0))
	_, err := os.ReadFile(filepath.Join(outside, "file"))
	try("read outside", err)
	try("execute outside", exec.Command("/bin/sh", "-c", "exit 0").Run())
	try("move inside", os.Rename(filepath.Join(inside, "a", "file"), filepath.Join(inside, "b", "file")))
	try("move outside", os.Rename(filepath.Join(inside, "b", "file"), filepath.Join(outside, "moved")))
	try("truncate outside", os.Truncate(filepath.Join(outside, "file"), 0))
	try("remove outside", os.Remove(filepath.Join(outside, "file")))
	try("write outside through a link", write(filepath.Join(inside, "link")))
	try("let a child write outside", exec.Command("/bin/sh", "-c", "echo > '"+outside+"/child'").Run())
	c, err := net.Dial("unix", "@confine-test-"+filepath.Base(dir))
	if err == nil {
		c.Close()
	}
	try("call an abstract socket", err)
	try("signal its parent", unix.Kill(os.Getppid(), 0))
	var wg sync.WaitGroup
	var mu sync.Mutex
	var arrive sync.WaitGroup
	arrive.Add(8)
	for range 8 { // each on a thread of its own
		wg.Go(func() {
			runtime.LockOSThread()
			arrive.Done()
			arrive.Wait()
			err := write(outside)
			mu.Lock()
			defer mu.Unlock()
			can["write outside on some thread"] = can["write outside on some thread"] || err == nil
		})
	}
	wg.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(can); err != nil {
		panic(err)
	}
	return 0
}

func TestFilesAreWrittenInPlacesOnly(t *testing.T) {
	if abi := LandlockABI(); abi < ScopedLandlock {
		t.Skipf("this kernel has version %d of Landlock", abi)
	}
	dir := t.TempDir()
	for _, d := range []string{"inside/a", "inside/b", "outside"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"inside/a/file", "outside/file"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../outside", filepath.Join(dir, "inside", "link")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", "@confine-test-"+filepath.Base(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", confinedWord, dir)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	var can map[string]bool
	if err := json.Unmarshal(out.Bytes(), &can); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	want := map[string]bool{
		"write inside": true, "write to a device": true, "write to the process": true, "read outside": true, "execute outside": true, "move inside": true,
		"write outside": false, "move outside": false, "truncate outside": false, "remove outside": false, "write outside through a link": false,
		"let a child write outside": false, "call an abstract socket": false, "signal its parent": false, "write outside on some thread": false,
	}
	if diff := cmp.Diff(want, can); diff != "" {
		t.Errorf("what it can do, -want +got:\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(dir, "outside", "child")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the child wrote: %v", err)
	}
}
