package ledgertest

import (
	"os/exec"
	"runtime"
	"syscall"
)

// supervise starts the child and waits for it. The kernel ends the child when
// this process dies, however it does: the signal comes when the thread ends
// that started it, so the thread stays.
func supervise(child *exec.Cmd, begun, ended chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	err := child.Start()
	begun <- err
	if err == nil {
		ended <- child.Wait()
	}
}
