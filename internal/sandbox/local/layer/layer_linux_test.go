package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// root reports whether the tests may do what only root may.
func root() bool { return os.Geteuid() == 0 }

// fill makes a tree with everything in it that an agent or an overlay can
// leave in an upper layer.
func fill(t *testing.T, top string) {
	t.Helper()
	if err := os.Mkdir(top, 0o750); err != nil {
		t.Fatal(err)
	}
	sh(t, top, `mkdir -p dir/sub closed sticky && echo text > dir/file && : > empty && printf '#!/bin/sh' > tool && chmod 4755 tool
		ln -s dir/file link && ln -s /nowhere/$(printf 'x%.0s' $(seq 200)) dangling && mkfifo pipe
		echo one > first && ln first dir/second && ln first dir/sub/third
		echo secret > closed/in && chmod 000 closed/in && chmod 000 closed && chmod 1777 sticky && chmod 2755 dir
		truncate -s 100M holes && printf middle | dd of=holes bs=1 seek=50000000 conv=notrunc status=none
		touch -d '2001-02-03 04:05:06.123456789' dir/file dir && touch -h -d '2002-01-01' link`)
	for _, name := range []string{"new\nline", "bad\xff", strings.Repeat("n", 255)} {
		if err := os.WriteFile(filepath.Join(top, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	try := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	try(unix.Setxattr(filepath.Join(top, "first"), "user.mine", []byte("value"), 0))
	try(unix.Setxattr(filepath.Join(top, "dir"), "user.overlay.opaque", []byte("y"), 0))
	try(unix.Mknod(filepath.Join(top, "whiteout"), unix.S_IFCHR, 0))
	try(os.Link(filepath.Join(top, "whiteout"), filepath.Join(top, "dir", "whiteout")))
	if root() {
		try(unix.Setxattr(filepath.Join(top, "dir"), "trusted.overlay.redirect", []byte("/old"), 0))
		try(unix.Lsetxattr(filepath.Join(top, "link"), "trusted.overlay.origin", []byte{0, 1, 2, 0xfb}, 0))
		try(os.Lchown(filepath.Join(top, "link"), 12345, 54321))
		try(os.Chown(filepath.Join(top, "dir", "file"), 12345, 54321))
	}
}

func sh(t *testing.T, dir, script string) string {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), "sh", "-c", script) // also of a cleanup, when the test's context is over
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// describe says all there is to say about every file in a tree, in its order.
func describe(t *testing.T, top string) []string {
	t.Helper()
	var lines []string
	links := map[uint64]int{}
	err := filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if statErr := unix.Lstat(path, &st); statErr != nil {
			return statErr
		}
		if err != nil && !root() { // a closed folder: what it is like was said before
			return nil
		}
		rel, _ := filepath.Rel(top, path)
		line := fmt.Sprintf("%q mode %o owner %d:%d links %d size %d rdev %d mtime %d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		if d.IsDir() {
			line = strings.Replace(line, fmt.Sprintf("size %d", st.Size), "size -", 1)
		} else if st.Nlink > 1 {
			if _, ok := links[st.Ino]; !ok {
				links[st.Ino] = len(links)
			}
			line += fmt.Sprintf(" inode #%d", links[st.Ino])
		}
		if target, err := os.Readlink(path); err == nil {
			line += fmt.Sprintf(" to %q", target)
		}
		if d.Type().IsRegular() && st.Size < 1<<20 {
			b, err := os.ReadFile(path)
			if err != nil && !errors.Is(err, os.ErrPermission) {
				return err
			}
			line += fmt.Sprintf(" holds %q", b)
		}
		buf := make([]byte, 4096)
		if n, err := unix.Llistxattr(path, buf); err == nil {
			names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
			slices.Sort(names)
			for _, name := range names {
				if name != "" {
					n, err := unix.Lgetxattr(path, name, buf)
					line += fmt.Sprintf(" %s=%q,%v", name, buf[:max(n, 0)], err)
				}
			}
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// open makes closed folders deletable again at the end of the test.
func open(t *testing.T, dir string) {
	t.Cleanup(func() { sh(t, dir, `find . -type d -exec chmod u+rwx {} + ; find . -type d -exec chmod u+rwx {} +`) })
}

func TestACopyIsTheSameInAllButInodeNumbers(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	fill(t, from)
	want := describe(t, from)
	if err := Copy(t.Context(), unix.AT_FDCWD, from, to); err != nil {
		t.Fatal(err)
	}
	if got := describe(t, to); !slices.Equal(got, want) {
		for i := range max(len(got), len(want)) {
			g, w := "", ""
			if i < len(got) {
				g = got[i]
			}
			if i < len(want) {
				w = want[i]
			}
			if g != w {
				t.Errorf("copy:\n%s\noriginal:\n%s", g, w)
			}
		}
	}
	if now := describe(t, from); !slices.Equal(now, want) {
		t.Error("the original was changed")
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(to, "holes"), &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("100 MB of holes became %d bytes, %v", st.Blocks*512, err)
	}
	b, err := os.ReadFile(filepath.Join(to, "holes"))
	if err != nil || string(b[50000000:50000006]) != "middle" {
		t.Errorf("the middle is %q, %v", b[50000000:50000006], err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*.links"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestNestingHasNoEnd makes a path far longer than 4 KB, and deeper than
// there are descriptors.
func TestNestingHasNoEnd(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "from")
	const depth = 3000
	fd := nest(t, from, depth)
	if err := unix.Mkdirat(fd, "beside", 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := unix.Openat(fd, "bottom", unix.O_CREAT|unix.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(f)
	unix.Close(fd)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = 400
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	if err := Copy(t.Context(), unix.AT_FDCWD, from, filepath.Join(dir, "to")); err != nil {
		t.Fatal(err)
	}
	before, err := Size(t.Context(), unix.AT_FDCWD, from)
	if err != nil {
		t.Fatal(err)
	}
	after, err := Size(t.Context(), unix.AT_FDCWD, filepath.Join(dir, "to"))
	if err != nil || before != after || before < depth*4096 {
		t.Errorf("%d bytes became %d, %v", before, after, err)
	}
	// The standard library opens by whole paths only.
	sh(t, dir, "rm -rf from to")
}

// nest makes folders in folders and returns the innermost.
func nest(t *testing.T, top string, depth int) int {
	t.Helper()
	if err := os.Mkdir(top, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range depth {
		if err := unix.Mkdirat(fd, "a-folder", 0o700); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, "a-folder", unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = next
	}
	return fd
}

func TestSizeIsThatOfTheDisk(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	top := filepath.Join(dir, "top")
	fill(t, top)
	if err := os.WriteFile(filepath.Join(top, "large"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Size(t.Context(), unix.AT_FDCWD, top)
	if err != nil {
		t.Fatal(err)
	}
	if !root() {
		sh(t, top, "chmod 700 closed") // du is no more than its user
	}
	var want int64
	if _, err := fmt.Sscan(sh(t, dir, "du -s -B1 top"), &want); err != nil {
		t.Fatal(err)
	}
	// A block that three names share is divided with a remainder.
	if d := got - want; d < -8 || d > 8 {
		t.Errorf("%d bytes, du says %d", got, want)
	}
}

func TestACopyThatIsCalledOffStops(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	fill(t, filepath.Join(dir, "from"))
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	begun := time.Now()
	if err := Copy(ctx, unix.AT_FDCWD, filepath.Join(dir, "from"), filepath.Join(dir, "to")); !errors.Is(err, enough) {
		t.Errorf("%v after %s", err, time.Since(begun))
	}
}
