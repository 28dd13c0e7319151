//go:build !linux

package fake

import (
	"context"
	"runtime"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// OpenTerminal fails with fault.Unsupported: terminals are made another way on
// every system.
func (p *Provider) OpenTerminal(context.Context, sandbox.Ref, sandbox.Cmd, sandbox.TerminalSize) (sandbox.Terminal, error) {
	return nil, fault.New("fake: open terminal", fault.Unsupported, "not on %s", runtime.GOOS)
}
