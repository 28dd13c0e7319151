package local

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// newSparing returns a provider that keeps so many spares.
func newSparing(t *testing.T, most int) *Provider {
	t.Helper()
	p := newProvider(t)
	p.spares.most = most
	t.Cleanup(p.Close)
	return p
}

// readySpares waits until there are as many as are kept.
func readySpares(t *testing.T, p *Provider) (instances []string) {
	t.Helper()
	eventually(t, "spares are ready", func() bool {
		p.spares.mu.Lock()
		defer p.spares.mu.Unlock()
		instances = nil
		for _, s := range p.spares.list {
			select {
			case <-s.ready:
				if s.err != nil {
					t.Fatal(s.err)
				}
				instances = append(instances, s.box.instance())
			default:
			}
		}
		return len(instances) == p.spares.most
	})
	return instances
}

func TestASpareBecomesWhatIsAskedFor(t *testing.T) {
	p := newSparing(t, 1)
	ctx := t.Context()
	ref, sb := newSandbox(t, p, testSpec("first"))
	script(t, sb, "write", "echo of the base > file")
	if err := p.Freeze(ctx, ref, "base"); err != nil {
		t.Fatal(err)
	}
	ready := readySpares(t, p)
	lent := filepath.Join(t.TempDir(), "lent")
	if err := os.WriteFile(lent, []byte("lent"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(lent), 0o755); err != nil {
		t.Fatal(err)
	}
	s := testSpec("second")
	s.Base = "base"
	s.Labels = map[string]string{"a": "b"}
	s.Mounts = []sandbox.Mount{{Source: lent, Target: "/opt/sandbox/lent/file"}}
	s.Limits = sandbox.Limits{MemoryBytes: 64 << 20, Processes: 40}
	ref, sb = newSandbox(t, p, s)
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	if h.Instance != ready[0] {
		t.Errorf("the sandbox is %s, the spare was %s", h.Instance, ready[0])
	}
	if got := script(t, sb, "read", "cat file /opt/sandbox/lent/file"); got != "of the base\nlent" {
		t.Errorf("it sees %q", got)
	}
	if got := script(t, sb, "shm", "df -k /dev/shm | tail -n 1 | awk '{print $2}'"); got != fmt.Sprint(16<<10) {
		t.Errorf("/dev/shm has %s KiB; a quarter of the memory was asked for", got)
	}
	if got := script(t, sb, "write", "touch /new /etc/new /opt/sandbox/lent/new 2>&1 | grep -c Read-only || true"); got != "3" {
		t.Errorf("%s of 3 places are read-only", got)
	}
	infos, err := p.List(ctx, s.Labels)
	if err != nil || len(infos) != 1 || infos[0].Ref != ref {
		t.Errorf("listed: %+v, %v", infos, err)
	}
	other, err := New(testOptions(p.dir)).Attach(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if got := script(t, other, "again", "cat file"); got != "of the base" {
		t.Errorf("another worker sees %q", got)
	}
}

func TestTheDeadlineOfASpareIsThatOfItsSpec(t *testing.T) {
	p := newSparing(t, 1)
	newSandbox(t, p, testSpec("first"))
	readySpares(t, p)
	s := testSpec("short")
	s.Deadline = time.Now().Add(time.Second)
	newSandbox(t, p, s)
	eventually(t, "it is gone", func() bool {
		_, err := os.Lstat(p.boxPath("short"))
		return os.IsNotExist(err)
	})
}

func TestSparesEndWhenNobodyAsksForMore(t *testing.T) {
	p := newSparing(t, 2)
	p.spares.kept = 10 * time.Millisecond
	newSandbox(t, p, testSpec("only"))
	eventually(t, "no spare is left", func() bool { return len(unnamed(t, p)) == 0 && !sparesOnTheWay(p) })
}

func TestSparesWaitUntilNothingElseIsAskedFor(t *testing.T) {
	p := newSparing(t, 1)
	p.spares.lull = time.Hour
	asked := func() time.Time {
		p.spares.mu.Lock()
		defer p.spares.mu.Unlock()
		return p.spares.asked
	}
	last := asked()
	further := func(what string) {
		t.Helper()
		if now := asked(); !now.After(last) {
			t.Errorf("%s does not put the spares off", what)
		} else {
			last = now
		}
		if found := unnamed(t, p); len(found) > 0 || sparesOnTheWay(p) {
			t.Errorf("after %s there is %q, or will be soon", what, found)
		}
	}
	ref, sb := newSandbox(t, p, testSpec("first"))
	further("Create")
	script(t, sb, "more", "true")
	further("Start")
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	further("Destroy")
	p.spares.mu.Lock()
	p.spares.lull = time.Millisecond
	p.spares.mu.Unlock()
	p.Close() // the old lull
	newSandbox(t, p, testSpec("second"))
	readySpares(t, p)
}

// sparesOnTheWay reports whether spares are being started.
func sparesOnTheWay(p *Provider) bool {
	p.spares.mu.Lock()
	defer p.spares.mu.Unlock()
	return p.spares.filling != nil
}

// unnamed are the folders that have no name yet.
func unnamed(t *testing.T, p *Provider) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(p.dir, sandboxesDir, newPrefix+"*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// sparesOfWorker waits until a worker in another process has as many spares as
// it keeps, and returns their folders.
func sparesOfWorker(t *testing.T, p *Provider, most int) (found []string) {
	t.Helper()
	eventually(t, "the worker has spares", func() bool {
		found = unnamed(t, p)
		ready := 0
		for _, dir := range found {
			// The socket is bound when init is at work already.
			if _, err := os.Lstat(filepath.Join(dir, socketFile)); err == nil {
				ready++
			}
		}
		return ready == most
	})
	return found
}

func TestSparesEndWithTheirWorker(t *testing.T) {
	p := newProvider(t)
	o := testOptions(p.dir)
	o.Spares = DefaultSpares
	before := cgroupsOfSandboxes()
	ref, kill := startWorker(t, workerOrder{Options: o, Spec: testSpec("lives-on"), Script: "exec sleep 1000"})
	r := ref()
	sparesOfWorker(t, p, o.Spares)
	kill()
	eventually(t, "no folder of a spare is left", func() bool { return len(unnamed(t, p)) == 0 })
	eventually(t, "only the sandbox's supervisor is left", func() bool { return processesNaming(t, p.dir) == 1 })
	sb, err := p.Attach(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	if err := sb.Health(t.Context()); err != nil {
		t.Error(err)
	}
	if err := p.Destroy(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no cgroup is left", func() bool {
		for dir := range cgroupsOfSandboxes() {
			if procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs")); !before[dir] && err == nil && len(procs) == 0 {
				return false
			}
		}
		return true
	})
}

func TestSparesThatWereKilledAreRemovedByTheNextWorker(t *testing.T) {
	p := newProvider(t)
	o := testOptions(p.dir)
	o.Spares = 1
	ref, kill := startWorker(t, workerOrder{Options: o, Spec: testSpec("killed"), Script: "exec sleep 1000"})
	r := ref()
	found := sparesOfWorker(t, p, o.Spares)
	for _, dir := range found {
		killNaming(t, dir)
	}
	kill()
	eventually(t, "the next worker has tidied up", func() bool {
		if _, err := p.List(context.Background(), nil); err != nil {
			t.Fatal(err)
		}
		return len(unnamed(t, p)) == 0
	})
	if err := p.Destroy(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// killNaming kills the processes with word in their command line.
func killNaming(t *testing.T, word string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		var pid int
		b, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(b), word) {
			continue
		}
		if _, err := fmt.Sscanf(name, "/proc/%d/", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Logf("kill %d: %v", pid, err)
		}
	}
}

func TestASpareThatWasKilledIsNotUsed(t *testing.T) {
	p := newSparing(t, 2)
	newSandbox(t, p, testSpec("first"))
	ready := readySpares(t, p)
	killNaming(t, newPrefix+ready[0])
	p.spares.mu.Lock()
	dead := p.spares.list[0]
	p.spares.mu.Unlock()
	<-dead.ended
	ref, sb := newSandbox(t, p, testSpec("second"))
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	if h.Instance != ready[1] {
		t.Errorf("the sandbox is %s, the spare that lives is %s", h.Instance, ready[1])
	}
	script(t, sb, "works", "true")
}
