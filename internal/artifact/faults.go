package artifact

import (
	"context"
	"errors"
	"io/fs"
	"syscall"

	"gocloud.dev/gcerrors"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// classed gives an error of the blob store its kind.
func classed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return &fault.Error{Kind: fault.Cancelled, Err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &fault.Error{Kind: fault.Unavailable, Err: err, Hint: hintServer}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &fault.Error{Kind: fault.Full, Err: err, Hint: "Free some space on the disk that holds the artifact store, then try again."}
	case errors.Is(err, syscall.ENOTDIR):
		return &fault.Error{Kind: fault.Invalid, Err: err, Hint: "Set SANDBOX_TEMPORAL_ARTIFACTS to a folder."}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return &fault.Error{Kind: fault.Denied, Err: err, Hint: "Let the worker's user write to the artifact store."}
	}
	if e := answered(err); e != nil {
		return e
	}
	switch gcerrors.Code(err) {
	case gcerrors.NotFound:
		return &fault.Error{Kind: fault.NotFound, Err: err}
	case gcerrors.PermissionDenied:
		return &fault.Error{Kind: fault.Denied, Err: err}
	case gcerrors.ResourceExhausted, gcerrors.DeadlineExceeded:
		return &fault.Error{Kind: fault.Unavailable, Err: err}
	}
	return err
}

// missing reports whether err says that an object is not there.
func missing(err error) bool { return err != nil && fault.KindOf(classed(err)) == fault.NotFound }
