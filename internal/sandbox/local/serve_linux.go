package local

import (
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// serve answers workers until the sandbox is gone.
func (s *supervisor) serve(l *net.UnixListener) {
	go func() {
		<-s.over
		l.Close()
	}()
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Warn("accept", "err", err)
			time.Sleep(100 * time.Millisecond) // out of descriptors: that passes
			continue
		}
		s.serving.Add(1)
		go func() {
			defer s.serving.Done()
			defer c.Close()
			s.talk(c)
		}()
	}
}

// talk carries out one request.
func (s *supervisor) talk(c *net.UnixConn) {
	if !ours(c) {
		return
	}
	l := newLink(c, maxRequest, 0)
	var q request
	if _, err := l.receive(&q); err != nil {
		return // a worker that died, or nobody of ours
	}
	if q.Op == opTerminal {
		s.serveTerminal(q, l)
		return
	}
	r := response{Version: protocol}
	// A worker that goes away is waited for no longer.
	gone := make(chan struct{})
	switch q.Op {
	case opWrite:
		// Until the file has its name, or is gone again.
		s.uploads.RLock()
		defer s.uploads.RUnlock()
	case opWait, opSnapshot:
		go func() {
			defer close(gone)
			_, _ = l.receive(&request{})
		}()
	}
	file, err := s.answer(q, l, &r, gone)
	r.Fault = toWire(err)
	var fds []int
	if file != nil {
		defer file.Close()
		fds = append(fds, int(file.Fd()))
	}
	_ = l.send(r, fds...) // nobody listens any more: then nobody has to know
	if file == nil || q.Op != opWrite {
		return
	}
	s.finishWrite(l, file)
}

// ours lets in nobody but the sandbox's owner and root.
func ours(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
	})
	return err == nil && ok
}

// answer does what q asks. A file that it returns travels with the response.
func (s *supervisor) answer(q request, l *link, r *response, gone <-chan struct{}) (*writable, error) {
	const op = "sandbox"
	switch q.Op {
	case opHello:
		s.mu.Lock()
		r.State, r.Instance = s.state, s.record.Instance
		s.mu.Unlock()
		return nil, nil
	case opDestroy:
		return nil, s.end("asked to")
	case opFreeze:
		return nil, s.freeze(q.Base)
	case opSnapshot:
		return nil, s.snapshot(q.Base, gone)
	case opDeadline:
		return nil, s.alarm.set(q.Deadline)
	case opPause:
		return nil, s.pause()
	case opResume:
		return nil, s.resume()
	}
	if err := s.usable(op); err != nil && q.Op != opProcess && q.Op != opWait && q.Op != opSignal {
		return nil, err
	}
	switch q.Op {
	case opHealth:
		_, err := s.order(order{Op: opPing})
		return nil, err
	case opUsage:
		u, err := s.usage()
		r.Usage = &u
		return nil, err
	case opStart:
		return nil, s.start(q)
	case opProcess, opWait:
		return nil, s.look(q, r, gone)
	case opSignal:
		return nil, s.signal(q)
	case opRead, opWrite:
		return s.openFile(q)
	case opDial:
		return s.openSocket(q)
	}
	return nil, fault.New(op, fault.Unsupported, "this supervisor does not know %q", cut(q.Op)).
		Hinted("It was started by an older version of this program; it goes away with its sandbox.")
}

// usable is an error when nothing can be started any more.
func (s *supervisor) usable(op string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.state {
	case used:
		return fault.New(op, fault.Conflict, "the sandbox was frozen and can only be destroyed")
	case spent:
		return fault.New(op, fault.Lost, "the sandbox ran out of memory and can only be destroyed")
	case dying:
		return fault.New(op, fault.NotFound, "the sandbox is being destroyed")
	}
	return nil
}

// order has init do something that returns no file.
func (s *supervisor) order(o order, fds ...int) (answer, error) {
	a, files, err := s.command(o, fds...)
	closeAll(files)
	if err != nil {
		return answer{}, err
	}
	return a, a.Fault.err("sandbox")
}

// A writable is an open file of the sandbox and what init calls it.
type writable struct {
	*os.File
	token uint64
}

// openFile has init open a file, and makes sure that it is one: nothing that
// comes out of the sandbox may block or surprise whoever reads it. The kernel
// calls the files of /proc regular too.
func (s *supervisor) openFile(q request) (*writable, error) {
	const op = "open file"
	if !cleanAbsolute(string(q.Path)) || string(q.Path) == "/" {
		return nil, fault.New(op, fault.Invalid, "%q is not a clean absolute path of a file", cut(string(q.Path)))
	}
	a, files, err := s.command(order{Op: q.Op, Path: q.Path})
	if err == nil {
		err = a.Fault.err(op)
	}
	if err == nil && len(files) != 1 {
		err = fault.New(op, fault.Internal, "init sent %d files", len(files))
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	var fs unix.Statfs_t
	if st, err := files[0].Stat(); err != nil || !st.Mode().IsRegular() || unix.Fstatfs(int(files[0].Fd()), &fs) != nil || fs.Type == unix.PROC_SUPER_MAGIC {
		_ = files[0].Close()
		return nil, fault.New(op, fault.Invalid, "not a regular file")
	}
	return &writable{files[0], a.Seq}, nil
}

// finishWrite waits until the worker has filled the file and wants it kept, or
// goes away.
func (s *supervisor) finishWrite(l *link, file *writable) {
	var q request
	end := order{Op: opAbort, Token: file.token}
	if _, err := l.receive(&q); err == nil && q.Op == opCommit {
		end.Op = opCommit
	}
	// Also one that was begun before a pause comes to its end, after it.
	_, err := s.orderAwake(end)
	_ = l.send(response{Version: protocol, Fault: toWire(err)})
}

// signals are those of the contract.
var signals = map[string]unix.Signal{
	string(sandbox.Interrupt): unix.SIGINT, string(sandbox.Terminate): unix.SIGTERM, string(sandbox.Kill): unix.SIGKILL,
}

func (s *supervisor) signal(q request) error {
	sig, ok := signals[strings.ToUpper(q.Signal)]
	if !ok {
		return fault.New("signal", fault.Invalid, "%q is no signal that can be sent", cut(q.Signal))
	}
	if _, err := s.process(q.ID); err != nil {
		return err
	}
	_, err := s.order(order{Op: opSignal, ID: q.ID, Signal: int(sig)})
	if err != nil && s.usable("signal") != nil {
		return nil // everything in the sandbox is dead
	}
	return err
}

// orders is the way to init.
type orders struct {
	link *link
	dead <-chan struct{}

	sending sync.Mutex
	mu      sync.Mutex // not held while sending: what init says must always be heard
	seq     uint64
	waiting map[uint64]chan reply
}

type reply struct {
	answer answer
	files  []*os.File
}

func (o *orders) open(c *net.UnixConn, dead <-chan struct{}) {
	o.link, o.dead, o.waiting = newLink(c, maxReply, 1), dead, map[uint64]chan reply{}
}

// do sends an order and waits for its answer, or for init's end.
func (o *orders) do(q order, fds ...int) (answer, []*os.File, error) {
	ch, err := o.give(q, fds...)
	if err != nil {
		return answer{}, nil, err
	}
	return o.answered(ch)
}

// give sends an order.
func (o *orders) give(q order, fds ...int) (<-chan reply, error) {
	ch := make(chan reply, 1)
	o.mu.Lock()
	o.seq++
	q.Seq = o.seq
	o.waiting[q.Seq] = ch
	o.mu.Unlock()
	o.sending.Lock()
	err := o.link.send(q, fds...)
	o.sending.Unlock()
	if err != nil {
		o.mu.Lock()
		delete(o.waiting, q.Seq)
		o.mu.Unlock()
		return nil, fault.New("order", fault.NotFound, "the sandbox is gone: %w", err)
	}
	return ch, nil
}

// answered waits for the answer to an order, or for init's end.
func (o *orders) answered(ch <-chan reply) (answer, []*os.File, error) {
	select {
	case r := <-ch:
		return r.answer, r.files, nil
	case <-o.dead:
	}
	select { // the last thing it said
	case r := <-ch:
		return r.answer, r.files, nil
	default:
		return answer{}, nil, fault.New("order", fault.NotFound, "the sandbox is gone")
	}
}

// hear passes on what init says until it dies. A thing that makes no sense
// comes from an init that is no longer ours: it is killed.
func (o *orders) hear(s *supervisor) {
	defer close(s.heard)
	defer o.link.conn.Close()
	for {
		var a answer
		files, err := o.link.receive(&a)
		if err != nil {
			_ = s.init.kill()
			return
		}
		if a.Seq == 0 {
			closeAll(files)
			if a.Ended != nil {
				s.ended(a.Ended.ID, a.Ended.Exit)
			}
			continue
		}
		o.mu.Lock()
		ch := o.waiting[a.Seq]
		delete(o.waiting, a.Seq)
		o.mu.Unlock()
		if ch == nil {
			closeAll(files)
			continue
		}
		ch <- reply{a, files}
	}
}
