//go:build unix && !linux

package repo

import "syscall"

// detached keeps git away from the terminal, so that nothing can stop to ask.
func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }
