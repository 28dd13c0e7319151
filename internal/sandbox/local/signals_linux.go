package local

import (
	"os"
	"os/signal"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nothingAt is the address of a signal handler that does nothing.
var nothingAt uintptr

// A sigaction is the kernel's structure of that name, which amd64 and arm64
// share.
type sigaction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

// faults are the signals that a mistake in this program makes. Go tells them
// from those that somebody sends.
var faults = []os.Signal{unix.SIGILL, unix.SIGTRAP, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSYS}

// handleSignals keeps every signal but KILL and STOP from doing anything to
// init. They are handled, not ignored: a program that is started would
// inherit an ignored signal.
//
// The kernel drops signals that PID 1 does not handle, but not one that
// arrives while the main thread has it blocked: that kills (Linux 6.18,
// kernel/signal.c: sig_ignored lets a blocked signal pass, and
// complete_signal does not ask whether the process is an init). Go's runtime
// blocks all while it clones.
//
// The handler is not Go's where it can be another one: to have Go handle a
// signal costs two changes of thread, and there are 64 of them.
func handleSignals() error {
	signal.Notify(make(chan os.Signal, 1), faults...)
	var idle sigaction
	if err := setSignal(unix.SIGUSR1, nil, &idle); err != nil {
		return err
	}
	idle.handler = nothingAt // on Go's stack for signals, and with its way back
	for sig := unix.Signal(1); sig <= 64; sig++ {
		switch sig {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGURG, unix.SIGPROF: // the last two are between Go's threads
			continue
		}
		if slices.Contains(faults, os.Signal(sig)) {
			continue
		}
		if err := setSignal(sig, &idle, nil); err != nil {
			return err
		}
	}
	return nil
}

// setSignal is rt_sigaction(2), without the Go runtime's knowledge.
func setSignal(sig unix.Signal, to, old *sigaction) error {
	const maskSize = 8
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(to)), uintptr(unsafe.Pointer(old)), maskSize, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("rt_sigaction", errno)
	}
	return nil
}
