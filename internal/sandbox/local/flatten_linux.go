package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/layer"
)

// A base that stands on others makes a chain, and a long chain makes every
// look for a file slower. So a chain that has become too long is copied into
// one layer, by a process of its own that needs no worker to live:
//
//	bases/<key>/fs    what was changed since the base below
//	bases/<key>/flat  the same, and all that is below, merged
//
// Sandboxes that are started from then on stand on flat. Those that run
// already, and bases made from them, keep the chain: another inode under a
// running sandbox would be another file. When the last of them is gone, so is
// fs, and with it the last claim to the bases below; see trimBases.
//
// Contents, modes, owners, times and hard links stay as they were. Inode
// numbers cannot: the first git status in a sandbox on flat reads the files of
// the work tree once.

const (
	// maxChain is the most layers a base has for good. Each takes up to 17
	// bytes of the mount option that Linux before 6.8 needs them in, and
	// that holds 255: a chain can still be mounted while it is copied.
	maxChain = 12

	// flattenLock is the file in locksDir that the one process holds that
	// makes chains shorter.
	flattenLock = "flatten"
)

// A flattenOrder tells the process what to do. In a user namespace it cannot
// find out who it is on the host.
type flattenOrder struct {
	Dir      string   `json:"dir"`
	Identity identity `json:"identity"`
}

// flattenSoon starts the process that shortens chains, when this one is too
// long. It is not waited for.
func (p *Provider) flattenSoon(chain []string) {
	if len(chain) <= maxChain {
		return
	}
	if err := p.startFlatten(); err != nil {
		p.log.Warn("chain of bases is not made shorter", "layers", len(chain), "err", err)
	}
}

func (p *Provider) startFlatten() error {
	dir, err := filepath.Abs(p.dir)
	if err != nil {
		return err
	}
	id := currentIdentity()
	arg, err := json.Marshal(flattenOrder{dir, id})
	if err != nil {
		return err
	}
	program, err := exec.LookPath(p.supervisor[0])
	if err != nil {
		return err
	}
	if program, err = filepath.Abs(program); err != nil {
		return err
	}
	var said bytes.Buffer
	cmd := &exec.Cmd{
		Path: program, Args: append(append([]string{}, p.supervisor...), flattenWord, string(arg)),
		Env: runtimeSettings(), Dir: "/", Stderr: &said,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if !id.Root {
		// Who is not root can mount in namespaces of its own, and read
		// there what an agent has closed to everybody.
		attr := initAttr(id)
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = attr.UidMappings, attr.GidMappings
		cmd.SysProcAttr.AmbientCaps = attr.AmbientCaps
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		if err := cmd.Wait(); err != nil {
			p.log.Warn("chains of bases were not made shorter", "err", err, "said", cut(said.String()))
		}
	}()
	return nil
}

// flattenMain is the body of the process.
func flattenMain(arg string) int {
	var o flattenOrder
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	unix.Umask(0o077)
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10) // nobody waits for it
	if err := o.flattenAll(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// flattenAll returns when no chain is too long, or another process is at it.
func (o flattenOrder) flattenAll(ctx context.Context) error {
	var errs []error
	tried := map[string]bool{}
	for {
		lock, err := lockFile(ctx, o.Dir, flattenLock, unix.LOCK_EX, false)
		if errors.Is(err, errLocked) {
			return errors.Join(errs...)
		}
		if err != nil {
			return err
		}
		for {
			key, err := o.next(tried)
			if key == "" || err != nil {
				errs = append(errs, err)
				break
			}
			tried[key] = true
			errs = append(errs, fault.Wrap("flatten base "+key, o.flatten(ctx, key)))
		}
		_ = lock.Close()
		// Whoever came while the lock was held has gone away again.
		key, err := o.next(tried)
		if key == "" || err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
}

// next returns the key of a base whose chain is too long, or "".
func (o flattenOrder) next(tried map[string]bool) (string, error) {
	keys, err := baseKeys(o.Dir)
	if err != nil {
		return "", err
	}
	for _, key := range keys {
		if tried[key] {
			continue
		}
		names, err := readLayers("flatten", o.Dir, key, o.Identity)
		if err == nil && len(names) > maxChain {
			return key, nil
		}
		if ignoreNotFound(err) != nil {
			return "", err
		}
	}
	return "", nil
}

// flatten merges one chain. The copy is made in the trash, under a lock that
// says that somebody is at work there: when this process dies, it is what it
// looks like.
func (o flattenOrder) flatten(ctx context.Context, key string) (err error) {
	names, err := readLayers("flatten", o.Dir, key, o.Identity)
	if err != nil {
		return err
	}
	before, err := loadBase("flatten", o.Dir, key)
	if err != nil {
		return err
	}
	stage := filepath.Join(o.Dir, trashDir, newInstance())
	if err := os.Mkdir(stage, 0o700); err != nil {
		return err
	}
	life, err := lockNew(ctx, filepath.Join(stage, lifeFile))
	if err != nil {
		return errors.Join(err, os.RemoveAll(stage))
	}
	defer life.Close()
	defer func() { err = errors.Join(err, removeTree(stage, lifeFile)) }()

	var most int64
	for _, name := range names {
		b, err := checkLayer("flatten", o.Dir, name, o.Identity)
		if err != nil {
			return err
		}
		most += max(b.Bytes, b.FlatBytes)
	}
	if err := hasRoom(stage, most); err != nil {
		return err
	}
	flat := filepath.Join(stage, flatDir)
	if err := o.merge(ctx, names, flat); err != nil {
		return err
	}
	size, err := layer.Size(ctx, unix.AT_FDCWD, flat)
	if err != nil {
		return err
	}
	f, err := openFolder(stage)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.syncFileSystem(); err != nil {
		return err
	}
	return o.swap(ctx, before, flat, size)
}

func lockNew(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock(ctx, f, false); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// merge copies what a sandbox on the layers would see of them.
func (o flattenOrder) merge(ctx context.Context, names []string, to string) error {
	paths := make([]string, 0, len(names))
	for _, name := range names {
		paths = append(paths, layerPath(o.Dir, name))
	}
	fd, err := openOverlay(o.Identity.Root, "", "", paths)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return layer.Copy(ctx, fd, ".", to)
}

// swap makes flat a part of the base, for those who come from now on. A base
// that was removed or made anew meanwhile is not touched.
func (o flattenOrder) swap(ctx context.Context, before base, flat string, size int64) error {
	bases, err := lockBases(ctx, o.Dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer bases.Close()
	b, err := loadBase("flatten", o.Dir, before.Key)
	if err != nil || !b.Created.Equal(before.Created) || b.Flat {
		return ignoreNotFound(err)
	}
	to := filepath.Join(basePath(o.Dir, b.Key), flatDir)
	if _, err := toTrash(o.Dir, to); err != nil { // of one who died right here
		return err
	}
	if err := os.Rename(flat, to); err != nil {
		return err
	}
	if err := syncFolder(filepath.Dir(to)); err != nil {
		return err
	}
	b.Flat, b.FlatBytes = true, size
	return rewriteBase(o.Dir, b)
}
