package gvisor

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// agentID is who the agent is inside.
const agentID = 1000

// Where init finds what the guardian gave it. The agent may not enter.
const (
	insideDir    = "/.sandbox"
	insideInit   = insideDir + "/init"   // this program
	insideUpper  = insideDir + "/upper"  // a file system in memory and one file of the host
	insideBase   = insideDir + "/base"   // the image of the base
	insideMounts = insideDir + "/mounts" // host files that are shown in folders that can be written to
	insideOutput = insideDir + "/output" // another one
)

// A layer is a folder that can be written to and that a base keeps.
type layer struct {
	name   string // below upper, and in the image of a base
	target string
	mode   uint32
	owner  int
}

var layers = []layer{
	{"workspace", sandbox.Workspace, 0o755, agentID},
	{"home", sandbox.Home, 0o755, agentID},
	{"tmp", "/tmp", 0o1777, 0},
}

// inLayer reports whether p stands in a folder that can be written to.
func inLayer(p string) bool {
	for _, l := range layers {
		if p == l.target || strings.HasPrefix(p, l.target+"/") {
			return true
		}
	}
	return false
}

// initMain is PID 1 of a sandbox, which is a process of gVisor's kernel and
// root there. It ends when its guardian is gone, and with it everything.
func initMain() int {
	unix.Umask(0o022)
	os.Clearenv()
	// Neither memory nor descriptors of init are for the agent; that it is
	// not root keeps it from them too.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	in := &initProcess{programs: programs{ids: map[int]*program{}, byID: map[string]*program{}, born: make(chan struct{}, 1)}}
	in.hand.start()
	in.link = newMux(os.Stdin, os.Stdout, true, in.talk)
	go in.programs.reap()
	if err := in.link.serve(); !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "init:", err)
		return 1
	}
	return 0
}

type initProcess struct {
	link     *mux
	hand     hand
	programs programs

	arranging sync.Mutex
	gateway   net.Listener // guarded by arranging

	mu     sync.Mutex
	setUp  *setup // written with arranging held, too
	packed bool
	bars   []bar
	base   int64 // the memory that was used before there was any program

	uploads sync.RWMutex // held for reading while a file is on its way to its name
	still   sync.RWMutex // held for reading while init does something in the sandbox, for writing while it is being stopped
	halted  map[int]bool // guarded by still; not nil: it is paused, these had been stopped before
}

// talk answers one request.
func (in *initProcess) talk(s *stream) {
	defer s.Close()
	var q request
	if err := readMessage(s, &q, maxRequest); err != nil {
		return // whoever asked is gone
	}
	r := response{Version: protocol}
	raw, err := in.answer(q, &r, s)
	r.Fault = toWire(err)
	if writeMessage(s, r) != nil || err != nil {
		if raw != nil {
			raw(false)
		}
		// The other end reads the response before it is told that the stream
		// is gone.
		_ = s.CloseWrite()
		_, _ = io.Copy(io.Discard, s)
		return
	}
	if raw != nil {
		raw(true)
	}
	_ = s.CloseWrite()
	_, _ = io.Copy(io.Discard, s)
}

// answer does what q asks. The function that it returns is called when the
// response was sent, or, with false, could not be.
func (in *initProcess) answer(q request, r *response, s *stream) (raw func(bool), err error) {
	const op = "sandbox"
	if q.Op == opSetup {
		return nil, in.arrange(q.Setup)
	}
	in.mu.Lock()
	usable := in.setUp != nil && !in.packed
	in.mu.Unlock()
	if !usable && q.Op != opProcess && q.Op != opWait && q.Op != opOutput {
		return nil, fault.New(op, fault.Conflict, "the sandbox was frozen and can only be destroyed")
	}
	switch q.Op {
	case opHealth, opStart, opSignal, opRead, opWrite, opTerminal, opDial:
		done, err := in.awake()
		if err != nil {
			return nil, err
		}
		defer done()
	}
	switch q.Op {
	case opHealth:
		return nil, in.hand.do(func() error { return nil })
	case opTerminal:
		return in.terminal(q, s)
	case opDial:
		return dial(q.Port, s)
	case opPause:
		return nil, in.pause()
	case opResume:
		in.resume()
		return nil, nil
	case opUsage:
		r.Usage = in.usage()
		return nil, nil
	case opCopy:
		return in.copyAll(s)
	case opStart:
		return nil, in.start(q)
	case opProcess, opWait:
		return nil, in.look(q, r, s)
	case opSignal:
		return nil, in.programs.signal(q.ID, q.Signal)
	case opOutput:
		return in.output(q, r, s)
	case opRead:
		return in.download(string(q.Path), s)
	case opWrite:
		return in.upload(string(q.Path), s)
	case opPack:
		in.mu.Lock()
		in.packed = true
		in.mu.Unlock()
		return in.pack(s)
	}
	return nil, fault.New(op, fault.Unsupported, "the init of this sandbox does not know %q", cut(q.Op)).
		Hinted("It was started by an older version of this program; it goes away with its sandbox.")
}

// arrange makes the sandbox what it is to be. In one that was restored there
// is nothing to do but to listen for whom a new guardian answers.
func (in *initProcess) arrange(s *setup) error {
	if s == nil {
		return fault.New("set up", fault.Invalid, "with nothing")
	}
	in.arranging.Lock()
	defer in.arranging.Unlock()
	if in.setUp == nil {
		if err := mountAll(s); err != nil {
			return fault.Wrap("set up", err)
		}
		if s.Limits.DiskBytes > 0 {
			if err := makeBallast(reserve(s.Limits.DiskBytes)); err != nil {
				return fault.Wrap("set up", err)
			}
		}
		in.mu.Lock()
		in.setUp = s
		in.mu.Unlock()
	}
	// Of the processes of a fork whose parent was paused nobody knows that
	// they are.
	in.resume()
	in.limitTo(s.Limits)
	if s.Gateway && in.gateway == nil {
		l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: sandbox.GatewayPort})
		if err != nil {
			return err
		}
		in.gateway = l
		go in.forward(l)
	}
	return nil
}

// mountAll puts the folders that can be written to where they belong.
func mountAll(s *setup) error {
	for _, l := range layers {
		upper := filepath.Join(insideUpper, l.name)
		if err := os.Mkdir(upper, 0o700); err != nil {
			return err
		}
		if err := os.Chown(upper, l.owner, l.owner); err != nil {
			return err
		}
		if err := unix.Chmod(upper, l.mode); err != nil {
			return &os.PathError{Op: "chmod", Path: upper, Err: err}
		}
		if !s.Base {
			if err := unix.Mount(upper, l.target, "", unix.MS_BIND, ""); err != nil {
				return &os.PathError{Op: "bind", Path: l.target, Err: err}
			}
			continue
		}
		options := "lowerdir=" + filepath.Join(insideBase, l.name) + ",upperdir=" + upper
		if err := unix.Mount("overlay", l.target, "overlay", unix.MS_NODEV|unix.MS_NOSUID, options); err != nil {
			return &os.PathError{Op: "overlay", Path: l.target, Err: err}
		}
	}
	for _, m := range s.Mounts {
		if err := bind(m); err != nil {
			return err
		}
	}
	return nil
}

// bind shows a host file in a folder that can be written to.
func bind(m sandbox.Mount) error {
	st, err := os.Stat(m.Source)
	if err != nil {
		return err
	}
	if err := makeFolders(path.Dir(m.Target)); err != nil {
		return err
	}
	if st.IsDir() {
		err = makeFolders(m.Target)
	} else {
		var f *os.File
		if f, err = os.OpenFile(m.Target, os.O_CREATE|os.O_RDONLY, 0o644); err == nil {
			err = f.Close()
		}
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(m.Source, m.Target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return &os.PathError{Op: "bind", Path: m.Target, Err: err}
	}
	return nil
}

// makeFolders makes a folder and those above it. In a folder of the agent's it
// is the agent's.
func makeFolders(dir string) error {
	if st, err := os.Stat(dir); err == nil {
		if !st.IsDir() {
			return &os.PathError{Op: "mkdir", Path: dir, Err: unix.ENOTDIR}
		}
		return nil
	}
	if err := makeFolders(path.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(path.Dir(dir), &st); err != nil {
		return &os.PathError{Op: "stat", Path: path.Dir(dir), Err: err}
	}
	return os.Lchown(dir, int(st.Uid), int(st.Gid))
}

// forward carries connections to the gateway. The guardian dials it, for each
// anew, so the gateway can come and go.
func (in *initProcess) forward(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			s, err := in.link.open()
			if err != nil {
				c.Close()
				return
			}
			splice(c.(*net.TCPConn), s)
		}()
	}
}

// A hand is a thread that is the agent wherever it opens a path: whatever link
// the agent has made leads it to where the agent could go too. gVisor does
// not have setfsuid(2), but ids that belong to threads, as Linux.
type hand struct {
	jobs chan func()
}

func (h *hand) start() {
	h.jobs = make(chan func())
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: this thread is no good for anything else
		err := becomeAgent()
		failed <- err
		if err != nil {
			return
		}
		for job := range h.jobs {
			job()
		}
	}()
	if err := <-failed; err != nil {
		panic(err) // PID 1 of a sandbox that cannot be used: its end is told by runsc
	}
}

// becomeAgent changes the effective ids of this thread only. The others stay
// root's, so that the agent cannot signal the process.
func becomeAgent() error {
	const keep = ^uintptr(0)
	for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
		if _, _, errno := unix.RawSyscall(call, keep, agentID, keep); errno != 0 {
			return os.NewSyscallError("become the agent", errno)
		}
	}
	return nil
}

// do runs f on the thread.
func (h *hand) do(f func() error) error {
	answer := make(chan error, 1)
	h.jobs <- func() { answer <- f() }
	return <-answer
}

// pathFault gives an error about a path inside the sandbox its kind: a path
// is the caller's choice.
func pathFault(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return fault.New(op, fault.NotFound, "%w", err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fault.New(op, fault.Full, "%w", err)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return fault.New(op, fault.Unavailable, "%w", err)
	}
	return fault.New(op, fault.Invalid, "%w", err)
}

// writeFault is pathFault for a file that is to be made: what is missing then
// is no file but a way to make one.
func writeFault(op string, err error) error {
	if err := pathFault(op, err); fault.KindOf(err) != fault.NotFound {
		return err
	}
	return fault.New(op, fault.Invalid, "%w", err)
}

// openRegular opens a file as the agent, unless it is none that can be read
// without surprises. It runs on the hand.
func openRegular(name string) (*os.File, error) {
	const op = "read"
	fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathFault(op, &os.PathError{Op: "open", Path: name, Err: err})
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, pathFault(op, err)
	}
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, pathFault(op, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || fs.Type == unix.PROC_SUPER_MAGIC {
		return nil, fault.New(op, fault.Invalid, "%q is not a regular file", name)
	}
	r, err := unix.Open(filepath.Join("/proc/self/fd", strconv.Itoa(fd)), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, pathFault(op, &os.PathError{Op: "open", Path: name, Err: err})
	}
	return os.NewFile(uintptr(r), name), nil
}

// download sends a file.
func (in *initProcess) download(name string, s *stream) (func(bool), error) {
	if !cleanAbsolute(name) || name == "/" {
		return nil, fault.New("read", fault.Invalid, "%q is not a clean absolute path of a file", cut(name))
	}
	var f *os.File
	err := in.hand.do(func() (err error) {
		f, err = openRegular(name)
		return err
	})
	if err != nil {
		return nil, err
	}
	return func(ok bool) {
		defer f.Close()
		if !ok {
			return
		}
		if _, err := io.Copy(s, f); err != nil {
			_ = s.Close() // so that it is no end
		}
	}, nil
}

// upload takes a file. Until it is whole it has another name.
func (in *initProcess) upload(name string, s *stream) (func(bool), error) {
	const op = "write"
	if !cleanAbsolute(name) || name == "/" {
		return nil, fault.New(op, fault.Invalid, "%q is not a clean absolute path of a file", cut(name))
	}
	var f *os.File
	err := in.hand.do(func() error {
		if err := os.MkdirAll(path.Dir(name), 0o755); err != nil {
			return err
		}
		if st, err := os.Lstat(name); err == nil && st.IsDir() {
			return &os.PathError{Op: "create", Path: name, Err: unix.EISDIR}
		}
		var err error
		if f, err = os.CreateTemp(path.Dir(name), ".upload-*"); err != nil {
			return err
		}
		return f.Chmod(0o644)
	})
	discard := func() {
		_ = in.hand.do(func() error { return os.Remove(f.Name()) }) // nobody wants it; that it is gone is as good
	}
	if err != nil {
		if f != nil {
			_ = f.Close()
			discard()
		}
		return nil, writeFault(op, err)
	}
	return func(ok bool) {
		in.uploads.RLock()
		defer in.uploads.RUnlock()
		err := errors.New("nobody waits for it")
		if ok {
			err = receive(f, s)
		}
		if err = errors.Join(err, f.Close()); err == nil {
			err = in.hand.do(func() error { return os.Rename(f.Name(), name) })
		}
		if err != nil {
			discard()
		}
		_ = writeMessage(s, response{Version: protocol, Fault: toWire(writeFault(op, err))}) // an error: nobody waits for it
	}, nil
}

// receive copies chunks until an empty one.
func receive(to io.Writer, from io.Reader) error {
	for {
		chunk, err := readChunk(from, maxChunk)
		if err != nil || len(chunk) == 0 {
			return err
		}
		if _, err := to.Write(chunk); err != nil {
			return err
		}
	}
}
