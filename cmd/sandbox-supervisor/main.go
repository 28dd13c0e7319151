// Sandbox-supervisor is the small process that owns one sandbox of this host:
// a local one, or one of gVisor, inside which it is the first process too. The
// worker starts it; there is nothing for people to do with it.
package main

import (
	"os"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/gvisor"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == gvisor.ProviderName {
		os.Exit(gvisor.Supervise(os.Args[2:]))
	}
	os.Exit(local.Supervise(os.Args[1:]))
}
