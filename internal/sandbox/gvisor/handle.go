package gvisor

import (
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// refVersion says how a handle is read. A handle of an older version must
// stay readable for as long as a workflow that holds one can run.
const refVersion = 1

// A handle is what a Ref of ours carries. Instance is random and made anew
// for each sandbox, so two sandboxes that had the same key one after the
// other are told apart. It is also what runsc calls the sandbox: all are of
// one length, as runsc takes the beginning of an id for the whole.
type handle struct {
	Key      string `json:"key"`
	Instance string `json:"instance"`
}

func (h handle) ref() sandbox.Ref {
	return sandbox.NewRef(ProviderName, refVersion, h.Key, h)
}

// readHandle trusts nothing: refs come from workflow history, which others
// can write to, and the fields become file names.
func readHandle(op string, ref sandbox.Ref) (handle, error) {
	var h handle
	if err := ref.ReadHandle(op, ProviderName, refVersion, &h); err != nil {
		return handle{}, err
	}
	if !sandbox.ValidID(h.Key) || !validInstance(h.Instance) {
		return handle{}, fault.New(op, fault.Invalid, "the handle names no sandbox")
	}
	return h, nil
}

// validInstance accepts 16 hexadecimal digits.
func validInstance(s string) bool {
	if len(s) != 16 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
