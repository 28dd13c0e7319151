package gvisor

import (
	"encoding/json"

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
	b, err := json.Marshal(h)
	if err != nil {
		panic(err) // strings always encode
	}
	return sandbox.Ref{Provider: ProviderName, Version: refVersion, ID: h.Key, Handle: string(b)}
}

// readHandle trusts nothing: refs come from workflow history, which others
// can write to, and the fields become file names.
func readHandle(op string, ref sandbox.Ref) (handle, error) {
	if ref.Provider != ProviderName {
		return handle{}, fault.New(op, fault.Invalid, "the sandbox is one of provider %q", ref.Provider)
	}
	if ref.Version != refVersion {
		return handle{}, fault.New(op, fault.Unsupported, "the reference to the sandbox is of version %d, this program reads %d", ref.Version, refVersion).
			Hinted("Run a worker of the version that made the sandbox.")
	}
	var h handle
	if err := json.Unmarshal([]byte(ref.Handle), &h); err != nil {
		return handle{}, fault.New(op, fault.Invalid, "read handle: %w", err)
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
