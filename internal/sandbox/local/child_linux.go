package local

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/launch"
)

// An initChild is the sandbox's init as its supervisor has it. It is no
// [os.Process]: the first one that a program starts costs another process, by
// which Go finds out what the kernel can do, and to wait for one holds a
// processor for a while.
type initChild struct {
	pid, fd int
	file    *os.File // the fd, which is a pidfd
}

// newInit starts this program again.
func newInit(argv []string, socket *os.File, attr *syscall.SysProcAttr) (*initChild, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	pidfd := -1
	attr.PidFD = &pidfd
	pid, _, err := syscall.StartProcess("/proc/self/exe", argv, &syscall.ProcAttr{
		Dir: "/", Env: runtimeSettings(), Files: []uintptr{null.Fd(), uintptr(unix.Stderr), uintptr(unix.Stderr), socket.Fd()}, Sys: attr,
	})
	if err != nil {
		return nil, &os.PathError{Op: "start", Path: "init", Err: err}
	}
	// Only then does Go wait for it as for a socket.
	if err := unix.SetNonblock(pidfd, true); err != nil {
		return nil, errors.Join(os.NewSyscallError("pidfd", err), unix.Kill(pid, unix.SIGKILL))
	}
	return &initChild{pid, pidfd, os.NewFile(uintptr(pidfd), "init")}, nil
}

// kill does not hit another process that got the number.
func (c *initChild) kill() error {
	return unix.PidfdSendSignal(c.fd, unix.SIGKILL, nil, 0)
}

// wait returns when init has ended, which can be asked for once. Who waits in
// wait4(2) keeps the only processor that Go has here until a thread of its
// runtime comes to take it away; who waits for the descriptor does not.
func (c *initChild) wait() (sandbox.Exit, error) {
	raw, err := c.file.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
	}
	for {
		var status unix.WaitStatus
		_, waitErr := unix.Wait4(c.pid, &status, 0, nil)
		if !errors.Is(waitErr, unix.EINTR) {
			return launch.ExitOf(status), errors.Join(err, waitErr)
		}
	}
}
