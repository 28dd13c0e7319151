package local

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

var (
	_ sandbox.Sandbox = (*attached)(nil)
	_ sandbox.Process = (*attachedProcess)(nil)
)

// An attached is a sandbox as a worker sees it: its folder, and a supervisor
// to ask. Each question has a connection of its own, so there is nothing to
// keep alive or to mend.
type attached struct {
	*folder
	handle handle
	p      *Provider

	closing sync.Once
	closed  error
}

// ask sends one request and returns the response when it holds no fault.
func (a *attached) ask(ctx context.Context, op string, q request) (response, error) {
	r, file, _, err := a.converse(ctx, op, q)
	if file != nil {
		_ = file.Close()
	}
	return r, err
}

// converse sends q and returns the response and the file that came with it.
// With keep, the connection stays open for a second frame; otherwise it is
// closed.
func (a *attached) converse(ctx context.Context, op string, q request) (r response, file *os.File, l *link, err error) {
	q.Version = protocol
	conn, err := a.dial(ctx)
	if err != nil {
		return response{}, nil, nil, a.lostFault(ctx, op, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	l = newLink(conn, maxReply, 1)
	var files []*os.File
	if err = l.send(q); err == nil {
		files, err = l.receive(&r)
	}
	if err != nil {
		_ = conn.Close()
		return response{}, nil, nil, a.lostFault(ctx, op, err)
	}
	if err := r.Fault.err(op); err != nil || len(files) == 0 {
		closeAll(files)
		_ = conn.Close()
		return r, nil, nil, err
	}
	return r, files[0], l, nil
}

// dial connects to the supervisor, through the folder so that it is that of
// this sandbox and no later one's.
func (a *attached) dial(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", fdPath(a.fd(), socketFile))
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// lostFault tells a sandbox that is gone from one that just does not answer.
func (a *attached) lostFault(ctx context.Context, op string, err error) error {
	switch {
	case ctx.Err() != nil:
		return a.p.ctxFault(ctx, op, err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return gone(op, a.handle)
	}
	return fault.New(op, fault.Unavailable, "%w", err)
}

// hello makes sure that the supervisor lives and is the one of the handle.
func (a *attached) hello(ctx context.Context, op string) (state, error) {
	r, err := a.ask(ctx, op, request{Op: opHello})
	if err != nil {
		return "", err
	}
	if r.Instance != a.handle.Instance {
		return "", gone(op, a.handle)
	}
	return r.State, nil
}

// Start asks the supervisor, which remembers the ids.
func (a *attached) Start(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
	const op = "local: start process"
	c := wireCommand(cmd)
	if err := checkCommand(op, id, c); err != nil {
		return nil, err
	}
	a.p.spares.busy()
	if _, err := a.ask(ctx, op, request{Op: opStart, ID: id, Cmd: c}); err != nil {
		return nil, err
	}
	return &attachedProcess{a, id}, nil
}

func wireCommand(cmd sandbox.Cmd) *command {
	c := &command{Dir: []byte(cmd.Dir), Stdin: []byte(cmd.Stdin)}
	if cmd.Dir == "" {
		c.Dir = []byte(sandbox.Workspace)
	}
	for _, s := range cmd.Args {
		c.Args = append(c.Args, []byte(s))
	}
	for _, s := range cmd.Env {
		c.Env = append(c.Env, []byte(s))
	}
	return c
}

// Process asks the supervisor whether there is one.
func (a *attached) Process(ctx context.Context, id string) (sandbox.Process, error) {
	const op = "local: find process"
	if !sandbox.ValidID(id) {
		return nil, fault.New(op, fault.Invalid, "%q is not an id of a process", id)
	}
	if _, err := a.ask(ctx, op, request{Op: opProcess, ID: id}); err != nil {
		return nil, err
	}
	return &attachedProcess{a, id}, nil
}

// Upload fills a file that init opened as the agent, beside the one to be, and
// then has it renamed.
func (a *attached) Upload(ctx context.Context, name string, r io.Reader) error {
	const op = "local: upload"
	_, file, l, err := a.converse(ctx, op, request{Op: opWrite, Path: []byte(cleanPath(name))})
	if err != nil {
		return err
	}
	// Whoever closes the connection without a word gives the upload up.
	defer l.conn.Close()
	_, err = io.Copy(file, contextReader{ctx, r})
	if err := errors.Join(err, file.Close()); err != nil {
		return a.p.ctxFault(ctx, op, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.conn.Close() })
	defer stop()
	var answer response
	if err = l.send(request{Version: protocol, Op: opCommit}); err == nil {
		_, err = l.receive(&answer)
	}
	if err != nil {
		return a.lostFault(ctx, op, err)
	}
	return answer.Fault.err(op)
}

// cleanPath leaves what is not absolute for the supervisor to refuse.
func cleanPath(name string) string {
	if !path.IsAbs(name) {
		return name
	}
	return path.Clean(name)
}

// contextReader ends with its context, between two reads.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// Download returns a file that init opened as the agent. Reading it needs
// nobody's help any more, and must be closed for the sandbox's disk space to
// be free after Destroy.
func (a *attached) Download(ctx context.Context, name string) (io.ReadCloser, error) {
	const op = "local: download"
	_, file, l, err := a.converse(ctx, op, request{Op: opRead, Path: []byte(cleanPath(name))})
	if err != nil {
		return nil, err
	}
	_ = l.conn.Close()
	return file, nil
}

// Health has init answer. A paused sandbox is not well: it is fault.Conflict.
func (a *attached) Health(ctx context.Context) error {
	_, err := a.ask(ctx, "local: health", request{Op: opHealth})
	return err
}

// SetDeadline sets the supervisor's alarm. A moment that has passed destroys
// the sandbox at once.
func (a *attached) SetDeadline(ctx context.Context, t time.Time) error {
	const op = "local: set deadline"
	if t.IsZero() {
		return fault.New(op, fault.Invalid, "a sandbox needs a deadline")
	}
	_, err := a.ask(ctx, op, request{Op: opDeadline, Deadline: t})
	return err
}

// Close closes the folder. The processes found through this Sandbox cannot be
// used any more.
func (a *attached) Close() error {
	a.closing.Do(func() { a.closed = a.folder.Close() })
	return a.closed
}

// An attachedProcess is a process as a worker sees it.
type attachedProcess struct {
	a  *attached
	id string
}

// ReadAt reads the file that the process writes to.
func (p *attachedProcess) ReadAt(ctx context.Context, stream sandbox.Stream, b []byte, offset int64) (int, error) {
	const op = "local: read output"
	if (stream != sandbox.Stdout && stream != sandbox.Stderr) || offset < 0 {
		return 0, fault.New(op, fault.Invalid, "stream %q from byte %d", stream, offset)
	}
	f, err := p.a.open(outputName(p.id, stream), unix.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		f, err = p.a.open(path.Join("proc", "p-"+p.id, string(stream)), unix.O_RDONLY, 0) // of a supervisor that speaks protocol 1
	}
	if errors.Is(err, os.ErrNotExist) {
		// Nothing was written yet, if the process is there.
		if _, _, err := p.look(ctx, op, opProcess); err != nil {
			return 0, err
		}
		return 0, io.EOF
	}
	if err != nil {
		return 0, fault.Wrap(op, err)
	}
	defer f.Close()
	n, err := f.ReadAt(b, offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, fault.Wrap(op, err)
	}
	return n, err
}

// Exit asks the supervisor.
func (p *attachedProcess) Exit(ctx context.Context) (sandbox.Exit, bool, error) {
	return p.look(ctx, "local: exit of process", opProcess)
}

// Wait asks the supervisor to answer when the process has ended. The answer
// may come without an exit when the connection is being given up.
func (p *attachedProcess) Wait(ctx context.Context) (sandbox.Exit, error) {
	const op = "local: wait for process"
	exit, ok, err := p.look(ctx, op, opWait)
	if err == nil && !ok {
		err = fault.New(op, fault.Unavailable, "the supervisor did not wait")
	}
	return exit, err
}

func (p *attachedProcess) look(ctx context.Context, op, what string) (sandbox.Exit, bool, error) {
	r, err := p.a.ask(ctx, op, request{Op: what, ID: p.id})
	if err != nil || r.Exit == nil {
		return sandbox.Exit{}, false, err
	}
	return *r.Exit, true, nil
}

// Signal asks init, through the supervisor, to signal the process group.
func (p *attachedProcess) Signal(ctx context.Context, sig sandbox.Signal) error {
	_, err := p.a.ask(ctx, "local: signal process", request{Op: opSignal, ID: p.id, Signal: string(sig)})
	return err
}
