// Package ledgertest starts PostgreSQL servers for tests of what keeps a ledger
// in one.
package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A Server is a PostgreSQL server that a test has to itself. It listens on a
// unix socket only, and its files are in a temporary folder.
type Server struct {
	dir     string
	bin     string
	who     *syscall.Credential // nil: who runs the test
	durable bool

	mu    sync.Mutex
	child *exec.Cmd
	log   *os.File
	ended chan error
	made  int // databases
}

var errNone = errors.New("there is no PostgreSQL server on this machine: install Debian's package postgresql")

// binaries finds the folder of PostgreSQL's programs: Debian keeps those of the
// server away from the PATH.
func binaries() (string, error) {
	if path, err := exec.LookPath("initdb"); err == nil {
		path, err = filepath.EvalSymlinks(path)
		return filepath.Dir(path), err
	}
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		return "", errNone
	}
	return filepath.Dir(slices.Max(found)), nil
}

// start makes a cluster of databases and starts its server.
func start(durable bool) (_ *Server, err error) {
	s := &Server{durable: durable}
	if s.bin, err = binaries(); err != nil {
		return nil, err
	}
	// The path of a socket is short.
	parent := os.TempDir()
	if len(parent) > 60 {
		parent = "/tmp"
	}
	if s.dir, err = os.MkdirTemp(parent, "pg"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	if os.Getuid() == 0 { // PostgreSQL refuses to run as root
		if s.who, err = someone(); err != nil {
			return nil, err
		}
		if err := os.Chown(s.dir, int(s.who.Uid), int(s.who.Gid)); err != nil {
			return nil, err
		}
	}
	if err := s.run("initdb", "-D", filepath.Join(s.dir, "data"), "-U", "ledger", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"); err != nil {
		return nil, err
	}
	return s, s.Start()
}

func someone() (*syscall.Credential, error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, err
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, err
}

// command makes a command of PostgreSQL's.
func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(context.Background(), filepath.Join(s.bin, name), args...)
	cmd.Dir = s.dir
	cmd.Env = []string{"PATH=" + s.bin + ":/usr/bin:/bin", "LC_ALL=C", "HOME=" + s.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.who}
	return cmd
}

func (s *Server) run(name string, args ...string) error {
	if out, err := s.command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return nil
}

// Start starts the server again that was crashed, and returns when it answers.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		return err
	}
	s.log = log
	sync := "fsync=off"
	if s.durable {
		sync = "fsync=on"
	}
	child := s.command("postgres", "-D", filepath.Join(s.dir, "data"), "-k", s.dir, "-c", "listen_addresses=", "-c", sync,
		"-c", "max_connections=200", "-c", "unix_socket_permissions=0700", "-c", "log_min_messages=warning")
	child.Stdout, child.Stderr = log, log
	begun, ended := make(chan error, 1), make(chan error, 1)
	go supervise(child, begun, ended)
	if err := <-begun; err != nil {
		return err
	}
	s.child, s.ended = child, ended
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		if err := s.run("pg_isready", "-q", "-h", s.dir); err == nil {
			return nil
		}
		select {
		case err := <-ended:
			s.child = nil
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("postgres ended: %w\n%s", err, text)
		case <-time.After(20 * time.Millisecond): // between two looks at another process
		}
	}
	return errors.New("postgres does not answer")
}

// Crash ends the server as a loss of power would, as far as a process can: it
// does not finish anything, and recovers from its log the next time.
func (s *Server) Crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.child == nil {
		return
	}
	_ = s.child.Process.Signal(syscall.SIGQUIT) // it may have ended
	<-s.ended
	_ = s.log.Close()
	s.child = nil
}

// Stop ends the server and removes its files.
func (s *Server) Stop() error {
	s.Crash()
	return os.RemoveAll(s.dir)
}

// URL makes a database and returns its address.
func (s *Server) URL() (string, error) {
	s.mu.Lock()
	s.made++
	name := fmt.Sprintf("ledger%d", s.made)
	s.mu.Unlock()
	if err := s.run("createdb", "-h", s.dir, "-U", "ledger", name); err != nil {
		return "", err
	}
	return "postgres://ledger@/" + name + "?host=" + s.dir, nil
}

// New starts a server for t alone, which may crash it. Without PostgreSQL on the
// machine, t is skipped. A durable one waits for the disk at every commit, as
// real ones do.
func New(t testing.TB, durable bool) *Server {
	t.Helper()
	s, err := start(durable)
	skipOrFail(t, err)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func skipOrFail(t testing.TB, err error) {
	t.Helper()
	switch {
	case err == nil:
	case errors.Is(err, errNone):
		t.Skip(err)
	default:
		t.Fatal(err)
	}
}

var shared struct {
	sync.Mutex
	*Server
	err error
}

// Postgres returns the address of a new, empty database on a server that all
// tests of the program share. Its TestMain calls Stop. Without PostgreSQL on
// the machine, t is skipped.
func Postgres(t testing.TB) (url string) {
	t.Helper()
	shared.Lock()
	if shared.Server == nil && shared.err == nil {
		shared.Server, shared.err = start(false)
	}
	s, err := shared.Server, shared.err
	shared.Unlock()
	skipOrFail(t, err)
	url, err = s.URL()
	if err != nil {
		t.Fatal(err)
	}
	return url
}

// Stop ends the server that Postgres started, if it did.
func Stop() error {
	shared.Lock()
	defer shared.Unlock()
	if shared.Server == nil {
		return nil
	}
	return shared.Server.Stop()
}
