package local

import (
	"errors"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

// An upperLayer is the workspace as the sandbox has changed it: what there is
// of it now, and what there was whenever somebody looked.
//
// What was there once is remembered, because a file that is in no base leaves
// nothing behind when it is removed.
type upperLayer struct {
	root  *os.File
	xattr string // how names of the overlay's attributes begin
	looks int
	found map[string]*found // by path; "" is the workspace itself
	names int               // bytes of those paths

	pending []string // folders still to be looked at
}

// A found is a file or folder, as it was when it was last seen to be another
// than before.
type found struct {
	inode   uint64
	changed int64 // nanoseconds, in 1970's time
	folder  bool
	alone   bool // a folder that hides what bases have at its path
	gone    bool
	recent  bool // it could change again without that being seen by its time

	// Looks: at which it was seen to be another, to be another in more than the
	// list of a folder's entries, and to be there at all.
	look, whole, seen int
}

// These bound what is remembered. Git looks at as many files in the time that it
// takes to list them.
const (
	maxFound = 10_000
	maxNames = 2 << 20 // bytes
	maxName  = 1 << 10
)

var (
	errCrowded = errors.New("too many files have changed, or too long names")
	errHidden  = errors.New("a folder cannot be looked into")
)

// begin opens the workspace, which nobody has changed yet, and reports whether
// that can be done.
func (u *upperLayer) begin(path string) bool {
	root, err := os.Open(path)
	if err != nil {
		return false
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		_ = root.Close()
		return false
	}
	u.root = root
	u.found = map[string]*found{"": {inode: st.Ino, changed: st.Ctim.Nano(), folder: true, recent: true}}
	return true
}

// look takes everything in. It reports whether a folder of a base has moved:
// then what is in it is in no upper layer, and may be anything. After an error
// nothing is known of what was seen before.
func (u *upperLayer) look() (moved bool, err error) {
	defer func() {
		if err != nil {
			u.found, u.names = nil, 0
		}
	}()
	if u.found == nil {
		u.found = map[string]*found{}
	}
	u.looks++
	now := time.Now()
	u.pending = []string{""}
	for len(u.pending) > 0 {
		at := u.pending[len(u.pending)-1]
		u.pending = u.pending[:len(u.pending)-1]
		away, err := u.folder(at, now)
		if err != nil {
			return false, err
		}
		moved = moved || away
	}
	for _, f := range u.found {
		if f.seen != u.looks && !f.gone {
			f.gone, f.whole, f.look = true, u.looks, u.looks
		}
	}
	return moved, nil
}

// folder looks at one folder; those in it are pending then. What has vanished
// meanwhile is passed over.
func (u *upperLayer) folder(at string, now time.Time) (moved bool, err error) {
	if len(at) > maxName {
		return false, errCrowded
	}
	fd, err := openBeneath(int(u.root.Fd()), path.Join(".", at), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return false, nil
	case err != nil:
		return false, errHidden
	}
	f := os.NewFile(uintptr(fd), at)
	defer f.Close()
	// First the time of the folder, then what is in it: an entry that comes in
	// between is seen by a later time.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, errHidden
	}
	moved = has(fd, u.xattr+"redirect")
	self := found{folder: true, alone: moved || has(fd, u.xattr+"opaque")}
	empty := true
	for {
		names, err := f.Readdirnames(1024)
		for _, name := range names {
			empty = false
			if at == "" && name == ".git" {
				continue // git does not ask for that
			}
			var st unix.Stat_t
			err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				return false, errHidden
			}
			p := path.Join(at, name)
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				u.pending = append(u.pending, p)
			} else {
				u.note(p, &st, found{}, now)
			}
		}
		if errors.Is(err, io.EOF) || err == nil && len(names) == 0 {
			break
		}
		if err != nil {
			return false, errHidden
		}
		if len(u.found) > maxFound || len(u.pending) > maxFound || u.names > maxNames {
			return false, errCrowded
		}
	}
	if was := u.found[at]; at == "" && was != nil && was.look == 0 && empty {
		was.seen = u.looks // nobody has made anything yet
		return moved, nil
	}
	u.note(at, &st, self, now)
	return moved, nil
}

// note remembers what was seen at the path, when it is another than before.
func (u *upperLayer) note(p string, st *unix.Stat_t, is found, now time.Time) {
	is.inode, is.changed = st.Ino, st.Ctim.Nano()
	is.look, is.whole, is.seen = u.looks, u.looks, u.looks
	is.recent = is.changed > now.Add(-granularity(st.Ctim)).UnixNano()
	was := u.found[p]
	same := was != nil && !was.gone && was.inode == is.inode && was.folder == is.folder && was.alone == is.alone
	switch {
	case same && was.changed == is.changed && !was.recent:
		was.seen = u.looks
		return
	case same && is.folder:
		is.whole = was.whole
	case was == nil && is.folder && !is.alone:
		is.whole = 0 // it was copied up from a base, and shows what that has in it
	}
	if was == nil {
		u.names += len(p)
	}
	u.found[p] = &is
}

// granularity is how long after a change another one can have the same time:
// some file systems count in seconds, all others by the ticks of the kernel.
func granularity(t unix.Timespec) time.Duration {
	if t.Nsec == 0 {
		return 2 * time.Second
	}
	return 50 * time.Millisecond
}

// has reports whether the file has the attribute, or whether that is not known.
func has(fd int, attr string) bool {
	var b [16]byte
	_, err := unix.Fgetxattr(fd, attr, b[:])
	return !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP)
}

// since returns the paths at which something can be another than at that look.
// A path of its own means a file, one that ends in a slash a folder with all
// that is in it, and one that nobody has, in a folder, the list of what is in
// that: so does git read them (fsmonitor.c: fsmonitor_refresh_callback).
func (u *upperLayer) since(look int) (paths []string) {
	for p, f := range u.found {
		if f.look <= look {
			continue
		}
		if f.whole > look && p != "" {
			paths = append(paths, p, p+"/")
		}
		if f.folder {
			paths = append(paths, path.Join(p, nobodys))
		}
	}
	return paths
}

// nobodys is the name of a file that there is not.
const nobodys = ".sandbox-temporal-changed"
