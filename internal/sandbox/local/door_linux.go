package local

import (
	"errors"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// A door is a port on the sandbox's loopback at which the supervisor answers.
type door struct {
	listener *net.TCPListener

	mu     sync.Mutex
	open   map[net.Conn]struct{} // what close ends
	closed bool
}

// newDoor takes over what init listens at in the sandbox.
func newDoor(f *os.File) (*door, error) {
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
	return &door{listener: tcp, open: map[net.Conn]struct{}{}}, nil
}

// serve has one answer each caller, so many of them at once, until the door is
// closed or the network is gone with the sandbox. More wait in the listener's
// queue.
func (d *door) serve(most int, one func(net.Conn)) {
	slots := make(chan struct{}, most)
	for {
		slots <- struct{}{}
		c, err := d.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { <-slots }()
			defer c.Close()
			if d.keep(c) {
				defer d.drop(c)
				one(c)
			}
		}()
	}
}

// keep has close end the connection too, and reports whether close is still to
// come.
func (d *door) keep(c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.open[c] = struct{}{}
	}
	return !d.closed
}

func (d *door) drop(c net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.open, c)
}

// close ends the listener and every connection.
func (d *door) close() {
	// Init has the listener too and can make it one that blocks: then Close
	// would wait for the Accept, and only this ends it.
	if raw, err := d.listener.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
	_ = d.listener.Close() // nothing is lost with it
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for c := range d.open {
		c.Close()
	}
}
