package gvisor

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A record is what spec.json holds: all that a guardian needs to know, and
// all that List says without asking one.
type record struct {
	Version  int               `json:"version"`
	Key      string            `json:"key"`
	Instance string            `json:"instance"`
	Created  time.Time         `json:"created"`
	Deadline time.Time         `json:"deadline"` // as asked at first; SetDeadline does not change it here
	Labels   map[string]string `json:"labels,omitempty"`
	Mounts   []sandbox.Mount   `json:"mounts,omitempty"`
	Seen     []string          `json:"seen,omitempty"`    // what Runsc and the sources of Mounts were when the sandbox was made, see seen
	Gateway  string            `json:"gateway,omitempty"` // the path of the socket
	Dir      string            `json:"dir"`               // the state folder
	Base     string            `json:"base,omitempty"`
	Limits   sandbox.Limits    `json:"limits"`
	Cgroups  []string          `json:"cgroups,omitempty"` // the folders of its cgroup; written before they are made
	Identity identity          `json:"identity"`
	Runsc    string            `json:"runsc"`
	Program  string            `json:"program"`        // what init is
	From     string            `json:"from,omitempty"` // the folder of a checkpoint: of a live fork
}

const recordVersion = 1

// maxMounts keeps what runsc needs for all mounts within reason.
const maxMounts = 100

// check reads a Spec the way a stranger's form is read, and fills the record
// as far as the spec decides it.
func (p *Provider) check(op string, s sandbox.Spec) (record, error) {
	bad := func(format string, args ...any) (record, error) {
		return record{}, fault.New(op, fault.Invalid, format, args...)
	}
	if !sandbox.ValidID(s.Key) {
		return bad("%q is not a key of a sandbox", s.Key)
	}
	if s.Base != "" && !sandbox.ValidID(s.Base) {
		return bad("%q is not a key of a base", s.Base)
	}
	if s.Deadline.IsZero() {
		return bad("a sandbox needs a deadline")
	}
	if !s.Deadline.After(time.Now()) {
		return record{}, fault.New(op, fault.Timeout, "the deadline of the sandbox has passed already: %s", s.Deadline.Format(time.RFC3339))
	}
	gateway, isUnix := strings.CutPrefix(s.Gateway, "unix:")
	if s.Gateway != "" && (!isUnix || !cleanAbsolute(gateway)) {
		return bad("the gateway %q is not unix: and a clean absolute path", s.Gateway)
	}
	if len(s.Mounts) > maxMounts {
		return bad("%d mounts, at most %d can be made", len(s.Mounts), maxMounts)
	}
	// The order of the mounts is that of their targets, so that a mount
	// within a mount comes after it.
	mounts := slices.Clone(s.Mounts)
	slices.SortFunc(mounts, func(a, b sandbox.Mount) int { return strings.Compare(a.Target, b.Target) })
	for _, m := range mounts {
		if err := checkMount(op, m); err != nil {
			return record{}, err
		}
	}
	if err := checkLimits(op, s.Limits); err != nil {
		return record{}, err
	}
	dir, err := filepath.Abs(p.dir)
	if err != nil || p.dir == "" || len(dir) > 3000 {
		return bad("%q cannot be a state folder", p.dir)
	}
	if len(p.guardian) == 0 {
		return bad("no guardian program was named")
	}
	return record{
		Version: recordVersion, Key: s.Key, Instance: newInstance(), Created: time.Now().UTC(), Deadline: s.Deadline,
		Labels: s.Labels, Mounts: mounts, Gateway: gateway, Dir: dir, Base: s.Base, Limits: effective(s.Limits), Identity: currentIdentity(),
	}, nil
}

func checkMount(op string, m sandbox.Mount) error {
	if !cleanAbsolute(m.Source) || !cleanAbsolute(m.Target) || m.Target == "/" {
		return fault.New(op, fault.Invalid, "mount %q at %q: both must be clean absolute paths", m.Source, m.Target)
	}
	for _, taken := range []string{"/proc", "/dev", "/sys", insideDir, sandbox.Workspace} {
		if m.Target == taken || strings.HasPrefix(m.Target, taken+"/") {
			return fault.New(op, fault.Invalid, "mount %q: nothing can be mounted below %s", m.Target, taken)
		}
	}
	st, err := os.Stat(m.Source)
	if err != nil {
		return fault.New(op, fault.Invalid, "mount: %w", err)
	}
	if !st.Mode().IsRegular() && !st.IsDir() {
		return fault.New(op, fault.Invalid, "mount %q: neither a file nor a folder", m.Source)
	}
	return nil
}

// look notes what the sandbox is made with, as it is now.
func (r *record) look() error {
	r.Seen = nil
	for _, name := range r.sources() {
		what, err := seen(name)
		if err != nil {
			return err
		}
		r.Seen = append(r.Seen, what)
	}
	return nil
}

func (r *record) sources() []string {
	names := []string{r.Runsc}
	for _, m := range r.Mounts {
		names = append(names, m.Source)
	}
	return names
}

// seen tells one version of a file from another. Of a folder it says nothing:
// what is in it may change.
func seen(name string) (string, error) {
	st, err := os.Stat(name)
	if err != nil || st.IsDir() {
		return "", err
	}
	return fmt.Sprintf("%d bytes of %d", st.Size(), st.ModTime().UnixNano()), nil
}

// hostIDs is the first of the host's ids that a sandbox of a root worker
// uses: the same that local sandboxes have. It lies in a range that systemd's
// table of ids leaves unused (systemd.io/UIDS-GIDS: 1879048192 to 2147418111).
const (
	hostIDs     = 1879048192
	hostIDCount = 65536
)

// identity says which ids of the host runsc's processes have. The ids inside
// are gVisor's own business and always the same.
type identity struct {
	Root  bool `json:"root"` // the worker is root: ids 0 to Count-1 are First and on
	First int  `json:"first"`
	Count int  `json:"count"`
}

// currentIdentity decides by who we are, and by which ids we may hand out.
// Who is not root, or root of a container with ids of its own, runs runsc in
// a user namespace of one id.
func currentIdentity() identity {
	if os.Geteuid() == 0 {
		uids, uidErr := os.ReadFile("/proc/self/uid_map")
		gids, gidErr := os.ReadFile("/proc/self/gid_map")
		if uidErr == nil && gidErr == nil && covers(uids, hostIDs, hostIDCount) && covers(gids, hostIDs, hostIDCount) {
			return identity{Root: true, First: hostIDs, Count: hostIDCount}
		}
	}
	return identity{First: os.Geteuid(), Count: 1}
}

// covers reports whether the ids first to first+count-1 exist in the user
// namespace with the given uid_map.
func covers(idMap []byte, first, count uint64) bool {
	for line := range bytes.Lines(idMap) {
		var inside, outside, n uint64
		if _, err := fmt.Sscan(string(line), &inside, &outside, &n); err != nil {
			return false
		}
		if inside <= first && first+count <= inside+n {
			return true
		}
	}
	return false
}

func newInstance() string {
	var b [8]byte
	_, _ = unix.Getrandom(b[:], 0) // so few bytes come whole, and without fail (getrandom(2))
	return hex.EncodeToString(b[:])
}
