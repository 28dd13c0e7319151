package local

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// searchPath is PATH in a sandbox.
const searchPath = sandbox.ProgramDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// goBin is where the Go installer puts what everybody expects to find.
const goBin = "/usr/local/go/bin"

// Exit codes of a program that could not be run, as a shell gives them.
const (
	exitNotFound = 127
	exitNoExec   = 126
)

// environment is what every process gets.
func environment() []string {
	p := searchPath
	if st, err := os.Stat(goBin); err == nil && st.IsDir() {
		p += ":" + goBin
	}
	return []string{"PATH=" + p, "HOME=" + sandbox.Home, "USER=agent", "LOGNAME=agent", "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=dumb"}
}

// mergeEnv returns base with extra added; of two values the later one holds.
func mergeEnv(base []string, extra [][]byte) []string {
	env := make([]string, 0, len(base)+len(extra))
	at := map[string]int{}
	add := func(kv string) {
		k, _, _ := strings.Cut(kv, "=")
		if i, ok := at[k]; ok {
			env[i] = kv
			return
		}
		at[k] = len(env)
		env = append(env, kv)
	}
	for _, kv := range base {
		add(kv)
	}
	for _, kv := range extra {
		add(string(kv))
	}
	return env
}

// A programs is what init has started.
type programs struct {
	mu   sync.Mutex     // held while one is started, so that none is reaped before it is known
	ids  map[int]string // pid to id, of those that run
	pids map[string]int // id to pid, also of those that ended: their group may live
	born chan struct{}  // wakes a reaper that had nobody to wait for

	limits sandbox.Limits

	adj *os.File // init's own oom_score_adj
	own int      // what stands in it
}

// run starts the reaper.
func (p *programs) run(in *initProcess) {
	p.ids, p.pids, p.born = map[int]string{}, map[string]int{}, make(chan struct{}, 1)
	go func() {
		for {
			// Looks without taking, so that a pid is not free for the next
			// process before the lock is held.
			err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT, nil)
			switch {
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.ECHILD):
				<-p.born
			case err == nil:
				p.reap(in)
			default:
				return
			}
		}
	}()
}

// reap takes everybody who is dead, our programs and orphans alike.
func (p *programs) reap(in *initProcess) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if id, ok := p.ids[pid]; ok {
			delete(p.ids, pid)
			if !sandbox.ValidID(id) {
				delete(p.pids, id) // a terminal's: it is hung up already
			}
			// When nobody hears it there is no supervisor either.
			_ = in.answer(answer{Ended: &ended{ID: id, Exit: exitOf(status)}})
		}
	}
}

func exitOf(status unix.WaitStatus) sandbox.Exit {
	if !status.Signaled() {
		return sandbox.Exit{Code: status.ExitStatus()}
	}
	name := strings.TrimPrefix(unix.SignalName(status.Signal()), "SIG")
	if name == "" {
		name = fmt.Sprint(int(status.Signal()))
	}
	return sandbox.Exit{Code: 128 + int(status.Signal()), Signal: name}
}

// signal reaches the group of the program, also after its first process has
// ended, unless the number has passed to a program of ours started later.
func (p *programs) signal(id string, sig unix.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pid, ok := p.pids[id]; ok {
		_ = unix.Kill(-pid, sig) // nobody left is no error
	}
}

// start runs the program as the agent, in a session of its own. A program
// that cannot be run is no error but an exit code and a note.
func (in *initProcess) start(o order, files []*os.File) (sandbox.Exit, string, error) {
	const op = "start"
	if o.Cmd == nil || len(o.Cmd.Args) == 0 || len(files) != 2 {
		return sandbox.Exit{}, "", fault.New(op, fault.Invalid, "the order is incomplete")
	}
	if err := checkDir(op, string(o.Cmd.Dir)); err != nil {
		return sandbox.Exit{}, "", err
	}
	var stdin *os.File
	var err error
	if len(o.Cmd.Stdin) > 0 {
		stdin, err = openRegular(string(o.Cmd.Stdin))
	} else {
		stdin, err = os.Open(os.DevNull)
	}
	if err != nil {
		return sandbox.Exit{}, "", fault.New(op, fault.Invalid, "standard input: %w", err)
	}
	defer stdin.Close()
	return in.execute(op, o, []uintptr{stdin.Fd(), files[0].Fd(), files[1].Fd()}, &syscall.SysProcAttr{Setsid: true})
}

func checkDir(op, dir string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fault.New(op, fault.Invalid, "folder %q: %w", dir, err)
	}
	return unix.Close(fd)
}

// execute runs the program of o as the agent.
func (in *initProcess) execute(op string, o order, files []uintptr, sys *syscall.SysProcAttr) (sandbox.Exit, string, error) {
	dir := string(o.Cmd.Dir)
	args := make([]string, len(o.Cmd.Args))
	for i, a := range o.Cmd.Args {
		args[i] = string(a)
	}
	env := mergeEnv(environment(), o.Cmd.Env)
	program, err := lookPath(args[0], dir, env)
	if err == nil {
		attr := &syscall.ProcAttr{Dir: dir, Env: env, Files: files, Sys: sys}
		if in.id.Root {
			attr.Sys.Credential = &syscall.Credential{Uid: agentID, Gid: agentID}
		}
		err = in.programs.start(o.ID, program, args, attr)
	}
	switch {
	case err == nil:
		return sandbox.Exit{}, "", nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return sandbox.Exit{Code: exitNotFound}, fmt.Sprintf("sandbox: %s: command not found\n", cut(args[0])), nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP):
		return sandbox.Exit{Code: exitNoExec}, fmt.Sprintf("sandbox: %s: %v\n", cut(args[0]), err), nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return sandbox.Exit{}, "", fault.New(op, fault.Unavailable, "%w", err)
	}
	return sandbox.Exit{}, "", fault.New(op, fault.Invalid, "%w", err)
}

// start forks under the lock that the reaper needs.
func (p *programs) start(id, program string, args []string, attr *syscall.ProcAttr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.setAdj(min(p.own+victimAdj, 1000)); err != nil {
		return err
	}
	pid, err := syscall.ForkExec(program, args, attr)
	_ = p.setAdj(p.own) // what it was before it can be again
	if err != nil {
		return err
	}
	if attr.Sys.Credential == nil {
		limitProgram(pid, p.limits)
	}
	// The kernel gives a number again only when no process and no group has
	// it: whoever had it before is gone, with the whole group.
	for other, old := range p.pids {
		if old == pid {
			delete(p.pids, other)
		}
	}
	p.ids[pid], p.pids[id] = id, pid
	select {
	case p.born <- struct{}{}:
	default:
	}
	return nil
}

// lookPath finds a program the way a shell does, as the agent. A name with a
// slash is looked up from dir.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		return name, executable(name)
	}
	var search string
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			search = v
		}
	}
	found := error(unix.ENOENT)
	for _, d := range strings.Split(search, ":") {
		if name == "" || !path.IsAbs(d) {
			continue
		}
		p := path.Join(d, name)
		err := executable(p)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, unix.EACCES) {
			found = err // as a shell: the best reason is kept
		}
	}
	return "", found
}

func executable(p string) error {
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EACCES
	}
	return unix.Faccessat2(unix.AT_FDCWD, p, unix.X_OK, unix.AT_EACCESS)
}

// victimAdj is how much sooner than init the kernel kills a program for want
// of memory: as if it used half of what there is. Nobody needs a privilege to
// offer himself, and a program can take it back as far as init's own, where
// its size decides.
const victimAdj = 500

// victims makes what is started from now on be killed before init. The file
// is opened while init still may: without privileges, and not dumpable, it
// could not be.
func (p *programs) victims() error {
	f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	var buf [16]byte
	n, err := f.Read(buf[:])
	if err == nil || errors.Is(err, io.EOF) {
		p.own, err = strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	p.adj = f
	return nil
}

// setAdj sets init's own, which its next child inherits.
func (p *programs) setAdj(to int) error {
	_, err := p.adj.WriteAt([]byte(strconv.Itoa(to)), 0)
	return err
}
