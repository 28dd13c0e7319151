package local

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/confine"
)

// TestRefusedCallsAreRefused makes the calls in a sandbox. The arguments are
// such that without the filter most would do something, or fail otherwise.
func TestRefusedCallsAreRefused(t *testing.T) {
	const (
		missing = unix.ENOSYS
		x32     = 0x40000000
		high    = 0xffffffff00000000
	)
	noRoot := unix.EPERM
	if !currentIdentity().Root {
		noRoot = unix.EINVAL // there is no such id
	}
	rows := []struct {
		what   string
		number uint64
		args   string // as Perl writes them
		want   unix.Errno
	}{
		{"getpid", unix.SYS_GETPID, "", 0},
		{"keyctl: session keyring", unix.SYS_KEYCTL, "0, -3, 0", unix.EPERM},
		{"add_key", unix.SYS_ADD_KEY, `"user", "x", "y", 1, -2`, unix.EPERM},
		{"request_key", unix.SYS_REQUEST_KEY, `"user", "x", 0, -2`, unix.EPERM},
		{"bpf", unix.SYS_BPF, "0, $zeros, 120", unix.EPERM},
		{"io_uring_setup", unix.SYS_IO_URING_SETUP, "4, $zeros", unix.EPERM},
		{"io_uring_enter", unix.SYS_IO_URING_ENTER, "-1, 0, 0, 0, 0, 0", unix.EPERM},
		{"io_uring_register", unix.SYS_IO_URING_REGISTER, "-1, 0, 0, 0", unix.EPERM},
		{"userfaultfd", unix.SYS_USERFAULTFD, "1", unix.EPERM},
		{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, "$zeros, 0, -1, -1, 0", unix.EPERM},
		{"mount", unix.SYS_MOUNT, `"x", "/tmp", "tmpfs", 0, 0`, unix.EPERM},
		{"umount", unix.SYS_UMOUNT2, `"/nothing", 0`, unix.EPERM},
		{"pivot_root", unix.SYS_PIVOT_ROOT, `"/nothing", "/nothing"`, unix.EPERM},
		{"chroot", unix.SYS_CHROOT, `"/nothing"`, unix.EPERM},
		{"fsopen", unix.SYS_FSOPEN, `"nothing", 0`, unix.EPERM},
		{"fsmount", unix.SYS_FSMOUNT, "-1, 0, 0", unix.EPERM},
		{"open_tree", unix.SYS_OPEN_TREE, `-100, "/tmp", 0`, unix.EPERM},
		{"move_mount", unix.SYS_MOVE_MOUNT, `-1, "", -1, "", 0`, unix.EPERM},
		{"mount_setattr", unix.SYS_MOUNT_SETATTR, `-100, "/nothing", 0, $zeros, 32`, unix.EPERM},
		{"unshare nothing", unix.SYS_UNSHARE, "0", unix.EPERM},
		{"unshare user", unix.SYS_UNSHARE, fmt.Sprint(unix.CLONE_NEWUSER), unix.EPERM},
		{"setns", unix.SYS_SETNS, "-1, 0", unix.EPERM},
		{"clone into a user namespace", unix.SYS_CLONE, fmt.Sprint(unix.CLONE_NEWUSER|int(unix.SIGCHLD), ", 0, 0, 0, 0"), unix.EPERM},
		{"clone, odd upper half", unix.SYS_CLONE, fmt.Sprint(uint64(high|unix.CLONE_NEWNET), ", 0, 0, 0, 0"), unix.EPERM},
		{"clone3", unix.SYS_CLONE3, "$zeros, 88", missing},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, "-1, $zeros, 0", unix.EPERM},
		{"name_to_handle_at", unix.SYS_NAME_TO_HANDLE_AT, `-100, "/tmp", $zeros, $zeros, 0`, unix.EPERM},
		{"pidfd_getfd", unix.SYS_PIDFD_GETFD, "-1, 0, 0", unix.EPERM},
		{"kcmp", unix.SYS_KCMP, "1, 1, 0, 0, 0", unix.EPERM},
		{"mbind", unix.SYS_MBIND, "0, 0, 0, 0, 0, 0", unix.EPERM},
		{"quotactl", unix.SYS_QUOTACTL, "0, 0, 0, 0", unix.EPERM},
		{"init_module", unix.SYS_INIT_MODULE, `$zeros, 0, ""`, unix.EPERM},
		{"kexec_load", unix.SYS_KEXEC_LOAD, "0, 0, 0, 0", unix.EPERM},
		{"reboot", unix.SYS_REBOOT, "0, 0, 0, 0", unix.EPERM},
		{"swapon", unix.SYS_SWAPON, `"/nothing", 0`, unix.EPERM},
		{"acct", unix.SYS_ACCT, `"/nothing"`, unix.EPERM},
		{"clock_settime", unix.SYS_CLOCK_SETTIME, "-1, 0", unix.EPERM},
		{"settimeofday", unix.SYS_SETTIMEOFDAY, "0, 0", unix.EPERM},
		{"syslog", unix.SYS_SYSLOG, "10, 0, 0", unix.EPERM},
		{"sethostname", unix.SYS_SETHOSTNAME, `"x", 1`, unix.EPERM},
		{"fanotify_init", unix.SYS_FANOTIFY_INIT, "0x200, 0", unix.EPERM},
		{"personality: code on the stack", unix.SYS_PERSONALITY, "0x400000", unix.EPERM},
		{"personality: ask", unix.SYS_PERSONALITY, "0xffffffff", 0},
		{"ioctl: type into a terminal", unix.SYS_IOCTL, fmt.Sprint("0, ", unix.TIOCSTI, `, "x"`), unix.EPERM},
		{"ioctl: the same, odd upper half", unix.SYS_IOCTL, fmt.Sprint("0, ", uint64(high|unix.TIOCSTI), `, "x"`), unix.EPERM},
		{"ioctl: paste", unix.SYS_IOCTL, fmt.Sprint("0, ", unix.TIOCLINUX, `, "\3"`), unix.EPERM},
		{"ioctl: line discipline", unix.SYS_IOCTL, fmt.Sprint("0, ", unix.TIOCSETD, ", $zeros"), unix.EPERM},
		{"ioctl: size of a terminal", unix.SYS_IOCTL, fmt.Sprint("0, ", unix.TIOCGWINSZ, ", $zeros"), unix.ENOTTY},
		{"socket: unix", unix.SYS_SOCKET, fmt.Sprint(unix.AF_UNIX, ", 1, 0"), 0},
		{"socket: TCP", unix.SYS_SOCKET, fmt.Sprint(unix.AF_INET, ", 1, 6"), 0},
		{"socket: addresses and routes", unix.SYS_SOCKET, fmt.Sprint(unix.AF_NETLINK, ", 3, 0"), 0},
		{"socket: netfilter", unix.SYS_SOCKET, fmt.Sprint(unix.AF_NETLINK, ", 3, ", unix.NETLINK_NETFILTER), unix.EPROTONOSUPPORT},
		{"socket: kernel events", unix.SYS_SOCKET, fmt.Sprint(unix.AF_NETLINK, ", 3, ", unix.NETLINK_KOBJECT_UEVENT), unix.EPROTONOSUPPORT},
		{"socket: SCTP", unix.SYS_SOCKET, fmt.Sprint(unix.AF_INET, ", 1, ", unix.IPPROTO_SCTP), unix.EPROTONOSUPPORT},
		{"socket: MPTCP", unix.SYS_SOCKET, fmt.Sprint(unix.AF_INET6, ", 1, ", unix.IPPROTO_MPTCP), unix.EPROTONOSUPPORT},
		{"socket: raw", unix.SYS_SOCKET, fmt.Sprint(unix.AF_INET, ", 3, 1"), unix.EPERM},
		{"socket: packet", unix.SYS_SOCKET, fmt.Sprint(unix.AF_PACKET, ", 3, 0"), unix.EAFNOSUPPORT},
		{"socket: vsock", unix.SYS_SOCKET, fmt.Sprint(unix.AF_VSOCK, ", 1, 0"), unix.EAFNOSUPPORT},
		{"socket: vsock, odd upper half", unix.SYS_SOCKET, fmt.Sprint(uint64(1<<32|unix.AF_VSOCK), ", 1, 0"), unix.EAFNOSUPPORT},
		{"socket: crypto", unix.SYS_SOCKET, fmt.Sprint(unix.AF_ALG, ", 5, 0"), unix.EAFNOSUPPORT},
		{"socketpair: TIPC", unix.SYS_SOCKETPAIR, fmt.Sprint(unix.AF_TIPC, ", 1, 0, $zeros"), unix.EAFNOSUPPORT},
		{"trace init", unix.SYS_PTRACE, fmt.Sprint(unix.PTRACE_ATTACH, ", 1, 0, 0"), unix.EPERM},
		{"seize init", unix.SYS_PTRACE, fmt.Sprint(unix.PTRACE_SEIZE, ", 1, 0, 0"), unix.EPERM},
		{"read init's memory", unix.SYS_PROCESS_VM_READV, "1, $iov, 1, $iov, 1, 0", unix.EPERM},
		{"write init's memory", unix.SYS_PROCESS_VM_WRITEV, "1, $iov, 1, $iov, 1, 0", unix.EPERM},
		{"be root", unix.SYS_SETUID, "0", noRoot},
		{"make a disk", unix.SYS_MKNODAT, fmt.Sprint(`-100, "/tmp/disk", `, unix.S_IFBLK|0o600, ", 0xfe00"), unix.EPERM},
		{"a call of a later kernel", 4000, "", missing},
		{"the last call there can be", 0xffffffff, "", missing},
	}
	if runtime.GOARCH == "amd64" {
		rows = append(rows, []struct {
			what   string
			number uint64
			args   string
			want   unix.Errno
		}{
			{"getpid of x32", x32 + 39, "", missing}, {"execve of x32", x32 + 520, "", missing}, {"iopl", 172, "3", unix.EPERM}, {"modify_ldt", 154, "0, 0, 0", unix.EPERM},
		}...)
	}
	var perl bytes.Buffer
	// A clone that is not refused would be another process that prints.
	perl.WriteString(`$| = 1; $me = $$; $zeros = "\0" x 4096; $word = "\0" x 8; $iov = pack("PQ", $word, 8);
sub call { my ($what, @a) = @_; $! = 0; my $r = syscall(shift @a, @a); kill 9, $$ if $$ != $me; printf "%d\n", $r == -1 ? $! : 0 }` + "\n")
	for _, r := range rows {
		fmt.Fprintf(&perl, "call(%q, %d%s);\n", r.what, r.number, strings.TrimSuffix(", "+r.args, ", "))
	}
	_, sb := newSandbox(t, newProvider(t), testSpec("calls"))
	if err := sb.Upload(t.Context(), "/tmp/calls.pl", &perl); err != nil {
		t.Fatal(err)
	}
	got := strings.Fields(script(t, sb, "calls", "perl /tmp/calls.pl </dev/null"))
	if len(got) != len(rows) {
		t.Fatalf("%d answers to %d calls: %s", len(got), len(rows), got)
	}
	for i, r := range rows {
		if got[i] != fmt.Sprint(int(r.want)) {
			t.Errorf("%s: errno %s, want %d (%v)", r.what, got[i], int(r.want), r.want)
		}
	}
}

// TestProgramsOfAnotherArchitectureCannotSpeak runs a 32-bit program whose
// only deed is to end with a status of 42, by the old way into the kernel.
func TestProgramsOfAnotherArchitectureCannotSpeak(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("written for amd64")
	}
	const at = 0x8048000
	code := []byte{0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80, 0xf4} // exit(42); hlt
	var elf bytes.Buffer
	elf.WriteString("\x7fELF\x01\x01\x01" + strings.Repeat("\x00", 9))
	size := uint32(52 + 32 + len(code))
	for _, field := range []any{
		uint16(2), uint16(3), uint32(1), uint32(at + 84), uint32(52), uint32(0), uint32(0), uint16(52), uint16(32), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(0), uint32(at), uint32(at), size, size, uint32(5), uint32(4096), code,
	} {
		if err := binary.Write(&elf, binary.LittleEndian, field); err != nil {
			t.Fatal(err)
		}
	}
	program := filepath.Join(t.TempDir(), "old")
	if err := os.WriteFile(program, elf.Bytes(), 0o755); err != nil {
		t.Fatal(err)
	}
	outside := self(t)
	outside.Path, outside.Args = program, []string{"old"}
	if err := outside.Run(); outside.ProcessState == nil || outside.ProcessState.ExitCode() != 42 {
		t.Skipf("this kernel runs no 32-bit programs: %v", err)
	}
	_, sb := newSandbox(t, newProvider(t), testSpec("old"))
	if err := sb.Upload(t.Context(), "/tmp/old", &elf); err != nil {
		t.Fatal(err)
	}
	if out := script(t, sb, "old", "chmod 755 /tmp/old; /tmp/old; echo $?"); !strings.HasSuffix(out, "139") { // SIGSEGV, by the hlt
		t.Errorf("it said %s", out)
	}
}

func TestASandboxHasEightNamespacesOfItsOwn(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), testSpec("namespaces"))
	names := []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"}
	if clockNamespace() == 0 {
		names = names[:7]
	}
	for _, name := range names {
		host, err := os.Readlink("/proc/self/ns/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if inside := script(t, sb, name, "readlink /proc/self/ns/"+name); inside == host || !strings.HasPrefix(inside, name+":[") {
			t.Errorf("%s: %s inside, %s outside", name, inside, host)
		}
	}
}

// TestNoThreadOfInitHasACapabilityThatInitDoesNotNeed looks at init from
// outside: the runtime's threads are as old as the program.
func TestNoThreadOfInitHasACapabilityThatInitDoesNotNeed(t *testing.T) {
	p := newProvider(t)
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0); errno == unix.ENOTSUP {
		// This program is linked with C, and its init drops those of one
		// thread only. So it is to be the real one.
		p = New(Options{Dir: p.dir, Supervisor: []string{realSupervisor(t)}})
	}
	_, sb := newSandbox(t, p, testSpec("threads"))
	script(t, sb, "used", "true")
	box, err := openFolder(p.boxPath("threads"))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	left, err := box.readRemains()
	if err != nil {
		t.Fatal(err)
	}
	var allowed uint64
	if currentIdentity().Root {
		for _, c := range kept {
			allowed |= 1 << c
		}
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", left.Init.PID))
	if err != nil || len(threads) < 2 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	for _, name := range threads {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(b)) {
			var has uint64
			what, value, _ := strings.Cut(line, ":")
			if what != "CapEff" && what != "CapPrm" && what != "CapAmb" && what != "CapInh" {
				continue
			}
			if _, err := fmt.Sscanf(strings.TrimSpace(value), "%x", &has); err != nil || has&^allowed != 0 {
				t.Errorf("%s: %s, of which %x are allowed (%v)", name, strings.TrimSpace(line), allowed, err)
			}
		}
	}
}

// realSupervisor is the program that is installed, built as it is.
func realSupervisor(t *testing.T) string {
	t.Helper()
	if built := os.Getenv("SANDBOX_TEMPORAL_BIN"); built != "" {
		return filepath.Join(filepath.Dir(built), "sandbox-supervisor")
	}
	dir, err := os.MkdirTemp("/tmp", "sandbox-supervisor-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	to := filepath.Join(dir, "sandbox-supervisor")
	cmd := exec.Command("go", "build", "-o", to, "github.com/sandbox-temporal/sandbox-temporal/cmd/sandbox-supervisor")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		if os.Geteuid() != 0 {
			t.Skipf("it cannot be built here: %v: %s", err, out) // root's test has built it
		}
		t.Fatalf("%v: %s", err, out)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(to, 0o755)); err != nil {
		t.Fatal(err)
	}
	return to
}

// TestLandlockHolds counts: a process can be confined sixteen times, and in a
// sandbox it has been once.
func TestLandlockHolds(t *testing.T) {
	if abi := confine.LandlockABI(); abi < confine.LeastLandlock {
		t.Skipf("this kernel has version %d of Landlock", abi)
	}
	_, sb := newSandbox(t, newProvider(t), testSpec("landlock"))
	count := fmt.Sprintf(`perl -e '$attr = pack("Q", 2); $n = 0; while ($n < 100) { $fd = syscall(%d, $attr, 8, 0); last if syscall(%d, $fd, 0) != 0; $n++ } print $n'`,
		unix.SYS_LANDLOCK_CREATE_RULESET, unix.SYS_LANDLOCK_RESTRICT_SELF)
	if out := script(t, sb, "count", count); out != "15" {
		t.Errorf("%s more times, want 15", out)
	}
	// And what agents do with files works under it, a terminal too.
	script(t, sb, "work", `set -e; mkdir -p a b; echo x > a/f; mv a/f b/g; ln b/g a/h; ln -s ../b/g a/l; mkfifo a/p; mv b c; rm -r a; truncate -s 0 c/g
		echo x > /dev/stdout; echo x > /dev/null; echo x > /dev/shm/x; echo 500 > /proc/self/oom_score_adj; cp c/g ~/g; cp c/g /tmp/g; mktemp -d; true > /dev/fd/1
		script -qec "stty size; echo x > /dev/tty" /dev/null`)
}

// TestProcShowsNothingOfTheHost knows what runc and podman mask, and every
// other file that this kernel has.
func TestProcShowsNothingOfTheHost(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), testSpec("proc"))
	names := []string{"acpi", "asound", "bus", "cmdline", "fs", "interrupts", "irq", "kallsyms", "kcore", "key-users", "keys", "kmsg", "latency_stats", "modules",
		"sched_debug", "scsi", "softirqs", "sysrq-trigger", "timer_list", "timer_stats"}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	visible := " " + strings.Join(shown, " ") + " "
	for _, e := range entries {
		if name := e.Name(); name[0] > '9' && !strings.Contains(visible, " "+name+" ") {
			names = append(names, name)
		}
	}
	look := "for n in " + strings.Join(names, " ") + "; do f=/proc/$n; if [ -d $f ]; then ls -A $f; touch $f/x 2>/dev/null && echo wrote $n; elif [ -e $f ]; then head -c 1 $f | od; fi; done | grep -v '^0000000$'; true"
	if out := script(t, sb, "masked", look); out != "" {
		t.Errorf("/proc shows %s", out)
	}
	for _, f := range []string{"/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/loadavg", "/proc/version", "/proc/uptime", "/proc/sys/vm/overcommit_memory", "/proc/self/mountinfo"} {
		script(t, sb, "read-"+filepath.Base(f), "grep -q . "+f)
	}
	for i, f := range []string{"/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches", "/proc/sys/kernel/ns_last_pid", "/proc/sys/net/ipv4/ip_forward", "/proc/irq/default_smp_affinity"} {
		script(t, sb, fmt.Sprint("write-", i), "! echo 1 2>/dev/null > "+f)
	}
	if out := script(t, sb, "sys", "ls -A /sys; ls -d /sys/firmware /sys/fs /sys/devices 2>/dev/null; touch /sys/x 2>/dev/null && echo wrote; true"); out != "" {
		t.Errorf("/sys holds %s", out)
	}
}

func TestMountsOfAForkDoNotTellWhereItsFilesAre(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("one"))
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("two")
	s.Base = "base"
	_, sb := newSandbox(t, p, s)
	if out := script(t, sb, "look", fmt.Sprintf("grep -F %q /proc/self/mounts /proc/self/mountinfo; true", p.dir)); out != "" {
		t.Error(out)
	}
}

func TestResourcesAreBounded(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), testSpec("limits"))
	for flag, most := range map[string]int{"c": 0, "n": 65536, "l": 8192, "i": 16384, "q": 819200, "r": 0, "e": 0} {
		for _, kind := range []string{"S", "H"} {
			out := script(t, sb, "limit-"+flag+"-"+strings.ToLower(kind), fmt.Sprintf("bash -c 'ulimit -%s%s'", kind, flag))
			var n int
			if _, err := fmt.Sscan(out, &n); err != nil || n > most {
				t.Errorf("ulimit -%s%s: %s, at most %d wanted", kind, flag, out, most)
			}
		}
	}
	if out := script(t, sb, "raise", "bash -c 'ulimit -Hn 1000000' 2>&1; true"); out == "" {
		t.Error("a limit was raised")
	}
	script(t, sb, "enough", "bash -c 'test $(ulimit -n) -ge 1024'")
}

// TestNamesFailAtOnce knows the resolvers that agents meet. A resolver that
// waits does so for five seconds and more, every time; a machine that has other
// things to do, now and then.
func TestNamesFailAtOnce(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), testSpec("names"))
	for i, r := range []struct{ program, line, says string }{
		{"getent", "getent hosts example.com; echo status $?", "status 2"},
		{"node", `node -e 'require("dns").lookup("example.com", e => console.log(e.message))'`, "ENOTFOUND example.com"},
		{"node", `node -e 'require("dns").resolve("example.com", e => console.log(e.message))'`, "ECONNREFUSED"},
		{"curl", "curl -sS https://example.com", "Could not resolve host"},
		{"git", "git clone https://example.com/a/b", "Could not resolve host"},
		{"perl", `perl -MSocket=getaddrinfo -e 'print((getaddrinfo("example.com", "https"))[0])'`, "Name or service not known"},
		{"bash", "bash -c 'echo > /dev/tcp/192.0.2.1/80'", "Network is unreachable"},
		{"cat", "cat /etc/resolv.conf", "/etc/motd"},
		{"cat", "cat /etc/motd", "no network but the gateway"},
	} {
		// Looked up inside: a program of the host's need not be there.
		if out := script(t, sb, fmt.Sprint("which-", i), "command -v "+r.program+" || true"); out == "" {
			t.Logf("there is no %s", r.program)
			continue
		}
		var out string
		for try := 1; ; try++ {
			start := time.Now()
			out = script(t, sb, fmt.Sprintf("name-%d-%d", i, try), r.line+" 2>&1; true")
			took := time.Since(start)
			if took <= 4*time.Second {
				break
			}
			if try == 3 {
				t.Errorf("%s took %s", r.line, took)
				break
			}
		}
		if !strings.Contains(out, r.says) {
			t.Errorf("%s: %s, want %s", r.line, out, r.says)
		}
	}
	if out := script(t, sb, "localhost", "getent hosts localhost"); !strings.Contains(out, "localhost") {
		t.Error(out)
	}
}

func TestToolsOfAgentsWorkInASandbox(t *testing.T) {
	s := testSpec("tools")
	if claude := os.Getenv("SANDBOX_TEMPORAL_CLAUDE"); claude != "" {
		s.Mounts = append(s.Mounts, sandbox.Mount{Source: claude, Target: sandbox.ProgramDir + "/claude"})
	}
	_, sb := newSandbox(t, newProvider(t), s)
	const c = `printf '#include <pthread.h>\n#include <stdlib.h>\nvoid *f(void *x) { return x; }\nint main(void) { pthread_t t; free(malloc(9)); return pthread_create(&t, 0, f, 0) || pthread_join(t, 0); }\n' > a.c; `
	for i, r := range []struct{ program, line, says string }{
		{"claude", "claude --version", "Claude Code"},
		{"bash", "bash -c 'diff <(echo a) <(echo a) && echo same'", "same"},
		{"perl", "perl -e 'open F, \"-|\", \"echo piped\"; print <F>'", "piped"},
		{"git", "git init -q r && cd r && echo x > f && git add f && git -c user.name=a -c user.email=a@b commit -qm begin && git gc -q && git log --format=%s", "begin"},
		{"node", `node -e 'const {Worker} = require("worker_threads"); new Worker("require(\"child_process\").execSync(\"true\"); console.log(\"threads and\", require(\"os\").cpus().length > 0)", {eval: true})'`, "threads and true"},
		{"python3", "/usr/bin/python3 -c 'import multiprocessing as m, ssl; print(sum(m.Pool(2).map(abs, [-1, -2])))'", "3"},
		{"gcc", c + "gcc a.c -o a && ./a && echo runs", "runs"},
		{"gcc", c + "gcc -fsanitize=thread a.c -o t && ./t && echo runs", "runs"},           // wants its addresses fixed
		{"gcc", c + "gcc -fsanitize=address -g a.c -o l && ./l && echo runs", "runs"},       // traces itself when it looks for leaks
		{"strace", "strace -f -o /dev/null sh -c 'true; true' && echo traced", "traced"},    // traces its children
		{"gdb", "gdb -nx -batch -ex run -ex 'info inferiors' /bin/true", "exited normally"}, // the same, and changes them
		{"java", "printf 'class A { public static void main(String[] a) { System.out.println(\"java \" + 1); } }' > A.java && java A.java", "java 1"},
		{"go", "mkdir g && cd g && printf 'module m\\n' > go.mod && printf 'package main\\nfunc main() { println(\"built\") }\\n' > main.go && CGO_ENABLED=0 go build -o m . && ./m", "built"},
	} {
		t.Run(r.program, func(t *testing.T) {
			if r.program == "go" && os.Geteuid() != 0 {
				t.Skip("takes long, with an empty cache")
			}
			if out := script(t, sb, fmt.Sprint("which-", i), "command -v "+r.program+" || true"); out == "" {
				t.Skipf("there is no %s", r.program)
			}
			if out := script(t, sb, fmt.Sprint("tool-", i), r.line+" 2>&1; true"); !strings.Contains(out, r.says) {
				t.Errorf("%s\nsaid %s, want %s", r.line, out, r.says)
			}
		})
	}
}

// TestCredentialsOfTheHostAreNotThere gives the worker what people have.
func TestCredentialsOfTheHostAreNotThere(t *testing.T) {
	secrets := map[string]string{
		"SSH_AUTH_SOCK": "/tmp/agent.1", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/bus", "DOCKER_HOST": "unix:///run/docker.sock", "GITHUB_TOKEN": "x",
		"AWS_SECRET_ACCESS_KEY": "x", "ANTHROPIC_API_KEY": "x", "GOOGLE_APPLICATION_CREDENTIALS": "/x", "KUBECONFIG": "/x", "LD_PRELOAD": "", "XDG_RUNTIME_DIR": "/run/user/0",
	}
	for name, value := range secrets {
		t.Setenv(name, value)
	}
	_, sb := newSandbox(t, newProvider(t), testSpec("credentials"))
	known := " PATH HOME USER LOGNAME SHELL LANG TERM PWD SHLVL OLDPWD _ "
	for line := range strings.Lines(script(t, sb, "env", "env")) {
		if name, _, _ := strings.Cut(line, "="); !strings.Contains(known, " "+name+" ") {
			t.Errorf("in the environment: %s", line)
		}
	}
	for i, path := range []string{
		"~/.ssh", "~/.aws", "~/.config", "~/.docker", "~/.kube", "~/.netrc", "~/.git-credentials", "/root/.ssh", "/etc/ssh", "/etc/shadow", "/etc/ssl/private", "/etc/sudoers",
		"/etc/machine-id", "/etc/kubernetes", "/run/dbus", "/var/run/docker.sock", "/run/containerd", "/run/user", "/run/secrets", "/var/lib/docker", "/boot", "/media", "/lost+found",
		"/dev/kvm", "/dev/net", "/dev/fuse", "/dev/mem", "/dev/vda", "/dev/sda", "/dev/log", "/dev/mqueue", "/dev/kmsg", "/dev/vsock", "/dev/console",
	} {
		if out := script(t, sb, fmt.Sprint("path-", i), "ls -d "+path+" 2>/dev/null; true"); out != "" {
			t.Errorf("there is %s", out)
		}
	}
}

// nestedVariable tells a test binary that it runs in a sandbox.
const nestedVariable = "SANDBOX_TEST_NESTED"

// TestWhereAFilterForbidsNamespacesCreateRefuses makes a sandbox in a sandbox,
// whose filter of system calls allows no namespaces, as that of a container
// does.
func TestWhereAFilterForbidsNamespacesCreateRefuses(t *testing.T) {
	if os.Getenv(nestedVariable) != "" {
		dir := filepath.Join(t.TempDir(), "state")
		ref, err := New(testOptions(dir)).Create(t.Context(), testSpec("nested"))
		if err == nil {
			_ = New(testOptions(dir)).Destroy(t.Context(), ref)
		}
		if boxes, lookErr := os.ReadDir(filepath.Join(dir, sandboxesDir)); lookErr != nil || len(boxes) > 0 {
			err = errors.Join(err, fmt.Errorf("left behind: %v, %w", boxes, lookErr))
		}
		b, encodeErr := json.Marshal(toWire(err))
		if encodeErr != nil {
			t.Fatal(encodeErr)
		}
		fmt.Printf("\nnested %s\n", b)
		return
	}
	_, sb := newSandbox(t, newProvider(t), testSpec("outer"))
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	if err := sb.Upload(t.Context(), "/tmp/nested", exe); err != nil {
		t.Fatal(err)
	}
	out := script(t, sb, "nested", "chmod 755 /tmp/nested; "+nestedVariable+"=1 /tmp/nested -test.run '^"+t.Name()+"$'")
	_, text, found := strings.Cut("\n"+out, "\nnested ")
	text, _, _ = strings.Cut(text, "\n")
	var got wireFault
	if err := json.Unmarshal([]byte(text), &got); !found || err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got.Kind != fault.Unsupported || got.Hint == "" {
		t.Errorf("%+v", got)
	}
}

func TestWhatForbidsNamespacesIsNamed(t *testing.T) {
	for _, r := range []struct {
		set         map[string]string
		root        bool
		why, advice string
	}{
		{nil, false, "", ""},
		{map[string]string{"user/max_user_namespaces": "15000", "kernel/unprivileged_userns_clone": "1", "kernel/apparmor_restrict_unprivileged_userns": "0"}, false, "", ""},
		{map[string]string{"user/max_user_namespaces": "0"}, true, "switched off", "sysctl -w user.max_user_namespaces="},
		{map[string]string{"kernel/unprivileged_userns_clone": "0"}, false, "kept for root", "sysctl -w kernel.unprivileged_userns_clone=1"},
		{map[string]string{"kernel/unprivileged_userns_clone": "0", "kernel/apparmor_restrict_unprivileged_userns": "1"}, true, "", ""},
		{map[string]string{"kernel/apparmor_restrict_unprivileged_userns": "1"}, false, "AppArmor", `profile sandbox-supervisor "/opt/sup" flags=(unconfined) { userns, }`},
	} {
		f := namespacesForbidden(func(name string) string { return r.set[name] }, r.root, "/opt/sup")
		if (f == nil) != (r.why == "") {
			t.Errorf("%v: %+v", r.set, f)
			continue
		}
		if f != nil && (!strings.Contains(f.why, r.why) || !strings.Contains(f.hint, r.advice)) {
			t.Errorf("%v: %+v", r.set, f)
		}
	}
}

func TestAnOldLandlockIsNoProblem(t *testing.T) {
	for abi, ok := range map[int]bool{0: false, 1: false, confine.LeastLandlock: true, confine.ScopedLandlock: true, 99: true} {
		f := landlockFinding(abi)
		if f.OK != ok || !f.OK && !f.Optional || f.OK != (f.Hint == "") || f.Text == "" {
			t.Errorf("version %d: %+v", abi, f)
		}
	}
}
