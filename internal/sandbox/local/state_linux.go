package local

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const stateHint = "Put the state folder on ext4, xfs, btrfs or tmpfs of this host: set SANDBOX_TEMPORAL_HOME."

// unfit are the file systems that no overlay can be written to, or whose locks
// and ids are another host's to decide, by what statfs(2) calls them.
var unfit = map[int64]string{
	unix.NFS_SUPER_MAGIC: "NFS", unix.SMB_SUPER_MAGIC: "SMB", unix.CIFS_SUPER_MAGIC: "SMB", unix.SMB2_SUPER_MAGIC: "SMB",
	unix.AFS_SUPER_MAGIC: "AFS", unix.CEPH_SUPER_MAGIC: "Ceph", unix.V9FS_MAGIC: "9p",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs, as a container's own files are", unix.MSDOS_SUPER_MAGIC: "FAT", unix.EXFAT_SUPER_MAGIC: "exFAT",
}

// openState makes the folders and, the first time, looks whether sandboxes can
// live there. Without that look the first fork would be the first to fail.
func (p *Provider) openState(op string, id identity) error {
	if err := makeState(op, p.dir); err != nil {
		return err
	}
	if p.sound.Load() {
		return nil
	}
	if err := checkFileSystem(op, p.dir, id); err != nil {
		return err
	}
	p.sound.Store(true)
	return nil
}

func checkFileSystem(op, dir string, id identity) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fault.Wrap(op, &os.PathError{Op: "statfs", Path: dir, Err: err})
	}
	if err := fileSystemFault(op, dir, fs.Type); err != nil {
		return err
	}
	if id.Root {
		return nil
	}
	// An overlay in a user namespace keeps its notes in attributes of users.
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fault.Wrap(op, &os.PathError{Op: "open", Path: dir, Err: err})
	}
	defer unix.Close(fd)
	const name = "user.sandbox-temporal.check"
	switch err := unix.Fsetxattr(fd, name, nil, 0); {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fault.New(op, fault.Unsupported, "the file system of %s has no user attributes (tmpfs has some since Linux 6.6)", dir).Hinted(stateHint)
	case err != nil:
		return fileFault(op, fmt.Errorf("set attribute of %s: %w", dir, err))
	}
	if err := unix.Fremovexattr(fd, name); err != nil && !errors.Is(err, unix.ENODATA) { // another worker looks too
		return fileFault(op, os.NewSyscallError("removexattr", err))
	}
	return nil
}

// fileSystemFault refuses a file system by its type.
func fileSystemFault(op, dir string, kind int64) error {
	// Types are 32 bits; on some machines they come with a sign.
	if name, ok := unfit[kind&0xffffffff]; ok {
		return fault.New(op, fault.Unsupported, "the state folder %s is on %s", dir, name).Hinted(stateHint)
	}
	return nil
}
