package local

import (
	"context"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/cgroup"
)

// A sandbox that reaches its limit of memory or disk loses all its processes,
// and each that was running says in its exit which limit it was. The sandbox
// itself goes on: what the agent has written by then can still be had.
//
// Of memory, the kernel kills one process. Init is never chosen while another
// one is left (see startProgram), so the supervisor hears of it and has init
// kill the rest. Should init die of it all the same, its sandbox is spent:
// nothing can be started any more, but exits and output are there until it is
// destroyed.

// openGroup makes the sandbox's cgroup, where there can be one.
func (s *supervisor) openGroup() {
	group := cgroup.Find().Group(s.record.Instance)
	if len(group.Paths()) == 0 {
		return
	}
	// The names are written down before the folders are made: whoever tidies
	// up after a crash finds them, and they are never anybody else's.
	s.left.Cgroups = group.Paths()
	err := s.box.writeRemains(s.left)
	if err == nil {
		err = group.Make()
	}
	if err != nil {
		s.log.Warn("no cgroup", "err", err)
		if err := group.Remove(context.Background()); err != nil { // nobody is in it
			s.log.Warn("cgroup not removed", "err", err)
		}
		return
	}
	s.group = group
}

// limitGroup sets the limits of the group. What it does not enforce is in
// s.missing.
func (s *supervisor) limitGroup() {
	limits := s.record.Limits
	s.missing = (cgroup.Place{}).Missing(limits) // all of them
	if s.group == nil || s.apart {
		return
	}
	limits.Processes += initThreads
	err := s.group.Limit(limits)
	if err != nil {
		s.log.Warn("the cgroup takes no limits", "err", err)
		return
	}
	if s.missing, err = s.group.Missing(limits); err != nil {
		s.log.Warn("the cgroup does not limit everything", "missing", s.missing, "err", err)
	}
}

// joinGroup puts init into the parts of the group that the kernel did not put
// it into at its birth. It can take milliseconds, so it goes on beside the
// setup; what it returns is closed when it is done.
func (s *supervisor) joinGroup(cloned bool) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.group.Add(s.init.pid, cloned); err != nil {
			// Init may be in some part of it, so it stays; but it limits
			// nobody for certain.
			s.log.Warn("not in the cgroup", "err", err)
			s.apart = true
			s.missing = (cgroup.Place{}).Missing(s.record.Limits)
		}
	}()
	return done
}

// lookEvery bounds how much memory a sandbox can overshoot by where the kernel
// does not hold it back. See diskMeter for the disk.
const lookEvery = time.Second

// watch enforces what the kernel only tells us, or not even that, until init
// is dead.
func (s *supervisor) watch() {
	go s.watchOOM()
	disk := newDiskMeter(s.box, s.record.Limits.DiskBytes, s.group)
	memory := slices.Contains(s.missing, sandbox.MemoryLimit)
	var lookedAtMemory time.Time
	timer := time.NewTimer(disk.next())
	defer timer.Stop()
	for n := 0; ; n++ {
		select {
		case <-timer.C:
		case <-s.initDone:
			return
		}
		// What goes on in the background is not forgotten.
		if s.running() || n%5 == 0 {
			if memory && time.Since(lookedAtMemory) > lookEvery/2 {
				s.lookAtMemory()
				lookedAtMemory = time.Now()
			}
			used, over := disk.look(s.hold)
			s.setDiskUse(used)
			if over {
				s.exceeded(sandbox.DiskLimit)
			}
		}
		next := disk.next()
		if memory {
			next = min(next, lookEvery)
		}
		timer.Reset(next)
	}
}

// holdTime bounds how long it may take until a sandbox stands still.
const holdTime = time.Second

// hold freezes the sandbox's cgroup until release is called. Where there is
// none, or it does not come to rest, it goes on: no process is stopped that
// could tell.
func (s *supervisor) hold() (release func()) {
	s.still.init.Lock()
	if s.still.paused || len(s.group.Pids()) == 0 {
		return s.still.init.Unlock
	}
	ctx, cancel := context.WithTimeout(context.Background(), holdTime)
	defer cancel()
	cgroup, err := s.halt(ctx, false)
	if err != nil {
		s.log.Info("not held", "err", err)
	}
	return func() {
		defer s.still.init.Unlock()
		if err := s.wake(cgroup); err != nil {
			s.log.Error("sandbox not set going again", "err", err)
		}
	}
}

// watchOOM ends the sandbox's processes when the kernel has killed one of
// them for want of memory.
func (s *supervisor) watchOOM() {
	for {
		s.mu.Lock()
		known := s.ooms
		s.mu.Unlock()
		n, err := s.group.AwaitOOM(known)
		if err != nil {
			return // the group is gone, or memory is not limited
		}
		s.checkOOM(n)
	}
}

// checkOOM takes note of n kills in all.
func (s *supervisor) checkOOM(n int) {
	s.mu.Lock()
	risen := n > s.ooms
	if risen {
		s.ooms, s.lastOOM = n, time.Now()
	}
	s.mu.Unlock()
	if risen {
		s.exceeded(sandbox.MemoryLimit)
	}
}

// lookAtMemory adds up what init sees, where no cgroup does.
func (s *supervisor) lookAtMemory() {
	a, err := s.order(order{Op: opUsage, Most: s.record.Limits.MemoryBytes})
	if err == nil && a.Usage != nil && a.Usage.MemoryBytes > s.record.Limits.MemoryBytes {
		s.exceeded(sandbox.MemoryLimit)
	}
}

// running reports whether a process that was started has not ended yet.
func (s *supervisor) running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.processes {
		select {
		case <-p.done:
		default:
			return true
		}
	}
	return false
}

// exceeded marks every process that runs, and has all of them killed. What is
// started meanwhile waits until that is done.
func (s *supervisor) exceeded(limit sandbox.Limit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var hit []*process
	for _, p := range s.processes {
		select {
		case <-p.done:
		default:
			if p.limit == "" {
				p.limit = limit
			}
			hit = append(hit, p)
		}
	}
	if s.killing != nil {
		return // the same kill will do
	}
	s.log.Info("limit reached", "limit", limit, "processes", len(hit))
	done := make(chan struct{})
	s.killing = done
	go func() {
		defer func() {
			s.mu.Lock()
			s.killing = nil
			s.mu.Unlock()
			close(done)
		}()
		for _, p := range hit {
			<-p.known // one that is just being started must not be missed
		}
		if _, err := s.order(order{Op: opKillAll}); err != nil {
			return // init is dead, and everybody with it
		}
		for _, p := range hit {
			if p.err != nil {
				continue
			}
			select {
			case <-p.done:
			case <-s.initDone:
				return
			case <-time.After(patience):
				s.log.Error("a process does not die") // the kernel holds it; others may go on
				return
			}
		}
	}()
}

// lockWhenSettled takes the lock when no kill is under way.
func (s *supervisor) lockWhenSettled() {
	s.mu.Lock()
	for s.killing != nil {
		done := s.killing
		s.mu.Unlock()
		<-done
		s.mu.Lock()
	}
}

// limited returns how a process ended whose init said exit.
func (s *supervisor) limited(p *process, exit sandbox.Exit) sandbox.Exit {
	if exit.Code != 0 {
		// The kernel's count is ahead of the news that it has risen.
		s.checkOOM(s.group.OOMs())
	}
	s.mu.Lock()
	limit := p.limit
	s.mu.Unlock()
	switch {
	case exit.Code == 0:
		return exit // it was done before
	case limit != "":
		return sandbox.Exit{Code: 128 + int(unix.SIGKILL), Signal: string(sandbox.Kill), Limit: limit}
	case exit.Signal == "XFSZ":
		exit.Limit = sandbox.DiskLimit // a single file became too large
	}
	return exit
}

// removeGroup empties and removes the sandbox's cgroup.
func (s *supervisor) removeGroup(ctx context.Context) error {
	if s.group != nil {
		return s.group.Remove(ctx)
	}
	return cgroup.Open(s.left.Cgroups).Remove(ctx)
}

// bereaved ends the processes of an init that memory ran out for, and reports
// whether that is what it died of.
func (s *supervisor) bereaved() bool {
	n := s.group.OOMs()
	s.mu.Lock()
	// The last of several kills may have been heard of before init's end.
	died := s.state == ready && (n > s.ooms || time.Since(s.lastOOM) < 5*time.Second)
	if died {
		s.state = spent
	}
	s.ooms = max(n, s.ooms)
	var left []string
	for id, p := range s.processes {
		select {
		case <-p.done:
		default:
			if died {
				if p.limit == "" {
					p.limit = sandbox.MemoryLimit
				}
				left = append(left, id)
			}
		}
	}
	s.mu.Unlock()
	for _, id := range left {
		s.ended(id, sandbox.Exit{Code: 128 + int(unix.SIGKILL), Signal: string(sandbox.Kill)})
	}
	return died
}

// usage returns what the sandbox uses.
func (s *supervisor) usage() (sandbox.Usage, error) {
	u := s.group.Usage()
	if u.MemoryBytes == 0 || u.Processes == 0 {
		a, err := s.order(order{Op: opUsage})
		if err != nil {
			return u, err
		}
		if a.Usage != nil {
			if u.MemoryBytes == 0 {
				u.MemoryBytes = a.Usage.MemoryBytes
			}
			if u.Processes == 0 {
				u.Processes = a.Usage.Processes
			}
			if u.CPU == 0 {
				u.CPU = a.Usage.CPU
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u.DiskBytes = s.diskUse
	return u, nil
}

func (s *supervisor) setDiskUse(n int64) {
	s.mu.Lock()
	s.diskUse = n
	s.mu.Unlock()
}
