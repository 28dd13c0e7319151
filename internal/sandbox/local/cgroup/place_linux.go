// Package cgroup holds the processes of one sandbox together, to limits that
// stand before the first of them is there.
//
// A [Place] says where this process may make groups, and which limits they
// can have there; a [Group] is one sandbox's. On a host with cgroup v2 a group
// is one folder. On older hosts, where controllers still are hierarchies of
// their own, it is one folder in each that carries a limit, beside the one of
// v2 if there is any.
//
// # Where groups are made
//
// In a folder that was delegated to this process's service (by systemd's mark,
// or because an ordinary user owns it): groups are made below it, so that what
// the administrator allows the service bounds its sandboxes too. A group that
// hands controllers down may hold no processes of its own, so the ones that
// live there move into a leaf beside the sandboxes. That is done only where
// the delegation says that the folder is ours to divide, or where nobody but
// this program lives in it.
//
// Otherwise, as root, in a folder of our own at the top of the hierarchy, as
// other programs that run containers have one: a session's or a service's own
// group belongs to systemd, which may remove what it finds in it. Controllers
// are switched on in our folder only. In the top group they are what whoever
// manages the host has switched on there; where no systemd does, we add the
// ones that are missing and take none away.
package cgroup

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

const (
	mountPoint = "/sys/fs/cgroup"

	prefix = "sandbox-temporal-"     // of every group's name
	folder = "sandbox-temporal"      // our own, which holds groups and nothing else
	leaf   = "sandbox-temporal.self" // in a divided folder: those who lived there
)

// The controllers that we have a use for, and the part of a sandbox.Limits
// that each enforces. The freezer of v1 is a part of v2 itself.
const (
	memory  = "memory"
	cpu     = "cpu"
	pids    = "pids"
	freezer = "freezer"
)

var controllers = []string{memory, cpu, pids}

// A Place is where this process may make groups. The zero Place is nowhere.
type Place struct {
	unified string            // the folder of v2 that groups are made in; empty: none
	hands   []string          // what groups in it can be limited by
	ours    bool              // it is our own folder: made with the first group, removed after the last
	lift    bool              // the group above our folder has to hand down more than it does
	divide  bool              // processes live in it and have to move into a leaf
	v1      map[string]string // for controllers that are hierarchies of their own: our folder there
}

// Find looks where this process may make groups. It changes nothing.
func Find() Place { return find(mountPoint, os.Geteuid() == 0) }

func find(mount string, root bool) Place {
	var p Place
	for _, top := range []string{mount, filepath.Join(mount, "unified")} {
		if isUnified(top) {
			p.findUnified(top, root)
			break
		}
	}
	p.v1 = map[string]string{}
	for _, c := range append([]string{freezer}, controllers...) {
		dir := filepath.Join(mount, c)
		if slices.Contains(p.hands, c) || c == freezer && p.unified != "" {
			continue
		}
		// Only root: v1 has no safe delegation (cgroup-v1/cgroups.txt leaves
		// it to file permissions, with which a user could undo a limit).
		if root && isV1(dir) && unix.Access(dir, unix.W_OK) == nil {
			p.v1[c] = filepath.Join(dir, folder)
		}
	}
	return p
}

// findUnified chooses the folder of v2 that groups are made in.
func (p *Place) findUnified(top string, root bool) {
	own := ownGroup(top)
	for _, dir := range []string{own, filepath.Dir(own)} {
		if own != "" && within(top, dir) && delegated(dir) && writable(dir) {
			p.use(dir, true)
			return
		}
	}
	// Below a container's own top group everything is the container's.
	_, err := os.Stat(filepath.Join(top, "cgroup.events"))
	contained := err == nil
	switch {
	case own == "" || !isUnified(own):
	case contained && (own == top || filepath.Base(own) == leaf && filepath.Dir(own) == top) && writable(top):
		p.use(top, true)
		return
	case !root && filepath.Base(own) == leaf && writable(filepath.Dir(own)):
		p.use(filepath.Dir(own), false)
		return
	case !root && writable(own):
		p.use(own, onlyUs(own))
		return
	}
	if !root || unix.Access(top, unix.W_OK) != nil {
		return
	}
	p.unified, p.ours = filepath.Join(top, folder), true
	p.hands = words(top, "cgroup.subtree_control")
	if managed() || contained {
		return
	}
	for _, c := range words(top, "cgroup.controllers") {
		if slices.Contains(controllers, c) && !slices.Contains(p.hands, c) {
			p.hands, p.lift = append(p.hands, c), true
		}
	}
}

// use makes groups in dir, which is not our own. What it hands down already
// they can have in any case, the rest only when nobody lives in it or those
// who do may be moved.
func (p *Place) use(dir string, divisible bool) {
	p.unified, p.hands = dir, words(dir, "cgroup.subtree_control")
	empty := len(words(dir, "cgroup.procs")) == 0
	if empty || divisible {
		p.hands, p.divide = words(dir, "cgroup.controllers"), !empty
	}
}

// Missing returns which of the limits groups made here would not enforce. A
// limit of 0 is none, and what l says of disk is nothing for a cgroup.
func (p Place) Missing(l sandbox.Limits) []sandbox.Limit {
	return missing(l, func(c string) bool { return slices.Contains(p.hands, c) || p.v1[c] != "" })
}

func missing(l sandbox.Limits, enforced func(controller string) bool) []sandbox.Limit {
	var missing []sandbox.Limit
	for _, row := range []struct {
		asked      bool
		controller string
		limit      sandbox.Limit
	}{
		{l.MemoryBytes > 0, memory, sandbox.MemoryLimit},
		{l.CPUMillis > 0, cpu, sandbox.CPULimit},
		{l.Processes > 0, pids, sandbox.ProcessLimit},
	} {
		if row.asked && !enforced(row.controller) {
			missing = append(missing, row.limit)
		}
	}
	return missing
}

// String names the folders, for people.
func (p Place) String() string {
	var all []string
	if p.unified != "" {
		all = append(all, p.unified)
	}
	for _, c := range append(slices.Clone(controllers), freezer) {
		if p.v1[c] != "" {
			all = append(all, p.v1[c])
		}
	}
	if len(all) == 0 {
		return "nowhere"
	}
	return strings.Join(all, " ")
}

// ownGroup returns this process's folder in the hierarchy of v2 mounted at
// top, or "".
func ownGroup(top string) string {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(b) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "0::"); ok {
			if dir := filepath.Join(top, rest); within(top, dir) && isUnified(dir) {
				return dir
			}
		}
	}
	return ""
}

func within(top, dir string) bool { return dir == top || strings.HasPrefix(dir, top+"/") }

// delegated reports whether systemd has marked the group as its service's own
// to divide (systemd.resource-control(5), Delegate=).
func delegated(dir string) bool {
	for _, name := range []string{"trusted.delegate", "user.delegate"} {
		var value [8]byte
		if n, err := unix.Getxattr(dir, name, value[:]); err == nil && string(value[:n]) == "1" {
			return true
		}
	}
	return false
}

// writable reports whether we can make groups in dir, hand controllers down
// and move processes within.
func writable(dir string) bool {
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if unix.Access(filepath.Join(dir, name), unix.W_OK) != nil {
			return false
		}
	}
	return true
}

// onlyUs reports whether nobody lives in the group but processes of this
// program: older versions of systemd do not mark what they delegate.
func onlyUs(dir string) bool {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return false
	}
	for _, pid := range words(dir, "cgroup.procs") {
		exe, err := os.Readlink("/proc/" + pid + "/exe")
		if os.IsNotExist(err) {
			continue // it has ended
		}
		if err != nil {
			return false
		}
		// Our programs lie beside each other.
		beside := filepath.Dir(exe) == filepath.Dir(self) && strings.HasPrefix(filepath.Base(exe), "sandbox-")
		if exe != self && !beside {
			return false
		}
	}
	return true
}

// managed reports whether systemd manages this host's groups (sd_booted(3)).
func managed() bool {
	_, err := os.Lstat("/run/systemd/system")
	return err == nil
}

// isUnified reports whether dir lies in a mounted cgroup2 file system. What
// looks like a group can be a plain folder where one was mounted once.
func isUnified(dir string) bool { return fileSystem(dir) == unix.CGROUP2_SUPER_MAGIC }

// isV1 is the same of the older file system.
func isV1(dir string) bool { return fileSystem(dir) == unix.CGROUP_SUPER_MAGIC }

func fileSystem(dir string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0
	}
	return int64(st.Type)
}

// words reads a small file of the kernel's.
func words(dir, name string) []string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}
