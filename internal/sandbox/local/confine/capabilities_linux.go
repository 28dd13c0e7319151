package confine

import (
	"os"

	"golang.org/x/sys/unix"
)

// DropCapabilities leaves the calling thread with the kept capabilities, and
// whatever it starts with none that it could ever gain.
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
	return os.NewSyscallError("capset", unix.Capset(&header, &data[0]))
}
