package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// The kinds of crowds that an agent can make.
const (
	sleepers = "sleepers" // processes that do nothing and ignore every signal
	sessions = "sessions" // each the child of the one before, in a session of its own; some stop themselves
	bomb     = "bomb"     // processes that go on making others
)

// ignored is SIG_IGN as a handler.
const ignored = 1

// crowd fills the sandbox with so many processes, or as many as it gets, says
// how many, and is one of them from then on.
func crowd(args []string) error {
	n, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return err
	}
	for sig := unix.Signal(1); sig <= 64; sig++ {
		if sig != unix.SIGKILL && sig != unix.SIGSTOP && sig != unix.SIGCHLD {
			if err := setSignal(sig, &sigaction{handler: ignored}, nil); err != nil {
				return err
			}
		}
	}
	shared, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	count := (*[2]int64)(unsafe.Pointer(&shared[0])) // made, and failed
	multiply(args[0], n, count)
	for deadline := time.Now().Add(time.Minute); count[0] < n && count[1] == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes in a minute", count[0])
		}
	}
	fmt.Println("crowded", count[0])
	return wait()
}

// multiply returns in the first process only. All others have but one of the
// threads that Go needs, and use nothing of Go's. The count is only about
// right, and need not be more.
//
//go:norace
//go:nosplit
func multiply(kind string, n int64, count *[2]int64) {
	switch kind {
	case sleepers:
		for range n {
			if !another(count) {
				return
			}
		}
	case sessions, bomb:
		if pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0); pid != 0 || errno != 0 {
			return
		}
		for {
			count[0]++
			if kind == sessions {
				syscall.RawSyscall(unix.SYS_SETSID, 0, 0, 0)
			}
			if count[0] >= n {
				break
			}
			pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			if errno != 0 {
				count[1]++
				break
			}
			if pid != 0 && kind == sessions {
				if count[0]%3 == 0 {
					self, _, _ := syscall.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
					syscall.RawSyscall(unix.SYS_KILL, self, uintptr(unix.SIGSTOP), 0)
				}
				break
			}
		}
		for kind == bomb {
			pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			if pid == 0 && errno == 0 {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
			}
			syscall.RawSyscall6(unix.SYS_WAIT4, ^uintptr(0), 0, unix.WNOHANG, 0, 0, 0)
		}
		sleepForEver()
	}
}

// another makes a process that sleeps.
//
//go:norace
//go:nosplit
func another(count *[2]int64) bool {
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		count[1]++
		return false
	}
	if pid == 0 {
		sleepForEver()
	}
	count[0]++
	return true
}

//go:norace
//go:nosplit
func sleepForEver() {
	for {
		syscall.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
	}
}

// destroyWithin is how long Destroy may take whatever the sandbox does: two
// seconds on an idle machine, and these tests run on machines that are not.
const destroyWithin = 30 * time.Second

// mustDestroy destroys the sandbox and says how long it took.
func mustDestroy(t *testing.T, p *Provider, ref sandbox.Ref) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	if err := p.Destroy(ctx, ref); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("destroyed in %v", took)
	if took > destroyWithin {
		t.Errorf("destroyed in %v, at most %v is bearable", took, destroyWithin)
	}
}

func TestDestroyEndsWhateverTheAgentHasMade(t *testing.T) {
	for kind, n := range map[string]int{sleepers: sized(1500, 10_000), sessions: sized(200, 1000), bomb: sized(500, 5000)} {
		t.Run(kind, func(t *testing.T) {
			p := newProvider(t)
			ref, sb := newSandbox(t, p, withAttacker(t, testSpec("crowd")))
			marker := newInstance()
			deed, err := sb.Start(t.Context(), "crowd", attackLine("crowd", kind, strconv.Itoa(n), marker))
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			said := ""
			for deadline := start.Add(2 * time.Minute); !strings.Contains(said, "waiting"); time.Sleep(5 * time.Millisecond) {
				b, err := sandbox.ReadAll(t.Context(), deed, sandbox.Stdout, 1000)
				if err != nil {
					t.Fatal(err)
				}
				if said = string(b); time.Now().After(deadline) || strings.Contains(said, "failed") {
					t.Fatalf("no crowd: %s", said)
				}
			}
			t.Logf("%s after %v", strings.Fields(said)[1], time.Since(start))
			mustDestroy(t, p, ref)
			if n := processesNaming(t, marker); n > 0 {
				t.Errorf("%d processes are left", n)
			}
		})
	}
}

// A generation of shells: each has the next one in a session of its own, and
// hears no signal that can be ignored. Their programs begin anew, unlike the
// sessions above, whose memory the kernel has to take apart from that of all
// their forebears: that takes it seconds with a thousand, and half a minute to
// make them.
const generation = `trap "" TERM INT HUP QUIT TSTP; if [ $1 -gt 0 ]; then setsid sh "$0" $(($1 - 1)) & else : > /tmp/all; fi; while :; do wait; sleep 1000; done`

func TestDestroyEndsGenerationsOfSessions(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("generations"))
	script(t, sb, "write", "cat > /tmp/generation <<'end'\n"+generation+"\nend")
	if _, err := sb.Start(t.Context(), "first", sandbox.Cmd{Args: []string{"sh", "/tmp/generation", strconv.Itoa(sized(200, 1000))}}); err != nil {
		t.Fatal(err)
	}
	script(t, sb, "all", "until [ -e /tmp/all ]; do sleep 0.05; done")
	mustDestroy(t, p, ref)
}

func TestDestroyNeedsNoSpaceOnTheDisk(t *testing.T) {
	for what, row := range map[string]struct{ options, fill string }{
		"no bytes": {"size=24m", "head -c 100m /dev/zero > full; cp full ~/; cp full /tmp; head -c 100m /dev/zero; head -c 100m /dev/zero >&2"},
		"no files": {"size=24m,nr_inodes=400", "i=0; while : > $i; do i=$((i+1)); done; mkdir a || echo full"},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, row.options); err != nil {
				t.Skipf("needs the right to mount a tmpfs: %v", err)
			}
			t.Cleanup(func() { // after those of the sandboxes
				defer unix.Unmount(dir, unix.MNT_DETACH)
				// The last supervisor may be on its way out.
				eventually(t, "nobody has a file of it open", func() bool { return unix.Unmount(dir, 0) == nil })
			})
			p := New(testOptions(filepath.Join(dir, "state")))
			ref, sb := newSandbox(t, p, testSpec("full"))
			if _, _, _, err := sandbox.Output(t.Context(), sb, "fill", sandbox.Cmd{Args: []string{"sh", "-c", row.fill}}, 1000); err != nil {
				t.Fatal(err)
			}
			probe := filepath.Join(dir, "probe")
			if err := os.WriteFile(probe, make([]byte, 1<<16), 0o600); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("the disk is not full: %v", err)
			}
			os.Remove(probe)
			mustDestroy(t, p, ref)
			// And there is room again.
			ref, sb = newSandbox(t, p, testSpec("full"))
			script(t, sb, "works", "head -c 1m /dev/zero > file")
			mustDestroy(t, p, ref)
		})
	}
}

// labour is a worker that makes and destroys sandboxes until it is killed.
func labour(args []string) error {
	ctx := context.Background()
	p := New(testOptions(args[0]))
	for i := range 100 {
		s := testSpec(fmt.Sprintf("%s-%02d", args[1], i))
		s.Base = args[2]
		ref, err := p.Create(ctx, s)
		if err != nil {
			return err
		}
		sb, err := p.Attach(ctx, ref)
		if err != nil {
			return err
		}
		if _, err := sb.Start(ctx, "job", sandbox.Cmd{Args: []string{"sh", "-c", restless, args[1]}}); err != nil {
			return err
		}
		if i%3 != 0 {
			if err := p.Destroy(ctx, ref); err != nil {
				return err
			}
		}
	}
	return nil
}

// restless is a script of processes that would like to outlive their sandbox.
const restless = `trap "" TERM INT HUP; setsid sh -c 'trap "" TERM INT HUP; : > file; while :; do sleep 1; done' "$0" & while :; do sleep 1; done`

// An accident is what happens to one sandbox in the test of leaks. It reports
// what should not have happened.
type accident func(ctx context.Context, p *Provider, s sandbox.Spec, chance *rand.Rand) error

// accidents by name. Their keys have a fixed length, so that none begins with
// another.
var accidents = map[string]accident{
	"none": func(ctx context.Context, p *Provider, s sandbox.Spec, _ *rand.Rand) error {
		ref, err := live(ctx, p, s)
		return errors.Join(err, p.Destroy(ctx, ref))
	},
	"the supervisor or init is killed": func(ctx context.Context, p *Provider, s sandbox.Spec, chance *rand.Rand) error {
		done := assassin(p, s.Key, chance)
		ref, err := live(ctx, p, s)
		done()
		if err != nil || chance.IntN(2) == 0 {
			return nil // the reaper's
		}
		return p.Destroy(ctx, ref)
	},
	"one of them is killed while it is destroyed": func(ctx context.Context, p *Provider, s sandbox.Spec, chance *rand.Rand) error {
		ref, err := live(ctx, p, s)
		if err != nil {
			return err
		}
		defer assassin(p, s.Key, chance)()
		return p.Destroy(ctx, ref)
	},
	"the caller gives up": func(ctx context.Context, p *Provider, s sandbox.Spec, chance *rand.Rand) error {
		hurried, cancel := context.WithTimeout(ctx, time.Duration(chance.Int64N(int64(60*time.Millisecond))))
		defer cancel()
		ref, err := p.Create(hurried, s)
		if err != nil {
			return nil // what it began is looked for in the end
		}
		return p.Destroy(ctx, ref)
	},
	"the worker is killed": func(ctx context.Context, p *Provider, s sandbox.Spec, chance *rand.Rand) error {
		cmd := execSelf(ctx, attackWord, "labour", p.dir, s.Key, s.Base)
		if err := cmd.Start(); err != nil {
			return err
		}
		time.Sleep(time.Duration(chance.Int64N(int64(300 * time.Millisecond)))) // any moment will do
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil
	},
	"many do it at once": func(ctx context.Context, p *Provider, s sandbox.Spec, chance *rand.Rand) error {
		var all sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			all.Go(func() {
				ref, err := p.Create(ctx, s)
				errs[i] = errors.Join(err, p.Destroy(ctx, ref))
			})
		}
		all.Wait()
		return errors.Join(errs...)
	},
}

// live makes the sandbox and starts processes in it.
func live(ctx context.Context, p *Provider, s sandbox.Spec) (sandbox.Ref, error) {
	ref, err := p.Create(ctx, s)
	if err != nil {
		return ref, err
	}
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return ref, err
	}
	defer sb.Close()
	_, err = sb.Start(ctx, "job", sandbox.Cmd{Args: []string{"sh", "-c", restless, s.Key}})
	return ref, err
}

// assassin kills the supervisor or the init of the sandbox, at some moment.
// Stop calls it off and waits for it.
func assassin(p *Provider, key string, chance *rand.Rand) (stop func()) {
	delay, init := time.Duration(chance.Int64N(int64(60*time.Millisecond))), chance.IntN(3) == 0
	over := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-over:
			return
		case <-time.After(delay):
		}
		if !init {
			for _, pid := range pidsNaming(p.boxPath(key)) {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
			return
		}
		box, err := openFolder(p.boxPath(key))
		if err != nil {
			return
		}
		defer box.Close()
		if left, err := box.readRemains(); err == nil {
			if now, err := identify(left.Init.PID); err == nil && now == left.Init {
				_ = unix.Kill(left.Init.PID, unix.SIGKILL)
			}
		}
	}()
	return func() {
		close(over)
		<-done
	}
}

// pidsNaming returns this host's processes with word as one of the words of
// their command line.
func pidsNaming(word string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil || !slices.ContainsFunc(bytes.Split(b, []byte{0}), func(w []byte) bool { return string(w) == word }) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestNothingIsLeftWhoeverIsKilledWhenever makes many sandboxes, many at a
// time, with accidents, lets the reaper do its work, and counts what is left
// on the host.
func TestNothingIsLeftWhoeverIsKilledWhenever(t *testing.T) {
	n := sized(100, 1000)
	seed := uint64(20261123)
	p := newProvider(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	ref, sb := newSandbox(t, p, testSpec("prepare"))
	script(t, sb, "fill", "echo base > base")
	if err := p.Freeze(ctx, ref, "base"); err != nil {
		t.Fatal(err)
	}
	if err := p.Destroy(ctx, ref); err != nil {
		t.Fatal(err)
	}
	sb.Close()
	var before counts
	eventually(t, "the preparations are over", func() bool {
		before = countOf(p)
		return before.processes == 0 && before.children == 0
	})

	names := make([]string, 0, len(accidents))
	for name := range accidents {
		names = append(names, name)
	}
	slices.Sort(names)
	start := time.Now()
	slots := make(chan struct{}, 16)
	var all sync.WaitGroup
	for i := range n {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			chance := rand.New(rand.NewPCG(seed, uint64(i)))
			s := testSpec(fmt.Sprintf("leak-%04d", i))
			if chance.IntN(2) == 0 {
				s.Base = "base"
			}
			name := names[i%len(names)]
			if err := accidents[name](ctx, p, s, chance); err != nil {
				t.Errorf("seed %d, number %d, %s: %v", seed, i, name, err)
			}
		})
	}
	all.Wait()
	t.Logf("%d sandboxes in %v", n, time.Since(start))

	// The reaper: it destroys what is listed, and List tidies up. What was
	// left without a lock it takes for something that is just being made, for
	// a minute: here that minute has passed.
	eventually(t, "the reaper has nothing to do", func() bool {
		infos, err := p.List(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range infos {
			if err := p.Destroy(ctx, info.Ref); err != nil {
				t.Errorf("reap %s: %v", info.Ref.ID, err)
			}
		}
		left := 0
		for _, sub := range []string{sandboxesDir, trashDir} {
			dirs, _ := filepath.Glob(filepath.Join(p.dir, sub, "*"))
			hidden, _ := filepath.Glob(filepath.Join(p.dir, sub, ".*"))
			for _, dir := range append(dirs, hidden...) {
				left++
				if _, err := os.Lstat(filepath.Join(dir, lifeFile)); errors.Is(err, os.ErrNotExist) {
					_ = os.Chtimes(dir, time.Time{}, time.Now().Add(-2*time.Minute)) // gone by now, perhaps
				}
			}
		}
		return left == 0
	})
	var after counts
	same := func() bool {
		after = countOf(p)
		return after == before
	}
	for deadline := time.Now().Add(30 * time.Second); !same() && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
	}
	if after != before {
		t.Errorf("left behind:\n%+v, at first it was\n%+v", after, before)
		for _, pid := range pidsNaming(p.dir) {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			t.Logf("%d: %q", pid, b)
		}
	}
}

// counts are of what this test's sandboxes and worker use of the host. Other
// sandboxes may come and go on it meanwhile.
type counts struct {
	processes   int // that name the state folder or run for a sandbox in it
	orphans     int // inits without a supervisor
	children    int // of this process, dead or alive
	mounts      int // in this process's namespace
	namespaces  int // that processes of ours are in, other than this one's
	cgroups     int // of ours by name, with nobody in them; of others' sandboxes only for a moment
	loops       int // devices over files of the state folder
	files       int // in the state folder, bases aside
	descriptors int // of this process
	goroutines  int
}

func countOf(p *Provider) (c counts) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	own := map[string]bool{}
	kinds := []string{"mnt", "pid", "net", "user", "ipc", "uts", "cgroup", "time"}
	for _, kind := range kinds {
		if link, err := os.Readlink("/proc/self/ns/" + kind); err == nil {
			own[link] = true
		}
	}
	foreign := map[string]bool{}
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue
		}
		_, rest, _ := cutLast(stat, ')')
		fields := strings.Fields(string(rest))
		words := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		last := words[len(words)-1]
		ours := strings.Contains(string(cmdline), p.dir) || strings.HasPrefix(last, "leak-") && slices.Contains(words, restless)
		if ours {
			c.processes++
			for _, kind := range kinds {
				if link, err := os.Readlink(dir + "/ns/" + kind); err == nil && !own[link] {
					foreign[link] = true
				}
			}
		}
		if len(fields) > 1 && fields[1] == "1" && slices.Contains(words, supervisorWord) && (last == initWord || last == sealedWord) {
			c.orphans++
		}
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			c.children++
		}
	}
	c.namespaces = len(foreign)
	if b, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		c.mounts = strings.Count(string(b), p.dir) + strings.Count(string(b), " - nsfs ") + strings.Count(string(b), " - overlay sandbox ")
	}
	for dir := range cgroupsOfSandboxes() {
		if b, err := os.ReadFile(filepath.Join(dir, "cgroup.events")); err == nil && bytes.Contains(b, []byte("populated 0")) {
			c.cgroups++
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, loop := range loops {
		if b, err := os.ReadFile(loop); err == nil && strings.Contains(string(b), p.dir) {
			c.loops++
		}
	}
	_ = filepath.WalkDir(p.dir, func(path string, _ os.DirEntry, err error) error {
		switch {
		case err != nil:
			return nil // it has just gone
		case path == filepath.Join(p.dir, basesDir), path == filepath.Join(p.dir, locksDir):
			return filepath.SkipDir
		}
		c.files++
		return nil
	})
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		c.descriptors = len(fds)
	}
	c.goroutines = runtime.NumGoroutine()
	return c
}
