package filter

import (
	"encoding/binary"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// olderNames are the system calls that amd64 has and arm64, which is younger,
// has never had.
const olderNames = `
access alarm arch_prctl chmod chown creat dup2 epoll_create epoll_wait eventfd fork futimesat get_thread_area getdents getpgrp
inotify_init ioperm iopl lchown link lstat mkdir mknod modify_ldt newfstatat open pause pipe poll readlink rename rmdir select
set_thread_area signalfd stat symlink time unlink uretprobe utime utimes vfork
`

// TestEverySystemCallIsDecided fails when a newer library knows a call that
// nobody has thought about.
func TestEverySystemCallIsDecided(t *testing.T) {
	decided := map[string]string{}
	for list, names := range map[string]string{"allowed": allowed, "conditional": conditional, "refused": refused, "absent": absent} {
		for name := range strings.FieldsSeq(names) {
			if other, ok := decided[name]; ok {
				t.Errorf("%s is %s and %s", name, other, list)
			}
			decided[name] = list
		}
	}
	known := map[string]bool{}
	for _, info := range everywhere {
		for name := range info.SyscallNames {
			known[name] = true
			if decided[name] == "" {
				t.Errorf("%s: %s is in no list", info.Name, name)
			}
		}
	}
	var gone, older []string
	for name, list := range decided {
		if !known[name] {
			gone = append(gone, name)
		}
		if _, ok := arch.AARCH64.SyscallNames[name]; !ok && list != "absent" {
			older = append(older, name)
		}
		if _, ok := arch.X86_64.SyscallNames[name]; !ok && list != "absent" && name != "fstatat" { // arm64's name of newfstatat
			t.Errorf("amd64 has no %s", name)
		}
	}
	if len(gone) > 0 {
		t.Errorf("listed, and known nowhere: %s", gone)
	}
	slices.Sort(older)
	if diff := cmp.Diff(strings.Fields(olderNames), older); diff != "" {
		t.Errorf("what arm64 lacks, -want +got:\n%s", diff)
	}
}

// everywhere are the architectures that there are filters for.
var everywhere = []*arch.Info{arch.X86_64, arch.AARCH64}

// machine runs the filter as the kernel does.
type machine struct {
	t  *testing.T
	vm *bpf.VM
	id uint32
}

func newMachine(t *testing.T, info *arch.Info) machine {
	t.Helper()
	program, err := Assemble(info.Name)
	if err != nil {
		t.Fatal(err)
	}
	if len(program) > 4096 {
		t.Fatalf("%d instructions are more than the kernel takes", len(program))
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	return machine{t, vm, uint32(info.ID)}
}

// ask returns what the filter answers to a call. The machine of the library
// loads big-endian words, the kernel those of the processor, which here is
// little-endian.
func (m machine) ask(id, number uint32, args ...uint64) uint32 {
	m.t.Helper()
	words := make([]uint32, 16)
	words[0], words[1] = number, id
	for i, a := range args {
		words[4+2*i], words[5+2*i] = uint32(a), uint32(a>>32)
	}
	var data []byte
	for _, w := range words {
		data = binary.BigEndian.AppendUint32(data, w)
	}
	n, err := m.vm.Run(data)
	if err != nil {
		m.t.Fatal(err)
	}
	return uint32(n)
}

func TestTheFilterSaysWhatTheListsSay(t *testing.T) {
	for _, info := range everywhere {
		m := newMachine(t, info)
		want := map[uint32]uint32{}
		for names, answer := range map[string]uint32{allowed: allow, refused: deny} {
			for name := range strings.FieldsSeq(names) {
				if n, ok := info.SyscallNames[name]; ok {
					want[uint32(n)] = answer
				}
			}
		}
		for name := range strings.FieldsSeq(conditional) {
			delete(want, uint32(info.SyscallNames[name]))
		}
		// Every number that there is, the library's and those to come; those of
		// x32 begin at 0x40000000.
		for _, first := range []uint32{0, 0x40000000, 0x80000000, math.MaxUint32 - 1023} {
			for i := range uint32(1024) {
				n := first + i
				name := info.SyscallNumbers[int(n)]
				if slices.Contains(strings.Fields(conditional), name) {
					continue
				}
				expect, ok := want[n]
				if !ok {
					expect = missing
				}
				for _, args := range [][]uint64{nil, {math.MaxUint64, math.MaxUint64, math.MaxUint64}} {
					if got := m.ask(m.id, n, args...); got != expect {
						t.Errorf("call %d (%s): %#x, want %#x", n, name, got, expect)
					}
				}
			}
		}
		if t.Failed() || len(want) < 250 {
			t.Errorf("%d calls looked at", len(want))
		}
	}
}

func TestCallsOfAnotherArchitectureDoNotExist(t *testing.T) {
	for _, info := range everywhere {
		m := newMachine(t, info)
		for _, other := range []*arch.Info{arch.I386, arch.ARM, arch.X86_64, arch.AARCH64} {
			if uint32(other.ID) == m.id {
				continue
			}
			for n := range uint32(600) {
				if got := m.ask(uint32(other.ID), n); got != missing {
					t.Fatalf("%s: call %d: %#x", other.Name, n, got)
				}
			}
		}
	}
}

func TestArgumentsDecideWhatTheyMust(t *testing.T) {
	for _, info := range everywhere {
		m := newMachine(t, info)
		const high = 0xffffffff_00000000
		rows := []struct {
			name string
			args []uint64
			want uint32
		}{
			{"clone", []uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, allow},
			{"clone", []uint64{0x3d0f00}, allow}, // a thread of glibc
			{"clone", []uint64{unix.CLONE_NEWUSER}, deny},
			{"clone", []uint64{unix.CLONE_NEWNS | high}, deny},
			{"clone", []uint64{unix.CLONE_NEWPID | unix.CLONE_VM}, deny},
			{"clone", []uint64{unix.CLONE_NEWNET | 1<<63}, deny},
			{"clone", []uint64{unix.CLONE_NEWIPC}, deny},
			{"clone", []uint64{unix.CLONE_NEWUTS}, deny},
			{"clone", []uint64{unix.CLONE_NEWCGROUP}, deny},
			{"ioctl", []uint64{0, unix.TCGETS}, allow},
			{"ioctl", []uint64{0, unix.TIOCGPTN | high}, allow}, // as musl says it, sign-extended
			{"ioctl", []uint64{0, unix.TIOCSTI}, deny},
			{"ioctl", []uint64{0, unix.TIOCSTI | 1<<32}, deny},
			{"ioctl", []uint64{0, unix.TIOCSTI | high}, deny},
			{"ioctl", []uint64{0, unix.TIOCSTI + 1}, allow}, // TIOCGWINSZ
			{"ioctl", []uint64{0, unix.TIOCLINUX}, deny},
			{"ioctl", []uint64{0, unix.TIOCLINUX | high}, deny},
			{"ioctl", []uint64{0, unix.TIOCSETD}, deny},
			{"ioctl", []uint64{0, 0x5421}, allow}, // FIONBIO
			{"ioctl", []uint64{unix.TIOCSTI, 0}, allow},
			{"ioctl", []uint64{0, math.MaxUint64}, allow},
			{"socket", []uint64{unix.AF_UNIX, unix.SOCK_STREAM, 0}, allow},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_UDP}, allow},
			{"socket", []uint64{unix.AF_INET6, unix.SOCK_STREAM, 0}, allow},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP}, noProtocol},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP}, noProtocol},
			{"socket", []uint64{unix.AF_INET6, unix.SOCK_RAW, 255}, noProtocol},
			{"socket", []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE}, allow},
			{"socket", []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER}, noProtocol},
			{"socket", []uint64{unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT}, noProtocol},
			{"socket", []uint64{unix.AF_VSOCK, unix.SOCK_STREAM, 0}, noFamily},
			{"socket", []uint64{unix.AF_ALG, unix.SOCK_SEQPACKET, 0}, noFamily},
			{"socket", []uint64{unix.AF_PACKET, unix.SOCK_RAW, 0}, noFamily},
			{"socket", []uint64{unix.AF_VSOCK | 1<<32, unix.SOCK_STREAM, 0}, noFamily},
			{"socket", []uint64{unix.AF_INET | high, unix.SOCK_STREAM, high}, allow},
			{"socket", []uint64{unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP | high}, noProtocol},
			{"socket", []uint64{0}, noFamily},
			{"socketpair", []uint64{unix.AF_UNIX}, allow},
			{"socketpair", []uint64{unix.AF_TIPC}, noFamily},
			{"personality", []uint64{0}, allow},
			{"personality", []uint64{math.MaxUint32}, allow},
			{"personality", []uint64{math.MaxUint64}, allow},
			{"personality", []uint64{addrNoRandomize}, allow},
			{"personality", []uint64{0x400000}, deny}, // READ_IMPLIES_EXEC
			{"personality", []uint64{8}, deny},        // PER_LINUX32
			{"personality", []uint64{0x400000 | high}, deny},
			{"clone3", []uint64{0}, missing},
		}
		for _, r := range rows {
			if got := m.ask(m.id, uint32(info.SyscallNames[r.name]), r.args...); got != r.want {
				t.Errorf("%s%#x: %#x, want %#x", r.name, r.args, got, r.want)
			}
		}
	}
}
