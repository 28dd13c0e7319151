package cli

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func TestIsolationChoosesTheProvider(t *testing.T) {
	with := sandbox.Set{"local": shed{}, "gvisor": shed{}, "far": shed{}}
	without := sandbox.Set{"local": shed{}, "far": shed{}}
	file := filepath.Join(t.TempDir(), "config.toml")
	write(t, file, "[fork]\nisolation = \"gvisor\"\n")
	for name, r := range map[string]struct {
		set             sandbox.Set
		args            []string
		provider, tier  string // of the plan; empty: refused
		inError, inHint string
	}{
		"nothing said":           {with, nil, "local", "", "", ""},
		"the default by name":    {with, []string{"--isolation", "namespaces"}, "local", "namespaces", "", ""},
		"gvisor":                 {with, []string{"--isolation", "gvisor"}, "gvisor", "gvisor", "", ""},
		"gvisor, local by name":  {with, []string{"--isolation", "gvisor", "--provider", "local"}, "gvisor", "gvisor", "", ""},
		"from the file":          {with, []string{"--config", file}, "gvisor", "gvisor", "", ""},
		"file, lifted by a flag": {with, []string{"--config", file, "--isolation", "namespaces"}, "local", "namespaces", "", ""},
		"file, emptied":          {with, []string{"--config", file, "--isolation", "", "--provider", "far"}, "far", "", "", ""},
		"not installed":          {without, []string{"--isolation", "gvisor"}, "", "", `no provider "gvisor"`, "Install gVisor"},
		"unknown":                {with, []string{"--isolation", "vm"}, "", "", `no tier "vm"`, "namespaces, gvisor"},
		"another provider":       {with, []string{"--isolation", "gvisor", "--provider", "far"}, "", "", "for the provider local", "--provider local"},
		"its own name":           {with, []string{"--isolation", "namespaces", "--provider", "gvisor"}, "", "", "for the provider local", "--provider local"},
		"an escape":              {with, []string{"--isolation", "\x1b[31m"}, "", "", "no tier", "namespaces, gvisor"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSession(t, newMemory())
			s.env.Providers = func(Globals) (sandbox.Set, error) { return r.set, nil }
			args := append([]string{remote, "--prompt", "x"}, r.args...)
			if r.provider != "" {
				if plan := planOf(t, s, args...); plan.Provider != r.provider || plan.Isolation != r.tier {
					t.Errorf("provider %q, isolation %q", plan.Provider, plan.Isolation)
				}
				return
			}
			s.want(t, exitUsage, append([]string{"fork"}, args...)...)
			first, hint, _ := strings.Cut(s.errors.String(), "\n")
			if len(s.runs.order) > 0 || !strings.Contains(first, r.inError) || !strings.Contains(hint, r.inHint) || strings.Contains(first+hint, "\x1b") {
				t.Errorf("%s\n%s", first, hint)
			}
		})
	}
}

func TestTiersAreShown(t *testing.T) {
	s := newSession(t, newMemory())
	s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.Set{"local": nil, "gvisor": nil, "far": nil}, nil }
	s.want(t, exitOK, "providers")
	rows := map[string][]string{}
	for line := range strings.Lines(s.out.String()) {
		fields := strings.Fields(line)
		rows[fields[0]] = fields
	}
	if head := rows["CAPABILITY"]; !slices.Equal(head, []string{"CAPABILITY", "far", "gvisor", "local"}) {
		t.Errorf("%s", &s.out)
	}
	if tiers := rows["isolation"]; len(tiers) < 4 || !slices.Equal(tiers[1:4], []string{"-", "gvisor", "namespaces"}) {
		t.Errorf("%s", &s.out)
	}
	if f := checkTiers(sandbox.Set{"local": nil}); f.Health != Good || f.Text != "namespaces; not here: gvisor" {
		t.Errorf("%+v", f)
	}
	if f := checkTiers(sandbox.Set{"local": nil, "gvisor": nil}); f.Text != "namespaces, gvisor" {
		t.Errorf("%+v", f)
	}
}
