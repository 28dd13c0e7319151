package local

import (
	"os"
	"os/signal"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nothingAt is the address of a signal handler that does nothing.
var nothingAt uintptr

// A sigaction is the kernel's structure of that name, which amd64 and arm64
// share. All zeros is the default.
type sigaction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

// ignored is SIG_IGN as a handler.
const ignored = 1

// handleSignals keeps every signal but KILL and STOP from doing anything to
// init. They are handled, not ignored: a program that is started would
// inherit an ignored signal. What those who started the worker had ignored,
// as nohup has, is the default again.
//
// The kernel drops signals that PID 1 does not handle, but not one that
// arrives while the main thread has it blocked: that kills (Linux 6.18,
// kernel/signal.c: sig_ignored lets a blocked signal pass, and
// complete_signal does not ask whether the process is an init). Go's runtime
// blocks all while it clones, and leaves 32 to 34 to the C library, so these
// need a handler that is not Go's.
func handleSignals() error {
	signal.Notify(make(chan os.Signal, 1))
	var go1 sigaction
	if err := setSignal(unix.SIGUSR1, nil, &go1); err != nil {
		return err
	}
	for sig := unix.Signal(1); sig <= 64; sig++ {
		switch sig {
		case unix.SIGKILL, unix.SIGSTOP:
		case 32, 33, 34:
			idle := go1 // with its stack and its way back
			idle.handler = nothingAt
			if err := setSignal(sig, &idle, nil); err != nil {
				return err
			}
		default:
			var old sigaction
			if err := setSignal(sig, nil, &old); err != nil {
				return err
			}
			if old.handler == ignored {
				if err := setSignal(sig, &sigaction{}, nil); err != nil {
					return err
				}
			}
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
