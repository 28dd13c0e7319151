package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/launch"
)

// attackProcess is after another process of the same user: the one with the
// number in args, or, for "own", a child made for it.
func attackProcess(args []string) []probe {
	target := sync.OnceValues(func() (int, error) {
		if args[0] != "own" {
			return strconv.Atoi(args[0])
		}
		child := exec.Command("/proc/self/exe", attackWord, "wait") // it dies with us
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		said, err := child.StdoutPipe()
		if err == nil {
			err = child.Start()
		}
		if err == nil {
			_, err = said.Read(make([]byte, 1)) // it runs its own program now
		}
		if err != nil {
			return 0, err
		}
		return child.Process.Pid, nil
	})
	var probes []probe
	add := func(what string, try func(pid int) error) {
		probes = append(probes, probe{what: what, try: func() error {
			pid, err := target()
			if err != nil {
				return err
			}
			return try(pid)
		}})
	}
	for _, file := range []struct {
		what, name string
		flags      int
	}{
		{"enter the root of", "root/", unix.O_PATH | unix.O_DIRECTORY},
		{"enter the working directory of", "cwd/", unix.O_PATH | unix.O_DIRECTORY},
		{"read the program of", "exe", unix.O_RDONLY},
		{"write the memory of", "mem", unix.O_RDWR},
		{"see where the memory is of", "pagemap", unix.O_RDONLY},
		{"read the map of", "maps", unix.O_RDONLY},
		{"read the environment of", "environ", unix.O_RDONLY},
		{"see the descriptors of", "fd", unix.O_RDONLY | unix.O_DIRECTORY},
		{"see the offsets of", "fdinfo", unix.O_RDONLY | unix.O_DIRECTORY},
		{"hold the mount namespace of", "ns/mnt", unix.O_RDONLY},
		{"hold the user namespace of", "ns/user", unix.O_RDONLY},
		{"choose when to kill", "oom_score_adj", unix.O_WRONLY},
		{"choose what is dumped of", "coredump_filter", unix.O_WRONLY},
	} {
		add(file.what+" that process", func(pid int) error {
			return opens("", fmt.Sprintf("/proc/%d/%s", pid, file.name), file.flags).try()
		})
	}
	add("trace that process", func(pid int) error {
		runtime.LockOSThread() // and never unlocked: the tracer ends with its thread
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	})
	add("read memory of that process", func(pid int) error {
		// The same program lies at the same place.
		local := unix.Iovec{Base: new(byte)}
		local.SetLen(1)
		remote := unix.RemoteIovec{Base: uintptr(unsafe.Pointer(&programByte)), Len: 1}
		_, err := unix.ProcessVMReadv(pid, []unix.Iovec{local}, []unix.RemoteIovec{remote}, 0)
		return err
	})
	add("take a descriptor of that process", func(pid int) error {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		got, err := unix.PidfdGetfd(fd, 1, 0)
		if err == nil {
			unix.Close(got)
		}
		return err
	})
	add("limit the time of that process", func(pid int) error {
		return unix.Prlimit(pid, unix.RLIMIT_CPU, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, nil)
	})
	add("put that process last", func(pid int) error { return unix.Setpriority(unix.PRIO_PROCESS, pid, 19) })
	add("put the group of that process last", func(pid int) error { return unix.Setpriority(unix.PRIO_PGRP, pid, 19) })
	add("bind that process to a processor", func(pid int) error {
		var all unix.CPUSet
		if err := unix.SchedGetaffinity(pid, &all); err != nil {
			return err
		}
		return unix.SchedSetaffinity(pid, &all)
	})
	add("have that process run when nobody else does", func(pid int) error {
		const idle = 5
		var priority int32
		_, _, errno := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, uintptr(pid), idle, uintptr(unsafe.Pointer(&priority)))
		if errno != 0 {
			return errno
		}
		return nil
	})
	add("have the disk serve that process last", func(pid int) error {
		const ofProcess, idle = 1, 3 << 13
		if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ofProcess, uintptr(pid), idle); errno != 0 {
			return errno
		}
		return nil
	})
	return probes
}

// programByte has an address.
var programByte byte = 1

// TestInitIsOutOfReach attacks the one process of ours that the agent sees.
// For an ordinary user it has the agent's own id.
func TestInitIsOutOfReach(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("init")))
	inSandbox(t, sb, "process", "1")
	if err := sb.Health(t.Context()); err != nil {
		t.Error(err)
	}
	onHost(t, nil, "process", "own")
}

// attackNamespaces tries to get namespaces of its own, in which it would have
// every capability, by each way there is.
func attackNamespaces([]string) (probes []probe) {
	for _, flag := range []uintptr{0, unix.CLONE_NEWNS, unix.CLONE_NEWPID, unix.CLONE_NEWNET, unix.CLONE_NEWIPC, unix.CLONE_NEWUTS, unix.CLONE_NEWCGROUP} {
		what := fmt.Sprintf("clone into namespaces %#x", unix.CLONE_NEWUSER|flag)
		probes = append(probes, probe{what: what, try: func() error { return cloned(unix.CLONE_NEWUSER|flag, false) }})
	}
	probes = append(probes, probe{what: "clone3 into a namespace", try: func() error { return cloned(unix.CLONE_NEWUSER, true) }})
	for _, flag := range []uintptr{unix.CLONE_NEWNS, unix.CLONE_NEWNET, unix.CLONE_NEWTIME, unix.CLONE_NEWCGROUP} {
		probes = append(probes, probe{what: fmt.Sprintf("unshare namespaces %#x", flag), try: func() error {
			runtime.LockOSThread() // and never unlocked
			return call("", unix.SYS_UNSHARE, flag).try()
		}})
	}
	return append(probes,
		probe{what: "join a namespace", try: func() error {
			runtime.LockOSThread() // and never unlocked
			fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Setns(fd, unix.CLONE_NEWNET)
		}},
		opens("allow itself user namespaces", "/proc/sys/user/max_user_namespaces", unix.O_WRONLY),
		probe{what: "set the clock", unprovable: "it is the host's", try: func() error {
			var now unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
				return err
			}
			return unix.ClockSettime(unix.CLOCK_REALTIME, &now)
		}},
		probe{what: "turn the clock slowly", unprovable: "it is the host's", try: func() error {
			_, err := unix.ClockAdjtime(unix.CLOCK_REALTIME, &unix.Timex{Modes: unix.ADJ_SETOFFSET})
			return err
		}},
	)
}

// cloned makes a process with the flags, which ends at once.
func cloned(flags uintptr, new bool) error {
	// struct clone_args of linux/sched.h: flags first, the fifth is the signal.
	args := [11]uint64{0: uint64(flags), 4: uint64(unix.SIGCHLD)}
	pid, errno := rawClone(flags, new, &args)
	if errno != 0 {
		return errno
	}
	_, err := unix.Wait4(int(pid), nil, 0, nil)
	return err
}

// rawClone has a child that does nothing of Go's but end: it has but one of
// the threads that the runtime needs.
//
//go:norace
//go:nosplit
func rawClone(flags uintptr, new bool, args *[11]uint64) (pid uintptr, errno syscall.Errno) {
	if new {
		pid, _, errno = syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0)
	} else {
		pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	}
	if pid == 0 && errno == 0 {
		for {
			syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	return pid, errno
}

func TestTheAgentGetsNoNamespacesAndNoClock(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("namespaces")))
	inSandbox(t, sb, "namespaces")
	onHost(t, asRootOfItsOwn, "namespaces")
}

// attackMounts changes what is mounted on /tmp, which is a mount in a sandbox
// and becomes one on the host by the first probe.
func attackMounts([]string) []probe {
	tmp := unsafe.Pointer(unsafe.StringData("/tmp\x00"))
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOEXEC}
	return []probe{
		{what: "mount", try: func() error { return unix.Mount("none", "/tmp", "tmpfs", 0, "") }},
		{what: "bind", try: func() error { return unix.Mount("/tmp", "/tmp", "", unix.MS_BIND, "") }},
		{what: "change a mount", try: func() error { return unix.Mount("", "/tmp", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID, "") }},
		{what: "change a mount by the newer way", try: func() error { return unix.MountSetattr(unix.AT_FDCWD, "/tmp", 0, attr) }},
		{what: "open a file system", try: func() error {
			fd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}},
		{what: "pick a file system", try: func() error {
			fd, _, errno := unix.Syscall(unix.SYS_FSPICK, ^uintptr(99), uintptr(tmp), unix.FSPICK_CLOEXEC) // AT_FDCWD
			if errno != 0 {
				return errno
			}
			return unix.Close(int(fd))
		}},
		{what: "copy a tree of mounts, and move it", try: func() error {
			fd, err := unix.OpenTree(unix.AT_FDCWD, "/tmp", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.MoveMount(fd, "", unix.AT_FDCWD, "/tmp", unix.MOVE_MOUNT_F_EMPTY_PATH)
		}},
		{what: "change its root", try: func() error { return unix.Chroot("/") }},
		{what: "unmount", try: func() error { return unix.Unmount("/tmp", unix.MNT_DETACH) }},
		{what: "open a file by its number", unprovable: "needs more than root of its own", try: func() error {
			handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, "/tmp", 0)
			if err != nil {
				return err
			}
			fd, err := unix.OpenByHandleAt(unix.AT_FDCWD, handle, unix.O_PATH)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}},
	}
}

func TestTheAgentCannotChangeWhatIsMounted(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("mounts")))
	inSandbox(t, sb, "mounts")
	onHost(t, asRootOfItsOwn, "mounts")
}

// attackKeys goes for the kernel's keyrings. What it makes ends with it.
func attackKeys([]string) []probe {
	add := func() error {
		_, err := unix.AddKey("user", "sandbox-test", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
		return err
	}
	return []probe{
		{what: "make a key", try: add},
		{what: "ask for a key", try: func() error {
			if err := add(); err != nil {
				return err
			}
			_, err := unix.RequestKey("user", "sandbox-test", "", 0)
			return err
		}},
		{what: "have the keyring of the session", try: func() error {
			_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
			return err
		}},
		{what: "have the keyring of the user", try: func() error {
			_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, true)
			return err
		}},
		{what: "leave the session's keyring", try: func() error {
			runtime.LockOSThread() // and never unlocked
			_, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0)
			return err
		}},
		{what: "list keys", try: func() error {
			b, err := os.ReadFile("/proc/keys")
			if err == nil && len(b) == 0 {
				err = io.EOF
			}
			return err
		}},
	}
}

func TestTheAgentHasNoKeyrings(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("keys")))
	inSandbox(t, sb, "keys")
	onHost(t, nil, "keys")
}

// attackCrash wants to be handled by the host when it crashes: not by a limit
// of 1 for core files. It may lower the limit by either call, and name itself.
func attackCrash([]string) (probes []probe) {
	const newest, other = unix.SYS_PRLIMIT64, unix.SYS_SETRLIMIT
	for _, way := range []struct {
		what string
		set  func(*unix.Rlimit) error
	}{
		{"as it is", func(*unix.Rlimit) error { return nil }},
		{"after prlimit64", func(l *unix.Rlimit) error {
			return call("", newest, 0, unix.RLIMIT_CORE, uintptr(unsafe.Pointer(l)), 0).try()
		}},
		{"after prlimit64 by its number", func(l *unix.Rlimit) error {
			return call("", newest, uintptr(os.Getpid()), unix.RLIMIT_CORE, uintptr(unsafe.Pointer(l)), 0).try()
		}},
		{"after setrlimit", func(l *unix.Rlimit) error {
			return call("", other, unix.RLIMIT_CORE, uintptr(unsafe.Pointer(l))).try()
		}},
	} {
		probes = append(probes, probe{what: "have the host handle its crash, " + way.what, try: func() error {
			if err := way.set(&unix.Rlimit{}); err != nil {
				return err
			}
			var now unix.Rlimit
			if err := unix.Getrlimit(unix.RLIMIT_CORE, &now); err != nil {
				return err
			}
			if now.Cur == 1 {
				return unix.EPERM
			}
			return nil
		}})
	}
	return probes
}

// TestTheHostDoesNotHandleTheAgentsCrashes: where kernel.core_pattern names a
// program, the kernel runs it as root of the host, whatever namespace the
// crashed process was in, unless that one's limit is 1 byte.
func TestTheHostDoesNotHandleTheAgentsCrashes(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("crash")))
	inSandbox(t, sb, "crash")
	onHost(t, nil, "crash")
	// Whoever sets it is told that it was done: many programs insist.
	if out := script(t, sb, "insist", "ulimit -c 0 && bash -c 'ulimit -c 0' && echo ok"); out != "ok" {
		t.Error(out)
	}
}

// attackHost opens what changes the whole machine, and changes nothing.
func attackHost([]string) (probes []probe) {
	for _, name := range []string{
		"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/randomize_va_space", "/proc/sys/vm/drop_caches", "/proc/sys/fs/suid_dumpable",
		"/proc/sys/fs/binfmt_misc/register", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/sys/kernel/uevent_helper", "/sys/power/state",
		"/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs", "/sys/fs/cgroup/systemd/release_agent", "/sys/fs/cgroup/memory/release_agent",
		"/sys/fs/cgroup/pids/cgroup.procs", "/dev/kmsg", "/dev/mem", "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/loop-control", "/dev/mapper/control",
	} {
		p := opens("write "+name, name, unix.O_WRONLY)
		if name == "/dev/mem" || strings.HasPrefix(name, "/dev/mapper") {
			p.unprovable = "many hosts keep it from root"
		}
		probes = append(probes, p)
	}
	for _, name := range []string{"/proc/kcore", "/dev/vda", "/dev/sda", "/dev/loop0"} {
		p := opens("read "+name, name, unix.O_RDONLY)
		p.unprovable = "many hosts keep it from root"
		probes = append(probes, p)
	}
	for i, p := range probes {
		_, name, _ := strings.Cut(p.what, " ")
		if _, err := os.Stat(name); err != nil {
			probes[i].unprovable = "this host has none"
		}
	}
	return append(probes,
		probe{what: "be the last to be killed", unprovable: "many hosts keep it from root", try: func() error { return os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0) }},
		probe{what: "be first on the processor", try: func() error {
			runtime.LockOSThread() // and never unlocked
			return unix.Setpriority(unix.PRIO_PROCESS, 0, -5)
		}},
		probe{what: "load a module", unprovable: "it would be loaded", try: func() error {
			err := unix.InitModule([]byte("none"), "")
			if errors.Is(err, unix.ENOEXEC) {
				return nil // it was read
			}
			return err
		}},
	)
}

func TestTheAgentCannotChangeTheMachine(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("host")))
	inSandbox(t, sb, "host")
	if os.Geteuid() == 0 { // nobody else could do it on the host
		onHost(t, nil, "host")
	}
}

// attackDevices makes device nodes in the folders.
func attackDevices(dirs []string) (probes []probe) {
	for _, dir := range dirs {
		for _, node := range []struct {
			name string
			mode uint32
			dev  uint64
		}{{"disk", unix.S_IFBLK | 0o600, unix.Mkdev(7, 0)}, {"null", unix.S_IFCHR | 0o600, unix.Mkdev(1, 3)}} {
			name := filepath.Join(dir, node.name)
			probes = append(probes, probe{what: "make the device " + name, try: func() error { return unix.Mknod(name, node.mode, int(node.dev)) }})
		}
	}
	return probes
}

func TestTheAgentMakesNoDevices(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, withAttacker(t, testSpec("plain")))
	places := []string{sandbox.Workspace, sandbox.Home, "/tmp", "/dev/shm"}
	inSandbox(t, sb, "devices", places...)
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := withAttacker(t, testSpec("fork"))
	s.Base = "base"
	_, fork := newSandbox(t, p, s)
	inSandbox(t, fork, "devices", places...)
	if os.Geteuid() == 0 {
		onHost(t, nil, "devices", t.TempDir())
	}
}

// attackSockets connects to sockets of the host: two abstract ones, by stream
// and by datagram, and one in the file system.
func attackSockets(names []string) (probes []probe) {
	for i, what := range []string{"an abstract socket", "an abstract datagram socket", "a socket in the file system"} {
		probes = append(probes, probe{what: "reach " + what + " of the host", try: func() error {
			network, name := []string{"unix", "unixgram", "unix"}[i], names[i]
			if filepath.IsAbs(name) { // and perhaps too long for an address
				if err := os.Chdir(filepath.Dir(name)); err != nil {
					return err
				}
				name = filepath.Base(name)
			}
			c, err := net.Dial(network, name)
			if err == nil {
				err = c.Close()
			}
			return err
		}})
	}
	return probes
}

func TestTheAgentReachesNoSocketOfTheHost(t *testing.T) {
	id := newInstance()
	dir := t.TempDir()
	t.Chdir(dir) // the path as a whole may be too long for an address
	names := []string{"@stream-" + id, "@datagram-" + id, filepath.Join(dir, "socket")}
	stream, err := net.Listen("unix", names[0])
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	datagram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: names[1], Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer datagram.Close()
	file, err := net.Listen("unix", "socket")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	onHost(t, nil, "sockets", names...)
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("sockets")))
	inSandbox(t, sb, "sockets", names...)
}

// attackTerminal types into the terminal of whoever started it.
func attackTerminal([]string) (probes []probe) {
	push := func(fd int) error {
		letter := byte('x')
		return call("", unix.SYS_IOCTL, uintptr(fd), unix.TIOCSTI, uintptr(unsafe.Pointer(&letter))).try()
	}
	for fd, what := range []string{"standard input", "standard output", "standard error"} {
		p := probe{what: "type by " + what, try: func() error { return push(fd) }}
		if fd > 0 {
			p.unprovable = "that is where it says so"
		}
		probes = append(probes, p)
	}
	return append(probes,
		probe{what: "type by /dev/tty", try: func() error {
			fd, err := unix.Open("/dev/tty", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return push(fd)
		}},
		probe{what: "open /dev/console", unprovable: "it is the host's", try: opens("", "/dev/console", unix.O_RDWR).try},
	)
}

// TestTheAgentCannotTypeIntoTheWorkersTerminal has a worker that runs on a
// terminal make the sandbox.
func TestTheAgentCannotTypeIntoTheWorkersTerminal(t *testing.T) {
	typed := func(outer *os.File) string {
		t.Helper()
		if err := outer.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(outer) // what is typed is shown
		return string(b)
	}
	if legacy, err := os.ReadFile("/proc/sys/dev/tty/legacy_tiocsti"); os.Geteuid() == 0 || err == nil && strings.TrimSpace(string(legacy)) == "1" {
		outer, inner := newTerminalPair(t)
		onHost(t, func(cmd *exec.Cmd) {
			cmd.Stdin, cmd.SysProcAttr = inner, &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
		}, "terminal")
		if typed(outer) == "" {
			t.Error("what is typed on the host does not show")
		}
	}
	p := newProvider(t)
	outer, inner := newTerminalPair(t)
	ref, _ := startWorker(t, workerOrder{Options: testOptions(p.dir), Spec: withAttacker(t, testSpec("typist")), Script: "true"}, func(cmd *exec.Cmd) {
		cmd.ExtraFiles, cmd.SysProcAttr = []*os.File{inner}, &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
	})
	r := ref()
	defer func() {
		if err := p.Destroy(context.Background(), r); err != nil {
			t.Error(err)
		}
	}()
	sb, err := p.Attach(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	inSandbox(t, sb, "terminal")
	if got := typed(outer); got != "" {
		t.Errorf("the terminal shows %q", got)
	}
}

// newTerminalPair returns the two ends of a new terminal.
func newTerminalPair(t *testing.T) (outer, inner *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	outer = os.NewFile(uintptr(fd), "terminal")
	t.Cleanup(func() { outer.Close() })
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	inner, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inner.Close() })
	return outer, inner
}

// attackStray looks for descriptors that nobody meant it to have.
func attackStray([]string) (probes []probe) {
	probes = append(probes, probe{what: "use a descriptor that was left open", try: func() error {
		for fd := 3; fd < 4096; fd++ {
			name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			if err == nil && !strings.HasPrefix(name, "anon_inode:[event") { // Go's own
				fmt.Fprintf(os.Stderr, "%d is %s\n", fd, name)
				return nil
			}
		}
		return unix.ENOENT
	}})
	for fd, what := range []string{"standard input", "standard output", "standard error"} {
		probes = append(probes, probe{what: "have more than a pipe or nothing as " + what, try: func() error {
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				return err
			}
			if st.Mode&unix.S_IFMT == unix.S_IFIFO || st.Rdev == unix.Mkdev(1, 3) {
				return unix.ENOENT
			}
			return nil
		}, unprovable: "it depends on how the tests are run"})
	}
	return probes
}

func TestTheAgentHasNoStrayDescriptors(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("stray")))
	inSandbox(t, sb, "stray")
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	onHost(t, func(cmd *exec.Cmd) { cmd.ExtraFiles = []*os.File{dir} }, "stray")
}

// attackPrivileges runs programs that make somebody else of whoever runs them.
func attackPrivileges(programs []string) (probes []probe) {
	for _, program := range programs {
		probes = append(probes, probe{what: "become somebody else by " + program, try: func() error {
			out, err := exec.Command(program, attackWord, "who").Output()
			if err == nil && strings.TrimSpace(string(out)) == fmt.Sprint(os.Getuid(), os.Getgid()) {
				err = unix.EPERM
			}
			return err
		}})
	}
	return probes
}

// TestSetuidProgramsGiveNothing has programs of root's that run as root: lent
// by the host, and in a base, where a fork moves and copies them.
func TestSetuidProgramsGiveNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root has a program of root's")
	}
	program, err := attacker()
	if err != nil {
		t.Fatal(err)
	}
	// Not below t.TempDir, which is closed to others.
	dir, err := os.MkdirTemp("/tmp", "sandbox-setuid-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	rootly := filepath.Join(dir, "rootly")
	makeRootly(t, program, rootly)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	onHost(t, func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}
	}, "privileges", rootly)

	p := newProvider(t)
	ref, sb := newSandbox(t, p, withAttacker(t, testSpec("prepare")))
	script(t, sb, "mine", "cp "+attackPath+" mine && chmod 6755 mine")
	makeRootly(t, program, filepath.Join(p.boxPath("prepare"), fsDir, "workspace", "rootly"))
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := withAttacker(t, testSpec("fork"))
	s.Base = "base"
	s.Mounts = append(s.Mounts, sandbox.Mount{Source: rootly, Target: sandbox.ProgramDir + "/rootly"})
	_, fork := newSandbox(t, p, s)
	at := sandbox.Workspace + "/"
	inSandbox(t, fork, "privileges", sandbox.ProgramDir+"/rootly", at+"rootly", at+"mine")
	// The folder is the agent's, so it may move what is in it: that copies it
	// up, owner, mode and all.
	script(t, fork, "move", "mv rootly moved && cp mine copied && chmod 6755 copied && touch mine && chmod 6755 mine")
	inSandbox(t, fork, "privileges", at+"moved", at+"mine", at+"copied")
	// What the agent made belongs to it.
	var st unix.Stat_t
	upper := filepath.Join(p.boxPath("fork"), fsDir, "workspace")
	if err := unix.Stat(filepath.Join(upper, "copied"), &st); err != nil || int(st.Uid) != currentIdentity().agent() {
		t.Errorf("owner %d, %v", st.Uid, err)
	}
	if err := unix.Stat(filepath.Join(upper, "moved"), &st); err != nil || st.Uid != 0 {
		t.Fatalf("nothing of root's was copied up, so nothing was tried: owner %d, %v", st.Uid, err)
	}
}

// makeRootly makes a copy of the program that runs as root.
func makeRootly(t *testing.T, program, name string) {
	t.Helper()
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, 0o755|os.ModeSetuid|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
}

// watchOthers waits for a process whose program is not one that can be seen
// in the sandbox, stops it, and tries to change the program's file. It prints
// what it could do.
func watchOthers([]string) error {
	fmt.Println("watching")
	for {
		dirs, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			exe := dir + "/exe"
			name, err := os.Readlink(exe)
			if err != nil || name == attackPath || strings.HasPrefix(name, "/usr/") {
				continue
			}
			pid, err := strconv.Atoi(filepath.Base(dir))
			if err != nil || unix.Kill(pid, unix.SIGSTOP) != nil {
				continue
			}
			if again, err := os.Readlink(exe); err != nil || again != name {
				continue
			}
			for _, p := range []probe{
				{what: "chmod", try: func() error { return unix.Chmod(exe, 0o755) }},
				{what: "touch", try: func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, exe, nil, 0) }},
				{what: "write", try: func() error {
					err := opens("", exe, unix.O_WRONLY).try()
					var fs unix.Statfs_t
					if errors.Is(err, unix.ETXTBSY) && unix.Statfs(exe, &fs) == nil && fs.Flags&unix.ST_RDONLY != 0 {
						err = unix.EROFS // which the kernel looks at later
					}
					return err
				}},
			} {
				fmt.Println(p.what, p.try())
			}
			fmt.Println("done")
			return unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// TestTheAgentCannotChangeTheSupervisorsProgram has the worker run a script of
// the agent's, whose interpreter is the program that init has at that moment.
// For an ordinary user the program's file belongs to the agent's own id.
func TestTheAgentCannotChangeTheSupervisorsProgram(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "supervisor")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, 0o700)
	for how, supervisor := range map[string][]string{
		"its file can be found": {program, supervisorWord},
		// Only who runs it already gets at it.
		"its folder is closed": {"/bin/sh", "-c", `exec 9<"$0"; chmod 0 "$1"; shift; exec /proc/self/fd/9 "$@"`, program, dir, supervisorWord},
	} {
		t.Run(how, func(t *testing.T) {
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			p := newProvider(t)
			p = New(Options{Dir: p.dir, Supervisor: supervisor})
			_, sb := newSandbox(t, p, withAttacker(t, testSpec("program")))
			script(t, sb, "write", fmt.Sprintf(`printf '#!/proc/self/exe %s\n' > wait; chmod 755 wait`, attackWord))
			watch, err := sb.Start(t.Context(), "watch", attackLine("watch-others"))
			if err != nil {
				t.Fatal(err)
			}
			said := func() string {
				b, err := sandbox.ReadAll(t.Context(), watch, sandbox.Stdout, 1000)
				if err != nil {
					t.Fatal(err)
				}
				return string(b)
			}
			eventually(t, "it watches", func() bool { return said() != "" })
			out, errs, exit, err := sandbox.Output(t.Context(), sb, "run", sandbox.Cmd{Args: []string{sandbox.Workspace + "/wait"}}, 1000)
			if err != nil {
				t.Fatal(err)
			}
			if !currentIdentity().Root {
				unchangeable(t, p, "program")
			}
			if exit.Code == launch.NoExec {
				return // by Landlock: it cannot even run it
			}
			if exit.Signal == "" {
				t.Fatalf("it was not caught: %s%s, %+v", out, errs, exit)
			}
			eventually(t, "it has tried", func() bool { return strings.HasSuffix(said(), "done\n") })
			for line := range strings.Lines(said()) {
				// That the program is busy would not protect it for long.
				if what, result, _ := strings.Cut(strings.TrimSpace(line), " "); result == "<nil>" || result == unix.ETXTBSY.Error() {
					t.Errorf("the agent can %s the supervisor's program: %s", what, result)
				}
			}
		})
	}
}

// unchangeable fails unless init's program is on a mount that is read-only, or
// a sealed copy.
func unchangeable(t *testing.T, p *Provider, key string) {
	t.Helper()
	box, err := openFolder(p.boxPath(key))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	left, err := box.readRemains()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/exe", left.Init.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		t.Fatal(err)
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if fs.Flags&unix.ST_RDONLY == 0 && (err != nil || seals&unix.F_SEAL_WRITE == 0) {
		t.Errorf("the program of init can be changed: flags %#x, seals %#x, %v", fs.Flags, seals, err)
	}
}

// counters are what the kernel counts for all processes of a user; each takes
// one more, or fails.
var counters = map[string]func() error{
	"file watchers": func() error {
		_, err := unix.InotifyInit1(unix.IN_CLOEXEC)
		return err
	},
	"waiting signals": func() error {
		// A timer holds a signal from the beginning.
		var id int32
		return call("", unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, 0, uintptr(unsafe.Pointer(&id))).try()
	},
	"message queues": func() error {
		name := unsafe.Pointer(unsafe.StringData("sandbox-test-" + newInstance() + "\x00"))
		if err := call("", unix.SYS_MQ_OPEN, uintptr(name), unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600, 0).try(); err != nil {
			return err
		}
		// It lives on without its name, for as long as its descriptor.
		return call("", unix.SYS_MQ_UNLINK, uintptr(name)).try()
	},
	"asynchronous I/O": func() error {
		var id uintptr
		return call("", unix.SYS_IO_SETUP, 1024, uintptr(unsafe.Pointer(&id))).try()
	},
	"terminals": func() error {
		_, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		return err
	},
}

// exhaust takes all there is of a counter, at most so many, says how many, and
// keeps them until it is killed.
func exhaust(args []string) error {
	most, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	n := 0
	for n < most && err == nil {
		if err = counters[args[0]](); err == nil {
			n++
		}
	}
	fmt.Println(n, err)
	return wait()
}

// TestTheAgentCannotUseUpWhatAllShare has it take what it gets of things that
// the kernel counts for the user who runs the worker, or for everybody. Then
// there must be more for that user.
func TestTheAgentCannotUseUpWhatAllShare(t *testing.T) {
	_, sb := newSandbox(t, newProvider(t), withAttacker(t, testSpec("greedy")))
	taken := func(what string, read func() string) int {
		t.Helper()
		eventually(t, "it has taken all", func() bool { return strings.Contains(read(), "waiting") })
		var n int
		if _, err := fmt.Sscan(read(), &n); err != nil {
			t.Fatalf("%s: %s", what, read())
		}
		return n
	}
	for what := range counters {
		deed, err := sb.Start(t.Context(), "take-"+newInstance(), attackLine("exhaust", what, "1000000"))
		if err != nil {
			t.Fatal(err)
		}
		inside := taken(what, func() string {
			b, err := sandbox.ReadAll(t.Context(), deed, sandbox.Stdout, 1000)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		})
		// One more, by a process of the host that is like the worker.
		cmd := self(t, attackWord, "exhaust", what, "1")
		var out syncBuffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		outside := taken(what, out.String)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if outside != 1 {
			t.Errorf("%s: the agent took %d, and left none for the host: %s", what, inside, out.String())
		}
		if what == "terminals" && inside > 64 {
			t.Errorf("the agent took %d terminals from the other sandboxes", inside)
		}
	}
}

// A syncBuffer is written to by one and read by another.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
