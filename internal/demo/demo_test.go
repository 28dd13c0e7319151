package demo_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/demo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/mini"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// TestMain makes the test's own program the built-in agent, so that several
// can run at once, each in a folder of its own.
func TestMain(m *testing.M) {
	if os.Getenv("DEMO_TEST_IS_AGENT") == "1" {
		os.Exit(mini.Main(context.Background(), os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func command(t *testing.T, dir, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out, err := command(t, dir, "git", args...)
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(out)
}

func newRepo(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	if err := demo.WriteRepo(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// tests runs the repository's tests by the demo's own command.
func tests(t *testing.T, dir string) (string, error) {
	t.Helper()
	return command(t, dir, "sh", "-c", demo.Verify)
}

func TestTheRepositoryIsTheSameForEverybody(t *testing.T) {
	first := newRepo(t)

	// Somebody whose git is set up in every way that could matter.
	home := t.TempDir()
	hooks := filepath.Join(home, "hooks")
	if err := os.Mkdir(hooks, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"pre-commit", "commit-msg", "post-commit"} {
		if err := os.WriteFile(filepath.Join(hooks, h), []byte("#!/bin/sh\ntouch "+home+"/hook-ran\nexit 1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	config := "[core]\n\thooksPath = " + hooks + "\n\tautocrlf = true\n[commit]\n\tgpgSign = true\n[init]\n\tdefaultBranch = trunk\n[user]\n\tname = Somebody\n"
	if err := os.WriteFile(filepath.Join(home, ".gitconfig"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(t.TempDir(), "repo")
	func() {
		for k, v := range map[string]string{
			"HOME": home, "GIT_DIR": filepath.Join(home, "nowhere"), "GIT_AUTHOR_NAME": "Somebody", "GIT_DEFAULT_HASH": "sha256",
			"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.hooksPath", "GIT_CONFIG_VALUE_0": hooks, "XDG_CONFIG_HOME": home,
		} {
			defer setenv(t, k, v)()
		}
		if err := demo.WriteRepo(t.Context(), second); err != nil {
			t.Fatal(err)
		}
	}()
	if _, err := os.Stat(filepath.Join(home, "hook-ran")); err == nil {
		t.Error("a hook ran")
	}
	a, b := git(t, first, "log", "--format=%H %an %ae %aI %s", "main"), git(t, second, "log", "--format=%H %an %ae %aI %s", "main")
	if a != b || strings.Count(a, "\n") != 2 {
		t.Errorf("histories differ:\n%s\n%s", a, b)
	}
	if s := git(t, second, "status", "--porcelain"); s != "" {
		t.Errorf("the work tree is not clean: %s", s)
	}
	if head := git(t, second, "symbolic-ref", "HEAD"); head != "refs/heads/main" {
		t.Errorf("on %s", head)
	}
}

// setenv is t.Setenv that can be undone before the test's end.
func setenv(t *testing.T, k, v string) func() {
	t.Helper()
	old, was := os.LookupEnv(k)
	t.Setenv(k, v)
	return func() {
		if was {
			t.Setenv(k, old)
		} else if err := os.Unsetenv(k); err != nil {
			t.Error(err)
		}
	}
}

func TestAFolderThatHoldsSomethingIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := demo.WriteRepo(t.Context(), dir); fault.KindOf(err) != fault.Conflict {
		t.Errorf("%v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestOnlyTheNewTestsFail(t *testing.T) {
	dir := newRepo(t)
	out, err := tests(t, dir)
	if err == nil {
		t.Fatalf("the tests pass: there is nothing to fix\n%s", out)
	}
	for _, name := range []string{"TestASpanThatBridgesOthersJoinsThemAll", "TestASpanThatCoversOthersSwallowsThem"} {
		if !strings.Contains(out, "--- FAIL: "+name) {
			t.Errorf("%s does not fail:\n%s", name, out)
		}
	}
	if n := strings.Count(out, "--- FAIL"); n != 2 {
		t.Errorf("%d tests fail:\n%s", n, out)
	}
	if out, err := command(t, dir, "sh", "-c", demo.Compile); err != nil {
		t.Errorf("to compile them: %v\n%s", err, out)
	}
	git(t, dir, "checkout", "--quiet", "HEAD^")
	if out, err := tests(t, dir); err != nil {
		t.Errorf("the tests of the commit before fail already:\n%s", out)
	}
	if out, err := command(t, dir, "sh", "-c", demo.Setup); err != nil {
		t.Errorf("setup: %v\n%s", err, out)
	}
}

func serve(t *testing.T) (*standin.Server, string) {
	t.Helper()
	api := standin.New(standin.Options{Scripts: demo.Scripts()})
	h := httptest.NewServer(api)
	t.Cleanup(h.Close)
	t.Cleanup(api.Close)
	return api, h.URL
}

// play lets the agent work in dir and returns its last line.
func play(t *testing.T, cmd *exec.Cmd) (map[string]any, error) {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s%s", err, stderr.String(), out)
	}
	all := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	var res map[string]any
	if err := json.Unmarshal(all[len(all)-1], &res); err != nil {
		return nil, err
	}
	if res["type"] != "result" || res["is_error"] != false {
		return nil, fmt.Errorf("%v", res)
	}
	// A tool call that failed must be one that is meant to: the first tests.
	if n := bytes.Count(out, []byte(`"is_error":true`)); n != 1 {
		return nil, fmt.Errorf("%d tool calls failed:\n%s", n, out)
	}
	return res, nil
}

func miniAgent(t *testing.T, dir, url, session, prompt string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "--session-id", session)
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(prompt)
	cmd.Env = append(os.Environ(), "DEMO_TEST_IS_AGENT=1", "HOME="+t.TempDir(), "GOCACHE="+goCache(t), "ANTHROPIC_BASE_URL="+url, "ANTHROPIC_API_KEY=any")
	return cmd
}

// goCache is the cache of the person who tests: an agent's own would be empty,
// and the standard library compiled anew for each.
func goCache(t *testing.T) string {
	t.Helper()
	out, err := command(t, ".", "go", "env", "GOCACHE")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func uuid(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

func prompt(variant int) string { return fmt.Sprintf("%s#%d", demo.Prompt, variant) }

// checkFix holds a repository against what a variant promises.
func checkFix(t *testing.T, dir string, variant int) {
	t.Helper()
	if out, err := tests(t, dir); err != nil {
		t.Errorf("the tests fail:\n%s", out)
	}
	if out, err := command(t, dir, "git", "diff", "--exit-code", base(t, dir), "--", "text.go", "text_test.go", "span.go", "go.mod"); err != nil {
		t.Errorf("other files were changed:\n%s", out)
	}
	if added, rest, _ := strings.Cut(git(t, dir, "diff", "--numstat", base(t, dir), "--", "set_test.go"), "\t"); added != "" && !strings.HasPrefix(rest, "0\t") {
		t.Errorf("tests were taken away: %s", rest)
	}
	if out, err := command(t, dir, "gofmt", "-l", "."); err != nil || out != "" {
		t.Errorf("gofmt: %s %v", out, err)
	}
	commits, dirty := git(t, dir, "rev-list", "--count", "HEAD"), git(t, dir, "status", "--porcelain") != ""
	if want := variant == 2; dirty != want || (commits == "4") == want {
		t.Errorf("%s commits, dirty %v", commits, dirty)
	}
}

// base is the repository's last commit before the agent came.
func base(t *testing.T, dir string) string {
	t.Helper()
	return git(t, dir, "log", "--format=%H", "--author=Ada Demo", "-1")
}

func TestEveryVariantFixesTheBug(t *testing.T) {
	_, url := serve(t)
	for variant := 1; variant <= 3; variant++ {
		t.Run(fmt.Sprint(variant), func(t *testing.T) {
			t.Parallel()
			dir := newRepo(t)
			if _, err := play(t, miniAgent(t, dir, url, uuid(variant), prompt(variant))); err != nil {
				t.Fatal(err)
			}
			checkFix(t, dir, variant)
		})
	}
}

func TestThreeForksOfOneRunFixItInThreeWays(t *testing.T) {
	api, url := serve(t)
	var wg sync.WaitGroup
	for i := range 3 {
		dir := newRepo(t)
		cmd := miniAgent(t, dir, url, uuid(100+i), demo.Prompt)
		wg.Go(func() {
			if _, err := play(t, cmd); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	played := map[string]bool{}
	for _, r := range api.Requests() {
		played[r.Script] = true
	}
	if len(played) != 3 {
		t.Errorf("played were %v", played)
	}
}

// realClaude returns the Claude Code program, or skips the test.
func realClaude(t *testing.T) string {
	t.Helper()
	if p := os.Getenv("SANDBOX_TEMPORAL_CLAUDE"); p != "" {
		return p
	}
	if p, err := exec.LookPath("claude"); err == nil {
		return p
	}
	p, err := filepath.Abs("../../tests/node_modules/@anthropic-ai/claude-code-linux-x64/claude")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Skip("the real Claude Code is not installed: set SANDBOX_TEMPORAL_CLAUDE, or run npm install --prefix tests @anthropic-ai/claude-code")
	}
	return p
}

func TestClaudeCodePlaysEveryVariant(t *testing.T) {
	claude := realClaude(t)
	_, url := serve(t)
	for variant := 1; variant <= 3; variant++ {
		t.Run(fmt.Sprint(variant), func(t *testing.T) {
			t.Parallel()
			dir, home := newRepo(t), t.TempDir()
			cmd := exec.CommandContext(t.Context(), claude, "-p", "--session-id", uuid(variant), "--output-format", "stream-json", "--verbose",
				"--model", "sonnet", "--dangerously-skip-permissions")
			cmd.Dir, cmd.Stdin = dir, strings.NewReader(prompt(variant))
			cmd.Env = append(os.Environ(), "HOME="+home, "CLAUDE_CONFIG_DIR="+filepath.Join(home, "claude"), "CLAUDE_CODE_TMPDIR="+home, "GOCACHE="+goCache(t), "IS_SANDBOX=1",
				"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1", "DISABLE_AUTOUPDATER=1", "CLAUDE_CODE_MAX_OUTPUT_TOKENS=32000",
				"ANTHROPIC_BASE_URL="+url, "ANTHROPIC_API_KEY=any")
			if _, err := play(t, cmd); err != nil {
				t.Fatal(err)
			}
			checkFix(t, dir, variant)
		})
	}
}
