// Package page shows a page of help before the rest of the program is
// initialised, and ends the program.
//
// The pages are what the commands themselves would print; a test of
// internal/cli renders every one and compares, and -update writes them anew.
// Whoever asks for help waits a tenth of the time that it takes to initialise
// the clients of Temporal, of databases and of providers, which no page needs.
//
// Like hush this package works only because packages are initialised in the
// order of their import paths as soon as everything they import is (Go 1.21
// release notes): it imports the standard library alone, and its path is before
// go.temporal.io and google.golang.org. Were that to change, pages would come
// later and be the same. Only main imports it.
package page

import (
	"embed"
	"os"
	"strings"
)

//go:embed pages/*.txt
var pages embed.FS

// Root is the name of the page of the program itself.
const Root = "sandbox-temporal"

// File returns the name of the file, in the folder pages, that holds the page
// of a command: of the words that follow the program's name, none for the
// program itself.
func File(words ...string) string {
	if len(words) == 0 {
		words = []string{Root}
	}
	return strings.Join(words, "_") + ".txt"
}

// Asked returns the page that a command line asks for in one of the plain ways:
// nothing, "help WORD…", "WORD… --help" and "WORD… -h". For any other, and for
// words that have no page, ok is false: the commands know what to say.
func Asked(args []string) (text []byte, ok bool) {
	words := args
	switch last := len(args) - 1; {
	case last < 0:
	case args[last] == "--help" || args[last] == "-h":
		words = args[:last]
	case args[0] == "help":
		words = args[1:]
	default:
		return nil, false
	}
	for _, word := range words {
		if word == "" || word[0] == '-' || strings.ContainsAny(word, "_/\\") {
			return nil, false
		}
	}
	text, err := pages.ReadFile("pages/" + File(words...))
	return text, err == nil
}

func init() {
	text, ok := Asked(os.Args[1:])
	if !ok {
		return
	}
	if _, err := os.Stdout.Write(text); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}
