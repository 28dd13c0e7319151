package local

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A mount stands nowhere yet: fd is what will be seen at Target, a path
// inside the sandbox. Mounts are opened by whoever may open them (the
// supervisor when it is root, else init in its user namespace), so that init
// of a root worker, which is nobody on the host, needs no path of the host.
type mount struct {
	Target string `json:"target"`
	Folder bool   `json:"folder"`
	// Parts, when there are any, are the folders of what fd is that will be
	// seen, each at a path of its own, and nothing else of it at Target.
	Parts map[string]string `json:"parts,omitempty"`
	fd    int
}

// system is what a sandbox sees of the host, read-only, as far as it is there.
// Keys and passwords live elsewhere in /etc.
var system = []string{
	"/usr",
	"/etc/alternatives",
	"/etc/ca-certificates", "/etc/ca-certificates.conf", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
	"/etc/pki/ca-trust", "/etc/pki/tls/certs", "/etc/crypto-policies",
	"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
	"/etc/magic", "/etc/mime.types", "/etc/protocols", "/etc/services",
}

// systemLinks are links into /usr on most hosts, and folders on others.
var systemLinks = []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}

// languages keep a part of their installation in /etc.
var languages = []string{"java-*", "python3*", "perl", "maven", "fonts"}

var devices = []string{"null", "zero", "full", "random", "urandom", "tty"}

// A layerOf is a folder that can be written to and that a base keeps.
type layerOf struct {
	name   string // below fs/
	target string
	mode   uint32
	owner  int // id inside
}

var layers = []layerOf{
	{"workspace", sandbox.Workspace, 0o755, agentID},
	{"home", sandbox.Home, 0o755, agentID},
	{"tmp", "/tmp", 0o1777, 0},
}

// A mountList gathers what was opened.
type mountList []mount

func (l *mountList) add(target string, folder bool, fd int, err error) error {
	if err != nil {
		return fmt.Errorf("mount for %s: %w", target, err)
	}
	*l = append(*l, mount{Target: target, Folder: folder, fd: fd})
	return nil
}

// openSystem opens what all sandboxes see of the host. The caller closes the
// descriptors, also when it fails.
func openSystem() (mounts mountList, err error) {
	paths := slices.Clone(system)
	installed, err := languageFolders()
	if err != nil {
		return nil, err
	}
	paths = append(paths, installed...)
	for _, p := range systemLinks {
		if st, err := os.Lstat(p); err == nil && st.IsDir() {
			paths = append(paths, p)
		}
	}
	for _, p := range paths {
		st, err := os.Stat(p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return mounts, err
		}
		fd, err := cloneTree(p, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NODEV)
		if err := mounts.add(p, st.IsDir(), fd, err); err != nil {
			return mounts, err
		}
	}
	for _, d := range devices {
		fd, err := cloneTree("/dev/"+d, unix.MOUNT_ATTR_NOEXEC)
		if err := mounts.add("/dev/"+d, false, fd, err); err != nil {
			return mounts, err
		}
	}
	return mounts, nil
}

// openOwn opens what only this sandbox sees: its layers, and what its spec
// asks for. The caller closes the descriptors, also when it fails.
func openOwn(r record, box string) (mounts mountList, err error) {
	fd, err := openLayers(r, box)
	if err := mounts.add(fsDir, true, fd, err); err != nil {
		return mounts, err
	}
	parts := map[string]string{}
	for _, l := range layers {
		parts[l.name] = l.target
	}
	mounts[len(mounts)-1].Parts = parts
	for _, m := range r.Mounts {
		st, err := os.Stat(m.Source)
		if err != nil {
			return mounts, err
		}
		fd, err := cloneTree(m.Source, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NODEV)
		if err := mounts.add(m.Target, st.IsDir(), fd, err); err != nil {
			return mounts, err
		}
	}
	return mounts, nil
}

// languageFolders reads /etc once, not once for each pattern.
func languageFolders() (paths []string, err error) {
	etc, err := os.Open("/etc")
	if err != nil {
		return nil, err
	}
	defer etc.Close()
	names, err := etc.Readdirnames(-1)
	for _, name := range names {
		ours := func(pattern string) bool {
			ok, _ := path.Match(pattern, name) // the patterns are right
			return ok
		}
		if slices.ContainsFunc(languages, ours) {
			paths = append(paths, "/etc/"+name)
		}
	}
	slices.Sort(paths)
	return paths, err
}

// cloneTree copies what is mounted at path, as a tree of its own that no
// later mount on the host reaches.
func cloneTree(path string, attrs uint64) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, os.NewSyscallError("open_tree "+path, err)
	}
	attr := unix.MountAttr{Attr_set: attrs | unix.MOUNT_ATTR_NOSUID, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("mount_setattr "+path, err)
	}
	return fd, nil
}

// makeLayers makes the folders that openLayers opens.
func makeLayers(r record, box string) error {
	// Init of a root worker, who is nobody here, passes through this one. Others
	// do not even come to it.
	if err := unix.Chmod(filepath.Join(box, fsDir), 0o711); err != nil {
		return &os.PathError{Op: "chmod", Path: fsDir, Err: err}
	}
	for _, l := range layers {
		dir := filepath.Join(box, fsDir, l.name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if r.Identity.Root {
			id := r.Identity.First + l.owner
			if err := os.Chown(dir, id, id); err != nil {
				return err
			}
		}
		if err := unix.Chmod(dir, l.mode); err != nil {
			return &os.PathError{Op: "chmod", Path: dir, Err: err}
		}
	}
	return nil
}

// openLayers returns the folder of all layers itself, or an overlay of it over
// those of the bases. It is one overlay for all, as each costs the disk some
// files.
func openLayers(r record, box string) (int, error) {
	upper := filepath.Join(box, fsDir)
	if len(r.Layers) == 0 {
		return cloneTree(upper, unix.MOUNT_ATTR_NODEV)
	}
	var lower []string
	for _, name := range r.Layers {
		lower = append(lower, layerPath(r.Dir, name))
	}
	return openOverlay(r.Identity.Root, upper, filepath.Join(box, workDir), lower)
}

// openOverlay mounts an overlay of the folders, nowhere yet. Without an upper
// one it can only be read. What is below is written by nobody: the kernel
// makes read-only mounts of its own of all lower folders (Linux 6.18,
// fs/overlayfs/super.c: ovl_get_layers).
//
// Folders are named by their descriptors: short enough for a mount option, and
// telling nothing in the sandbox's /proc/mounts.
func openOverlay(root bool, upper, work string, lower []string) (int, error) {
	var open []int
	defer func() {
		for _, fd := range open {
			unix.Close(fd)
		}
	}()
	names := make([]string, 0, len(lower)+2)
	for _, p := range append([]string{upper, work}, lower...) {
		if p == "" {
			names = append(names, "")
			continue
		}
		fd, err := unix.Open(p, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: p, Err: err}
		}
		open = append(open, fd)
		names = append(names, fdPath(fd, ""))
	}
	return overlay(root, names[0], names[1], names[2:])
}

// maxOption is what the kernel takes as a string option of a mount.
const maxOption = 255

// overlay is openOverlay of folders that have short names. As root, folders of
// a base can be renamed (redirect_dir); in a user namespace the kernel does
// without, rename fails with EXDEV and programs copy instead.
func overlay(root bool, upper, work string, lower []string) (int, error) {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(fs)
	type option struct{ key, value string }
	options := []option{{"source", "sandbox"}}
	if upper != "" {
		options = append(options, option{"upperdir", upper}, option{"workdir", work})
	}
	if all := strings.Join(lower, ":"); len(all) <= maxOption {
		options = append(options, option{"lowerdir", all})
	} else {
		for _, l := range lower {
			options = append(options, option{"lowerdir+", l}) // since Linux 6.8
		}
	}
	switch {
	case root && upper != "":
		options = append(options, option{"redirect_dir", "on"})
	case root:
		options = append(options, option{"redirect_dir", "follow"})
	}
	for _, o := range options {
		if err := unix.FsconfigSetString(fs, o.key, o.value); err != nil {
			return -1, os.NewSyscallError("overlay option "+o.key, err)
		}
	}
	// Nothing of an upper layer is needed after a crash of the host, and
	// without syncs git and package managers are several times faster.
	var flags []string
	if upper != "" {
		flags = append(flags, "volatile")
	}
	if !root {
		flags = append(flags, "userxattr")
	}
	for _, f := range flags {
		if err := unix.FsconfigSetFlag(fs, f); err != nil {
			return -1, os.NewSyscallError("overlay option "+f, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fault.New("overlay", fault.Unsupported, "the kernel refuses an overlay here: %w", err).
			Hinted("Put the state folder on ext4, xfs or btrfs, and use Linux 5.12 or later.")
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return -1, os.NewSyscallError("fsmount overlay", err)
	}
	return fd, nil
}

// rootLinks returns the links of the host's root that the sandbox's
// root repeats, from name to target.
func rootLinks() map[string]string {
	links := map[string]string{}
	for _, p := range systemLinks {
		if target, err := os.Readlink(p); err == nil {
			links[p] = target
		}
	}
	if target, err := os.Readlink("/etc/localtime"); err == nil {
		links["/etc/localtime"] = target
	}
	return links
}
