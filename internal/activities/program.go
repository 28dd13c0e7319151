package activities

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A fork whose agent cannot be run would fail minutes later, and as often as
// there are forks. What can be seen of that on the worker's host is looked at
// before the base is prepared. When in doubt, nothing is said: the fork will.

// searched are the folders that a host-bound sandbox looks for programs in,
// beside those that are lent, and that it shares with its host.
var searched = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/go/bin"}

// shown are the folders of the host that such a sandbox sees.
var shown = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives"}

// checkPrograms looks at the agent's program and at those that the plan lends
// its sandboxes.
func (a *Activities) checkPrograms(ctx context.Context, plan fork.Plan, lent []sandbox.Mount) error {
	mounts := append(planMounts(plan.Mounts), lent...)
	for _, m := range mounts {
		st, err := os.Stat(m.Source)
		if err != nil {
			return fault.New("look at mounts", fault.Unsupported, "%w", err).
				Hinted("It is not on the worker's host; see --mount and --agent-path.")
		}
		if st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			if err := checkProgram(m.Source, m.Source, mounts); err != nil {
				return err
			}
		}
	}
	return checkLine(ctx, plan.AgentCommand, mounts)
}

// plainWord is the first word of a shell line that means a program and nothing
// else.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_.+/-]+$`)

// checkLine looks for the program that a shell line begins with.
func checkLine(ctx context.Context, line string, mounts []sandbox.Mount) error {
	words := strings.Fields(line)
	if len(words) == 0 || !plainWord.MatchString(words[0]) {
		return nil
	}
	name := words[0]
	missing := fault.New("find agent", fault.Unsupported, "there is no program %s in a sandbox, which --agent-command begins with", name).
		Hinted("A sandbox sees /usr of the worker's host; show it more with --mount. What the repository or --setup brings is ./name.")
	if !strings.Contains(name, "/") {
		found := lookLent(name, mounts)
		if found == "" {
			// The same shell, asked on the host: it knows its own words.
			var ok bool
			if found, ok = lookShell(ctx, name); !ok {
				return nil
			}
			if found == "" {
				return missing
			}
		}
		name = found
	}
	host, known := onHost(name, mounts)
	if !known {
		return nil
	}
	if st, err := os.Stat(host); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return missing
	}
	return checkProgram(host, words[0], mounts)
}

// lookLent finds a program in what is lent, where a sandbox looks first.
func lookLent(name string, mounts []sandbox.Mount) string {
	for _, dir := range append([]string{sandbox.ProgramDir}, searched...) {
		at := path.Join(dir, name)
		for _, m := range mounts {
			if rest, ok := below(at, m.Target); ok {
				if _, err := os.Stat(filepath.Join(m.Source, rest)); err == nil {
					return at
				}
			}
		}
	}
	return ""
}

// lookShell asks the host's shell what name is to it: a path, a word of its
// own, or nothing, which is "". It is not ok when there is no answer.
func lookShell(ctx context.Context, name string) (found string, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", `command -v -- "$1"`, "sh", name)
	cmd.Env, cmd.Dir = []string{"PATH=" + strings.Join(searched, ":")}, "/"
	out, err := cmd.Output()
	var exit *exec.ExitError
	switch {
	case err == nil && !strings.HasPrefix(string(out), "/"):
		return "", false // the shell does it itself
	case err == nil:
		return strings.TrimSpace(string(out)), true
	case errors.As(err, &exit) && ctx.Err() == nil:
		return "", true
	}
	return "", false
}

// onHost returns what stands on the host for a path of a sandbox, "" when it
// is nothing. That can be known of what a sandbox sees of the host, not of the
// workspace and the home. Links are followed as the sandbox would.
func onHost(name string, mounts []sandbox.Mount) (host string, known bool) {
	for range 40 { // as many links as the kernel follows
		name = path.Clean(name)
		host, known = "", false
		longest := -1
		for _, m := range mounts {
			if rest, ok := below(name, m.Target); ok && len(m.Target) > longest {
				host, known, longest = filepath.Join(m.Source, rest), true, len(m.Target)
			}
		}
		for _, dir := range shown {
			if _, ok := below(name, dir); ok && longest < 0 {
				host, known = name, true
			}
		}
		if !known {
			return "", path.IsAbs(name) && !mayCome(name) // nothing is there
		}
		if host == mountOf(name, mounts) {
			return host, true // a mount is what its source leads to
		}
		target, err := os.Readlink(host)
		if err != nil {
			return host, true
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(name), target)
		}
		name = target
	}
	return host, false
}

// mountOf returns the source of the mount at exactly name, or "".
func mountOf(name string, mounts []sandbox.Mount) string {
	for _, m := range mounts {
		if m.Target == name {
			return m.Source
		}
	}
	return ""
}

// mayCome reports whether the sandbox may have something at the path that its
// host has not, or that this host cannot tell of.
func mayCome(name string) bool {
	for _, dir := range []string{sandbox.Workspace, sandbox.Home, "/tmp", "/var", "/etc", "/dev", "/proc", "/run"} {
		if _, ok := below(name, dir); ok {
			return true
		}
	}
	return false
}

// below returns the part of name that is below dir.
func below(name, dir string) (rest string, ok bool) {
	if name == dir {
		return "", true
	}
	rest, ok = strings.CutPrefix(name, strings.TrimSuffix(dir, "/")+"/")
	return rest, ok
}

// machines are those whose programs a machine of ours runs.
var machines = map[string][]elf.Machine{
	"amd64": {elf.EM_X86_64, elf.EM_386}, "arm64": {elf.EM_AARCH64, elf.EM_ARM}, "riscv64": {elf.EM_RISCV}, "ppc64le": {elf.EM_PPC64},
	"s390x": {elf.EM_S390}, "386": {elf.EM_386}, "arm": {elf.EM_ARM}, "loong64": {elf.EM_LOONGARCH},
}

// checkProgram reads the beginning of a program: whether it is one of this
// machine, and whether its interpreter is to be had in a sandbox.
func checkProgram(file, name string, mounts []sandbox.Mount) error {
	f, err := os.Open(file)
	if err != nil {
		return nil //nolint:nilerr // what may be run need not be readable
	}
	defer f.Close()
	head, err := bufio.NewReader(io.LimitReader(f, 512)).Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil //nolint:nilerr // the fork will say what is wrong with it
	}
	wrong := func(what string) error {
		return fault.New("look at agent", fault.Unsupported, "%s is a program for %s, and this worker's host is %s", name, what, runtime.GOARCH).
			Hinted("Install the one for Linux on %s, on the worker's host.", runtime.GOARCH)
	}
	switch {
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)) && len(head) >= 20:
		var order binary.ByteOrder = binary.LittleEndian
		if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
			order = binary.BigEndian
		}
		machine := elf.Machine(order.Uint16(head[18:]))
		if ours := machines[runtime.GOARCH]; len(ours) > 0 && !slices.Contains(ours, machine) {
			return wrong(strings.ToLower(strings.TrimPrefix(machine.String(), "EM_")))
		}
	case bytes.HasPrefix(head, []byte("MZ")):
		return wrong("Windows")
	case bytes.HasPrefix(head, []byte{0xcf, 0xfa, 0xed, 0xfe}), bytes.HasPrefix(head, []byte{0xca, 0xfe, 0xba, 0xbe, 0, 0, 0}):
		return wrong("macOS")
	case bytes.HasPrefix(head, []byte("#!")):
		line, _, _ := bytes.Cut(head[2:], []byte("\n"))
		return checkInterpreter(name, strings.Fields(string(line)), mounts)
	}
	return nil
}

// checkInterpreter looks for what a script is run by.
func checkInterpreter(name string, words []string, mounts []sandbox.Mount) error {
	if len(words) == 0 || !path.IsAbs(words[0]) {
		return nil
	}
	need := words[0]
	if path.Base(need) == "env" && len(words) == 2 && plainWord.MatchString(words[1]) && !strings.Contains(words[1], "/") {
		need = words[1]
		for _, dir := range searched {
			if _, err := os.Stat(filepath.Join(dir, need)); err == nil {
				return nil
			}
		}
		if lookLent(need, mounts) != "" {
			return nil
		}
	} else if host, known := onHost(need, mounts); !known {
		return nil
	} else if _, err := os.Stat(host); err == nil {
		return nil
	}
	return fault.New("look at agent", fault.Unsupported, "%s is a script for %s, which is not in a sandbox", name, need).
		Hinted("A sandbox sees /usr of the worker's host; install %s there, or show it with --mount.", path.Base(need))
}
