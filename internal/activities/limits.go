package activities

import (
	"fmt"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// exceeded says which limit a sandbox reached, with its size when the user
// chose it.
func exceeded(l sandbox.Limit, asked fork.Limits) string {
	var text string
	var size int64
	switch l {
	case sandbox.MemoryLimit:
		text, size = "its sandbox needed more memory than it may have", asked.MemoryBytes
	case sandbox.DiskLimit:
		text, size = "its sandbox wrote more to disk than it may", asked.DiskBytes
	default:
		return fmt.Sprintf("its sandbox reached the limit of %s", l)
	}
	if size > 0 {
		text += ", " + fork.FormatBytes(size)
	}
	return text
}

// more is the hint of how to get past a limit.
func more(l sandbox.Limit) string {
	switch l {
	case sandbox.MemoryLimit:
		return "Give each sandbox more with --memory SIZE; a host that has no more can run fewer at once, with --max-concurrent."
	case sandbox.DiskLimit:
		return "Let each sandbox write more with --disk SIZE."
	}
	return ""
}

// limitFault is the error of a command that a limit ended, or nil.
func limitFault(op string, exit sandbox.Exit, asked fork.Limits) error {
	if exit.Limit == "" {
		return nil
	}
	return fault.New(op, fault.Invalid, "%s", exceeded(exit.Limit, asked)).Hinted("%s", more(exit.Limit))
}
