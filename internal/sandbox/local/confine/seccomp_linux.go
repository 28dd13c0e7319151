package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// What a filter answers.
const (
	allow      = uint32(unix.SECCOMP_RET_ALLOW)
	deny       = uint32(unix.SECCOMP_RET_ERRNO | unix.EPERM)
	missing    = uint32(unix.SECCOMP_RET_ERRNO | unix.ENOSYS)
	noFamily   = uint32(unix.SECCOMP_RET_ERRNO | unix.EAFNOSUPPORT)
	noProtocol = uint32(unix.SECCOMP_RET_ERRNO | unix.EPROTONOSUPPORT)
)

// Calls leaves this process and all it ever starts with the system calls of
// the list, and with no way to gain privileges. It works on every thread.
// System calls of another architecture, which are a way around a list of
// numbers, do not exist.
func Calls() error {
	program, err := assemble()
	if err != nil {
		return err
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("seccomp: %w", err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("no_new_privs", err)
	}
	fprog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(code)
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

// assemble makes the filter for the architecture that this program was built
// for: first the calls whose arguments matter, then the list.
func assemble() ([]bpf.Instruction, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	have := func(names string) (found []string) {
		for name := range strings.FieldsSeq(names) {
			if _, ok := info.SyscallNames[name]; ok {
				found = append(found, name)
			}
		}
		return found
	}
	policy := seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: []seccomp.SyscallGroup{
		{Action: seccomp.Action(deny), Names: have(refused)},
		{Action: seccomp.ActionAllow, Names: have(allowed)},
	}}
	list, err := policy.Assemble()
	if err != nil {
		return nil, fmt.Errorf("seccomp: %w", err)
	}
	// The library knows EPERM only as the answer to what is on no list. That
	// answer is its last instruction.
	last := len(list) - 1
	if list[last] != (bpf.RetConstant{Val: deny}) {
		return nil, errors.New("seccomp: the library builds filters in another way now")
	}
	list[last] = bpf.RetConstant{Val: missing}
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: archAt, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipTrue: 1},
		bpf.RetConstant{Val: missing},
	}
	for name, code := range conditions() {
		number, ok := info.SyscallNames[name]
		if !ok {
			return nil, fmt.Errorf("seccomp: %s has no %s", info.Name, name)
		}
		program = append(program, bpf.LoadAbsolute{Off: numberAt, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(number), SkipFalse: uint8(len(code))})
		program = append(program, code...)
	}
	return append(program, list...), nil
}

// Where the fields of struct seccomp_data are. An argument has 64 bits; those
// that are looked at here the kernel reads as 32 bits wide, so that a caller
// may set the upper half, which comes second, as it likes.
const (
	numberAt    = 0
	archAt      = 4
	argumentsAt = 16
)

// conditional are the calls that are allowed with some arguments only.
const conditional = "clone ioctl personality socket socketpair"

// conditions returns what answers each of the conditional calls. They are not
// left to the library because its filters lose the number of a call as soon
// as they look at an argument, and take the argument for the number from then
// on (go-seccomp-bpf v1.6.0).
func conditions() map[string][]bpf.Instruction {
	const first, second, third = argumentsAt, argumentsAt + 8, argumentsAt + 16
	is := func(argument, value uint32) condition { return condition{argument, bpf.JumpEqual, value} }
	const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID |
		unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	socket := [][]bpf.Instruction{
		when(allow, is(first, unix.AF_UNIX)),
		// Who has which address; other talk with the kernel is not for an
		// agent.
		when(allow, is(first, unix.AF_NETLINK), is(third, unix.NETLINK_ROUTE)),
		when(noProtocol, is(first, unix.AF_NETLINK)),
	}
	for _, family := range []uint32{unix.AF_INET, unix.AF_INET6} {
		// Every other protocol is a module that the kernel would load.
		for _, protocol := range []uint32{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6} {
			socket = append(socket, when(allow, is(first, family), is(third, protocol)))
		}
		socket = append(socket, when(noProtocol, is(first, family)))
	}
	// So is every other family. And a network namespace does not hold vsock
	// back, which leads to the hypervisor.
	socket = append(socket, when(noFamily))
	return map[string][]bpf.Instruction{
		"clone": slices.Concat(when(deny, condition{first, bpf.JumpBitsSet, namespaces}), when(allow)),
		// Typing into a terminal and pasting on a console are ways out of it;
		// a line discipline is one more module.
		"ioctl": slices.Concat(when(deny, is(second, unix.TIOCSTI)), when(deny, is(second, unix.TIOCLINUX)),
			when(deny, is(second, unix.TIOCSETD)), when(allow)),
		// Debuggers and the thread sanitizer want their own addresses fixed.
		// The last one only asks.
		"personality": slices.Concat(when(allow, is(first, 0)), when(allow, is(first, addrNoRandomize)),
			when(allow, is(first, 0xffffffff)), when(deny)),
		"socket":     slices.Concat(socket...),
		"socketpair": slices.Concat(when(allow, is(first, unix.AF_UNIX)), when(noFamily)),
	}
}

// addrNoRandomize is of linux/personality.h.
const addrNoRandomize = 0x40000

// A condition is one on a word of struct seccomp_data.
type condition struct {
	word  uint32 // where it is
	test  bpf.JumpTest
	value uint32
}

// when answers a call for which every condition holds, and otherwise goes on
// to what comes next.
func when(answer uint32, all ...condition) []bpf.Instruction {
	code := []bpf.Instruction{bpf.RetConstant{Val: answer}}
	for _, c := range slices.Backward(all) {
		code = append([]bpf.Instruction{
			bpf.LoadAbsolute{Off: c.word, Size: 4},
			bpf.JumpIf{Cond: c.test, Val: c.value, SkipFalse: uint8(len(code))},
		}, code...)
	}
	return code
}
