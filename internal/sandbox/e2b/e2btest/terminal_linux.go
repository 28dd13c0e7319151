package e2btest

import (
	"errors"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

// terminal gives the process a terminal of the sandbox. It runs on the thread
// of the box.
func (p *process) terminal(size *ptySize, a account) (theirs []*os.File, err error) {
	// Non-blocking, or it could not be closed while it is read.
	fd, err := syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("open a terminal", err)
	}
	p.pty = os.NewFile(uintptr(fd), "/dev/ptmx")
	var n, unlocked uint32
	if err := errors.Join(ioctl(uintptr(fd), syscall.TIOCGPTN, unsafe.Pointer(&n)), ioctl(uintptr(fd), syscall.TIOCSPTLCK, unsafe.Pointer(&unlocked))); err != nil {
		return nil, err
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(int(n)), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	theirs = []*os.File{slave}
	if err := errors.Join(slave.Chown(int(a.uid), 5), resize(p.pty, size)); err != nil {
		return theirs, err
	}
	p.out = []*os.File{p.pty}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = slave, slave, slave
	p.cmd.SysProcAttr.Setctty = true
	return theirs, nil
}

// resize sets the size of a terminal.
func resize(pty *os.File, size *ptySize) error {
	raw, err := pty.SyscallConn()
	if err != nil {
		return err
	}
	ws := [4]uint16{size.Size.Rows, size.Size.Cols}
	var setErr error
	err = raw.Control(func(fd uintptr) { setErr = ioctl(fd, syscall.TIOCSWINSZ, unsafe.Pointer(&ws)) })
	return errors.Join(err, setErr)
}

func ioctl(fd, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(arg)); errno != 0 {
		return os.NewSyscallError("ioctl", errno)
	}
	return nil
}
