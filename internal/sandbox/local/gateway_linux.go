package local

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// maxForwards bounds the connections of one sandbox to the gateway. More wait
// in the listener's queue.
const maxForwards = 128

// A forwarder carries connections from the sandbox's network, where its
// listener was opened, to the gateway's socket on the host. The socket is
// looked up for each, so the gateway can come and go.
type forwarder struct {
	listener *net.TCPListener
	gateway  string
	log      *slog.Logger
	slots    chan struct{}
	conns    connections
}

// forward takes f over, which is a listener of another network namespace.
func forward(f *os.File, gateway string, log *slog.Logger) (*forwarder, error) {
	l, err := loopbackListener(f)
	if err != nil {
		return nil, err
	}
	w := &forwarder{listener: l, gateway: gateway, log: log, slots: make(chan struct{}, maxForwards)}
	go w.run()
	return w, nil
}

// loopbackListener takes over what init listens at in the sandbox.
func loopbackListener(f *os.File) (*net.TCPListener, error) {
	l, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, errors.New("init's listener is none for TCP")
	}
	return tcp, nil
}

// closeLoopback ends the listener, and an Accept that waits at it.
func closeLoopback(l *net.TCPListener) {
	// Init has the listener too and can make it one that blocks: then Close
	// would wait for the Accept, and only this ends it.
	if raw, err := l.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
	_ = l.Close() // nothing is lost with it
}

func (w *forwarder) run() {
	for {
		w.slots <- struct{}{}
		in, err := w.listener.Accept()
		if err != nil {
			return // closed, or the network is gone with the sandbox
		}
		go func() {
			defer func() { <-w.slots }()
			w.carry(in)
		}()
	}
}

// carry connects one caller. When the gateway cannot be reached the caller
// sees its connection closed, and will try again as it would with a server.
func (w *forwarder) carry(in net.Conn) {
	defer in.Close()
	out, err := dialUnix(w.gateway)
	if err != nil {
		w.log.Debug("gateway not reached", "err", err)
		return
	}
	defer out.Close()
	if !w.conns.keep(in, out) {
		return
	}
	defer w.conns.drop(in, out)
	done := make(chan struct{})
	go func() {
		pass(out, in.(*net.TCPConn))
		close(done)
	}()
	pass(in.(*net.TCPConn), out)
	<-done
}

// halfCloser is a connection that can end one direction.
type halfCloser interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// pass copies until from ends, and says so to its other side. When to takes
// no more, from is told that too.
func pass(to, from halfCloser) {
	_, err := io.Copy(to, from)
	_ = to.CloseWrite() // an error: the other side is gone already
	if err != nil {
		_ = from.CloseRead()
	}
}

// connections are those that can be closed from outside, all at once and once
// and for all.
type connections struct {
	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
}

// keep reports whether close is still to come.
func (k *connections) keep(conns ...net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return false
	}
	if k.open == nil {
		k.open = map[net.Conn]struct{}{}
	}
	for _, c := range conns {
		k.open[c] = struct{}{}
	}
	return true
}

func (k *connections) drop(conns ...net.Conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range conns {
		delete(k.open, c)
	}
}

func (k *connections) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for c := range k.open {
		c.Close()
	}
}

// close ends the listener and every connection.
func (w *forwarder) close() {
	if w == nil {
		return
	}
	closeLoopback(w.listener)
	w.conns.close()
}

// dialUnix connects to a socket whose path may be longer than an address.
func dialUnix(path string) (*net.UnixConn, error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(fd)
	return net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: fdPath(fd, filepath.Base(path))})
}
