package cli

import (
	"context"
	"os/exec"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// goInSandbox is where every sandbox has a Go toolchain of its host on PATH,
// when there is one.
const goInSandbox = "/usr/local/go"

// toolchain lends the demo's sandboxes the Go toolchain of this host, when it
// does not lie below /usr, which every local sandbox sees.
func toolchain(ctx context.Context) ([]fork.Mount, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	root := strings.TrimSpace(string(out))
	if err != nil || root == "" {
		return nil, fault.New("demo", fault.Unsupported, "the demo's repository is tested with Go, and there is no go on PATH").
			Hinted("Install Go from your distribution or from go.dev.")
	}
	if strings.HasPrefix(root, "/usr/") {
		return nil, nil
	}
	return []fork.Mount{{Source: root, Target: goInSandbox}}, nil
}
