package cgroup

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// lookWord makes the test binary say which place it finds, as an ordinary
// user or not.
const lookWord = "look-for-a-place"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == lookWord {
		os.Exit(look(os.Args[2]))
	}
	os.Exit(m.Run())
}

func newName() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// place returns where this test may make groups that enforce l.
func place(t *testing.T, l sandbox.Limits) Place {
	t.Helper()
	p := Find()
	if missing := p.Missing(l); len(missing) > 0 {
		t.Skipf("no group that we can make here (%s) limits: %v", p, missing)
	}
	return p
}

// made makes a group that goes with the test.
func made(t *testing.T, p Place, l sandbox.Limits) *Group {
	t.Helper()
	g := p.Group(newName())
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := g.Remove(ctx); err != nil {
			t.Error(err)
		}
		for _, path := range g.Paths() {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
	})
	if err := errors.Join(g.Make(), g.Limit(l)); err != nil {
		t.Fatal(err)
	}
	return g
}

// start runs a shell script in the group: it does nothing before it is there.
func start(t *testing.T, g *Group, script string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "read go; "+script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = 10 * time.Second
	cloned := g.Dir() != nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, UseCgroupFD: cloned}
	if cloned {
		cmd.SysProcAttr.CgroupFD = int(g.Dir().Fd())
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Add(cmd.Process.Pid, cloned); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

func TestMemoryLimitKillsAndIsHeardOf(t *testing.T) {
	l := sandbox.Limits{MemoryBytes: 64 << 20}
	g := made(t, place(t, l), l)
	heard := make(chan error, 1)
	go func() {
		n, err := g.AwaitOOM(0)
		if err == nil && n < 1 {
			err = fmt.Errorf("heard of %d", n)
		}
		heard <- err
	}()
	if n := g.OOMs(); n != 0 {
		t.Fatalf("%d killed before anything was started", n)
	}
	// It holds what it takes, and takes no more than it has to.
	cmd, _ := start(t, g, "{ head -c 300000000 /dev/zero; sleep 30; } | tail")
	select {
	case err := <-heard:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Errorf("300 MB fit into 64 MiB: %+v", g.Usage())
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

func TestWaitingForMemoryEndsWithTheGroup(t *testing.T) {
	l := sandbox.Limits{MemoryBytes: 64 << 20}
	g := made(t, place(t, l), l)
	over := make(chan error, 1)
	go func() {
		_, err := g.AwaitOOM(0)
		over <- err
	}()
	g.Close()
	select {
	case err := <-over:
		if err == nil {
			t.Error("it heard of something")
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits for ever")
	}
}

func TestProcessLimitFailsForks(t *testing.T) {
	l := sandbox.Limits{Processes: 20}
	g := made(t, place(t, l), l)
	cmd, out := start(t, g, "i=0; while [ $i -lt 60 ]; do sleep 30 & i=$((i+1)); done; echo all")
	eventually(t, "the group is full", func() bool { return g.Usage().Processes >= 19 })
	if n := g.Usage().Processes; n > 20 {
		t.Errorf("%d processes, 20 are allowed", n)
	}
	ctx := t.Context()
	if err := g.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if strings.Contains(out.String(), "all") {
		t.Errorf("60 processes were started: %s", out)
	}
}

func TestCPUQuotaHolds(t *testing.T) {
	l := sandbox.Limits{CPUMillis: 100}
	g := made(t, place(t, l), l)
	// Four busy loops, which would take all there is.
	begin := time.Now()
	cmd, out := start(t, g, "for i in 1 2 3 4; do (while :; do :; done) & all=\"$all $!\"; done; sleep 2; kill $all; wait")
	if err := cmd.Wait(); err != nil {
		t.Logf("%v: %s", err, out)
	}
	used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	most := time.Since(begin)/10 + 300*time.Millisecond
	if used > most {
		t.Errorf("%v of CPU time in %v, at most %v should have been", used, time.Since(begin), most)
	}
	if used < 50*time.Millisecond {
		t.Errorf("%v of CPU time: nothing ran", used)
	}
}

func TestGroupIsFrozenAndThawed(t *testing.T) {
	found := Find()
	rows := map[string]Place{}
	if found.unified != "" {
		rows["v2"] = Place{unified: found.unified, ours: found.ours, lift: found.lift, divide: found.divide}
	}
	if dir := filepath.Join(mountPoint, freezer); os.Geteuid() == 0 && isV1(dir) {
		rows["v1"] = Place{v1: map[string]string{freezer: filepath.Join(dir, folder)}}
	}
	if len(rows) == 0 {
		t.Skip("no group can be made here")
	}
	for name, p := range rows {
		t.Run(name, func(t *testing.T) {
			g := made(t, p, sandbox.Limits{})
			file := filepath.Join(t.TempDir(), "ticks")
			cmd, _ := start(t, g, "while :; do echo x >>"+file+"; sleep 0.01; done")
			size := func() int64 {
				st, err := os.Stat(file)
				if err != nil {
					return 0
				}
				return st.Size()
			}
			eventually(t, "it ticks", func() bool { return size() > 4 })
			ctx := t.Context()
			for range 2 {
				if err := g.Freeze(ctx); err != nil {
					t.Fatal(err)
				}
			}
			before := size()
			time.Sleep(100 * time.Millisecond) // nothing shall happen: there is no condition to wait for
			if after := size(); after != before {
				t.Errorf("it ticked on: %d, %d", before, after)
			}
			if err := g.Thaw(ctx); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it ticks again", func() bool { return size() > before })
			// Also what is frozen can be killed.
			if err := g.Freeze(ctx); err != nil {
				t.Fatal(err)
			}
			soon, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			if err := g.Kill(soon); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if left := g.Pids(); len(left) > 0 {
				t.Errorf("%v still live", left)
			}
		})
	}
}

func TestNothingCanBeFrozenInNoGroup(t *testing.T) {
	var none *Group
	for _, g := range []*Group{none, {}, Place{}.Group(newName())} {
		if err := g.Freeze(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("freeze: %v", err)
		}
		if err := errors.Join(g.Make(), g.Limit(sandbox.Limits{MemoryBytes: 1}), g.Kill(t.Context()), g.Remove(t.Context()), g.Add(1, false)); err != nil {
			t.Error(err)
		}
		if g.Usage() != (sandbox.Usage{}) || g.OOMs() != 0 || len(g.Paths()) != 0 || g.Dir() != nil {
			t.Error("nobody's group uses something")
		}
	}
}

func TestUsageIsThatOfTheGroup(t *testing.T) {
	l := sandbox.Limits{MemoryBytes: 256 << 20, Processes: 50, CPUMillis: 1000}
	g := made(t, place(t, l), l)
	cmd, _ := start(t, g, "{ head -c 20000000 /dev/zero; sleep 30; } | tail")
	eventually(t, "it holds 20 MB", func() bool { return g.Usage().MemoryBytes > 20_000_000 })
	u := g.Usage()
	if u.MemoryBytes > 90_000_000 || u.Processes < 3 || u.Processes > 5 || u.CPU <= 0 || u.CPU > time.Minute {
		t.Errorf("%+v", u)
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

func TestAGroupIsFoundAgainByItsPaths(t *testing.T) {
	p := Find()
	if p.String() == "nowhere" {
		t.Skip("no group can be made here")
	}
	g := made(t, p, sandbox.Limits{})
	cmd, _ := start(t, g, "trap '' TERM; while :; do sleep 1; done")
	again := Open(g.Paths())
	if !slices.Equal(again.Paths(), g.Paths()) {
		t.Fatalf("%v, want %v", again.Paths(), g.Paths())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 2 {
		if err := again.Remove(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it was not killed")
	}
}

func TestWhatIsNoGroupOfOursIsLeftAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), prefix+"0123456789abcdef")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	g := Open([]string{"", dir, mountPoint, filepath.Join(mountPoint, "unified"), filepath.Join(mountPoint, "memory"), "/no/such"})
	if len(g.Paths()) != 0 {
		t.Errorf("took %v for groups", g.Paths())
	}
	// Not even under the right name, when the group's file system is gone.
	if err := (&Group{parts: []part{{path: dir}, {path: dir, v1: memory}}}).Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}

func TestForgottenGroupsAreSweptAndOthersAreNot(t *testing.T) {
	p := Find()
	if p.String() == "nowhere" {
		t.Skip("no group can be made here")
	}
	living, forgotten, strange := made(t, p, sandbox.Limits{}), made(t, p, sandbox.Limits{}), p.Group("of-somebody-else")
	t.Cleanup(func() { _ = strange.Remove(context.Background()) })
	if err := strange.Make(); err != nil {
		t.Fatal(err)
	}
	start(t, living, "while :; do sleep 1; done")
	ours := func(name string) bool { return filepath.Base(forgotten.Paths()[0]) == prefix+name }
	there := func(g *Group) int {
		n := 0
		for _, path := range g.Paths() {
			if _, err := os.Stat(path); err == nil {
				n++
			}
		}
		return n
	}
	if err := p.Sweep(time.Now(), ours); err != nil {
		t.Fatal(err)
	}
	if there(forgotten) != len(forgotten.Paths()) {
		t.Error("swept before its time")
	}
	// Whoever lives in one keeps it, whatever it is called.
	all := func(name string) bool { return ours(name) || filepath.Base(living.Paths()[0]) == prefix+name }
	if err := p.Sweep(time.Now().Add(2*orphanAge), all); err != nil {
		t.Fatal(err)
	}
	if n := there(forgotten); n != 0 {
		t.Errorf("%d folders were not swept", n)
	}
	if there(strange) != len(strange.Paths()) || there(living) != len(living.Paths()) {
		t.Error("another's was swept")
	}
}

func TestMakingAndRemovingAtOnceLeavesNothing(t *testing.T) {
	p := Find()
	if p.String() == "nowhere" {
		t.Skip("no group can be made here")
	}
	l := sandbox.Limits{MemoryBytes: 1 << 30, Processes: 100}
	errs := make(chan error)
	for range 8 {
		go func() {
			for range 20 {
				g := p.Group(newName())
				if err := errors.Join(g.Make(), g.Limit(l), g.Remove(context.Background())); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// A found is what a process in a group of its own finds.
type found struct {
	Unified      string
	Ours, Divide bool
	Hands        []string
	Made         string // an error
	Own          string // where it was afterwards
}

func look(user string) int {
	p := find(mountPoint, user == "root")
	f := found{Unified: p.unified, Ours: p.ours, Divide: p.divide, Hands: p.hands}
	g := p.Group(newName())
	if err := errors.Join(g.Make(), g.Limit(sandbox.Limits{})); err != nil {
		f.Made = err.Error()
	}
	top := strings.TrimSuffix(p.unified, "/"+folder)
	for _, t := range []string{mountPoint, mountPoint + "/unified"} {
		if isUnified(t) {
			top = t
		}
	}
	f.Own = ownGroup(top)
	if err := g.Remove(context.Background()); err != nil {
		f.Made += " " + err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(f); err != nil {
		return 1
	}
	return 0
}

func TestWhatWasDelegatedIsDividedAndNothingElse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can delegate")
	}
	top := mountPoint
	if !isUnified(top) {
		top = filepath.Join(top, "unified")
	}
	if !isUnified(top) || unix.Access(top, unix.W_OK) != nil {
		t.Skip("no cgroup v2 that we may write to is mounted here")
	}
	const uid = 64321
	for _, row := range []struct {
		name     string
		uid      int
		chown    bool
		mark     bool // as systemd does
		stranger bool // somebody else lives there too
		within   bool // groups are made in the service's own
		divided  bool
	}{
		{name: "a service of root", uid: 0},
		{name: "a delegated service of root", uid: 0, mark: true, within: true, divided: true},
		{name: "a delegated service of root, not alone", uid: 0, mark: true, stranger: true, within: true, divided: true},
		{name: "a service of an ordinary user", uid: uid},
		{name: "a folder that an ordinary user was given", uid: uid, chown: true, within: true, divided: true},
		{name: "an ordinary user's session", uid: uid, chown: true, stranger: true, within: true},
		{name: "a delegated session", uid: uid, chown: true, mark: true, stranger: true, within: true, divided: true},
	} {
		t.Run(row.name, func(t *testing.T) {
			dir := filepath.Join(top, "sandbox-test-"+newName())
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			service := &Group{parts: []part{{path: dir}}}
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				if err := service.Kill(ctx); err != nil {
					t.Error(err)
				}
				_ = unix.Rmdir(filepath.Join(dir, leaf))
				if err := unix.Rmdir(dir); err != nil {
					t.Error(err)
				}
			})
			if row.mark {
				if err := unix.Setxattr(dir, "user.delegate", []byte("1"), 0); err != nil {
					t.Skipf("groups cannot be marked here: %v", err)
				}
			}
			if row.chown {
				for _, name := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
					if err := os.Chown(filepath.Join(dir, name), row.uid, row.uid); err != nil {
						t.Fatal(err)
					}
				}
			}
			fd, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer fd.Close()
			in := &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd())}
			if row.stranger {
				other := exec.CommandContext(t.Context(), "sleep", "60")
				other.SysProcAttr = in
				if err := other.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = other.Wait() })
			}
			who := "root"
			if row.uid != 0 {
				who = "user"
			}
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe", lookWord, who)
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: in.CgroupFD, Credential: &syscall.Credential{Uid: uint32(row.uid), Gid: uint32(row.uid)}}
			cmd.Dir = "/"
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			var f found
			if err := json.Unmarshal(out, &f); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if f.Made != "" {
				t.Error(f.Made)
			}
			if within := f.Unified == dir; within != row.within || f.Divide != row.divided {
				t.Errorf("%+v", f)
			}
			if row.uid == 0 && !row.within && (f.Unified != filepath.Join(top, folder) || !f.Ours) {
				t.Errorf("%+v", f)
			}
			want := dir
			if row.divided {
				want = filepath.Join(dir, leaf)
				// Now the kernel lets the folder hand controllers down.
				for _, c := range words(dir, "cgroup.controllers") {
					if err := write(dir, "cgroup.subtree_control", "+"+c); err != nil {
						t.Error(err)
					}
				}
			}
			if f.Own != want {
				t.Errorf("it lives in %s, want %s", f.Own, want)
			}
		})
	}
}

func TestAGroupSaysWhatTheKernelDoesNotLetItEnforce(t *testing.T) {
	p := Find()
	if p.unified == "" || slices.Contains(words(p.unified, "cgroup.controllers"), memory) || slices.Contains(words(filepath.Dir(p.unified), "cgroup.controllers"), memory) {
		t.Skip("the kernel lets groups of v2 enforce everything here, or there is none")
	}
	p.hands, p.v1 = slices.Clone(controllers), nil // as somebody could believe who looked before
	l := sandbox.Limits{MemoryBytes: 1 << 30, CPUMillis: 1000, Processes: 100}
	if m := p.Missing(l); len(m) > 0 {
		t.Fatalf("%v", m)
	}
	g := made(t, p, l)
	if m, err := g.Missing(l); len(m) != 3 || err == nil {
		t.Errorf("%v, %v", m, err)
	}
	cmd, _ := start(t, g, "exit 7") // and is a group all the same
	if err := cmd.Wait(); err == nil {
		t.Error("it did not run")
	}
}
