// Package layer copies and measures folders that strangers have filled: the
// files of sandboxes, on their way into a base.
//
// Such a tree may be nested deeper than a path is long and a process has
// descriptors. It holds sparse files, names that are no text, folders that
// are closed to their owner, and what an overlay writes down in its upper
// layer: whiteouts, and extended attributes that hide or redirect folders.
// Nobody may change a tree while it is read here.
package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Copy makes the folder to, which must not be there, a copy of the folder
// called name in dir: contents, holes, modes, owners, times, hard links and
// extended attributes, those of an overlay included. Where the file system
// can share blocks, they are shared. Inode numbers and the times at which
// inodes changed cannot be kept. When it fails, what it made so far is left;
// it is of kind fault.Full when the disk has no room.
func Copy(ctx context.Context, dir int, name, to string) (err error) {
	const op = "copy files"
	if err := unix.Mkdir(to, 0o700); err != nil {
		return copyFault(op, named("mkdir", to, err))
	}
	c := &copier{ctx: ctx, links: -1, linksPath: to + ".links", uid: os.Geteuid(), gid: os.Getegid(), attrs: make([]byte, 2*maxAttr), clone: true}
	defer func() { err = copyFault(op, errors.Join(err, c.forgetLinks())) }()
	top, err := openFolder(dir, name)
	if err != nil {
		return err
	}
	top.dst, err = openMade(unix.AT_FDCWD, to)
	if err == nil {
		top.dstID, err = identify(top.dst)
	}
	if err != nil {
		return errors.Join(err, top.close())
	}
	w := &walk{ctx: ctx, file: c.file, enter: c.folder, leave: c.endFolder}
	return w.run(top)
}

func copyFault(op string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(op, fault.Full, "%w", err).Hinted("Free some space on the disk of the state folder.")
	}
	return fault.Wrap(op, err)
}

type copier struct {
	ctx      context.Context
	uid, gid int

	// links is a folder that has a name for each file with several, by its
	// inode number: no list of them is kept in memory.
	links     int
	linksPath string

	clone bool // the file system may share blocks
	attrs []byte
	data  []byte
}

// folder makes a folder that is ours until all is in it.
func (c *copier) folder(parent *frame, name string, _ *unix.Stat_t) (int, error) {
	if err := unix.Mkdirat(parent.dst, name, 0o700); err != nil {
		return -1, named("mkdir", name, err)
	}
	return openMade(parent.dst, name)
}

func openMade(dir int, name string) (int, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	return fd, named("open", name, err)
}

func (c *copier) endFolder(f *frame) error { return c.describe(f.src, f.dst, &f.st) }

// describe gives an open file what stands in its inode.
func (c *copier) describe(src, dst int, st *unix.Stat_t) error {
	// Times come last, and a mode after the owner, who changing takes bits
	// of it away.
	if err := c.copyAttrs(attrsOf{fd: src}, attrsOf{fd: dst}); err != nil {
		return err
	}
	if int(st.Uid) != c.uid || int(st.Gid) != c.gid {
		if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
			return os.NewSyscallError("chown", err)
		}
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return os.NewSyscallError("chmod", err)
	}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(dst, "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH))
}

// file copies what is no folder.
func (c *copier) file(f *frame, name string, st *unix.Stat_t) error {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	if st.Nlink > 1 {
		if done, err := c.link(f, name, st); done || err != nil {
			return err
		}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		if err := c.regular(f, name, st); err != nil {
			return err
		}
	} else if err := c.special(f, name, st); err != nil {
		return err
	}
	if st.Nlink > 1 {
		return c.remember(f, name, st)
	}
	return nil
}

// link gives a file that was copied before one more name.
func (c *copier) link(f *frame, name string, st *unix.Stat_t) (done bool, err error) {
	if c.links < 0 {
		return false, nil
	}
	err = unix.Linkat(c.links, strconv.FormatUint(st.Ino, 10), f.dst, name, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EMLINK) {
		return false, nil
	}
	return true, named("link", name, err)
}

func (c *copier) remember(f *frame, name string, st *unix.Stat_t) error {
	if c.links < 0 {
		if err := unix.Mkdir(c.linksPath, 0o700); err != nil {
			return named("mkdir", c.linksPath, err)
		}
		var err error
		if c.links, err = openMade(unix.AT_FDCWD, c.linksPath); err != nil {
			return err
		}
	}
	err := unix.Linkat(f.dst, name, c.links, strconv.FormatUint(st.Ino, 10), 0)
	if errors.Is(err, unix.EMLINK) || errors.Is(err, unix.EEXIST) {
		return nil // it has as many names as it can have: the next ones share another inode
	}
	return named("link", name, err)
}

func (c *copier) forgetLinks() error {
	if c.links < 0 {
		return nil
	}
	unix.Close(c.links)
	c.links = -1
	return os.RemoveAll(c.linksPath) // flat, and ours
}

// regular copies a file with its contents.
func (c *copier) regular(f *frame, name string, st *unix.Stat_t) error {
	in, err := openFile(f.src, name, st)
	if err != nil {
		return err
	}
	defer unix.Close(in)
	out, err := unix.Openat(f.dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return named("create", name, err)
	}
	defer unix.Close(out)
	if err := c.contents(in, out, st.Size); err != nil {
		return named("copy", name, err)
	}
	return named("describe", name, c.describe(in, out, st))
}

// openFile opens a regular file, also one that its owner, who is us, may not
// read.
func openFile(dir int, name string, st *unix.Stat_t) (int, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	open := func() (int, error) {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOATIME, 0)
		if errors.Is(err, unix.EPERM) {
			fd, err = unix.Openat(dir, name, flags, 0)
		}
		return fd, err
	}
	fd, err := open()
	if errors.Is(err, unix.EACCES) {
		mode := st.Mode & 0o7777
		if err := unix.Fchmodat(dir, name, mode|0o400, 0); err != nil { // no link: it was looked at, and nobody changes it
			return -1, named("chmod", name, err)
		}
		fd, err = open()
		if e := unix.Fchmodat(dir, name, mode, 0); err == nil && e != nil {
			unix.Close(fd)
			err = e
		}
	}
	return fd, named("open", name, err)
}

// contents copies the bytes, and leaves holes where there are some.
func (c *copier) contents(in, out int, size int64) error {
	if size == 0 {
		return nil
	}
	if c.clone {
		if err := unix.IoctlFileClone(out, in); err == nil {
			return nil
		}
		c.clone = false // the same will be said of the next file
	}
	for at := int64(0); at < size; {
		start, err := unix.Seek(in, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole
		}
		end := size
		if err != nil {
			start = at // a file system that knows of no holes
		} else if end, err = unix.Seek(in, start, unix.SEEK_HOLE); err != nil {
			return os.NewSyscallError("seek", err)
		}
		if err := c.extent(in, out, start, min(end, size)); err != nil {
			return err
		}
		at = max(end, at+1)
	}
	return os.NewSyscallError("truncate", unix.Ftruncate(out, size))
}

func (c *copier) extent(in, out int, at, end int64) error {
	const chunk = 8 << 20
	for at < end {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		from, to := at, at
		n, err := unix.CopyFileRange(in, &from, out, &to, int(min(end-at, chunk)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			return c.slowly(in, out, at, end)
		case err != nil:
			return os.NewSyscallError("copy_file_range", err)
		case n == 0:
			return nil // shorter than it said
		}
		at += int64(n)
	}
	return nil
}

// slowly copies through memory.
func (c *copier) slowly(in, out int, at, end int64) error {
	if c.data == nil {
		c.data = make([]byte, 1<<20)
	}
	for at < end {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		n, err := unix.Pread(in, c.data[:min(int64(len(c.data)), end-at)], at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return os.NewSyscallError("read", err)
		}
		for done := 0; done < n; {
			m, err := unix.Pwrite(out, c.data[done:n], at+int64(done))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err == nil && m == 0 {
				err = io.ErrShortWrite
			}
			if err != nil {
				return os.NewSyscallError("write", err)
			}
			done += m
		}
		at += int64(n)
	}
	return nil
}

// special copies links, pipes, sockets and whiteouts. There can be no other
// device in a sandbox.
func (c *copier) special(f *frame, name string, st *unix.Stat_t) error {
	kind := st.Mode & unix.S_IFMT
	var err error
	switch {
	case kind == unix.S_IFLNK:
		var n int
		target := make([]byte, unix.PathMax+1)
		if n, err = unix.Readlinkat(f.src, name, target); err == nil {
			err = unix.Symlinkat(string(target[:n]), f.dst, name)
		}
	case kind == unix.S_IFIFO, kind == unix.S_IFSOCK, kind == unix.S_IFCHR && st.Rdev == 0:
		err = unix.Mknodat(f.dst, name, kind|0o600, 0)
	default:
		return fault.New("copy", fault.Unsupported, "the sandbox holds a device: %w", named("copy", name, unix.EINVAL))
	}
	if err != nil {
		return named("create", name, err)
	}
	if err := c.copyAttrs(attrsOf{path: procPath(f.src, name)}, attrsOf{path: procPath(f.dst, name)}); err != nil {
		return named("copy attributes", name, err)
	}
	if int(st.Uid) != c.uid || int(st.Gid) != c.gid {
		if err := unix.Fchownat(f.dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return named("chown", name, err)
		}
	}
	if kind != unix.S_IFLNK {
		if err := unix.Fchmodat(f.dst, name, st.Mode&0o7777, 0); err != nil {
			return named("chmod", name, err)
		}
	}
	return named("utimensat", name, unix.UtimesNanoAt(f.dst, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
}

// maxAttr bounds the names, and each value, of extended attributes (xattr(7)).
const maxAttr = 64 << 10

// kept are the beginnings of the attributes that are part of a file. Others
// are the host's own business: labels of its security modules.
var kept = []string{"user.", "trusted.", "system.posix_acl_"}

// attrsOf names the inode whose attributes are meant: by its descriptor or,
// when it cannot be opened, by a path whose last part is no link to follow.
type attrsOf struct {
	fd   int
	path string
}

func (a attrsOf) list(into []byte) (int, error) {
	if a.path == "" {
		return unix.Flistxattr(a.fd, into)
	}
	return unix.Llistxattr(a.path, into)
}

func (a attrsOf) get(name string, into []byte) (int, error) {
	if a.path == "" {
		return unix.Fgetxattr(a.fd, name, into)
	}
	return unix.Lgetxattr(a.path, name, into)
}

func (a attrsOf) set(name string, value []byte) error {
	if a.path == "" {
		return unix.Fsetxattr(a.fd, name, value, 0)
	}
	return unix.Lsetxattr(a.path, name, value, 0)
}

// copyAttrs copies the extended attributes.
func (c *copier) copyAttrs(from, to attrsOf) error {
	list, value := c.attrs[:maxAttr], c.attrs[maxAttr:]
	n, err := from.list(list)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES) {
		return nil // it can have none; or, of a pipe or the like, none that we may see
	}
	if err != nil {
		return os.NewSyscallError("listxattr", err)
	}
	for attr := range bytes.SplitSeq(bytes.TrimRight(list[:n], "\x00"), []byte{0}) {
		name := string(attr)
		if !slices.ContainsFunc(kept, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		size, err := from.get(name, value)
		if errors.Is(err, unix.ENODATA) {
			continue // an overlay lists some that it keeps to itself
		}
		if err != nil {
			return os.NewSyscallError("getxattr "+name, err)
		}
		if err := to.set(name, value[:size]); err != nil {
			return os.NewSyscallError("setxattr "+name, err)
		}
	}
	return nil
}

// Shares reports whether copies in the folder share their blocks with the
// original.
func Shares(dir string) bool {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	other, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false
	}
	defer unix.Close(other)
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		return false
	}
	return unix.IoctlFileClone(other, fd) == nil
}
