// Package hush keeps a library from asking the terminal a question each time
// that the program starts.
//
// Bubble Tea v1 asks for the background colour while it is initialised, before
// main. It writes an escape sequence to standard output for it and waits up to
// five seconds for an answer, which pseudo-terminals of CI systems, expect
// scripts and serial lines never give. A terminal that is called dumb is not
// asked (termenv, Output.termStatusReport).
//
// This package comes first because packages are initialised in the order of
// their import paths as soon as everything they import is (Go 1.21 release
// notes). It imports os alone; Bubble Tea waits for os/signal, which imports
// os and whose path is behind this one. A test starts a program on a terminal
// and fails when that no longer holds.
package hush

import "os"

var term, had = hide()

func hide() (string, bool) {
	term, had := os.LookupEnv("TERM")
	_ = os.Setenv("TERM", "dumb") // fails for malformed names only
	return term, had
}

// Restore gives TERM its value back. It returns true. Whoever imports this
// package calls it while it is initialised itself, after Bubble Tea.
func Restore() bool {
	if had {
		_ = os.Setenv("TERM", term)
	} else {
		_ = os.Unsetenv("TERM")
	}
	return true
}
