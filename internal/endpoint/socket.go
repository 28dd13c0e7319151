package endpoint

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// longest is how long a socket's path may be: sun_path has 108 bytes on Linux
// and 104 elsewhere, one of them for the closing zero. See unix(7).
const longest = 103

// Listen opens the control socket, readable and writable by its owner only,
// for [Serve]. A socket that a dead engine left is replaced, which the lock
// makes safe: nobody else can be listening on it.
func (l *Lock) Listen() (net.Listener, error) {
	const op = "engine socket: listen"
	if l.file == nil {
		return nil, fault.New(op, fault.Internal, "the lock was released")
	}
	path := filepath.Join(l.dir, socketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, diskFault(op, l.dir, err)
	}
	var ln *net.UnixListener
	err := withSocket(l.dir, func(short string) (err error) {
		ln, err = net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: short})
		return err
	})
	if err != nil {
		return nil, diskFault(op, l.dir, err)
	}
	// The name that it was bound by may be gone by the time it closes; Remove
	// takes the file away.
	ln.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close()
		return nil, diskFault(op, l.dir, err)
	}
	return &guarded{ln}, nil
}

// dial connects to the control socket of dir.
func dial(ctx context.Context, dir string) (conn net.Conn, err error) {
	err = withSocket(dir, func(short string) (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", short)
		return err
	})
	return conn, err
}

// guarded lets in only the user that the engine runs as, and root. The mode of
// the folder and of the socket say the same; this holds when somebody changed
// them.
type guarded struct{ *net.UnixListener }

// Accept returns the next connection of a user who is allowed.
func (g *guarded) Accept() (net.Conn, error) {
	for {
		conn, err := g.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(conn)
		if err == nil && admitted(uid, os.Geteuid()) {
			return conn, nil
		}
		_ = conn.Close()
	}
}

func admitted(peer, us int) bool { return peer == us || peer == 0 }
