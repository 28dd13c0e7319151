package sandbox

import (
	"encoding/json"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// NewRef makes the Ref of a sandbox whose provider keeps the handle in it, a
// struct of strings and numbers that is written as JSON.
func NewRef(provider string, version int, id string, handle any) Ref {
	b, err := json.Marshal(handle)
	if err != nil {
		panic(err) // strings and numbers always encode
	}
	return Ref{Provider: provider, Version: version, ID: id, Handle: string(b)}
}

// ReadHandle reads the handle back, for the provider and the version that
// wrote it. What it holds is not trusted by that: refs come from workflow
// history, which others can write to.
func (r Ref) ReadHandle(op, provider string, version int, handle any) error {
	if r.Provider != provider {
		return fault.New(op, fault.Invalid, "the sandbox is one of provider %q", r.Provider)
	}
	if r.Version != version {
		return fault.New(op, fault.Unsupported, "the reference to the sandbox is of version %d, this program reads %d", r.Version, version).
			Hinted("Run a worker of the version that made the sandbox.")
	}
	if err := json.Unmarshal([]byte(r.Handle), handle); err != nil {
		return fault.New(op, fault.Invalid, "read handle: %w", err)
	}
	return nil
}
