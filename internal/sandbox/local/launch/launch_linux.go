// Package launch is what the first process of a sandbox knows of starting
// others: what stands in their environment, where they are looked for, and what
// is said of one that cannot be run. In all of that it does what a shell does.
package launch

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// SearchPath is PATH in a sandbox.
const SearchPath = sandbox.ProgramDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// goBin is where the Go installer puts what everybody expects to find.
const goBin = "/usr/local/go/bin"

// Exit codes of a program that could not be run, as a shell gives them.
const (
	NotFound = 127
	NoExec   = 126
)

// Environment returns what every process gets, with extra added as K=V; of two
// values the later one holds.
func Environment(extra [][]byte) []string {
	p := SearchPath
	if st, err := os.Stat(goBin); err == nil && st.IsDir() {
		p += ":" + goBin
	}
	return merge([]string{"PATH=" + p, "HOME=" + sandbox.Home, "USER=agent", "LOGNAME=agent", "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=dumb"}, extra)
}

func merge(base []string, extra [][]byte) []string {
	env := make([]string, 0, len(base)+len(extra))
	at := map[string]int{}
	add := func(kv string) {
		k, _, _ := strings.Cut(kv, "=")
		if i, ok := at[k]; ok {
			env[i] = kv
			return
		}
		at[k] = len(env)
		env = append(env, kv)
	}
	for _, kv := range base {
		add(kv)
	}
	for _, kv := range extra {
		add(string(kv))
	}
	return env
}

// Find returns the file of a program, looked for in the PATH of env as whom this
// process is to the file system. A name with a slash is looked up from dir. What
// it fails with is for Refusal.
func Find(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		return name, executable(name)
	}
	var search string
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			search = v
		}
	}
	found := error(unix.ENOENT)
	for d := range strings.SplitSeq(search, ":") {
		if name == "" || !path.IsAbs(d) {
			continue
		}
		p := path.Join(d, name)
		err := executable(p)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, unix.EACCES) {
			found = err // the best reason is kept
		}
	}
	return "", found
}

func executable(p string) error {
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EACCES
	}
	return unix.Faccessat2(unix.AT_FDCWD, p, unix.X_OK, unix.AT_EACCESS)
}

// maxName is how much of a program's name is said again.
const maxName = 4096

// Refusal says what became of the program called name that could not be found or
// started because of err. That is its exit, with a note for its standard error,
// where a shell would say so; else an error of op: fault.Unavailable when the
// sandbox has no room for another process, fault.Invalid otherwise.
func Refusal(op, name string, err error) (exit sandbox.Exit, note string, _ error) {
	if len(name) > maxName {
		name = name[:maxName] + "…"
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return sandbox.Exit{Code: NotFound}, fmt.Sprintf("sandbox: %s: command not found\n", name), nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP):
		return sandbox.Exit{Code: NoExec}, fmt.Sprintf("sandbox: %s: %v\n", name, err), nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return sandbox.Exit{}, "", fault.New(op, fault.Unavailable, "%w", err)
	}
	return sandbox.Exit{}, "", fault.New(op, fault.Invalid, "%w", err)
}

// ExitOf is how a process ended that was waited for.
func ExitOf(status unix.WaitStatus) sandbox.Exit {
	if !status.Signaled() {
		return sandbox.Exit{Code: status.ExitStatus()}
	}
	name := strings.TrimPrefix(unix.SignalName(status.Signal()), "SIG")
	if name == "" {
		name = fmt.Sprint(int(status.Signal()))
	}
	return sandbox.Exit{Code: 128 + int(status.Signal()), Signal: name}
}
