package local

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// What a sandbox may use when nobody said otherwise. CPU is not among it: a
// core that nobody else wants is an agent's to use, and where cgroups weigh
// sandboxes, they weigh the same.
const (
	// Eight agents fit on a host with 16 GB. An agent needs a few hundred
	// megabytes; the rest is for what it builds and tests.
	defaultMemory = 2 << 30

	// A parallel build of many-threaded tools stays below it, and eight
	// sandboxes stay below the 32,768 process ids that a host has by default.
	defaultProcesses = 2048

	// Dependencies and build caches of a large project fit, and no single
	// sandbox fills a developer's disk.
	defaultDisk = 10 << 30
)

// The least that a sandbox works with at all: init and a shell.
const (
	leastMemory    = 32 << 20
	leastProcesses = 32
	leastDisk      = 1 << 20
	leastCPU       = 10 // thousandths of a core; the kernel's own bound
)

// mostFiles bounds the descriptors of one process; the kernel's memory for
// them is accounted for nowhere but in a memory cgroup.
const mostFiles = 1 << 16

// initThreads is what init may have beside the agent's processes. Go's runtime
// starts a thread when a system call blocks, and gives up the whole program
// when it cannot.
const initThreads = 24

// effective fills in the defaults.
func effective(l sandbox.Limits, hostMemory int64) sandbox.Limits {
	if l.MemoryBytes == 0 {
		l.MemoryBytes = defaultMemory
		if hostMemory > 0 {
			l.MemoryBytes = max(min(l.MemoryBytes, hostMemory), leastMemory)
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

// hostMemory returns how many bytes this host has; 0: nobody knows.
func hostMemory() int64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return int64(uint64(info.Totalram) * uint64(info.Unit))
}

// Unenforced returns what no cgroup of this host enforces and nothing else
// makes up for.
func (p *Provider) Unenforced(l sandbox.Limits) []sandbox.Limit {
	return unenforced(cgroup.Find().Missing(l))
}

// unenforced leaves out what holds without a cgroup: a process limit by
// RLIMIT_NPROC, and memory because the supervisor watches it.
func unenforced(missing []sandbox.Limit) []sandbox.Limit {
	return slices.DeleteFunc(missing, func(l sandbox.Limit) bool {
		return l == sandbox.MemoryLimit || l == sandbox.ProcessLimit && countsByNamespace()
	})
}

// countsByNamespace reports whether RLIMIT_NPROC counts the processes of one
// user namespace and not all of the user's (since Linux 5.14).
func countsByNamespace() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 5 || major == 5 && minor >= 14
}

// limitHint says how a user gets what is missing.
const limitHint = "Run the worker as root, or in a cgroup that is its own, as with: systemd-run --user --scope -p Delegate=yes sandbox-temporal up"

// tellLimits logs, once for each provider, what nobody enforces here.
func (p *Provider) tellLimits(ctx context.Context, missing []sandbox.Limit) {
	if text := limitText(missing); text != "" && !p.told.Swap(true) {
		p.log.WarnContext(ctx, "some limits of sandboxes are not enforced by the kernel here", "limits", text, "hint", limitHint)
	}
}

// limitText says of each limit that no cgroup enforces what there is instead.
func limitText(missing []sandbox.Limit) string {
	var list []string
	for _, l := range missing {
		switch l {
		case sandbox.MemoryLimit:
			list = append(list, "memory is looked at once a second")
		case sandbox.ProcessLimit:
			if countsByNamespace() {
				continue
			}
			list = append(list, "processes are not limited")
		case sandbox.CPULimit:
			list = append(list, "CPU time is not limited")
		default:
			list = append(list, string(l)+" is not limited")
		}
	}
	return strings.Join(list, "; ")
}

// checkLimitsHere is what doctor says about limits.
func checkLimitsHere() Finding {
	place := cgroup.Find()
	f := Finding{Name: "limits", OK: true, Optional: true, Text: "memory, processes and CPU: cgroups in " + place.String() + "; disk: looked at the more often the less is left"}
	missing := place.Missing(effective(sandbox.Limits{CPUMillis: 1000}, hostMemory()))
	if text := limitText(missing); text != "" {
		f.OK, f.Text, f.Hint = false, text, limitHint
	}
	return f
}

// limitInit puts on init what every process of the sandbox inherits.
func limitInit(l sandbox.Limits, root bool) error {
	limits := map[int]uint64{
		unix.RLIMIT_NOFILE: mostFiles,
		// No single file is larger than everything together may be. It also
		// stops a sparse one.
		unix.RLIMIT_FSIZE: uint64(l.DiskBytes),
	}
	if root && countsByNamespace() {
		// Init is another user, so the agent's processes leave room for its
		// threads.
		limits[unix.RLIMIT_NPROC] = uint64(l.Processes)
	}
	// Not RLIMIT_AS and not RLIMIT_DATA: runtimes and sanitizers reserve
	// terabytes that they never touch.
	for which, most := range limits {
		if err := lower(which, most); err != nil {
			return err
		}
	}
	return nil
}

// limitProgram is for an init that is the agent's own user: were it limited
// itself, the agent could keep it from starting the threads that it needs.
func limitProgram(pid int, l sandbox.Limits) {
	if countsByNamespace() {
		most := uint64(l.Processes)
		_ = unix.Prlimit(pid, unix.RLIMIT_NPROC, &unix.Rlimit{Cur: most, Max: most}, nil) // it has ended, or had less
	}
}

// lower sets both the soft and the hard limit, and raises neither.
func lower(which int, most uint64) error {
	var now unix.Rlimit
	if err := unix.Getrlimit(which, &now); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	most = min(most, now.Max)
	// Not package unix's function: this one also keeps the runtime from
	// giving children the number of files that it found in the beginning.
	return os.NewSyscallError("setrlimit", syscall.Setrlimit(which, &syscall.Rlimit{Cur: most, Max: most}))
}
