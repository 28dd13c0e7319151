package repo

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// diagnose says why git could not read a remote. Git's own words differ by
// version, transport and server, so the server is asked again in a way whose
// answer has a number: an HTTP status, an exit status of ssh, an errno.
func (s *Store) diagnose(ctx context.Context, l location, cause error) error {
	var kind fault.Kind
	var hint string
	switch l.scheme {
	case "http", "https":
		kind, hint = s.probeHTTP(ctx, l)
	case "ssh":
		kind, hint = s.probeSSH(ctx, l)
	case "git":
		kind, hint = fault.NotFound, "Check the address: the server answers but gives no such repository."
		if !dials(ctx, dialAddress(l.url, "9418")) {
			kind, hint = fault.Unavailable, hintNetwork
		}
	case "file":
		kind, hint = fault.Invalid, "Look with: git -C "+l.url+" fsck"
	}
	if ctx.Err() != nil {
		return contextFault(ctx)
	}
	return &fault.Error{Kind: kind, Err: cause, Hint: hint}
}

const hintNetwork = "The server cannot be reached: check the address and the network of the worker's machine."

// probeHTTP asks as git does, first without and then with the token.
func (s *Store) probeHTTP(ctx context.Context, l location) (fault.Kind, string) {
	github := l.server == "https://github.com"
	status, repository, err := s.ask(ctx, l, Credential{})
	if err != nil {
		return fault.Unavailable, hintNetwork
	}
	_, _, cred, err := s.credential(ctx, l)
	if err != nil {
		return fault.KindOf(err), fault.HintOf(err)
	}
	if cred.Token != "" && status != http.StatusOK {
		if status, repository, err = s.ask(ctx, l, cred); err != nil {
			return fault.Unavailable, hintNetwork
		}
	}
	elsewhere := "GITHUB_TOKEN is sent to https://github.com only; for " + l.server + " set up a git credential helper for the worker's user, or use an SSH address."
	switch {
	case (status == http.StatusUnauthorized || status == http.StatusForbidden) && cred.Token != "":
		return fault.Denied, "The token for " + l.server + " was refused: GITHUB_TOKEN must be valid and may read the repository's contents."
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		if github || s.credentials == nil {
			return fault.Denied, "The repository is private or not there: set GITHUB_TOKEN to a token that may read it, set up a git credential helper for the worker's user, or use an SSH address."
		}
		return fault.Denied, "The repository is private or not there. " + elsewhere
	case status == http.StatusNotFound || status == http.StatusGone:
		if cred.Token != "" {
			return fault.NotFound, "Check the address. It may also be that the token may not see the repository."
		}
		return fault.NotFound, "Check the address. Servers also say so of a private repository: set GITHUB_TOKEN to a token that may read it, or use an SSH address."
	case status == http.StatusOK && !repository:
		return fault.NotFound, "Something answers at this address, but it is no git repository."
	case status == http.StatusTooManyRequests || status >= 500:
		return fault.Unavailable, "The server has trouble of its own: try again later."
	}
	return fault.Unavailable, "Try again; if it stays so, look with: git ls-remote " + l.url
}

// ask returns the status of the first request that git sends, and whether
// what came back is a repository. A credential is not sent to where a
// redirect leads.
func (s *Store) ask(ctx context.Context, l location, cred Credential) (status int, repository bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(l.url, "/")+"/info/refs?service=git-upload-pack", nil)
	if err != nil {
		return 0, false, err
	}
	req.Header.Set("User-Agent", "git/2.39 (sandbox-temporal)")
	client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true}}
	if cred.Token != "" {
		req.SetBasicAuth(cred.User, cred.Token)
		client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, false, err
	}
	defer resp.Body.Close()
	return resp.StatusCode, resp.Header.Get("Content-Type") == "application/x-git-upload-pack-advertisement", nil
}

// probeSSH logs in as git does. ssh ends with 255 when it could not, and
// else with the status of the command.
func (s *Store) probeSSH(ctx context.Context, l location) (fault.Kind, string) {
	host, port, path := splitSSH(l.url)
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	args := []string{"-c", s.sshCommand(ctx) + ` "$@"`, "ssh"}
	if port != "" {
		args = append(args, "-p", port)
	}
	args = append(args, host, "git-upload-pack '"+strings.ReplaceAll(path, "'", `'\''`)+"'")
	cmd := exec.CommandContext(ctx, "sh", args...)
	cmd.Env = call{user: true}.environ()
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader("0000") // the packet that says "no more": git-upload-pack then ends well
	cmd.SysProcAttr = detached()
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return fault.Unavailable, "Try again; if it stays so, look with: git ls-remote " + l.url
	case !errors.As(err, &exit):
		return fault.Unavailable, hintNetwork
	case exit.ExitCode() == 127:
		return fault.Unsupported, "Install ssh on the worker's machine, or use an HTTPS address."
	case exit.ExitCode() != 255:
		return fault.NotFound, "Check the address. Servers also say so of a repository that the key may not see."
	}
	name := host[strings.LastIndex(host, "@")+1:]
	if port == "" {
		port = "22"
	}
	// An alias of ~/.ssh/config has no address of its own: then nothing is
	// known but that it did not work.
	if !dials(ctx, net.JoinHostPort(name, port)) {
		return fault.Unavailable, hintNetwork
	}
	return fault.Denied, "ssh could not log in: the worker's user needs a key without a passphrase (or an agent) that the server knows, and the server's host key in known_hosts. Try: ssh -T " + host
}

// splitSSH takes an SSH address apart as git does.
func splitSSH(address string) (host, port, path string) {
	rest, isURL := strings.CutPrefix(address, "ssh://")
	if !isURL {
		host, path, _ = strings.Cut(address, ":")
		if i := strings.Index(address, "]:"); i > 0 {
			host, path = strings.NewReplacer("[", "", "]", "").Replace(address[:i]), address[i+2:]
		}
		return host, "", path
	}
	host, path, _ = strings.Cut(rest, "/")
	path = "/" + path
	if strings.HasPrefix(path, "/~") {
		path = path[1:]
	}
	user := ""
	if i := strings.LastIndex(host, "@"); i >= 0 {
		user, host = host[:i+1], host[i+1:]
	}
	if h, p, err := net.SplitHostPort(host); err == nil {
		host, port = h, p
	}
	return user + strings.Trim(host, "[]"), port, path
}

// dials reports whether something listens at address.
func dials(ctx context.Context, address string) bool {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
