// Package confine takes from a process what no agent needs: system calls and
// capabilities. What it takes is gone for everything the process ever starts.
package confine

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// refused are system calls that no coding agent needs and that reach beyond
// a sandbox, or far into the kernel. Names that this architecture does not
// have are skipped.
var refused = []string{
	"mount", "umount2", "pivot_root", "chroot", "fsopen", "fsmount", "fsconfig", "fspick", "move_mount", "open_tree", "open_tree_attr", "mount_setattr",
	"setns", "unshare", "keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd",
	"io_uring_setup", "io_uring_enter", "io_uring_register",
	"kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module",
	"open_by_handle_at", "name_to_handle_at", "quotactl", "quotactl_fd", "swapon", "swapoff", "reboot", "acct",
	"settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "lookup_dcookie", "iopl", "ioperm", "syslog", "vhangup",
	"process_vm_writev", "fanotify_init",
}

const (
	deny   = seccomp.Action(unix.SECCOMP_RET_ERRNO | unix.EPERM)
	absent = seccomp.Action(unix.SECCOMP_RET_ERRNO | unix.ENOSYS)
)

// Calls forbids this process and all it ever starts to gain privileges,
// and the system calls above. It works on every thread.
func Calls() error {
	info, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	if err := refuseForeign(uint32(info.ID)); err != nil {
		return err
	}
	var names []string
	for _, name := range refused {
		if _, ok := info.SyscallNames[name]; ok {
			names = append(names, name)
		}
	}
	groups := []seccomp.SyscallGroup{
		{Action: deny, Names: names},
		{Action: deny, NamesWithCondtions: append(newNamespaces(), strangeSockets()...)},
	}
	if _, ok := info.SyscallNames["clone3"]; ok {
		// Its flags lie in memory, where a filter cannot look; callers fall
		// back to clone when it does not exist.
		groups = append(groups, seccomp.SyscallGroup{Action: absent, Names: []string{"clone3"}})
	}
	return seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: true, Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: groups},
	})
}

func newNamespaces() (names []seccomp.NameWithConditions) {
	for _, flag := range []uint64{unix.CLONE_NEWUSER, unix.CLONE_NEWNS, unix.CLONE_NEWNET, unix.CLONE_NEWPID, unix.CLONE_NEWIPC, unix.CLONE_NEWUTS, unix.CLONE_NEWCGROUP} {
		names = append(names, seccomp.NameWithConditions{Name: "clone", Conditions: []seccomp.Condition{{Argument: 0, Operation: seccomp.BitsSet, Value: flag}}})
	}
	return names
}

// strangeSockets refuses all families but unix, IPv4, IPv6 and netlink. A
// network namespace does not hold vsock back, which leads to the hypervisor.
func strangeSockets() (names []seccomp.NameWithConditions) {
	for _, r := range [][2]uint64{{unix.AF_INET + 1, unix.AF_INET6 - 1}, {unix.AF_INET6 + 1, unix.AF_NETLINK - 1}, {unix.AF_NETLINK + 1, 1<<64 - 1}} {
		names = append(names, seccomp.NameWithConditions{Name: "socket", Conditions: []seccomp.Condition{
			{Argument: 0, Operation: seccomp.GreaterOrEqual, Value: r[0]}, {Argument: 0, Operation: seccomp.LessOrEqual, Value: r[1]},
		}})
	}
	return names
}

// refuseForeign makes system calls of another architecture than our own fail.
// The library lets them pass unseen: 32-bit calls of a 64-bit kernel would be
// a way around the whole list.
func refuseForeign(native uint32) error {
	const archOffset = 4 // in struct seccomp_data
	code := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: archOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: native, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: uint32(absent)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("no_new_privs", err)
	}
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(code)
	if errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	if r != 0 {
		return errors.New("seccomp: a thread could not be confined")
	}
	return nil
}

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
