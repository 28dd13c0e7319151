package gvisor

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// TestAllOfRunscIsInTheSandboxesCgroup: nothing of it was started before it
// was put there, and the bounds stand.
func TestAllOfRunscIsInTheSandboxesCgroup(t *testing.T) {
	p := newProvider(t)
	l := sandbox.Limits{MemoryBytes: 256 << 20, Processes: 64, CPUMillis: 1500}
	if len(cgroup.Find().Missing(l)) > 0 {
		t.Skip("no group that limits all of it can be made here")
	}
	s := testSpec("group")
	s.Limits = l
	ref, sb := newSandbox(t, p, s)
	script(t, sb, "some", "sleep 60 >&- 2>&- & echo started")
	var r record
	if err := sb.readJSON(specFile, &r); err != nil {
		t.Fatal(err)
	}
	want := outer(effective(l))
	found := map[string]bool{}
	for _, dir := range r.Cgroups {
		for name, value := range map[string]int64{"pids.max": want.Processes, "memory.max": want.MemoryBytes, "memory.limit_in_bytes": want.MemoryBytes} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				found[name[:4]] = true
				if got := strings.TrimSpace(string(b)); got != strconv.FormatInt(value, 10) {
					t.Errorf("%s of %s is %s, want %d", name, dir, got, value)
				}
			}
		}
		members, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		pids := runscPids(t, instance(t, ref))
		if len(pids) < 3 {
			t.Fatalf("runsc is %d processes", len(pids))
		}
		for _, pid := range pids {
			if !slices.Contains(strings.Fields(string(members)), pid) {
				t.Errorf("process %s is not in %s", pid, dir)
			}
		}
	}
	if !found["pids"] || !found["memo"] {
		t.Errorf("only %v was limited, in %v", found, r.Cgroups)
	}
	u, err := p.Usage(t.Context(), ref)
	if err != nil || u.MemoryBytes < 1<<20 || u.Processes < 1 || u.Processes > 10 || u.CPU == 0 {
		t.Errorf("%+v, %v", u, err)
	}
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	for _, dir := range r.Cgroups {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

// runscPids returns the processes of runsc for the instance.
func runscPids(t *testing.T, instance string) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if words := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"); err == nil && strings.HasPrefix(filepath.Base(words[0]), "runsc") && words[len(words)-1] == instance {
			pids = append(pids, filepath.Base(filepath.Dir(name)))
		}
	}
	return pids
}

func TestDestroyEndsWhateverTheAgentHasMade(t *testing.T) {
	for what, text := range map[string]string{
		"a fork bomb":        "f() { f | f & }; f; f; sleep 60",
		"a tree of sessions": `trap '' TERM INT HUP; i=0; while [ $i -lt 12 ]; do setsid sh -c 'trap "" TERM INT HUP; setsid sleep 600 & sleep 600' & i=$((i+1)); done; sleep 600`,
		"a full disk":        "cat /dev/zero > full; cat /dev/zero > $HOME/full; sleep 600",
	} {
		t.Run(what, func(t *testing.T) {
			p := newProvider(t)
			s := testSpec("crowd")
			s.Limits = sandbox.Limits{Processes: 60, DiskBytes: 8 << 20}
			ref, sb := newSandbox(t, p, s)
			crowd, err := sb.Start(t.Context(), "crowd", sandbox.Cmd{Args: []string{"sh", "-c", text}})
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is crowded", func() bool {
				u, err := p.Usage(t.Context(), ref)
				said, readErr := sandbox.ReadAll(t.Context(), crowd, sandbox.Stderr, 1000)
				if err != nil || readErr != nil {
					t.Fatal(err, readErr)
				}
				// What it says is that it cannot fork, or write.
				return u.Processes > 30 && what != "a fork bomb" || len(said) > 0 || u.DiskBytes > 8<<20
			})
			begin := time.Now()
			if err := p.Destroy(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
			t.Logf("destroyed in %v", time.Since(begin))
			if took := time.Since(begin); took > 30*time.Second { // two on a machine that does nothing else
				t.Errorf("destroyed in %v", took)
			}
			if pids := runscPids(t, instance(t, ref)); len(pids) > 0 {
				t.Errorf("%v still live", pids)
			}
		})
	}
}

func TestALiveForkHasLimitsOfItsOwnAndRunsAlsoWhenItsParentIsPaused(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("parent"))
	if _, err := sb.Start(t.Context(), "count", sandbox.Cmd{Args: []string{"sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > count; sleep 0.02; done"}}); err != nil {
		t.Fatal(err)
	}
	script(t, sb, "begun", "until test -s count; do sleep 0.01; done")
	if err := p.Pause(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	s := testSpec("fork")
	s.Limits = sandbox.Limits{DiskBytes: 16 << 20}
	forks, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{s})
	if err != nil || forks[0].Err != nil {
		t.Fatal(err, forks)
	}
	fork := attach(t, p, forks[0].Ref)
	script(t, fork, "goes-on", "n=$(cat count); until test \"$(cat count)\" -gt \"${n:-0}\"; do sleep 0.01; done")
	if err := sb.Health(t.Context()); err == nil {
		t.Error("the parent is not paused any more")
	}
	hog, err := fork.Start(t.Context(), "hog", sandbox.Cmd{Args: []string{"sh", "-c", "dd if=/dev/zero of=big bs=1M count=40; sleep 60"}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := hog.Wait(t.Context()); err != nil || exit.Limit != sandbox.DiskLimit {
		t.Errorf("%+v, %v", exit, err)
	}
	if err := p.Resume(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	script(t, sb, "parent-goes-on", "n=$(cat count); until test \"$(cat count)\" -gt \"${n:-0}\"; do sleep 0.01; done")
}
