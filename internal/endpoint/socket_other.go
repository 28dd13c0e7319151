//go:build unix && !linux

package endpoint

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// withSocket calls f with the path of dir's socket.
func withSocket(dir string, f func(path string) error) error {
	path := filepath.Join(dir, socketName)
	if len(path) > longest {
		return fmt.Errorf("%s: %w", path, unix.ENAMETOOLONG)
	}
	return f(path)
}

// peerUID trusts the modes of the folder and the socket.
func peerUID(*net.UnixConn) (int, error) { return os.Geteuid(), nil }
