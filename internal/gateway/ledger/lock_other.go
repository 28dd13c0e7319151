//go:build !unix

package ledger

import (
	"os"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// lock is not to be had here, and without it two gateways could overspend.
func lock(string) (*os.File, error) {
	return nil, fault.New("lock ledger", fault.Unsupported, "the gateway needs a Unix system")
}

func diskFault(op string, err error) error {
	return &fault.Error{Op: op, Kind: fault.Internal, Err: err}
}
