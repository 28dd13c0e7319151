package confine

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Calls leaves this process and all it ever starts with the system calls of
// the list, and with no way to gain privileges. It works on every thread.
// System calls of another architecture, which are a way around a list of
// numbers, do not exist. What the filter consists of is settled when this
// package is built: see package filter.
func Calls() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("no_new_privs", err)
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	if errno == unix.ENOSYS || errno == unix.EINVAL {
		return noFilters(errno)
	}
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	if r != 0 {
		return errors.New("seccomp: a thread could not be confined")
	}
	return nil
}

// CallsAvailable returns nil when the kernel can do what [Calls] asks of it,
// and otherwise an error of kind fault.Unsupported.
func CallsAvailable() error {
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if errno != 0 {
		return noFilters(errno)
	}
	return nil
}

func noFilters(err error) error {
	return fault.New("seccomp", fault.Unsupported, "the kernel has no filters of system calls: %w", err).
		Hinted("Use a kernel built with CONFIG_SECCOMP_FILTER.")
}
