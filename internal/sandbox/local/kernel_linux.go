package local

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local/confine"
)

// A forbidding is how a kernel or a distribution keeps user namespaces from
// us, and what to do about it.
type forbidding struct{ why, hint string }

// namespacesForbidden reads it off the settings of the kernel; nil when they
// forbid nothing. sysctl returns the value of a setting, "" when the kernel
// does not have it; program is the file that makes the namespaces.
func namespacesForbidden(sysctl func(string) string, root bool, program string) *forbidding {
	switch {
	case sysctl("user/max_user_namespaces") == "0":
		return &forbidding{"user namespaces are switched off (user.max_user_namespaces is 0)",
			"Allow them with: sudo sysctl -w user.max_user_namespaces=15000"}
	case root:
		return nil
	case sysctl("kernel/unprivileged_userns_clone") == "0":
		return &forbidding{"user namespaces are kept for root (kernel.unprivileged_userns_clone is 0)",
			"Allow them with: sudo sysctl -w kernel.unprivileged_userns_clone=1"}
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
		return &forbidding{"AppArmor takes user namespaces from programs without a profile (kernel.apparmor_restrict_unprivileged_userns is 1)",
			fmt.Sprintf(`Give the program one: printf 'abi <abi/4.0>,\nprofile sandbox-supervisor "%s" flags=(unconfined) { userns, }\n' | sudo tee /etc/apparmor.d/sandbox-supervisor && sudo apparmor_parser -r /etc/apparmor.d/sandbox-supervisor; or allow them to all: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, program)}
	}
	return nil
}

func readSysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// namespaceHint says what keeps namespaces from this program.
func namespaceHint() string {
	program, err := os.Executable()
	if err != nil {
		program = "/path/of/sandbox-supervisor"
	}
	if f := namespacesForbidden(readSysctl, os.Geteuid() == 0, program); f != nil {
		return f.why + ". " + f.hint
	}
	return "Local sandboxes need Linux 5.12 or later with user namespaces, overlayfs and an unmasked /proc; in a container, run it privileged, or run the worker on the host."
}

// kernelFindings say what the kernel has of what confines a sandbox. Settings
// count only when no sandbox could be made: a program may have been given
// leave, as by a profile of AppArmor's.
func kernelFindings(o Options, made bool) []Finding {
	program := "/path/of/sandbox-supervisor"
	if len(o.Supervisor) > 0 {
		if p, err := exec.LookPath(o.Supervisor[0]); err == nil {
			if program, err = filepath.Abs(p); err != nil {
				program = p
			}
		}
	}
	user := Finding{Name: "user namespaces", OK: true, Text: "allowed"}
	if f := namespacesForbidden(readSysctl, os.Geteuid() == 0, program); f != nil && !made {
		user = Finding{Name: user.Name, Text: f.why, Hint: f.hint}
	}
	return []Finding{user, seccompFinding(), landlockFinding(confine.LandlockABI()), clockFinding()}
}

func seccompFinding() Finding {
	f := Finding{Name: "seccomp", OK: true, Text: "system calls are filtered by a list"}
	if err := confine.CallsAvailable(); err != nil {
		return Finding{Name: f.Name, Text: err.Error(), Hint: fault.HintOf(err)}
	}
	return f
}

func landlockFinding(abi int) Finding {
	const name = "landlock"
	switch {
	case abi == 0:
		return Finding{Name: name, Optional: true, Text: "the kernel has none, or has it switched off; sandboxes do without",
			Hint: "Add landlock to the list lsm= of the kernel's command line (its source: CONFIG_SECURITY_LANDLOCK), and start it again."}
	case abi < confine.LeastLandlock:
		return Finding{Name: name, Optional: true, Text: fmt.Sprintf("version %d cannot move files between folders; sandboxes do without", abi),
			Hint: "Use Linux 5.19 or later."}
	case abi < confine.ScopedLandlock:
		return Finding{Name: name, OK: true, Text: fmt.Sprintf("version %d: files; signals and abstract sockets from version %d on", abi, confine.ScopedLandlock)}
	}
	return Finding{Name: name, OK: true, Text: fmt.Sprintf("version %d: files, signals, abstract sockets", abi)}
}

func clockFinding() Finding {
	if clockNamespace() == 0 {
		return Finding{Name: "time namespace", Optional: true, Text: "the kernel has none; sandboxes do without", Hint: "Use Linux 5.6 or later, built with CONFIG_TIME_NS."}
	}
	return Finding{Name: "time namespace", OK: true, Text: "there"}
}

// refusal gives what the kernel refused to a namespace its kind and hint. It
// keeps a kind that was given before.
func refusal(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fault.New(what, fault.Unsupported, "%w", err).Hinted("%s", namespaceHint())
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		return fault.New(what, fault.Unsupported, "the kernel lacks it: %w", err).
			Hinted("Local sandboxes need Linux 5.12 or later with overlayfs; where it is a module: sudo modprobe overlay")
	}
	return fault.Wrap(what, err)
}
