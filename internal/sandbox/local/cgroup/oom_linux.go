package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A counter counts the processes of a group that the kernel killed because
// memory ran out, and can wait for the next one without a thread.
type counter struct {
	file *os.File        // memory.events, or memory.oom_control of v1
	bell *os.File        // v1: an eventfd that the kernel writes to; nil: file itself can be waited for
	raw  syscall.RawConn // of the one that is waited for
	rang bool            // v1: it spoke up, and what it meant may not have been counted yet
}

// openOOMs begins to listen, where there is anything to listen to.
func (g *Group) openOOMs() error {
	for _, p := range g.parts {
		name := "memory.events"
		switch p.v1 {
		case "":
		case memory:
			name = "memory.oom_control"
		default:
			continue
		}
		fd, err := unix.Open(filepath.Join(p.path, name), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if errors.Is(err, unix.ENOENT) {
			continue // memory is not limited in this part
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: filepath.Join(p.path, name), Err: err}
		}
		return g.ooms.open(os.NewFile(uintptr(fd), name), p)
	}
	return nil
}

func (c *counter) open(file *os.File, p part) (err error) {
	c.file = file
	wait := file
	if p.v1 != "" {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return os.NewSyscallError("eventfd", err)
		}
		c.bell = os.NewFile(uintptr(fd), "out of memory")
		wait = c.bell
		// Not by way of the poller: these two are named by number.
		if err := write(p.path, "cgroup.event_control", fmt.Sprintf("%d %d", fd, file.Fd())); err != nil {
			return err
		}
		if err := unix.SetNonblock(fd, true); err != nil {
			return os.NewSyscallError("eventfd", err)
		}
	}
	c.raw, err = wait.SyscallConn()
	return err
}

func (c *counter) close() {
	for _, f := range []*os.File{c.file, c.bell} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// count reads how many were killed so far.
func (c *counter) count() (int, error) {
	buf := make([]byte, 4096)
	n, err := c.file.ReadAt(buf, 0)
	if n == 0 && err != nil {
		return 0, err
	}
	return field(buf[:n], "oom_kill"), nil
}

// OOMs returns how many processes of the group the kernel has killed because
// memory ran out, as far as is known.
func (g *Group) OOMs() int {
	if g == nil || g.ooms.file == nil {
		return 0
	}
	n, err := g.ooms.count()
	if err != nil {
		return 0
	}
	return n
}

// AwaitOOM returns the count when it has risen above after. It fails when the
// group is closed, and at once where memory is not limited.
func (g *Group) AwaitOOM(after int) (int, error) {
	if g == nil || g.ooms.raw == nil {
		return 0, os.ErrClosed
	}
	if g.ooms.bell != nil {
		return g.ooms.awaitBell(after)
	}
	var n int
	var err error
	// What is waited for is an edge: the file can always be read, and the
	// kernel speaks up when it has changed since it was.
	waitErr := g.ooms.raw.Read(func(uintptr) bool {
		n, err = g.ooms.count()
		return err != nil || n > after
	})
	return n, errors.Join(waitErr, err)
}

// awaitBell waits for v1, which speaks up before it kills. Until it has, one
// look is enough: the bell keeps what rings before it is waited for.
func (c *counter) awaitBell(after int) (int, error) {
	for {
		if n, err := c.count(); err != nil || n > after {
			return n, err
		}
		for step := time.Millisecond; c.rang && step < time.Second; step *= 2 {
			// The victim is chosen now. Only the first rounds are met in
			// practice; a kill that comes later is announced again.
			time.Sleep(step)
			if n, err := c.count(); err != nil || n > after {
				return n, err
			}
		}
		if _, err := c.bell.Read(make([]byte, 8)); err != nil {
			return 0, err
		}
		c.rang = true
	}
}

// field returns the number after the word in one of the kernel's tables.
func field(table []byte, name string) int {
	for line := range bytes.Lines(table) {
		if rest, ok := strings.CutPrefix(string(line), name+" "); ok {
			n, err := strconv.Atoi(strings.TrimSpace(rest))
			if err == nil {
				return n
			}
		}
	}
	return 0
}
