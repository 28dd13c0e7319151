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

	mu    sync.Mutex
	conns map[net.Conn]struct{} // nil after close
}

// forward takes f over, which is a listener of another network namespace.
func forward(f *os.File, gateway string, log *slog.Logger) (*forwarder, error) {
	l, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, errors.New("the listener for the gateway is none for TCP")
	}
	w := &forwarder{listener: tcp, gateway: gateway, log: log, slots: make(chan struct{}, maxForwards), conns: map[net.Conn]struct{}{}}
	go w.run()
	return w, nil
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
	if !w.keep(in, out) {
		return
	}
	defer w.drop(in, out)
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

func (w *forwarder) keep(conns ...net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns == nil {
		return false
	}
	for _, c := range conns {
		w.conns[c] = struct{}{}
	}
	return true
}

func (w *forwarder) drop(conns ...net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range conns {
		delete(w.conns, c)
	}
}

// close ends the listener and every connection.
func (w *forwarder) close() {
	if w == nil {
		return
	}
	// Init has the listener too and can make it one that blocks: then Close
	// would wait for the Accept, and only this ends it.
	if raw, err := w.listener.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
	w.listener.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.conns {
		c.Close()
	}
	w.conns = nil
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
