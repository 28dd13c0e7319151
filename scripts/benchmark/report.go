package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
)

// A table is what a section has measured. Command is what a reader runs to
// measure it again; empty: what measures the section again.
type table struct {
	title   string
	note    string // one paragraph above the table; empty: none
	command string
	columns []string // the first is of words, the others of figures
	rows    [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// A document is the text of each section, by its name.
type document map[string]string

const documentHead = `# Benchmarks

Written by ` + "`make bench`" + `; what is changed here by hand is lost. Figures of different machines, and of different
sections, which may have been measured on different days, cannot be compared. Within a table everything was measured in one run, in turns,
so that other work on the machine met all rows alike.
`

var sectionMark = regexp.MustCompile(`(?m)^<!-- section ([a-z0-9]+) -->\n`)

// readDocument takes the document apart. One that does not exist is empty.
func readDocument(name string) (document, error) {
	text, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	doc := document{}
	marks := sectionMark.FindAllSubmatchIndex(text, -1)
	for i, m := range marks {
		end := len(text)
		if i+1 < len(marks) {
			end = marks[i+1][0]
		}
		doc[string(text[m[2]:m[3]])] = strings.TrimSpace(string(text[m[1]:end]))
	}
	return doc, nil
}

// write puts the sections into their order. Those that no longer exist go.
func (d document) write(name string) error {
	var b bytes.Buffer
	b.WriteString(documentHead)
	for _, s := range sections() {
		if text, ok := d[s.name]; ok {
			fmt.Fprintf(&b, "\n<!-- section %s -->\n\n%s\n", s.name, text)
		}
	}
	if name == "" {
		_, err := os.Stdout.Write(b.Bytes())
		return err
	}
	return os.WriteFile(name, b.Bytes(), 0o644)
}

func renderSection(s section, head string, tables []table) string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n%s\n", s.title, head)
	for _, t := range tables {
		fmt.Fprintf(&b, "\n### %s\n", t.title)
		if t.note != "" {
			fmt.Fprintf(&b, "\n%s\n", t.note)
		}
		fmt.Fprintf(&b, "\n`%s`\n\n", t.command)
		row(&b, t.columns)
		align := make([]string, len(t.columns))
		for i := range align {
			align[i] = "--:"
		}
		align[0] = "---"
		row(&b, align)
		for _, r := range t.rows {
			row(&b, r)
		}
	}
	return strings.TrimSpace(b.String())
}

func row(b *strings.Builder, cells []string) {
	b.WriteString("|")
	for _, c := range cells {
		fmt.Fprintf(b, " %s |", strings.ReplaceAll(c, "|", "\\|"))
	}
	b.WriteString("\n")
}
