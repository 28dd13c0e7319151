package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func FuzzFrame(f *testing.F) {
	whole, err := encodeFrame(answer{Seq: 7, Ended: &ended{ID: "x", Exit: sandbox.Exit{Code: 1}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var a answer
		if err := decodeFrame(bytes.NewReader(b), &a, 1<<16); err != nil {
			return
		}
		again, err := encodeFrame(a)
		if err != nil {
			t.Fatal(err)
		}
		var c answer
		if err := decodeFrame(bytes.NewReader(again), &c, 1<<20); err != nil {
			t.Fatalf("%q does not come back: %v", b, err)
		}
	})
}

func FuzzHandle(f *testing.F) {
	f.Add(handle{Key: "key", Instance: "0123456789abcdef", Supervisor: processID{PID: 2}}.ref().Handle)
	f.Add(`{"key":"..","instance":"../../../../../x"}`)
	f.Fuzz(func(t *testing.T, s string) {
		h, err := readHandle("fuzz", sandbox.Ref{Provider: ProviderName, Version: refVersion, Handle: s})
		if err != nil {
			return
		}
		// What is let through becomes the name of one file.
		for _, name := range []string{keyName(h.Key), h.Instance} {
			if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." || name == "" {
				t.Fatalf("%q became the file name %q", s, name)
			}
		}
	})
}

func FuzzStartTime(f *testing.F) {
	self, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(self)
	f.Add([]byte("1 (a) b) R 1 2"))
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = startTime(b) })
}

func TestStartTimeIsThatOfTheProcessWhateverItIsCalled(t *testing.T) {
	const rest = " S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9"
	for _, name := range []string{"sh", "a b", ") R 1 1 1", "((", ""} {
		if got, err := startTime([]byte("42 (" + name + ")" + rest)); err != nil || got != 4711 {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
}

func TestIdentityIsRootsOnlyWhereRootHasTheIDs(t *testing.T) {
	rows := []struct {
		idMap string
		want  bool
	}{
		{"         0          0 4294967295\n", true},
		{"0 100000 65536\n", false},
		{"0 1000 1\n1 100000 65536\n", false},
		{"0 0 1000\n1000 1000 2000000000\n", true},
		{"", false},
		{"nonsense", false},
	}
	for _, r := range rows {
		if got := covers([]byte(r.idMap), hostIDs, hostIDCount); got != r.want {
			t.Errorf("%q: %v", r.idMap, got)
		}
	}
}

func TestRemoveTreeTakesWhatAnAgentCanMake(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(top, "wide"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		if err := os.WriteFile(filepath.Join(top, "wide", strings.Repeat("n", 1+i%200)+string(rune('a'+i%26))+filepath.Base(newInstance())), nil, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link": outside, "up": "..", "new\nline": "x", "bad\xff": "y"} {
		if err := os.Symlink(target, filepath.Join(top, name)); err != nil {
			t.Fatal(err)
		}
	}
	// Deeper than there are descriptors, and longer than a path can be.
	dir, err := unix.Open(top, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		if err := unix.Mkdirat(dir, "deep", 0o700); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(dir, "deep", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(dir)
		if err != nil {
			t.Fatal(err)
		}
		dir = next
	}
	unix.Close(dir)
	for _, name := range []string{"closed/a/b", "empty"} {
		if err := os.MkdirAll(filepath.Join(top, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"closed/a", "closed", "empty"} {
		if err := os.Chmod(filepath.Join(top, name), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeTree(top, "last"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(top); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	if _, err := os.Lstat(outside); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
	if err := removeTree(top, "last"); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestLockIsLetGoByTheLastCopy(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	open := func() *os.File {
		t.Helper()
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	held := open()
	if err := lock(t.Context(), held, true); err != nil {
		t.Fatal(err)
	}
	if err := lock(t.Context(), open(), false); !errors.Is(err, errLocked) {
		t.Fatalf("%v", err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	given := open()
	if err := lock(soon, given, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	given.Close()
	waiting := open()
	got := make(chan error, 1)
	go func() { got <- lock(t.Context(), waiting, true) }()
	held.Close()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestFaultsCrossTheWire(t *testing.T) {
	in := fault.New("op", fault.Full, "no room for %s", strings.Repeat("x", 2*maxText)).Hinted("Make some.")
	b, err := json.Marshal(toWire(in))
	if err != nil {
		t.Fatal(err)
	}
	var w wireFault
	if err := json.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	out := w.err("there")
	if fault.KindOf(out) != fault.Full || fault.HintOf(out) != "Make some." || len(out.Error()) > maxText+20 {
		t.Errorf("%d bytes: %v", len(out.Error()), out)
	}
	if toWire(nil).err("there") != nil {
		t.Error("no fault became one")
	}
}

func TestCheckFindsWhatWorks(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "state")
	found := Check(t.Context(), testOptions(dir))
	if len(found) != 9 {
		t.Fatalf("%d findings: %v", len(found), found)
	}
	for _, f := range found {
		if !f.OK && !f.Optional { // an ordinary user does without cgroups
			t.Errorf("%s\n%s", f, f.Hint)
		}
		if f.Text == "" || f.OK != (f.Hint == "") {
			t.Errorf("%+v", f)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	found = Check(t.Context(), Options{Dir: dir, Supervisor: []string{"/no/such/program"}})
	if last := found[len(found)-1]; last.OK || last.Hint == "" {
		t.Errorf("%+v", last)
	}
}

func BenchmarkCreateDestroy(b *testing.B) {
	p := newProvider(b)
	ref, err := p.Create(b.Context(), testSpec("prepare"))
	if err != nil {
		b.Fatal(err)
	}
	if err := p.Freeze(b.Context(), ref, "base"); err != nil {
		b.Fatal(err)
	}
	if err := p.Destroy(b.Context(), ref); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s := testSpec("bench")
		s.Base = "base"
		ref, err := p.Create(b.Context(), s)
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Destroy(b.Context(), ref); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCommand(b *testing.B) {
	p := newProvider(b)
	_, sb := newSandbox(b, p, testSpec("bench"))
	n := 0
	for b.Loop() {
		n++
		proc, err := sb.Start(b.Context(), "c-"+newInstance(), sandbox.Cmd{Args: []string{"true"}})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := proc.Wait(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func TestSuperviseByHandExplainsItself(t *testing.T) {
	for _, args := range [][]string{nil, {"help"}, {runWord}, {initWord, "x"}} {
		if code := Supervise(args); code != 2 {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
}
func TestTheLastWholeLineOfALifeFileHolds(t *testing.T) {
	dir := t.TempDir()
	f, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if left, err := f.readRemains(); err != nil || !reflect.DeepEqual(left, remains{}) {
		t.Errorf("without a file: %+v, %v", left, err)
	}
	if err := os.WriteFile(filepath.Join(dir, lifeFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := remains{Init: processID{PID: 7, Start: 8, Boot: "b"}, Cgroups: []string{"/c"}}
	for _, left := range []remains{{Cgroups: []string{"/c"}}, want} {
		if err := f.writeRemains(left); err != nil {
			t.Fatal(err)
		}
	}
	torn, err := os.OpenFile(filepath.Join(dir, lifeFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer torn.Close()
	for _, text := range []string{"", `{"init":{"pid":9`} {
		if _, err := torn.WriteString(text); err != nil {
			t.Fatal(err)
		}
		if left, err := f.readRemains(); err != nil || !reflect.DeepEqual(left, want) {
			t.Errorf("%+v, %v", left, err)
		}
	}
}
