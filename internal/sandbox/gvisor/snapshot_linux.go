package gvisor

import (
	"context"
	"encoding/json"
	"errors"
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

// Every base is whole: what it was made on is copied into it. So bases stand
// on nothing, and only sandboxes stand on them.

// Snapshot has init stop everything, send the files, and let it go on. All is
// copied meanwhile, so it takes as long as the disk needs for it.
func (p *Provider) Snapshot(ctx context.Context, ref sandbox.Ref, key string) error {
	const op = "gvisor: snapshot sandbox"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	return p.askOnce(ctx, op, ref, request{Op: opSnapshot, Base: key})
}

// A baseMeta is what stands in a file beside the image of a base.
type baseMeta struct {
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
}

const (
	imageSuffix = ".erofs"
	metaSuffix  = ".json"
)

func metaPath(dir, key string) string {
	return strings.TrimSuffix(basePath(dir, key), imageSuffix) + metaSuffix
}

// writeMeta writes what is known of a base that is about to get its name. The
// file's own time is when the base was last used: at first, when it was made.
func writeMeta(dir, key string, labels map[string]string) error {
	m := baseMeta{Labels: labels, Created: time.Now().UTC().Truncate(time.Millisecond)}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, basesDir, newPrefix+newInstance())
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return errors.Join(err, ignoreGone(os.Remove(temp)))
	}
	err = os.Chtimes(temp, m.Created, m.Created)
	if err == nil {
		err = os.Rename(temp, metaPath(dir, key))
	}
	if err != nil {
		return errors.Join(err, ignoreGone(os.Remove(temp)))
	}
	return nil
}

// usedNow notes that a sandbox starts from the base.
func usedNow(dir, key string) {
	_ = os.Chtimes(metaPath(dir, key), time.Time{}, time.Now()) // one without notes was made by an older version
}

// lockBase keeps the base from being removed, or with exclusive everybody from
// starting from it.
func (p *Provider) lockBase(ctx context.Context, key string, exclusive bool) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(p.dir, locksDir, "bases"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	if err := lockAs(ctx, f, how, true); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock base %s: %w", key, err)
	}
	return f, nil
}

// users counts the sandboxes that stand on each base.
func (p *Provider) users() (map[string]int, error) {
	specs, err := filepath.Glob(filepath.Join(p.dir, sandboxesDir, "*", specFile))
	if err != nil {
		return nil, err
	}
	n := map[string]int{}
	for _, name := range specs {
		var r record
		b, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if ignoreGone(err) != nil {
			return nil, err
		}
		if err == nil && r.Base != "" {
			n[r.Base]++
		}
	}
	return n, nil
}

// Bases reads what is in the folder of bases.
func (p *Provider) Bases(ctx context.Context) ([]sandbox.BaseInfo, error) {
	const op = "gvisor: list bases"
	entries, err := os.ReadDir(filepath.Join(p.dir, basesDir))
	if err != nil {
		return nil, fault.Wrap(op, ignoreGone(err))
	}
	users, err := p.users()
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	var infos []sandbox.BaseInfo
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, contextFault(ctx, op, ctx.Err())
		}
		name, isImage := strings.CutSuffix(e.Name(), imageSuffix)
		key, named := strings.CutPrefix(name, keyName(""))
		if !isImage || !named || !sandbox.ValidID(key) {
			continue
		}
		var st unix.Stat_t
		if unix.Lstat(basePath(p.dir, key), &st) != nil {
			continue // just removed
		}
		info := sandbox.BaseInfo{
			Key: key, Created: time.Unix(st.Mtim.Unix()), Bytes: st.Blocks * 512, Layers: 1, Users: users[key],
			Damaged: checkBase(basePath(p.dir, key)) != nil,
		}
		readMeta(metaPath(p.dir, key), &info)
		infos = append(infos, info)
	}
	return infos, nil
}

// readMeta adds what the notes say, when there are any.
func readMeta(name string, info *sandbox.BaseInfo) {
	var m baseMeta
	b, err := os.ReadFile(name)
	if err != nil || json.Unmarshal(b, &m) != nil {
		return
	}
	info.Labels, info.Created = m.Labels, m.Created
	if st, err := os.Stat(name); err == nil && st.ModTime().After(m.Created) {
		info.Used = st.ModTime()
	}
}

// RemoveBase deletes the image. No sandbox starts from it meanwhile.
func (p *Provider) RemoveBase(ctx context.Context, key string) error {
	const op = "gvisor: remove base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	if _, err := os.Stat(filepath.Join(p.dir, locksDir)); errors.Is(err, os.ErrNotExist) {
		return nil // nothing was ever made here
	}
	lock, err := p.lockBase(ctx, key, true)
	if err != nil {
		return contextFault(ctx, op, err)
	}
	defer lock.Close()
	users, err := p.users()
	if err != nil {
		return fault.Wrap(op, err)
	}
	if n := users[key]; n > 0 {
		return fault.New(op, fault.Conflict, "base %s is in use by %d sandboxes", key, n).Hinted("It can be removed when they are gone.")
	}
	return fault.Wrap(op, errors.Join(ignoreGone(os.Remove(basePath(p.dir, key))), ignoreGone(os.Remove(metaPath(p.dir, key)))))
}

// sweepBases removes notes that never got their image: who wrote them died.
func (p *Provider) sweepBases() error {
	entries, err := os.ReadDir(filepath.Join(p.dir, basesDir))
	if err != nil {
		return ignoreGone(err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	var errs []error
	for _, e := range entries {
		name, isMeta := strings.CutSuffix(e.Name(), metaSuffix)
		if !strings.HasPrefix(e.Name(), newPrefix) && (!isMeta || slices.Contains(names, name+imageSuffix)) {
			continue
		}
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > time.Hour {
			errs = append(errs, ignoreGone(os.Remove(filepath.Join(p.dir, basesDir, e.Name()))))
		}
	}
	return errors.Join(errs...)
}

// snapshot is freeze for a sandbox that goes on.
func (g *guardian) snapshot(key string) error {
	const op = "snapshot"
	g.ending.Lock()
	defer g.ending.Unlock()
	if err := g.usable(op); err != nil {
		return err
	}
	if haveBase(g.record.Dir, key) == nil {
		return nil
	}
	stage := filepath.Join(g.box.path, "snapshot-"+newInstance()+imageSuffix)
	defer os.Remove(stage)
	if err := g.pack(opCopy, stage); err != nil {
		return fileFault(op, err)
	}
	return fileFault(op, g.publish(stage, key))
}

// copyAll sends the files while everything stands still.
func (in *initProcess) copyAll(s *stream) (func(bool), error) {
	in.uploads.Lock()
	in.still.Lock()
	paused := in.halted != nil
	letGo := func() {
		if !paused {
			in.wake()
		}
		in.still.Unlock()
		in.uploads.Unlock()
	}
	if err := in.halt(); err != nil {
		letGo()
		return nil, err
	}
	return func(ok bool) {
		defer letGo()
		if ok {
			in.sendAll(s)
		}
	}, nil
}
