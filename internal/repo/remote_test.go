package repo

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const token = "ghp_veryS3cretTokenThatNobodyMaySee"

// served is a git server that wants a token.
type served struct {
	*httptest.Server
	mu   sync.Mutex
	auth []string // every Authorization that came
}

func (s *served) sawToken() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.auth {
		raw, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(a, "Basic "))
		if strings.Contains(string(raw), token) {
			return true
		}
	}
	return false
}

// serve serves the repositories under root with the real git-http-backend.
func serve(t *testing.T, root string, private bool) *served {
	t.Helper()
	backend := filepath.Join(git(t, "/", "--exec-path"), "git-http-backend")
	if _, err := os.Stat(backend); err != nil {
		t.Skipf("needs git-http-backend: %v", err)
	}
	s := &served{}
	handler := &cgi.Handler{Path: backend, Root: "/", Dir: root, Stderr: io.Discard, Logger: log.New(io.Discard, "", 0),
		Env: []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.auth = append(s.auth, r.Header.Get("Authorization"))
		s.mu.Unlock()
		user, password, ok := r.BasicAuth()
		if private && (!ok || user != "x-access-token" || password != token) {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func withToken(server, secret string) func(context.Context) (Credential, error) {
	return func(context.Context) (Credential, error) { return Credential{Server: server, Token: secret}, nil }
}

// watchGit puts a git before the real one that writes down its arguments, and
// does the same for the helpers that git starts.
func watchGit(t *testing.T) (logged func() string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "argv")
	write(t, filepath.Join(dir, "git"), "#!/bin/sh\nprintf '%s\\n' \"$0\" \"$@\" >>'"+file+"'\nPATH=\"${PATH#*:}\"\nGIT_TRACE='"+file+".trace' GIT_TRACE_REDACT=0 exec git \"$@\"\n")
	if err := os.Chmod(filepath.Join(dir, "git"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		a, _ := os.ReadFile(file)
		b, _ := os.ReadFile(file + ".trace")
		return string(a) + string(b)
	}
}

func TestATokenOpensAPrivateRepositoryAndStaysSecret(t *testing.T) {
	dir := home(t)
	source := repository(t)
	server := serve(t, filepath.Dir(source), true)
	url := server.URL + "/source"
	argv := watchGit(t)
	var logged bytes.Buffer
	var said []string
	state := t.TempDir()
	store := func(name string, credentials func(context.Context) (Credential, error)) *Store {
		return New(Options{Dir: filepath.Join(state, name), Credentials: credentials,
			Logger: slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	}

	s := store("with", withToken(server.URL, token))
	b := resolve(t, s, url, "")
	if b.Commit != git(t, source, "rev-parse", "HEAD") {
		t.Errorf("%+v", b)
	}
	if !server.sawToken() {
		t.Error("the server never saw the token: the test proves nothing")
	}
	_, got := madeFork(t, s, b, func(work string) { write(t, filepath.Join(work, "x"), "x\n") })
	if got.Delivered {
		t.Error("a remote source cannot be delivered to")
	}
	_, err := s.Resolve(t.Context(), url, "nope")
	wantFault(t, err, fault.NotFound)
	said = append(said, err.Error(), fault.HintOf(err))
	_, err = s.Resolve(t.Context(), server.URL+"/nothing", "")
	wantFault(t, err, fault.NotFound)
	said = append(said, err.Error(), fault.HintOf(err))

	for name, credentials := range map[string]func(context.Context) (Credential, error){
		"nobody asked": nil,
		"none":         withToken(server.URL, ""),
		"wrong":        withToken(server.URL, token+"x"),
		"elsewhere":    withToken("https://github.com", token),
		"other port":   withToken("http://127.0.0.1:1", token),
	} {
		_, err := store(name, credentials).Resolve(t.Context(), url, "")
		wantFault(t, err, fault.Denied)
		if !strings.Contains(fault.HintOf(err), "GITHUB_TOKEN") {
			t.Errorf("%s: hint %q", name, fault.HintOf(err))
		}
		said = append(said, err.Error(), fault.HintOf(err))
	}

	forms := []string{token, base64.StdEncoding.EncodeToString([]byte("x-access-token:" + token))}
	check := func(where, text string) {
		for _, secret := range forms {
			if strings.Contains(text, secret) {
				t.Errorf("the token stands in %s", where)
			}
		}
	}
	check("an error or a hint", strings.Join(said, "\n"))
	check("the log", logged.String())
	if a := argv(); !strings.Contains(a, "ls-remote") || !strings.Contains(a, "git-remote-http") || !strings.Contains(a, "credential.http") {
		t.Errorf("the watcher missed the children: %q", cut(a, 2000))
	}
	check("the arguments of a child", argv())
	for _, root := range []string{state, dir} {
		files := 0
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			files++
			b, err := os.ReadFile(path)
			check(path, string(b))
			return err
		})
		if err != nil || files == 0 {
			t.Errorf("%d files looked at in %s: %v", files, root, err)
		}
	}
}

func TestATokenDoesNotFollowARedirectToAnotherServer(t *testing.T) {
	home(t)
	source := repository(t)
	other := serve(t, filepath.Dir(source), true)
	first := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL+r.URL.RequestURI(), http.StatusFound)
	}))
	defer first.Close()
	s := New(Options{Dir: t.TempDir(), Credentials: withToken(first.URL, token)})
	if _, err := s.Resolve(t.Context(), first.URL+"/source", ""); err == nil {
		t.Error("resolved")
	}
	if other.sawToken() {
		t.Error("the other server got the token")
	}
}

// The user's own helpers stay usable for servers that the token is not for.
func TestTheUsersOwnCredentialHelpersAreAsked(t *testing.T) {
	dir := home(t)
	source := repository(t)
	server := serve(t, filepath.Dir(source), true)
	config := filepath.Join(dir, ".gitconfig")
	git(t, "/", "config", "--file", config, "credential.helper", "store --file="+filepath.Join(dir, "creds"))
	host := strings.TrimPrefix(server.URL, "http://")
	write(t, filepath.Join(dir, "creds"), "http://x-access-token:"+token+"@"+host+"\n")
	s := New(Options{Dir: t.TempDir(), Credentials: withToken("https://github.com", "another")})
	resolve(t, s, server.URL+"/source", "")

	// For the token's own server an old password of the user is not in the
	// way, and the token is not given to the helper for keeping.
	write(t, filepath.Join(dir, "creds"), "http://x-access-token:old@"+host+"\n")
	s = New(Options{Dir: t.TempDir(), Credentials: withToken(server.URL, token)})
	resolve(t, s, server.URL+"/source", "")
	if b, err := os.ReadFile(filepath.Join(dir, "creds")); err != nil || strings.Contains(string(b), token) {
		t.Errorf("the helper has %q, %v", b, err)
	}
}

func TestAPublicRepositoryDoesNotGetTheToken(t *testing.T) {
	home(t)
	source := repository(t)
	server := serve(t, filepath.Dir(source), false)
	s := New(Options{Dir: t.TempDir(), Credentials: withToken(server.URL, token)})
	b := resolve(t, s, server.URL+"/source", "")
	sandbox(t, s, b)
	if server.sawToken() {
		t.Error("the token was sent without being asked for")
	}
}

func TestBadCredentialsAreRefusedBeforeAnythingIsSent(t *testing.T) {
	home(t)
	broken := errors.New("vault is closed")
	for name, credentials := range map[string]func(context.Context) (Credential, error){
		"two lines": withToken("https://github.com", "a\nhost=evil"),
		"no server": withToken("github.com", "a"),
		"a path":    withToken("https://github.com/x", "a"),
		"with user": withToken("https://u@github.com", "a"),
	} {
		_, err := New(Options{Dir: t.TempDir(), Credentials: credentials}).Resolve(t.Context(), "https://github.com/a/b", "")
		if fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := New(Options{Dir: t.TempDir(), Credentials: func(context.Context) (Credential, error) { return Credential{}, broken }})
	if _, err := s.Resolve(t.Context(), "https://github.com/a/b", ""); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}

func TestRemoteTroubleHasItsKind(t *testing.T) {
	home(t)
	s := newStore(t)
	root := filepath.Dir(repository(t))
	server := serve(t, root, false)
	status := func(code int) string {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(code) }))
		t.Cleanup(srv.Close)
		return srv.URL + "/a/b"
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := closed.Addr().String()
	_ = closed.Close()
	for _, c := range []struct {
		source string
		kind   fault.Kind
	}{
		{server.URL + "/nothing", fault.NotFound},
		{status(http.StatusNotFound), fault.NotFound},
		{status(http.StatusOK), fault.NotFound}, // a web page
		{status(http.StatusForbidden), fault.Denied},
		{status(http.StatusUnauthorized), fault.Denied},
		{status(http.StatusInternalServerError), fault.Unavailable},
		{status(http.StatusTooManyRequests), fault.Unavailable},
		{"http://" + dead + "/a/b", fault.Unavailable},
		{"git://" + dead + "/a/b", fault.Unavailable},
	} {
		_, err := s.Resolve(t.Context(), c.source, "main")
		if fault.KindOf(err) != c.kind || fault.HintOf(err) == "" {
			t.Errorf("%s: %v of kind %q, want %q; hint %q", c.source, err, fault.KindOf(err), c.kind, fault.HintOf(err))
		}
	}
}

// What a server says must not reach the terminal as it is.
func TestWordsOfAServerAreCleaned(t *testing.T) {
	if got := clean("remote: \x1b[2J\x07evil\nfatal: "+token+"\r\n", token); strings.ContainsAny(got, "\x1b\x07\n\r") || strings.Contains(got, token) || !strings.Contains(got, "fatal: ***") {
		t.Errorf("%q", got)
	}
}

// ssh is played by a script: it logs in, or ends as ssh does when it cannot.
func TestSSHIsClassedByItsExitStatus(t *testing.T) {
	dir := home(t)
	source := repository(t)
	script := filepath.Join(dir, "bin", "ssh")
	play := func(body string) {
		write(t, script, "#!/bin/sh\nprintf '%s\\n' \"$@\" >>'"+dir+"/ssh-args'\n"+body)
		if err := os.Chmod(script, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("GIT_SSH_COMMAND", script)
	t.Setenv("GIT_SSH_VARIANT", "ssh")
	listen, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listen.Close()
	_, port, _ := net.SplitHostPort(listen.Addr().String())
	s := newStore(t)

	play(`for last; do :; done; exec sh -c "$last"` + "\n")
	b := resolve(t, s, "git@127.0.0.1:"+source, "")
	sandbox(t, s, b)
	if args, err := os.ReadFile(dir + "/ssh-args"); err != nil || !strings.Contains(string(args), "BatchMode=yes") {
		t.Errorf("ssh may ask: %q, %v", args, err)
	}
	_, err = s.Resolve(t.Context(), "git@127.0.0.1:"+source+"-not", "")
	wantFault(t, err, fault.NotFound)

	play("echo 'git@127.0.0.1: Permission denied (publickey).' >&2; exit 255\n")
	_, err = s.Resolve(t.Context(), "ssh://git@127.0.0.1:"+port+"/a/b", "")
	wantFault(t, err, fault.Denied)
	_ = listen.Close()
	_, err = s.Resolve(t.Context(), "ssh://git@127.0.0.1:"+port+"/a/b", "")
	wantFault(t, err, fault.Unavailable)
}

func TestSSHAddressesAreTakenApart(t *testing.T) {
	for address, want := range map[string][3]string{
		"git@github.com:a/b.git":         {"git@github.com", "", "a/b.git"},
		"host:/srv/x":                    {"host", "", "/srv/x"},
		"git@[::1]:x":                    {"git@::1", "", "x"},
		"ssh://git@host/srv/x":           {"git@host", "", "/srv/x"},
		"ssh://host:2222/~me/x":          {"host", "2222", "~me/x"},
		"ssh://git@[2001:db8::1]:22/x/y": {"git@2001:db8::1", "22", "/x/y"},
	} {
		host, port, path := splitSSH(address)
		if got := [3]string{host, port, path}; got != want {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
}
