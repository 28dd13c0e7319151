package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// needsGroup skips where no cgroup enforces l.
func needsGroup(t *testing.T, l sandbox.Limits) {
	t.Helper()
	if missing := cgroup.Find().Missing(l); len(missing) > 0 {
		t.Skipf("no cgroup that this user can make here enforces %v", missing)
	}
}

var killedByMemory = sandbox.Exit{Code: 137, Signal: "KILL", Limit: sandbox.MemoryLimit}

func TestEightSandboxesFitOn16GB(t *testing.T) {
	const host = 16_000_000_000
	l := effective(sandbox.Limits{}, host)
	if l.MemoryBytes != 2<<30 || l.Processes != 2048 || l.DiskBytes != 10<<30 || l.CPUMillis != 0 {
		t.Errorf("%+v", l)
	}
	// Half of it in use is the usual case; all of it at once still leaves
	// the kernel's victims to the sandboxes, see victimAdj.
	if sum := 8 * l.MemoryBytes; sum > host*11/10 {
		t.Errorf("eight take %d bytes", sum)
	}
	if l := effective(sandbox.Limits{}, 1<<30); l.MemoryBytes != 1<<30 {
		t.Errorf("on a host of 1 GiB: %+v", l)
	}
	asked := sandbox.Limits{MemoryBytes: 64 << 30, CPUMillis: 1500, Processes: 40, DiskBytes: 2 << 20}
	if l := effective(asked, 1<<30); l != asked {
		t.Errorf("%+v became %+v", asked, l)
	}
}

func TestLimitsStandOnTheGroupOfASandbox(t *testing.T) {
	l := sandbox.Limits{MemoryBytes: 300 << 20, CPUMillis: 1500, Processes: 100}
	needsGroup(t, l)
	s := testSpec("limits")
	s.Limits = l
	p := newProvider(t)
	ref, _ := newSandbox(t, p, s)
	var r record
	box, err := openFolder(p.boxPath("limits"))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	left, err := box.readRemains()
	if err := errors.Join(err, box.readJSON(specFile, &r)); err != nil {
		t.Fatal(err)
	}
	if want := effective(l, 0); r.Limits != want {
		t.Errorf("the record says %+v, want %+v", r.Limits, want)
	}
	file := func(names ...string) string {
		for _, dir := range left.Cgroups {
			for _, name := range names {
				if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
					return strings.TrimSpace(string(b))
				}
			}
		}
		t.Errorf("no %v in %v", names, left.Cgroups)
		return ""
	}
	want := map[string]string{
		file("memory.max", "memory.limit_in_bytes"): fmt.Sprint(300 << 20),
		file("pids.max"):                    fmt.Sprint(100 + initThreads),
		file("cpu.max", "cpu.cfs_quota_us"): "150000",
	}
	for got, want := range want {
		if got != want && got != want+" 100000" {
			t.Errorf("%q in a file that shall hold %q", got, want)
		}
	}
	// Init is in all of them, so everything that it starts is.
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", left.Init.PID))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(own, []byte(r.Instance+"\n")); n != len(left.Cgroups) {
		t.Errorf("in %d of %d groups:\n%s", n, len(left.Cgroups), own)
	}
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	for _, dir := range left.Cgroups {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

func TestEveryProcessOfASandboxThatRanOutOfMemorySaysSo(t *testing.T) {
	s := testSpec("oom")
	s.Limits.MemoryBytes = 64 << 20
	_, sb := newSandbox(t, newProvider(t), s)
	ctx := t.Context()
	const n = 5
	for i := range n {
		if _, err := sb.Start(ctx, fmt.Sprintf("idle-%d", i), sandbox.Cmd{Args: []string{"sleep", "60"}}); err != nil {
			t.Fatal(err)
		}
	}
	done := script(t, sb, "done", "echo fine")
	for round := range 3 { // also the second time
		id := fmt.Sprintf("hog-%d", round)
		if _, err := sb.Start(ctx, id, sandbox.Cmd{Args: []string{"sh", "-c", "{ head -c 200000000 /dev/zero; sleep 30; } | tail; true"}}); err != nil {
			t.Fatal(err)
		}
		wantExit(t, sb, id, killedByMemory)
	}
	for i := range n {
		wantExit(t, sb, fmt.Sprintf("idle-%d", i), killedByMemory)
	}
	wantExit(t, sb, "done", sandbox.Exit{})
	if again := script(t, sb, "again", "echo fine"); again != done {
		t.Errorf("afterwards: %q", again)
	}
}

func wantExit(t *testing.T, sb sandbox.Sandbox, id string, want sandbox.Exit) {
	t.Helper()
	p, err := sb.Process(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*walkEvery)
	defer cancel()
	if exit, err := p.Wait(ctx); err != nil || exit != want {
		t.Errorf("%s: %+v, %v, want %+v", id, exit, err, want)
	}
}

// TestWhenMemoryKillsInitEveryProcessSaysSo has the agent do its worst: many
// small processes that take back what made them the better victims.
func TestWhenMemoryKillsInitEveryProcessSaysSo(t *testing.T) {
	s := testSpec("worst")
	s.Limits.MemoryBytes = 32 << 20
	needsGroup(t, s.Limits)
	p := newProvider(t)
	ref, sb := newSandbox(t, p, s)
	ctx := t.Context()
	if _, err := sb.Start(ctx, "idle", sandbox.Cmd{Args: []string{"sleep", "60"}}); err != nil {
		t.Fatal(err)
	}
	const worst = `echo said; echo 0 > /proc/self/oom_score_adj
i=0; while [ $i -lt 200 ]; do sh -c 'x=$(head -c 400000 /dev/zero | tr "\000" x); sleep 30' & i=$((i+1)); done; wait`
	if _, err := sb.Start(ctx, "worst", sandbox.Cmd{Args: []string{"sh", "-c", worst}}); err != nil {
		t.Fatal(err)
	}
	// Whoever was the victim, both say so, and nobody waits for ever.
	wantExit(t, sb, "worst", killedByMemory)
	wantExit(t, sb, "idle", killedByMemory)
	proc, err := sb.Process(ctx, "worst")
	if err != nil {
		t.Fatal(err)
	}
	out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, 100)
	if err != nil || !strings.HasPrefix(string(out), "said\n") {
		t.Errorf("its output: %q, %v", out, err)
	}
	switch err := sb.Health(ctx); fault.KindOf(err) {
	case "":
		t.Log("init survived")
	case fault.Lost:
		if _, err := sb.Start(ctx, "late", sandbox.Cmd{Args: []string{"true"}}); fault.KindOf(err) != fault.Lost {
			t.Errorf("start in a spent sandbox: %v", err)
		}
		if infos, err := p.List(ctx, nil); err != nil || len(infos) != 1 || infos[0].Ref != ref {
			t.Errorf("list: %+v, %v", infos, err)
		}
	default:
		t.Errorf("health: %v", err)
	}
	if err := p.Destroy(ctx, ref); err != nil {
		t.Error(err)
	}
}

// TestAnInitThatMemoryKilledLeavesItsExitsBehind shows the part of the test
// above that the kernel decides, with a kill from outside.
func TestAnInitThatMemoryKilledLeavesItsExitsBehind(t *testing.T) {
	box := t.TempDir()
	folder, err := openFolder(box)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	s := &supervisor{box: folder, log: slog.New(slog.DiscardHandler), state: ready, processes: map[string]*process{}, initDone: make(chan struct{})}
	for _, id := range []string{"a", "b"} {
		s.processes[id] = &process{known: make(chan struct{}), done: make(chan struct{})}
		close(s.processes[id].known)
	}
	s.ended("a", sandbox.Exit{Code: 3})
	if s.bereaved() {
		t.Fatal("an init that nobody knows why it died was spent")
	}
	s.ooms, s.lastOOM = 1, time.Now()
	if !s.bereaved() {
		t.Fatal("the kill was forgotten")
	}
	if got := s.processes["a"].exit; got != (sandbox.Exit{Code: 3}) {
		t.Errorf("what had ended before: %+v", got)
	}
	var r response
	if err := s.look(request{Op: opWait, ID: "b"}, &r, nil); err != nil || r.Exit == nil || *r.Exit != killedByMemory {
		t.Errorf("%+v, %v", r.Exit, err)
	}
	if err := s.usable("test"); fault.KindOf(err) != fault.Lost {
		t.Errorf("a spent sandbox: %v", err)
	}
}

func TestAFileThatIsTooLargeSaysSo(t *testing.T) {
	s := testSpec("large")
	s.Limits.DiskBytes = 4 << 20
	_, sb := newSandbox(t, newProvider(t), s)
	_, _, exit, err := sandbox.Output(t.Context(), sb, "large", sandbox.Cmd{Args: []string{"sh", "-c", "exec head -c 5000000 /dev/zero > file"}}, 1000)
	// The kernel stops it at the limit, where the supervisor looks often.
	if err != nil || exit.Limit != sandbox.DiskLimit || exit.Code != 128+int(unix.SIGXFSZ) && exit.Code != 128+int(unix.SIGKILL) {
		t.Errorf("%+v, %v", exit, err)
	}
	// A sparse one takes no room, and is still too large.
	if _, stderr, exit, err := sandbox.Output(t.Context(), sb, "sparse", sandbox.Cmd{Args: []string{"sh", "-c", "trap '' XFSZ; truncate -s 1T sparse"}}, 1000); err != nil || exit.Code == 0 {
		t.Errorf("%+v, %v, %s", exit, err, stderr)
	}
}

// TestLittleMoreThanTheLimitOfTheDiskIsWritten has a program write as fast as
// it can, in files that are each small enough.
func TestLittleMoreThanTheLimitOfTheDiskIsWritten(t *testing.T) {
	const limit, bearable = 64 << 20, 512 << 20 // of the 1200 that it wants to write
	s := testSpec("fast")
	s.Limits.DiskBytes = limit
	p := newProvider(t)
	_, sb := newSandbox(t, p, s)
	const hog = `i=0; while [ $i -lt 24 ]; do head -c 50M /dev/zero > hog-$i; i=$((i+1)); done; sleep 60`
	if _, err := sb.Start(t.Context(), "hog", sandbox.Cmd{Args: []string{"sh", "-c", hog}}); err != nil {
		t.Fatal(err)
	}
	wantExit(t, sb, "hog", sandbox.Exit{Code: 137, Signal: "KILL", Limit: sandbox.DiskLimit})
	out := script(t, sb, "measure", "du -sB1 .")
	var used int64
	if _, err := fmt.Sscan(out, &used); err != nil {
		t.Fatal(out)
	}
	t.Logf("%d MiB were written where %d were allowed", used>>20, limit>>20)
	// An idle machine stays far below it.
	if used > limit+bearable {
		t.Errorf("%d MiB were written where %d were allowed", used>>20, limit>>20)
	}
	if used <= limit {
		t.Errorf("%d bytes were too many", used)
	}
}

// A disk is shared: while a sandbox writes, others remove more than that.
func TestWhatOthersGiveBackHidesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, fsDir), 0o755); err != nil {
		t.Fatal(err)
	}
	box, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer box.dir.Close()
	const limit = 1 << 20
	m := newDiskMeter(box, limit, nil)
	look := func(free int64) (int64, bool) {
		m.hostFree = func() (int64, bool) { return free, true }
		m.took = 0 // it may walk as often as it likes
		return m.look(func() func() { return func() {} })
	}
	free := m.free
	for i := range 4 {
		if err := os.WriteFile(filepath.Join(dir, fsDir, fmt.Sprint(i)), make([]byte, limit/2), 0o644); err != nil {
			t.Fatal(err)
		}
		free -= limit / 2
		used, over := look(free)
		if over {
			if used <= limit {
				t.Errorf("%d bytes were too many", used)
			}
			return
		}
		free += 1 << 30
		if used, over := look(free); over {
			t.Errorf("%d bytes were too many, when nothing was written", used)
		}
	}
	t.Error("nobody noticed")
}

func TestFilesThatHaveNoNameCount(t *testing.T) {
	s := testSpec("nameless")
	s.Limits.DiskBytes = 24 << 20
	needsGroup(t, sandbox.Limits{MemoryBytes: 1}) // who has them open is asked of the cgroup
	p := newProvider(t)
	_, sb := newSandbox(t, p, s)
	var st unix.Statfs_t
	if err := unix.Statfs(p.dir, &st); err != nil || st.Type == unix.TMPFS_MAGIC {
		t.Skipf("the state folder is on no disk: %v", err)
	}
	const hide = `for fd in 3 4 5; do eval "exec $fd>hidden"; rm hidden; head -c 12000000 /dev/zero >&$fd; done; ls; sleep 60`
	if _, err := sb.Start(t.Context(), "hide", sandbox.Cmd{Args: []string{"bash", "-c", hide}}); err != nil {
		t.Fatal(err)
	}
	wantExit(t, sb, "hide", sandbox.Exit{Code: 137, Signal: "KILL", Limit: sandbox.DiskLimit})
}

func TestAWalkFindsWhatThereIsAndFollowsNothing(t *testing.T) {
	top := t.TempDir()
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	file := func(name string, size int) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, bytes.Repeat([]byte("x"), size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	measure := func(open bool) (int64, bool) {
		w := walk{most: 1 << 40, open: open}
		w.tree(top)
		return w.sum, w.closed
	}
	empty, _ := measure(false)
	file(filepath.Join(top, "a", "file"), 1<<20)
	file(filepath.Join(elsewhere, "large"), 8<<20)
	for _, name := range []string{"link", "a/link"} {
		if err := os.Symlink(elsewhere, filepath.Join(top, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(top, "a", "file"), filepath.Join(top, "again")); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		file(filepath.Join(top, "many", fmt.Sprint(i)), 0)
	}
	sum, closed := measure(false)
	if most := empty + 1<<20 + 110*leastFile; sum < 1<<20+100*leastFile || sum > most || closed {
		t.Errorf("%d bytes, at most %d, closed %v", sum, most, closed)
	}
	// What is nested deeper than any path reaches.
	deep := top
	dir, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	const levels, name = 200, "a-folder-whose-name-is-so-long-that-two-hundred-of-them-are-longer-than-a-path-can-be"
	for range levels {
		deep = filepath.Join(deep, name)
		if err := unix.Mkdirat(dir, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		unix.Close(dir)
		if dir = next; err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Openat(dir, "bottom", unix.O_CREAT|unix.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, make([]byte, 2<<20)); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	unix.Close(dir)
	before := sum
	if sum, _ = measure(false); sum < before+2<<20+levels*leastFile {
		t.Errorf("%d bytes with a deep tree, %d without", sum, before)
	}
	// The walk ends when it has seen enough.
	w := walk{most: 100_000}
	w.tree(top)
	if w.sum > 100_000+leastFile+1<<20 {
		t.Errorf("it went on until %d", w.sum)
	}
	if err := removeTree(filepath.Join(top, name), ""); err != nil {
		t.Error(err)
	}
	if os.Geteuid() == 0 {
		return // whom no folder is closed to
	}
	file(filepath.Join(top, "closed", "within", "file"), 4<<20)
	if err := os.Chmod(filepath.Join(top, "closed"), 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.Chmod(filepath.Join(top, "closed"), 0o700) }()
	if shut, closed := measure(false); !closed || shut > sum {
		t.Errorf("closed %v, %d bytes", closed, shut)
	}
	if opened, _ := measure(true); opened < 4<<20 {
		t.Errorf("opened: %d bytes", opened)
	}
}

func TestUsageIsThatOfTheSandbox(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("usage"))
	ctx := t.Context()
	if _, err := sb.Start(ctx, "busy", sandbox.Cmd{Args: []string{"sh", "-c", "{ head -c 20000000 /dev/zero; while :; do :; done; } | tail"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it uses what it needs", func() bool {
		u, err := p.Usage(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		return u.MemoryBytes > 20_000_000 && u.MemoryBytes < 200_000_000 && u.Processes >= 3 && u.Processes < 3+2*initThreads && u.CPU > 100*time.Millisecond && u.CPU < time.Minute
	})
	if err := p.Destroy(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Usage(ctx, ref); fault.KindOf(err) != fault.NotFound {
		t.Errorf("usage of what is gone: %v", err)
	}
}

func TestProgramsAreKilledBeforeInit(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), testSpec("victims"))
	// Init has its own back a moment after the program begins.
	const wait = "while [ $(cat /proc/1/oom_score_adj) = $(cat /proc/self/oom_score_adj) ]; do :; done; "
	got := strings.Fields(script(t, sb, "adj", wait+"cat /proc/1/oom_score_adj /proc/self/oom_score_adj; sh -c 'cat /proc/self/oom_score_adj'; echo -1000 2>/dev/null > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"))
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	var adj int
	if err := json.Unmarshal(bytes.TrimSpace(own), &adj); err != nil {
		t.Fatal(err)
	}
	victim := fmt.Sprint(min(adj+victimAdj, 1000))
	if want := []string{fmt.Sprint(adj), victim, victim, victim}; !slices.Equal(got, want) {
		t.Errorf("init, program, its child, after it asked for mercy: %v, want %v", got, want)
	}
}

func TestWhatIsNotEnforcedIsSaidOnce(t *testing.T) {
	var log bytes.Buffer
	o := testOptions(t.TempDir())
	o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	p := New(o)
	ctx := t.Context()
	for i := range 2 {
		s := testSpec(fmt.Sprint("said-", i))
		s.Limits.CPUMillis = 500
		ref, err := p.Create(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Destroy(ctx, ref); err != nil {
			t.Fatal(err)
		}
	}
	want := 0
	if len(cgroup.Find().Missing(sandbox.Limits{MemoryBytes: 1, CPUMillis: 1, Processes: 1})) > 0 {
		want = 1
	}
	if n := strings.Count(log.String(), "not enforced"); n != want {
		t.Errorf("said %d times, want %d: %s", n, want, log.String())
	}
	if got := p.Unenforced(sandbox.Limits{DiskBytes: 1}); len(got) > 0 {
		t.Errorf("a disk limit needs no cgroup: %v", got)
	}
}
