package local

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxForwards bounds the connections of one sandbox to the gateway. More wait
// in the listener's queue.
const maxForwards = 128

// A forwarder carries connections from the sandbox's network, where its
// listener was opened, to the gateway's socket on the host. The socket is
// looked up for each, so the gateway can come and go.
type forwarder struct {
	door    *door
	gateway string
	log     *slog.Logger
}

// forward takes f over, which is a listener of another network namespace.
func forward(f *os.File, gateway string, log *slog.Logger) (*forwarder, error) {
	d, err := newDoor(f)
	if err != nil {
		return nil, err
	}
	w := &forwarder{door: d, gateway: gateway, log: log}
	go d.serve(maxForwards, w.carry)
	return w, nil
}

// carry connects one caller. When the gateway cannot be reached the caller
// sees its connection closed, and will try again as it would with a server.
func (w *forwarder) carry(in net.Conn) {
	out, err := dialUnix(w.gateway)
	if err != nil {
		w.log.Debug("gateway not reached", "err", err)
		return
	}
	defer out.Close()
	if !w.door.keep(out) {
		return
	}
	defer w.door.drop(out)
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

// close ends the listener and every connection.
func (w *forwarder) close() {
	if w != nil {
		w.door.close()
	}
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
