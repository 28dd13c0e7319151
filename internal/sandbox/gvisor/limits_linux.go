package gvisor

import (
	"context"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// Limits hold twice. Inside, where a process can be ended and the others told
// why: gVisor's kernel refuses forks, and init, who asks that kernel what is
// used, ends everything that runs when memory or disk are used up. Outside, in
// a cgroup around all of runsc, as bounds that not even a sandbox whose kernel
// the agent has taken over gets past. They are wider by what gVisor needs for
// itself: when the host's kernel has to enforce them, the sandbox is lost.

// What a sandbox may use when nobody said otherwise: as much as a local one.
const (
	defaultMemory    = 2 << 30
	defaultProcesses = 2048
	defaultDisk      = 10 << 30
)

// The least that a sandbox works with at all.
const (
	leastMemory    = 32 << 20
	leastProcesses = 32
	leastDisk      = 1 << 20
	leastCPU       = 10 // thousandths of a core
)

// What gVisor itself may use in the cgroup.
const (
	kernelMemory    = 128 << 20 // of the kernel, the file server and their page tables
	kernelProcesses = 512       // threads
)

// groupPrefix tells our cgroups from those of local sandboxes.
const groupPrefix = "gvisor-"

// sweepGroups removes the groups of guardians that were killed, whose folders
// somebody deleted.
func sweepGroups() error {
	return cgroup.Find().Sweep(time.Now(), func(name string) bool {
		id, ok := strings.CutPrefix(name, groupPrefix)
		return ok && validInstance(id)
	})
}

// effective fills in the defaults.
func effective(l sandbox.Limits) sandbox.Limits {
	if l.MemoryBytes == 0 {
		l.MemoryBytes = defaultMemory
		var info unix.Sysinfo_t
		if unix.Sysinfo(&info) == nil {
			l.MemoryBytes = max(min(l.MemoryBytes, int64(uint64(info.Totalram)*uint64(info.Unit))), leastMemory)
		}
	}
	if l.Processes == 0 {
		l.Processes = defaultProcesses
	}
	if l.DiskBytes == 0 {
		l.DiskBytes = defaultDisk
	}
	return l
}

// checkLimits refuses what no sandbox could live with.
func checkLimits(op string, l sandbox.Limits) error {
	for _, row := range []struct {
		name        string
		value, from int64
	}{
		{"bytes of memory", l.MemoryBytes, leastMemory},
		{"thousandths of a core", l.CPUMillis, leastCPU},
		{"processes", l.Processes, leastProcesses},
		{"bytes of disk", l.DiskBytes, leastDisk},
	} {
		if row.value != 0 && row.value < row.from {
			return fault.New(op, fault.Invalid, "a sandbox cannot live with %d %s, it needs %d", row.value, row.name, row.from)
		}
	}
	return nil
}

// reserve is how far the use of the disk, or of memory, may be above its limit
// when the file system, or the host, says no: the room in which init notices.
// The file system has the same once more, which init keeps back until it has
// ended everything: so there always is room to save the agent's work in.
func reserve(limit int64) int64 { return max(limit/8, 64<<20) }

// outer are the limits of the cgroup around a sandbox with the limits l.
func outer(l sandbox.Limits) sandbox.Limits {
	l.MemoryBytes += 2*reserve(l.MemoryBytes) + kernelMemory
	// For each of the agent's threads the host has one that runs it, and
	// gVisor's kernel may have one that waits for it.
	l.Processes = 3*l.Processes + kernelProcesses
	return l
}

// Unenforced returns CPU time where the host has no cgroup for it. All others
// are gVisor's own to enforce.
func (p *Provider) Unenforced(l sandbox.Limits) []sandbox.Limit {
	return slices.DeleteFunc(cgroup.Find().Missing(l), func(l sandbox.Limit) bool { return l != sandbox.CPULimit })
}

// openGroup makes the cgroup whose folders the record names, with its limits.
// A sandbox without one is better than none.
func (p *Provider) openGroup(ctx context.Context, group *cgroup.Group, l sandbox.Limits) {
	missing := cgroup.Find().Missing(l)
	if len(group.Paths()) > 0 {
		err := group.Make()
		if err == nil {
			err = group.Limit(outer(l))
		}
		if err == nil {
			missing, err = group.Missing(l)
		} else {
			missing = (cgroup.Place{}).Missing(l)
			if err := group.Remove(ctx); err != nil { // nobody is in it
				p.log.WarnContext(ctx, "cgroup not removed", "err", err)
			}
		}
		if err != nil {
			p.log.WarnContext(ctx, "the cgroup does not limit everything", "missing", missing, "err", err)
		}
	}
	if len(missing) == 0 || p.told.Swap(true) {
		return
	}
	var words []string
	for _, m := range missing {
		words = append(words, string(m))
	}
	p.log.WarnContext(ctx, "some limits of gVisor sandboxes are not enforced by the host, but by gVisor alone; and CPU time by nobody", "limits", strings.Join(words, ", "), "hint",
		"Run the worker as root, or in a cgroup that is its own, as with: systemd-run --user --scope -p Delegate=yes sandbox-temporal up")
}

// Usage asks the guardian.
func (p *Provider) Usage(ctx context.Context, ref sandbox.Ref) (sandbox.Usage, error) {
	const op = "gvisor: usage"
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return sandbox.Usage{}, err
	}
	defer a.Close()
	r, err := a.ask(ctx, op, request{Op: opUsage})
	if err != nil || r.Usage == nil {
		return sandbox.Usage{}, err
	}
	return *r.Usage, nil
}
