package endpoint

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Prepare makes the state folder when it is missing, and refuses one that
// others could look into or plant files in: whoever reaches the control socket
// can have commands run. It is fault.Denied when the folder is not ours, not
// private, or cannot be made.
func Prepare(dir string) error {
	const op = "state folder"
	if dir == "" {
		return fault.New(op, fault.Invalid, "no folder was named")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return diskFault(op, dir, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return diskFault(op, dir, err)
	}
	if uid := os.Geteuid(); int(st.Uid) != uid {
		return fault.New(op, fault.Denied, "%s belongs to user %d, not to %d who runs this", dir, st.Uid, uid).
			Hinted("Run this as its owner, or set SANDBOX_TEMPORAL_HOME to a folder of your own.")
	}
	if mode := st.Mode & 0o777; mode != 0o700 {
		return fault.New(op, fault.Denied, "%s has mode %#o, which is not 0700", dir, mode).
			Hinted("Run chmod 700 %s, or set SANDBOX_TEMPORAL_HOME to another folder.", dir)
	}
	return nil
}

// diskFault classes what a file system refused to do under dir.
func diskFault(op, dir string, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return fault.New(op, fault.Denied, "%w", err).
			Hinted("Nothing can be written in %s: set SANDBOX_TEMPORAL_HOME to a folder that can be written.", dir)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
		return fault.New(op, fault.Invalid, "%w", err).
			Hinted("%s cannot be a folder: set SANDBOX_TEMPORAL_HOME to another path.", dir)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fault.New(op, fault.Full, "%w", err).
			Hinted("Free some space, or set SANDBOX_TEMPORAL_HOME to a folder on another disk.")
	}
	return fault.New(op, fault.Internal, "%w", err)
}
