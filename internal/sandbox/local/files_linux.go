package local

import (
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// maxWrites bounds the uploads that are under way in one sandbox.
const maxWrites = 256

// openRegular opens a file of the agent's for reading. It runs in init, as
// the agent: whatever link there is leads to where the agent could go too,
// except through /proc, where init's own files are.
func openRegular(name string) (*os.File, error) {
	const op = "read"
	fd, err := unix.Openat2(unix.AT_FDCWD, name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, pathFault(op, &os.PathError{Op: "open", Path: name, Err: err})
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, pathFault(op, err)
	}
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, pathFault(op, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || fs.Type == unix.PROC_SUPER_MAGIC {
		return nil, fault.New(op, fault.Invalid, "%q is not a regular file", name)
	}
	r, err := unix.Open(fdPath(fd, ""), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, pathFault(op, &os.PathError{Op: "open", Path: name, Err: err})
	}
	return os.NewFile(uintptr(r), name), nil
}

// A write is a file on its way to its name.
type write struct {
	dir        *os.File
	temp, name string
}

// beginWrite makes the folders and an empty file beside the one to come.
func (in *initProcess) beginWrite(token uint64, name string) (*os.File, error) {
	const op = "write"
	if len(in.writes) >= maxWrites {
		return nil, fault.New(op, fault.Unavailable, "%d uploads are under way", len(in.writes))
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathFault(op, err)
	}
	defer unix.Close(root)
	fd, err := tree{root: root}.parent(name)
	if err != nil {
		return nil, writeFault(op, err)
	}
	w := &write{dir: os.NewFile(uintptr(fd), path.Dir(name)), temp: ".upload-" + newInstance() + newInstance(), name: path.Base(name)}
	f, err := unix.Openat(fd, w.temp, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		_ = w.dir.Close()
		return nil, writeFault(op, &os.PathError{Op: "create", Path: name, Err: err})
	}
	in.writes[token] = w
	return os.NewFile(uintptr(f), name), nil
}

// writeFault is pathFault for a file that is to be made: what is missing then
// is no file but a way to make one.
func writeFault(op string, err error) error {
	if err := pathFault(op, err); fault.KindOf(err) != fault.NotFound {
		return err
	}
	return fault.New(op, fault.Invalid, "%w", err)
}

// endWrite gives the file its name, or takes it away again.
func (in *initProcess) endWrite(token uint64, keep bool) error {
	const op = "write"
	w := in.writes[token]
	if w == nil {
		return fault.New(op, fault.Invalid, "no such upload")
	}
	delete(in.writes, token)
	defer w.dir.Close()
	fd := int(w.dir.Fd())
	if keep {
		err := unix.Renameat(fd, w.temp, fd, w.name)
		if err == nil {
			return nil
		}
		_ = unix.Unlinkat(fd, w.temp, 0) // the rename says what is wrong
		return writeFault(op, &os.PathError{Op: "rename", Path: w.name, Err: err})
	}
	_ = unix.Unlinkat(fd, w.temp, 0) // nobody wants it; that it is gone is as good
	return nil
}
