package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSectionsThatAreNotMeasuredStayInTheDocument(t *testing.T) {
	name := filepath.Join(t.TempDir(), "benchmarks.md")
	doc, err := readDocument(name)
	if err != nil || len(doc) != 0 {
		t.Fatalf("a document that does not exist: %v, %v", doc, err)
	}
	tables := []table{{title: "Table", note: "Note.", command: "make it", columns: []string{"", "ms"}, rows: [][]string{{"a|b", "1"}}}}
	for _, s := range sections() {
		doc[s.name] = renderSection(s, "old machine", tables)
	}
	if err := doc.write(name); err != nil {
		t.Fatal(err)
	}
	doc, err = readDocument(name)
	if err != nil {
		t.Fatal(err)
	}
	doc["sandbox"] = renderSection(sections()[0], "new machine", tables)
	if err := doc.write(name); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for want, times := range map[string]int{"new machine": 1, "old machine": len(sections()) - 1, "<!-- section": len(sections()), "# Benchmarks\n\n": 1, `| a\|b | 1 |`: len(sections()), "`make it`": len(sections())} {
		if n := strings.Count(string(text), want); n != times {
			t.Errorf("%q is there %d times, not %d:\n%s", want, n, times, text)
		}
	}
}

func TestAnUnknownSectionIsRefused(t *testing.T) {
	if _, err := choose("sandbox,nothing"); err == nil || !strings.Contains(err.Error(), "nothing") {
		t.Errorf("got %v", err)
	}
	if got, err := choose("sandbox"); err != nil || len(got) != 1 {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestGoBenchmarksBecomeATableForEachPackage(t *testing.T) {
	tables := parseGoBenchmarks([]byte(`goos: linux
pkg: example.com/x/internal/agent
BenchmarkScan-2   	   3	  1234 ns/op	 80.5 MB/s	 16 B/op	 2 allocs/op
PASS
ok  	example.com/x/internal/agent	1s
pkg: example.com/x/internal/repo
PASS
pkg: example.com/x/internal/host
BenchmarkOne-2	1	5 ns/op
BenchmarkTwo-2	1	6 ns/op	7 forks
`))
	if len(tables) != 2 {
		t.Fatalf("%d tables: %+v", len(tables), tables)
	}
	if got := strings.Join(tables[0].rows[0], " "); tables[0].title != "internal/agent" || got != "Scan-2 3 1234 80.5 16 2" {
		t.Errorf("%s: %s", tables[0].title, got)
	}
	if got := strings.Join(tables[1].rows[0], " "); got != "One-2 1 5 –" {
		t.Errorf("a figure that only another benchmark has: %s", got)
	}
}

func TestQuantilesAreOfTheSortedSeries(t *testing.T) {
	s := series{5, 1, 4, 2, 3}
	if s.p(0) != 1 || s.p(.5) != 3 || s.p(.99) != 5 || s[0] != 5 || (series{}).p(.5) != 0 {
		t.Errorf("p0 %d p50 %d p99 %d of %v", s.p(0), s.p(.5), s.p(.99), s)
	}
	if got := ms(1500 * time.Microsecond); got != "1.50" {
		t.Errorf("ms: %s", got)
	}
}

func TestTheTreeIsTheSameEveryTime(t *testing.T) {
	var a, b bytes.Buffer
	if err := writeTree(&a, "60"); err != nil {
		t.Fatal(err)
	}
	if err := writeTree(&b, "60"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) || bytes.Count(a.Bytes(), []byte("\nM 644 inline "))+1 < 60 {
		t.Errorf("%d and %d bytes", a.Len(), b.Len())
	}
	if err := writeTree(&a, "many"); err == nil {
		t.Error("a count that is no number was taken")
	}
}
