package gvisor

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
)

func TestConformance(t *testing.T) {
	p := newProvider(t)
	another := func() (sandbox.Provider, error) { return New(testOptions(t, p.dir)), nil }
	checks := append([]conformance.Check{conformance.NewWorker(another)}, conformance.Checks...)
	t.Run("checks", func(t *testing.T) {
		for i, check := range checks {
			t.Run(check.Name, func(t *testing.T) {
				t.Parallel()
				if err := check.Run(t.Context(), p, fmt.Sprintf("check-%d", i)); err != nil {
					t.Error(err)
				}
			})
		}
	})
}

// ordinaryUser is nobody in particular.
const ordinaryUser = 64321

// TestAllOfThisAsAnOrdinaryUser runs every other test of the package again in
// a process that is not root.
func TestAllOfThisAsAnOrdinaryUser(t *testing.T) {
	needRunsc(t)
	if os.Geteuid() != 0 {
		t.Skip("this already is an ordinary user")
	}
	program, err := supervisor()
	if err != nil {
		t.Fatal(err)
	}
	// Not below t.TempDir, which is closed to others.
	dir, err := os.MkdirTemp("/tmp", "sandbox-gvisor-ordinary-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, ordinaryUser, ordinaryUser); err != nil {
		t.Fatal(err)
	}
	args := []string{"-test.skip=" + t.Name() + "|ThePinnedVersion", "-test.timeout=8m", "-test.v", "-test.short"}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	// The programs are where root may have closed the way for others.
	runsc, err := findRunsc("")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env, cmd.Dir = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir, "SANDBOX_TEMPORAL_CLAUDE="), dir
	for variable, from := range map[string]string{runscVariable: runsc, "SANDBOX_TEMPORAL_BIN": program} {
		to := filepath.Join(dir, filepath.Base(from))
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, variable+"="+to)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}}
	if err := cmd.Run(); err != nil {
		t.Errorf("as an ordinary user: %v", err)
		for line := range strings.Lines(out.String()) {
			if !uneventful.MatchString(line) {
				t.Log(strings.TrimRight(line, "\n"))
			}
		}
	}
	if n := strings.Count(out.String(), "\n--- PASS"); n < 20 {
		t.Errorf("only %d tests passed as an ordinary user", n)
	}
}

// uneventful are the lines of a test's output that say that all is well.
var uneventful = regexp.MustCompile(`^\s*(=== |--- PASS|--- SKIP|PASS|time=\S+ level=(INFO|WARN))`)
