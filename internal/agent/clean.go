package agent

import (
	"strings"
	"unicode/utf8"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// The bounds of what is kept of an agent's words, in bytes. An agent is a
// stranger: it may say anything, at any length.
const (
	maxEventText = 4 << 10 // Event.Text
	maxWord      = 256     // ids, names and other single words
	maxAction    = 240     // Summary.Action, which travels with every heartbeat
	maxEvents    = 64      // events of one line
)

// Clean makes any text safe to print on a terminal. Escape sequences and
// control characters go, except newline and tab; so do the marks that turn or
// hide text (bidirectional overrides, tag characters). A carriage return
// becomes a newline, so that nothing is overwritten, and bytes that are no
// UTF-8 become U+FFFD. Cleaning twice changes nothing more.
func Clean(s string) string {
	i := 0
	for i < len(s) {
		r, size := utf8.DecodeRuneInString(s[i:])
		if unsafeRune(r) || r == utf8.RuneError && size == 1 {
			break
		}
		i += size
	}
	if i == len(s) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s))
	b.WriteString(s[:i])
	for i < len(s) {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == '\r':
			if !strings.HasPrefix(s[i+1:], "\n") {
				b.WriteByte('\n')
			}
		case r == '\u2028' || r == '\u2029':
			b.WriteByte('\n')
		case unsafeRune(r):
			size = sequence(s[i:], r, size)
		default:
			b.WriteRune(r) // invalid bytes come as U+FFFD
		}
		i += size
	}
	return b.String()
}

// unsafeRune reports whether r may not reach a terminal as it is.
func unsafeRune(r rune) bool {
	switch {
	case r == '\n' || r == '\t':
		return false
	case r < 0x20, r >= 0x7f && r <= 0x9f: // C0, DEL, C1
		return true
	case r == 0x61c, r == 0x200e, r == 0x200f, r >= 0x202a && r <= 0x202e, r >= 0x2066 && r <= 0x2069: // bidi
		return true
	case r == 0x2028, r == 0x2029: // line and paragraph separators
		return true
	case r >= 0xe0000 && r <= 0xe007f: // tags: letters that nobody sees
		return true
	}
	return false
}

// sequence returns the length of the escape sequence that s begins with; r is
// its first rune, of the given size. What only looks like a sequence is as
// long as its introducer, so that an unfinished one hides no text. It looks
// no further than the next control character, which keeps Clean linear.
// The forms are those of ECMA-48.
func sequence(s string, r rune, size int) int {
	kind, i := byte(0), size
	switch {
	case r == 0x1b && i < len(s):
		kind = s[i]
		i++
	case r >= 0x80 && r <= 0x9f:
		kind = byte(r - 0x40) // a C1 control is short for ESC and this byte
	default:
		return size
	}
	switch {
	case kind == '[': // CSI: parameters, intermediates, one final byte
		for i < len(s) && s[i] >= 0x20 && s[i] <= 0x3f {
			i++
		}
		if i < len(s) && s[i] >= 0x40 && s[i] <= 0x7e {
			return i + 1
		}
		return size
	case strings.IndexByte("]PX^_", kind) >= 0: // a string, ended by BEL or ST
		for i < len(s) {
			c, n := utf8.DecodeRuneInString(s[i:])
			switch {
			case c == 0x07, c == 0x9c:
				return i + n
			case c == 0x1b && strings.HasPrefix(s[i+1:], `\`):
				return i + 2
			case c < 0x20, c >= 0x7f && c <= 0x9f:
				return size
			}
			i += n
		}
		return size
	case r == 0x1b && kind >= 0x20 && kind <= 0x2f: // intermediates, as in the choice of a character set
		for i < len(s) && s[i] >= 0x20 && s[i] <= 0x2f {
			i++
		}
		if i < len(s) && s[i] >= 0x30 && s[i] <= 0x7e {
			return i + 1
		}
		return size
	case r == 0x1b && kind >= 0x30 && kind <= 0x7e:
		return i
	}
	return size
}

// flat returns s on one line and safe to print.
func flat(s string) string { return strings.Join(strings.Fields(Clean(s)), " ") }

// oneLine returns the beginning of s on one line, short enough for a status
// display and safe to print.
func oneLine(s string) string {
	const mark = "…"
	if len(s) > 16*maxAction {
		s = s[:16*maxAction]
	}
	s = flat(s)
	if len(s) <= maxAction {
		return s
	}
	n := maxAction - len(mark)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + mark
}

// toolName is the name of a tool as it may stand anywhere: a server of tools
// that strangers wrote can call one what it likes.
func toolName(s string) string {
	const most = 64
	if len(s) > most || strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
	}) {
		return "a tool"
	}
	return s
}

// bounded shortens the text of an event.
func bounded(s string) string { return fork.Cut(s, maxEventText) }

// word shortens an id or a name. Nothing marks the cut: real ones are short.
func word(s string) string {
	if len(s) <= maxWord {
		return s
	}
	return strings.ToValidUTF8(s[:maxWord], "")
}

// tail returns the last limit bytes of s at most, from the beginning of a
// line when one is near.
func tail(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	s = s[len(s)-limit:]
	if i := strings.IndexByte(s, '\n'); i >= 0 && i < limit/4 {
		return s[i+1:]
	}
	for len(s) > 0 && !utf8.RuneStart(s[0]) {
		s = s[1:]
	}
	return s
}
