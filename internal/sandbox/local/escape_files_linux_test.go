package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// longTests is the variable that has the longest tests run, which take
// minutes and gigabytes.
const longTests = "SANDBOX_TEMPORAL_LONG_TESTS"

// sized returns how much of something a test uses: a part of it, unless the
// longest tests are asked for, and a fifth of that in short ones.
func sized(part, whole int) int {
	switch {
	case os.Getenv(longTests) == "1":
		return whole
	case testing.Short():
		return part / 5
	default:
		return part
	}
}

// attackFiles is after a file of its own and one of the system's.
func attackFiles(args []string) []probe {
	own, system := args[0], args[1]
	beside := own + "-beside"
	const setFlags, immutable = 0x40086602, 0x10 // FS_IOC_SETFLAGS, FS_IMMUTABLE_FL
	return []probe{
		opens("write "+system, system, unix.O_RDWR),
		{what: "write " + system + " by a descriptor to read it", try: func() error {
			f, err := os.Open(system)
			if err != nil {
				return err
			}
			defer f.Close()
			return opens("", fdPath(int(f.Fd()), ""), unix.O_RDWR).try()
		}},
		{what: "truncate " + system, try: func() error {
			st, err := os.Stat(system)
			if err != nil {
				return err
			}
			return unix.Truncate(system, st.Size())
		}},
		{what: "change the mode of " + system, try: func() error { return unix.Chmod(system, 0o755) }},
		{what: "change the times of " + system, try: func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, system, nil, 0) }},
		{what: "have " + system + " in its own folder", unprovable: "they may lie on different disks", try: func() error { return unix.Link(system, beside) }},
		{what: "give " + own + " to root", try: func() error {
			err := unix.Lchown(own, 0, 0)
			if errors.Is(err, unix.EINVAL) {
				err = unix.EPERM // root has not even a number here
			}
			return err
		}},
		{what: "give " + own + " privileges", try: func() error {
			// VFS_CAP_REVISION_2 with CAP_NET_RAW, as setcap(8) writes it.
			return unix.Setxattr(own, "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0)
		}},
		{what: "say to an overlay what is below it", try: func() error { return unix.Setxattr(own, "trusted.overlay.redirect", []byte("/x"), 0) }},
		{what: "keep " + own + " from being removed", try: func() error {
			f, err := os.Open(own)
			if err != nil {
				return err
			}
			defer f.Close()
			var flags uint64 = immutable
			if err := call("", unix.SYS_IOCTL, f.Fd(), setFlags, uintptr(unsafe.Pointer(&flags))).try(); err != nil {
				return err
			}
			flags = 0
			return call("", unix.SYS_IOCTL, f.Fd(), setFlags, uintptr(unsafe.Pointer(&flags))).try()
		}},
	}
}

func TestTheAgentChangesNoFilesButItsOwn(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, withAttacker(t, testSpec("plain")))
	script(t, sb, "make", "touch own")
	const own = sandbox.Workspace + "/own"
	inSandbox(t, sb, "files", own, "/usr/bin/env")
	inSandbox(t, sb, "files", own, attackPath)
	inSandbox(t, sb, "files", own, "/etc/passwd")
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := withAttacker(t, testSpec("fork"))
	s.Base = "base"
	_, fork := newSandbox(t, p, s)
	inSandbox(t, fork, "files", own, "/usr/bin/env")
	if os.Geteuid() == 0 {
		dir := t.TempDir()
		for _, name := range []string{"own", "system"} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		onHost(t, nil, "files", filepath.Join(dir, "own"), filepath.Join(dir, "system"))
	}
}

// TestABaseCannotBeLedIntoAnotherFolder has the agent say to an overlay, with
// the attributes that an overlay keeps for itself, that one folder is really
// another. Root can: that shows that it would be seen.
func TestABaseCannotBeLedIntoAnotherFolder(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	ref, sb := newSandbox(t, p, testSpec("one"))
	script(t, sb, "fill", "mkdir led target; echo secret > target/secret")
	if err := p.Freeze(ctx, ref, "first"); err != nil {
		t.Fatal(err)
	}
	s := withAttacker(t, testSpec("two"))
	s.Base = "first"
	ref, sb = newSandbox(t, p, s)
	script(t, sb, "lead", "touch led/here; "+strings.Join(attackLine("lead", sandbox.Workspace+"/led", "/workspace/target").Args, " "))
	if err := p.Freeze(ctx, ref, "second"); err != nil {
		t.Fatal(err)
	}
	look := func(key string) string {
		t.Helper()
		s := testSpec(key)
		s.Base = "second"
		ref, sb := newSandbox(t, p, s)
		out := script(t, sb, "look", "ls -A led")
		if err := p.Destroy(ctx, ref); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if out := look("three"); out != "here" {
		t.Errorf("the folder holds %q", out)
	}
	if os.Geteuid() != 0 {
		return
	}
	led := filepath.Join(basePath(p.dir, "second"), fsDir, "workspace", "led")
	if err := unix.Setxattr(led, "trusted.overlay.redirect", []byte("/workspace/target"), 0); err != nil {
		t.Fatal(err)
	}
	if out := look("four"); out != "here\nsecret" {
		t.Errorf("not even root leads it astray: %q", out)
	}
}

// lead sets every attribute that an overlay could take for its own.
func lead(args []string) error {
	for _, prefix := range []string{"trusted.overlay.", "user.overlay."} {
		for name, value := range map[string]string{"redirect": args[1], "opaque": "n", "metacopy": "", "origin": "", "impure": "y"} {
			fmt.Println(prefix+name, unix.Setxattr(args[0], prefix+name, []byte(value), 0))
		}
	}
	return nil
}

// swap has a folder and links to the targets take turns under one name, as
// fast as it can.
func swap(args []string) error {
	dir, targets := args[0], args[1:]
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("inside"), 0o644); err != nil {
		return err
	}
	var links []string
	for i, target := range targets {
		links = append(links, fmt.Sprint(dir, "-", i))
		if err := os.Symlink(target, links[i]); err != nil {
			return err
		}
	}
	fmt.Println("swapping")
	for i := 0; ; i++ {
		for range 2 { // there and back
			if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, links[i%len(links)], unix.RENAME_EXCHANGE); err != nil {
				return err
			}
		}
	}
}

// TestUploadAndDownloadWinEveryRaceWithALink carries files while the agent
// swaps a folder of their path for links, to the host among others.
func TestUploadAndDownloadWinEveryRaceWithALink(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("prepare"))
	script(t, sb, "fill", "echo x > x")
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	for _, base := range []string{"", "base"} {
		t.Run("on a base: "+strconv.FormatBool(base != ""), func(t *testing.T) {
			ctx := t.Context()
			victim := t.TempDir()
			if err := os.WriteFile(filepath.Join(victim, "file"), []byte("secret"), 0o666); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(victim, 0o777); err != nil {
				t.Fatal(err)
			}
			s := withAttacker(t, testSpec("racer"))
			s.Base = base
			_, sb := newSandbox(t, p, s)
			script(t, sb, "secret", "mkdir /tmp/else; echo else > /tmp/else/file")
			const dir = sandbox.Workspace + "/dir"
			deed, err := sb.Start(ctx, "swap", attackLine("swap", dir, victim, "/tmp/else", "/proc/1/root"+victim, "/proc/self/root/tmp/else", "/etc", "/opt/sandbox/bin", "../../../../../../"+victim))
			if err != nil {
				t.Fatal(err)
			}
			// The check can see it: whoever follows the links on the host is led
			// out.
			naive := filepath.Join(p.boxPath("racer"), fsDir, "workspace", "dir", "file")
			eventually(t, "a naive reader is led out", func() bool {
				b, err := os.ReadFile(naive)
				return err == nil && string(b) == "secret"
			})
			seen := map[string]int{}
			for i := range sized(300, 20_000) {
				err := sb.Upload(ctx, dir+"/file", strings.NewReader("uploaded"))
				seen["upload "+string(fault.KindOf(err))]++
				if err != nil && fault.KindOf(err) != fault.Invalid {
					t.Fatalf("upload: %v", err)
				}
				// Folders are made on the way.
				err = sb.Upload(ctx, fmt.Sprintf("%s/new-%d/file", dir, i), strings.NewReader("uploaded"))
				if err != nil && fault.KindOf(err) != fault.Invalid {
					t.Fatalf("upload: %v", err)
				}
				f, err := sb.Download(ctx, dir+"/file")
				if err != nil {
					seen["download "+string(fault.KindOf(err))]++
					if k := fault.KindOf(err); k != fault.Invalid && k != fault.NotFound {
						t.Fatalf("download: %v", err)
					}
					continue
				}
				b, err := io.ReadAll(io.LimitReader(f, 100))
				f.Close()
				if err != nil {
					t.Fatal(err)
				}
				switch text := strings.TrimSpace(string(b)); text {
				case "inside", "uploaded", "else":
					seen["download "+text]++
				default:
					t.Fatalf("downloaded %q", text)
				}
			}
			if _, ended, err := deed.Exit(ctx); ended || err != nil {
				out, _ := sandbox.ReadAll(ctx, deed, sandbox.Stdout, 1000)
				t.Fatalf("nobody swapped any more: %v: %s", err, out)
			}
			if entries, err := os.ReadDir(victim); err != nil || len(entries) != 1 {
				t.Errorf("the host's folder holds %v, %v", entries, err)
			}
			if b, err := os.ReadFile(filepath.Join(victim, "file")); err != nil || string(b) != "secret" {
				t.Errorf("the host's file holds %q, %v", b, err)
			}
			t.Logf("%v", seen)
		})
	}
}

// oddNames are names that a program which trusts names comes to grief on.
var oddNames = []string{"new\nline", "\xff\xfe bad \x80", "\x1b]0;title\x07\x1b[2J", "-rf", "...", " ", "\u202eevil", "a\tb", `back\slash`, "$(id)", "`id`", "'\"", "*", "con\u0000"[:3], strings.Repeat("x", 255), strings.Repeat("\xf0", 255)}

func TestFilesMayHaveAnyName(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	check := func(sb sandbox.Sandbox, path string) {
		t.Helper()
		f, err := sb.Download(ctx, path)
		if err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		defer f.Close()
		if b, err := io.ReadAll(f); err != nil || string(b) != path {
			t.Errorf("%q holds %q, %v", path, b, err)
		}
	}
	ref, sb := newSandbox(t, p, testSpec("names"))
	for _, name := range oddNames {
		for _, path := range []string{sandbox.Workspace + "/" + name, sandbox.Home + "/" + strings.Repeat(name+"/", 2) + name} {
			if err := sb.Upload(ctx, path, strings.NewReader(path)); err != nil {
				t.Fatalf("%q: %v", path, err)
			}
			check(sb, path)
		}
	}
	// As the agent sees them: one entry each, and a program of such a name runs.
	if out := script(t, sb, "count", `find . -mindepth 1 -print0 | tr -dc '\000' | wc -c`); out != fmt.Sprint(len(oddNames)) {
		t.Errorf("the agent sees %s files, want %d", out, len(oddNames))
	}
	script(t, sb, "program", "printf '#!/bin/sh\\necho ran\\n' | tee -- * ... >/dev/null; chmod 755 -- * ...")
	for i, name := range oddNames {
		out, _, exit, err := sandbox.Output(ctx, sb, fmt.Sprint("run-", i), sandbox.Cmd{Args: []string{sandbox.Workspace + "/" + name}, Dir: sandbox.Home + "/" + name}, 100)
		if err != nil || exit.Code != 0 || string(out) != "ran\n" {
			t.Errorf("%q: %s, %+v, %v", name, out, exit, err)
		}
	}
	if err := p.Freeze(ctx, ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("fork")
	s.Base = "base"
	_, fork := newSandbox(t, p, s)
	for _, name := range oddNames {
		check(fork, sandbox.Home+"/"+name+"/"+name+"/"+name)
	}
}

// litter makes so many files, half of them in one folder and half of them
// each ten folders deep, with some links and odd names among them.
func litter(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	make := func(name string, i int) error {
		switch i % 100 {
		case 1:
			return os.Symlink("/etc/passwd", name)
		case 2:
			name += oddNames[i/100%8]
		}
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o400)
		if err != nil {
			return &os.PathError{Op: "create", Path: name, Err: err}
		}
		return unix.Close(fd)
	}
	flat := filepath.Join(args[0], "flat")
	if err := os.Mkdir(flat, 0o755); err != nil {
		return err
	}
	for i := range n / 2 {
		if err := make(filepath.Join(flat, strconv.Itoa(i)), i); err != nil {
			return err
		}
	}
	dir := ""
	for i := range n - n/2 {
		if i%100 == 0 {
			dir = filepath.Join(args[0], fmt.Sprintf("deep-%d", i), strings.Repeat("d/", 9))
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		if err := make(filepath.Join(dir, strconv.Itoa(i)), i); err != nil {
			return err
		}
	}
	fmt.Println("made", n)
	return nil
}

func TestAMillionFilesAreRemoved(t *testing.T) {
	n := sized(50_000, 1_000_000)
	if os.Geteuid() != 0 {
		n /= 10 // root's run shows the rest
	}
	p := newProvider(t)
	ref, sb := newSandbox(t, p, withAttacker(t, testSpec("litter")))
	long, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	start := time.Now()
	out, errs, exit, err := sandbox.Output(long, sb, "litter", attackLine("litter", sandbox.Workspace, strconv.Itoa(n)), 1000)
	if err != nil || string(out) != fmt.Sprintf("made %d\n", n) {
		t.Fatalf("%s%s, %+v, %v", out, errs, exit, err)
	}
	made := time.Since(start)
	if err := sb.Health(long); err != nil {
		t.Error(err)
	}
	start = time.Now()
	if err := p.Destroy(long, ref); err != nil {
		t.Fatal(err)
	}
	removed := time.Since(start)
	t.Logf("%d files made in %v and removed in %v", n, made, removed)
	if most := 2*time.Second + time.Duration(n)*2*time.Millisecond; removed > most {
		t.Errorf("it took %v to remove %d files, at most %v is bearable", removed, n, most)
	}
	if _, err := os.Lstat(p.boxPath("litter")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
}

// flood writes so many bytes to its standard output.
func flood(args []string) error {
	n, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return err
	}
	piece := []byte(strings.Repeat("all work and no play makes a dull agent\n", 1<<14))
	for n > 0 {
		k, err := os.Stdout.Write(piece[:min(n, int64(len(piece)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

// TestAFloodOfOutputIsKeptUpToTheBound lets a program write, without anybody
// reading, far more than fits into memory. The supervisor takes all of it,
// keeps what it may, and stays small.
func TestAFloodOfOutputIsKeptUpToTheBound(t *testing.T) {
	n := max(int64(sized(200<<20, 10<<30)), 200<<20) // less the supervisor might as well have in memory
	p := newProvider(t)
	ref, sb := newSandbox(t, p, withAttacker(t, testSpec("flood")))
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	long, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	start := time.Now()
	deed, err := sb.Start(long, "flood", attackLine("flood", strconv.FormatInt(n, 10)))
	if err != nil {
		t.Fatal(err)
	}
	exit, err := deed.Wait(long)
	if err != nil || exit.Code != 0 {
		t.Fatalf("%+v, %v", exit, err)
	}
	took := time.Since(start)
	want := min(n, maxOutput)
	st, err := os.Stat(filepath.Join(p.boxPath("flood"), outputName("flood", sandbox.Stdout)))
	if err != nil || st.Size() != want {
		t.Errorf("%d bytes are kept, want %d: %v", st.Size(), want, err)
	}
	b := make([]byte, 40)
	if k, err := deed.ReadAt(long, sandbox.Stdout, b, want-want%40-40); err != nil || !strings.HasPrefix(string(b[:k]), "all work") {
		t.Errorf("near the end it reads %q, %v", b[:k], err)
	}
	peak := peakMemory(t, h.Supervisor.PID)
	t.Logf("%d MiB of output in %v, supervisor at most %d MiB", n>>20, took, peak>>20)
	if peak > 100<<20 {
		t.Errorf("the supervisor had %d MiB", peak>>20)
	}
}

// peakMemory returns the most memory that the process had, in bytes.
func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "VmHWM:")
	var kib int64
	if _, err := fmt.Sscan(after, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}
