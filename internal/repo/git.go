package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A call is one git child process.
type call struct {
	args   []string
	gitDir string   // GIT_DIR; empty: git looks for a repository from dir upwards
	dir    string   // working folder; empty: the root, where there is no repository
	config []string // more "key=value" for -c
	env    []string

	// user makes git see the environment and the configuration of the user
	// who runs the worker: for remotes (proxies, credential helpers, ssh) and
	// for the user's own repositories (safe.directory). Without it git sees
	// nothing but our own settings.
	user bool
	// bounded limits git's memory and time: for work on what a fork made.
	bounded bool

	stdin  *os.File
	stdout io.Writer // nil: returned, at most maxOutput bytes of it
	secret string    // never shown
}

const (
	maxOutput = 64 << 20 // of a child's output that is held in memory
	maxStderr = 4 << 10  // of what a child complains that is passed on

	// The memory of a child that works on what a fork made, in KiB and in
	// bytes, and its time: a pack of a few kilobytes can ask for any amount.
	maxMemory = 4 << 20
	maxAlloc  = 1 << 30
	maxTime   = 15 * time.Minute
)

// settings hold for every child. Command line settings win over every file.
func settings() []string {
	return []string{
		"core.hooksPath=/dev/null",
		"core.fsmonitor=false",
		"core.askPass=",
		"credential.interactive=never",
		"protocol.ext.allow=never",
		"submodule.recurse=false",
		"fetch.recurseSubmodules=false",
		"fetch.fsckObjects=true",
		"transfer.fsckObjects=true",
		"fetch.writeCommitGraph=false",
		"fetch.prune=false",
		"fetch.pruneTags=false",
		"gc.auto=0",
		"gc.autoDetach=false",
		"maintenance.auto=false",
		"http.lowSpeedLimit=1000", // bytes a second, for lowSpeedTime seconds: the server is gone
		"http.lowSpeedTime=30",
		"core.packedGitWindowSize=64m",
		"core.packedGitLimit=1g",
		"core.bigFileThreshold=64m",
	}
}

// tolerated are faults of old histories that hurt nobody and that fetching
// has to live with: they stand in well-known repositories since years.
func tolerated() []string {
	return []string{"zeroPaddedFilemode", "missingSpaceBeforeDate", "badTimezone", "missingEmail",
		"missingNameBeforeEmail", "missingSpaceBeforeEmail", "multipleAuthors", "badDate", "badDateOverflow", "zeroPaddedDate"}
}

// gitError is a git that did not end well. What it said is for people only:
// nothing here decides by it.
type gitError struct {
	verb string
	code int // -1: killed by a signal
	said string
}

func (e *gitError) Error() string {
	how := "was killed"
	if e.code >= 0 {
		how = "ended with status " + strconv.Itoa(e.code)
	}
	if e.said == "" {
		return "git " + e.verb + " " + how
	}
	return "git " + e.verb + " " + how + ": " + e.said
}

// run runs git and returns its output, which may be of use even when git
// failed. The error is a *gitError when git ran
// and failed; it has a kind when the reason is already known: ctx ended, the
// disk is full, or there is no git.
func (s *Store) run(ctx context.Context, c call) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, contextFault(ctx)
	}
	argv := []string{"git"}
	for _, kv := range append(settings(), c.config...) {
		argv = append(argv, "-c", kv)
	}
	if !c.user {
		argv = append(argv, "-c", "core.attributesFile=/dev/null")
	}
	if c.bounded {
		argv = append(argv, "-c", "core.bigFileThreshold=16m")
	}
	argv = append(argv, "--literal-pathspecs", "--no-pager")
	argv = append(argv, c.args...)
	if c.bounded {
		argv = append([]string{"sh", "-c", `ulimit -v ` + strconv.Itoa(maxMemory) + ` 2>/dev/null; exec "$0" "$@"`}, argv...)
	}

	within := ctx
	if c.bounded {
		var stop context.CancelFunc
		within, stop = context.WithTimeout(ctx, maxTime)
		defer stop()
	}
	cmd := exec.CommandContext(within, argv[0], argv[1:]...)
	cmd.Dir = c.dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = c.environ()
	var out, said bytes.Buffer
	cmd.Stdout = c.stdout
	if cmd.Stdout == nil {
		cmd.Stdout = &capped{w: &out, left: maxOutput, strict: true}
	}
	cmd.Stderr = &capped{w: &said, left: maxStderr}
	if c.stdin != nil {
		cmd.Stdin = c.stdin
	}
	cmd.SysProcAttr = detached()
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 3 * time.Second

	// The kernel sends the parent-death signal when the thread that started
	// the child ends, so the thread must not end before the child does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	if err == nil {
		return out.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, contextFault(ctx)
	}
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fault.New("", fault.Unsupported, "git is not installed").Hinted("Install git 2.39 or newer on the worker's machine.")
	}
	var exit *exec.ExitError
	if within.Err() != nil {
		return out.Bytes(), &gitError{verb: c.args[0], code: -1, said: "it took longer than " + maxTime.String()}
	}
	if !errors.As(err, &exit) {
		return nil, diskFault(err) // the child could not be started, or its output could not be passed on
	}
	failed := &gitError{verb: c.args[0], code: exit.ExitCode(), said: clean(said.String(), c.secret)}
	if full(s.dir) || (c.dir != "" && brimful(c.dir)) {
		return nil, &fault.Error{Kind: fault.Full, Err: failed, Hint: hintFull}
	}
	return out.Bytes(), failed
}

// environ makes the environment of a child.
func (c call) environ() []string {
	var env []string
	if c.user {
		for _, kv := range os.Environ() {
			if name, _, _ := strings.Cut(kv, "="); passed(name) {
				env = append(env, kv)
			}
		}
	} else {
		for _, name := range []string{"PATH", "TMPDIR"} {
			if v, ok := os.LookupEnv(name); ok {
				env = append(env, name+"="+v)
			}
		}
		env = append(env, "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1")
	}
	env = append(env,
		"LC_ALL=C", "LANGUAGE=C",
		"GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS_REQUIRE=never", "GCM_INTERACTIVE=never",
		"GIT_OPTIONAL_LOCKS=0", "GIT_PAGER=cat", "GIT_EDITOR=false", "GIT_MERGE_AUTOEDIT=no", "GIT_NO_REPLACE_OBJECTS=1")
	if c.bounded {
		env = append(env, "GIT_ALLOC_LIMIT="+strconv.Itoa(maxAlloc))
	}
	if c.gitDir != "" {
		env = append(env, "GIT_DIR="+c.gitDir)
	}
	return append(env, c.env...)
}

// passed says which variables of the user git may see: all but those that
// would turn it to another repository, make it ask somebody, or write what it
// does to a file, and but the keys of other services.
func passed(name string) bool {
	switch name {
	case "GIT_SSH", "GIT_SSH_VARIANT", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "GIT_SSL_CERT", "GIT_SSL_KEY",
		"GIT_SSL_NO_VERIFY", "GIT_SSL_VERSION", "GIT_PROXY_COMMAND", "GIT_PROXY_SSL_CERT", "GIT_PROXY_SSL_KEY",
		"GIT_PROXY_SSL_CAINFO", "GIT_HTTP_USER_AGENT", "GIT_HTTP_PROXY_AUTHMETHOD", "GIT_EXEC_PATH",
		"GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM":
		return true
	case "SSH_ASKPASS", "DISPLAY", "WAYLAND_DISPLAY", "LANGUAGE",
		"ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY", "E2B_API_KEY", "TEMPORAL_API_KEY", "TEMPORAL_TLS_KEY":
		return false
	}
	return !strings.HasPrefix(name, "GIT_") && !strings.HasPrefix(name, "LC_")
}

// check looks once for a git that is new enough.
func (s *Store) check(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.checked {
		return nil
	}
	out, err := s.run(ctx, call{args: []string{"version"}})
	if err != nil {
		return err
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(out), "git version %d.%d", &major, &minor); err != nil || major < 2 || major == 2 && minor < 39 {
		return fault.New("", fault.Unsupported, "%s is too old", strings.TrimSpace(string(out))).
			Hinted("Install git 2.39 or newer on the worker's machine.")
	}
	s.checked = true
	return nil
}

// initBare makes an empty repository of ours at dir.
func (s *Store) initBare(ctx context.Context, dir, commit string) error {
	_, err := s.run(ctx, call{args: []string{"init", "--quiet", "--bare", "--template=", "--object-format=" + objectFormat(commit), "--", dir}})
	return err
}

// objectFormat tells the hash from the length of an id.
func objectFormat(commit string) string {
	if len(commit) == 64 {
		return "sha256"
	}
	return "sha1"
}

// resolveRef returns the commit that ref names in a repository of ours, or "".
func (s *Store) resolveRef(ctx context.Context, gitDir, ref string) (string, error) {
	out, err := s.run(ctx, call{gitDir: gitDir, args: []string{"rev-parse", "--verify", "--quiet", ref + "^{commit}"}})
	if gitFailed(err) {
		return "", nil
	}
	return strings.TrimSpace(string(out)), err
}

// gitFailed reports whether git itself said no, and the reason is not known.
func gitFailed(err error) bool {
	var failed *gitError
	return errors.As(err, &failed) && fault.KindOf(err) == fault.Internal
}

// setRefs makes all changes to refs, or none.
func (s *Store) setRefs(ctx context.Context, gitDir string, lines ...string) error {
	in, err := os.CreateTemp(gitDir, "refs-")
	if err != nil {
		return diskFault(err)
	}
	defer os.Remove(in.Name())
	defer in.Close()
	if _, err = in.WriteString(strings.Join(lines, "\n") + "\n"); err == nil {
		_, err = in.Seek(0, io.SeekStart)
	}
	if err != nil {
		return diskFault(err)
	}
	_, err = s.run(ctx, call{gitDir: gitDir, args: []string{"update-ref", "--stdin"}, stdin: in})
	return err
}

// full reports whether the disk that holds dir has no room left, by trying:
// what git writes in its last words is not asked.
func full(dir string) bool {
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil {
			break
		}
	}
	f, err := os.CreateTemp(dir, "probe-")
	if err != nil {
		return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	_, err = f.Write(make([]byte, 256<<10))
	if err == nil {
		err = f.Sync() // some file systems find room only when they write
	}
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// brimful reports the same of a folder of the user, where nothing is written
// to try.
func brimful(dir string) bool {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return err == nil && (uint64(st.Bavail)*uint64(st.Bsize) < 256<<10 || st.Files > 0 && st.Ffree == 0)
}

// capped passes on the first bytes and drops the rest, or, when strict, fails.
type capped struct {
	w      io.Writer
	left   int
	strict bool
}

func (c *capped) Write(p []byte) (int, error) {
	if len(p) > c.left && c.strict {
		return 0, fmt.Errorf("git said more than %d bytes", maxOutput)
	}
	n := min(len(p), c.left)
	c.left -= n
	if _, err := c.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// clean makes one line of what a stranger may have written, fit for a
// terminal and without the secret.
func clean(said, secret string) string {
	if secret != "" {
		basic := base64.StdEncoding.EncodeToString([]byte(secret))
		said = strings.NewReplacer(secret, "***", basic, "***").Replace(said)
	}
	said = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\r' || r == '\t':
			return ' '
		case !strconv.IsPrint(r) || r == 0xFFFD:
			return '?'
		}
		return r
	}, said)
	return strings.Join(strings.Fields(said), " ")
}

func randomName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
