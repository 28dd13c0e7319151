package cli

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// How much room the state folder should have, and without how much nothing
// works, in bytes.
const (
	littleRoom = 5 << 30
	noRoom     = 100 << 20
)

// room looks at what local sandboxes have to share: the disk of the state
// folder, and the host's memory when each was promised a part of it.
func (c *checkup) room(cfg *config.Config) {
	const disk, memory = "disk", "memory"
	var st unix.Statfs_t
	if err := unix.Statfs(cfg.Home, &st); err == nil {
		free := int64(st.Bavail) * st.Bsize
		text := fmt.Sprintf("%s free in %s", roughly(free), cfg.Home)
		const hint = "Make room, or set SANDBOX_TEMPORAL_HOME to a folder on a larger disk; bases prune removes what no run starts from."
		switch {
		case free < noRoom:
			c.add(disk, fault.New("", fault.Full, "only %s", text).Hinted(hint), "")
		case free < littleRoom:
			c.poor(disk, "only "+text, hint)
		default:
			c.add(disk, nil, text)
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return
	}
	total := int64(info.Totalram) * int64(info.Unit)
	promised := cfg.Fork.Limits.MemoryBytes * int64(cfg.Fork.MaxConcurrent)
	if promised > total {
		c.poor(memory, fmt.Sprintf("%d forks at once may take %s together, the host has %s", cfg.Fork.MaxConcurrent, roughly(promised), roughly(total)),
			"Lower --memory (fork.memory) or --max-concurrent (fork.max_concurrent).")
		return
	}
	c.add(memory, nil, fmt.Sprintf("%s, for up to %d forks at once", roughly(total), cfg.Fork.MaxConcurrent))
}

func roughly(bytes int64) string { return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30)) }
