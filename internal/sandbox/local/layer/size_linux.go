package layer

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// maxCounted is how many files are measured. It takes some seconds.
const maxCounted = 2_000_000

var errEnough = errors.New("enough was counted")

// Size returns how many bytes the folder called name in dir takes on the disk,
// with all that is in it. A file with several names counts once when all of
// them lie in the folder. Of more than two million files, or as many folders
// side by side as a copy refuses, it returns what the first of them take.
func Size(ctx context.Context, dir int, name string) (int64, error) {
	var bytes int64
	counted := 0
	add := func(st *unix.Stat_t) error {
		links := int64(1)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			links = max(int64(st.Nlink), 1)
		}
		bytes += st.Blocks * 512 / links
		if counted++; counted >= maxCounted {
			return errEnough
		}
		return nil
	}
	w := &walk{
		ctx:   ctx,
		file:  func(_ *frame, _ string, st *unix.Stat_t) error { return add(st) },
		enter: func(_ *frame, _ string, st *unix.Stat_t) (int, error) { return -1, add(st) },
		leave: func(*frame) error { return nil },
	}
	top, err := openFolder(dir, name)
	if err != nil {
		return 0, err
	}
	if err = add(&top.st); err == nil {
		err = w.run(top)
	}
	if errors.Is(err, errEnough) || errors.Is(err, errTooMany) {
		err = nil
	}
	return bytes, err
}
