package fake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

var _ sandbox.Process = (*process)(nil)

// mark is in the environment of every process of a sandbox, with the sandbox's
// folder. It is how those are found that left their group.
const mark = "SANDBOX_FAKE"

// A process is a process of this host.
type process struct {
	b    *box
	id   string
	pid  int           // 0: the program could not be run
	done chan struct{} // closed when it has ended
	exit sandbox.Exit  // read after done

	mu    sync.Mutex
	ended bool
}

// Start starts a process in a session of its own.
func (b *box) Start(_ context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
	const op = "fake: start process"
	if !sandbox.ValidID(id) {
		return nil, fault.New(op, fault.Invalid, "%q is not an id of a process", id)
	}
	if len(cmd.Args) == 0 {
		return nil, fault.New(op, fault.Invalid, "the command is empty")
	}
	stdin, err := os.Open(os.DevNull)
	if cmd.Stdin != "" && err == nil {
		_ = stdin.Close()
		stdin, err = b.openRegular(op, cmd.Stdin)
		if fault.KindOf(err) == fault.NotFound && b.Health(context.Background()) == nil {
			err = fault.New(op, fault.Invalid, "standard input: %w", err)
		}
	}
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.processes[id]; p != nil {
		return p, nil
	}
	if err := b.usable(op); err != nil {
		return nil, err
	}
	p := &process{b: b, id: id, done: make(chan struct{})}
	if err := p.run(op, cmd, stdin); err != nil {
		return nil, err
	}
	b.processes[id] = p
	return p, nil
}

func (p *process) output(stream sandbox.Stream) string {
	return filepath.Join(p.b.dir, "output", p.id+"."+string(stream))
}

func (p *process) run(op string, cmd sandbox.Cmd, stdin *os.File) error {
	c, err := p.b.command(op, cmd)
	if err != nil {
		return err
	}
	var outputs [2]*os.File
	for i, stream := range []sandbox.Stream{sandbox.Stdout, sandbox.Stderr} {
		f, err := os.OpenFile(p.output(stream), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
		if err != nil {
			return fault.Wrap(op, err)
		}
		defer f.Close()
		outputs[i] = f
	}
	c.Stdin, c.Stdout, c.Stderr = stdin, outputs[0], outputs[1]
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	exit, err := launch(op, c, outputs[1])
	if err != nil {
		return err
	}
	if exit.Code != 0 {
		p.end(exit)
		return nil
	}
	p.pid = c.Process.Pid
	go func() {
		_ = c.Wait() // how it ended stands in the state
		p.end(exitOf(c.ProcessState))
	}()
	return nil
}

// command translates cmd. The program is looked up by launch.
func (b *box) command(op string, cmd sandbox.Cmd) (*exec.Cmd, error) {
	dir := b.host(sandbox.Workspace)
	if cmd.Dir != "" {
		dir = b.host(cmd.Dir)
		if st, err := os.Stat(dir); !path.IsAbs(cmd.Dir) || err != nil || !st.IsDir() {
			return nil, fault.New(op, fault.Invalid, "%q is not a folder", cmd.Dir)
		}
	}
	env := []string{
		"PATH=" + b.host(sandbox.ProgramDir) + systemPath, "HOME=" + b.host(sandbox.Home), "TMPDIR=" + b.host("/tmp"),
		"USER=agent", "LOGNAME=agent", "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=dumb", mark + "=" + b.dir,
	}
	for _, kv := range cmd.Env {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" || strings.ContainsRune(kv, 0) {
			return nil, fault.New(op, fault.Invalid, "%q in the environment is not K=V", kv)
		}
		env = append(env, k+"="+b.translate(v))
	}
	args := make([]string, len(cmd.Args))
	for i, a := range cmd.Args {
		args[i] = b.translate(a)
	}
	c := &exec.Cmd{Args: args, Env: env, Dir: dir}
	c.Path, c.Err = lookPath(args[0], dir, b.host(sandbox.ProgramDir)+systemPath)
	return c, nil
}

// systemPath is what follows the sandbox's own programs on its PATH.
const systemPath = ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"

// launch starts c. One that cannot be run is no error but an exit code, and a
// word on stderr.
func launch(op string, c *exec.Cmd, stderr io.Writer) (sandbox.Exit, error) {
	code, why := 0, ""
	err := c.Start()
	switch {
	case err == nil:
		return sandbox.Exit{}, nil
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		code, why = 127, "command not found"
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.ENOEXEC):
		code, why = 126, "cannot be run"
	default:
		return sandbox.Exit{}, fault.New(op, fault.Invalid, "%w", err)
	}
	_, err = fmt.Fprintf(stderr, "sandbox: %s: %s\n", c.Args[0], why)
	return sandbox.Exit{Code: code}, err
}

func (p *process) end(exit sandbox.Exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.exit, p.ended = exit, true
	close(p.done)
}

// names are the signals that end a process in tests.
var names = map[syscall.Signal]string{
	syscall.SIGHUP: "HUP", syscall.SIGINT: "INT", syscall.SIGQUIT: "QUIT", syscall.SIGILL: "ILL", syscall.SIGABRT: "ABRT", syscall.SIGFPE: "FPE",
	syscall.SIGKILL: "KILL", syscall.SIGSEGV: "SEGV", syscall.SIGPIPE: "PIPE", syscall.SIGALRM: "ALRM", syscall.SIGTERM: "TERM",
}

func exitOf(s *os.ProcessState) sandbox.Exit {
	status, ok := s.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return sandbox.Exit{Code: s.ExitCode()}
	}
	name := names[status.Signal()]
	if name == "" {
		name = strconv.Itoa(int(status.Signal()))
	}
	return sandbox.Exit{Code: 128 + int(status.Signal()), Signal: name}
}

// lookPath finds a program in search, or from dir when the name has a slash.
func lookPath(name, dir, search string) (string, error) {
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	found := error(os.ErrNotExist)
	for _, d := range filepath.SplitList(search) {
		p := filepath.Join(d, name)
		err := executable(p)
		if name != "" && err == nil {
			return p, nil
		}
		if errors.Is(err, os.ErrPermission) {
			found = err
		}
	}
	return "", found
}

func executable(p string) error {
	st, err := os.Stat(p)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return os.ErrPermission
	}
	return nil
}

// Process looks in memory.
func (b *box) Process(_ context.Context, id string) (sandbox.Process, error) {
	const op = "fake: find process"
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.processes[id]; p != nil {
		return p, nil
	}
	return nil, fault.New(op, fault.NotFound, "no process %q was started", id)
}

// ReadAt reads the file that the process writes to.
func (p *process) ReadAt(_ context.Context, stream sandbox.Stream, b []byte, offset int64) (int, error) {
	const op = "fake: read output"
	if (stream != sandbox.Stdout && stream != sandbox.Stderr) || offset < 0 {
		return 0, fault.New(op, fault.Invalid, "stream %q from byte %d", stream, offset)
	}
	f, err := os.Open(p.output(stream))
	if err != nil {
		return 0, pathFault(op, err)
	}
	defer f.Close()
	n, err := f.ReadAt(b, offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, fault.Wrap(op, err)
	}
	return n, err
}

// Exit looks whether the process has ended.
func (p *process) Exit(context.Context) (sandbox.Exit, bool, error) {
	select {
	case <-p.done:
		return p.exit, true, nil
	default:
		return sandbox.Exit{}, false, nil
	}
}

// Wait waits for the end of the process.
func (p *process) Wait(ctx context.Context) (sandbox.Exit, error) {
	select {
	case <-p.done:
		return p.exit, nil
	case <-ctx.Done():
		return sandbox.Exit{}, fault.New("fake: wait for process", fault.Cancelled, "%w", context.Cause(ctx))
	}
}

// Signal signals the group of the process.
func (p *process) Signal(_ context.Context, sig sandbox.Signal) error {
	const op = "fake: signal process"
	numbers := map[sandbox.Signal]syscall.Signal{sandbox.Interrupt: syscall.SIGINT, sandbox.Terminate: syscall.SIGTERM, sandbox.Kill: syscall.SIGKILL}
	n, ok := numbers[sig]
	if !ok {
		return fault.New(op, fault.Invalid, "%q is no signal that can be sent", sig)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return nil // its number may be another's now
	}
	if err := syscall.Kill(-p.pid, n); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fault.Wrap(op, err)
	}
	return nil
}

// kill returns when no process of the sandbox lives. Where there is no /proc,
// those that left their group are not found.
func (b *box) kill(ctx context.Context) error {
	b.mu.Lock()
	var running []*process
	for _, p := range b.processes {
		running = append(running, p)
	}
	b.mu.Unlock()
	for _, p := range running {
		if err := p.Signal(ctx, sandbox.Kill); err != nil {
			return err
		}
		select {
		case <-p.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for step := time.Millisecond; ; step = min(2*step, 50*time.Millisecond) {
		alive := b.marked()
		if len(alive) == 0 {
			return nil
		}
		for _, pid := range alive {
			_ = syscall.Kill(pid, syscall.SIGKILL) // an error: it is gone
		}
		select {
		case <-time.After(step):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// marked finds the processes that carry the sandbox's mark.
func (b *box) marked() (pids []int) {
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil
	}
	want := []byte(mark + "=" + b.dir)
	for _, name := range files {
		env, err := os.ReadFile(name)
		if err != nil {
			continue // another's, or gone
		}
		for kv := range bytes.SplitSeq(env, []byte{0}) {
			if bytes.Equal(kv, want) {
				pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
				if err == nil {
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}
