package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/layer"
)

// A base is what base.json holds. The file is the last thing that a base
// gets before it has its name.
type base struct {
	Version int               `json:"version"`
	Key     string            `json:"key"`
	Created time.Time         `json:"created"`
	Agent   int               `json:"agent"`           // the host's uid of its files
	Below   []string          `json:"below,omitempty"` // layers that it was made on, uppermost first; see layerPath
	Labels  map[string]string `json:"labels,omitempty"`
	Bytes   int64             `json:"bytes"` // of its own files on the disk

	// Flat says that flat/ holds all that fs/ and the layers below hold
	// together, in Flat bytes. Alone says that fs/ is gone: nobody stands on
	// it any more, and Below is empty.
	Flat      bool  `json:"flat,omitempty"`
	FlatBytes int64 `json:"flat_bytes,omitempty"`
	Alone     bool  `json:"alone,omitempty"`
}

const (
	// In a base of version 1, folders that were moved remember their old
	// paths from the workspace's root on, in one of version 2 from fs/ on.
	baseVersion = 2
	baseFile    = "base.json"
	usedFile    = "used" // its modification time is when a sandbox was last started from the base; 1970: never
	flatDir     = "flat"
	// maxLayers is well below what an overlay takes (500).
	maxLayers = 64
)

func basePath(dir, key string) string { return filepath.Join(dir, basesDir, keyName(key)) }

// flatMark is behind the key of a base, as the name of a layer, when its
// flat/ is meant and not its fs/. It cannot be part of a key.
const flatMark = "+flat"

// layerPath is the folder of a layer. Sandboxes and bases name what they stand
// on by layers: "key" is fs/ of the base, "key+flat" is flat/.
func layerPath(dir, name string) string {
	if key, flat := strings.CutSuffix(name, flatMark); flat {
		return filepath.Join(basePath(dir, key), flatDir)
	}
	return filepath.Join(basePath(dir, name), fsDir)
}

// keyOf returns the key of the base that the layer is a part of.
func keyOf(layer string) string { return strings.TrimSuffix(layer, flatMark) }

// loadBase reads base.json. An error that is no fault is one of the disk.
func loadBase(op, dir, key string) (base, error) {
	missing := func(err error) (base, error) {
		return base{}, fault.New(op, fault.NotFound, "no base %q: %w", key, err)
	}
	f, err := os.Open(filepath.Join(basePath(dir, key), baseFile))
	if errors.Is(err, os.ErrNotExist) {
		return missing(err)
	}
	if err != nil {
		return base{}, fault.Wrap(op, err)
	}
	defer f.Close()
	data, err := readSmall(f, 1<<20)
	if err != nil {
		return base{}, fault.Wrap(op, err)
	}
	var b base
	if err := json.Unmarshal(data, &b); err != nil {
		return missing(err)
	}
	if b.Version != baseVersion || b.Key != key {
		return missing(fmt.Errorf("it is of version %d and called %q", b.Version, b.Key))
	}
	return b, nil
}

// checkLayer returns the base that the layer is a part of, when the layer is
// whole, by itself.
func checkLayer(op, dir, name string, id identity) (base, error) {
	key := keyOf(name)
	if !sandbox.ValidID(key) {
		return base{}, fault.New(op, fault.NotFound, "no base %q", key)
	}
	b, err := loadBase(op, dir, key)
	if err != nil {
		return base{}, err
	}
	missing := func(format string, args ...any) (base, error) {
		return b, fault.New(op, fault.NotFound, "no base %q: %w", key, fmt.Errorf(format, args...))
	}
	switch {
	case b.Agent != id.agent():
		return missing("it belongs to uid %d, and agents here are %d", b.Agent, id.agent())
	case len(b.Below) >= maxLayers:
		return missing("it has %d layers", len(b.Below)+1)
	}
	for _, l := range layers {
		if !isFolder(filepath.Join(layerPath(dir, name), l.name)) {
			return missing("its %s is damaged", l.name)
		}
	}
	return b, nil
}

// readLayers returns the layers that a sandbox stands on which is started from
// the base, uppermost first, when all of them are whole.
func readLayers(op, dir, key string, id identity) ([]string, error) {
	b, err := loadBase(op, dir, key)
	if err != nil {
		return nil, err
	}
	names := append([]string{key}, b.Below...)
	if b.Flat {
		names = []string{key + flatMark}
	}
	for _, name := range names {
		if _, err := checkLayer(op, dir, name, id); err != nil {
			return nil, fault.Wrap("base "+key, err)
		}
	}
	return names, nil
}

// Base returns nil when a base is stored under key, and all that it was made
// on. Whether the bytes in it are the right ones is not looked at.
func (p *Provider) Base(_ context.Context, key string) error {
	const op = "local: look up base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	_, err := readLayers(op, p.dir, key, currentIdentity())
	return err
}

// Freeze has the supervisor kill everything in the sandbox and turn its files
// into a base. The files are moved, not copied, so it takes as long as the
// disk needs to hold what is not written yet.
func (p *Provider) Freeze(ctx context.Context, ref sandbox.Ref, key string) error {
	return p.store(ctx, "local: freeze sandbox", opFreeze, ref, key)
}

// Snapshot has the supervisor hold everything in the sandbox still and copy
// its files into a base, without the bases that it stands on. It takes as long
// as the copy, which shares its blocks on a file system that can (btrfs, xfs).
// When ctx is done before it is, nothing is stored and the sandbox goes on.
//
// Inode numbers cannot be kept. The first git status in a sandbox that starts
// from the snapshot reads those files again that were written in the sandbox
// it was made from, and no others.
//
// Processes are held by their cgroup, of which they notice nothing. Where
// there is none, init stops them all at one stroke with SIGSTOP, and whoever
// waits for a child to stop, as a shell does, can see that.
func (p *Provider) Snapshot(ctx context.Context, ref sandbox.Ref, key string) error {
	return p.store(ctx, "local: snapshot sandbox", opSnapshot, ref, key)
}

// store asks the supervisor to store a base.
func (p *Provider) store(ctx context.Context, op, what string, ref sandbox.Ref, key string) error {
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	sb, err := p.attach(ctx, op, ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	if _, err = sb.ask(ctx, op, request{Op: what, Base: key}); err != nil {
		return err
	}
	if names, err := readLayers(op, p.dir, key, currentIdentity()); err == nil {
		p.flattenSoon(names)
	}
	return nil
}

// canStore is what both ways to make a base begin with. There is nothing to do
// when done is true or err is not nil. The caller holds s.ending.
func (s *supervisor) canStore(op, key string) (done bool, err error) {
	if !sandbox.ValidID(key) {
		return true, fault.New(op, fault.Invalid, "%q is not a key of a base", cut(key))
	}
	select {
	case <-s.over:
		return true, fault.New(op, fault.NotFound, "the sandbox is gone")
	default:
	}
	_, err = readLayers(op, s.record.Dir, key, s.record.Identity)
	if err == nil {
		return true, nil
	}
	if fault.KindOf(err) != fault.NotFound {
		return true, err
	}
	if len(s.record.Layers) >= maxLayers {
		return true, fault.New(op, fault.Invalid, "the sandbox stands on %d bases already", len(s.record.Layers)).
			Hinted("Make the base anew from the repository.")
	}
	return false, nil
}

// freeze makes the base, step by step so that each can be the last one before
// a crash: the files move into a folder of the sandbox, are written to the
// disk with what describes them, and the folder gets its name.
func (s *supervisor) freeze(key string) error {
	const op = "freeze"
	s.ending.Lock()
	defer s.ending.Unlock()
	if done, err := s.canStore(op, key); done {
		return err
	}
	s.setState(used)
	s.kill()
	return fileFault(op, s.moveInto(key))
}

func (s *supervisor) moveInto(key string) error {
	from, stage := filepath.Join(s.box.path, fsDir), filepath.Join(s.box.path, stageDir)
	if err := os.Mkdir(stage, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	// The files are in the stage already after an earlier try that failed.
	if err := os.Rename(from, filepath.Join(stage, fsDir)); err != nil {
		if _, statErr := os.Lstat(filepath.Join(stage, fsDir)); statErr != nil {
			return fault.New("store base", fault.Conflict, "the sandbox was frozen before, under another key")
		}
	}
	bytes, err := layer.Size(context.Background(), unix.AT_FDCWD, filepath.Join(stage, fsDir))
	if err != nil {
		return err
	}
	return s.publish(stage, key, bytes)
}

// publish describes the files in stage/fs, sees to it that they are on the
// disk, and gives the base its name. One that is whole keeps the name against
// ours; one that is damaged makes room.
func (s *supervisor) publish(stage, key string, bytes int64) error {
	b := base{
		Version: baseVersion, Key: key, Created: time.Now().UTC(), Agent: s.record.Identity.agent(),
		Below: s.record.Layers, Labels: s.record.Labels, Bytes: bytes,
	}
	if err := writeBase(stage, b); err != nil {
		return err
	}
	to := basePath(s.record.Dir, key)
	for {
		err := unix.Renameat2(unix.AT_FDCWD, stage, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
		if err == nil {
			return syncFolder(filepath.Dir(to))
		}
		if !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOTEMPTY) {
			return &os.LinkError{Op: "rename", Old: stage, New: to, Err: err}
		}
		if _, err := readLayers("store base", s.record.Dir, key, s.record.Identity); err == nil {
			return nil
		}
		if err := s.makeRoom(key); err != nil {
			return err
		}
	}
}

// writeBase makes the base in the folder whole.
func writeBase(path string, b base) error {
	f, err := openFolder(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// The file is there from the first, so that noting a use needs no space.
	never := []unix.Timespec{{}, {}}
	u, err := f.open(usedFile, unix.O_WRONLY|unix.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	err = unix.UtimesNanoAt(int(u.Fd()), "", never, unix.AT_EMPTY_PATH)
	if err := errors.Join(os.NewSyscallError("utimensat", err), u.Close()); err != nil {
		return err
	}
	if err := f.writeJSON(baseFile, b); err != nil {
		return err
	}
	return f.syncFileSystem()
}

// syncFileSystem is one flush of the file system, not one of each file: after
// it, what base.json promises is on the disk.
func (f *folder) syncFileSystem() error {
	dir, err := f.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(dir.Fd())))
}

// makeRoom takes a damaged base away, unless somebody stands on what is left
// of it.
func (s *supervisor) makeRoom(key string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	trash, err := dropBase(ctx, "store base", s.record.Dir, key)
	if err != nil {
		return err
	}
	return removeTree(trash, lifeFile)
}

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
