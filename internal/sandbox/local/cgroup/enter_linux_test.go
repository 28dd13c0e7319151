package cgroup

import (
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func TestWhatAThreadInTheGroupStartsIsBornThereAndTheThreadComesBack(t *testing.T) {
	l := sandbox.Limits{Processes: 50}
	g := made(t, place(t, l), l)
	var old []part
	for _, p := range g.parts {
		if p.v1 != "" {
			old = append(old, p)
		}
	}
	if len(old) == 0 {
		t.Skip("this host has cgroup v2 only")
	}
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	var thread string
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread = strconv.Itoa(unix.Gettid())
		leave, err := g.Enter()
		if err != nil {
			done <- err
			return
		}
		for _, p := range old {
			if !slices.Contains(words(p.path, tasks), thread) {
				err = fmt.Errorf("the thread is not in %s", p.path)
			}
		}
		if err == nil {
			err = cmd.Start()
		}
		if e := leave(); err == nil {
			err = e
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }() // it is killed with its group
	pid := strconv.Itoa(cmd.Process.Pid)
	for _, p := range old {
		if got := words(p.path, tasks); !slices.Equal(got, []string{pid}) {
			t.Errorf("%s holds %v, want %s alone", p.path, got, pid)
		}
	}
	if err := g.Add(cmd.Process.Pid, false); err != nil { // to v2, if there is one
		t.Error(err)
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestAThreadThatCannotEnterEveryPartIsInNone(t *testing.T) {
	l := sandbox.Limits{Processes: 50}
	g := made(t, place(t, l), l)
	if !slices.ContainsFunc(g.parts, func(p part) bool { return p.v1 != "" }) {
		t.Skip("this host has cgroup v2 only")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	odd := *g
	odd.parts = append(slices.Clone(g.parts), part{path: t.TempDir() + "/a/b", v1: pids})
	if _, err := odd.Enter(); err == nil || odd.entered {
		t.Fatalf("it entered a folder that is no group: %v", err)
	}
	thread := strconv.Itoa(unix.Gettid())
	for _, p := range g.parts {
		if slices.Contains(words(p.path, tasks), thread) {
			t.Errorf("the thread was left in %s", p.path)
		}
	}
	var nobody *Group
	if leave, err := nobody.Enter(); err != nil || leave() != nil {
		t.Errorf("the group of nobody: %v", err)
	}
}
