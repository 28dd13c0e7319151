package main

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strings"
)

// readGoBenchmarks makes tables of what "go test -bench" said, one for each
// package. Without a file there is nothing to say.
func readGoBenchmarks(_ context.Context, o options) ([]table, error) {
	if o.goOutput == "" {
		return nil, nil
	}
	text, err := os.ReadFile(o.goOutput)
	if err != nil {
		return nil, err
	}
	return parseGoBenchmarks(text), nil
}

func parseGoBenchmarks(text []byte) (tables []table) {
	var t *table
	flush := func() {
		if t != nil && len(t.rows) > 0 {
			tables = append(tables, *t)
		}
		t = nil
	}
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		switch {
		case len(f) == 2 && f[0] == "pkg:":
			flush()
			t = &table{title: f[1][strings.LastIndex(f[1], "/internal/")+1:], command: "make bench", columns: []string{"benchmark", "runs"}}
		case t != nil && len(f) >= 4 && strings.HasPrefix(f[0], "Benchmark"):
			t.add(goRow(t, f)...)
		}
	}
	flush()
	for i := range tables {
		for j, r := range tables[i].rows {
			for len(r) < len(tables[i].columns) {
				r = append(r, "–")
			}
			tables[i].rows[j] = r
		}
	}
	return tables
}

// goRow puts each figure under its unit, which gets a column when it is new.
func goRow(t *table, f []string) []string {
	cells := make([]string, len(t.columns))
	cells[0], cells[1] = strings.TrimPrefix(f[0], "Benchmark"), f[1]
	for i := 2; i+1 < len(f); i += 2 {
		at := slices.Index(t.columns, f[i+1])
		if at < 0 {
			at = len(t.columns)
			t.columns = append(t.columns, f[i+1])
			cells = append(cells, "")
		}
		cells[at] = f[i]
	}
	for i, c := range cells {
		if c == "" {
			cells[i] = "–"
		}
	}
	return cells
}
