package agent

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestCleanTakesTheTerminalOutOfText(t *testing.T) {
	for in, want := range map[string]string{
		"": "",
		"plain\ttext\nwith é and 日本 and 👩‍💻":        "plain\ttext\nwith é and 日本 and 👩‍💻",
		"\x1b[31mred\x1b[0m":                        "red",
		"\x1b[38;2;1;2;3mrgb\x1b[?25l":              "rgb",
		"a\x1b]0;title\x07b":                        "ab",
		"a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "alink",
		"a\x1b]52;c;cm0gLXJm\u009cb":                "ab", // writes the clipboard
		"a\x1bPq#0\x1b\\b":                          "ab", // a sixel image
		"a\u009b31mb":                               "ab", // CSI in one character
		"a\u009d0;title\x07b":                       "ab",
		"a\x1b(Bb":                                  "ab",
		"a\x1bcb":                                   "ab", // reset
		"bell\x07 back\x08 null\x00 del\x7f":        "bell back null del",
		"10%\r20%\r\ndone\r":                        "10%\n20%\ndone\n",
		"\u202egnp.exe\u202c":                       "gnp.exe",
		"a\u2066b\u2069\u200f\u061c":                "ab",
		"hid\U000e0041\U000e007fden":                "hidden",
		"line\u2028break":                           "line\nbreak",
		"\xff\x9b31m":                               "\ufffd\ufffd31m",
		// What is not finished hides nothing.
		"a\x1b":               "a",
		"a\x1b[":              "a[",
		"a\x1b[31":            "a[31",
		"a\x1b[3\x1b[1mb":     "a[3b",
		"a\x1b]0;no end":      "a]0;no end",
		"a\x1b]0;no\nend\x07": "a]0;no\nend",
		"a\x1b\xffb":          "a\ufffdb",
	} {
		if got := Clean(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestOneLineIsOneShortLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                              "",
		" a\n\n\tb \x1b[1mc\x1b[0m\r\n": "a b c",
		"a\u00a0b":                      "a b",
	} {
		if got := oneLine(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	long := oneLine(strings.Repeat("é", 1000))
	if len(long) > maxAction || !utf8.ValidString(long) || !strings.HasSuffix(long, "é…") {
		t.Errorf("%d bytes: %q", len(long), long)
	}
}

// Text is as long as a stranger likes, and sequences may begin and never end.
func TestCleanIsLinear(t *testing.T) {
	for _, piece := range []string{"\x1b]", "\x1b[", "\x1bP0", "\u009d", "\x1b(", "\x1b[1"} {
		begin := time.Now()
		Clean(strings.Repeat(piece, 1<<20))
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("%q a million times took %s", piece, took)
		}
	}
}

func FuzzClean(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[31mred\x1b[0m", "a\x1b]0;t\x07", "\u009b1m", "\u202e", "a\r\nb\rc", "\xff\x9b", "\x1b", "\x1b]\x1b\\", "\u2028"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := Clean(s)
		if !utf8.ValidString(got) || Clean(got) != got {
			t.Fatalf("%q: %q, and again %q", s, got, Clean(got))
		}
		for _, r := range got {
			if unsafeRune(r) {
				t.Fatalf("%q: %q holds %U", s, got, r)
			}
		}
		// Letters outside of sequences stay: without controls nothing goes.
		if utf8.ValidString(s) && !strings.ContainsFunc(s, unsafeRune) && got != s {
			t.Fatalf("%q became %q", s, got)
		}
		if one := oneLine(s); strings.ContainsAny(one, "\n\t") || len(one) > maxAction || !utf8.ValidString(one) {
			t.Fatalf("%q: %q is not one line", s, one)
		}
	})
}
