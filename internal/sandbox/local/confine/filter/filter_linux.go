// Package filter makes the filter of system calls that package confine puts
// around a sandbox. It is at work when that package is built and tested, not
// when a sandbox is made: to know the numbers of all calls takes longer, and
// more memory, than all else that a sandbox's first process does.
package filter

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// What a filter answers.
const (
	allow      = uint32(unix.SECCOMP_RET_ALLOW)
	deny       = uint32(unix.SECCOMP_RET_ERRNO | unix.EPERM)
	missing    = uint32(unix.SECCOMP_RET_ERRNO | unix.ENOSYS)
	noFamily   = uint32(unix.SECCOMP_RET_ERRNO | unix.EAFNOSUPPORT)
	noProtocol = uint32(unix.SECCOMP_RET_ERRNO | unix.EPROTONOSUPPORT)
)

// Assemble makes the filter for an architecture, as GOARCH names it; empty is
// the one that this program was built for. First come the calls whose arguments
// matter, then the lists.
func Assemble(goarch string) ([]bpf.Instruction, error) {
	info, err := arch.GetInfo(goarch)
	if err != nil {
		return nil, err
	}
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: archAt, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipTrue: 1},
		bpf.RetConstant{Val: missing},
	}
	conditions := conditions()
	for name := range strings.FieldsSeq(conditional) {
		number, ok := info.SyscallNames[name]
		if !ok {
			return nil, fmt.Errorf("seccomp: %s has no %s", info.Name, name)
		}
		code := conditions[name]
		program = append(program, bpf.LoadAbsolute{Off: numberAt, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(number), SkipFalse: uint8(len(code))})
		program = append(program, code...)
	}
	program = append(program, bpf.LoadAbsolute{Off: numberAt, Size: 4})
	return append(program, search(runs(info.SyscallNames))...), nil
}

// A run is the numbers from first up to the next run's, which have one answer.
type run struct{ first, answer uint32 }

// runs covers all numbers. Those of the x32 calls of amd64, and whatever a later
// kernel has, are in the last one and do not exist.
func runs(numbers map[string]int) []run {
	answers := map[uint32]uint32{}
	for names, answer := range map[string]uint32{allowed: allow, refused: deny} {
		for name := range strings.FieldsSeq(names) {
			if n, ok := numbers[name]; ok {
				answers[uint32(n)] = answer
			}
		}
	}
	all := []run{{0, missing}}
	add := func(r run) {
		last := &all[len(all)-1]
		switch {
		case last.answer == r.answer:
		case last.first == r.first:
			last.answer = r.answer
		default:
			all = append(all, r)
		}
	}
	for _, n := range slices.Sorted(maps.Keys(answers)) {
		add(run{n, answers[n]})
		if _, ok := answers[n+1]; !ok {
			add(run{n + 1, missing})
		}
	}
	return all
}

// search finds the run of the number that is loaded, by halving.
func search(all []run) []bpf.Instruction {
	if len(all) == 1 {
		return []bpf.Instruction{bpf.RetConstant{Val: all[0].answer}}
	}
	half := len(all) / 2
	lower, upper := search(all[:half]), search(all[half:])
	at := bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: all[half].first, SkipTrue: uint8(len(lower))}
	code := []bpf.Instruction{at}
	if len(lower) > math.MaxUint8 {
		at.SkipTrue, at.SkipFalse = 0, 1
		code = []bpf.Instruction{at, bpf.Jump{Skip: uint32(len(lower))}}
	}
	return slices.Concat(code, lower, upper)
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

// conditions returns what answers each of the conditional calls. The library
// that knows the numbers would make filters too, for the architecture it runs
// on only; and those lose the number of a call as soon as they look at an
// argument, and take the argument for the number from then on (go-seccomp-bpf
// v1.6.0).
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
