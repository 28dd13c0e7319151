package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A location is a source that was understood.
type location struct {
	url    string // what git is told: a URL, or an absolute path
	scheme string // https, http, ssh, git, file or upload
	server string // of http and https: scheme, host and port
	key    string // what the mirror is called after
	owner  string // of a local one: the folder that work trees share
	upload string // of an upload: its key in the store
}

func (l location) local() bool { return l.scheme == "file" }

// IsLocal reports whether source means a folder on the worker's host and not
// a remote repository. Relative paths, which only a command line can make
// sense of, are local too.
func IsLocal(source string) bool {
	if strings.HasPrefix(source, "file://") {
		return true
	}
	return !strings.Contains(source, "://") && !strings.Contains(source, "::") && !scpLike().MatchString(source)
}

func scpLike() *regexp.Regexp {
	return regexp.MustCompile(`^(?:[^/:@\s]+@)?(\[[0-9A-Fa-f:.]+\]|[^/:@\s]+):([^:].*|)$`)
}

const hintSource = "Give a URL (https://host/path, ssh://host/path, user@host:path) or the absolute path of a local repository."

// locate understands a source and checks whatever can be checked without the
// network.
func (s *Store) locate(ctx context.Context, source string) (location, error) {
	bad := func(format string, args ...any) (location, error) {
		return location{}, fault.New("", fault.Invalid, format, args...).Hinted(hintSource)
	}
	if source == "" {
		return bad("no repository was named")
	}
	if strings.ContainsFunc(source, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("the name of the repository holds a control character")
	}
	if strings.HasPrefix(source, "-") {
		return bad("repository %q: a name cannot start with a dash", source)
	}
	if !IsLocal(source) {
		if strings.Contains(source, "://") {
			return remoteURL(source)
		}
		if transport, _, ok := strings.Cut(source, "::"); ok {
			return bad("the transport %q is not allowed", transport+"::")
		}
		m := scpLike().FindStringSubmatch(source)
		if strings.HasPrefix(m[1], "-") || strings.Contains(source, "@-") || m[2] == "" || strings.HasPrefix(m[2], "-") {
			return bad("repository %q is neither a URL nor a path", source)
		}
		return location{url: source, scheme: "ssh", key: source}, nil
	}
	path := source
	if strings.HasPrefix(source, "file://") {
		u, err := url.Parse(source)
		if err != nil || (u.Host != "" && u.Host != "localhost") || u.RawQuery != "" || u.Fragment != "" {
			return bad("repository %q is not a path on this host", source)
		}
		path = u.Path
	}
	if path == "~" || strings.HasPrefix(path, "~/") {
		home, err := os.UserHomeDir()
		if err != nil {
			return bad("%q: the worker has no home folder", source)
		}
		path = home + path[1:]
	}
	if !filepath.IsAbs(path) {
		return bad("repository %q is a relative path", source)
	}
	return s.localFolder(ctx, filepath.Clean(path))
}

// remoteURL checks a URL. One that holds a password is refused: it would
// stand in process lists and in the mirror.
func remoteURL(source string) (location, error) {
	u, err := url.Parse(source)
	if err != nil {
		// The parser's error repeats the URL, and with it what may be secret.
		return location{}, fault.New("", fault.Invalid, "the repository's URL cannot be understood").Hinted(hintSource)
	}
	shown := u.Scheme + "://" + u.Host + u.Path
	bad := func(hint, format string, args ...any) (location, error) {
		return location{}, fault.New("", fault.Invalid, format, args...).Hinted("%s", hint)
	}
	scheme := strings.ToLower(u.Scheme)
	_, password := u.User.Password()
	switch {
	case scheme != "https" && scheme != "http" && scheme != "ssh" && scheme != "git":
		return bad(hintSource, "the transport %q is not allowed", u.Scheme)
	case password || u.User != nil && scheme != "ssh":
		return bad("Take the user and the password out of the URL. For GitHub, set GITHUB_TOKEN; for other servers, use a git credential helper.",
			"the URL of %s holds credentials", shown)
	case u.Hostname() == "" || strings.HasPrefix(u.Host, "-") || strings.HasPrefix(u.User.Username(), "-"):
		return bad(hintSource, "repository %q names no host", shown)
	case strings.Trim(u.Path, "/") == "":
		return bad(hintSource, "repository %q names no path on the host", shown)
	case u.RawQuery != "" || u.Fragment != "":
		return bad("Leave out everything from the ? or # on.", "the URL of %s has a query", shown)
	}
	l := location{url: source, scheme: scheme, key: strings.TrimRight(source, "/")}
	if scheme == "https" || scheme == "http" {
		l.server = scheme + "://" + hostPort(u)
	}
	return l, nil
}

// hostPort returns host and port without the port that the scheme implies.
func hostPort(u *url.URL) string {
	host := strings.ToLower(u.Hostname())
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	scheme, port := strings.ToLower(u.Scheme), u.Port()
	if port == "" || scheme == "https" && port == "443" || scheme == "http" && port == "80" {
		return host
	}
	return host + ":" + port
}

// localFolder looks at a folder that shall be a repository. Git's own rule
// about who may own it is kept, also for root: a repository decides by its
// configuration which programs git runs, so one of another user is read only
// when the worker's user has named it in safe.directory.
func (s *Store) localFolder(ctx context.Context, path string) (location, error) {
	real, err := filepath.EvalSymlinks(path)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return location{}, fault.New("", fault.NotFound, "there is no folder %s", path).Hinted("A path means a folder on the machine of the worker. " + hintSource)
	case err != nil:
		return location{}, diskFault(err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return location{}, diskFault(err)
	}
	if !info.IsDir() {
		return location{}, fault.New("", fault.Invalid, "%s is a file", path).Hinted(hintSource)
	}
	out, err := s.run(ctx, call{user: true, dir: real, env: []string{"GIT_CEILING_DIRECTORIES=" + filepath.Dir(real)},
		args: []string{"rev-parse", "--path-format=absolute", "--is-shallow-repository", "--git-common-dir"}})
	if gitFailed(err) {
		return location{}, s.notARepository(ctx, real, err)
	}
	if err != nil {
		return location{}, err
	}
	shallow, common, _ := strings.Cut(strings.TrimSuffix(string(out), "\n"), "\n")
	if shallow == "true" {
		return location{}, fault.New("", fault.Unsupported, "the history of %s is cut short", path).
			Hinted("Fetch all of it first: git -C %s fetch --unshallow", path)
	}
	out, err = s.run(ctx, call{user: true, dir: real, args: []string{"config", "--get-regexp", `^(extensions\.partialclone|remote\..*\.promisor)$`}})
	if err == nil && len(out) > 0 {
		return location{}, fault.New("", fault.Unsupported, "%s is a partial clone", path).
			Hinted("Use a full clone of %s, or the address it was cloned from.", path)
	}
	if err != nil && !gitFailed(err) {
		return location{}, err
	}
	if common, err = filepath.EvalSymlinks(common); err != nil {
		return location{}, diskFault(err)
	}
	return location{url: real, scheme: "file", key: "file:" + common, owner: common}, nil
}

// notARepository says why git sees no repository in the folder.
func (s *Store) notARepository(ctx context.Context, path string, cause error) error {
	looks := false
	for _, mark := range []string{".git", "objects"} {
		info, err := os.Lstat(filepath.Join(path, mark))
		if err != nil {
			continue
		}
		looks = true
		if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
			return foreign(path)
		}
	}
	if info, err := os.Stat(path); looks && err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
			return foreign(path)
		}
	}
	if _, err := os.ReadDir(path); errors.Is(err, os.ErrPermission) {
		return &fault.Error{Kind: fault.Denied, Err: err, Hint: "Let the worker's user read the repository."}
	}
	if looks {
		return &fault.Error{Kind: fault.Invalid, Err: cause, Hint: "Look with: git -C " + path + " status"}
	}
	e := fault.New("", fault.NotFound, "%s is not a git repository", path)
	out, err := s.run(ctx, call{user: true, dir: path, args: []string{"rev-parse", "--show-toplevel"}})
	if top := strings.TrimSuffix(string(out), "\n"); err == nil && top != "" {
		return e.Hinted("It lies in the repository %s: name that one.", top)
	}
	return e.Hinted("Make it one: git -C %s init, and commit something.", path)
}

func foreign(path string) error {
	return fault.New("", fault.Denied, "the repository %s belongs to another user", path).
		Hinted("If you trust it, say so to git as the worker's user: git config --global --add safe.directory %s", path)
}

// mirrorDir returns where the mirror of l is, for the kind of hash that
// commit is made with.
func (s *Store) mirrorDir(l location, commit string) string {
	sum := sha256.Sum256([]byte(objectFormat(commit) + " " + l.key))
	return filepath.Join(s.dir, "mirrors", hex.EncodeToString(sum[:16])+".git")
}

// credential returns the -c setting, the environment and the secret with
// which git reads l. The setting names a variable; the token is in the
// environment of that one child.
func (s *Store) credential(ctx context.Context, l location) (config, env []string, c Credential, err error) {
	if s.credentials == nil || l.server == "" {
		return nil, nil, c, nil
	}
	c, err = s.credentials(ctx)
	if err != nil {
		return nil, nil, Credential{}, err
	}
	if c.Token == "" {
		return nil, nil, Credential{}, nil
	}
	if c.User == "" {
		c.User = "x-access-token"
	}
	u, err := url.Parse(c.Server)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "" || u.User != nil || strings.Trim(u.Path, "/") != "" {
		return nil, nil, Credential{}, fault.New("", fault.Invalid, "the credential's server is no scheme, host and port").
			Hinted("Write it as https://github.com.")
	}
	if strings.ContainsAny(c.Token, "\r\n\x00") || strings.ContainsAny(c.User, "\r\n\x00") {
		return nil, nil, Credential{}, fault.New("", fault.Invalid, "the token for %s holds a line break", hostPort(u)).
			Hinted("Set it again, on one line.")
	}
	if u.Scheme+"://"+hostPort(u) != l.server {
		return nil, nil, Credential{}, nil
	}
	key := "credential." + l.server + ".helper="
	// The empty value drops the helpers of the user for this server: an old
	// password in one of them would be tried first, and the token would be
	// offered to it for keeping.
	config = []string{key, key + `!f() { test "$1" = get && printf 'username=%s\npassword=%s\n' "$SANDBOX_TEMPORAL_GIT_USER" "$SANDBOX_TEMPORAL_GIT_TOKEN"; }; f`}
	env = []string{"SANDBOX_TEMPORAL_GIT_USER=" + c.User, "SANDBOX_TEMPORAL_GIT_TOKEN=" + c.Token}
	return config, env, c, nil
}

// remoteCall completes a call that talks to l.
func (s *Store) remoteCall(ctx context.Context, l location, c call) (call, error) {
	config, env, cred, err := s.credential(ctx, l)
	if err != nil {
		return c, err
	}
	c.user = true
	c.config = append(c.config, config...)
	c.env = append(c.env, env...)
	c.secret = cred.Token
	for _, id := range tolerated() {
		c.config = append(c.config, "fetch.fsck."+id+"=ignore")
	}
	if l.local() {
		c.config = append(c.config, "protocol.file.allow=always")
		c.env = append(c.env, "GIT_ALLOW_PROTOCOL=file")
		return c, nil
	}
	// A user may have git rewrite addresses (url.<base>.insteadOf), so any
	// network transport will do, but none that reads files or runs programs.
	c.env = append(c.env, "GIT_ALLOW_PROTOCOL=https:http:ssh:git", "GIT_SSH_COMMAND="+s.sshCommand(ctx))
	return c, nil
}

// sshCommand returns the user's own ssh, told not to ask.
func (s *Store) sshCommand(ctx context.Context) string {
	command := os.Getenv("GIT_SSH_COMMAND")
	if command == "" {
		out, err := s.run(ctx, call{user: true, args: []string{"config", "--get", "core.sshCommand"}})
		if err == nil {
			command = strings.TrimSpace(string(out))
		}
	}
	if command == "" && os.Getenv("GIT_SSH") != "" {
		command = "'" + strings.ReplaceAll(os.Getenv("GIT_SSH"), "'", `'\''`) + "'"
	}
	if command == "" {
		command = "ssh"
	}
	if first, _, _ := strings.Cut(command, " "); strings.Trim(filepath.Base(first), "'") == "ssh" {
		command += " -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
	}
	return command
}

// dialAddress returns where the server of a URL with the given default port
// listens.
func dialAddress(raw, port string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	if p := u.Port(); p != "" {
		port = p
	}
	return net.JoinHostPort(u.Hostname(), port)
}
