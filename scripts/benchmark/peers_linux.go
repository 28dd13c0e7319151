package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// peers are all that this program knows of, whether or not they are here.
func peers(w *workshop) []engine {
	all := []engine{
		&bubblewrap{workshop: w, running: map[int]*bubble{}},
		&ociRuntime{workshop: w, program: "crun"},
		&ociRuntime{workshop: w, program: "runc"},
		&ociRuntime{workshop: w, program: "runsc"},
		&containers{workshop: w, program: "podman"},
		&containers{workshop: w, program: "docker"},
	}
	if w.engines == "" {
		return all
	}
	chosen := strings.Split(w.engines, ",")
	return slices.DeleteFunc(all, func(e engine) bool { return !slices.Contains(chosen, e.name()) })
}

// find looks a peer up on the PATH, and gVisor where this project's own tools
// are built to.
func find(program string) (string, error) {
	if p, err := exec.LookPath(program); err == nil {
		return filepath.Abs(p)
	}
	if found, _ := filepath.Glob(".tools/" + program + "-*/" + program); len(found) > 0 {
		return filepath.Abs(found[len(found)-1])
	}
	return "", errMissing("not installed")
}

// sleeper is what stands in a peer's sandbox between two commands. The mark
// lets its memory be found.
func (w *workshop) sleeper() []string {
	return []string{"/bin/sh", "-c", ": " + w.mark + "; while :; do /bin/sleep 3600; done"}
}

// bubblewrap has no way to a sandbox once it runs: nsenter(1) takes the part.
type bubblewrap struct {
	*workshop
	path string

	mu      sync.Mutex
	running map[int]*bubble
}

type bubble struct {
	cmd   *exec.Cmd
	child int
}

func (e *bubblewrap) name() string { return "bubblewrap" }

func (e *bubblewrap) open(ctx context.Context) (err error) {
	if e.path, err = find("bwrap"); err != nil {
		return err
	}
	if err := e.create(ctx, 9999); err != nil {
		return errors.Join(errMissing("does not work here: "+firstLine(err.Error())), e.destroy(ctx, 9999))
	}
	return e.destroy(ctx, 9999)
}

func (e *bubblewrap) create(_ context.Context, i int) error {
	o := e.newOverlay("bubblewrap", i)
	if err := o.mount(e.lower); err != nil {
		return err
	}
	infoRead, infoWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	defer infoRead.Close()
	args := []string{"--unshare-all", "--die-with-parent", "--info-fd", "3", "--ro-bind", "/usr", "/usr"}
	for _, l := range []string{"/bin", "/lib", "/lib64"} {
		if target, err := os.Readlink(l); err == nil {
			args = append(args, "--symlink", target, l)
		} else {
			args = append(args, "--ro-bind-try", l, l)
		}
	}
	args = append(args, "--ro-bind-try", "/etc/ssl", "/etc/ssl", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/home/agent",
		"--bind", o.merged(), "/workspace", "--chdir", "/workspace", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin",
		"/bin/sh", "-c", ": "+e.mark+"; /bin/true && echo ready; while :; do /bin/sleep 3600; done")
	cmd := exec.Command(e.path, args...) //nolint:noctx // it lives until destroy, or as long as we do
	cmd.ExtraFiles = []*os.File{infoWrite}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	said, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	err = cmd.Start()
	_ = infoWrite.Close()
	if err != nil {
		return err
	}
	b := &bubble{cmd: cmd}
	e.mu.Lock()
	e.running[i] = b
	e.mu.Unlock()
	if line, err := bufio.NewReader(said).ReadString('\n'); line != "ready\n" {
		return fmt.Errorf("bwrap said %q: %w", line, err)
	}
	info, err := io.ReadAll(infoRead)
	if err != nil {
		return err
	}
	var child struct {
		PID int `json:"child-pid"`
	}
	if err := json.Unmarshal(info, &child); err != nil {
		return err
	}
	b.child = child.PID
	return nil
}

func (e *bubblewrap) exec(ctx context.Context, i int) error {
	e.mu.Lock()
	b := e.running[i]
	e.mu.Unlock()
	return call(ctx, "nsenter", "-t", strconv.Itoa(b.child), "-a", "/usr/bin/true")
}

func (e *bubblewrap) destroy(_ context.Context, i int) error {
	e.mu.Lock()
	b := e.running[i]
	delete(e.running, i)
	e.mu.Unlock()
	if b != nil {
		// Bubblewrap dies last: with it gone, all is.
		_ = unix.Kill(b.child, unix.SIGKILL)
		if b.child == 0 {
			_ = b.cmd.Process.Kill()
		}
		_ = b.cmd.Wait()
	}
	return e.newOverlay("bubblewrap", i).remove()
}

func (e *bubblewrap) close(ctx context.Context) error {
	var errs []error
	for i := range e.running {
		errs = append(errs, e.destroy(ctx, i))
	}
	return errors.Join(append(errs, removeAll(filepath.Join(e.dir, "bubblewrap")))...)
}

// An ociRuntime is crun, runc or runsc, each told by the same bundle what to
// make. The runtime mounts the overlay where it can; runsc gets one that is
// mounted.
type ociRuntime struct {
	*workshop
	program string

	path   string
	config map[string]any
	hidden int // a mount namespace without cgroup v2; 0: the host's
	label  string

	mu   sync.Mutex
	live map[int]bool
}

func (e *ociRuntime) name() string {
	if e.label != "" {
		return e.label
	}
	return e.program
}

func (e *ociRuntime) root() string    { return filepath.Join(e.dir, e.program) }
func (e *ociRuntime) id(i int) string { return fmt.Sprintf("%s-%s-%04d", e.mark, e.program, i) }

// options come before the runtime's command.
func (e *ociRuntime) options() []string {
	o := []string{"--root", filepath.Join(e.root(), "run")}
	if e.program == "runsc" {
		o = append(o, "--network=none", "--platform=systrap", "--ignore-cgroups", "--overlay2=none", "--file-access-mounts=exclusive", "--host-settings=ignore")
	}
	return o
}

func (e *ociRuntime) call(ctx context.Context, args ...string) error {
	args = append(e.options(), args...)
	if e.hidden == 0 {
		return call(ctx, e.path, args...)
	}
	// What a thread starts is in the thread's mount namespace. The thread
	// ends with its goroutine: nobody else may get it.
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			failed <- os.NewSyscallError("unshare", err)
			return
		}
		if err := unix.Setns(e.hidden, unix.CLONE_NEWNS); err != nil {
			failed <- os.NewSyscallError("setns", err)
			return
		}
		failed <- call(ctx, e.path, args...)
	}()
	return <-failed
}

func (e *ociRuntime) open(ctx context.Context) (err error) {
	e.live = map[int]bool{}
	if e.path, err = find(e.program); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errMissing("is measured as root only")
	}
	if err := os.MkdirAll(filepath.Join(e.root(), "run"), 0o755); err != nil {
		return err
	}
	if err := e.makeConfig(); err != nil {
		return err
	}
	first := e.try(ctx)
	if first == nil || ctx.Err() != nil {
		return first
	}
	if e.program == "crun" {
		// Debian's refuses a host with both versions of cgroups.
		if e.hidden, err = withoutUnified(); err == nil {
			if err = e.try(ctx); err == nil {
				e.label = "crun, cgroup v2 hidden from it"
				return nil
			}
		}
	}
	return errMissing("does not work here: " + firstLine(first.Error()))
}

func (e *ociRuntime) try(ctx context.Context) error {
	err := e.create(ctx, 9999)
	return errors.Join(err, e.destroy(context.WithoutCancel(ctx), 9999))
}

// withoutUnified returns a copy of this mount namespace in which an empty
// folder hides cgroup v2.
func withoutUnified() (int, error) {
	type result struct {
		fd  int
		err error
	}
	made := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			made <- result{0, os.NewSyscallError("unshare", err)}
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			made <- result{0, os.NewSyscallError("make mounts private", err)}
			return
		}
		if err := unix.Mount("tmpfs", "/sys/fs/cgroup/unified", "tmpfs", 0, ""); err != nil {
			made <- result{0, os.NewSyscallError("hide cgroup v2", err)}
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		made <- result{fd, os.NewSyscallError("open namespace", err)}
	}()
	r := <-made
	return r.fd, r.err
}

// makeConfig has the runtime write its own default configuration and changes
// what makes it the same job as everybody else's.
func (e *ociRuntime) makeConfig() error {
	rootfs := filepath.Join(e.root(), "rootfs")
	for _, d := range []string{"usr", "etc", "etc/ssl", "proc", "dev", "sys", "tmp", "run", "workspace", "home/agent"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			return err
		}
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if target, err := os.Readlink("/" + l); err == nil {
			if err := os.Symlink(target, filepath.Join(rootfs, l)); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
	}
	spec := exec.Command(e.path, "spec") //nolint:noctx // writes a file
	spec.Dir = e.root()
	if out, err := spec.CombinedOutput(); err != nil {
		return errMissing(fmt.Sprintf("writes no configuration: %v: %s", err, firstLine(string(out))))
	}
	b, err := os.ReadFile(filepath.Join(e.root(), "config.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &e.config); err != nil {
		return err
	}
	process, _ := e.config["process"].(map[string]any)
	linux, _ := e.config["linux"].(map[string]any)
	if process == nil || linux == nil {
		return errMissing("its configuration is none we know")
	}
	process["args"], process["terminal"], process["cwd"] = e.sleeper(), false, "/workspace"
	delete(process, "rlimits") // may be above ours, which cannot be raised everywhere
	e.config["root"] = map[string]any{"path": rootfs, "readonly": true}
	delete(linux, "resources")
	return nil
}

func (e *ociRuntime) create(ctx context.Context, i int) error {
	o := e.newOverlay(e.program, i)
	workspace := map[string]any{"destination": "/workspace", "type": "overlay", "source": "overlay", "options": strings.Split(o.options(e.lower), ",")}
	if e.program == "runsc" {
		if err := o.mount(e.lower); err != nil {
			return err
		}
		workspace = map[string]any{"destination": "/workspace", "type": "bind", "source": o.merged(), "options": []string{"rbind", "rw"}}
	} else if err := o.make(); err != nil {
		return err
	}
	bind := func(path string) map[string]any {
		return map[string]any{"destination": path, "type": "bind", "source": path, "options": []string{"rbind", "ro"}}
	}
	config := map[string]any{}
	for k, v := range e.config {
		config[k] = v
	}
	mounts, _ := e.config["mounts"].([]any)
	config["mounts"] = append(slices.Clone(mounts), bind("/usr"), bind("/etc/ssl"),
		map[string]any{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}, map[string]any{"destination": "/home/agent", "type": "tmpfs", "source": "tmpfs"}, workspace)
	linux := map[string]any{}
	before, _ := e.config["linux"].(map[string]any)
	for k, v := range before {
		linux[k] = v
	}
	linux["cgroupsPath"] = "/" + e.id(i)
	config["linux"] = linux
	b, err := json.Marshal(config)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(o.dir, "config.json"), b, 0o644); err != nil {
		return err
	}
	e.mu.Lock()
	e.live[i] = true
	e.mu.Unlock()
	if err := e.call(ctx, "run", "--detach", "--bundle", o.dir, e.id(i)); err != nil {
		return err
	}
	return e.exec(ctx, i)
}

func (e *ociRuntime) exec(ctx context.Context, i int) error {
	return e.call(ctx, "exec", e.id(i), "/bin/true")
}

func (e *ociRuntime) pause(ctx context.Context, i int) error  { return e.call(ctx, "pause", e.id(i)) }
func (e *ociRuntime) resume(ctx context.Context, i int) error { return e.call(ctx, "resume", e.id(i)) }

func (e *ociRuntime) destroy(ctx context.Context, i int) error {
	e.mu.Lock()
	live := e.live[i]
	delete(e.live, i)
	e.mu.Unlock()
	var err error
	if live {
		err = e.call(ctx, "delete", "--force", e.id(i))
	}
	return errors.Join(err, e.newOverlay(e.program, i).remove())
}

func (e *ociRuntime) close(ctx context.Context) error {
	var errs []error
	for i := range e.live {
		errs = append(errs, e.destroy(ctx, i))
	}
	if e.hidden != 0 {
		_ = unix.Close(e.hidden)
	}
	return errors.Join(append(errs, removeAll(e.root()))...)
}

// containers is podman or docker.
type containers struct {
	*workshop
	program string

	path  string
	short string // a folder for podman, which takes no name longer than 50 characters
	mu    sync.Mutex
	live  map[int]bool
}

func (e *containers) name() string    { return e.program }
func (e *containers) root() string    { return filepath.Join(e.dir, e.program) }
func (e *containers) id(i int) string { return fmt.Sprintf("%s-%s-%04d", e.mark, e.program, i) }

// image is docker's. It is made of nothing but the folders that things are
// mounted on.
func (e *containers) image() string { return e.mark + ":bench" }

func (e *containers) call(ctx context.Context, args ...string) error {
	if e.program == "podman" {
		args = append([]string{"--root", e.root() + "/root", "--runroot", e.short, "--tmpdir", e.root() + "/tmp",
			"--cgroup-manager=cgroupfs", "--events-backend=none", "--runtime", "runc"}, args...)
	}
	return call(ctx, e.path, args...)
}

func (e *containers) open(ctx context.Context) (err error) {
	e.live = map[int]bool{}
	if e.path, err = find(e.program); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errMissing("is measured as root only")
	}
	if e.program == "docker" {
		soon, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if err := e.call(soon, "info"); err != nil {
			return errMissing("installed, but no daemon answers")
		}
	}
	if e.short, err = os.MkdirTemp("", "bench-"); err != nil {
		return err
	}
	if err := e.makeRoot(ctx); err != nil {
		return errMissing("does not work here: " + firstLine(err.Error()))
	}
	err = e.create(ctx, 9999)
	if err := errors.Join(err, e.destroy(context.WithoutCancel(ctx), 9999)); err != nil {
		return errMissing("does not work here: " + firstLine(err.Error()))
	}
	return nil
}

func (e *containers) makeRoot(ctx context.Context) error {
	rootfs := filepath.Join(e.root(), "rootfs")
	for _, d := range []string{"usr", "etc/ssl", "proc", "dev", "sys", "tmp", "run", "workspace", "home/agent"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			return err
		}
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		if target, err := os.Readlink("/" + l); err == nil {
			if err := os.Symlink(target, filepath.Join(rootfs, l)); err != nil && !errors.Is(err, os.ErrExist) {
				return err
			}
		}
	}
	if e.program != "docker" {
		return nil
	}
	tar := filepath.Join(e.root(), "rootfs.tar")
	if err := call(ctx, "tar", "-C", rootfs, "-cf", tar, "."); err != nil {
		return err
	}
	return e.call(ctx, "import", tar, e.image())
}

func (e *containers) create(ctx context.Context, i int) error {
	e.mu.Lock()
	e.live[i] = true
	e.mu.Unlock()
	args := []string{"run", "--detach", "--name", e.id(i), "--network", "none", "--volume", "/usr:/usr:ro", "--volume", "/etc/ssl:/etc/ssl:ro", "--workdir", "/workspace"}
	if e.program == "podman" {
		args = append(args, "--ulimit", "nofile=1024:20000", "--ulimit", "nproc=1000:1000", "--volume", e.lower+":/workspace:O", "--rootfs", e.root()+"/rootfs:O")
	} else {
		o := e.newOverlay(e.program, i)
		if err := o.mount(e.lower); err != nil {
			return err
		}
		args = append(args, "--volume", o.merged()+":/workspace", e.image())
	}
	if err := e.call(ctx, append(args, e.sleeper()...)...); err != nil {
		return err
	}
	return e.exec(ctx, i)
}

func (e *containers) exec(ctx context.Context, i int) error {
	return e.call(ctx, "exec", e.id(i), "/bin/true")
}

func (e *containers) pause(ctx context.Context, i int) error  { return e.call(ctx, "pause", e.id(i)) }
func (e *containers) resume(ctx context.Context, i int) error { return e.call(ctx, "unpause", e.id(i)) }

func (e *containers) destroy(ctx context.Context, i int) error {
	e.mu.Lock()
	live := e.live[i]
	delete(e.live, i)
	e.mu.Unlock()
	var err error
	if live {
		if e.program == "podman" {
			err = e.call(ctx, "rm", "--force", "--time", "0", e.id(i))
		} else {
			err = e.call(ctx, "rm", "--force", "--volumes", e.id(i))
		}
	}
	return errors.Join(err, e.newOverlay(e.program, i).remove())
}

func (e *containers) close(ctx context.Context) error {
	var errs []error
	for i := range e.live {
		errs = append(errs, e.destroy(ctx, i))
	}
	if e.program == "docker" && e.path != "" {
		_ = e.call(ctx, "rmi", "--force", e.image()) // there may be none
	}
	if e.short != "" {
		errs = append(errs, removeAll(e.short))
	}
	return errors.Join(append(errs, removeAll(e.root()))...)
}
