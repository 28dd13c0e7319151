package local

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// stageAt is where the new root is built, over a folder that every host has
// and that nobody needs any more by then.
const stageAt = "/usr"

// etc is the part of /etc that is the sandbox's own. There is no network but
// the loopback, so names are looked up in hosts only and fail at once.
var etc = map[string]string{
	"passwd": "root:x:0:0:root:/root:/bin/sh\n" +
		"agent:x:1000:1000:agent:" + sandbox.Home + ":/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"group":         "root:x:0:\ntty:x:5:\nagent:x:1000:\nnogroup:x:65534:\n",
	"hosts":         "127.0.0.1 localhost sandbox\n::1 localhost\n",
	"hostname":      "sandbox\n",
	"nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\nnetworks: files\nprotocols: files\nservices: files\n",
	"resolv.conf":   "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
	"shells":        "/bin/sh\n/bin/bash\n",
}

// folders exist in every sandbox, with what may be done in them.
var folders = map[string]os.FileMode{
	"/etc": 0o755, "/root": 0o700, "/run": 0o755, "/home": 0o755, "/opt": 0o755, "/opt/sandbox": 0o755, sandbox.ProgramDir: 0o755,
	"/proc": 0o555, "/sys": 0o555, "/dev": 0o755, "/usr": 0o755, "/var": 0o755, "/var/lib": 0o755, "/var/cache": 0o755, "/var/log": 0o755,
	"/mnt": 0o755, "/srv": 0o755,
}

var links = map[string]string{
	"/var/tmp": "/tmp", "/var/run": "/run", "/etc/mtab": "/proc/self/mounts", "/etc/os-release": "../usr/lib/os-release",
	"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	"/dev/ptmx": "pts/ptmx",
}

// masked are the files and folders below /proc that speak of the whole host
// or change it.
var masked = []string{"kcore", "keys", "key-users", "kallsyms", "kmsg", "timer_list", "sched_debug", "kpagecount", "kpageflags", "kpagecgroup",
	"latency_stats", "sysrq-trigger", "vmallocinfo", "slabinfo", "config.gz", "interrupts", "acpi", "scsi", "asound", "driver"}

// frozen are the folders below /proc that are only made read-only.
var frozen = []string{"sys", "irq", "bus", "fs"}

// buildRoot makes the calling process's mount namespace the sandbox's: first
// a copy of the host's, in the end nothing but what is listed here. It runs
// as PID 1 with every capability in its own user namespace.
func buildRoot(mounts []mount, hostLinks map[string]string, memory int64) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("make mounts private", err)
	}
	if err := unix.Mount("tmpfs", stageAt, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=4m,nr_inodes=4096,mode=755"); err != nil {
		return os.NewSyscallError("mount root", err)
	}
	root, err := unix.Open(stageAt, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("open root", err)
	}
	defer unix.Close(root)
	if err := unix.Fchdir(root); err != nil {
		return os.NewSyscallError("enter root", err)
	}
	t := tree{root}
	if err := t.furnish(hostLinks, memory); err != nil {
		return err
	}
	for _, m := range mounts {
		if err := t.attach(m); err != nil {
			return fmt.Errorf("attach %s: %w", m.Target, err)
		}
	}
	// The kernel gives out a new proc only where a whole one can be seen, so
	// this comes before the host's is gone.
	if err := t.mount("/proc", "proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("let go of the host's root", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return os.NewSyscallError("enter root", err)
	}
	// No user namespace below ours, also where the filter of system calls
	// should have a hole: kernels without this file just have one door less.
	_ = os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0)
	if err := maskProc(); err != nil {
		return err
	}
	for _, p := range []string{"/", "/dev"} {
		if err := readOnly(p); err != nil {
			return err
		}
	}
	return nil
}

// A tree is the root under construction. A path in it is looked up as the
// sandbox will see it: what links the agent has left in a base lead nowhere
// else.
type tree struct{ root int }

func (t tree) open(p string, flags uint64) (int, error) {
	return unix.Openat2(t.root, strings.TrimPrefix(p, "/"), &unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// furnish makes what is the sandbox's own.
func (t tree) furnish(hostLinks map[string]string, memory int64) error {
	for p, mode := range folders {
		if err := t.folder(p); err != nil {
			return err
		}
		if err := os.Chmod("."+p, mode); err != nil {
			return err
		}
	}
	if err := t.mount("/dev", "tmpfs", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=64k,nr_inodes=64,mode=755"); err != nil {
		return err
	}
	for _, p := range []string{"/dev/pts", "/dev/shm"} {
		if err := t.folder(p); err != nil {
			return err
		}
	}
	if err := t.mount("/dev/pts", "devpts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"); err != nil {
		return err
	}
	// What is written there is the sandbox's memory, also when the process
	// that wrote it is dead.
	shm := fmt.Sprintf("size=%d,mode=1777", min(256<<20, memory/4))
	if err := t.mount("/dev/shm", "tmpfs", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, shm); err != nil {
		return err
	}
	for _, m := range []map[string]string{links, hostLinks} {
		for name, target := range m {
			if err := os.Symlink(target, "."+name); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
	}
	for name, text := range etc {
		if err := os.WriteFile("./etc/"+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// mount mounts a file system of the kernel's at p.
func (t tree) mount(p, source, fstype string, flags uintptr, options string) error {
	if err := unix.Mount(source, "."+p, fstype, flags, options); err != nil {
		return os.NewSyscallError("mount "+p, err)
	}
	return nil
}

// attach puts what was opened before where it will be seen.
func (t tree) attach(m mount) error {
	var err error
	if m.Folder {
		err = t.folder(m.Target)
	} else {
		err = t.file(m.Target)
	}
	if err != nil {
		return err
	}
	at, err := t.open(m.Target, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(at)
	err = unix.MoveMount(m.fd, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	return os.NewSyscallError("move_mount", err)
}

// folder makes the folder p and those above it.
func (t tree) folder(p string) error {
	if p == "/" {
		return nil
	}
	if fd, err := t.open(p, unix.O_PATH|unix.O_DIRECTORY); err == nil {
		return unix.Close(fd)
	} else if !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "open", Path: p, Err: err}
	}
	parent, err := t.parent(p)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	if err := unix.Mkdirat(parent, path.Base(p), 0o755); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		return &os.PathError{Op: "mkdir", Path: p, Err: err}
	}
	// In the agent's home a folder is the agent's, whoever makes it.
	var st unix.Stat_t
	if err := unix.Fstat(parent, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path.Dir(p), Err: err}
	}
	if int(st.Uid) != unix.Getuid() && st.Uid == agentID {
		if err := unix.Fchownat(parent, path.Base(p), agentID, agentID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "chown", Path: p, Err: err}
		}
	}
	return nil
}

// file makes an empty file for a file to be mounted on.
func (t tree) file(p string) error {
	if fd, err := t.open(p, unix.O_PATH); err == nil {
		return unix.Close(fd)
	}
	parent, err := t.parent(p)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	fd, err := unix.Openat(parent, path.Base(p), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &os.PathError{Op: "create", Path: p, Err: err}
	}
	return unix.Close(fd)
}

// parent opens the folder that holds p, and makes it first.
func (t tree) parent(p string) (int, error) {
	dir := path.Dir(p)
	if err := t.folder(dir); err != nil {
		return -1, err
	}
	if dir == "/" {
		return unix.FcntlInt(uintptr(t.root), unix.F_DUPFD_CLOEXEC, 0)
	}
	fd, err := t.open(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return fd, nil
}

// maskProc takes the host out of /proc. A file that this kernel does not
// have needs no mask; one that cannot be masked is an error.
func maskProc() error {
	for _, name := range slices.Concat(masked, frozen) {
		p := "/proc/" + name
		st, err := os.Lstat(p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		switch {
		case slices.Contains(frozen, name):
			err = unix.Mount(p, p, "", unix.MS_BIND|unix.MS_REC, "")
			if err == nil {
				err = readOnly(p)
			}
		case st.IsDir():
			err = unix.Mount("tmpfs", p, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=0,nr_inodes=1,mode=555")
		default:
			err = unix.Mount("/dev/null", p, "", unix.MS_BIND, "")
		}
		if err != nil {
			return os.NewSyscallError("mask "+p, err)
		}
	}
	return nil
}

// readOnly makes the one mount at p read-only.
func readOnly(p string) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, p, 0, &attr); err != nil {
		return os.NewSyscallError("make read-only "+p, err)
	}
	return nil
}
