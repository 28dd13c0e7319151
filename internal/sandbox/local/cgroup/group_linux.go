package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A Group is the cgroup of one sandbox: a folder in each hierarchy that has a
// part in it. Its zero value is nobody's, and every method does nothing.
type Group struct {
	place Place
	parts []part
	dir   *os.File // of the part in v2
	ooms  counter
	why   error // why the part in v2 has fewer controllers than it might

	entered bool // what Enter's thread has started is in the parts of v1
}

// A part is one folder of a group.
type part struct {
	path string
	v1   string // the controller; empty: it lies in v2
}

// Group returns the group of that name, which is not made yet: whoever writes
// its Paths down first can find it again after a crash.
func (p Place) Group(name string) *Group {
	g := &Group{place: p}
	if p.unified != "" {
		g.parts = append(g.parts, part{path: filepath.Join(p.unified, prefix+name)})
	}
	for _, c := range append(slices.Clone(controllers), freezer) {
		if p.v1[c] != "" {
			g.parts = append(g.parts, part{filepath.Join(p.v1[c], prefix+name), c})
		}
	}
	return g
}

// Open returns the group with the given Paths, to be emptied and removed.
// What is not a group of ours is left out.
func Open(paths []string) *Group {
	g := &Group{}
	for _, path := range paths {
		switch {
		case !strings.HasPrefix(filepath.Base(path), prefix):
		case isUnified(path):
			g.parts = append(g.parts, part{path: path})
		case isV1(path):
			// The hierarchy is the folder above ours.
			g.parts = append(g.parts, part{path, filepath.Base(filepath.Dir(filepath.Dir(path)))})
		}
	}
	return g
}

// Paths returns the group's folders.
func (g *Group) Paths() []string {
	var all []string
	if g != nil {
		for _, p := range g.parts {
			all = append(all, p.path)
		}
	}
	return all
}

// tries is how often a folder is made anew that others, who thought that it
// was not needed any more, have just removed.
const tries = 20

// Make makes the folders, without limits. After an error the group must be
// removed.
func (g *Group) Make() error {
	if g == nil {
		return nil
	}
	for _, p := range g.parts {
		var err error
		for range tries {
			if err = g.prepare(p); err == nil {
				err = os.Mkdir(p.path, 0o755)
			}
			if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	if len(g.parts) > 0 && g.parts[0].v1 == "" {
		var err error
		if g.dir, err = os.OpenFile(g.parts[0].path, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
			return err
		}
	}
	return nil
}

// Limit sets the limits of a group that was made; 0 is none. What the kernel
// does not let the group enforce after all, Missing says.
func (g *Group) Limit(l sandbox.Limits) error {
	if g == nil {
		return nil
	}
	for _, p := range g.parts {
		if err := p.limit(l); err != nil {
			return err
		}
	}
	if l.MemoryBytes > 0 {
		return g.openOOMs()
	}
	return nil
}

// prepare makes what has to be there before the folder of the part.
func (g *Group) prepare(p part) error {
	above := filepath.Dir(p.path)
	if p.v1 != "" || g.place.ours {
		err := os.Mkdir(above, 0o755)
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if err == nil && p.v1 == cpu {
			// In v1 a group at the top weighs as much as a single process
			// there. All sandboxes together get the weight of one busy
			// process on each core; among themselves they are equal.
			if err := write(above, "cpu.shares", strconv.Itoa(1024*runtime.NumCPU())); err != nil {
				return err
			}
		}
	}
	if p.v1 != "" {
		return nil
	}
	// A group that some controller is kept from is better than none.
	g.why = nil
	if g.place.lift {
		g.why = handDown(filepath.Dir(above), g.place.hands)
	}
	if g.place.divide {
		g.why = errors.Join(g.why, moveIntoLeaf(above))
	}
	g.why = errors.Join(g.why, handDown(above, g.place.hands))
	return nil
}

// handDown switches on those of the controllers that we use and that are not.
func handDown(dir string, hands []string) error {
	on := words(dir, "cgroup.subtree_control")
	var errs []error
	for _, c := range hands {
		if slices.Contains(controllers, c) && !slices.Contains(on, c) {
			errs = append(errs, write(dir, "cgroup.subtree_control", "+"+c))
		}
	}
	return errors.Join(errs...)
}

// Missing returns which of the limits the group, once made, does not enforce,
// and why not, as far as that is known.
func (g *Group) Missing(l sandbox.Limits) ([]sandbox.Limit, error) {
	if g == nil {
		g = &Group{}
	}
	m := missing(l, func(c string) bool { return slices.ContainsFunc(g.parts, func(p part) bool { return p.has(c) }) })
	if len(m) == 0 {
		return nil, nil
	}
	return m, g.why
}

// has reports whether the part enforces what the controller does.
func (p part) has(controller string) bool {
	if p.v1 != "" {
		return p.v1 == controller
	}
	// The kernel lists what was handed down, and has made the files of it.
	return slices.Contains(words(p.path, "cgroup.controllers"), controller)
}

// moveIntoLeaf makes room for controllers: in v2 a group that hands some down
// holds no processes.
func moveIntoLeaf(dir string) error {
	to := filepath.Join(dir, leaf)
	if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	for range tries { // they fork meanwhile
		procs := words(dir, "cgroup.procs")
		if len(procs) == 0 {
			return nil
		}
		for _, pid := range procs {
			if err := write(to, "cgroup.procs", pid); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
	}
	return fmt.Errorf("%s: processes keep coming", dir)
}

// limit sets what the part enforces.
func (p part) limit(l sandbox.Limits) error {
	if l.MemoryBytes > 0 && p.has(memory) {
		if err := p.limitMemory(l.MemoryBytes); err != nil {
			return err
		}
	}
	if l.Processes > 0 && p.has(pids) {
		if err := write(p.path, "pids.max", strconv.FormatInt(l.Processes, 10)); err != nil {
			return err
		}
	}
	if l.CPUMillis > 0 && p.has(cpu) {
		const period = 100_000 // microseconds; the kernel's own default
		quota := l.CPUMillis * period / 1000
		if p.v1 == "" {
			return write(p.path, "cpu.max", fmt.Sprintf("%d %d", quota, period))
		}
		return errors.Join(write(p.path, "cpu.cfs_period_us", strconv.Itoa(period)), write(p.path, "cpu.cfs_quota_us", strconv.FormatInt(quota, 10)))
	}
	return nil
}

// limitMemory also keeps the group from swapping, where the kernel can.
func (p part) limitMemory(bytes int64) error {
	most := strconv.FormatInt(bytes, 10)
	if p.v1 == "" {
		if err := write(p.path, "memory.max", most); err != nil {
			return err
		}
		// memory.oom.group stays off. It would kill init too, and with it the
		// sandbox whose files are still worth having, unless init were
		// exempt (oom_score_adj -1000). But who is given that by somebody
		// privileged passes the right to it on to all children
		// (oom_score_adj_min), and the agent would be exempt as well. So the
		// kernel chooses a victim, and the supervisor, who hears of it, has
		// init kill the others.
		return ignoreGone(write(p.path, "memory.swap.max", "0"))
	}
	if err := write(p.path, "memory.limit_in_bytes", most); err != nil {
		return err
	}
	err := write(p.path, "memory.memsw.limit_in_bytes", most)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) {
		// The kernel does not account for swap; at least it avoids it.
		err = ignoreGone(write(p.path, "memory.swappiness", "0"))
	}
	return err
}

// Dir returns the group's folder in v2, into which the kernel can put a new
// process at once (clone3(2), CLONE_INTO_CGROUP); nil where there is none.
func (g *Group) Dir() *os.File {
	if g == nil {
		return nil
	}
	return g.dir
}

// Add puts the process with all its threads into the group. With cloned, the
// kernel has put it into Dir already; after Enter it is in the parts of v1. Each
// write can take milliseconds.
func (g *Group) Add(pid int, cloned bool) error {
	if g == nil {
		return nil
	}
	for _, p := range g.parts {
		if p.v1 == "" && cloned || p.v1 != "" && g.entered {
			continue
		}
		if err := write(p.path, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return err
		}
	}
	return nil
}

// Pids returns who lives in the group, as this process sees them.
func (g *Group) Pids() []int {
	if g == nil || len(g.parts) == 0 {
		return nil
	}
	var all []int
	for _, w := range words(g.parts[0].path, "cgroup.procs") {
		if pid, err := strconv.Atoi(w); err == nil && pid > 0 {
			all = append(all, pid)
		}
	}
	return all
}

// Close lets go of what Make opened. The group lives on.
func (g *Group) Close() {
	if g == nil {
		return
	}
	if g.dir != nil {
		_ = g.dir.Close()
	}
	g.ooms.close()
}

func write(dir, name, text string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// ignoreGone is for files that the kernel may not have, or not any more.
func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
