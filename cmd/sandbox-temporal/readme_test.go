package main

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/cli"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
)

// TestReadmeShowsWhatProvidersCan compares the table in README with the one
// that the code makes. With -update it writes it.
func TestReadmeShowsWhatProvidersCan(t *testing.T) {
	const file, begin, end = "../../README.md", "<!-- providers -->\n", "<!-- /providers -->\n"
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(b), begin)
	old, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no table between %q and %q", file, begin, end)
	}
	table := cli.ProvidersMarkdown(providers(t.TempDir(), func() config.Secrets { return config.Secrets{} }, slog.New(slog.DiscardHandler)))
	if *update {
		if err := os.WriteFile(file, []byte(before+begin+table+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(old, table); diff != "" {
		t.Errorf("README (-README +code; go test ./cmd/sandbox-temporal -run %s -update rewrites it):\n%s", t.Name(), diff)
	}
}
