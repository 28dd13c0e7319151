// Command sandbox-worker is "sandbox-temporal worker" under a name of its own:
// it starts the program that is installed beside it.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

func main() {
	exe, err := os.Executable()
	if err == nil {
		exe = filepath.Join(filepath.Dir(exe), "sandbox-temporal")
		err = syscall.Exec(exe, append([]string{exe, "worker"}, os.Args[1:]...), os.Environ())
	}
	fmt.Fprintf(os.Stderr, "sandbox-worker: cannot start %s: %v\n", exe, err)
	os.Exit(1)
}
