package cli

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandbox-temporal/sandbox-temporal/internal/cli/page"
)

// Help is part of the interface: it is read more often than the code.
func TestEveryCommandExplainsItself(t *testing.T) {
	seen := 0
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if c.Hidden || strings.HasPrefix(c.Name(), "__") {
			return
		}
		seen++
		path := c.CommandPath()
		if c.Short == "" || !unicode.IsUpper(rune(c.Short[0])) || strings.HasSuffix(c.Short, ".") || len(c.Short) > 60 {
			t.Errorf("%s: Short %q is not a capitalised line without a full stop", path, c.Short)
		}
		var help bytes.Buffer
		c.InitDefaultHelpFlag()
		c.SetOut(&help)
		if err := c.Help(); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		completion := strings.HasPrefix(path, program+" completion ") // cobra's own text
		for line := range strings.Lines(help.String()) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 && !completion {
				t.Errorf("%s: a line of its help has %d columns: %q", path, n, line)
			}
		}
		if c.IsAdditionalHelpTopicCommand() {
			return
		}
		if !strings.Contains(c.Long, "Exit status:\n    0  ") || !strings.Contains(c.Long, "\n    2  ") {
			t.Errorf("%s: Long does not list the exit codes", path)
		}
		if !strings.Contains(c.Example, path) {
			t.Errorf("%s: Example never calls it", path)
		}
		for line := range strings.Lines(c.Example) {
			if !strings.HasPrefix(line, "  ") {
				t.Errorf("%s: a line of Example is not indented: %q", path, line)
			}
		}
		if c.Args == nil {
			t.Errorf("%s: does not say how many arguments it wants", path)
		}
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Hidden {
				return
			}
			if f.Usage == "" || unicode.IsUpper(rune(f.Usage[0])) || strings.HasSuffix(f.Usage, ".") {
				t.Errorf("%s: --%s is not explained in a lower-case line: %q", path, f.Name, f.Usage)
			}
		})
	}
	env := &Env{}
	Plug(env, Parts{})
	walk(newRoot(env.complete()))
	if seen < 25 {
		t.Errorf("only %d commands were looked at", seen)
	}
}

func TestHelpTouchesNothingDear(t *testing.T) {
	s := newSession(t, newMemory())
	s.vars["SANDBOX_TEMPORAL_CONFIG"] = "/nowhere/at/all.toml"
	s.env.Runs = func(context.Context, Globals) (Runs, error) {
		t.Error("help connected to Temporal")
		return newMemory(), nil
	}
	for _, args := range [][]string{{}, {"help"}, {"--help"}, {"help", "fork"}, {"fork", "--help"}, {"help", "exit-codes"}, {"help", "config", "explain"}, {"version"}, {"completion", "bash"}} {
		s.want(t, exitOK, args...)
		if s.out.Len() == 0 || s.errors.Len() > 0 {
			t.Errorf("%q: stdout %d bytes, stderr %q", args, s.out.Len(), &s.errors)
		}
	}
}

// TestPagesAreWhatTheCommandsSay renders the help of every command and topic
// and compares it with the page that is shown before there are any commands.
// With -update it writes the pages.
func TestPagesAreWhatTheCommandsSay(t *testing.T) {
	const dir = "page/pages"
	s := newSession(t, newMemory())
	env := &Env{}
	Plug(env, Parts{})
	Plug(s.env, Parts{})
	if *update {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	rendered := map[string]bool{}
	var walk func(c *cobra.Command, words ...string)
	walk = func(c *cobra.Command, words ...string) {
		for _, sub := range c.Commands() {
			if !strings.HasPrefix(sub.Name(), "__") {
				walk(sub, append(slices.Clone(words), sub.Name())...)
			}
		}
		s.want(t, exitOK, append([]string{"help"}, words...)...)
		file := filepath.Join(dir, page.File(words...))
		rendered[filepath.Base(file)] = true
		if *update {
			if err := os.WriteFile(file, s.out.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
			return // what is linked in here is what was there before
		}
		text, ok := page.Asked(append(slices.Clone(words), "--help"))
		if diff := cmp.Diff(string(text), s.out.String()); !ok || diff != "" {
			t.Errorf("%q (-page +command; go test -update rewrites it):\n%s", words, diff)
		}
	}
	walk(newRoot(env.complete()))
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !rendered[f.Name()] {
			t.Errorf("%s is the page of no command (go test -update removes it)", f.Name())
		}
	}
}

func TestMisspeltWordsAreUsageErrorsWithANextStep(t *testing.T) {
	for _, c := range []struct {
		args        []string
		text, hints string
	}{
		{[]string{"frok"}, `sandbox-temporal has no command "frok"`, "Did you mean fork?"},
		{[]string{"frok", "--prompt", "x"}, `sandbox-temporal has no command "frok"`, "Did you mean fork?"},
		{[]string{"xyzzy"}, `sandbox-temporal has no command "xyzzy"`, "See: sandbox-temporal --help"},
		{[]string{"help", "frok"}, `sandbox-temporal has no command "frok"`, "Did you mean fork?"},
		{[]string{"config", "explian"}, `sandbox-temporal config has no command "explian"`, "Did you mean explain?"},
		{[]string{"completion", "tcsh"}, `sandbox-temporal completion has no command "tcsh"`, "See: "},
		{[]string{"fork", "--promt", "x"}, "sandbox-temporal fork has no flag --promt", "Did you mean --prompt?"},
		{[]string{"fork", "-z"}, "sandbox-temporal fork has no flag -z", "See: sandbox-temporal fork --help"},
		{[]string{"--bogus"}, "sandbox-temporal has no flag --bogus", "See: "},
		{[]string{"status"}, "sandbox-temporal status wants RUN", "See: sandbox-temporal status --help"},
		{[]string{"status", "a", "b"}, `sandbox-temporal status does not know what to do with "b"`, "See: "},
		{[]string{"fork", "--prompt", "fix", "the", "bug"}, `sandbox-temporal fork does not know what to do with "bug"`, "Put quotes around"},
		{[]string{"status", "x", "-o", "yaml"}, `--output "yaml": use one of: table, json`, "See: "},
		{[]string{"status", "x", "--output"}, "--output needs a value", "See: "},
		{[]string{"list", "--limit", "many"}, `--limit "many": want a whole number`, "See: "},
		{[]string{"list", "--limit", "99999999999999999999"}, "that is out of range", "See: "},
		{[]string{"list", "--limit", "0"}, "a list of 0 runs asked for", "Use --limit 1 to"},
		{[]string{"list", "--limit", "-3"}, "a list of -3 runs asked for", "Use --limit 1 to"},
		{[]string{"--color", "pink", "list"}, `--color "pink"`, "See: "},
		{[]string{"cleanup", "--interval", "0"}, "--interval 0", "in minutes"},
		{[]string{"cleanup", "--max-age", "-1"}, "--max-age -1", "in minutes"},
		{[]string{"cleanup", "--once", "--interval", "5"}, "is for a clean-up that is done again", "Leave --interval out"},
		{[]string{"list", "--address", "nonsense"}, `--address: "nonsense" is not host:port`, "localhost:7233"},
		{[]string{"status", "run/0"}, `"run/0" names no run`, "@last"},
		{[]string{"status", "run/2"}, `"run/2" names a fork`, "Leave the number out."},
		{[]string{"pause", "@last/1"}, `"@last/1" names a fork`, "Leave the number out."},
		{[]string{"diff", "@last"}, `"@last" names a run`, "@last/1"},
		{[]string{"apply", "'; drop table"}, "names no run", "@last"},
	} {
		s := newSession(t, newMemory())
		s.want(t, exitUsage, c.args...)
		if s.out.Len() > 0 {
			t.Errorf("%q: stdout %q", c.args, &s.out)
		}
		text := s.errors.String()
		first, rest, _ := strings.Cut(text, "\n")
		if !strings.HasPrefix(first, "sandbox-temporal: ") || !strings.Contains(first, c.text) || !strings.Contains(rest, c.hints) {
			t.Errorf("%q: %s", c.args, text)
		}
		if strings.Count(text, c.text) != 1 {
			t.Errorf("%q: said more than once: %s", c.args, text)
		}
	}
}

func TestVersion(t *testing.T) {
	s := newSession(t, newMemory())
	s.want(t, exitOK, "version")
	if !strings.HasPrefix(s.out.String(), "sandbox-temporal v1.2.3 (go") {
		t.Errorf("%q", &s.out)
	}
	s.want(t, exitOK, "version", "-o", "json")
	if !strings.Contains(s.out.String(), `"version": "v1.2.3"`) {
		t.Errorf("%q", &s.out)
	}
}
