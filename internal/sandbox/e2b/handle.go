package e2b

import (
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// refVersion says how a handle is read. A handle of an older version must
// stay readable for as long as a workflow that holds one can run.
const refVersion = 1

// A handle is what a Ref of ours carries. E2B's id is another for each
// sandbox that had the key; the token is asked for anew by who attaches.
type handle struct {
	Key     string `json:"key"`
	Sandbox string `json:"sandbox"`
}

func (h handle) ref() sandbox.Ref {
	return sandbox.NewRef(ProviderName, refVersion, h.Key, h)
}

// readHandle trusts nothing: refs come from workflow history, and the fields
// become parts of addresses.
func readHandle(op string, ref sandbox.Ref) (handle, error) {
	var h handle
	if err := ref.ReadHandle(op, ProviderName, refVersion, &h); err != nil {
		return handle{}, err
	}
	if !sandbox.ValidID(h.Key) || !validMachineID(h.Sandbox) {
		return handle{}, fault.New(op, fault.Invalid, "the handle names no sandbox")
	}
	return h, nil
}
