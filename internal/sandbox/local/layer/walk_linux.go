package layer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const (
	// maxOpen is how many folders above the current one are kept open. Those
	// further up are opened again, from below, on the way back.
	maxOpen = 64

	// maxWaiting bounds the names of folders that wait to be visited, in
	// bytes: an agent can make millions of them, and a supervisor is small.
	maxWaiting = 64 << 20
)

var errTooMany error = &fault.Error{Op: "read folder", Kind: fault.Unsupported, Err: tooMany{}}

type tooMany struct{}

// Error is not made when the program starts: every supervisor and init would
// pay for it.
func (tooMany) Error() string {
	return fmt.Sprintf("too many folders: the names of those that wait to be visited take more than %d bytes", maxWaiting)
}

// A frame is a folder on the way from the top to where the walk is.
type frame struct {
	src, dst int         // descriptors; -1: not open at the moment, or, of dst, none is wanted
	st       unix.Stat_t // of the source
	dstID    [2]uint64   // device and inode of dst
	closed   bool        // the source was opened up, and gets its mode back
	dirs     []string    // still to be visited
}

// A walk goes through a tree that nobody changes meanwhile, folder by folder.
// It follows no link, and the depth of the tree costs memory, not descriptors.
type walk struct {
	ctx     context.Context
	frames  []*frame
	waiting int // bytes of names
	dirent  []byte

	file  func(f *frame, name string, st *unix.Stat_t) error                // everything but folders
	enter func(f *frame, name string, st *unix.Stat_t) (dst int, err error) // a folder below f; dst is the walk's to close
	leave func(f *frame) error                                              // everything in f was visited
}

// run visits what is below src, and leaves it too. The descriptors are the
// walk's to close.
func (w *walk) run(top *frame) (err error) {
	w.dirent = make([]byte, 64<<10)
	defer func() {
		for i := len(w.frames) - 1; i >= 0; i-- {
			if i > 0 {
				_ = w.frames[i-1].unpark(w.frames[i]) // it may have a mode to get back; what went wrong is known
			}
			err = errors.Join(err, w.frames[i].close())
		}
	}()
	if err := w.push(top); err != nil {
		return err
	}
	for len(w.frames) > 0 {
		f := w.frames[len(w.frames)-1]
		if len(f.dirs) == 0 {
			err = w.up(f)
		} else {
			name := f.dirs[len(f.dirs)-1]
			f.dirs = f.dirs[:len(f.dirs)-1]
			w.waiting -= len(name)
			err = w.down(f, name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// push makes f the current folder and visits what is in it, but for folders.
func (w *walk) push(f *frame) error {
	w.frames = append(w.frames, f)
	if far := len(w.frames) - 1 - maxOpen; far >= 0 {
		if err := w.frames[far].park(); err != nil {
			return err
		}
	}
	for {
		if err := context.Cause(w.ctx); err != nil {
			return err
		}
		n, err := unix.ReadDirent(f.src, w.dirent)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("getdents", err)
		}
		if n == 0 {
			return nil
		}
		_, _, names := unix.ParseDirent(w.dirent[:n], -1, nil)
		for _, name := range names {
			if err := w.visit(f, name); err != nil {
				return err
			}
		}
	}
}

func (w *walk) visit(f *frame, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(f.src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return named("stat", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return w.file(f, name, &st)
	}
	if w.waiting += len(name); w.waiting > maxWaiting {
		return errTooMany
	}
	f.dirs = append(f.dirs, strings.Clone(name)) // ParseDirent's names share one buffer
	return nil
}

func (w *walk) down(parent *frame, name string) error {
	f, err := openFolder(parent.src, name)
	if err != nil {
		return err
	}
	f.dst, err = w.enter(parent, name, &f.st)
	if err == nil && f.dst >= 0 {
		f.dstID, err = identify(f.dst)
	}
	if err != nil {
		return errors.Join(err, f.close())
	}
	return w.push(f)
}

// up leaves f. What is above is opened first: f may be closed for good then.
func (w *walk) up(f *frame) error {
	last := len(w.frames) - 1
	if last > 0 {
		if err := w.frames[last-1].unpark(f); err != nil {
			return err
		}
	}
	err := w.leave(f)
	w.frames = w.frames[:last]
	return errors.Join(err, f.close())
}

func (f *frame) park() error {
	for _, fd := range []*int{&f.src, &f.dst} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
	return nil
}

// unpark opens the folder again that child lies in.
func (f *frame) unpark(child *frame) error {
	if f.src >= 0 {
		return nil
	}
	reopen := func(from int, want [2]uint64) (int, error) {
		fd, err := unix.Openat(from, "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, os.NewSyscallError("open ..", err)
		}
		got, err := identify(fd)
		if err == nil && got != want {
			err = errors.New("a folder was moved while it was read")
		}
		if err != nil {
			unix.Close(fd)
			return -1, err
		}
		return fd, nil
	}
	var err error
	if f.src, err = reopen(child.src, [2]uint64{f.st.Dev, f.st.Ino}); err != nil {
		return err
	}
	if child.dst >= 0 {
		f.dst, err = reopen(child.dst, f.dstID)
	}
	return err
}

// close lets go of the folder and gives it its mode back.
func (f *frame) close() (err error) {
	if f.closed && f.src >= 0 {
		err = os.NewSyscallError("chmod", unix.Fchmod(f.src, f.st.Mode&0o7777))
	}
	return errors.Join(err, f.park())
}

func identify(fd int) ([2]uint64, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return [2]uint64{st.Dev, st.Ino}, os.NewSyscallError("stat", err)
}

// openFolder opens a folder for reading. One that is closed to its owner, who
// is us, is opened up until the frame is closed.
func openFolder(dir int, name string) (*frame, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	path, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, named("open", name, err)
	}
	defer unix.Close(path)
	f := &frame{src: -1, dst: -1}
	if err := unix.Fstat(path, &f.st); err != nil {
		return nil, named("stat", name, err)
	}
	if errors.Is(unix.Faccessat2(path, "", unix.R_OK|unix.X_OK, unix.AT_EACCESS|unix.AT_EMPTY_PATH), unix.EACCES) {
		if err := unix.Chmod(procPath(path, ""), f.st.Mode&0o7777|0o700); err != nil {
			return nil, named("chmod", name, err)
		}
		f.closed = true
	}
	if f.src, err = unix.Openat(path, ".", flags|unix.O_NOATIME, 0); errors.Is(err, unix.EPERM) {
		f.src, err = unix.Openat(path, ".", flags, 0)
	}
	if err != nil {
		f.src = -1
		return nil, named("open", name, err)
	}
	return f, nil
}

// procPath names what lies in the folder behind fd, for calls that only take
// paths.
func procPath(fd int, name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", fd, name) }

// named gives the error of a system call the name of what it was about, cut:
// a stranger chose it.
func named(op, name string, err error) error {
	if err == nil {
		return nil
	}
	const most = 200
	if len(name) > most {
		name = name[:most] + "…"
	}
	return &os.PathError{Op: op, Path: name, Err: err}
}
