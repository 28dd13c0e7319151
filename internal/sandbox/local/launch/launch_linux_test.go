package launch

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func TestOfTwoValuesInTheEnvironmentTheLaterHolds(t *testing.T) {
	got := merge([]string{"A=1", "B=2"}, [][]byte{[]byte("B=3"), []byte("C="), []byte("A=4"), []byte("C=5=6")})
	if strings.Join(got, " ") != "A=4 B=3 C=5=6" {
		t.Error(got)
	}
	if env := Environment([][]byte{[]byte("HOME=/x")}); !slices.Contains(env, "HOME=/x") || slices.Contains(env, "HOME="+sandbox.Home) {
		t.Error(env)
	}
}

func TestProgramsAreFoundAsAShellFindsThem(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"bin/tool": 0o755, "bin/text": 0o644, "other/text": 0o755, "other/tool": 0o755, "here": 0o755} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "bin/text"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := "PATH=relative:" + filepath.Join(dir, "bin") + ":" + filepath.Join(dir, "other")
	for _, row := range []struct {
		name string
		env  string
		want string // below dir
		err  error
	}{
		{"tool", path, "bin/tool", nil},
		{"text", path, "other/text", nil}, // the first that can be run
		{"here", path, "", unix.ENOENT},
		{"./here", path, "here", nil},
		{"bin/text", path, "bin/text", unix.EACCES},
		{"./bin", path, "bin", unix.EACCES},
		{"text", "PATH=" + filepath.Join(dir, "bin"), "", unix.EACCES},
		{"tool", "OTHER=x", "", unix.ENOENT},
		{"", path, "", unix.ENOENT},
	} {
		got, err := Find(row.name, dir, []string{"PATH=/nowhere", row.env})
		if row.env == "OTHER=x" {
			got, err = Find(row.name, dir, []string{row.env})
		}
		want := row.want
		if want != "" {
			want = filepath.Join(dir, want)
		}
		if got != want || !errors.Is(err, row.err) {
			t.Errorf("%q: %q, %v; want %q, %v", row.name, got, err, want, row.err)
		}
	}
}

func TestAProgramThatCannotBeRunEndsAsInAShell(t *testing.T) {
	long := strings.Repeat("x", 2*maxName)
	for _, row := range []struct {
		err  error
		code int
		kind fault.Kind
	}{
		{unix.ENOENT, NotFound, ""},
		{&os.PathError{Op: "fork/exec", Path: "/x", Err: unix.ENOTDIR}, NotFound, ""},
		{unix.EACCES, NoExec, ""},
		{unix.ENOEXEC, NoExec, ""},
		{unix.EAGAIN, 0, fault.Unavailable},
		{unix.ENOMEM, 0, fault.Unavailable},
		{unix.EINVAL, 0, fault.Invalid},
	} {
		exit, note, err := Refusal("start", long, row.err)
		if exit.Code != row.code || fault.KindOf(err) != row.kind || (note != "") != (row.code != 0) || len(note) > maxName+100 {
			t.Errorf("%v: %+v, %d bytes, %v", row.err, exit, len(note), err)
		}
	}
}

func TestAProcessThatWasKilledSaysByWhat(t *testing.T) {
	for status, want := range map[unix.WaitStatus]sandbox.Exit{
		0:                             {},
		3 << 8:                        {Code: 3},
		unix.WaitStatus(unix.SIGKILL): {Code: 137, Signal: "KILL"},
		34:                            {Code: 162, Signal: "34"},
	} {
		if got := ExitOf(status); got != want {
			t.Errorf("%#x: %+v, want %+v", int(status), got, want)
		}
	}
}
