package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// runscVariable names the runsc program.
const runscVariable = "SANDBOX_TEMPORAL_RUNSC"

// install says how to come by runsc.
const install = "Build it with: CGO_ENABLED=0 go install gvisor.dev/gvisor/runsc@" + TestedVersion +
	" (or take a release from gvisor.dev/docs/user_guide/install), and have it on the PATH or name it in " + runscVariable + "."

// findRunsc returns the absolute path of runsc.
func findRunsc(named string) (string, error) {
	const op = "find runsc"
	if named == "" {
		named = os.Getenv(runscVariable)
	}
	if named == "" {
		named = "runsc"
	}
	found, err := exec.LookPath(named)
	if err == nil {
		found, err = filepath.Abs(found)
	}
	if err != nil {
		return "", fault.New(op, fault.Unsupported, "gVisor is not installed: %w", err).Hinted("%s", install)
	}
	return found, nil
}

// versionOf asks runsc for its version. Of a build that does not know its own, as
// "go install" makes it, moduleVersion says which version of the module it was
// built from.
func versionOf(ctx context.Context, runsc string, moduleVersion func(program, module string) string) (string, error) {
	const op = "ask runsc for its version"
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, runsc, "--version")
	cmd.Env = []string{}
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fault.New(op, fault.Unsupported, "%s: %w", runsc, err).Hinted("%s", install)
	}
	rest, ok := strings.CutPrefix(string(out), "runsc version ")
	version, _, _ := strings.Cut(rest, "\n")
	version, _, _ = strings.Cut(version, " ")
	if !ok || version == "" || len(version) > 100 {
		return "", fault.New(op, fault.Unsupported, "%s says: %.100q", runsc, out).Hinted("%s", install)
	}
	if version == "VERSION_MISSING" && moduleVersion != nil {
		if found := moduleVersion(runsc, "gvisor.dev/gvisor"); found != "" {
			return found, nil
		}
	}
	return version, nil
}

// runscArgs are the arguments of every call. The folder of the sandbox is
// open as descriptor boxFD in the called process: the path of a socket must
// be short, and state folders are deep.
func runscArgs(debug string) []string {
	args := []string{
		"--root=" + boxAt("/"+stateDir),
		"--platform=systrap",
		"--network=none",                 // but a loopback of its own
		"--overlay2=none",                // the root is read-only
		"--file-access-mounts=exclusive", // nobody changes what is mounted while a sandbox looks
		"--host-settings=ignore",         // they are not ours to judge
		"--ignore-cgroups",               // they bound nothing here
		"--gofer-network-namespace=new",  // the default leaves one mounted on the host
		"--character-device-policy=emulated-only",
		"--host-uds=none", "--host-fifo=none",
	}
	if debug != "" {
		args = append(args, "--debug", "--debug-log="+debug)
	}
	return args
}

// boxFD is the descriptor of the folder of the sandbox in a runsc process.
const boxFD = 3

func boxAt(name string) string { return fmt.Sprintf("/proc/self/fd/%d%s", boxFD, name) }

// runscFault makes an error of what runsc said, which is the last line.
func runscFault(op string, err error, said string) error {
	said = strings.TrimSpace(said)
	if i := strings.LastIndexByte(said, '\n'); i >= 0 {
		said = said[i+1:]
	}
	if said != "" {
		err = errors.Join(errors.New(cut(said)), err)
	}
	return fault.New(op, fault.Internal, "runsc: %w", err)
}
