package confine

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// Versions of Landlock's interface: the least that [Files] can use, because
// under an older one files cannot be moved between folders, and the first that
// bounds signals and abstract sockets.
const (
	LeastLandlock  = 2
	ScopedLandlock = 6
)

// Places are folders in which a confined process may write, with everything below
// them. Everywhere else it may read and execute what permissions let it.
type Places struct {
	Folders []string // files and folders of every kind can be made, changed, moved and removed
	Devices []string // what is there can be written to, and controlled by ioctl
	Process []string // what is there can be written to
}

// Files leaves this process and all it ever starts with those places, by
// Landlock: a second lock where mounts are read-only anyway, and the only one
// when a mount is found that is not. It works on every thread. Signals to and
// abstract sockets of who is not confined with this process are out of reach.
// A kernel whose Landlock is older than [LeastLandlock], or that has none, does
// without: see [LandlockABI].
func Files(p Places) error {
	const (
		read  = ll.AccessFSExecute | ll.AccessFSReadFile | ll.AccessFSReadDir
		write = ll.AccessFSWriteFile | ll.AccessFSTruncate
	)
	c := landlock.Config{HandledAccessFS: landlock.V11.HandledAccessFS, Scoped: landlock.V11.Scoped}
	rules := []landlock.Rule{landlock.RODirs("/")}
	if len(p.Folders) > 0 {
		rules = append(rules, landlock.RWDirs(p.Folders...).WithRefer())
	}
	if len(p.Devices) > 0 {
		rules = append(rules, landlock.PathAccess(read|write|ll.AccessFSIoctlDev, p.Devices...))
	}
	if len(p.Process) > 0 {
		rules = append(rules, landlock.PathAccess(read|write, p.Process...))
	}
	if err := c.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}

// LandlockABI returns the version of the kernel's Landlock; 0 when it has
// none, or had it switched off when it started.
func LandlockABI() int {
	v, err := ll.LandlockGetABIVersion()
	if err != nil {
		return 0
	}
	return v
}
