package repo

import "syscall"

// detached keeps git away from the terminal, so that nothing can stop to ask,
// and makes it die with this process.
func detached() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
}
