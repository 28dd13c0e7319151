package gvisor

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

// An attached is a sandbox as a worker sees it: its folder, and a guardian to
// ask. Each question has a connection of its own, so there is nothing to keep
// alive or to mend.
type attached struct {
	*box
	handle handle

	closing sync.Once
	closed  error
}

// ask sends one request and returns the response when it holds no fault.
func (a *attached) ask(ctx context.Context, op string, q request) (response, error) {
	r, c, err := a.converse(ctx, op, q)
	if c != nil {
		_ = c.Close()
	}
	return r, err
}

// A conversation is a connection on which more is said than one answer. It
// ends with its context.
type conversation struct {
	*net.UnixConn
	stop func() bool
}

func (c *conversation) Close() error {
	c.stop()
	return c.UnixConn.Close()
}

// converse sends q and returns the response and, when it holds no fault, the
// connection, which the caller closes.
func (a *attached) converse(ctx context.Context, op string, q request) (r response, c *conversation, err error) {
	q.Version = protocol
	// Through the folder, so that it is this sandbox's guardian and no later
	// one's.
	conn, err := new(net.Dialer).DialContext(ctx, "unix", a.at(socketFile))
	if err != nil {
		return response{}, nil, a.lostFault(ctx, op, err)
	}
	c = &conversation{conn.(*net.UnixConn), context.AfterFunc(ctx, func() { _ = conn.Close() })}
	if err = writeMessage(c, q); err == nil {
		err = readMessage(c, &r, maxReply)
	}
	if err != nil {
		_ = c.Close()
		return response{}, nil, a.lostFault(ctx, op, err)
	}
	if err := r.Fault.err(op); err != nil {
		_ = c.Close()
		return response{}, nil, err
	}
	return r, c, nil
}

// lostFault tells a sandbox that is gone from one that just does not answer.
func (a *attached) lostFault(ctx context.Context, op string, err error) error {
	switch {
	case ctx.Err() != nil:
		return contextFault(ctx, op, err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return gone(op, a.handle)
	}
	return fault.New(op, fault.Unavailable, "%w", err)
}

// hello makes sure that the guardian lives and is the one of the handle.
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

// Start asks init, which remembers the ids.
func (a *attached) Start(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
	const op = "gvisor: start process"
	q := request{Op: opStart, ID: id, Cmd: wireCommand(cmd)}
	if err := checkStart(op, q); err != nil {
		return nil, err
	}
	if _, err := a.ask(ctx, op, q); err != nil {
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

// Process asks init whether there is one.
func (a *attached) Process(ctx context.Context, id string) (sandbox.Process, error) {
	const op = "gvisor: find process"
	if !sandbox.ValidID(id) {
		return nil, fault.New(op, fault.Invalid, "%q is not an id of a process", id)
	}
	if _, err := a.ask(ctx, op, request{Op: opProcess, ID: id}); err != nil {
		return nil, err
	}
	return &attachedProcess{a, id}, nil
}

// Upload sends the file to init, who gives it its name when it is whole.
func (a *attached) Upload(ctx context.Context, name string, r io.Reader) error {
	const op = "gvisor: upload"
	_, c, err := a.converse(ctx, op, request{Op: opWrite, Path: []byte(cleanPath(name))})
	if err != nil {
		return err
	}
	// Whoever closes the connection without a word gives the upload up.
	defer c.Close()
	var sendErr error
	buf := make([]byte, maxChunk)
	for sendErr == nil {
		if ctx.Err() != nil {
			return contextFault(ctx, op, ctx.Err())
		}
		n, err := r.Read(buf)
		if n > 0 {
			sendErr = writeChunk(c, buf[:n])
		}
		if errors.Is(err, io.EOF) {
			sendErr = errors.Join(sendErr, writeChunk(c, nil))
			break
		}
		if err != nil {
			return contextFault(ctx, op, err)
		}
	}
	// What init has to say is better than that it does not listen.
	var answer response
	if err := readMessage(c, &answer, maxReply); err != nil {
		return a.lostFault(ctx, op, errors.Join(sendErr, err))
	}
	return answer.Fault.err(op)
}

// cleanPath leaves what is not absolute for init to refuse.
func cleanPath(name string) string {
	if !path.IsAbs(name) {
		return name
	}
	return path.Clean(name)
}

// Download reads a file that init opened as the agent.
func (a *attached) Download(ctx context.Context, name string) (io.ReadCloser, error) {
	const op = "gvisor: download"
	_, c, err := a.converse(ctx, op, request{Op: opRead, Path: []byte(cleanPath(name))})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Health has init answer.
func (a *attached) Health(ctx context.Context) error {
	_, err := a.ask(ctx, "gvisor: health", request{Op: opHealth})
	return err
}

// SetDeadline tells the guardian. A moment that has passed destroys the
// sandbox at once.
func (a *attached) SetDeadline(ctx context.Context, t time.Time) error {
	const op = "gvisor: set deadline"
	if t.IsZero() {
		return fault.New(op, fault.Invalid, "a sandbox needs a deadline")
	}
	_, err := a.ask(ctx, op, request{Op: opDeadline, Deadline: t})
	return err
}

// Close closes the folder. The processes found through this Sandbox cannot be
// used any more.
func (a *attached) Close() error {
	a.closing.Do(func() { a.closed = a.box.Close() })
	return a.closed
}

// An attachedProcess is a process as a worker sees it.
type attachedProcess struct {
	a  *attached
	id string
}

// ReadAt asks init for what the process has written.
func (p *attachedProcess) ReadAt(ctx context.Context, stream sandbox.Stream, b []byte, offset int64) (int, error) {
	const op = "gvisor: read output"
	if (stream != sandbox.Stdout && stream != sandbox.Stderr) || offset < 0 {
		return 0, fault.New(op, fault.Invalid, "stream %q from byte %d", stream, offset)
	}
	n := 0
	for n < len(b) {
		want := min(len(b)-n, maxChunk)
		r, c, err := p.a.converse(ctx, op, request{Op: opOutput, ID: p.id, Stream: stream, Offset: offset + int64(n), Size: want})
		if err != nil {
			return n, err
		}
		got, err := io.ReadFull(c, b[n:n+max(0, min(r.Size, want))])
		_ = c.Close()
		n += got
		if err != nil {
			return n, p.a.lostFault(ctx, op, err)
		}
		if got < want {
			return n, io.EOF
		}
	}
	return n, nil
}

// Exit asks init.
func (p *attachedProcess) Exit(ctx context.Context) (sandbox.Exit, bool, error) {
	return p.look(ctx, "gvisor: exit of process", opProcess)
}

// Wait asks init to answer when the process has ended. The answer may come
// without an exit when the connection is being given up.
func (p *attachedProcess) Wait(ctx context.Context) (sandbox.Exit, error) {
	const op = "gvisor: wait for process"
	exit, ok, err := p.look(ctx, op, opWait)
	if err == nil && !ok {
		err = fault.New(op, fault.Unavailable, "init did not wait")
	}
	return exit, err
}

func (p *attachedProcess) look(ctx context.Context, op, what string) (sandbox.Exit, bool, error) {
	r, err := p.a.ask(ctx, op, request{Op: what, ID: p.id})
	if err != nil || r.Exit == nil {
		return sandbox.Exit{}, false, err
	}
	return tame(*r.Exit), true, nil
}

// tame makes of what a sandbox says of an exit one that can be.
func tame(e sandbox.Exit) sandbox.Exit {
	e.Code &= 0xff
	e.Signal = cut(e.Signal)
	if e.Limit != sandbox.MemoryLimit && e.Limit != sandbox.DiskLimit {
		e.Limit = ""
	}
	return e
}

// Signal asks init to signal the process group.
func (p *attachedProcess) Signal(ctx context.Context, sig sandbox.Signal) error {
	_, err := p.a.ask(ctx, "gvisor: signal process", request{Op: opSignal, ID: p.id, Signal: string(sig)})
	return err
}
