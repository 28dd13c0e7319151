package cli

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/demo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Where every sandbox has a Go toolchain of its host on PATH, when there is
// one, and where Go looks for what it compiled before.
const (
	goInSandbox      = "/usr/local/go"
	goCacheInSandbox = sandbox.Home + "/.cache/go-build"
)

// toolchain lends the demo's sandboxes the Go toolchain of this host, when it
// does not lie below /usr, which every local sandbox sees, and this host's
// build cache, read-only. repo is compiled here first, so that no fork
// compiles Go's own packages: that takes half a minute of two cores. compiled
// is false when it could not be, and the cache is not lent then.
func toolchain(ctx context.Context, repo string) (mounts []fork.Mount, compiled bool, err error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT", "GOCACHE").Output()
	root, cache, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if err != nil || root == "" {
		return nil, false, fault.New("demo", fault.Unsupported, "the demo's repository is tested with Go, and there is no go on PATH").
			Hinted("Install Go from your distribution or from go.dev.")
	}
	if !strings.HasPrefix(root, "/usr/") {
		mounts = append(mounts, fork.Mount{Source: root, Target: goInSandbox})
	}
	if !filepath.IsAbs(cache) { // "off"
		return mounts, false, nil
	}
	cmd := exec.CommandContext(ctx, "sh", "-c", demo.Compile)
	cmd.Dir = repo
	// Go's settings of this user are not in the sandbox: what is compiled with
	// them would not be found there.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + os.TempDir(), "GOCACHE=" + cache, "GOENV=off", "GOPROXY=off"}
	if cmd.Run() != nil {
		return mounts, false, nil
	}
	return append(mounts, fork.Mount{Source: cache, Target: goCacheInSandbox}), true, nil
}
