package local

import (
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// A diskMeter says how much a sandbox has written into its upper layers. It
// costs one statfs as long as the host's free space does not fall: only then
// can the sandbox have written anything, and only then are its files looked
// at. The less is left, the sooner it looks again; and once so much is gone
// from the host's disk that the sandbox can have passed its limit, it is held
// still until its files are counted. So what it can overshoot by is what it
// writes in some hundredths of a second; RLIMIT_FSIZE bounds it for a single
// file. What others give back meanwhile counts for nothing, as it would hide
// what the sandbox takes. Not seen are files without a name that no process has
// open but only mapped.
type diskMeter struct {
	box   *folder
	limit int64
	group *cgroup.Group // to find files that are open and have no name

	hostFree func() (int64, bool) // of the host's file system

	bar    int64     // the use at which processes are ended next
	used   int64     // at the last walk
	walked time.Time // when
	took   time.Duration
	fell   int64 // by how much the host's free space has fallen since, from one look to the next
	free   int64 // what it was at the last look
	first  int64 // and in the beginning
	left   int64 // before it can have passed the bar, when it was last looked
}

const (
	// Every file counts as a block at least, or a million empty ones would
	// use up the host's inodes for nothing.
	leastFile = 4096

	// What else the host does can hide what the sandbox writes, so the files
	// are looked at now and then in any case,
	walkEvery = 30 * time.Second
	// but never for more than this part of the time.
	walkShare = 20

	// How fast a sandbox is taken to write at most, in bytes a second.
	fillRate = 4 << 30

	// Bounds of the time between two looks at the host's free space,
	lookSoonest = 20 * time.Millisecond
	lookLatest  = 2 * time.Second

	// and how long a sandbox goes on, at most, between two counts for which
	// it was held still: it may be others who write.
	respite = 250 * time.Millisecond
)

func newDiskMeter(box *folder, limit int64, group *cgroup.Group) *diskMeter {
	m := &diskMeter{box: box, hostFree: box.hostFree, limit: limit, bar: limit, group: group, walked: time.Now(), left: limit}
	m.free, _ = m.hostFree()
	m.first = m.free
	return m
}

// hostFree returns how much room there is on the folder's file system.
func (f *folder) hostFree() (int64, bool) {
	var st unix.Statfs_t
	if unix.Fstatfs(f.fd(), &st) != nil && unix.Statfs(f.path, &st) != nil {
		return 0, false
	}
	return int64(st.Bfree) * int64(st.Bsize), true
}

// look returns the use, and over once for each time that it passes the bar.
// After that the bar is higher: what is started to save the agent's work needs
// some room. Hold has the sandbox stand still until what it returns is called.
func (m *diskMeter) look(hold func() (release func())) (used int64, over bool) {
	free, ok := m.hostFree()
	if !ok {
		return m.used, false
	}
	m.fell += max(m.free-free, 0)
	m.free = free
	const little = 256 << 10 // of others, in any case
	since, room := time.Since(m.walked), m.bar-m.used
	m.left = room - m.fell
	switch {
	case m.fell >= max(room, little):
		if since < min(m.took, respite) {
			return m.used, false
		}
		defer hold()()
		free, _ = m.hostFree()
	case since < walkShare*m.took, m.fell < max(room/2, little) && since < walkEvery:
		return m.used, false
	}
	begin := time.Now()
	m.used = m.measure(free)
	m.free, m.fell, m.walked, m.took = free, 0, time.Now(), time.Since(begin)
	m.left = m.bar - m.used
	if m.left >= 0 {
		return m.used, false
	}
	m.bar = max(m.limit, m.used) + max(m.limit/8, 64<<20)
	return m.used, true
}

// next is when to look again.
func (m *diskMeter) next() time.Duration {
	d := time.Duration(float64(m.left) / fillRate * float64(time.Second))
	return min(max(d, lookSoonest), lookLatest)
}

func (m *diskMeter) measure(free int64) int64 {
	hidden := nameless(m.group.Pids())
	w := walk{most: m.bar}
	w.tree(filepath.Join(m.box.path, fsDir))
	// A folder is opened up only when more is gone from the host's disk than
	// was found, and enough of it.
	if sum := w.sum + hidden; w.closed && sum <= m.bar && m.first-free > m.bar {
		w = walk{most: m.bar, open: true}
		w.tree(filepath.Join(m.box.path, fsDir))
	}
	return w.sum + hidden
}

// A walk adds up the files of a tree that a stranger made, and changes
// meanwhile: no link in it is followed, and it may be nested without end.
type walk struct {
	most   int64 // enough is enough
	open   bool  // open folders that their owner, who is us, has closed
	sum    int64
	closed bool // there were some

	pending []dirAt
	bases   []int
}

// A dirAt is a folder still to be looked at, by its path below an open one.
type dirAt struct {
	base int
	path string
}

const (
	longPath = 3000 // of the 4096 bytes that the kernel takes
	maxBases = 512  // of folders held open: a million levels
)

func (w *walk) tree(top string) {
	fd, err := unix.Open(top, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	w.bases = append(w.bases, fd)
	defer func() {
		for _, fd := range w.bases {
			unix.Close(fd)
		}
	}()
	w.pending = append(w.pending, dirAt{fd, "."})
	for len(w.pending) > 0 && w.sum <= w.most {
		d := w.pending[len(w.pending)-1]
		w.pending = w.pending[:len(w.pending)-1]
		w.folder(d)
	}
}

// folder looks at one folder. What has vanished meanwhile is passed over.
func (w *walk) folder(d dirAt) {
	fd, err := w.openAt(d)
	if err != nil {
		w.closed = w.closed || errors.Is(err, unix.EACCES)
		return
	}
	f := os.NewFile(uintptr(fd), "folder")
	defer f.Close()
	if len(d.path) > longPath {
		if len(w.bases) >= maxBases {
			return
		}
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return
		}
		w.bases = append(w.bases, dup)
		d = dirAt{dup, "."}
	}
	for w.sum <= w.most {
		names, err := f.Readdirnames(1024)
		for _, name := range names {
			w.file(fd, d, name)
		}
		if err != nil || len(names) == 0 {
			if err != nil && !errors.Is(err, io.EOF) {
				w.closed = true
			}
			return
		}
	}
}

func (w *walk) file(fd int, d dirAt, name string) {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		w.closed = w.closed || errors.Is(err, unix.EACCES)
		return
	}
	size := max(st.Blocks*512, leastFile)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		w.pending = append(w.pending, dirAt{d.base, path.Join(d.path, name)})
	} else if st.Nlink > 1 {
		size /= int64(st.Nlink) // all its names are in this tree
	}
	w.sum += size
}

func (w *walk) openAt(d dirAt) (int, error) {
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if w.open {
		flags |= unix.O_PATH
	}
	fd, err := openBeneath(d.base, d.path, flags)
	if err != nil || !w.open {
		return fd, err
	}
	defer unix.Close(fd)
	return reopenDir(fd, 0o500)
}

// openBeneath opens what is at the path below dir, which strangers can change
// meanwhile: no link on the way is followed.
func openBeneath(dir int, path string, flags int) (int, error) {
	return unix.Openat2(dir, path, &unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
}

// nameless adds up what the processes have open of files that have no name
// any more. They go with the last who has them open.
func nameless(pids []int) (sum int64) {
	type file struct{ dev, ino uint64 }
	seen := map[file]bool{}
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
		f, err := os.Open(dir)
		if err != nil {
			continue // it has ended
		}
		names, _ := f.Readdirnames(mostFiles)
		_ = f.Close()
		for _, name := range names {
			// The file itself, not a path that somebody could have changed.
			at := filepath.Join(dir, name)
			var st unix.Stat_t
			if unix.Stat(at, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 0 || st.Blocks == 0 {
				continue
			}
			id := file{uint64(st.Dev), st.Ino}
			var fs unix.Statfs_t
			if seen[id] || unix.Statfs(at, &fs) != nil || fs.Type == unix.TMPFS_MAGIC {
				continue // memory, which is counted elsewhere
			}
			seen[id] = true
			sum += st.Blocks * 512
		}
	}
	return sum
}
