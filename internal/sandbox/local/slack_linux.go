package local

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Go's runtime has a thread that looks after the others, every 20 microseconds
// at first, for as long as any of them runs. In programs that have a little to
// do now and then, as a supervisor and init have, it runs as long as they do:
// it was an eighth of the processor time of a sandbox. The kernel lets it sleep
// longer by the slack of its timers, which threads inherit and which lasts
// beyond the start of a program.
const (
	lazySlack  = 2_000_000 // nanoseconds: how late a thread of ours may come to take a processor from one that waits
	exactSlack = 50_000    // what the kernel gives who asks for nothing
)

// inNoHurry has start start a program whose threads may oversleep.
func inNoHurry(start func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err == nil && unix.Prctl(unix.PR_SET_TIMERSLACK, lazySlack, 0, 0, 0) == nil {
		defer func() { _ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(before), 0, 0, 0) }()
	}
	return start()
}
