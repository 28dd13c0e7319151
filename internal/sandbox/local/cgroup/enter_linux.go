package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Enter puts the calling thread into those parts of the group that lie in v1, so
// that what it starts is born there; leave takes it back to where it was. The
// goroutine must be locked to the thread until then. A group without such parts
// has nothing to enter. After an error the thread is where it was, and what it
// starts is to be added with Add.
//
// Who moves another process into a group waits until nobody on the host forks,
// which takes milliseconds; a thread that moves itself alone does not wait (Linux
// 6.18, kernel/cgroup/cgroup.c: cgroup_procs_write_start).
func (g *Group) Enter() (leave func() error, err error) {
	var back []func() error
	leave = func() error {
		var errs []error
		for _, one := range slices.Backward(back) {
			errs = append(errs, one())
		}
		back = nil
		return errors.Join(errs...)
	}
	if g == nil {
		return leave, nil
	}
	for _, p := range g.parts {
		if p.v1 == "" {
			continue
		}
		home, err := homeOf(p)
		if err == nil {
			err = write(p.path, tasks, self)
		}
		if err != nil {
			return nil, errors.Join(err, leave())
		}
		back = append(back, func() error { return write(home, tasks, self) })
	}
	g.entered = true
	return leave, nil
}

// What a thread writes to move itself, and where.
const (
	tasks = "tasks"
	self  = "0"
)

// homeOf returns the calling thread's group in the hierarchy of the part. It is
// an error when the thread could not come back to it.
func homeOf(p part) (string, error) {
	b, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return "", err
	}
	top := filepath.Dir(filepath.Dir(p.path)) // of the hierarchy: above our folder
	for line := range bytes.Lines(b) {
		_, rest, _ := strings.Cut(strings.TrimSpace(string(line)), ":")
		names, path, ok := strings.Cut(rest, ":")
		if !ok || !slices.Contains(strings.Split(names, ","), p.v1) {
			continue
		}
		home := filepath.Join(top, path)
		if !within(top, home) || !isV1(home) {
			break // in a container the path can be that of the host
		}
		return home, unix.Access(filepath.Join(home, tasks), unix.W_OK)
	}
	return "", fmt.Errorf("the group of this thread in the hierarchy of %s is not to be found", p.v1)
}
