package gvisor

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// gateFD is where runsc's stand-in is told to go on.
const gateFD = 4

// enterGroup has runsc start in the sandbox's cgroup, so that nothing that it
// starts is outside. For that, what is started first is this program, which
// waits until it was put there and then becomes runsc. The function that is
// returned puts the process there, or, with 0, there is none.
func (g *guardian) enterGroup() (entered func(pid int) error, err error) {
	if len(g.group.Paths()) == 0 {
		return func(int) error { return nil }, nil
	}
	gate, open, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	g.runsc = &exec.Cmd{
		Path: "/proc/self/exe", Args: append(append(slices.Clone(g.argv), enterWord, g.runsc.Path), g.runsc.Args...),
		Env: g.runsc.Env, Dir: g.runsc.Dir, ExtraFiles: append(slices.Clone(g.runsc.ExtraFiles), gate),
		Stdin: g.runsc.Stdin, Stdout: g.runsc.Stdout, Stderr: g.runsc.Stderr, SysProcAttr: g.runsc.SysProcAttr,
	}
	return func(pid int) error {
		_ = gate.Close()
		defer open.Close()
		if pid == 0 {
			return nil
		}
		if err := g.group.Add(pid, false); err != nil {
			// It may be in some part of it; gVisor's own limits hold.
			g.log.Warn("not in the cgroup", "err", err)
		}
		_, err := open.Write([]byte{1})
		return err
	}, nil
}

// enterMain becomes runsc when it is told to.
func enterMain(runsc string, args []string) int {
	unix.CloseOnExec(gateFD)
	gate := os.NewFile(gateFD, "gate")
	if n, err := gate.Read(make([]byte, 1)); n != 1 {
		fmt.Fprintln(os.Stderr, "runsc is not wanted any more:", err)
		return 1
	}
	err := unix.Exec(runsc, args, []string{})
	fmt.Fprintln(os.Stderr, "run runsc:", err)
	return 1
}

// usage is what the sandbox uses: of the host's memory and time, as far as a
// cgroup counts it, and otherwise inside.
func (g *guardian) usage() (*sandbox.Usage, error) {
	if err := g.usable(opUsage); err != nil && fault.KindOf(err) != fault.Conflict {
		return nil, err
	}
	r, err := g.order(request{Op: opUsage})
	if err == nil && r.Usage == nil {
		err = errors.New("init does not say what is used")
	}
	if err != nil {
		return nil, err
	}
	host := g.group.Usage()
	r.Usage.CPU = host.CPU
	if host.MemoryBytes > 0 {
		r.Usage.MemoryBytes = host.MemoryBytes
	}
	return r.Usage, nil
}
