package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// The tests in the files named escape attack a sandbox from inside. The
// attacker is this test binary, mounted into the sandbox and started as the
// agent's program: what a shell cannot do it does with system calls.
//
// An attack is a list of probes. Each tries one thing and returns nil when it
// got it. The same probes run in a plain process of the host too, where they
// must get what they want: what cannot succeed there would prove nothing here.

// A probe is one thing that an agent must not be able to do.
type probe struct {
	what string // completes "the agent can …"
	try  func() error
	// unprovable says why nobody should see it succeed on the host either.
	unprovable string
}

// attacks are the lists of probes by name; what they need to know is in args.
var attacks = map[string]func(args []string) []probe{
	"process":    attackProcess,
	"namespaces": attackNamespaces,
	"mounts":     attackMounts,
	"keys":       attackKeys,
	"host":       attackHost,
	"devices":    attackDevices,
	"sockets":    attackSockets,
	"terminal":   attackTerminal,
	"stray":      attackStray,
	"privileges": attackPrivileges,
	"files":      attackFiles,
}

// deeds are what an attacker does for longer; they print what a test waits for.
var deeds = map[string]func(args []string) error{
	"who": func([]string) error {
		_, err := fmt.Println(os.Geteuid(), os.Getegid())
		return err
	},
	"wait":         func([]string) error { return wait() },
	"exhaust":      exhaust,
	"watch-others": watchOthers,
	"swap":         swap,
	"crowd":        crowd,
	"litter":       litter,
	"lead":         lead,
	"labour":       labour,
	"flood":        flood,
}

// attack is main of the attacker.
func attack(args []string) int {
	if deed := deeds[filepath.Base(args[0])]; deed != nil {
		if err := deed(args[1:]); err != nil {
			fmt.Println("failed:", err)
			return 1
		}
		return 0
	}
	for i, p := range attacks[args[0]](args[1:]) {
		err := p.try()
		switch {
		case err == nil:
			fmt.Println(i, "reached")
		case confused(err):
			fmt.Println(i, "confused", err)
		default:
			fmt.Println(i, "refused", err)
		}
	}
	fmt.Println("done")
	return 0
}

// confused reports whether a probe was refused because it makes no sense: it
// would be refused to anybody.
func confused(err error) bool {
	return errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBADF)
}

// wait lives until it is killed.
func wait() error {
	fmt.Println("waiting")
	for {
		if err := unix.Pause(); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// attacker is this program where every user can reach it.
var attacker = sync.OnceValues(func() (string, error) {
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	name := filepath.Join(os.TempDir(), "attacker") // of all tests; see runAndLookForLeaks
	return name, os.WriteFile(name, b, 0o755)
})

// attackPath is where a sandbox has the attacker.
const attackPath = sandbox.ProgramDir + "/attacker"

// withAttacker brings the attacker into the sandbox to be.
func withAttacker(t testing.TB, s sandbox.Spec) sandbox.Spec {
	t.Helper()
	name, err := attacker()
	if err != nil {
		t.Fatal(err)
	}
	s.Mounts = append(s.Mounts, sandbox.Mount{Source: name, Target: attackPath})
	return s
}

// attackLine is the command line of a deed or a list of probes in a sandbox.
func attackLine(name string, args ...string) sandbox.Cmd {
	return sandbox.Cmd{Args: append([]string{attackPath, attackWord, name}, args...)}
}

// An outcome is what came of one probe: its first word is one of attack's.
type outcome struct {
	probe
	text string
}

func (o outcome) reached() bool { return o.text == "reached" }

// outcomes reads what an attacker printed.
func outcomes(t testing.TB, name string, args []string, out []byte) (all []outcome) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	probes := attacks[name](args)
	if len(lines) != len(probes)+1 || lines[len(lines)-1] != "done" {
		t.Fatalf("%s did not try everything: %s", name, out)
	}
	for i, p := range probes {
		_, text, _ := strings.Cut(lines[i], " ")
		all = append(all, outcome{p, text})
	}
	return all
}

// inSandbox tries all probes in the sandbox, where every one must be refused.
func inSandbox(t testing.TB, sb sandbox.Sandbox, name string, args ...string) {
	t.Helper()
	stdout, stderr, exit, err := sandbox.Output(t.Context(), sb, "attack-"+newInstance(), attackLine(name, args...), 1<<20)
	if err != nil || exit.Code != 0 {
		t.Fatalf("%s: %+v, %v: %s%s", name, exit, err, stdout, stderr)
	}
	for _, o := range outcomes(t, name, args, stdout) {
		switch {
		case o.reached():
			t.Errorf("the agent can %s", o.what)
		case strings.HasPrefix(o.text, "confused"):
			t.Errorf("whether the agent can %s was not tried: %s", o.what, o.text)
		}
	}
}

// onHost tries all probes in a plain process, where every one must succeed
// that can be proved at all. As tells of the process; nil: it is like us.
func onHost(t testing.TB, as func(*exec.Cmd), name string, args ...string) {
	t.Helper()
	cmd := self(t, append([]string{attackWord, name}, args...)...)
	if as != nil {
		as(cmd)
	}
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s on the host: %v: %s", name, err, out.Bytes())
	}
	for _, o := range outcomes(t, name, args, out.Bytes()) {
		if !o.reached() && o.unprovable == "" {
			t.Errorf("that an agent could %s would not be noticed: on the host it is %s", o.what, o.text)
		}
	}
}

// execSelf is self for code that has no test.
func execSelf(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "/proc/self/exe", args...)
}

// asRootOfItsOwn makes the process root of new user and mount namespaces.
func asRootOfItsOwn(cmd *exec.Cmd) {
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
}

// open returns a probe that only opens the file.
func opens(what, path string, flags int) probe {
	return probe{what: what, try: func() error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	}}
}

// call returns a probe of one system call.
func call(what string, number uintptr, args ...uintptr) probe {
	var a [6]uintptr
	copy(a[:], args)
	return probe{what: what, try: func() error {
		if _, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}}
}
