package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A base is what base.json holds. The file is the last thing that a base
// gets before it has its name.
type base struct {
	Version int       `json:"version"`
	Key     string    `json:"key"`
	Created time.Time `json:"created"`
	Agent   int       `json:"agent"`           // the host's uid of its files
	Below   []string  `json:"below,omitempty"` // keys of the bases it was made on, uppermost first
}

const (
	// In a base of version 1, folders that were moved remember their old
	// paths from the workspace's root on, in one of version 2 from fs/ on.
	baseVersion = 2
	baseFile    = "base.json"
	// maxLayers is well below what an overlay takes (500).
	maxLayers = 64
)

func basePath(dir, key string) string { return filepath.Join(dir, basesDir, keyName(key)) }

// readBase returns the base under key when it is whole, by itself.
func readBase(op, dir, key string, id identity) (base, error) {
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
	switch {
	case b.Version != baseVersion || b.Key != key:
		return missing(fmt.Errorf("it is of version %d and called %q", b.Version, b.Key))
	case b.Agent != id.agent():
		return missing(fmt.Errorf("it belongs to uid %d, and agents here are %d", b.Agent, id.agent()))
	case len(b.Below) >= maxLayers:
		return missing(fmt.Errorf("it has %d layers", len(b.Below)+1))
	}
	for _, l := range layers {
		if st, err := os.Lstat(filepath.Join(basePath(dir, key), fsDir, l.name)); err != nil || !st.IsDir() {
			return missing(fmt.Errorf("its %s is damaged", l.name))
		}
	}
	return b, nil
}

// readLayers returns the keys of the base and all below it, when all are
// whole.
func readLayers(op, dir, key string, id identity) ([]string, error) {
	b, err := readBase(op, dir, key, id)
	if err != nil {
		return nil, err
	}
	for _, k := range b.Below {
		if !sandbox.ValidID(k) {
			return nil, fault.New(op, fault.NotFound, "base %q is damaged: it names %q", key, k)
		}
		if _, err := readBase(op, dir, k, id); err != nil {
			return nil, fault.Wrap(op+": base "+key, err)
		}
	}
	return append([]string{key}, b.Below...), nil
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
	const op = "local: freeze sandbox"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	sb, err := p.attach(ctx, op, ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	_, err = sb.ask(ctx, op, request{Op: opFreeze, Base: key})
	return err
}

// freeze makes the base, step by step so that each can be the last one before
// a crash: the files move into a folder of the sandbox, are written to the
// disk with what describes them, and the folder gets its name.
func (s *supervisor) freeze(key string) error {
	const op = "freeze"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", cut(key))
	}
	s.ending.Lock()
	defer s.ending.Unlock()
	select {
	case <-s.over:
		return fault.New(op, fault.NotFound, "the sandbox is gone")
	default:
	}
	_, err := readLayers(op, s.record.Dir, key, s.record.Identity)
	if err == nil {
		return nil
	}
	if fault.KindOf(err) != fault.NotFound {
		return err
	}
	if len(s.record.Layers) >= maxLayers {
		return fault.New(op, fault.Invalid, "the sandbox stands on %d bases already", len(s.record.Layers)).
			Hinted("Make the base anew from the repository.")
	}
	s.setState(used)
	s.kill()
	return fileFault(op, s.store(key))
}

func (s *supervisor) store(key string) error {
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
	b := base{Version: baseVersion, Key: key, Created: time.Now().UTC(), Agent: s.record.Identity.agent(), Below: s.record.Layers}
	f, err := openFolder(stage)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.writeJSON(baseFile, b); err != nil {
		return err
	}
	// One flush of the file system, not one of each file: after it, what
	// base.json promises is on the disk.
	dir, err := f.open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	return s.publish(stage, key)
}

// publish gives the base its name. One that is whole keeps the name against
// ours; one that is damaged makes room.
func (s *supervisor) publish(stage, key string) error {
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
		trash := filepath.Join(s.record.Dir, trashDir, newInstance())
		if err := os.Rename(to, trash); ignoreGone(err) != nil {
			return err
		}
		if err := removeTree(trash, lifeFile); err != nil {
			return err
		}
	}
}

func syncFolder(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
