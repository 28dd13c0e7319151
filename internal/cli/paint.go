package cli

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/charmbracelet/lipgloss"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// clean makes text of any origin safe to show; it may have several lines.
func clean(s string) string { return agent.Clean(s) }

// flat makes text of any origin safe to show on one line.
func flat(s string) string { return strings.Join(strings.Fields(clean(s)), " ") }

// fit shortens s, which is flat, to at most width columns.
func fit(s string, width int) string {
	if width <= 0 {
		return ""
	}
	if lipgloss.Width(s) <= width {
		return s
	}
	used, end := 0, 0
	for i, r := range s {
		w := lipgloss.Width(string(r))
		if used+w > width-1 {
			break
		}
		used += w
		end = i + len(string(r))
	}
	return s[:end] + "…"
}

// A paint colours text, or does not when it is false.
type paint bool

// paintFor decides by --color, NO_COLOR (see no-color.org) and TERM.
func (env *Env) paintFor(w io.Writer) paint {
	switch env.Globals.Color {
	case "always":
		return true
	case "never":
		return false
	}
	return paint(env.Getenv("NO_COLOR") == "" && env.Getenv("TERM") != "dumb" && env.IsTerminal(w))
}

// The colours are the eight that every terminal lets its user choose.
const (
	plain  = ""
	bold   = "1"
	dim    = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
)

func (p paint) in(colour, s string) string {
	if !p || colour == plain || s == "" {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

// colourOf is the colour in which a status is shown.
func colourOf(s fork.Status) string {
	switch s {
	case fork.Success:
		return green
	case fork.Running:
		return cyan
	case fork.Pending:
		return dim
	case fork.Cancelled, fork.TimedOut, fork.BudgetExceeded:
		return yellow
	}
	return red
}

// dollars shows money with four decimals, which is what people compare.
func dollars(u fork.USD) string {
	const unit = fork.Dollar / 10_000
	sign := ""
	n := uint64(u)
	if u < 0 {
		sign, n = "-", -uint64(u)
	}
	n = (n + uint64(unit)/2) / uint64(unit)
	return fmt.Sprintf("%s$%d.%04d", sign, n/10_000, n%10_000)
}

// seconds shows a duration the way people say it.
func seconds(s float64) string {
	if math.IsNaN(s) || s < 0 {
		s = 0
	}
	if s > 0 && s < 9.95 {
		return fmt.Sprintf("%.1fs", s)
	}
	d := time.Duration(min(math.Round(s), 1e9)) * time.Second
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
}

// age shows how long ago t was.
func age(now, t time.Time) string {
	d := max(now.Sub(t), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// plural is "1 fork", "2 forks".
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
