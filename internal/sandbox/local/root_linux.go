package local

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// stageAt is where the new root is built, over a folder that every host has
// and that nobody needs any more by then.
const stageAt = "/usr"

// etc is the part of /etc that is the sandbox's own. There is no network but
// the loopback, so names are looked up in hosts only and fail at once; who
// asks a server all the same is refused at once by a port that nobody listens
// on. The files in which people look for the reason give it.
var etc = map[string]string{
	"passwd": "root:x:0:0:root:/root:/bin/sh\n" +
		"agent:x:1000:1000:agent:" + sandbox.Home + ":/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"group":         "root:x:0:\ntty:x:5:\nagent:x:1000:\nnogroup:x:65534:\n",
	"hosts":         noNames + "127.0.0.1 localhost sandbox\n::1 localhost\n",
	"hostname":      "sandbox\n",
	"nsswitch.conf": noNames + "passwd: files\ngroup: files\nshadow: files\nhosts: files\nnetworks: files\nprotocols: files\nservices: files\n",
	"resolv.conf":   noNames + "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
	"shells":        "/bin/sh\n/bin/bash\n",
	"motd": "This is a sandbox. You are the user agent, and cannot become another.\n\n" +
		"There is no network but the gateway, where the run has one, at " + gatewayAddress + ".\n" +
		"Host names are not looked up here, and no other address can be reached: that is\n" +
		"on purpose, and trying again does not help. Where HTTPS_PROXY is set, programs\n" +
		"that heed it reach the hosts that this run may reach, by their names.\n\n" +
		"You can write to " + sandbox.Workspace + ", to your home and to /tmp; the rest is read-only.\n",
}

// noNames is the head of the files that name resolution reads.
const noNames = "# Host names are not looked up in a sandbox: see /etc/motd.\n"

var gatewayAddress = fmt.Sprintf("http://127.0.0.1:%d", sandbox.GatewayPort)

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

// shown are the files and folders in /proc that runtimes and build tools read
// to learn about processors, memory and the kernel. Everything else there but
// the processes speaks of the whole host or changes it, and is masked, also
// what only a later kernel has.
var shown = []string{"cgroups", "cpuinfo", "filesystems", "loadavg", "meminfo", "mounts", "net", "self", "stat", "sys", "sysvipc", "thread-self", "uptime", "version"}

// maxTerminals bounds the terminals of a sandbox. All of the host, whose
// number is bounded (kernel.pty.max), share what the host itself leaves.
const maxTerminals = "64"

// stageRoot begins the sandbox's root: what all sandboxes have. The calling
// process's mount namespace is a copy of the host's, and its working directory
// is the new root from now on. With enter it is the only root there is: nothing
// of the host can be opened by its path any more. It runs as PID 1 with every
// capability in its own user namespace. The caller closes the tree.
func stageRoot(system []mount, hostLinks map[string]string, enter bool) (t tree, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return tree{}, os.NewSyscallError("make mounts private", err)
	}
	if err := unix.Mount("tmpfs", stageAt, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=4m,nr_inodes=4096,mode=755"); err != nil {
		return tree{}, os.NewSyscallError("mount root", err)
	}
	if t.root, err = unix.Open(stageAt, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return tree{}, os.NewSyscallError("open root", err)
	}
	err = t.stage(system, hostLinks)
	if err == nil && enter {
		err = t.enter()
	}
	if err != nil {
		unix.Close(t.root)
		return tree{}, err
	}
	return t, nil
}

func (t tree) stage(system []mount, hostLinks map[string]string) error {
	if err := unix.Fchdir(t.root); err != nil {
		return os.NewSyscallError("enter root", err)
	}
	if err := t.furnish(hostLinks); err != nil {
		return err
	}
	for _, m := range system {
		if err := t.attachEarly(m); err != nil {
			return fmt.Errorf("attach %s: %w", m.Target, err)
		}
	}
	// The kernel gives out a new proc only where a whole one can be seen, so
	// this comes before the host's is gone.
	return t.mount("/proc", "proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

// enter lets go of the host: the namespace holds nothing but the tree from now
// on. It takes the longer the more processes the host has, as the kernel looks
// at all of them (Linux 6.18, fs/fs_struct.c: chroot_fs_refs).
func (t *tree) enter() error {
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("let go of the host's root", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return os.NewSyscallError("enter root", err)
	}
	t.entered = true
	// No user namespace below ours, also where the filter of system calls
	// should have a hole, and no more than a part of what there is for all.
	boundWatches()
	for _, p := range []string{"/", "/dev"} {
		if err := setReadOnly(p, true); err != nil {
			return err
		}
	}
	return maskProc()
}

// finish adds what is this sandbox's own. In the end the namespace holds
// nothing but the tree, and nothing in that can be written to but the layers.
func (t *tree) finish(own []mount, memory int64) error {
	// What is written there is the sandbox's memory, also when the process
	// that wrote it is dead.
	shm := fmt.Sprintf("size=%d,mode=1777", min(256<<20, memory/4))
	if err := t.mount("/dev/shm", "tmpfs", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, shm); err != nil {
		return err
	}
	if t.entered {
		if err := setReadOnly("/", false); err != nil { // there may be places to make
			return err
		}
	}
	for _, m := range own {
		if err := t.attach(m); err != nil {
			return fmt.Errorf("attach %s: %w", m.Target, err)
		}
	}
	if t.entered {
		return setReadOnly("/", true)
	}
	return t.enter()
}

// A tree is the root under construction. A path in it is looked up as the
// sandbox will see it: what links the agent has left in a base lead nowhere
// else.
type tree struct {
	root    int
	entered bool // the host's root is gone
}

func (t tree) open(p string, flags uint64) (int, error) {
	return unix.Openat2(t.root, strings.TrimPrefix(p, "/"), &unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
}

// furnish makes what is the sandbox's own.
func (t tree) furnish(hostLinks map[string]string) error {
	// Nothing in it is anybody else's yet, so paths need no care.
	for _, p := range slices.Sorted(maps.Keys(folders)) {
		if err := os.Mkdir("."+p, folders[p]); err != nil {
			return err
		}
	}
	if err := t.mount("/dev", "tmpfs", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=64k,nr_inodes=64,mode=755"); err != nil {
		return err
	}
	for _, p := range []string{"/dev/pts", "/dev/shm"} {
		if err := os.Mkdir("."+p, 0o755); err != nil {
			return err
		}
	}
	if err := t.mount("/dev/pts", "devpts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,max="+maxTerminals); err != nil {
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
		if err := writeNew("./etc/"+name, text); err != nil {
			return err
		}
	}
	return nil
}

// writeNew is os.WriteFile without what that does for files that can block.
func writeNew(name, text string) error {
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &os.PathError{Op: "create", Path: name, Err: err}
	}
	defer unix.Close(fd)
	n, err := unix.Write(fd, []byte(text))
	if err == nil && n < len(text) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return &os.PathError{Op: "write", Path: name, Err: err}
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

// attachEarly is attach as long as nobody has left links anywhere, so that
// paths need no care: a third of the system calls, for most of the mounts.
func (t tree) attachEarly(m mount) error {
	at := "." + m.Target
	err := placeFor(m, at)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(path.Dir(at), 0o755); err != nil {
			return err
		}
		err = placeFor(m, at)
	}
	if err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	err = unix.MoveMount(m.fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
	return os.NewSyscallError("move_mount", err)
}

// placeFor makes what m is mounted on.
func placeFor(m mount, at string) error {
	if m.Folder {
		return os.Mkdir(at, 0o755)
	}
	return writeNew(at, "")
}

// partsAt is where a mount stands for as long as its parts are taken. Nothing
// else is there.
const partsAt = "/mnt"

// attach puts what was opened before where it will be seen.
func (t tree) attach(m mount) error {
	if m.Parts == nil {
		return t.place(m.fd, m.Target, m.Folder)
	}
	err := unix.MoveMount(m.fd, "", unix.AT_FDCWD, "."+partsAt, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	for name, target := range m.Parts {
		// Before Linux 6.15 a part cannot be taken of what stands nowhere.
		fd, err := unix.OpenTree(m.fd, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return os.NewSyscallError("open_tree "+name, err)
		}
		err = t.place(fd, target, true)
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return os.NewSyscallError("umount", unix.Unmount("."+partsAt, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
}

// place moves the mount fd to target.
func (t tree) place(fd int, target string, folder bool) error {
	at, err := t.open(target, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		if folder {
			err = t.folder(target)
		} else {
			err = t.file(target)
		}
		if err == nil {
			at, err = t.open(target, unix.O_PATH)
		}
	}
	if err != nil {
		return err
	}
	defer unix.Close(at)
	err = unix.MoveMount(fd, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
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

// maskProc takes the host out of /proc. What cannot be masked is an error.
func maskProc() error {
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return os.NewSyscallError("mount /proc/sys", err)
	}
	if err := setReadOnly("/proc/sys", true); err != nil {
		return err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil || slices.Contains(shown, e.Name()) {
			continue
		}
		// What is bound is read-only where the root is; /sys is empty.
		nothing := os.DevNull
		if e.IsDir() {
			nothing = "/sys"
		}
		if err := unix.Mount(nothing, "/proc/"+e.Name(), "", unix.MS_BIND, ""); err != nil {
			return os.NewSyscallError("mask /proc/"+e.Name(), err)
		}
	}
	return nil
}

// setReadOnly says of the one mount at p whether it can only be read.
func setReadOnly(p string, only bool) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if !only {
		attr = unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, p, 0, &attr); err != nil {
		return os.NewSyscallError("mount_setattr "+p, err)
	}
	return nil
}
