//go:build unix

package ledger

import (
	"errors"
	"os"
	"syscall"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// lock takes the file at path for as long as it stays open; the kernel frees
// it when the process dies. SQLite would let two gateways in, and each would
// keep balances that the other does not know.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, diskFault("lock ledger", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close() //nolint:errcheck // nothing was written
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fault.New("lock ledger", fault.Conflict, "another gateway uses %s", path).
			Hinted("Stop the other process, or give this one a home of its own with SANDBOX_TEMPORAL_HOME.")
	}
	return nil, fault.New("lock ledger", fault.Internal, "%w", err)
}

// diskFault gives an error of the file system its kind.
func diskFault(op string, err error) error {
	kind := fault.Internal
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		kind = fault.Full
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EROFS):
		kind = fault.Denied
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, os.ErrExist):
		kind = fault.Invalid
	}
	return &fault.Error{Op: op, Kind: kind, Err: err}
}
