package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/launch"
)

// etc is the part of /etc that is the sandbox's own. There is no network but
// the loopback, so names are looked up in hosts only and fail at once.
//
// Git is told to compare sizes and times only: inode numbers and change times
// of a base are not those that its index remembers, and git would read every
// file to find that none has changed.
var etc = map[string]string{
	"passwd": "root:x:0:0:root:/root:/bin/sh\n" +
		"agent:x:1000:1000:agent:" + sandbox.Home + ":/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
	"group":         "root:x:0:\ntty:x:5:\nagent:x:1000:\nnogroup:x:65534:\n",
	"hosts":         "127.0.0.1 localhost sandbox\n::1 localhost\n",
	"hostname":      "sandbox\n",
	"nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\nnetworks: files\nprotocols: files\nservices: files\n",
	"resolv.conf":   "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
	"shells":        "/bin/sh\n/bin/bash\n",
	"gitconfig":     "[core]\n\tcheckStat = minimal\n\ttrustctime = false\n",
}

// folders exist in every sandbox.
var folders = map[string]uint32{
	"/etc": 0o755, "/root": 0o700, "/run": 0o755, "/home": 0o755, sandbox.Home: 0o755, sandbox.Workspace: 0o755, "/tmp": 0o1777,
	"/opt": 0o755, "/opt/sandbox": 0o755, sandbox.ProgramDir: 0o755,
	"/proc": 0o555, "/sys": 0o555, "/dev": 0o755, "/usr": 0o755, "/var": 0o755, "/var/lib": 0o755, "/var/cache": 0o755, "/var/log": 0o755,
	"/mnt": 0o755, "/srv": 0o755,
	insideDir: 0o700, insideUpper: 0o700, insideOutput: 0o700, insideBase: 0o700, insideMounts: 0o700,
}

var links = map[string]string{
	"/var/tmp": "/tmp", "/var/run": "/run", "/etc/mtab": "/proc/self/mounts", "/etc/os-release": "../usr/lib/os-release",
}

// copied is what a sandbox has of the host's /etc. Keys and passwords live
// elsewhere in it.
var copied = []string{
	"/etc/alternatives", "/etc/ca-certificates", "/etc/ca-certificates.conf", "/etc/ssl/certs", "/etc/ssl/openssl.cnf",
	"/etc/pki/ca-trust", "/etc/pki/tls/certs", "/etc/crypto-policies",
	"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
	"/etc/magic", "/etc/mime.types", "/etc/protocols", "/etc/services", "/etc/localtime",
	"/etc/java-*", "/etc/python3*", "/etc/perl", "/etc/maven", "/etc/fonts",
}

// maxCopied bounds what is copied of /etc, all in all.
const maxCopied = 64 << 20

// systemLinks are links into /usr on most hosts, and folders on others.
var systemLinks = []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}

// A root is the image of a sandbox's root file system under construction.
type root struct {
	image  *imageWriter
	made   map[string]bool
	copied int64
}

// writeRoot makes the image that is the root of the sandbox: folders, a little
// of /etc, and something to mount on wherever something will be mounted.
func writeRoot(name string, mounts []ociMount) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	r := root{image: newImage(f), made: map[string]bool{"/": true}}
	err = r.fill(mounts)
	if err == nil {
		err = r.image.finish()
	}
	return errors.Join(err, f.Close())
}

func (r *root) fill(mounts []ociMount) error {
	for _, p := range slices.Sorted(maps.Keys(folders)) {
		if err := r.folder(p, folders[p]); err != nil {
			return err
		}
	}
	for _, p := range slices.Sorted(maps.Keys(etc)) {
		if err := r.file("/etc/"+p, etc[p]); err != nil {
			return err
		}
	}
	for _, p := range slices.Sorted(maps.Keys(links)) {
		if err := r.link(p, links[p]); err != nil {
			return err
		}
	}
	for _, p := range systemLinks {
		if to, err := os.Readlink(p); err == nil {
			if err := r.link(p, to); err != nil {
				return err
			}
		}
	}
	for _, pattern := range copied {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, p := range found {
			if err := r.copy(p); err != nil {
				return err
			}
		}
	}
	for _, m := range mounts {
		var err error
		if m.file {
			err = r.file(m.Destination, "")
		} else {
			err = r.folder(m.Destination, 0o755)
		}
		if err != nil {
			return fmt.Errorf("a place for %s: %w", m.Destination, err)
		}
	}
	return nil
}

// folder makes the folder and those above it.
func (r *root) folder(p string, mode uint32) error {
	if r.made[p] {
		return nil
	}
	if err := r.folder(path.Dir(p), 0o755); err != nil {
		return err
	}
	r.made[p] = true
	return r.image.add(imageEntry{Path: p, Mode: typeDir | mode, Time: time.Now()}, nil)
}

func (r *root) file(p, text string) error {
	if r.made[p] {
		return nil
	}
	if err := r.folder(path.Dir(p), 0o755); err != nil {
		return err
	}
	r.made[p] = true
	return r.image.add(imageEntry{Path: p, Mode: typeFile | 0o644, Time: time.Now(), Size: int64(len(text))}, strings.NewReader(text))
}

func (r *root) link(p, to string) error {
	if r.made[p] {
		return nil
	}
	if err := r.folder(path.Dir(p), 0o755); err != nil {
		return err
	}
	r.made[p] = true
	return r.image.add(imageEntry{Path: p, Mode: typeLink | 0o777, Time: time.Now(), Link: to}, nil)
}

// copy copies a file or folder of the host. What we may not read, or has just
// gone, is not for the sandbox either.
func (r *root) copy(top string) error {
	return filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case d.IsDir():
			return r.folder(p, 0o755)
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			if err != nil {
				return nil
			}
			return r.link(p, to)
		case !d.Type().IsRegular():
			return nil
		}
		info, err := d.Info()
		if err != nil || r.copied+info.Size() > maxCopied {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return nil
		}
		r.copied += int64(len(text))
		return r.file(p, string(text))
	})
}

// The configuration of a container, as far as we say anything, see
// github.com/opencontainers/runtime-spec.
type (
	ociSpec struct {
		Version     string            `json:"ociVersion"`
		Process     ociProcess        `json:"process"`
		Root        ociRoot           `json:"root"`
		Hostname    string            `json:"hostname"`
		Mounts      []ociMount        `json:"mounts"`
		Annotations map[string]string `json:"annotations"`
		Linux       ociLinux          `json:"linux"`
	}
	ociProcess struct {
		User            map[string]int      `json:"user"`
		Args            []string            `json:"args"`
		Env             []string            `json:"env"`
		Cwd             string              `json:"cwd"`
		Capabilities    map[string][]string `json:"capabilities"`
		NoNewPrivileges bool                `json:"noNewPrivileges"`
	}
	ociRoot struct {
		Path     string `json:"path"`
		Readonly bool   `json:"readonly"`
	}
	ociMount struct {
		Destination string   `json:"destination"`
		Type        string   `json:"type"`
		Source      string   `json:"source"`
		Options     []string `json:"options,omitempty"`
		file        bool
	}
	ociLinux struct {
		Namespaces []map[string]string `json:"namespaces"`
		UIDs       []ociIDs            `json:"uidMappings,omitempty"`
		GIDs       []ociIDs            `json:"gidMappings,omitempty"`
	}
	ociIDs struct {
		Container int `json:"containerID"`
		Host      int `json:"hostID"`
		Size      int `json:"size"`
	}
)

// initCapabilities are what init may do in gVisor's kernel: put the file
// systems together, make files and processes the agent's, and read and end
// them. What it starts becomes an ordinary user and has none.
var initCapabilities = []string{
	"CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH",
}

// writeConfig writes config.json into the folder of the sandbox and makes what
// it speaks of. A sandbox that is restored has the root of the one it was.
func writeConfig(box string, r record, argv []string) (setup, error) {
	set := setup{Base: r.Base != "", Gateway: r.Gateway != "", Limits: r.Limits}
	mounts := []ociMount{
		{Destination: "/usr", Type: "bind", Source: "/usr", Options: []string{"ro", "rbind", "nosuid", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=1777", "size=268435456"}},
	}
	bind := func(source, target string) error {
		st, err := os.Stat(source)
		if err != nil {
			return err
		}
		mounts = append(mounts, ociMount{Destination: target, Type: "bind", Source: source, Options: []string{"ro", "rbind", "nosuid", "nodev"}, file: !st.IsDir()})
		return nil
	}
	for _, p := range systemLinks {
		if st, err := os.Lstat(p); err == nil && st.IsDir() {
			if err := bind(p, p); err != nil {
				return set, err
			}
		}
	}
	if err := bind(r.Program, insideInit); err != nil {
		return set, err
	}
	for i, m := range r.Mounts {
		target := m.Target
		if inLayer(target) {
			target = path.Join(insideMounts, strconv.Itoa(i))
			set.Mounts = append(set.Mounts, sandbox.Mount{Source: target, Target: m.Target})
		}
		if err := bind(m.Source, target); err != nil {
			return set, err
		}
	}
	image := filepath.Join(box, rootFile)
	notes := map[string]string{"dev.gvisor.spec.rootfs.source": image, "dev.gvisor.spec.rootfs.type": "erofs"}
	for _, dir := range []string{outputDir, upperDir} {
		source, target, options := filepath.Join(box, dir), path.Join(insideDir, dir), "rw"
		if dir == upperDir && r.Limits.DiskBytes > 0 {
			options += ",size=" + strconv.FormatInt(r.Limits.DiskBytes+2*reserve(r.Limits.DiskBytes), 10)
		}
		mounts = append(mounts, ociMount{Destination: target, Type: "bind", Source: source, Options: []string{"rw", "rbind"}})
		// Not the host's folder but a file system of gVisor's own, whose data
		// is in one file in that folder.
		for k, v := range map[string]string{"source": source, "type": "tmpfs", "share": "container", "options": options} {
			notes["dev.gvisor.spec.mount."+dir+"."+k] = v
		}
	}
	if r.Base != "" {
		mounts = append(mounts, ociMount{Destination: insideBase, Type: "erofs", Source: basePath(r.Dir, r.Base), Options: []string{"ro"}})
	}
	if r.From == "" {
		if err := writeRoot(image, mounts); err != nil {
			return set, err
		}
	}
	spec := ociSpec{
		Version: "1.2.0", Hostname: "sandbox", Mounts: mounts,
		Process: ociProcess{
			User: map[string]int{"uid": 0, "gid": 0}, Args: append(append([]string{insideInit}, argv[1:]...), initWord), Cwd: "/",
			Env:          []string{"PATH=" + launch.SearchPath},
			Capabilities: map[string][]string{"bounding": initCapabilities, "effective": initCapabilities, "permitted": initCapabilities},
			// Nothing in a sandbox gains a privilege by being executed.
			NoNewPrivileges: true,
		},
		Root:        ociRoot{Path: filepath.Join(box, emptyDir), Readonly: true},
		Annotations: notes,
		Linux:       ociLinux{Namespaces: []map[string]string{{"type": "pid"}, {"type": "mount"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}}},
	}
	if r.Identity.Root {
		// Also gVisor's kernel and its file server are nobody on the host.
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, map[string]string{"type": "user"})
		spec.Linux.UIDs = []ociIDs{{Container: 0, Host: r.Identity.First, Size: r.Identity.Count}}
		spec.Linux.GIDs = spec.Linux.UIDs
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return set, err
	}
	return set, os.WriteFile(filepath.Join(box, configFile), b, 0o600)
}

// copyProgram makes sure that the program which is init is in the state
// folder, under a name that is that of this version of it: a sandbox that is
// restored from a checkpoint needs the very file it was started with.
func copyProgram(dir, program string) (string, error) {
	in, err := os.Open(program)
	if err != nil {
		return "", err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return "", err
	}
	to := filepath.Join(dir, programsDir, fmt.Sprintf("%x-%x", st.Size(), st.ModTime().UnixNano()))
	if old, err := os.Stat(to); err == nil && old.Size() == st.Size() {
		// Wanted now: see sweepPrograms.
		if err := os.Chtimes(to, time.Time{}, time.Now()); err == nil {
			return to, nil
		}
	}
	out, err := os.CreateTemp(filepath.Join(dir, programsDir), newPrefix)
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name())
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Chmod(0o755), out.Close()); err != nil {
		return "", err
	}
	return to, os.Rename(out.Name(), to)
}

// sweepPrograms removes the versions of init that no sandbox has any more.
// One that was wanted not long ago may be somebody's who is just being made.
func (p *Provider) sweepPrograms() error {
	boxes, err := filepath.Glob(filepath.Join(p.dir, sandboxesDir, "*", specFile))
	if err != nil {
		return err
	}
	used := map[string]bool{}
	for _, name := range boxes {
		var r record
		b, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if ignoreGone(err) != nil {
			return err
		}
		used[filepath.Base(r.Program)] = true
	}
	entries, err := os.ReadDir(filepath.Join(p.dir, programsDir))
	if err != nil {
		return ignoreGone(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && !used[e.Name()] && time.Since(info.ModTime()) > time.Hour {
			err = os.Remove(filepath.Join(p.dir, programsDir, e.Name()))
		}
		if ignoreGone(err) != nil {
			return err
		}
	}
	return nil
}
