package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// basesLock is the file in locksDir that keeps who stands on what from
// changing. Shared: a sandbox is about to stand on a base, from the look at
// the base until it is written down. Exclusive: a base, or a layer of one, is
// about to go or to be replaced. Both take milliseconds.
const basesLock = "bases"

func lockBases(ctx context.Context, dir string, how int) (*os.File, error) {
	return lockFile(ctx, dir, basesLock, how, true)
}

// A use is who stands on one base.
type use struct {
	by  []string // people's words, each user once
	raw bool     // somebody stands on its fs/
}

// readUses finds out who stands on each base. Without the exclusive lock it
// can be wrong about what begins at this moment.
//
// Sandboxes are read first. A sandbox that is frozen meanwhile is seen as
// itself or, when it has gone by then, as the base that it became.
func readUses(dir string) (map[string]use, error) {
	uses := map[string]use{}
	add := func(who string, layers []string) {
		seen := map[string]bool{}
		for _, name := range layers {
			key := keyOf(name)
			u := uses[key]
			u.raw = u.raw || key == name
			if !seen[key] {
				u.by = append(u.by, who)
			}
			seen[key], uses[key] = true, u
		}
	}
	boxes, err := os.ReadDir(filepath.Join(dir, sandboxesDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, e := range boxes {
		r, err := readRecord(filepath.Join(dir, sandboxesDir, e.Name()))
		if err != nil {
			return nil, err
		}
		add("sandbox "+r.Key, r.Layers)
	}
	keys, err := baseKeys(dir)
	if err != nil {
		return nil, err
	}
	for _, key := range keys {
		b, err := loadBase("read bases", dir, key)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return nil, err
		}
		add("base "+key, b.Below) // nobody can stand on one that cannot be read
	}
	return uses, nil
}

// readRecord returns what is written down of a sandbox, and nothing of one that
// stands on nothing: it is gone, or not made yet, or dead and its record was
// lost in a crash of the host.
func readRecord(path string) (r record, err error) {
	f, err := openFolder(path)
	if err != nil {
		return r, ignoreGone(err)
	}
	defer f.Close()
	if err = f.readJSON(specFile, &r); err == nil {
		return r, nil
	}
	life, lifeErr := f.life(context.Background(), false)
	if lifeErr == nil {
		_ = life.Close()
	}
	if errors.Is(lifeErr, errLocked) {
		return record{}, ignoreGone(err)
	}
	return record{}, nil
}

// baseKeys returns the keys that have a folder, sorted.
func baseKeys(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(dir, basesDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var keys []string
	for _, e := range entries {
		if key, ours := strings.CutPrefix(e.Name(), keyName("")); ours && sandbox.ValidID(key) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// Bases reads what is in the state folder. Sizes were measured when the base
// was made.
func (p *Provider) Bases(context.Context) ([]sandbox.BaseInfo, error) {
	const op = "local: list bases"
	keys, err := baseKeys(p.dir)
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	uses, err := readUses(p.dir)
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	infos := make([]sandbox.BaseInfo, 0, len(keys))
	for _, key := range keys {
		info, err := p.baseInfo(op, key)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed at this moment
		}
		if err != nil {
			return nil, fault.Wrap(op, err)
		}
		info.Users = len(uses[key].by)
		infos = append(infos, info)
	}
	return infos, nil
}

func (p *Provider) baseInfo(op, key string) (sandbox.BaseInfo, error) {
	path := basePath(p.dir, key)
	var folder, used unix.Stat_t
	if err := unix.Lstat(path, &folder); err != nil {
		return sandbox.BaseInfo{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	b, err := loadBase(op, p.dir, key)
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return sandbox.BaseInfo{}, err
	}
	info := sandbox.BaseInfo{Key: key, Labels: b.Labels, Created: b.Created, Layers: 1 + len(b.Below), Bytes: b.FlatBytes}
	if !b.Alone {
		info.Bytes += b.Bytes
	}
	if b.Created.IsZero() {
		info.Created = time.Unix(folder.Mtim.Unix()).UTC()
	}
	if unix.Lstat(filepath.Join(path, usedFile), &used) == nil && used.Mtim.Sec > 0 {
		info.Used = time.Unix(used.Mtim.Unix()).UTC()
	}
	names, err := readLayers(op, p.dir, key, currentIdentity())
	switch {
	case err == nil:
		info.Layers = len(names)
	case fault.KindOf(err) == fault.NotFound:
		info.Damaged = true
	default:
		return sandbox.BaseInfo{}, err
	}
	return info, nil
}

// touchBase notes that a sandbox was started from the base.
func touchBase(dir, key string) error {
	path := filepath.Join(basePath(dir, key), usedFile)
	err := os.Chtimes(path, time.Time{}, time.Now())
	if errors.Is(err, os.ErrNotExist) { // made by a version that did not note it
		err = os.WriteFile(path, nil, 0o600)
	}
	return err
}

// RemoveBase takes the base out of the way at once and then deletes it. What
// is left of sandboxes whose supervisor is dead does not count as a user.
func (p *Provider) RemoveBase(ctx context.Context, key string) error {
	const op = "local: remove base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	if _, err := os.Lstat(basePath(p.dir, key)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	trash, err := dropBase(ctx, op, p.dir, key)
	if fault.KindOf(err) == fault.Conflict {
		// The list tidies up after the dead.
		if _, listErr := p.List(ctx, nil); listErr != nil {
			return p.ctxFault(ctx, op, errors.Join(err, listErr))
		}
		trash, err = dropBase(ctx, op, p.dir, key)
	}
	if err == nil && trash != "" {
		err = removeTree(trash, lifeFile)
	}
	return p.ctxFault(ctx, op, err)
}

// dropBase moves the base into the trash, and returns where it is there, or
// "" when there is no such base. Who dies after it leaves the rest to sweep.
func dropBase(ctx context.Context, op, dir, key string) (trash string, err error) {
	bases, err := lockBases(ctx, dir, unix.LOCK_EX)
	if err != nil {
		return "", err
	}
	defer bases.Close()
	uses, err := readUses(dir)
	if err != nil {
		return "", err
	}
	if by := uses[key].by; len(by) > 0 {
		slices.Sort(by)
		return "", fault.New(op, fault.Conflict, "base %s is in use by %s", key, someOf(by)).
			Hinted("It can be removed when they are gone.")
	}
	return toTrash(dir, basePath(dir, key))
}

// someOf names a few.
func someOf(names []string) string {
	const most = 3
	if len(names) > most {
		return strings.Join(names[:most], ", ") + " and others"
	}
	return strings.Join(names, ", ")
}

func toTrash(dir, path string) (string, error) {
	trash := filepath.Join(dir, trashDir, newInstance())
	err := os.Rename(path, trash)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return trash, err
}

// trimBases deletes the layers that a flat base needs no more: when nobody
// stands on its fs/, neither that nor what was below it is of any use to it.
func (p *Provider) trimBases(ctx context.Context) error {
	keys, err := baseKeys(p.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, key := range keys {
		path := basePath(p.dir, key)
		if !isFolder(filepath.Join(path, flatDir)) || !isFolder(filepath.Join(path, fsDir)) {
			continue
		}
		trash, err := p.trimBase(ctx, key)
		if err == nil && trash != "" {
			err = removeTree(trash, lifeFile)
		}
		if !errors.Is(err, errLocked) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (p *Provider) trimBase(ctx context.Context, key string) (trash string, err error) {
	bases, err := lockFile(ctx, p.dir, basesLock, unix.LOCK_EX, false)
	if err != nil {
		return "", err // another time
	}
	defer bases.Close()
	b, err := loadBase("trim base", p.dir, key)
	if err != nil || !b.Flat {
		return "", ignoreNotFound(err)
	}
	uses, err := readUses(p.dir)
	if err != nil || uses[key].raw {
		return "", err
	}
	// First the word, then the deed: fs/ that is still there after a crash
	// is found here again.
	b.Below, b.Alone = nil, true
	if err := rewriteBase(p.dir, b); err != nil {
		return "", err
	}
	return toTrash(p.dir, filepath.Join(basePath(p.dir, key), fsDir))
}

// rewriteBase replaces what describes a base. The caller holds the exclusive
// lock.
func rewriteBase(dir string, b base) error {
	f, err := openFolder(basePath(dir, b.Key))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.replaceJSON(baseFile, b, (*os.File).Sync); err != nil {
		return err
	}
	return syncFolder(f.path)
}

func isFolder(path string) bool {
	st, err := os.Lstat(path)
	return err == nil && st.IsDir()
}

func ignoreNotFound(err error) error {
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}
