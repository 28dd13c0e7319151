package e2btest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A box is the machine of one sandbox: a mount and a pid namespace that one
// thread of this process, and no other, has entered.
//
// Everything that names a file of the sandbox runs on that thread, so links
// are followed inside and nothing has to be rewritten. When the thread goes,
// by [box.close] or because this process was killed, the kernel ends every
// process and every mount of the box with it.
type box struct {
	jobs chan func()
	quit chan struct{} // closed to have the thread go
	over chan struct{} // closed when it has gone
	init *os.Process   // pid 1 of the box, as the host counts

	closing sync.Once
	held    string // processes that were stopped before all were; who stops holds the gate of the sandbox
}

var errClosed = errors.New("the sandbox has ended")

// shown are the folders of the host that a box sees, read-only. What is a
// link on the host is one in the box.
var shown = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ssl", "/etc/ca-certificates", "/etc/ld.so.conf.d"}

// copied are files of the host that a box has a copy of.
var copied = []string{"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/nsswitch.conf", "/etc/services", "/etc/protocols", "/etc/resolv.conf", "/etc/localtime", "/etc/shells", "/etc/profile"}

// files are those that every template has, unless a snapshot says otherwise.
var files = map[string]string{
	"/etc/passwd":   "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"/etc/group":    "root:x:0:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n",
	"/etc/hosts":    "127.0.0.1 localhost\n::1 localhost\n",
	"/etc/hostname": "e2b\n",
}

// plant makes the files of a new sandbox in the folder root of the host.
func plant(root string, mounts []Mount) error {
	for _, dir := range []string{"/proc", "/dev", "/sys", "/etc", "/home", "/opt", "/run", "/mnt", "/srv", "/var/lib", "/var/cache", "/var/log"} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			return err
		}
	}
	for dir, mode := range map[string]os.FileMode{"/root": 0o700, "/tmp": 0o777 | os.ModeSticky, "/var/tmp": 0o777 | os.ModeSticky, "/home/user": 0o755} {
		if err := errors.Join(os.MkdirAll(root+dir, 0o755), os.Chmod(root+dir, mode)); err != nil {
			return err
		}
	}
	if err := os.Chown(root+"/home/user", 1000, 1000); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(root+name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, name := range copied {
		b, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(root+name, b, 0o644)
		}
		if err != nil {
			return err
		}
	}
	for _, name := range shown {
		st, err := os.Lstat(name)
		switch {
		case err != nil:
			continue
		case st.Mode()&os.ModeSymlink != 0:
			to, err := os.Readlink(name)
			if err == nil {
				err = os.Symlink(to, root+name)
			}
			if err != nil {
				return err
			}
		default:
			if err := os.MkdirAll(root+name, 0o755); err != nil {
				return err
			}
		}
	}
	for _, m := range mounts {
		if err := plantMount(root, m); err != nil {
			return err
		}
	}
	return nil
}

// plantMount makes what a mount is put on.
func plantMount(root string, m Mount) error {
	st, err := os.Stat(m.Source)
	if err != nil {
		return err
	}
	target := filepath.Join(root, m.Target)
	if st.IsDir() {
		return os.MkdirAll(target, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE, 0o755)
	if err != nil {
		return err
	}
	return f.Close()
}

// openBox starts the machine whose own files are in root, made by plant.
func openBox(root string, mounts []Mount) (*box, error) {
	b := &box{jobs: make(chan func()), quit: make(chan struct{}), over: make(chan struct{})}
	// Whether the kernel has pid file descriptors is found out by starting a
	// process, once, and that one must not become the first of the box.
	if p, err := os.FindProcess(os.Getpid()); err == nil {
		_ = p.Release()
	}
	started := make(chan error)
	go b.run(root, mounts, started)
	if err := <-started; err != nil {
		<-b.over
		return nil, fmt.Errorf("make a sandbox: %w", err)
	}
	return b, nil
}

// run is the life of the thread. It is never unlocked, so it ends with the
// goroutine.
func (b *box) run(root string, mounts []Mount, started chan<- error) {
	runtime.LockOSThread()
	defer close(b.over)
	err := b.enter(root, mounts)
	started <- err
	if err != nil {
		return
	}
	for {
		select {
		case job := <-b.jobs:
			job()
		case <-b.quit:
			return
		}
	}
}

func (b *box) enter(root string, mounts []Mount) error {
	if err := syscall.Unshare(syscall.CLONE_NEWNS | syscall.CLONE_NEWPID); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	m := mounter{}
	m.mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	m.mount(root, root, "", syscall.MS_BIND, "")
	for _, name := range shown {
		if st, err := os.Lstat(name); err == nil && st.IsDir() {
			m.readOnly(name, root+name)
		}
	}
	for _, x := range mounts {
		m.readOnly(x.Source, filepath.Join(root, x.Target))
	}
	m.mount("tmpfs", root+"/dev", "tmpfs", syscall.MS_NOSUID, "mode=755,size=64k")
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		m.touch(root + "/dev/" + name)
		m.mount("/dev/"+name, root+"/dev/"+name, "", syscall.MS_BIND, "")
	}
	m.mkdir(root + "/dev/pts")
	m.mount("devpts", root+"/dev/pts", "devpts", syscall.MS_NOSUID|syscall.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
	for name, to := range map[string]string{"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		m.symlink(to, root+"/dev/"+name)
	}
	m.mkdir(root + "/dev/shm")
	m.chmod(root+"/dev/shm", 0o777|os.ModeSticky)
	if m.err != nil {
		return m.err
	}
	// The old root is put on top of the new one, and taken away.
	if err := errors.Join(syscall.Chdir(root), syscall.PivotRoot(".", "."), syscall.Unmount(".", syscall.MNT_DETACH), syscall.Chdir("/")); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return b.startInit()
}

// startInit starts the first process, which shows the processes of the box
// and then does nothing but be there. It ignores the ends of its children, so
// the kernel forgets them at once.
func (b *box) startInit() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	c := exec.Cmd{Path: "/bin/sh", Args: []string{"init", "-c", initScript}, Dir: "/", Env: []string{"PATH=" + systemPath}, Stdout: w, Stderr: w}
	// It goes with the thread, whatever ends this process.
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if err := errors.Join(c.Start(), w.Close()); err != nil {
		return fmt.Errorf("start the first process: %w", err)
	}
	b.init = c.Process
	// It lets go of the pipe when it is ready, or has failed and said why.
	if said, err := io.ReadAll(r); err != nil || len(said) > 0 {
		b.kill()
		return fmt.Errorf("start the first process: %w: %s", err, said)
	}
	return nil
}

const initScript = `mount -t proc -o nosuid,nodev,noexec proc /proc && trap '' CHLD && exec sleep infinity >/dev/null 2>&1`

func (b *box) kill() {
	_ = b.init.Kill()
	_, _ = b.init.Wait() // returns when nothing of the box runs any more
}

// do runs f on the thread of the box.
func (b *box) do(f func() error) error {
	result := make(chan error, 1)
	select {
	case b.jobs <- func() { result <- f() }:
		return <-result
	case <-b.over:
		return errClosed
	}
}

// close ends all that runs in the box.
func (b *box) close() {
	b.closing.Do(func() {
		b.kill()
		close(b.quit)
	})
	<-b.over
}

// all stops every process of the box but the first, at once: none can fork
// itself out of it. What a user of the box stopped before stays so when they
// continue.
func (b *box) all(sig string) error {
	script := stopScript
	if sig == "CONT" {
		script = contScript
	}
	var out, held bytes.Buffer
	c := exec.Cmd{Path: "/bin/sh", Args: []string{"sh", "-c", script, "sh", b.held}, Dir: "/", Env: []string{"PATH=" + systemPath}, Stdout: &held, Stderr: &out}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := b.do(c.Start); err != nil {
		return err
	}
	// There may be nobody to signal.
	if err := c.Wait(); err != nil && !strings.Contains(out.String(), "No such process") {
		return fmt.Errorf("signal all processes: %w: %s", err, out.String())
	}
	b.held = held.String()
	return nil
}

// stopScript says who is stopped already, and stops all others. contScript
// lets go on who is not among those.
const (
	stopScript = `for d in /proc/[0-9]*; do
  while read -r name state rest; do
    [ "$name" = State: ] && { [ "$state" = T ] && printf '%s ' "${d#/proc/}"; break; }
  done 2>/dev/null < "$d/status"
done
kill -STOP -1`
	contScript = `for d in /proc/[0-9]*; do
  p=${d#/proc/}
  case " $1" in *" $p "*) ;; *) [ "$p" = 1 ] || [ "$p" = $$ ] || kill -CONT "$p" 2>/dev/null;; esac
done
true`
)

// inside returns the pid that the process has in its box.
func inside(pid int) (int, error) {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			fields := strings.Fields(ids)
			return strconv.Atoi(fields[len(fields)-1])
		}
	}
	return 0, fmt.Errorf("process %d has no number in its namespace", pid)
}

// A mounter mounts until something fails.
type mounter struct{ err error }

func (m *mounter) try(what string, f func() error) {
	if m.err != nil {
		return
	}
	if err := f(); err != nil {
		m.err = fmt.Errorf("%s: %w", what, err)
	}
}

func (m *mounter) mount(source, target, kind string, flags uintptr, data string) {
	m.try("mount "+target, func() error { return syscall.Mount(source, target, kind, flags, data) })
}

func (m *mounter) readOnly(source, target string) {
	m.mount(source, target, "", syscall.MS_BIND|syscall.MS_REC, "")
	m.mount("", target, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY|syscall.MS_NOSUID, "")
}

func (m *mounter) touch(name string) {
	m.try("make "+name, func() error { return os.WriteFile(name, nil, 0o644) })
}

func (m *mounter) mkdir(name string) {
	m.try("make "+name, func() error { return os.Mkdir(name, 0o755) })
}

func (m *mounter) chmod(name string, mode os.FileMode) {
	m.try("change mode", func() error { return os.Chmod(name, mode) })
}

func (m *mounter) symlink(to, name string) {
	m.try("link "+name, func() error { return os.Symlink(to, name) })
}

// Supported returns nil when sandboxes can be made here, and why not
// otherwise.
func Supported() error {
	dir, err := os.MkdirTemp("", "e2btest-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := plant(dir, nil); err != nil {
		return err
	}
	b, err := openBox(dir, nil)
	if err != nil {
		return err
	}
	b.close()
	return nil
}

// copyTree copies a folder as it is, owners, links and times included. It is
// done also for a caller who has left: so does E2B.
func copyTree(from, to string) error {
	out, err := exec.CommandContext(context.Background(), "cp", "-a", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}
