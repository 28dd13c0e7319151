package local

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A record is what spec.json holds: all that a supervisor needs to know, and
// all that List says without asking one.
type record struct {
	Version  int               `json:"version"`
	Key      string            `json:"key"`
	Instance string            `json:"instance"`
	Created  time.Time         `json:"created"`
	Deadline time.Time         `json:"deadline"` // as asked at first; SetDeadline does not change it here
	Labels   map[string]string `json:"labels,omitempty"`
	Mounts   []sandbox.Mount   `json:"mounts,omitempty"`
	Gateway  string            `json:"gateway,omitempty"` // the path of the socket
	Dir      string            `json:"dir"`               // the state folder
	Layers   []string          `json:"layers,omitempty"`  // of bases, uppermost first; see layerPath
	Identity identity          `json:"identity"`
	Limits   sandbox.Limits    `json:"limits"` // with the defaults filled in
}

const recordVersion = 1

// maxMounts keeps the descriptors of all mounts within one message.
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
	for _, m := range s.Mounts {
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
	if len(p.supervisor) == 0 {
		return bad("no supervisor program was named")
	}
	// The order of the mounts is that of their targets, so that a mount
	// within a mount comes after it.
	mounts := slices.Clone(s.Mounts)
	slices.SortFunc(mounts, func(a, b sandbox.Mount) int { return strings.Compare(a.Target, b.Target) })
	return record{
		Version: recordVersion, Key: s.Key, Instance: newInstance(), Created: time.Now().UTC(), Deadline: s.Deadline,
		Labels: s.Labels, Mounts: mounts, Gateway: gateway, Dir: dir, Identity: currentIdentity(),
		Limits: effective(s.Limits, hostMemory()),
	}, nil
}

func checkMount(op string, m sandbox.Mount) error {
	if !cleanAbsolute(m.Source) || !cleanAbsolute(m.Target) || m.Target == "/" {
		return fault.New(op, fault.Invalid, "mount %q at %q: both must be clean absolute paths", m.Source, m.Target)
	}
	for _, taken := range []string{"/proc", "/dev", "/sys", sandbox.Workspace} {
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

func cleanAbsolute(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && !strings.ContainsRune(p, 0) && len(p) < 4096
}
