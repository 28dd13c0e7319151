package e2b

import (
	"encoding/json"

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
	b, err := json.Marshal(h)
	if err != nil {
		panic(err) // strings always encode
	}
	return sandbox.Ref{Provider: ProviderName, Version: refVersion, ID: h.Key, Handle: string(b)}
}

// readHandle trusts nothing: refs come from workflow history, and the fields
// become parts of addresses.
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
	if !sandbox.ValidID(h.Key) || !validMachineID(h.Sandbox) {
		return handle{}, fault.New(op, fault.Invalid, "the handle names no sandbox")
	}
	return h, nil
}
