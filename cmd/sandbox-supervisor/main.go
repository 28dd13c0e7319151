// Sandbox-supervisor is the small process that owns one local sandbox. The
// worker starts it; there is nothing for people to do with it.
package main

import (
	"os"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

func main() { os.Exit(local.Supervise(os.Args[1:])) }
