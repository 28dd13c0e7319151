package fake

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
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

var _ sandbox.Sandbox = (*box)(nil)

// A box is a sandbox. It is its own connection: Close does nothing.
type box struct {
	ref     sandbox.Ref
	dir     string
	created time.Time
	spec    sandbox.Spec
	made    chan struct{} // closed when open is through; err, gateway and timer are set by then
	err     error
	gateway *forwarder
	timer   *time.Timer

	ending sync.Mutex // held while it is frozen or destroyed

	mu        sync.Mutex
	over      chan struct{}
	ended     bool
	frozen    bool
	paused    bool
	processes map[string]*process
}

// roots are the absolute paths of a sandbox that are moved below root.
var roots = []string{sandbox.Workspace, sandbox.Home, "/opt/sandbox", "/tmp"}

func (b *box) root() string { return filepath.Join(b.dir, "root") }

// host translates an absolute path of the sandbox.
func (b *box) host(p string) string { return filepath.Join(b.root(), path.Clean(p)) }

// translate translates a word of a command.
func (b *box) translate(word string) string {
	if b.gateway != nil {
		word = strings.ReplaceAll(word, "127.0.0.1:"+strconv.Itoa(sandbox.GatewayPort), b.gateway.address())
	}
	for _, r := range roots {
		if word == r || strings.HasPrefix(word, r+"/") {
			return b.host(word)
		}
	}
	return word
}

// open makes the folders.
func (b *box) open(ctx context.Context, base string) error {
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return err
	}
	if base != "" {
		if err := copyTree(ctx, base, b.root()); err != nil {
			return err
		}
		// Mounts are not part of a base.
		if err := os.RemoveAll(b.host("/opt")); err != nil {
			return err
		}
	}
	for _, d := range []string{sandbox.Workspace, sandbox.Home, sandbox.ProgramDir, "/tmp"} {
		if err := os.MkdirAll(b.host(d), 0o755); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(b.dir, "output"), 0o700); err != nil {
		return err
	}
	for _, m := range b.spec.Mounts {
		// A copy: what is done to it is not done to the host's file.
		to := b.host(m.Target)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := copyTree(ctx, m.Source, to); err != nil {
			return err
		}
	}
	if b.spec.Gateway == "" {
		return nil
	}
	socket, ok := strings.CutPrefix(b.spec.Gateway, "unix:")
	if !ok {
		return fault.New("gateway", fault.Invalid, "%q is not unix: and a path", b.spec.Gateway)
	}
	var err error
	b.gateway, err = forward(socket)
	return err
}

func (b *box) isOver() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ended
}

// markOver lets nothing be started any more, and wakes who waits.
func (b *box) markOver() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return
	}
	b.ended = true
	close(b.over)
	if b.timer != nil {
		b.timer.Stop()
	}
	b.gateway.close()
}

func (b *box) markFrozen() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frozen = true
}

// usable says why nothing can be done with the sandbox. The caller holds mu.
func (b *box) usable(op string) error {
	if b.ended {
		return fault.New(op, fault.NotFound, "sandbox %q is gone", b.ref.ID)
	}
	if b.frozen {
		return fault.New(op, fault.Conflict, "sandbox %q was frozen and can only be destroyed", b.ref.ID)
	}
	if b.paused {
		return fault.New(op, fault.Conflict, "sandbox %q is paused", b.ref.ID).Hinted("Resume it first.")
	}
	return nil
}

// pathFault gives an error about a path inside the sandbox its kind.
func pathFault(op string, err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return fault.New(op, fault.NotFound, "%w", err)
	}
	return fault.New(op, fault.Invalid, "%w", err)
}

// files opens the sandbox's root, out of which no link leads.
func (b *box) files(op, name string) (root *os.Root, rel string, err error) {
	b.mu.Lock()
	err = b.usable(op)
	b.mu.Unlock()
	if err != nil {
		return nil, "", err
	}
	if !path.IsAbs(name) || path.Clean(name) == "/" || strings.ContainsRune(name, 0) {
		return nil, "", fault.New(op, fault.Invalid, "%q is not an absolute path of a file", name)
	}
	root, err = os.OpenRoot(b.root())
	if err != nil {
		return nil, "", fault.New(op, fault.NotFound, "sandbox %q is gone: %w", b.ref.ID, err)
	}
	return root, strings.TrimPrefix(path.Clean(name), "/"), nil
}

// Upload writes a file beside the one to be, and renames it.
func (b *box) Upload(ctx context.Context, name string, r io.Reader) error {
	const op = "fake: upload"
	root, rel, err := b.files(op, name)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.MkdirAll(path.Dir(rel), 0o755); err != nil {
		return fault.New(op, fault.Invalid, "%w", err)
	}
	temp := path.Join(path.Dir(rel), ".upload-"+rand.Text())
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fault.New(op, fault.Invalid, "%w", err)
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close(), ctx.Err()); err != nil {
		return errors.Join(fault.Wrap(op, err), root.Remove(temp))
	}
	if err := root.Rename(temp, rel); err != nil {
		return errors.Join(fault.New(op, fault.Invalid, "%w", err), root.Remove(temp))
	}
	return nil
}

// Download opens the file.
func (b *box) Download(_ context.Context, name string) (io.ReadCloser, error) {
	f, err := b.openRegular("fake: download", name)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (b *box) openRegular(op, name string) (*os.File, error) {
	root, rel, err := b.files(op, name)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.OpenFile(rel, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, pathFault(op, err)
	}
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return nil, fault.New(op, fault.Invalid, "%q is not a regular file", name)
	}
	return f, nil
}

// Health returns nil until the sandbox is destroyed, frozen or paused.
func (b *box) Health(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.usable("fake: health")
}

// SetDeadline sets the timer anew.
func (b *box) SetDeadline(_ context.Context, t time.Time) error {
	const op = "fake: set deadline"
	if t.IsZero() {
		return fault.New(op, fault.Invalid, "a sandbox needs a deadline")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return b.usable(op)
	}
	b.timer.Reset(time.Until(t))
	return nil
}

// Close does nothing.
func (b *box) Close() error { return nil }

// A forwarder carries connections to the gateway's socket.
type forwarder struct {
	l net.Listener
}

func forward(socket string) (*forwarder, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go carry(in, socket)
		}
	}()
	return &forwarder{l}, nil
}

func carry(in net.Conn, socket string) {
	defer in.Close()
	var dialer net.Dialer
	out, err := dialer.DialContext(context.Background(), "unix", socket) // local: answers at once
	if err != nil {
		return // as with a server that is down: the caller's connection ends
	}
	defer out.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(out, in) // either side may go at any time
		_ = out.(*net.UnixConn).CloseWrite()
	}()
	_, _ = io.Copy(in, out)
	_ = in.(*net.TCPConn).CloseWrite()
	<-done
}

func (f *forwarder) address() string { return f.l.Addr().String() }

func (f *forwarder) close() {
	if f != nil {
		f.l.Close()
	}
}
