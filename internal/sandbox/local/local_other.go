//go:build !linux

package local

import (
	"context"
	"fmt"
	"os"
	"runtime"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func unsupported(op string) error {
	return fault.New("local: "+op, fault.Unsupported, "sandboxes on this machine need Linux, and this is %s", runtime.GOOS).
		Hinted("Run the worker on Linux, in a virtual machine for instance, or use another provider.")
}

// A spares would be what is kept ready.
type spares struct{ most int }

// Close has nothing to do.
func (p *Provider) Close() {}

// Create fails with fault.Unsupported.
func (p *Provider) Create(context.Context, sandbox.Spec) (sandbox.Ref, error) {
	return sandbox.Ref{}, unsupported("create sandbox")
}

// Attach fails with fault.Unsupported.
func (p *Provider) Attach(context.Context, sandbox.Ref) (sandbox.Sandbox, error) {
	return nil, unsupported("attach")
}

// Destroy fails with fault.Unsupported.
func (p *Provider) Destroy(context.Context, sandbox.Ref) error {
	return unsupported("destroy sandbox")
}

// List returns nothing: there can be no sandbox here.
func (p *Provider) List(context.Context, map[string]string) ([]sandbox.Info, error) { return nil, nil }

// Base fails with fault.Unsupported.
func (p *Provider) Base(context.Context, string) error { return unsupported("look up base") }

// Snapshot fails with fault.Unsupported.
func (p *Provider) Snapshot(context.Context, sandbox.Ref, string) error {
	return unsupported("snapshot sandbox")
}

// Bases returns nothing: there can be no base here.
func (p *Provider) Bases(context.Context) ([]sandbox.BaseInfo, error) { return nil, nil }

// RemoveBase has nothing to do.
func (p *Provider) RemoveBase(context.Context, string) error { return nil }

// Freeze fails with fault.Unsupported.
func (p *Provider) Freeze(context.Context, sandbox.Ref, string) error {
	return unsupported("freeze sandbox")
}

// Pause fails with fault.Unsupported.
func (p *Provider) Pause(context.Context, sandbox.Ref) error { return unsupported("pause sandbox") }

// Resume fails with fault.Unsupported.
func (p *Provider) Resume(context.Context, sandbox.Ref) error { return unsupported("resume sandbox") }

// OpenTerminal fails with fault.Unsupported.
func (p *Provider) OpenTerminal(context.Context, sandbox.Ref, sandbox.Cmd, sandbox.TerminalSize) (sandbox.Terminal, error) {
	return nil, unsupported("open terminal")
}

// DialPort fails with fault.Unsupported.
func (p *Provider) DialPort(context.Context, sandbox.Ref, int) (sandbox.Conn, error) {
	return nil, unsupported("dial port")
}

// Unenforced returns everything that is asked for.
func (p *Provider) Unenforced(l sandbox.Limits) []sandbox.Limit {
	var all []sandbox.Limit
	for limit, asked := range map[sandbox.Limit]int64{
		sandbox.MemoryLimit: l.MemoryBytes, sandbox.CPULimit: l.CPUMillis, sandbox.ProcessLimit: l.Processes, sandbox.DiskLimit: l.DiskBytes,
	} {
		if asked > 0 {
			all = append(all, limit)
		}
	}
	return all
}

// Usage fails with fault.Unsupported.
func (p *Provider) Usage(context.Context, sandbox.Ref) (sandbox.Usage, error) {
	return sandbox.Usage{}, unsupported("usage")
}

// Supervise says that it cannot and returns 1.
func Supervise([]string) int {
	fmt.Fprintln(os.Stderr, unsupported("supervise"))
	return 1
}

// Check returns the one finding that matters.
func Check(context.Context, Options) []Finding {
	err := unsupported("check")
	return []Finding{{Name: "local sandboxes", Text: err.Error(), Hint: fault.HintOf(err)}}
}
