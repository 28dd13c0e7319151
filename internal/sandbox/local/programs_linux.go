package local

import (
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/launch"
)

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
			_ = in.answer(answer{Ended: &ended{ID: id, Exit: launch.ExitOf(status)}})
		}
	}
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
	env := launch.Environment(o.Cmd.Env)
	file, err := launch.Find(args[0], dir, env)
	if err == nil {
		attr := &syscall.ProcAttr{Dir: dir, Env: env, Files: files, Sys: sys}
		if in.id.Root {
			attr.Sys.Credential = &syscall.Credential{Uid: agentID, Gid: agentID}
		}
		err = in.programs.start(o.ID, file, args, attr)
	}
	if err != nil {
		return launch.Refusal(op, args[0], err)
	}
	return sandbox.Exit{}, "", nil
}

// start forks under the lock that the reaper needs.
func (p *programs) start(id, file string, args []string, attr *syscall.ProcAttr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.setAdj(min(p.own+victimAdj, 1000)); err != nil {
		return err
	}
	pid, err := syscall.ForkExec(file, args, attr)
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
