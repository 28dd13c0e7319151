package endpoint

import (
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// withSocket calls f with a path of dir's socket that fits into a socket
// address. A path that is too long is reached through an open descriptor of
// the folder, whose name in /proc is short; changing the working directory
// would do as well, but it belongs to the whole process.
func withSocket(dir string, f func(path string) error) error {
	path := filepath.Join(dir, socketName)
	if len(path) <= longest {
		return f(path)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return f("/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + socketName)
}

// peerUID asks the kernel who connected.
func peerUID(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if inner != nil {
		return 0, inner
	}
	return int(cred.Uid), nil
}
