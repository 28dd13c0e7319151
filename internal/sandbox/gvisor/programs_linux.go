package gvisor

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/launch"
)

// A program is one that init has started under an id.
type program struct {
	known chan struct{} // closed when it was started, or not
	err   error         // why not; read after known
	outs  map[sandbox.Stream]*output
	pid   int           // of the process, and of its group
	done  chan struct{} // closed when it has ended
	exit  sandbox.Exit  // read after done
	limit sandbox.Limit // guarded by programs.mu: what it is being ended for
}

// A programs is what init has started.
type programs struct {
	mu   sync.Mutex // held while one is started, so that none is reaped before it is known
	byID map[string]*program
	ids  map[int]*program // by pid, of those that run
	born chan struct{}    // wakes a reaper that had nobody to wait for
}

// reap waits for the dead, our programs and orphans alike. It blocks in the
// kernel: an init that looked now and then would cost more than most agents.
func (p *programs) reap() {
	for {
		// Looks without taking, so that a pid is not free for the next
		// process before the lock is held.
		err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD):
			<-p.born
		case err == nil:
			p.take()
		default:
			panic(err) // PID 1 that cannot wait is none
		}
	}
}

func (p *programs) take() {
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
		if g, ok := p.ids[pid]; ok {
			delete(p.ids, pid)
			exit := launch.ExitOf(status)
			if g.limit != "" && exit.Code != 0 {
				exit = sandbox.Exit{Code: 128 + int(unix.SIGKILL), Signal: string(sandbox.Kill), Limit: g.limit}
			}
			g.end(exit)
		}
	}
}

// end says how the program ended, when what it wrote is in the files.
func (g *program) end(exit sandbox.Exit) {
	for _, o := range g.outs {
		o.drain()
	}
	g.exit = exit
	close(g.done)
}

// find returns the program that was started under id.
func (p *programs) find(id string) (*program, error) {
	p.mu.Lock()
	g := p.byID[id]
	p.mu.Unlock()
	if g != nil {
		<-g.known
	}
	if g == nil || g.err != nil {
		return nil, fault.New("find process", fault.NotFound, "no process %q was started", cut(id))
	}
	return g, nil
}

// signals are those of the contract.
var signals = map[string]unix.Signal{
	string(sandbox.Interrupt): unix.SIGINT, string(sandbox.Terminate): unix.SIGTERM, string(sandbox.Kill): unix.SIGKILL,
}

// signal reaches the group of the program, also after its first process has
// ended, unless the number has passed to a program of ours started later.
func (p *programs) signal(id, name string) error {
	sig, ok := signals[name]
	if !ok {
		return fault.New("signal", fault.Invalid, "%q is no signal that can be sent", cut(name))
	}
	g, err := p.find(id)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.pid > 0 {
		_ = unix.Kill(-g.pid, sig) // nobody left is no error
	}
	return nil
}

// start starts a process, unless there was one under the id. Whoever comes
// second while it starts learns the same.
func (in *initProcess) start(q request) error {
	const op = "start process"
	if err := checkStart(op, q); err != nil {
		return err
	}
	p := &in.programs
	p.mu.Lock()
	g := p.byID[q.ID]
	if g != nil {
		p.mu.Unlock()
		<-g.known
		return g.err
	}
	g = &program{known: make(chan struct{}), done: make(chan struct{}), outs: map[sandbox.Stream]*output{}}
	p.byID[q.ID] = g
	p.mu.Unlock()
	defer close(g.known)
	if g.err = in.run(g, q); g.err != nil {
		for _, o := range g.outs {
			_ = o.file.Close() // nobody reads it any more
		}
		p.mu.Lock()
		delete(p.byID, q.ID)
		p.mu.Unlock()
	}
	return g.err
}

// run runs the program as the agent, in a session of its own, with files for
// what it writes. One that cannot be run is no error but an exit code, and a
// note on its stderr.
func (in *initProcess) run(g *program, q request) error {
	const op = "start process"
	var stdin *os.File
	err := in.hand.do(func() (err error) {
		if len(q.Cmd.Stdin) > 0 {
			stdin, err = openRegular(string(q.Cmd.Stdin))
		} else {
			stdin, err = os.Open(os.DevNull)
		}
		if err != nil {
			return fault.New(op, fault.Invalid, "standard input: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	defer stdin.Close()
	var pipes []*os.File
	defer func() {
		for _, f := range pipes {
			_ = f.Close()
		}
	}()
	for _, stream := range []sandbox.Stream{sandbox.Stdout, sandbox.Stderr} {
		out, pipe, err := newOutput(filepath.Join(insideOutput, "p-"+q.ID+"."+string(stream)))
		if err != nil {
			return fault.New(op, fault.Unavailable, "%w", err)
		}
		g.outs[stream], pipes = out, append(pipes, pipe)
	}
	exit, note, err := in.execute(g, q, []uintptr{stdin.Fd(), pipes[0].Fd(), pipes[1].Fd()}, false)
	if err != nil || exit.Code == 0 {
		return err
	}
	if _, err := pipes[1].WriteString(note); err != nil {
		return err
	}
	g.end(exit)
	return nil
}

// execute starts the program as the agent, in a session of its own, with the
// files as its first descriptors; with terminal, they are the session's. When
// it cannot be run, exit and note say why.
func (in *initProcess) execute(g *program, q request, files []uintptr, terminal bool) (exit sandbox.Exit, note string, err error) {
	const op = "start process"
	var file string
	dir, env := string(q.Cmd.Dir), launch.Environment(q.Cmd.Env)
	args := make([]string, len(q.Cmd.Args))
	for i, a := range q.Cmd.Args {
		args[i] = string(a)
	}
	var missing error
	err = in.hand.do(func() error {
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			return fault.New(op, fault.Invalid, "folder %q: %w", dir, errors.Join(err, unix.ENOTDIR))
		}
		file, missing = launch.Find(args[0], dir, env)
		return nil
	})
	if err != nil {
		return exit, "", err
	}
	if err = missing; err == nil {
		err = in.programs.exec(g, file, args, &syscall.ProcAttr{
			Dir: dir, Env: env, Files: files,
			Sys: &syscall.SysProcAttr{Setsid: true, Setctty: terminal, Credential: credential()},
		})
	}
	if err != nil {
		return launch.Refusal(op, args[0], err)
	}
	return sandbox.Exit{}, "", nil
}

// exec forks under the lock that the reaper needs.
func (p *programs) exec(g *program, file string, args []string, attr *syscall.ProcAttr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	pid, err := syscall.ForkExec(file, args, attr)
	if err != nil {
		return err
	}
	// The kernel gives a number again only when no process and no group has
	// it: whoever had it before is gone, with the whole group.
	for _, other := range p.byID {
		if other.pid == pid {
			other.pid = 0
		}
	}
	g.pid, p.ids[pid] = pid, g
	select {
	case p.born <- struct{}{}:
	default:
	}
	return nil
}

// look says how a process ended. For opWait it first waits until it has, or
// until nobody waits for it any more.
func (in *initProcess) look(q request, r *response, s *stream) error {
	g, err := in.programs.find(q.ID)
	if err != nil {
		return err
	}
	if q.Op == opWait {
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			_, _ = s.Read(make([]byte, 1))
		}()
		select {
		case <-g.done:
		case <-gone:
		}
	}
	select {
	case <-g.done:
		r.Exit = &g.exit
	default:
	}
	return nil
}

// output reads what a process has written.
func (in *initProcess) output(q request, r *response, s *stream) (func(bool), error) {
	const op = "read output"
	g, err := in.programs.find(q.ID)
	if err != nil {
		return nil, err
	}
	o := g.outs[q.Stream]
	if o == nil || q.Offset < 0 || q.Size < 0 || q.Size > maxChunk {
		return nil, fault.New(op, fault.Invalid, "stream %q, %d bytes from %d", cut(string(q.Stream)), q.Size, q.Offset)
	}
	buf := make([]byte, q.Size)
	n, err := o.file.ReadAt(buf, q.Offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fault.Wrap(op, err)
	}
	r.Size = n
	return func(ok bool) {
		if ok {
			_, _ = s.Write(buf[:n]) // an error: nobody reads it
		}
	}, nil
}

// maxOutput bounds what is kept of one stream of a process. What it writes
// beyond that is taken from it and dropped, so that it neither fills the disk
// nor stops.
const maxOutput = 1 << 30

// An output carries what a program writes into the file of its stream. The
// program has a pipe and not the file: with the file it could, by opening
// /dev/stdout again, truncate what workers read.
type output struct {
	file *os.File
	pipe *os.File // the end that is read
	raw  syscall.RawConn

	mu     sync.Mutex
	buf    []byte
	kept   int64
	err    error // why nothing more is kept
	closed bool
}

// newOutput makes the file and returns the end of the pipe that the program
// writes to. It ends when all have closed their end.
func newOutput(name string) (*output, *os.File, error) {
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, nil, err
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	write := os.NewFile(uintptr(fds[1]), "output")
	err = unix.SetNonblock(fds[0], true) // the other end, a description of its own, stays as programs expect it
	read := os.NewFile(uintptr(fds[0]), "output")
	var raw syscall.RawConn
	if err == nil {
		err = unix.Fchown(fds[1], agentID, agentID) // it may open it again
	}
	if err == nil {
		raw, err = read.SyscallConn()
	}
	if err != nil {
		return nil, nil, errors.Join(err, read.Close(), write.Close(), file.Close())
	}
	o := &output{file: file, pipe: read, raw: raw, buf: make([]byte, 32<<10)}
	go o.run()
	return o, write, nil
}

// run carries until the last writer is gone.
func (o *output) run() {
	_ = o.raw.Read(func(fd uintptr) bool { return o.carry(int(fd), 1<<62) }) // it ends with the pipe
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	// Not under the lock: it waits for a drain that is at the pipe, which may
	// be waiting for the lock.
	_ = o.pipe.Close()
}

// drain returns when what was written before the call is in the file.
func (o *output) drain() {
	const pipeSize = 64 << 10                                                            // of gVisor's pipes
	_ = o.raw.Control(func(fd uintptr) { o.carry(int(fd), pipeSize+int64(len(o.buf))) }) // an error: everything was carried
}

// carry moves at most limit bytes and reports whether the last writer is gone.
func (o *output) carry(fd int, limit int64) (over bool) {
	for limit > 0 {
		// One piece at a time under the lock: a program that never stops
		// writing must not keep drain out.
		n, err := o.piece(fd)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil || n == 0:
			return true
		}
		limit -= int64(max(n, 0))
	}
	return false
}

func (o *output) piece(fd int) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return 0, nil
	}
	n, err := unix.Read(fd, o.buf)
	if n > 0 && o.err == nil {
		if part := o.buf[:min(int64(n), maxOutput-o.kept)]; len(part) > 0 {
			_, o.err = o.file.WriteAt(part, o.kept) // a full disk: the program goes on, its words are lost
			o.kept += int64(len(part))
		}
	}
	return n, err
}
