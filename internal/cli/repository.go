package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

// gitPatience is how long git may take to look at a local repository.
const gitPatience = 20 * time.Second

// checkRepo returns the repository as a plan names it: a URL as it is, a path
// as the absolute one of the repository it lies in. A branch that was asked
// for must be there; of a URL, only the worker can tell.
func checkRepo(ctx context.Context, source, branch string) (string, error) {
	if source == "" || strings.HasPrefix(source, "-") || flat(source) != source {
		return "", usage(repoForms, "%q is no repository", source)
	}
	if !repo.IsLocal(source) {
		return source, checkURL(source)
	}
	path, isURL := strings.CutPrefix(source, "file://")
	if isURL && !strings.HasPrefix(path, "/") {
		return "", usage("Write it as file:///path, or as a path.", "%q names no path on this host", source)
	}
	return checkPath(ctx, path, branch)
}

const repoForms = "Name a git URL, as https://github.com/user/repo, or a path."

// checkURL checks what of a URL can be checked here; the worker, which has
// the credentials, does the rest. A password is refused here already, because
// the plan that would hold it is in Temporal's history for all to read.
func checkURL(source string) error {
	if !strings.Contains(source, "://") {
		host, path, _ := strings.Cut(source, ":")
		if strings.HasPrefix(path, ":") || strings.Contains(host, "@-") || path == "" || strings.HasPrefix(path, "-") {
			return usage("Use https://, ssh:// or user@host:path.", "%q is no repository that can be had safely", source)
		}
		return nil
	}
	u, err := url.Parse(source)
	if err != nil { // the parser's error repeats the URL, and with it what may be secret
		return usage("Write it as https://github.com/user/repo.", "the repository's URL cannot be read")
	}
	_, secret := u.User.Password()
	switch scheme := strings.ToLower(u.Scheme); {
	case !slices.Contains([]string{"https", "http", "ssh", "git"}, scheme):
		return usage("Use https, http, ssh or git.", "a repository cannot be had over %q", u.Scheme)
	case secret || u.User != nil && scheme != "ssh":
		return usage("Take it out of the URL and set GITHUB_TOKEN, or teach your git credential helper.",
			"the URL of %s holds credentials, which everybody could read in the run's history", u.Host)
	case u.Hostname() == "" || strings.HasPrefix(u.Host, "-"):
		return usage("Write it as https://github.com/user/repo.", "%q names no host", source)
	case u.RawQuery != "" || u.Fragment != "":
		return usage("Leave out everything from the ? or # on.", "the URL of %s has a query", u.Host)
	}
	return nil
}

// checkPath returns the root of the local repository that path lies in.
func checkPath(ctx context.Context, path, branch string) (string, error) {
	abs, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(abs)
	}
	if err != nil {
		hint := "Name a git URL, as https://github.com/user/repo, or the path of a repository."
		if regexp.MustCompile(`^[\w.-]+/[\w.-]+$`).MatchString(path) && !strings.HasPrefix(path, ".") {
			hint = "For the one on GitHub write https://github.com/" + path + "."
		}
		return "", fault.New("", fault.NotFound, "there is no repository at %s", path).Hinted("%s", hint)
	}
	ctx, cancel := context.WithTimeout(ctx, gitPatience)
	defer cancel()
	root, err := git(ctx, abs, "rev-parse", "--show-toplevel")
	if err != nil { // a bare repository has no work tree
		root, err = git(ctx, abs, "rev-parse", "--absolute-git-dir")
	}
	if err != nil {
		return "", fault.Wrap("look at repository", notRepository(path, err))
	}
	if shallow, err := git(ctx, root, "rev-parse", "--is-shallow-repository"); err == nil && shallow == "true" {
		return "", fault.New("", fault.Unsupported, "the history of %s is cut short", root).Hinted("Fetch all of it first: git -C %s fetch --unshallow", root)
	}
	if branch != "" {
		for _, ref := range []string{"refs/heads/", "refs/tags/"} {
			if _, err := git(ctx, root, "rev-parse", "--verify", "--quiet", ref+branch+"^{commit}"); err == nil {
				return root, nil
			}
		}
		return "", fault.New("", fault.NotFound, "%s has no branch %q", root, branch).
			Hinted("See its branches with: git -C %s branch", root)
	}
	for _, ref := range []string{"refs/heads/main", "HEAD"} {
		if _, err := git(ctx, root, "rev-parse", "--verify", "--quiet", ref+"^{commit}"); err == nil {
			return root, nil
		}
	}
	return "", usage("Commit something first: agents start from a commit.", "%s has no commit yet", root)
}

// notRepository classes what git said of a path that exists.
func notRepository(path string, err error) error {
	var exit *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fault.New("", fault.Unsupported, "%w", err).Hinted("Install git.")
	case errors.As(err, &exit) && exit.ExitCode() == 128:
		// 128 is also how git refuses a folder of another user; what it
		// said tells the two apart for the reader.
		return fault.New("", fault.NotFound, "%s: %s", path, flat(string(exit.Stderr))).
			Hinted("Name the path of a git repository; git init makes one.")
	}
	return err
}

// localGit are the variables that bind git to one repository, as listed by git
// rev-parse --local-env-vars.
var localGit = []string{
	"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_COMMON_DIR",
	"GIT_NAMESPACE", "GIT_PREFIX", "GIT_CONFIG_PARAMETERS", "GIT_CONFIG_COUNT", "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE",
}

// git asks a question of a local repository. It runs none of the repository's
// own programs.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir, "-c", "core.fsmonitor=false"}, args...)...)
	// A command that is run by a git hook inherits where that git works.
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); !slices.Contains(localGit, name) {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, "GIT_OPTIONAL_LOCKS=0", "LC_ALL=C")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	return strings.TrimRight(string(out), "\n"), err
}

// warnDirty tells the user that what is not committed is no part of the run.
func warnDirty(ctx context.Context, env *Env, source string) {
	if !repo.IsLocal(source) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, gitPatience)
	defer cancel()
	out, err := git(ctx, source, "status", "--porcelain", "-z", "--untracked-files=normal")
	if err != nil || out == "" {
		return // a bare repository has nothing uncommitted
	}
	n := bytes.Count([]byte(out), []byte{0})
	fmt.Fprintf(env.Stderr, "warning: %s in %s: no part of this run, which starts from a commit\n", plural(n, "uncommitted change"), source)
}

// validBranch reports whether git takes name for a branch (git
// check-ref-format --branch).
func validBranch(name string) bool {
	if name == "" || name == "@" || name == "HEAD" || len(name) > 200 || strings.HasPrefix(name, "-") || strings.HasPrefix(name, "refs/") ||
		strings.HasSuffix(name, ".") || strings.Contains(name, "..") || strings.Contains(name, "@{") || strings.ContainsAny(name, " ~^:?*[\\\x7f") {
		return false
	}
	for _, r := range name {
		if r < 0x20 {
			return false
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || strings.HasPrefix(part, ".") || strings.HasSuffix(part, ".lock") {
			return false
		}
	}
	return true
}
