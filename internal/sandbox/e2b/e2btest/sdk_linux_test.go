package e2btest_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// serve starts a server that must have nothing left at the end.
func serve(t testing.TB, opts e2btest.Options) *e2btest.Server {
	t.Helper()
	if err := e2btest.Supported(); err != nil {
		t.Skipf("no sandbox can be made here: %v", err)
	}
	s := e2btest.New(opts)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// sdk returns the program that makes the calls of E2B's own SDK, and the
// folder it runs in.
func sdk(t *testing.T) (node, dir string) {
	t.Helper()
	dir, err := filepath.Abs("../../../../tests")
	if err != nil {
		t.Fatal(err)
	}
	node, err = exec.LookPath("node")
	if err != nil {
		t.Skip("no node: the SDK cannot run")
	}
	version, err := exec.CommandContext(t.Context(), node, "--version").Output()
	var major int
	if _, scanErr := fmt.Sscanf(string(version), "v%d.", &major); err != nil || scanErr != nil || major < 20 {
		t.Skipf("E2B's SDK needs node 20, this is %q (%v)", version, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "e2b", "package.json")); err != nil {
		t.Skipf("E2B's SDK is not installed, make test does that: %v", err)
	}
	return node, dir
}

// leastCalls is how many calls of the SDK are checked, at least.
const leastCalls = 25

func runSDK(t *testing.T, s *e2btest.Server, env ...string) {
	t.Helper()
	node, dir := sdk(t)
	// What the script expects of faults.
	planned := func(f e2btest.Fault, skip int) {
		f.Skip = skip
		s.Fault(f)
	}
	// Two creates come before them, and one that fails.
	planned(e2btest.RateLimited("POST /v2/sandboxes", time.Second), 3)
	planned(e2btest.Full("POST /v2/sandboxes", 20), 4)
	s.Fault(e2btest.Fault{On: "POST /sandboxes/*/fork", Fork: map[int]int{1: http.StatusServiceUnavailable}})

	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, node, "e2b-sdk.mjs")
	cmd.Dir = dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "E2B_API_KEY=" + s.Key}, env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	calls := 0
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, "ok ") {
			calls++
		}
	}
	if err != nil || !strings.HasSuffix(out.String(), "all ok\n") || calls < leastCalls {
		t.Errorf("the SDK is not satisfied: %v, %d calls:\n%s", err, calls, out.String())
	}
	t.Logf("%d checks of E2B's SDK", calls)
	if left := s.Sandboxes(); len(left) > 0 {
		t.Errorf("sandboxes are left: %+v", left)
	}
}

func TestUnmodifiedSDK(t *testing.T) {
	t.Parallel()
	s := serve(t, e2btest.Options{})
	runSDK(t, s, "E2B_API_URL="+s.APIURL(), "E2B_SANDBOX_URL="+s.SandboxURL())
}

// Under names of its own, over TLS and HTTP/2, as the real one.
func TestUnmodifiedSDKByDomain(t *testing.T) {
	t.Parallel()
	s := serve(t, e2btest.Options{})
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, s.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	runSDK(t, s, "E2B_DOMAIN="+s.Domain(), "NODE_EXTRA_CA_CERTS="+ca, "NODE_OPTIONS=--require ./e2b-names.cjs")
}
