package local

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Pause has the kernel freeze the sandbox's cgroup, init and all: no process
// in it can tell, but by a clock, that time went by. Where there is no cgroup
// (an ordinary user to whom none was delegated) init stops every other process
// with SIGSTOP, and they are continued with SIGCONT. That, a process can tell:
// a parent is told of the stop of its children, and a handler for SIGCONT runs.
//
// The clocks go on: a time-out that a process has set for itself ends when it
// would have, or else when the process goes on. The gateway goes on, too: a
// call of the model that is under way is paid for, and its answer waits in
// the connection for as long as the model's side keeps it open.
//
// What needs init fails with fault.Conflict meanwhile: Start, Upload,
// Download, Health, Signal, OpenTerminal and DialPort. An upload that was
// begun before is finished afterwards.
func (p *Provider) Pause(ctx context.Context, ref sandbox.Ref) error {
	return p.askOnce(ctx, "local: pause sandbox", ref, opPause)
}

// Resume takes a Pause back.
func (p *Provider) Resume(ctx context.Context, ref sandbox.Ref) error {
	return p.askOnce(ctx, "local: resume sandbox", ref, opResume)
}

func (p *Provider) askOnce(ctx context.Context, op string, ref sandbox.Ref, what string) error {
	sb, err := p.attach(ctx, op, ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	_, err = sb.ask(ctx, op, request{Op: what})
	return err
}

// A stillness says whether a sandbox is paused, and keeps what needs init from
// init meanwhile. Its zero value is that of one that runs.
type stillness struct {
	init   sync.RWMutex  // held for reading while init is at an order, for writing while it is being stopped
	paused bool          // guarded by init
	cgroup bool          // guarded by init: the cgroup was frozen
	awake  chan struct{} // guarded by init; closed by resume
	frozen atomic.Bool   // the cgroup was frozen once, and may be
}

// restTime bounds how long the processes of a sandbox may take until they
// stand still. One that the kernel keeps waiting, for a disk say, does not.
const restTime = 10 * time.Second

// pause returns when everything in the sandbox stands still. What init is at
// is finished first.
func (s *supervisor) pause() error {
	const op = "pause"
	s.still.init.Lock()
	defer s.still.init.Unlock()
	if err := s.usable(op); err != nil || s.still.paused {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), restTime)
	defer cancel()
	cgroup, err := s.halt(ctx, false)
	if err == nil {
		// Whoever destroys it holds the lock that mark needs until all are
		// dead, and only those that are not frozen can die everywhere.
		err = s.usable(op)
	}
	if err == nil {
		err = s.mark()
	}
	if err != nil {
		wakeErr := errors.Join(s.wake(cgroup), s.unmark())
		select {
		case <-s.initDone:
			return fault.New(op, fault.NotFound, "the sandbox is gone")
		default:
		}
		if ending := s.usable(op); ending != nil {
			return ending
		}
		if wakeErr != nil {
			s.log.Error("sandbox not set going again", "err", wakeErr)
		}
		return fileFault(op, err)
	}
	s.still.paused, s.still.cgroup, s.still.awake = true, cgroup, make(chan struct{})
	return nil
}

func (s *supervisor) resume() error {
	const op = "resume"
	s.still.init.Lock()
	defer s.still.init.Unlock()
	if err := s.usable(op); err != nil || !s.still.paused {
		return err
	}
	if err := s.wake(s.still.cgroup); err != nil {
		return fault.Wrap(op, err)
	}
	s.still.paused = false
	close(s.still.awake)
	return s.unmark()
}

// mark leaves word for List, which asks nobody. When the sandbox is being
// destroyed nothing may appear in its folder any more.
func (s *supervisor) mark() error {
	s.ending.Lock()
	defer s.ending.Unlock()
	if err := s.usable("pause"); err != nil {
		return err
	}
	return s.box.writeJSON(pausedFile, struct{}{})
}

func (s *supervisor) unmark() error {
	err := unix.Unlinkat(s.box.fd(), pausedFile, 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlink", Path: pausedFile, Err: err}
	}
	return nil
}

// command has init do something. A paused init cannot: that is
// fault.Conflict.
func (s *supervisor) command(o order, fds ...int) (answer, []*os.File, error) {
	s.still.init.RLock()
	defer s.still.init.RUnlock()
	if s.still.paused {
		return answer{}, nil, fault.New("", fault.Conflict, "the sandbox is paused").Hinted("Resume it first.")
	}
	return s.orders.do(o, fds...)
}

// orderAwake is order for what is worth waiting for: it waits until the
// sandbox is not paused, or dead.
func (s *supervisor) orderAwake(o order) (answer, error) {
	s.still.init.RLock()
	for s.still.paused {
		awake := s.still.awake
		s.still.init.RUnlock()
		select {
		case <-awake:
		case <-s.initDone:
			return answer{}, fault.New("order", fault.NotFound, "the sandbox is gone")
		}
		s.still.init.RLock()
	}
	defer s.still.init.RUnlock()
	a, files, err := s.orders.do(o)
	closeAll(files)
	if err == nil {
		err = a.Fault.err("sandbox")
	}
	return a, err
}

// halt stops everything in the sandbox, by its cgroup when it lives in one.
// With patience, no file is being written any more when it returns.
func (s *supervisor) halt(ctx context.Context, patient bool) (cgroup bool, err error) {
	if len(s.group.Pids()) == 0 {
		a, _, err := s.orders.do(order{Op: opHalt, Patient: patient})
		if err == nil {
			err = a.Fault.err("pause")
		}
		return false, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-s.initDone:
			stop()
		case <-ctx.Done():
		}
	}()
	s.still.frozen.Store(true)
	if err := s.group.Freeze(ctx); err != nil {
		return true, fault.New("freeze", fault.Unavailable, "the sandbox does not come to rest: %w", err).
			Hinted("A process in it waits for the kernel, for a disk perhaps. Try again.")
	}
	return true, nil
}

func (s *supervisor) wake(cgroup bool) error {
	if cgroup {
		ctx, cancel := context.WithTimeout(context.Background(), restTime)
		defer cancel()
		return s.group.Thaw(ctx)
	}
	a, _, err := s.orders.do(order{Op: opWake})
	if err == nil {
		err = a.Fault.err("resume")
	}
	return err
}

// letDie sets free what was killed while it was frozen. A frozen cgroup of
// version 2 dies as it is; one of version 1 does not.
func (s *supervisor) letDie() {
	if s.still.frozen.Load() {
		ctx, cancel := context.WithTimeout(context.Background(), restTime)
		defer cancel()
		_ = s.group.Thaw(ctx) // an error: nothing lives in it any more
	}
}

// stuckTime is when a thread that the kernel keeps waiting is taken to stand
// still all the same: a parent in vfork(2) waits for a child that was stopped
// itself, and stops when that goes on.
const stuckTime = 2 * time.Second

// halt stops every process but this one, which is init, and returns when all
// stand still. One that the kernel keeps waiting (D) stops before it comes back
// from there; patience waits for it, as it may be writing to a file.
func (in *initProcess) halt(patient bool) error {
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
	begun := time.Now()
	for step := time.Millisecond; err == nil; step = min(2*step, 50*time.Millisecond) {
		// It reaches all of the pid namespace but the one that sends it. A
		// fork that is under way takes it along (Linux 4.19), so that one
		// round is enough but for what is still on its way to the stop.
		if err = unix.Kill(-1, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
			err = os.NewSyscallError("kill", err)
			break
		}
		still := "TtZXx"
		if !patient || time.Since(begun) > stuckTime {
			still += "D"
		}
		moving := false
		err = eachThread(func(_ int, state byte) bool {
			moving = strings.IndexByte(still, state) < 0
			return !moving
		})
		if !moving && err == nil {
			return nil
		}
		if time.Since(begun) > restTime {
			err = fault.New("stop", fault.Unavailable, "the sandbox does not come to rest")
		}
		time.Sleep(step) // there is nothing that tells of a stop of processes that are not our children
	}
	in.wake()
	return err
}

// wake takes halt back, but for those that had been stopped before. All others
// are told to go on, in whatever state they are: a parent in vfork has not
// stopped yet.
func (in *initProcess) wake() {
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

// eachThread calls f with each thread of each process in the sandbox but init,
// until f says no.
func eachThread(f func(pid int, state byte) bool) error {
	stats, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/stat")
	if err != nil {
		return err
	}
	for _, name := range stats {
		pid, err := strconv.Atoi(strings.Split(name, "/")[2])
		if err != nil || pid == os.Getpid() {
			continue
		}
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		_, after, ok := cutLast(stat, ')')
		if state := bytes.TrimSpace(after); ok && len(state) > 0 && !f(pid, state[0]) {
			return nil
		}
	}
	return nil
}
