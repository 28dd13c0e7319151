package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

// A format is a file system that a disk can have. Without a program to make it,
// it is the machine's own.
type format struct {
	name string
	mkfs []string
}

var journaled = format{"ext4 with a journal", []string{"mkfs.ext4", "-q", "-F"}}

// formats are those that the cost of a sandbox is compared on.
var formats = []format{
	{name: "this machine's own"},
	journaled,
	{"ext4 without a journal", []string{"mkfs.ext4", "-q", "-F", "-O", "^has_journal"}},
	{"xfs", []string{"mkfs.xfs", "-q"}},
	{"btrfs", []string{"mkfs.btrfs", "-q"}},
}

// diskSize is that of a disk, of which the host's has to have no more than what
// is written.
const diskSize = 16 << 30

// newDisk makes a file system in a file below dir and mounts it there. It goes
// with dir, by removeAll, or before that by removeDisk.
func newDisk(ctx context.Context, dir, name string, f format) (at string, err error) {
	if os.Geteuid() != 0 {
		return "", errMissing("needs root")
	}
	if _, err := exec.LookPath(f.mkfs[0]); err != nil {
		return "", errMissing("not installed")
	}
	image, at := filepath.Join(dir, name+".img"), filepath.Join(dir, name)
	file, err := os.OpenFile(image, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	if err := errors.Join(file.Truncate(diskSize), file.Close(), os.Mkdir(at, 0o711)); err != nil {
		return "", err
	}
	if err := call(ctx, f.mkfs[0], append(f.mkfs[1:], image)...); err != nil {
		return "", err
	}
	if err := call(ctx, "mount", "-o", "loop", image, at); err != nil {
		return "", errMissing(firstLine(err.Error()))
	}
	// Others than the owner pass through: an engine may run as nobody.
	return at, os.Chmod(at, 0o711)
}

func removeDisk(at string) error {
	// Whoever still holds on to it is on the way out.
	if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
		return os.NewSyscallError("unmount "+at, err)
	}
	return errors.Join(os.Remove(at), os.Remove(at+".img"))
}

// journalless reports whether the folder lies on ext4 that has no journal, as
// some virtual machines have it. There the kernel gives the number of a file
// that was deleted within the last minutes to no other one, and for each new
// file looks at all of those (Linux 6.18, fs/ext4/ialloc.c: recently_deleted).
// Whoever makes and deletes many files, as this program does, measures that.
func journalless(dir string) bool {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return false
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return false
	}
	b, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "journal_task"))
	return err == nil && strings.TrimSpace(string(b)) == "<none>"
}

// measureFormats makes sandboxes on different file systems, in turns.
func measureFormats(ctx context.Context, w *workshop) ([]table, []figure, error) {
	const rounds = 5
	t := table{
		title: "The file system of the state folder",
		note: fmt.Sprintf("All but the machine's own in a file, new and mounted for this; one sandbox after the other, %d on each, in turns, over a base of 100 files. "+
			"Ext4 without a journal looks, for each new file, at those that were deleted nearby within the last minutes; the others do not. "+
			"None is kept ready. Milliseconds.", rounds*block),
		columns: []string{"", "create p50", "first command p50", "destroy p50"},
	}
	shops, costs := make([]*workshop, len(formats)), make([]growth, len(formats))
	for i, f := range formats {
		at, err := filepath.Join(w.outer, "own"), error(nil)
		remove := os.RemoveAll
		if f.mkfs != nil {
			at, err = newDisk(ctx, w.outer, fmt.Sprintf("format-%d", i), f)
			remove = removeDisk
		}
		var missing errMissing
		if errors.As(err, &missing) {
			w.logf("%s: %s", f.name, missing)
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		options := w.localOptions
		options.Dir = filepath.Join(at, "state")
		options.Spares = 0 // the files of these lie there already
		shop := &workshop{options: w.options, dir: at, mark: w.mark, local: local.New(options), localOptions: options}
		defer func() {
			shop.local.Close()
			if err := remove(at); err != nil {
				w.logf("%s: %v", f.name, err) // removed with the rest
			}
		}()
		if err := shop.makeBase(ctx, smallBase, 100); err != nil {
			return nil, nil, err
		}
		shops[i] = shop
	}
	for range rounds {
		for i, shop := range shops {
			if shop == nil {
				continue
			}
			if err := shop.grow(ctx, smallBase, &costs[i]); err != nil {
				return nil, nil, err
			}
			w.looked, w.busy, shop.watch = w.looked+shop.looked, w.busy+shop.busy, watch{}
		}
	}
	for i, c := range costs {
		name := formats[i].name
		if shops[i] == nil {
			t.add(name, "not here", "–", "–")
			continue
		}
		if formats[i].mkfs == nil && journalless(w.outer) {
			name += ", ext4 without a journal"
		}
		t.add(name, ms(c.create.p(.5)), ms(c.first.p(.5)), ms(c.destroy.p(.5)))
		w.logf("%-40s create %6s  first %6s  destroy %6s ms", name, ms(c.create.p(.5)), ms(c.first.p(.5)), ms(c.destroy.p(.5)))
	}
	return []table{t}, nil, nil
}

// settle chooses where the sandboxes are: where the command line says, else in
// the folder for temporary files, unless that distorts what is measured.
func (w *workshop) settle(ctx context.Context) error {
	w.dir = w.outer
	if w.options.dir != "" || !journalless(w.outer) {
		return nil
	}
	start := time.Now()
	at, err := newDisk(ctx, w.outer, "disk", journaled)
	var missing errMissing
	switch {
	case errors.As(err, &missing):
		w.where = "Sandboxes lie on ext4 without a journal, which makes them dear: see the last table."
		w.logf("%s; %s: %s", w.where, journaled.name, missing)
		return nil
	case err != nil:
		return err
	}
	w.dir = at
	w.where = "Sandboxes, ours and the peers', lie on ext4 with a journal, in a file mounted for this, as this machine's own ext4 has none: see the last table."
	w.logf("made a disk: %s (%s)", journaled.name, time.Since(start).Round(time.Millisecond))
	return nil
}
