package confine

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DropCapabilities leaves this process with the kept capabilities, and
// whatever the calling thread starts with none that it could ever gain.
func DropCapabilities(keep []uint) error {
	var bits uint64
	for _, c := range keep {
		bits |= 1 << c
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("clear ambient capabilities", err)
	}
	for c := uintptr(0); ; c++ {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil {
			break // past the last one that the kernel knows
		}
		if has == 1 {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
				return os.NewSyscallError("drop capability", err)
			}
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(bits), Permitted: uint32(bits)},
		{Effective: uint32(bits >> 32), Permitted: uint32(bits >> 32)},
	}
	// Those of the runtime's threads that are there already have what the
	// process began with. Not the bounds, too: nothing is executed by them,
	// and each stops the whole process.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data[0])), 0)
	if errno == unix.ENOTSUP { // the program is linked with C: a test's
		return os.NewSyscallError("capset", unix.Capset(&header, &data[0]))
	}
	if errno != 0 {
		return os.NewSyscallError("capset", errno)
	}
	return nil
}
