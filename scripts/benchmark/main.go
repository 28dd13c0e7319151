// Benchmark measures what this project promises in figures, side by side with
// what else does the same work on this machine, and writes the tables of
// docs/benchmarks.md. It is run by scripts/bench.sh, which is "make bench".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A section is one heading of the document. A new one is a file of its own
// here and a line in sections.
type section struct {
	name  string // what -only calls it
	title string
	run   func(ctx context.Context, o options) ([]table, error)
}

func sections() []section {
	return []section{
		{"sandbox", "Local sandboxes", measureSandboxes},
		{"gateway", "The gateway", measureGateway},
		{"e2b", "The client of E2B", measureE2B},
		{"go", "Go benchmarks", readGoBenchmarks},
	}
}

// options are the command line.
type options struct {
	only       string
	n          int
	files      int
	dir        string
	supervisor string
	engines    string
	goOutput   string
	out        string
	log        io.Writer
}

// command is what measures a section again.
func (o options) command(section string) string {
	c := fmt.Sprintf("make bench ONLY=%s N=%d", section, o.n)
	if o.dir != "" {
		c += " DIR=" + o.dir
	}
	return c
}

func (o options) logf(format string, args ...any) { fmt.Fprintf(o.log, format+"\n", args...) }

func main() {
	if len(os.Args) == 3 && os.Args[1] == treeWord {
		if err := writeTree(os.Stdout, os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "benchmark:", err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) == 4 && os.Args[1] == gatewayWord {
		if err := serveGateway(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, "benchmark:", err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) == 3 && os.Args[1] == e2bWord {
		if err := serveE2B(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "benchmark:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "benchmark:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	o := options{log: os.Stderr}
	flags := flag.NewFlagSet("benchmark", flag.ContinueOnError)
	flags.StringVar(&o.only, "only", "", "the `sections` to measure, separated by commas; all others stay in the document as they are")
	flags.IntVar(&o.n, "n", 100, "how many sandboxes each engine makes")
	flags.IntVar(&o.files, "files", 50_000, "how many files the large base holds")
	flags.StringVar(&o.dir, "dir", "", "the `folder` to work in; empty: a new one below the folder for temporary files")
	flags.StringVar(&o.supervisor, "supervisor", "bin/sandbox-supervisor", "the `program` that local sandboxes run under")
	flags.StringVar(&o.engines, "engines", "", "the peers to measure, separated by commas; empty: all that are installed")
	flags.StringVar(&o.goOutput, "go", "", "the `file` with the output of \"go test -bench\"")
	flags.StringVar(&o.out, "o", "", "the `document` to write; empty: standard output")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if o.n < 1 || o.files < 1 {
		return errors.New("-n and -files are at least 1")
	}
	chosen, err := choose(o.only)
	if err != nil {
		return err
	}
	doc := document{}
	if o.out != "" {
		if doc, err = readDocument(o.out); err != nil {
			return err
		}
	}
	for _, s := range chosen {
		o.logf("== %s", s.title)
		head := describeMachine(time.Now(), o.dir)
		tables, err := s.run(ctx, o)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if len(tables) == 0 {
			continue
		}
		for i := range tables {
			if tables[i].command == "" {
				tables[i].command = o.command(s.name)
			}
		}
		doc[s.name] = renderSection(s, head, tables)
	}
	return doc.write(o.out)
}

// choose returns the sections that are named, in their order in the document.
func choose(only string) ([]section, error) {
	all := sections()
	if only == "" {
		return all, nil
	}
	names := strings.Split(only, ",")
	var chosen []section
	for _, s := range all {
		if slices.Contains(names, s.name) {
			chosen = append(chosen, s)
			names = slices.DeleteFunc(names, func(n string) bool { return n == s.name })
		}
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("no section is called %q", names[0])
	}
	return chosen, nil
}
