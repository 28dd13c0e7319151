package local

import (
	"errors"
	"io"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// A process that init starts has init's program until it runs its own, and a
// script whose first line is #!/proc/self/exe has it as its interpreter. So
// the agent can run our program, and the link in /proc leads from there to
// the file on the host. Where the agent has the id of the worker, that file
// is its own: it could change its mode at once, and its content as soon as
// nobody runs it. Init therefore runs a copy of the program that nobody can
// change.

// execUnchangeable runs the program of this process again, with the last of
// its arguments replaced, from a copy that nobody can change. It returns only
// when it fails. It works in a mount namespace of its own.
func execUnchangeable(word string) error {
	program, err := mountedReadOnly()
	if err != nil {
		// As when the folders that it lies in are closed to us.
		if program, err = sealedCopy(); err != nil {
			return err
		}
	}
	args := append(slices.Clone(os.Args[:len(os.Args)-1]), word)
	return os.NewSyscallError("execve", syscall.Exec(fdPath(program, ""), args, runtimeSettings()))
}

// mountedReadOnly returns the file of this program in a mount of its own.
func mountedReadOnly() (int, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return -1, os.NewSyscallError("make mounts private", err)
	}
	name, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return -1, err
	}
	fd, err := cloneTree(name, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, err
	}
	var here, ours unix.Stat_t
	err = errors.Join(unix.Fstat(fd, &here), unix.Stat("/proc/self/exe", &ours))
	if err == nil && (here.Dev != ours.Dev || here.Ino != ours.Ino) {
		err = errors.New("another file has the name of this program")
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// sealedCopy returns a copy of this program in memory.
func sealedCopy() (int, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("program", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3 all of them can be executed
		fd, err = unix.MemfdCreate("program", flags)
	}
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	copied := os.NewFile(uintptr(fd), "program")
	defer copied.Close()
	ours, err := os.Open("/proc/self/exe")
	if err != nil {
		return -1, err
	}
	defer ours.Close()
	if _, err := io.Copy(copied, ours); err != nil {
		return -1, err
	}
	// A file that is open for writing cannot be executed.
	program, err := unix.Open(fdPath(fd, ""), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("open memfd", err)
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		unix.Close(program)
		return -1, os.NewSyscallError("seal memfd", err)
	}
	return program, nil
}
