package cli

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

const remote = "https://example.com/user/repo"

// gitIn runs git as somebody without a configuration of their own.
func gitIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com",
		"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// newRepo is a repository with one commit on the branch.
func newRepo(t *testing.T, branch string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	gitIn(t, dir, "init", "--quiet", "--initial-branch", branch)
	write(t, filepath.Join(dir, "README"), "hello\n")
	gitIn(t, dir, "add", ".")
	gitIn(t, dir, "commit", "--quiet", "--message", "begin")
	return dir
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// planOf returns the plan that a command line of "fork" starts.
func planOf(t *testing.T, s *session, args ...string) fork.Plan {
	t.Helper()
	s.want(t, exitOK, append([]string{"fork", "--no-wait"}, args...)...)
	return s.runs.plans[s.runs.order[len(s.runs.order)-1]]
}

func TestForkTakesEveryFlag(t *testing.T) {
	s := newSession(t, newMemory())
	program := filepath.Join(t.TempDir(), "claude")
	write(t, program, "#!/bin/sh\n")
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	data := t.TempDir()
	got := planOf(t, s, remote, "-b", "dev", "-p", "do it", "-f", "7", "-m", "opus", "--max-concurrent", "3", "-t", "60", "--budget", "2.5",
		"--provider", "local", "--agent", "claude", "--agent-path", program, "--setup", "make deps", "--egress", "none", "--name", "my run", "--mount", data+":/data",
		"--memory", "4GiB", "--cpus", "1.5", "--processes", "500", "--disk", "20GB")
	want := fork.Plan{
		Repo: remote, Branch: "dev", Prompt: "do it", Name: "my run", Forks: 7, Model: "opus", MaxConcurrent: 3, Timeout: time.Minute,
		Budget: 5 * fork.Dollar / 2, Provider: "local", Agent: "claude", AgentPath: program, Setup: "make deps", Egress: "none",
		Mounts: []fork.Mount{{Source: data, Target: "/data"}},
		Limits: fork.Limits{MemoryBytes: 4 << 30, CPUMillis: 1500, Processes: 500, DiskBytes: 20_000_000_000},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	got = planOf(t, s, remote, "--agent", "command", "--agent-command", "my-agent {prompt}", "--prompt", "x")
	if got.Agent != "command" || got.AgentCommand != "my-agent {prompt}" {
		t.Errorf("%+v", got)
	}
}

func TestForkDefaults(t *testing.T) {
	got := planOf(t, newSession(t, newMemory()), remote, "--prompt", "do it")
	want := fork.Plan{Repo: remote, Prompt: "do it", Forks: 1, Model: "sonnet", MaxConcurrent: 5, Timeout: 2 * time.Hour, Provider: "local", Agent: "claude", Egress: "registries"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestForkDefaultsComeFromTheConfiguration(t *testing.T) {
	s := newSession(t, newMemory())
	file := filepath.Join(t.TempDir(), "config.toml")
	write(t, file, "[fork]\nforks = 4\nbudget = 1.25\nmodel = \"opus\"\n")
	got := planOf(t, s, remote, "--prompt", "x", "--config", file, "--model", "haiku")
	if got.Forks != 4 || got.Budget != 1_250_000_000 || got.Model != "haiku" {
		t.Errorf("%+v", got)
	}
	if got = planOf(t, s, remote, "--prompt", "x", "--config", file, "--budget", "none"); got.Budget != 0 {
		t.Errorf("budget %s", got.Budget)
	}
	write(t, file, "[fork]\nbugdet = 1\n")
	s.want(t, exitUsage, "fork", remote, "--prompt", "x", "--config", file)
}

func TestForkRefusesNonsenseBeforeAnythingStarts(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "long"), strings.Repeat("x", fork.MaxPrompt+1))
	write(t, filepath.Join(dir, "empty"), " \n")
	write(t, filepath.Join(dir, "file"), "x")
	ok := []string{remote, "--prompt", "x"}
	with := func(args ...string) []string { return append(ok[:len(ok):len(ok)], args...) }
	for name, args := range map[string][]string{
		"no repository":             {"--prompt", "x"},
		"no prompt":                 {remote},
		"empty prompt":              {remote, "--prompt", ""},
		"blank prompt":              {remote, "--prompt", "@" + filepath.Join(dir, "empty")},
		"prompt file missing":       {remote, "--prompt", "@" + filepath.Join(dir, "none")},
		"prompt file is a folder":   {remote, "--prompt", "@" + dir},
		"prompt file without name":  {remote, "--prompt", "@"},
		"prompt too long":           {remote, "--prompt", "@" + filepath.Join(dir, "long")},
		"prompt from empty stdin":   {remote, "--prompt", "-"},
		"no forks":                  with("--forks", "0"),
		"negative forks":            with("--forks", "-1"),
		"too many forks":            with("--forks", "1001"),
		"forks no number":           with("--forks", "many"),
		"forks a fraction":          with("--forks", "1.5"),
		"no slots":                  with("--max-concurrent", "0"),
		"no time":                   with("--timeout", "0"),
		"negative time":             with("--timeout", "-5"),
		"too much time":             with("--timeout", "604801"),
		"time beyond all":           with("--timeout", "99999999999999999999"),
		"no money":                  with("--budget", "0"),
		"negative money":            with("--budget", "-1"),
		"NaN money":                 with("--budget", "NaN"),
		"endless money":             with("--budget", "Inf"),
		"empty money":               with("--budget", ""),
		"garbage money":             with("--budget", "ten"),
		"money with exponent":       with("--budget", "1e3"),
		"memory without a unit":     with("--memory", "4"),
		"too little memory":         with("--memory", "1MiB"),
		"no cores":                  with("--cpus", "0"),
		"negative cores":            with("--cpus", "-1"),
		"more cores than there are": with("--cpus", "5000"),
		"few processes":             with("--processes", "3"),
		"endless disk":              with("--disk", "9999999TiB"),
		"model without price":       with("--model", "gpt-0"),
		"no model":                  with("--model", ""),
		"unknown agent":             with("--agent", "nobody"),
		"unknown way to the model":  with("--credentials", "key"),
		"key for another agent":     with("--credentials", "direct", "--agent", "mini"),
		"key with a pause":          with("--credentials", "direct", "--on-budget", "pause"),
		"unknown provider":          with("--provider", "nowhere"),
		"command without command":   with("--agent", "command"),
		"command for another agent": with("--agent-command", "x"),
		"branch with a space":       with("--branch", "a b"),
		"branch with dots":          with("--branch", "a..b"),
		"branch like a flag":        with("--branch", "-x"),
		"empty branch":              with("--branch", ""),
		"name with a line break":    with("--name", "a\nb"),
		"name with an escape":       with("--name", "a\x1b[31m"),
		"name too long":             with("--name", strings.Repeat("x", 101)),
		"mount of nothing":          with("--mount", filepath.Join(dir, "none")),
		"mount without source":      with("--mount", ":/data"),
		"mount to relative path":    with("--mount", dir+":data"),
		"mount over the root":       with("--mount", dir+":/"),
		"mount over the work tree":  with("--mount", dir+":"+sandbox.Workspace),
		"mount into the work tree":  with("--mount", dir+":"+sandbox.Workspace+"/x"),
		"mount above the home":      with("--mount", dir+":/home"),
		"two mounts, one place":     with("--mount", dir+":/data", "--mount", filepath.Join(dir, "file")+":/data"),
		"agent path missing":        with("--agent-path", filepath.Join(dir, "none")),
		"agent path no program":     with("--agent-path", filepath.Join(dir, "file")),
		"agent path a folder":       with("--agent-path", dir),
		"wait and no wait":          with("--wait", "--no-wait"),
		"repository like a flag":    {"--prompt", "x", "--", "--upload-pack=x"},
		"transport of a helper":     {"ext::sh -c x", "--prompt", "x"},
		"scheme of nobody":          {"gopher://example.com/r", "--prompt", "x"},
		"password in the URL":       {"https://user:secret@example.com/r", "--prompt", "x"},
		"token in the URL":          {"https://ghp_secret@example.com/r", "--prompt", "x"},
		"URL with a query":          {"https://example.com/r?a=b", "--prompt", "x"},
		"URL without host":          {"https:///r", "--prompt", "x"},
		"URL with a line break":     {"https://example.com/r\nx", "--prompt", "x"},
		"empty repository":          {"", "--prompt", "x"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSession(t, newMemory())
			s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.Set{"local": nil}, nil }
			s.env.Runs = func(context.Context, Globals) (Runs, error) {
				t.Error("connected to Temporal")
				return s.runs, nil
			}
			s.want(t, exitUsage, append([]string{"fork"}, args...)...)
			text := s.errors.String()
			if s.out.Len() > 0 || !strings.HasPrefix(text, "sandbox-temporal: ") || strings.Count(text, "\n") < 2 || strings.Contains(text, "secret") {
				t.Errorf("stdout %q, stderr %s", &s.out, text)
			}
		})
	}
}

func TestForkTakesAnyPrompt(t *testing.T) {
	s := newSession(t, newMemory())
	for _, args := range [][]string{{"--prompt", "-x"}, {"--prompt=-x"}, {"-p", "-x"}, {"-p=-x"}, {"-p-x"}} {
		if got := planOf(t, s, append([]string{remote}, args...)...); got.Prompt != "-x" {
			t.Errorf("%q: prompt %q", args, got.Prompt)
		}
	}
	long := filepath.Join(t.TempDir(), "task.md")
	text := strings.Repeat("word ", fork.MaxPrompt/5)
	write(t, long, text)
	if got := planOf(t, s, remote, "--prompt", "@"+long); got.Prompt != text {
		t.Errorf("a prompt of %d bytes came as %d", len(text), len(got.Prompt))
	}
	s.env.Stdin = strings.NewReader("from stdin\nin two lines\n")
	if got := planOf(t, s, remote, "--prompt", "-"); got.Prompt != "from stdin\nin two lines\n" {
		t.Errorf("prompt %q", got.Prompt)
	}
	if got := planOf(t, s, remote, "--prompt", "--forks"); got.Prompt != "--forks" {
		t.Errorf("prompt %q", got.Prompt)
	}
}

func TestForkMakesALocalRepositoryAbsolute(t *testing.T) {
	s := newSession(t, newMemory())
	repo := newRepo(t, "main")
	sub := filepath.Join(repo, "deep", "down")
	write(t, filepath.Join(sub, "file"), "x")
	gitIn(t, repo, "add", ".")
	gitIn(t, repo, "commit", "--quiet", "--message", "more")
	t.Chdir(sub)
	for _, word := range []string{".", "..", repo, "file://" + repo} {
		if got := planOf(t, s, word, "--prompt", "x"); got.Repo != repo {
			t.Errorf("%s: repository %s, want %s", word, got.Repo, repo)
		}
		if strings.Contains(s.errors.String(), "warning") {
			t.Errorf("%s: a clean work tree was warned of: %s", word, &s.errors)
		}
	}
	bare := filepath.Join(t.TempDir(), "bare.git")
	gitIn(t, repo, "clone", "--quiet", "--bare", repo, bare)
	if got := planOf(t, s, bare, "--prompt", "x"); got.Repo != bare {
		t.Errorf("repository %s, want %s", got.Repo, bare)
	}
	if got := planOf(t, s, repo, "--prompt", "x", "--branch", "main"); got.Branch != "main" {
		t.Errorf("branch %q", got.Branch)
	}
	gitIn(t, repo, "tag", "v1")
	if got := planOf(t, s, repo, "--prompt", "x", "--branch", "v1"); got.Branch != "v1" {
		t.Errorf("branch %q", got.Branch)
	}
}

// A git hook runs its programs with GIT_DIR set: a fork of another repository
// started from one must not be of the hook's.
func TestForkIgnoresTheRepositoryOfAHook(t *testing.T) {
	s := newSession(t, newMemory())
	repo, other := newRepo(t, "mine"), newRepo(t, "other")
	t.Setenv("GIT_DIR", filepath.Join(other, ".git"))
	t.Setenv("GIT_WORK_TREE", other)
	if got := planOf(t, s, repo, "--prompt", "x", "--branch", "mine"); got.Repo != repo {
		t.Errorf("repository %s, want %s", got.Repo, repo)
	}
}

func TestForkSaysWhyALocalRepositoryWillNotDo(t *testing.T) {
	repo := newRepo(t, "trunk")
	empty := t.TempDir()
	gitIn(t, empty, "init", "--quiet")
	shallow := filepath.Join(t.TempDir(), "shallow")
	write(t, filepath.Join(repo, "more"), "x")
	gitIn(t, repo, "add", ".")
	gitIn(t, repo, "commit", "--quiet", "--message", "more")
	gitIn(t, repo, "clone", "--quiet", "--depth", "1", "file://"+repo, shallow)
	plain := t.TempDir()
	t.Setenv("GIT_CEILING_DIRECTORIES", filepath.Dir(plain))
	for _, c := range []struct {
		code int
		args []string
		says string
	}{
		{exitNotFound, []string{filepath.Join(plain, "none")}, "there is no repository at"},
		{exitNotFound, []string{"user/repo"}, "https://github.com/user/repo"},
		{exitNotFound, []string{plain}, "not a git repository"},
		{exitUsage, []string{empty}, "no commit yet"},
		{exitNotFound, []string{repo, "--branch", "main"}, `has no branch "main"`},
		{exitFailed, []string{shallow}, "cut short"},
	} {
		s := newSession(t, newMemory())
		s.want(t, c.code, append([]string{"fork", "--prompt", "x"}, c.args...)...)
		if !strings.Contains(s.errors.String(), c.says) || strings.Count(s.errors.String(), "\n") != 2 {
			t.Errorf("%q: %s", c.args, &s.errors)
		}
	}
	if got := planOf(t, newSession(t, newMemory()), repo, "--prompt", "x"); got.Branch != "" {
		t.Errorf("branch %q of a repository without main was chosen by the command", got.Branch)
	}
}

func TestForkWarnsOfWhatIsNotCommitted(t *testing.T) {
	s := newSession(t, newMemory())
	repo := newRepo(t, "main")
	write(t, filepath.Join(repo, "README"), "changed\n")
	write(t, filepath.Join(repo, "new"), "new\n")
	planOf(t, s, repo, "--prompt", "x")
	if !strings.Contains(s.errors.String(), "warning: 2 uncommitted changes in "+repo+": no part of this run") {
		t.Errorf("stderr %s", &s.errors)
	}
}

func TestForkWithoutWaitPrintsTheID(t *testing.T) {
	s := newSession(t, newMemory())
	s.want(t, exitOK, "fork", remote, "--prompt", "x", "--no-wait")
	id := s.runs.order[0]
	if !strings.HasPrefix(id, fork.RunPrefix) || len(id) != len(fork.RunPrefix)+8 {
		t.Errorf("id %q", id)
	}
	if s.out.String() != id+"\n" || !strings.HasPrefix(s.errors.String(), id+": 1 fork of "+remote) {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	s.want(t, exitOK, "fork", remote, "--prompt", "x", "--wait=false", "-o", "json")
	var got map[string]string
	if err := json.Unmarshal(s.out.Bytes(), &got); err != nil || got["workflow_id"] != s.runs.order[1] {
		t.Errorf("%s: %v", &s.out, err)
	}
	if s.runs.closed != 2 {
		t.Errorf("%d connections were closed, want 2", s.runs.closed)
	}
}

func TestForkTakesAnotherIDWhenOneIsTaken(t *testing.T) {
	s := newSession(t, newMemory())
	s.runs.taken = 2
	planOf(t, s, remote, "--prompt", "x")
	s.runs.taken = 100
	s.want(t, exitFailed, "fork", remote, "--prompt", "x", "--no-wait")
}

func TestForkLetsMainPrepareTheStart(t *testing.T) {
	s := newSession(t, newMemory())
	s.env.BeforeStart = func(_ context.Context, g Globals, run string, plan *fork.Plan) error {
		if g.Config == nil || !strings.HasPrefix(run, fork.RunPrefix) {
			t.Errorf("called with %+v, %q", g, run)
		}
		plan.Repo = "carried"
		return nil
	}
	if got := planOf(t, s, remote, "--prompt", "x"); got.Repo != "carried" {
		t.Errorf("repository %q", got.Repo)
	}
	s.env.BeforeStart = func(context.Context, Globals, string, *fork.Plan) error {
		return fault.New("", fault.Denied, "there is no API key").Hinted("Set ANTHROPIC_API_KEY.")
	}
	started := len(s.runs.order)
	s.want(t, exitDenied, "fork", remote, "--prompt", "x")
	if got := s.errors.String(); got != "sandbox-temporal: there is no API key\nSet ANTHROPIC_API_KEY.\n" || len(s.runs.order) != started {
		t.Errorf("stderr %q, %d runs", got, len(s.runs.order))
	}
}

func TestForkOnAClusterTrustsPathsOfTheWorker(t *testing.T) {
	s := newSession(t, newMemory())
	s.vars["TEMPORAL_ADDRESS"] = "temporal.example.com:7233"
	s.vars["SANDBOX_TEMPORAL_CLAUDE"] = "/my/own/claude"
	got := planOf(t, s, remote, "--prompt", "x", "--mount", "/worker/data:/data")
	if got.AgentPath != "" || len(got.Mounts) != 1 {
		t.Errorf("%+v", got)
	}
	if got = planOf(t, s, remote, "--prompt", "x", "--agent-path", "/worker/claude"); got.AgentPath != "/worker/claude" {
		t.Errorf("%+v", got)
	}
	s.want(t, exitUsage, "fork", remote, "--prompt", "x", "--agent-path", "claude")
}

// shed is a provider with a name, and one that nobody asks for a sandbox.
type shed struct{ sandbox.Provider }

func (shed) Name() string { return "shed" }
func (shed) HostBound()   {}

func TestForkWithProviderOfTheSet(t *testing.T) {
	s := newSession(t, newMemory())
	p := shed{}
	s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.NewSet(p), nil }
	if got := planOf(t, s, remote, "--prompt", "x", "--provider", p.Name()); got.Provider != p.Name() {
		t.Errorf("%+v", got)
	}
	s.want(t, exitUsage, "fork", remote, "--prompt", "x", "--provider", "nope")
	if got, want := s.errors.String(), "sandbox-temporal: choose provider: no provider \"nope\"\nUse one of: "+p.Name()+".\n"; got != want {
		t.Errorf("stderr %q, want %q", got, want)
	}
	s.want(t, exitOK, "providers")
	if !strings.Contains(s.out.String(), p.Name()) {
		t.Errorf("stdout %q", &s.out)
	}
	s.want(t, exitOK, "providers", "-o", "json")
	var list []providerInfo
	if err := json.Unmarshal(s.out.Bytes(), &list); err != nil || len(list) != 1 {
		t.Fatalf("%s: %v", &s.out, err)
	}
	got := list[0]
	if can := got.Capabilities; got.Name != "shed" || !got.HostBound || got.Pauses || len(can) != len(sandbox.Capabilities()) || !can["host_bound"] || can["pause"] {
		t.Errorf("%s", &s.out)
	}
}

// far is a provider whose sandboxes are on other hosts.
type far struct{ sandbox.Provider }

func (far) Name() string { return "far" }

func TestForkSaysHowSandboxesElsewhereReachTheModelBeforeAnythingStarts(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		env  map[string]string
		code int
		want string
	}{
		"no way":              {[]string{"--provider", "far"}, nil, exitUsage, "--credentials direct"},
		"the key":             {[]string{"--provider", "far", "--credentials", "direct"}, nil, exitOK, "the model's key is in the sandboxes"},
		"a public address":    {[]string{"--provider", "far"}, map[string]string{"SANDBOX_TEMPORAL_GATEWAY_URL": "https://gateway.example.com"}, exitOK, ""},
		"the worker knows":    {[]string{"--provider", "far"}, map[string]string{"TEMPORAL_ADDRESS": "temporal:7233"}, exitOK, ""},
		"no key where it can": {[]string{"--provider", "shed", "--credentials", "direct"}, nil, exitUsage, "the key need not be in them"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSession(t, newMemory())
			s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.NewSet(far{}, shed{}), nil }
			getenv := s.env.Getenv
			s.env.Getenv = func(name string) string {
				if v, ok := c.env[name]; ok {
					return v
				}
				return getenv(name)
			}
			if c.code == exitUsage {
				s.env.Runs = func(context.Context, Globals) (Runs, error) {
					t.Error("connected to Temporal")
					return s.runs, nil
				}
			}
			s.want(t, c.code, append([]string{"fork", remote, "--prompt", "x", "--no-wait"}, c.args...)...)
			if text := s.errors.String(); !strings.Contains(text, c.want) || strings.Contains(text, "--credentials direct)") != (name == "the key") {
				t.Errorf("stderr %s", text)
			}
		})
	}
}

func TestValidBranchAgreesWithGit(t *testing.T) {
	for _, name := range []string{
		"main", "feature/x", "a.b", "a-b", "ü", "a@b", "@", "HEAD", "-x", "", "a b", "a..b", "a.lock", "a/b.lock/c", ".a", "a/.b", "a/", "/a", "a//b", "a~",
		"a^", "a:b", "a?", "a*", "a[", `a\b`, "a.", "a@{b", "a\tb", "a\x7f", "x.locks", "{", "a'b",
	} {
		err := exec.CommandContext(t.Context(), "git", "check-ref-format", "--branch", name).Run()
		// For git, "@" is a short word for HEAD: no name that people mean.
		if got, want := validBranch(name), err == nil && name != "HEAD" && name != "@" && name != ""; got != want {
			t.Errorf("%q: %v, git says %v", name, got, want)
		}
	}
}
