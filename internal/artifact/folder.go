package artifact

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gocloud.dev/blob/fileblob"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// openFolder opens the store in a folder, and makes it.
func openFolder(dir string) (*Store, error) {
	if dir == "" {
		return nil, fault.New("", fault.Invalid, "no folder was named").Hinted("Write it as file:///path, or just /path.")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, classed(err)
	}
	bucket, err := fileblob.OpenBucket(dir, &fileblob.Options{
		DirFileMode: 0o700,
		NoTempDir:   true, // a rename works only within one file system
		Metadata:    fileblob.MetadataDontWrite,
	})
	if err != nil {
		return nil, classed(err)
	}
	sweep(dir)
	return &Store{bucket: bucket, dir: dir, drop: bucket.Delete}, nil
}

// syncDir puts a rename on the disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// prune removes the folders in dir, and dir itself, that have become empty: fileblob leaves them.
func prune(dir string) {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		_ = os.Remove(dirs[i]) // fails when something lies in it
	}
}

const (
	sweptMark = ".swept"
	sweepAge  = 24 * time.Hour
)

// sweep removes, at most once a day, what processes that were killed while
// they wrote left behind.
func sweep(dir string) {
	mark := filepath.Join(dir, sweptMark)
	if info, err := os.Stat(mark); err == nil && time.Since(info.ModTime()) < sweepAge {
		return
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, unfinished) {
			return nil
		}
		if info, err := d.Info(); err == nil && time.Since(info.ModTime()) > sweepAge {
			_ = os.Remove(path)
		}
		return nil
	})
	if err := os.WriteFile(mark, nil, 0o600); err == nil {
		now := time.Now()
		_ = os.Chtimes(mark, now, now)
	}
}

// unfinished is how fileblob ends the name of a file that it still writes.
const unfinished = ".tmp"
