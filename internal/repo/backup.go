package repo

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"syscall"
)

// A backup is what files of a work tree were before they were changed.
type backup struct {
	root  *os.Root // nothing outside of the work tree is read or written
	files []saved
	fresh []string // folders that were not there, outermost first
}

type saved struct {
	name string
	mode fs.FileMode // 0: there was nothing
	link string
	copy string // where the contents are
}

// backUp copies the named files of the work tree at top into the folder safe.
func backUp(top string, names []string, safe string) (*backup, error) {
	root, err := os.OpenRoot(top)
	if err != nil {
		return nil, diskFault(err)
	}
	b := &backup{root: root}
	if err := os.Mkdir(safe, 0o700); err != nil {
		b.close()
		return nil, diskFault(err)
	}
	seen := map[string]bool{}
	for i, name := range names {
		f, err := b.save(name, filepath.Join(safe, strconv.Itoa(i)))
		if err != nil {
			b.close()
			return nil, diskFault(err)
		}
		b.files = append(b.files, f)
		var dirs []string
		for d := path.Dir(name); d != "." && !seen[d]; d = path.Dir(d) {
			seen[d] = true
			if _, err := root.Lstat(d); errors.Is(err, fs.ErrNotExist) {
				dirs = append([]string{d}, dirs...)
			}
		}
		b.fresh = append(b.fresh, dirs...)
	}
	return b, nil
}

func (b *backup) close() { _ = b.root.Close() }

// save copies one file. One below something that is no folder is not there.
func (b *backup) save(name, to string) (saved, error) {
	f := saved{name: name}
	info, err := b.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		f.mode = info.Mode()
		f.link, err = b.root.Readlink(name)
	case info.Mode().IsRegular():
		f.mode, f.copy = info.Mode(), to
		var in *os.File
		if in, err = b.root.Open(name); err != nil {
			return f, err
		}
		defer in.Close()
		var out *os.File
		if out, err = os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			return f, err
		}
		_, err = io.Copy(out, in)
		err = errors.Join(err, out.Close())
	}
	return f, err // a folder (a submodule) or a device is left alone by git
}

// restore puts everything back as it was.
func (b *backup) restore() error {
	var errs []error
	for _, f := range b.files {
		errs = append(errs, b.put(f))
	}
	for i := len(b.fresh) - 1; i >= 0; i-- {
		_ = b.root.Remove(b.fresh[i]) // fails when something of the user lies in it
	}
	return diskFault(errors.Join(errs...))
}

func (b *backup) put(f saved) error {
	now, err := b.root.Lstat(f.name)
	there := err == nil
	switch {
	case f.mode == 0:
		if there && !now.IsDir() {
			return b.root.Remove(f.name)
		}
		return nil
	case f.mode&fs.ModeSymlink != 0:
		if there {
			if to, err := b.root.Readlink(f.name); err == nil && to == f.link {
				return nil
			}
			if err := b.root.RemoveAll(f.name); err != nil {
				return err
			}
		}
		if err := b.root.MkdirAll(path.Dir(f.name), 0o777); err != nil {
			return err
		}
		return b.root.Symlink(f.link, f.name)
	case f.copy == "":
		return nil
	}
	in, err := os.Open(f.copy)
	if err != nil {
		return err
	}
	defer in.Close()
	if there && (!now.Mode().IsRegular() || now.Mode() != f.mode) {
		if err := b.root.RemoveAll(f.name); err != nil {
			return err
		}
	}
	if err := b.root.MkdirAll(path.Dir(f.name), 0o777); err != nil {
		return err
	}
	out, err := b.root.OpenFile(f.name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, f.mode.Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
