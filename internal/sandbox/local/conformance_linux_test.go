package local

import (
	"bytes"
	"errors"
	"fmt"
	"io"
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
	p.spares.most = 2
	t.Cleanup(p.Close)
	another := func() (sandbox.Provider, error) { return New(testOptions(p.dir)), nil }
	checks := append([]conformance.Check{conformance.NewWorker(another)}, conformance.Checks...)
	t.Run("checks", func(t *testing.T) {
		for i, check := range checks {
			t.Run(check.Name, func(t *testing.T) {
				t.Parallel()
				if err := check.Run(t.Context(), p, fmt.Sprintf("check-%d-%d", os.Getpid(), i)); err != nil {
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
	if os.Geteuid() != 0 {
		t.Skip("this already is an ordinary user")
	}
	// Not below t.TempDir, which is closed to others.
	dir, err := os.MkdirTemp("/tmp", "sandbox-ordinary-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, ordinaryUser, ordinaryUser); err != nil {
		t.Fatal(err)
	}
	// What takes long by its size alone was done at full size as root.
	args := []string{"-test.skip=" + t.Name(), "-test.timeout=15m", "-test.v", "-test.short"}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env, cmd.Dir = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir), dir
	// The programs may be where root has closed the way for others.
	for variable, name := range map[string]string{"SANDBOX_TEMPORAL_CLAUDE": "claude", "SANDBOX_TEMPORAL_BIN": "sandbox-supervisor"} {
		from := os.Getenv(variable)
		if from == "" {
			continue
		}
		if name == "sandbox-supervisor" { // which is beside what the variable names
			from = filepath.Join(filepath.Dir(from), name)
		}
		near := filepath.Join(dir, name)
		if err := copyProgram(from, near); err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, variable+"="+near)
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

func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// uneventful are the lines of a test's output that say that all is well.
var uneventful = regexp.MustCompile(`^\s*(=== |--- PASS|--- SKIP|PASS)`)
