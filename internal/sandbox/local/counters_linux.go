package local

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Some things the kernel counts for each user, and for a sandbox against the
// user who runs the worker, root included: without bounds of its own an agent
// can use them up for that user everywhere on the host.

// part is the share of such a counter that one sandbox may use: one of so
// many parts.
const part = 8

// boundWatches bounds, for the user namespace that this process is root of,
// what is counted by the namespace. It needs a /proc that can be written to.
// A kernel that lacks one of the files has one way less.
func boundWatches() {
	const below = "/proc/sys/user/"
	for name, of := range map[string]string{
		"max_inotify_instances": "/proc/sys/fs/inotify/max_user_instances",
		"max_inotify_watches":   "/proc/sys/fs/inotify/max_user_watches",
	} {
		text, err := os.ReadFile(of)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil {
			_ = os.WriteFile(below+name, strconv.AppendInt(nil, max(1, n/part), 10), 0)
		}
	}
	for _, name := range []string{"max_user_namespaces", "max_fanotify_groups", "max_fanotify_marks"} {
		_ = os.WriteFile(below+name, []byte("0"), 0)
	}
}

// boundQueues bounds what is counted by limits of processes: signals that
// wait, timers among them, and the bytes of message queues. What this process
// may use now is what the worker's user may.
func boundQueues() error {
	for _, resource := range []int{unix.RLIMIT_SIGPENDING, unix.RLIMIT_MSGQUEUE} {
		var now unix.Rlimit
		if err := unix.Getrlimit(resource, &now); err != nil {
			return os.NewSyscallError("getrlimit", err)
		}
		if now.Max == unix.RLIM_INFINITY {
			continue // of that nobody can have too little
		}
		now.Max /= part
		now.Cur = now.Max
		if err := unix.Setrlimit(resource, &now); err != nil {
			return os.NewSyscallError("setrlimit", err)
		}
	}
	return nil
}
