package gvisor

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Pause has init stop every other process with SIGSTOP; Resume continues them
// with SIGCONT. Runsc could hold its whole kernel, but then nobody could read
// what processes have written and how they ended. That it was stopped, a
// process can tell: a parent is told of the stop of its children, and a
// handler for SIGCONT runs.
//
// What needs init to do something fails with fault.Conflict meanwhile: Start,
// Upload, Download, Health, Signal, OpenTerminal and DialPort.
func (p *Provider) Pause(ctx context.Context, ref sandbox.Ref) error {
	return p.askOnce(ctx, "gvisor: pause sandbox", ref, request{Op: opPause})
}

// Resume takes a Pause back.
func (p *Provider) Resume(ctx context.Context, ref sandbox.Ref) error {
	return p.askOnce(ctx, "gvisor: resume sandbox", ref, request{Op: opResume})
}

func (p *Provider) askOnce(ctx context.Context, op string, ref sandbox.Ref, q request) error {
	a, err := p.attach(ctx, op, ref)
	if err != nil {
		return err
	}
	defer a.Close()
	_, err = a.ask(ctx, op, q)
	return err
}

// pause has init pause or resume, and leaves word of it for List, which asks
// nobody. When the sandbox is being destroyed nothing may appear in its folder
// any more.
func (g *guardian) pause(op string) error {
	g.ending.Lock()
	defer g.ending.Unlock()
	if err := g.usable(op); err != nil {
		return err
	}
	if _, err := g.order(request{Op: op}); err != nil {
		return err
	}
	if op == opPause {
		return fileFault(op, g.box.writeJSON(pausedFile, struct{}{}))
	}
	err := unix.Unlinkat(int(g.box.dir.Fd()), pausedFile, 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fileFault(op, &os.PathError{Op: "unlink", Path: pausedFile, Err: err})
	}
	return nil
}

// order asks init for one thing that is answered in one message.
func (g *guardian) order(q request) (response, error) {
	q.Version = protocol
	s, err := g.link.open()
	if err != nil {
		return response{}, fault.New("sandbox", fault.NotFound, "%w", err)
	}
	defer s.Close()
	var r response
	if err = writeMessage(s, q); err == nil {
		err = readMessage(s, &r, maxReply)
	}
	if err != nil {
		return response{}, fault.New("sandbox", fault.NotFound, "%w", err)
	}
	return r, r.Fault.err("sandbox")
}

// restTime bounds how long processes may take until they stand still, and
// stuckTime is when one that waits uninterruptibly is taken to: a parent in
// vfork(2) waits for a child that was stopped itself.
const (
	restTime  = 10 * time.Second
	stuckTime = time.Second
)

// pause stops every process but this one.
func (in *initProcess) pause() error {
	in.still.Lock()
	defer in.still.Unlock()
	return in.halt()
}

func (in *initProcess) resume() {
	in.still.Lock()
	defer in.still.Unlock()
	in.wake()
}

// awake keeps pauses out until done is called; while there is one it fails.
func (in *initProcess) awake() (done func(), err error) {
	in.still.RLock()
	if in.halted != nil {
		in.still.RUnlock()
		return nil, fault.New("sandbox", fault.Conflict, "the sandbox is paused").Hinted("Resume it first.")
	}
	return in.still.RUnlock, nil
}

// halt returns when all stand still. The caller holds still.
func (in *initProcess) halt() error {
	if in.halted != nil {
		return nil
	}
	in.halted = map[int]bool{}
	eachThread(func(pid int, state byte) bool {
		if state == 'T' {
			in.halted[pid] = true
		}
		return true
	})
	begun := time.Now()
	var err error
	for step := time.Millisecond; err == nil; step = min(2*step, 50*time.Millisecond) {
		if err = unix.Kill(-1, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
			err = os.NewSyscallError("kill", err)
			break
		}
		still := "TtZXx"
		if time.Since(begun) > stuckTime {
			still += "D"
		}
		moving := false
		eachThread(func(_ int, state byte) bool {
			moving = strings.IndexByte(still, state) < 0
			return !moving
		})
		if !moving {
			return nil
		}
		err = nil
		if time.Since(begun) > restTime {
			err = fault.New("stop", fault.Unavailable, "the sandbox does not come to rest")
		}
		time.Sleep(step) // nothing tells of a stop of processes that are not our children
	}
	in.wake()
	return err
}

// wake takes halt back, but for those that had been stopped before.
func (in *initProcess) wake() {
	if in.halted == nil {
		return
	}
	eachThread(func(pid int, _ byte) bool {
		if !in.halted[pid] {
			_ = unix.Kill(pid, unix.SIGCONT) // an error: it is gone
		}
		return true
	})
	in.halted = nil
}

// eachThread calls f with each thread of each process but init, until f says
// no.
func eachThread(f func(pid int, state byte) bool) {
	stats, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/stat")
	if err != nil {
		return
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
		after := bytes.TrimSpace(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(after) > 0 && !f(pid, after[0]) {
			return
		}
	}
}
