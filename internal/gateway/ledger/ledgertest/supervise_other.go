//go:build !linux

package ledgertest

import "os/exec"

// supervise starts the child and waits for it.
func supervise(child *exec.Cmd, begun, ended chan<- error) {
	err := child.Start()
	begun <- err
	if err == nil {
		ended <- child.Wait()
	}
}
