package local

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A process is one that the supervisor had init start.
type process struct {
	outs  []*output     // set before it is started; the supervisor's lock guards it
	known chan struct{} // closed when it was started, or not
	err   error         // why not; read after known
	done  chan struct{} // closed when it has ended
	exit  sandbox.Exit  // read after done
	told  bool          // that it has ended; the supervisor's lock guards it
	limit sandbox.Limit // it is being ended because of; the supervisor's lock guards it
}

// outputName is the file of a stream, below the sandbox's folder. It is not
// there before the first byte.
func outputName(id string, stream sandbox.Stream) string {
	return "p-" + id + "." + string(stream)
}

// start starts a process, unless there was one under the id. Whoever comes
// second while it starts learns the same.
func (s *supervisor) start(q request) error {
	const op = "start process"
	if err := checkCommand(op, q.ID, q.Cmd); err != nil {
		return err
	}
	s.lockWhenSettled()
	p := s.processes[q.ID]
	if p != nil {
		s.mu.Unlock()
		<-p.known
		return p.err
	}
	p = &process{known: make(chan struct{}), done: make(chan struct{})}
	s.processes[q.ID] = p
	s.mu.Unlock()
	defer close(p.known)
	if p.err = s.run(p, q); p.err != nil {
		s.mu.Lock()
		delete(s.processes, q.ID)
		s.mu.Unlock()
	}
	return p.err
}

func checkCommand(op, id string, c *command) error {
	if !sandbox.ValidID(id) {
		return fault.New(op, fault.Invalid, "%q is not an id of a process", cut(id))
	}
	if c == nil || len(c.Args) == 0 {
		return fault.New(op, fault.Invalid, "the command is empty")
	}
	for _, list := range [][][]byte{c.Args, c.Env} {
		for _, s := range list {
			if strings.IndexByte(string(s), 0) >= 0 {
				return fault.New(op, fault.Invalid, "arguments and environment cannot hold a zero byte")
			}
		}
	}
	for _, kv := range c.Env {
		if i := strings.IndexByte(string(kv), '='); i <= 0 {
			return fault.New(op, fault.Invalid, "%q in the environment is not K=V", cut(string(kv)))
		}
	}
	if !cleanAbsolute(string(c.Dir)) {
		return fault.New(op, fault.Invalid, "folder %q is not a clean absolute path", cut(string(c.Dir)))
	}
	if len(c.Stdin) > 0 && !cleanAbsolute(string(c.Stdin)) {
		return fault.New(op, fault.Invalid, "standard input %q is not a clean absolute path", cut(string(c.Stdin)))
	}
	return nil
}

// run makes the outputs of p and has init start the program on them.
func (s *supervisor) run(p *process, q request) error {
	const op = "start process"
	var pipes []*os.File
	defer func() { closeAll(pipes) }()
	for _, stream := range []sandbox.Stream{sandbox.Stdout, sandbox.Stderr} {
		out, pipe, err := newOutput(func() (*os.File, error) {
			return s.box.open(outputName(q.ID, stream), unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
		}, s.record.Identity.agent())
		if err != nil {
			return fault.New(op, fault.Unavailable, "%w", err)
		}
		pipes = append(pipes, pipe)
		s.mu.Lock()
		p.outs = append(p.outs, out)
		s.mu.Unlock()
	}
	a, err := s.order(order{Op: opStart, ID: q.ID, Cmd: q.Cmd}, int(pipes[0].Fd()), int(pipes[1].Fd()))
	if err != nil {
		return err
	}
	if a.Exit.Code != 0 {
		if _, err := pipes[1].WriteString(cut(a.Note)); err != nil {
			return fileFault(op, err)
		}
		s.ended(q.ID, a.Exit)
	}
	return nil
}

// ended keeps how a process ended, in memory for workers and in the log for
// people.
func (s *supervisor) ended(id string, exit sandbox.Exit) {
	if s.terminals.ended(id, exit) {
		return
	}
	s.mu.Lock()
	p := s.processes[id]
	if p == nil || p.told { // init may say anything, and twice
		s.mu.Unlock()
		return
	}
	p.told = true
	outs := p.outs
	s.mu.Unlock()
	for _, out := range outs {
		out.drain()
	}
	p.exit = s.limited(p, sandbox.Exit{Code: exit.Code & 0xff, Signal: cut(exit.Signal)})
	close(p.done)
	s.log.Info("process ended", "process", id, "code", p.exit.Code, "signal", p.exit.Signal)
}

// process finds what was started under id.
func (s *supervisor) process(id string) (*process, error) {
	s.mu.Lock()
	p := s.processes[id]
	s.mu.Unlock()
	if p != nil {
		<-p.known
	}
	if p == nil || p.err != nil {
		return nil, fault.New("find process", fault.NotFound, "no process %q was started", cut(id))
	}
	return p, nil
}

// look says how a process ended. For opWait it first waits until it has.
func (s *supervisor) look(q request, r *response, gone <-chan struct{}) error {
	p, err := s.process(q.ID)
	if err != nil {
		return err
	}
	if q.Op == opWait {
		select {
		case <-p.done:
		case <-gone:
		case <-s.initDone:
		}
	}
	select {
	case <-p.done:
		r.Exit = &p.exit
		return nil
	default:
	}
	select {
	case <-s.initDone:
		return fault.New("wait for process", fault.NotFound, "the sandbox ended before the process")
	default:
		return nil
	}
}
