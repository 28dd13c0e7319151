package cgroup

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Usage returns what the group uses now. What nobody counts here is 0: of a
// group in v1 alone, CPU time is known only where its accounting shares the
// hierarchy.
func (g *Group) Usage() sandbox.Usage {
	var u sandbox.Usage
	if g == nil {
		return u
	}
	for _, p := range g.parts {
		switch p.v1 {
		case "":
			u.MemoryBytes = p.memory("memory.current", "inactive_file")
			u.Processes = p.number("pids.current")
			u.CPU = time.Duration(p.field("cpu.stat", "usage_usec")) * time.Microsecond
		case memory:
			u.MemoryBytes = p.memory("memory.usage_in_bytes", "total_inactive_file")
		case pids:
			u.Processes = p.number("pids.current")
		case cpu:
			if u.CPU == 0 {
				u.CPU = time.Duration(p.number("cpuacct.usage"))
			}
		}
	}
	return u
}

// memory leaves out the files that the kernel keeps only while nobody needs
// the room.
func (p part) memory(total, idle string) int64 {
	all := p.number(total)
	return max(0, all-int64(p.field("memory.stat", idle)))
}

func (p part) number(name string) int64 {
	w := words(p.path, name)
	if len(w) != 1 {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(w[0]), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (p part) field(name, word string) int {
	b, err := os.ReadFile(filepath.Join(p.path, name))
	if err != nil {
		return 0
	}
	return field(b, word)
}
