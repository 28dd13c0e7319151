package confine

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Neighbours keeps this process and all it ever starts away from three
// neighbours that permissions do not protect. It works on every thread and
// goes with [Calls], which deals with system calls of other architectures.
//
// The first is the process with number 1, which for an ordinary user has the
// agent's own id. Whoever has the id of a process may set its limits, and a
// second of processor time is a way to kill an init that no signal can.
//
// The second is the host's handler of crashes. It runs as root, with words of
// whoever crashed as its arguments, whatever the limit for core files is,
// unless it is 1 byte (core(5); fs/coredump.c), which [Resources] makes it.
// Everybody may lower a limit. Here, who sets that one is told that it was done.
//
// The third are all who use asynchronous I/O on the host: they share one
// counter, fs.aio-max-nr, which a single process can fill.
func Neighbours() error {
	native, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return errors.ErrUnsupported
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("no_new_privs", err)
	}
	code := compile(native, neighbours)
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

// A rule answers a system call for which all conditions hold.
type rule struct {
	call   uint32
	when   []condition
	answer uint32
}

// A condition compares half of an argument. The kernel reads the numbers that
// are looked at here as 32 bits wide, and what is in the upper half of them
// does not count; of a pointer it does.
type condition struct {
	argument, half uint32
	is             bool
	value          uint32
}

const (
	refuse  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	unknown = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	pretend = uint32(unix.SECCOMP_RET_ERRNO) // success, and nothing is done
)

func is(argument, value uint32) condition    { return condition{argument, 0, true, value} }
func isNot(argument, value uint32) condition { return condition{argument, 0, false, value} }

var neighbours = []rule{
	{unix.SYS_PRLIMIT64, []condition{is(0, 1)}, refuse},
	{unix.SYS_SCHED_SETSCHEDULER, []condition{is(0, 1)}, refuse},
	{unix.SYS_SCHED_SETPARAM, []condition{is(0, 1)}, refuse},
	{unix.SYS_SCHED_SETATTR, []condition{is(0, 1)}, refuse},
	{unix.SYS_SCHED_SETAFFINITY, []condition{is(0, 1)}, refuse},
	// By group or by user they reach init too.
	{unix.SYS_SETPRIORITY, []condition{isNot(0, unix.PRIO_PROCESS)}, refuse},
	{unix.SYS_SETPRIORITY, []condition{is(1, 1)}, refuse},
	{unix.SYS_IOPRIO_SET, []condition{isNot(0, ioprioProcess)}, refuse},
	{unix.SYS_IOPRIO_SET, []condition{is(1, 1)}, refuse},

	{unix.SYS_SETRLIMIT, []condition{is(0, unix.RLIMIT_CORE)}, pretend},
	{unix.SYS_PRLIMIT64, []condition{is(1, unix.RLIMIT_CORE), isNot(2, 0)}, pretend},
	{unix.SYS_PRLIMIT64, []condition{is(1, unix.RLIMIT_CORE), {2, 1, false, 0}}, pretend},

	{unix.SYS_IO_SETUP, nil, unknown},
}

// ioprioProcess is IOPRIO_WHO_PROCESS of linux/ioprio.h.
const ioprioProcess = 1

// compile makes a filter of the rules. The first that holds answers; where
// none does, the call is allowed. Both architectures that this runs on keep
// the lower half of an argument first.
func compile(native uint32, rules []rule) []unix.SockFilter {
	const number, architecture, arguments = 0, 4, 16 // in struct seccomp_data
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	equal := func(value uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: uint8(yes), Jf: uint8(no)}
	}
	end := func(answer uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: answer}
	}
	code := []unix.SockFilter{load(architecture), equal(native, 1, 0), end(unix.SECCOMP_RET_ALLOW)}
	for _, r := range rules {
		left := 2*len(r.when) + 1 // instructions to jump over when the rule does not hold
		code = append(code, load(number), equal(r.call, 0, left))
		for _, c := range r.when {
			left -= 2
			yes, no := 0, left
			if !c.is {
				yes, no = left, 0
			}
			code = append(code, load(arguments+8*c.argument+4*c.half), equal(c.value, yes, no))
		}
		code = append(code, end(r.answer))
	}
	return append(code, end(unix.SECCOMP_RET_ALLOW))
}
