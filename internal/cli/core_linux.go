package cli

import (
	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// dumpNoCore keeps what this process knows out of core files: an engine or
// worker that crashes knows keys. One byte is less than any core file has, and
// unlike zero it holds for those that the kernel hands to a program too (Linux,
// fs/coredump.c). What the process starts inherits it.
func dumpNoCore() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}); err != nil {
		return fault.New("forbid core files", fault.Internal, "%w", err)
	}
	return nil
}
