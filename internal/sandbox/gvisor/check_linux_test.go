package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDoctorSaysWhetherGVisorCanBeUsed(t *testing.T) {
	needRunsc(t)
	dir := filepath.Join(t.TempDir(), "state")
	one := func(runsc string) Finding {
		t.Helper()
		o := testOptions(t, dir)
		o.Runsc = runsc
		found := Check(t.Context(), o)
		if len(found) != 1 {
			t.Fatalf("%v", found)
		}
		return found[0]
	}
	if f := one(""); !f.OK || f.Hint != "" || !strings.Contains(f.Text, TestedVersion) {
		t.Errorf("the pinned runsc: %v, hint %q", f, f.Hint)
	}
	if f := one("/no/such/runsc"); f.OK || !strings.Contains(f.Hint, "go install gvisor.dev/gvisor/runsc@"+TestedVersion) {
		t.Errorf("no runsc: %v, hint %q", f, f.Hint)
	}
	real, err := findRunsc("")
	if err != nil {
		t.Fatal(err)
	}
	fake := func(text string) string {
		name := filepath.Join(t.TempDir(), "runsc")
		if err := os.WriteFile(name, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
		return name
	}
	other := fake(`[ "$1" != --version ] || exec echo runsc version release-20200101.0; exec "` + real + `" "$@"`)
	if f := one(other); !f.OK || !strings.Contains(f.Text, "release-20200101.0") || !strings.Contains(f.Hint, TestedVersion) {
		t.Errorf("another version: %v, hint %q", f, f.Hint)
	}
	if f := one(fake(`echo hello`)); f.OK || f.Hint == "" {
		t.Errorf("another program: %v, hint %q", f, f.Hint)
	}
	if f := one(fake(`[ "$1" != --version ] || exec echo runsc version 1; echo this machine is too old >&2; exit 1`)); f.OK || !strings.Contains(f.Text, "this machine is too old") {
		t.Errorf("a runsc that does not work here: %v", f)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
