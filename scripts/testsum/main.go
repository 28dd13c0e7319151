// Testsum reads what "go test -json" prints and tells a person what matters of
// it: one closing line a package, the whole output of what failed, the reason
// of what was skipped, and at the end the count. It exits 1 when anything
// failed, and when nothing passed: a run of no tests is no success.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

func main() {
	s := newSummary(os.Stdout)
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		os.Exit(1)
	}
	if !s.close() {
		os.Exit(1)
	}
}

// maxKept is how many bytes of one test's output are kept for the case that it
// fails; what came last is worth most.
const maxKept = 256 << 10

// event is a line of "go test -json"; see "go doc test2json".
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	FailedBuild string
}

// record is what is known of one test, or of a package as such.
type record struct {
	result string // pass, fail or skip; empty while it runs
	output []byte
}

func (r *record) keep(text string) {
	r.output = append(r.output, text...)
	if over := len(r.output) - maxKept; over > 0 {
		r.output = r.output[over:]
	}
}

// summary adds up one or several runs of go test.
type summary struct {
	out                     io.Writer
	running                 map[string]map[string]*record // package -> test -> record; the package itself is test ""
	skips                   []string
	passed, failed, skipped int
}

func newSummary(out io.Writer) *summary {
	return &summary{out: out, running: map[string]map[string]*record{}}
}

// read takes in everything up to the end of r. Lines that are not events are
// passed on as they are: the go command prints some.
func (s *summary) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if line[0] != '{' || json.Unmarshal(line, &e) != nil || e.Action == "" {
				fmt.Fprint(s.out, string(line))
			} else {
				s.add(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
	}
}

func (s *summary) add(e event) {
	if e.Package == "" { // the compiler speaks
		fmt.Fprint(s.out, e.Output)
		return
	}
	tests := s.running[e.Package]
	if tests == nil {
		tests = map[string]*record{}
		s.running[e.Package] = tests
	}
	t := tests[e.Test]
	if t == nil {
		t = &record{}
		tests[e.Test] = t
	}
	switch e.Action {
	case "output":
		t.keep(e.Output)
	case "pass", "fail", "skip":
		t.result = e.Action
		if e.Test == "" {
			s.end(e.Package, tests)
			delete(s.running, e.Package)
		}
	}
}

// end counts and reports one package. A test with subtests counts by its
// subtests, unless it failed and none of them did. A test that never came to
// its end failed, and so did a package that failed without a failed test: one
// that did not compile, say.
func (s *summary) end(pkg string, tests map[string]*record) {
	names := make([]string, 0, len(tests))
	failedBelow := map[string]bool{} // test -> a subtest of it failed
	parent := map[string]bool{}
	for name, t := range tests {
		if name == "" {
			continue
		}
		names = append(names, name)
		if t.result == "" {
			t.result = "fail"
			t.keep("--- FAIL: " + name + " never ended\n")
		}
		for up := name; ; {
			slash := strings.LastIndexByte(up, '/')
			if slash < 0 {
				break
			}
			up = up[:slash]
			parent[up] = true
			if t.result == "fail" {
				failedBelow[up] = true
			}
		}
	}
	slices.Sort(names)

	failures := 0
	for _, name := range names {
		t := tests[name]
		if t.result == "fail" {
			s.print(t.output)
		}
		switch {
		case t.result == "fail" && !failedBelow[name]:
			failures++
		case parent[name]:
		case t.result == "pass":
			s.passed++
		case t.result == "skip":
			s.skipped++
			s.skips = append(s.skips, fmt.Sprintf("%s %s: %s", pkg, name, reason(t.output)))
		}
	}
	whole := tests[""]
	if whole == nil {
		whole = &record{}
	}
	if whole.result == "pass" || whole.result == "skip" {
		for line := range strings.Lines(string(whole.output)) {
			if strings.HasPrefix(line, "ok ") {
				fmt.Fprint(s.out, line)
			}
		}
	} else {
		s.print(whole.output)
		failures = max(failures, 1)
	}
	s.failed += failures
}

// close reports what never ended, the skips and the count, and says whether
// all is well.
func (s *summary) close() bool {
	for _, pkg := range slices.Sorted(maps.Keys(s.running)) {
		s.end(pkg, s.running[pkg])
		fmt.Fprintf(s.out, "FAIL\t%s\tnever ended\n", pkg)
	}
	for _, skip := range s.skips {
		fmt.Fprintln(s.out, "skipped:", skip)
	}
	if s.passed+s.failed == 0 {
		fmt.Fprintln(s.out, "FAIL: no test ran")
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	return s.failed == 0 && s.passed > 0
}

func (s *summary) print(output []byte) {
	if len(output) > 0 {
		fmt.Fprintf(s.out, "%s\n", strings.TrimRight(string(output), "\n"))
	}
}

// reason is what a skipped test said, without the lines that go test adds.
func reason(output []byte) string {
	var said []string
	for line := range strings.Lines(string(output)) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			said = append(said, line)
		}
	}
	return strings.Join(said, " ")
}
