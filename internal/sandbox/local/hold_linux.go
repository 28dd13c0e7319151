package local

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// hold keeps every process in the sandbox from running until letGo is called.
// What they were doing in the kernel is done when it returns.
func (s *supervisor) hold(ctx context.Context) (letGo func() error, err error) {
	if inhabited(s.left.Cgroup) {
		return freezeGroup(ctx, s.left.Cgroup)
	}
	if _, err := s.order(order{Op: opHold}); err != nil {
		return nil, err
	}
	return func() error {
		_, err := s.order(order{Op: opLetGo})
		return err
	}, nil
}

// inhabited reports whether somebody lives in the cgroup. The sandbox may have
// had to do without.
func inhabited(group string) bool {
	if group == "" || !isCgroup(group) {
		return false
	}
	events, err := os.ReadFile(filepath.Join(group, "cgroup.events"))
	return err == nil && bytes.Contains(events, []byte("populated 1"))
}

// freezeGroup stops everything in the cgroup where it stands. One that was
// stopped before stays so.
func freezeGroup(ctx context.Context, group string) (thaw func() error, err error) {
	file := filepath.Join(group, "cgroup.freeze")
	was, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(was, []byte("1")) {
		return func() error { return nil }, nil
	}
	thaw = func() error { return ignoreGone(os.WriteFile(file, []byte("0"), 0)) }
	events, err := os.Open(filepath.Join(group, "cgroup.events"))
	if err != nil {
		return nil, err
	}
	defer events.Close()
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		return nil, err
	}
	for buf := make([]byte, 4096); ; {
		n, err := events.ReadAt(buf, 0)
		if n == 0 {
			return nil, errors.Join(err, thaw())
		}
		if bytes.Contains(buf[:n], []byte("frozen 1")) {
			return thaw, nil
		}
		if err := waitEvents(ctx, int(events.Fd()), unix.POLLPRI); err != nil {
			return nil, errors.Join(err, thaw())
		}
	}
}

// What init does where there is no cgroup. One signal to all of them is one
// stroke: the kernel lets nobody fork away from it.

const (
	// haltTime bounds how long init waits for all to stand still.
	haltTime = 10 * time.Second
	// stuckTime is when a thread that waits in the kernel and cannot be
	// stopped there is taken to stand still: a parent in vfork(2) waits for
	// a child that is stopped itself.
	stuckTime = 2 * time.Second
)

func (in *initProcess) hold() error {
	if in.halted != nil {
		return nil
	}
	in.halted = map[int]bool{}
	err := eachThread(func(pid int, state byte) bool {
		if state == 'T' {
			in.halted[pid] = true
		}
		return true
	})
	if err == nil {
		err = ignoreNobody(unix.Kill(-1, unix.SIGSTOP))
	}
	begun := time.Now()
	for step := 100 * time.Microsecond; err == nil; step = min(2*step, 20*time.Millisecond) {
		still, late := true, time.Since(begun) > stuckTime
		err = eachThread(func(_ int, state byte) bool {
			still = bytes.IndexByte([]byte("TtZX"), state) >= 0 || late && state == 'D'
			return still
		})
		if still && err == nil {
			return nil
		}
		if time.Since(begun) > haltTime {
			err = fault.New("hold", fault.Unavailable, "the processes of the sandbox do not stop")
		}
		time.Sleep(step) // a stop gives no sign to anybody but a parent
	}
	in.letGo()
	return err
}

// letGo does not wake who had been stopped before. All others are told to go
// on, in whatever state they are: a parent in vfork(2) has not stopped yet, and
// would when its child goes on.
func (in *initProcess) letGo() {
	if in.halted == nil {
		return
	}
	_ = eachThread(func(pid int, _ byte) bool {
		if !in.halted[pid] {
			_ = unix.Kill(pid, unix.SIGCONT) // an error: it is gone
		}
		return true
	})
	in.halted = nil
}

func ignoreNobody(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// eachThread calls f with each thread of each process in the sandbox but init,
// until f says no.
func eachThread(f func(pid int, state byte) bool) error {
	files, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/stat")
	if err != nil {
		return err
	}
	for _, name := range files {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(name)))))
		if err != nil || pid == 1 {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		_, after, ok := cutLast(b, ')')
		if ok && len(after) > 1 && !f(pid, after[1]) {
			return nil
		}
	}
	return nil
}
