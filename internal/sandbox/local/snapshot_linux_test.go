package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// describeScript says of every file all that a base has to keep.
const describeScript = `cd /; for top in workspace home/agent tmp; do
	find $top -mindepth 1 -path '*/deep-folder' -prune -o -mindepth 1 -printf '%p %y %m %U:%G %n %T@ %l\n' | sed -E 's/^([^ ]+ d [^ ]+ [^ ]+) [0-9]+/\1 -/' | sort
	find $top -path '*/deep-folder' -prune -o -type f -readable -exec sha256sum {} + | sort
	done 2>&1; find workspace -path '*/deep-folder' -prune -o -samefile workspace/linked -print | sort; du -k workspace/holes | cut -f1`

// makeTree leaves the workspace as an agent may.
const makeTree = `mkdir -p kept/deep gone replaced moved/sub && echo 1 > kept/file && echo 1 > kept/changed && echo 1 > removed &&
	echo 1 > gone/file && echo 1 > replaced/old && echo 1 > moved/sub/file && ln -s kept/file link && mkdir -p ~/.cache && echo 1 > ~/.cache/x && echo 1 > /tmp/t &&
	touch -d '2001-02-03 04:05:06.5' kept/file kept`

const changeTree = `echo 2 >> kept/changed && rm removed && rm -r gone && rm -r replaced && mkdir replaced && echo 2 > replaced/new &&
	(mv moved moved-away) && echo 2 > linked && ln linked kept/linked && truncate -s 50M holes && printf x | dd of=holes bs=1 seek=30000000 conv=notrunc status=none &&
	echo closed > closed && chmod 000 closed && mkdir shut && echo 2 > shut/in && chmod 000 shut && mkfifo pipe && chmod 4755 linked && rm ~/.cache/x && echo 2 > /tmp/u &&
	touch -d '2002-02-03 04:05:06.5' replaced`

// deepPath makes a path far longer than 4 KB, and lookDeep goes there.
const (
	deepPath = `perl -e 'for (1..700) { mkdir "deep-folder" and chdir "deep-folder" or die $! } open F, ">file" and print F "bottom" or die $!'`
	lookDeep = `perl -e 'for (1..700) { chdir "deep-folder" or die $! } open F, "file" or die $!; print <F>'`
)

func TestASnapshotKeepsAllThatASandboxHasDone(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("first"))
	script(t, sb, "fill", makeTree)
	if err := p.Freeze(t.Context(), ref, "lower"); err != nil {
		t.Fatal(err)
	}
	for name, below := range map[string]string{"on a base": "lower", "on nothing": ""} {
		t.Run(name, func(t *testing.T) {
			key := strings.ReplaceAll(name, " ", "-")
			s := testSpec(key)
			s.Base = below
			ref, sb := newSandbox(t, p, s)
			if below == "" {
				script(t, sb, "fill", makeTree)
			}
			script(t, sb, "change", changeTree)
			script(t, sb, "deep", deepPath)
			want := script(t, sb, "before", describeScript)
			if !strings.Contains(want, "moved-away/sub/file") || !strings.Contains(want, "kept/linked\nworkspace/linked") {
				t.Fatalf("the tree is not what this test is about:\n%s", want)
			}
			// What was closed is closed again, and nothing else was touched.
			inodes := script(t, sb, "inodes", "stat -c '%n %i %Z' linked kept/* replaced/* holes")
			if err := p.Snapshot(t.Context(), ref, key); err != nil {
				t.Fatal(err)
			}
			if got := script(t, sb, "after", describeScript); got != want {
				t.Errorf("the sandbox was changed by the snapshot:\n%s", difference(got, want))
			}
			if got := script(t, sb, "same", "stat -c '%n %i %Z' linked kept/* replaced/* holes"); got != inodes {
				t.Errorf("its inodes were changed:\n%s", difference(got, inodes))
			}
			s = testSpec(key + "-fork")
			s.Base = key
			_, fork := newSandbox(t, p, s)
			if got := script(t, fork, "look", describeScript); got != want {
				t.Errorf("in a fork:\n%s", difference(got, want))
			}
			if got := script(t, fork, "deep", lookDeep); got != "bottom" {
				t.Errorf("at the end of a long path: %s", got)
			}
		})
	}
}

// difference shows the lines that only one of the two has.
func difference(got, want string) string {
	var b strings.Builder
	for _, side := range []struct{ sign, has, lacks string }{{"+ ", got, want}, {"- ", want, got}} {
		for line := range strings.Lines(side.has) {
			if !strings.Contains("\n"+side.lacks+"\n", "\n"+strings.TrimSuffix(line, "\n")+"\n") {
				b.WriteString(side.sign + line)
			}
		}
	}
	return b.String()
}

func TestProcessesNoticeNothingOfASnapshot(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("held"))
	ctx := t.Context()
	// One runs, and leaves children behind as fast as it can; one stands
	// still already; one is in the middle of vfork.
	_, err := sb.Start(ctx, "busy", sandbox.Cmd{Args: []string{"sh", "-c", "while :; do /bin/true; echo x >> busy; done"}})
	if err != nil {
		t.Fatal(err)
	}
	stopped, err := sb.Start(ctx, "stopped", sandbox.Cmd{Args: []string{"sh", "-c", "kill -STOP $$; echo woken; exit 4"}})
	if err != nil {
		t.Fatal(err)
	}
	state := func(id string) string {
		return script(t, sb, id, `for f in /proc/[0-9]*/stat; do grep -l "^[0-9]* (sh) T" $f 2>/dev/null; done | wc -l`)
	}
	n := 0
	eventually(t, "one has stopped itself", func() bool { n++; return state(fmt.Sprint("stopped-", n)) == "1" })
	if err := p.Snapshot(ctx, ref, "held"); err != nil {
		t.Fatal(err)
	}
	if got := state("after"); got != "1" {
		t.Errorf("%s processes are stopped after the snapshot", got)
	}
	was := script(t, sb, "was", "wc -l < busy")
	eventually(t, "the busy one goes on", func() bool { n++; return script(t, sb, fmt.Sprint("busy-", n), "wc -l < busy") != was })
	script(t, sb, "wake", `kill -CONT $(grep -l "^[0-9]* (sh) T" /proc/[0-9]*/stat | cut -d/ -f3)`)
	if exit, err := stopped.Wait(ctx); err != nil || exit.Code != 4 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// whileSnapshotting begins a snapshot of a sandbox with many files, and calls
// do when a part of them is copied. It returns what came of the snapshot.
func whileSnapshotting(t *testing.T, p *Provider, ctx context.Context, ref sandbox.Ref, key string, do func()) error {
	t.Helper()
	made := make(chan error, 1)
	go func() { made <- p.Snapshot(ctx, ref, key) }()
	for {
		stages, err := filepath.Glob(filepath.Join(p.boxPath(ref.ID), stageDir+"-*", fsDir, "workspace", "*"))
		if err != nil {
			t.Fatal(err)
		}
		if len(stages) > 0 {
			do()
			return <-made
		}
		select {
		case err := <-made:
			t.Logf("it was done before anybody could look: %v", err)
			return err
		default:
		}
	}
}

const manyFiles = `perl -e 'for my $d (1..15) { mkdir "d$d"; for (1..100) { open F, ">d$d/$_" and print F $_ or die $!; close F } }'`

// nothingHalfMade checks that bases are whole or not there, and that nothing of
// a copy is left in the sandboxes.
func nothingHalfMade(t *testing.T, p *Provider) {
	t.Helper()
	infos, err := p.Bases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		if i.Damaged {
			t.Errorf("a half-made base: %+v", i)
		}
	}
	entries, err := os.ReadDir(filepath.Join(p.dir, basesDir))
	if err != nil || len(entries) != len(infos) {
		t.Errorf("%v, %v, listed are %+v", entries, err, infos)
	}
	if left, _ := filepath.Glob(filepath.Join(p.dir, sandboxesDir, "*", stageDir+"*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestASnapshotThatIsCalledOffLeavesNothing(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("off"))
	script(t, sb, "fill", manyFiles)
	ctx, cancel := context.WithCancel(t.Context())
	err := whileSnapshotting(t, p, ctx, ref, "off", cancel)
	if fault.KindOf(err) != fault.Cancelled {
		t.Errorf("%v", err)
	}
	eventually(t, "the copy is gone", func() bool {
		left, _ := filepath.Glob(filepath.Join(p.boxPath("off"), stageDir+"*"))
		return len(left) == 0
	})
	nothingHalfMade(t, p)
	if err := p.Base(t.Context(), "off"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("base: %v", err)
	}
	if out := script(t, sb, "on", "echo goes on"); out != "goes on" {
		t.Error(out)
	}
	if err := p.Snapshot(t.Context(), ref, "off"); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestDestroyDoesNotWaitForASnapshot(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("end"))
	script(t, sb, "fill", manyFiles)
	err := whileSnapshotting(t, p, t.Context(), ref, "end", func() {
		if err := p.Destroy(t.Context(), ref); err != nil {
			t.Error(err)
		}
	})
	if fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	nothingHalfMade(t, p)
}

// TestASupervisorKilledAnywhereLeavesAWholeBaseOrNone kills it at moments all
// over the way, with kill -9.
func TestASupervisorKilledAnywhereLeavesAWholeBaseOrNone(t *testing.T) {
	for what, store := range map[string]func(p *Provider, ctx context.Context, ref sandbox.Ref, key string) error{"freeze": (*Provider).Freeze, "snapshot": (*Provider).Snapshot} {
		t.Run(what, func(t *testing.T) {
			p := newProvider(t)
			whole, none := 0, 0
			// The first tells how long it takes when nobody is killed.
			took := time.Duration(0)
			const tries = 6
			for i := range tries {
				key := fmt.Sprintf("%s-%d", what, i)
				ref, sb := newSandbox(t, p, testSpec(key))
				script(t, sb, "fill", manyFiles)
				want := script(t, sb, "sum", "cat $(find . -type f | sort) | sha256sum")
				h, err := readHandle("test", ref)
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				begun := time.Now()
				go func() { done <- store(p, context.Background(), ref, key) }()
				if i > 0 {
					// Not a wait for something, but the moment to strike at.
					time.Sleep(took * time.Duration(i-1) / (tries - 2))
					if err := syscall.Kill(h.Supervisor.PID, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}
				err = <-done
				if i == 0 {
					took = time.Since(begun)
				}
				if i > 0 {
					eventually(t, "the list has tidied up", func() bool {
						_, err := p.List(t.Context(), nil)
						_, left := os.Lstat(p.boxPath(key))
						return err == nil && errors.Is(left, os.ErrNotExist)
					})
					nothingHalfMade(t, p)
				}
				baseErr := p.Base(t.Context(), key)
				switch {
				case baseErr == nil:
					whole++
					s := testSpec(key + "-look")
					s.Base = key
					_, fork := newSandbox(t, p, s)
					if got := script(t, fork, "sum", "cat $(find . -type f | sort) | sha256sum"); got != want {
						t.Errorf("the base holds %s, want %s", got, want)
					}
				case fault.KindOf(baseErr) == fault.NotFound && err != nil:
					none++
				default:
					t.Errorf("stored: %v, base: %v", err, baseErr)
				}
			}
			t.Logf("%d whole, %d none", whole, none)
			if whole == 0 || none == 0 {
				t.Errorf("all %d were struck at the same side", tries)
			}
		})
	}
}

// smallState is a state folder on a disk of a few megabytes.
func smallState(t *testing.T, size string) *Provider {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := filepath.Join(t.TempDir(), "small")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return New(testOptions(filepath.Join(dir, "state")))
}

func TestAFullDiskIsSaidSoAndNothingIsLeft(t *testing.T) {
	p := smallState(t, "12m")
	ref, sb := newSandbox(t, p, testSpec("full"))
	ctx := t.Context()
	script(t, sb, "fill", "head -c 8000000 /dev/urandom > large")
	if err := p.Snapshot(ctx, ref, "copy"); fault.KindOf(err) != fault.Full || fault.HintOf(err) == "" {
		t.Errorf("snapshot that cannot fit: %v", err)
	}
	nothingHalfMade(t, p)
	// One that could fit, while somebody else fills the disk.
	script(t, sb, "less", "rm large; for i in $(seq 400); do head -c 10000 /dev/urandom > f$i; done")
	filler := filepath.Join(p.dir, "filler")
	var err error
	for range 30 { // on a busy machine the copy is sometimes there first
		err = whileSnapshotting(t, p, ctx, ref, "copy", func() {
			_ = os.WriteFile(filler, make([]byte, 12<<20), 0o600) // as much as there is room for
		})
		if err != nil {
			break
		}
		_ = os.Remove(filler) // there is none when nobody could look
		if err := p.RemoveBase(ctx, "copy"); err != nil {
			t.Fatal(err)
		}
	}
	if fault.KindOf(err) != fault.Full {
		t.Errorf("snapshot while the disk becomes full: %v", err)
	}
	nothingHalfMade(t, p)
	if err := p.Base(ctx, "copy"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("base: %v", err)
	}
	fill := func() error { return os.WriteFile(filler, make([]byte, 12<<20), 0o600) }
	if err := fill(); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk has room: %v", err)
	}
	if err := sb.Upload(ctx, sandbox.Workspace+"/more", strings.NewReader(strings.Repeat("x", 1<<20))); fault.KindOf(err) != fault.Full {
		t.Errorf("upload: %v", err)
	}
	if _, err := p.Create(ctx, testSpec("another")); fault.KindOf(err) != fault.Full {
		t.Errorf("create: %v", err)
	}
	if err := p.Freeze(ctx, ref, "moved"); fault.KindOf(err) != fault.Full {
		t.Errorf("freeze: %v", err)
	}
	if err := p.Base(ctx, "moved"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("base: %v", err)
	}
	// When there is room again the same call goes through.
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := p.Freeze(ctx, ref, "moved"); err != nil {
		t.Errorf("freeze, once more: %v", err)
	}
	if err := p.Destroy(ctx, ref); err != nil {
		t.Error(err)
	}
	nothingHalfMade(t, p)
}
