package cli

import (
	"bufio"
	"io"
	"strings"

	"github.com/charmbracelet/lipgloss"
)

// A column of a table.
type column struct {
	head  string
	right bool // numbers line up at the right
}

// A cell is one field of a table. Its text is flat.
type cell struct {
	text   string
	colour string
}

// writeTable writes the columns as wide as their widest cell, two spaces
// apart, and nothing behind the last.
func writeTable(w io.Writer, p paint, columns []column, rows [][]cell) error {
	width := make([]int, len(columns))
	for i, c := range columns {
		width[i] = lipgloss.Width(c.head)
	}
	for _, row := range rows {
		for i, c := range row {
			width[i] = max(width[i], lipgloss.Width(c.text))
		}
	}
	head := make([]cell, len(columns))
	for i, c := range columns {
		head[i] = cell{c.head, bold}
	}
	out := bufio.NewWriter(w)
	for _, row := range append([][]cell{head}, rows...) {
		gap := 0 // held back, so that no line ends in spaces
		for i, c := range row {
			pad := width[i] - lipgloss.Width(c.text)
			if columns[i].right {
				gap, pad = gap+pad, 0
			}
			if c.text != "" {
				out.WriteString(strings.Repeat(" ", gap))
				out.WriteString(p.in(c.colour, c.text))
				gap = 0
			} else if columns[i].right {
				pad = 0
			}
			gap += pad + 2
		}
		out.WriteByte('\n')
	}
	return out.Flush()
}
