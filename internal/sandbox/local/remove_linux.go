package local

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// removeDepth is how deep folders are followed before they are moved up: an
// agent can nest folders deeper than a process may have descriptors.
const removeDepth = 64

// removeTree deletes the folder at path and all below it, files named last
// after all others. The tree was made by a stranger: no link in it is
// followed, folders may be closed to their owner, and nested without end.
func removeTree(path, last string) error {
	top, err := os.OpenFile(path, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return ignoreGone(err)
	}
	defer top.Close()
	r := remover{top: int(top.Fd())}
	for {
		if err := r.empty(r.top, 0, last); err != nil {
			return &os.PathError{Op: "remove", Path: path, Err: err}
		}
		if err := os.Remove(filepath.Join(path, last)); ignoreGone(err) != nil {
			return err
		}
		if err := os.Remove(path); !errors.Is(err, unix.ENOTEMPTY) {
			return ignoreGone(err)
		}
	}
}

// listed is how many names are read of a folder at a time.
const listed = 4096

type remover struct {
	top   int // where what lies too deep is moved to, to be met again
	moved int // how many were
}

// empty deletes everything in the folder but keep.
func (r *remover) empty(dir, depth int, keep string) error {
	for {
		names, err := r.list(dir)
		if err != nil {
			return err
		}
		moved := r.moved
		for _, name := range names {
			if name == keep {
				continue
			}
			if err := r.remove(dir, name, depth); err != nil {
				return err
			}
		}
		if len(names) < listed && (dir != r.top || r.moved == moved) {
			return nil // that was all of it
		}
	}
}

// list reads a part of the folder, so that a million names need no memory.
func (r *remover) list(dir int) ([]string, error) {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "folder")
	defer f.Close()
	names, err := f.Readdirnames(listed)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

func (r *remover) remove(dir int, name string, depth int) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return err
	}
	if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err == nil {
		return nil
	}
	sub, err := r.openDir(dir, name)
	if errors.Is(err, unix.ENOENT) {
		return nil // two may be at it
	}
	if err != nil {
		return err
	}
	defer unix.Close(sub)
	if depth >= removeDepth {
		for {
			r.moved++
			up := "deep-" + strconv.Itoa(r.moved)
			err := unix.Renameat2(dir, name, r.top, up, unix.RENAME_NOREPLACE)
			if !errors.Is(err, unix.EEXIST) {
				return err
			}
		}
	}
	for {
		if err := r.empty(sub, depth+1, ""); err != nil {
			return err
		}
		err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil
		case !errors.Is(err, unix.ENOTEMPTY): // somebody has added to it
			return err
		}
	}
}

// openDir opens a folder, and first opens it up when its owner, who is us or
// whom we rule, has closed it.
func (r *remover) openDir(dir int, name string) (int, error) {
	pathFD, err := unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(pathFD)
	return reopenDir(pathFD, 0o700)
}

// reopenDir opens the folder behind an O_PATH descriptor for reading, and
// first gives its owner all rights when some of those needed are missing.
func reopenDir(pathFD int, needed uint32) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(pathFD, &st); err != nil {
		return -1, err
	}
	if st.Mode&needed != needed {
		// The descriptor is a folder for certain, so this is no link that
		// was put in its place.
		if err := unix.Chmod(fdPath(pathFD, ""), 0o700); err != nil {
			return -1, err
		}
	}
	return unix.Openat(pathFD, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}
