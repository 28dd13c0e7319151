package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/layer"
)

// snapshot copies the files of the sandbox into a base while everything in it
// stands still. Until the base has its name the copy is a folder of the
// sandbox, and goes with it whatever happens.
func (s *supervisor) snapshot(key string, gone <-chan struct{}) (err error) {
	const op = "snapshot"
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	go func() {
		select {
		case <-gone:
			cancel(fault.New("", fault.Cancelled, "nobody waits for it any more"))
		case <-s.asking:
			cancel(fault.New("", fault.NotFound, "the sandbox is being destroyed"))
		case <-s.initDone:
			cancel(fault.New("", fault.NotFound, "the sandbox is gone"))
		case <-ctx.Done():
		}
	}()
	// In this order: a pause, too, has init to itself before it looks whether
	// the sandbox is ending.
	letGo, err := s.holdInit(ctx)
	if err != nil {
		return fault.Wrap(op, err)
	}
	defer letGo()
	s.ending.Lock()
	defer s.ending.Unlock()
	if done, err := s.canStore(op, key); done {
		return err
	}
	if err := s.usable(op); err != nil {
		return err
	}
	stage := filepath.Join(s.box.path, stageDir+"-"+newInstance())
	if err := os.Mkdir(stage, 0o700); err != nil {
		return fileFault(op, err)
	}
	defer func() {
		if removeErr := removeTree(stage, ""); err == nil {
			err = removeErr
		}
	}()
	bytes, err := s.copyStill(ctx, stage)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err != nil {
		return fileFault(op, err)
	}
	letGo()
	return fileFault(op, s.publish(stage, key, bytes))
}

// holdInit waits for uploads that are under way, and then keeps everybody else
// from having init do something until letGo is called, once or twice. An
// upload that waits for a pause to end is not waited for.
func (s *supervisor) holdInit(ctx context.Context) (letGo func(), err error) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	uploads := false
	for {
		// Lock could not be called off. Nor can an upload end while init is
		// held, so that the two are taken together or not at all.
		if !uploads {
			uploads = s.uploads.TryLock()
		}
		if s.still.init.TryLock() {
			if uploads || s.still.paused {
				var once sync.Once
				return func() {
					once.Do(func() {
						s.still.init.Unlock()
						if uploads {
							s.uploads.Unlock()
						}
					})
				}, nil
			}
			s.still.init.Unlock()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if uploads {
				s.uploads.Unlock()
			}
			return nil, context.Cause(ctx)
		}
	}
}

// copyStill stops the processes, unless they are paused anyway, and copies the
// files. It returns how much of the disk they take.
func (s *supervisor) copyStill(ctx context.Context, stage string) (bytes int64, err error) {
	if !s.still.paused {
		cgroup, err := s.halt(ctx, true)
		if err != nil {
			return 0, fault.Wrap("hold processes", errors.Join(err, s.wake(cgroup)))
		}
		defer func() { err = errors.Join(err, s.wake(cgroup)) }()
	}
	files := filepath.Join(s.box.path, fsDir)
	if bytes, err = layer.Size(ctx, unix.AT_FDCWD, files); err != nil {
		return 0, err
	}
	if err := hasRoom(stage, bytes); err != nil {
		return 0, err
	}
	return bytes, layer.Copy(ctx, unix.AT_FDCWD, files, filepath.Join(stage, fsDir))
}

// hasRoom fails when a copy of so many bytes cannot fit, rather than to fill
// the disk before it fails. A copy that shares its blocks needs none.
func hasRoom(dir string, bytes int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	free := int64(fs.Bavail) * fs.Bsize
	if bytes <= free || layer.Shares(dir) {
		return nil
	}
	return fault.New("copy files", fault.Full, "they take %d MB, and %d MB are free", bytes>>20, free>>20).
		Hinted("Free some space on the disk of the state folder.")
}
