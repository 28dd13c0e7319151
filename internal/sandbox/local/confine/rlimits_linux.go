package confine

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// rlimits are the most that a process may have, of what the kernel keeps in
// memory of its own or what works on the whole host. A user who is allowed
// less gets less.
var rlimits = []struct {
	resource int
	name     string
	most     uint64
}{
	{unix.RLIMIT_CORE, "core", 1},                 // byte, which is none; see Neighbours
	{unix.RLIMIT_NOFILE, "nofile", 65536},         // build tools watch whole trees
	{unix.RLIMIT_MEMLOCK, "memlock", 8 << 20},     // bytes; what the kernel gives a process by itself
	{unix.RLIMIT_SIGPENDING, "sigpending", 16384}, // signals and timers, of a whole sandbox
	{unix.RLIMIT_MSGQUEUE, "msgqueue", 819200},    // bytes; what the kernel gives
	{unix.RLIMIT_RTPRIO, "rtprio", 0},             // no real-time scheduling, which starves others
	{unix.RLIMIT_NICE, "nice", 0},                 // no priority above the ordinary one
}

// Resources bounds what this process and all it ever starts can have open,
// locked or pending. None of it can be raised again.
func Resources() error {
	for _, l := range rlimits {
		var now unix.Rlimit
		if err := unix.Getrlimit(l.resource, &now); err != nil {
			return os.NewSyscallError("getrlimit", err)
		}
		hard := min(now.Max, l.most)
		if err := unix.Setrlimit(l.resource, &unix.Rlimit{Cur: hard, Max: hard}); err != nil {
			return fmt.Errorf("limit of %s to %d: %w", l.name, hard, os.NewSyscallError("setrlimit", err))
		}
	}
	return nil
}
