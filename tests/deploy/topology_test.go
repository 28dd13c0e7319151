package deploy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The users that the programs of the compose file run as here. They need no
// entries in /etc/passwd, as in a container.
const (
	temporalUser = 10002
	workerUser   = 10001
	personUser   = 10003
)

// A topology is what deploy/docker/temporal-compose.yaml starts, without
// Docker: every program a process of its own, under a user of its own.
type topology struct {
	t        *testing.T
	dir      string // a folder that everybody may enter
	bin      string
	temporal string // Temporal's address
	path     string
}

func newTopology(t *testing.T) *topology {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("programs under users of their own need root")
	}
	built, tools := os.Getenv("SANDBOX_TEMPORAL_BIN"), os.Getenv("SANDBOX_TEMPORAL_CLUSTER")
	if built == "" || tools == "" {
		t.Skip("SANDBOX_TEMPORAL_BIN and SANDBOX_TEMPORAL_CLUSTER do not name what make test builds")
	}
	dir, err := os.MkdirTemp("", "topology")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Sandboxes outlive their worker: those of a test that failed go here.
		for _, pid := range naming(t, dir) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	top := &topology{t: t, dir: dir, bin: filepath.Join(dir, "bin")}
	top.path = top.bin + ":/usr/local/bin:/usr/bin:/bin"
	top.run(nil, "cp", "-r", filepath.Dir(built), top.bin) // where the checkout is, others may not look
	for _, name := range []string{"temporal-server", "temporal-sql-tool", "temporal-ui-server", "temporal-ui"} {
		top.run(nil, "cp", "-r", filepath.Join(tools, name), top.bin)
	}
	top.run(nil, "cp", "-r", filepath.Join("..", "..", "deploy", "docker", "temporal"), filepath.Join(dir, "etc"))
	top.run(nil, "chmod", "-R", "a+rX", top.bin, filepath.Join(dir, "etc"))
	return top
}

// run carries out a command as root and returns what it printed.
func (top *topology) run(env []string, args ...string) string {
	top.t.Helper()
	cmd := exec.CommandContext(top.t.Context(), args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		top.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// home makes a folder that only the user may enter.
func (top *topology) home(name string, uid int) string {
	top.t.Helper()
	dir := filepath.Join(top.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		top.t.Fatal(err)
	}
	if err := os.Chown(dir, uid, uid); err != nil {
		top.t.Fatal(err)
	}
	return dir
}

// as makes a command of the user, in a bare environment.
func (top *topology) as(ctx context.Context, uid int, home string, env []string, args ...string) *exec.Cmd {
	program := args[0]
	if !strings.Contains(program, "/") {
		program = filepath.Join(top.bin, program)
	}
	cmd := exec.CommandContext(ctx, program, args[1:]...)
	cmd.Dir = home
	cmd.Env = append([]string{"PATH=" + top.path, "HOME=" + home, "LC_ALL=C.UTF-8", "USER=somebody", "TMPDIR=" + home}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// A service is a process that stays.
type service struct {
	name  string
	cmd   *exec.Cmd
	ended chan error
	log   string
}

// start starts a service; it is ended with the test. Its output is shown when
// the test fails.
func (top *topology) start(name string, cmd *exec.Cmd) *service {
	t := top.t
	t.Helper()
	log, err := os.Create(filepath.Join(top.dir, name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &service{name: name, cmd: cmd, ended: make(chan error, 1), log: log.Name()}
	go func() { s.ended <- cmd.Wait(); close(s.ended) }()
	t.Cleanup(func() {
		s.end(syscall.SIGKILL)
		if t.Failed() {
			text, _ := os.ReadFile(s.log)
			t.Logf("%s said:\n%s", name, text[max(0, len(text)-4<<10):])
		}
	})
	return s
}

// end asks the service to end, and returns when it has.
func (s *service) end(sig syscall.Signal) {
	_ = syscall.Kill(-s.cmd.Process.Pid, sig) // it may have ended
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
		<-s.ended
	}
}

// until repeats do until it returns nil.
func (top *topology) until(what string, patience time.Duration, do func() error) {
	top.t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if err = do(); err == nil {
			return
		}
		select {
		case <-top.t.Context().Done():
			top.t.Fatal(top.t.Context().Err())
		case <-time.After(100 * time.Millisecond): // between two looks at other processes
		}
	}
	top.t.Fatalf("%s: not in %s: %v", what, patience, err)
}

// ports returns n free ones, below those that the kernel gives to whoever asks
// for any: Temporal keeps some of them in a smallint of PostgreSQL's.
func ports(t *testing.T, n int) []string {
	t.Helper()
	var list []string
	for tries := 0; len(list) < n && tries < 1000; tries++ {
		port := strconv.Itoa(10_000 + rand.IntN(22_000))
		ln, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			continue
		}
		defer ln.Close() // all at once, so that no port is given twice
		list = append(list, port)
	}
	if len(list) < n {
		t.Fatalf("only %d of %d ports are free", len(list), n)
	}
	return list
}

const password = "not-a-secret"

// postgresUser is who PostgreSQL runs as: it refuses root, and whoever has no
// name.
func postgresUser(t *testing.T) int {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			t.Fatal(err)
		}
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// postgres starts a server with a password, and returns its port.
func (top *topology) postgres() string {
	t := top.t
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		t.Skip("there is no PostgreSQL server on this machine: install Debian's package postgresql")
	}
	bin := filepath.Dir(slices.Max(found))
	uid := postgresUser(t)
	home := top.home("postgres", uid)
	pw := filepath.Join(home, "pw")
	if err := os.WriteFile(pw, []byte(password+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	data, port := filepath.Join(home, "data"), ports(t, 1)[0]
	init := top.as(t.Context(), uid, home, nil, bin+"/initdb", "-D", data, "-U", "temporal", "-A", "scram-sha-256", "--pwfile", pw, "-E", "UTF8", "--no-locale", "--no-sync")
	if out, err := init.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	top.start("postgres", top.as(context.Background(), uid, home, nil, bin+"/postgres", "-D", data, "-p", port,
		"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="+home, "-c", "fsync=off"))
	top.until("postgres", 30*time.Second, func() error {
		return top.as(t.Context(), uid, home, nil, bin+"/pg_isready", "-q", "-h", "127.0.0.1", "-p", port).Run()
	})
	create := top.as(t.Context(), uid, home, []string{"PGPASSWORD=" + password}, bin+"/createdb", "-h", "127.0.0.1", "-p", port, "-U", "temporal", "ledger")
	if out, err := create.CombinedOutput(); err != nil {
		t.Fatalf("createdb: %v\n%s", err, out)
	}
	return port
}

// clusterPorts returns settings for a Temporal server that give each of its
// services ports of its own, and the one that clients connect to.
func clusterPorts(t *testing.T) (env []string, frontend string) {
	t.Helper()
	names := []string{"FRONTEND_GRPC_PORT", "FRONTEND_HTTP_PORT", "FRONTEND_MEMBERSHIP_PORT", "MATCHING_GRPC_PORT", "MATCHING_MEMBERSHIP_PORT",
		"HISTORY_GRPC_PORT", "HISTORY_MEMBERSHIP_PORT", "WORKER_GRPC_PORT", "WORKER_MEMBERSHIP_PORT"}
	free := ports(t, len(names))
	for i, name := range names {
		env = append(env, name+"="+free[i])
	}
	return env, free[0]
}

// cluster starts Temporal on the database by the compose file's own script.
func (top *topology) cluster(database string) {
	env := []string{"POSTGRES_SEEDS=127.0.0.1", "DB_PORT=" + database, "POSTGRES_USER=temporal", "POSTGRES_PWD=" + password,
		"BIND_ON_IP=127.0.0.1", "TEMPORAL_BROADCAST_ADDRESS=127.0.0.1", "LOG_LEVEL=error", "DYNAMIC_CONFIG_FILE_PATH=" + filepath.Join(top.dir, "etc", "dynamic.yaml")}
	more, frontend := clusterPorts(top.t)
	env = append(env, more...)
	top.temporal = "127.0.0.1:" + frontend
	top.start("temporal", top.as(context.Background(), temporalUser, top.home("temporal", temporalUser), env, filepath.Join(top.dir, "etc", "start.sh")))
}

// webPage starts Temporal's page and returns its address.
func (top *topology) webPage() string {
	port := ports(top.t, 1)[0]
	root := filepath.Join(top.bin, "temporal-ui")
	top.start("ui", top.as(context.Background(), temporalUser, top.home("ui", temporalUser), []string{"TEMPORAL_ADDRESS=" + top.temporal, "TEMPORAL_UI_PORT=" + port},
		"temporal-ui-server", "--root", root, "--env", "docker", "start"))
	return "http://127.0.0.1:" + port
}

// gitServer serves a repository with one commit and returns its URL.
func (top *topology) gitServer() string {
	t := top.t
	t.Helper()
	dir := filepath.Join(top.dir, "git")
	env := []string{"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.invalid", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.invalid"}
	top.run(env, "sh", "-ec", `git init -q -b main "$1/work"; cd "$1/work"; echo hello > README; git add .; git commit -qm first; git clone -q --bare . "$1/repo.git"`, "sh", dir)
	core := strings.TrimSpace(top.run(nil, "git", "--exec-path"))
	srv := httptest.NewServer(&cgi.Handler{
		Path: filepath.Join(core, "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + dir},
	})
	t.Cleanup(srv.Close)
	return srv.URL + "/repo.git"
}

// worker starts one, with its state in home.
func (top *topology) worker(name, home, database string) *service {
	env := []string{"TEMPORAL_ADDRESS=" + top.temporal, "SANDBOX_TEMPORAL_HOME=" + filepath.Join(home, "state"), "METRICS_PORT=0",
		"SANDBOX_TEMPORAL_LEDGER_URL=postgres://temporal:" + password + "@127.0.0.1:" + database + "/ledger", "ANTHROPIC_API_KEY=not-a-secret-either"}
	return top.start(name, top.as(context.Background(), workerUser, home, env, "sandbox-temporal", "worker"))
}

// goOn marks the agents of this test, which wait for a signal.
const goOn = "topology-goes-on"

// agents returns the shells of the agents that wait, as this host numbers them.
func agents(t *testing.T) []int {
	t.Helper()
	return slices.DeleteFunc(naming(t, "went="+goOn), func(pid int) bool {
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		return err != nil || strings.TrimSpace(string(name)) != "sh"
	})
}

// naming returns the processes that have word in their command line, other
// than this one.
func naming(t *testing.T, word string) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, file := range files {
		line, err := os.ReadFile(file)
		pid, e := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err == nil && e == nil && pid != os.Getpid() && bytes.Contains(line, []byte(word)) {
			found = append(found, pid)
		}
	}
	return found
}

func TestTopologyOfTheComposeFileCarriesARunOverAWorkersRestart(t *testing.T) {
	top := newTopology(t)
	database := top.postgres()
	top.cluster(database)
	page := top.webPage()

	person := top.home("person", personUser)
	say := func(args ...string) ([]byte, error) {
		cmd := top.as(t.Context(), personUser, person, []string{"TEMPORAL_ADDRESS=" + top.temporal, "SANDBOX_TEMPORAL_HOME=" + filepath.Join(person, "state"), "NO_COLOR=1"},
			append([]string{"sandbox-temporal"}, args...)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, out, stderr.Bytes())
		}
		return out, err
	}
	top.until("namespace create", 1*time.Minute, func() error { _, err := say("namespace", "create"); return err })
	if out, err := say("namespace", "create"); err != nil || !strings.Contains(string(out), "was there already") {
		t.Fatalf("the second namespace create: %s %v", out, err)
	}

	home := top.home("worker", workerUser)
	first := top.worker("worker-1", home, database)
	out, err := say("fork", top.gitServer(), "-p", "hello there", "--agent", "command",
		"--agent-command", "trap 'went="+goOn+"' USR1; echo {prompt} >> out.txt; until [ \"$went\" ]; do sleep 0.1; done; echo done >> out.txt", "--forks", "5", "--max-concurrent", "5", "--no-wait")
	if err != nil {
		t.Fatal(err)
	}
	run := strings.TrimSpace(string(out))
	status := func() (s struct {
		Running    int `json:"running"`
		Pending    int `json:"pending"`
		Successful int `json:"successful"`
		Total      int `json:"total_forks"`
		Results    []struct {
			Error string `json:"error"`
		} `json:"results"`
	}, err error) {
		out, err := say("status", run, "-o", "json")
		if err == nil {
			err = json.Unmarshal(out, &s)
		}
		return s, err
	}
	top.until("five agents at work", 3*time.Minute, func() error {
		if n := len(agents(t)); n != 5 {
			return fmt.Errorf("%d of them", n)
		}
		return nil
	})

	// The restart: the worker lets go of its agents and another takes them up.
	first.end(syscall.SIGTERM)
	if code := first.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the worker ended with %d on SIGTERM", code)
	}
	second := top.worker("worker-2", home, database)
	at := agents(t)
	if len(at) != 5 {
		t.Fatalf("%d agents outlived their worker", len(at))
	}
	for _, pid := range at {
		if err := syscall.Kill(pid, syscall.SIGUSR1); err != nil {
			t.Error(err)
		}
	}
	top.until("the end of the run", 3*time.Minute, func() error {
		s, err := status()
		if err != nil || s.Running+s.Pending > 0 {
			return fmt.Errorf("%d running, %d pending: %w", s.Running, s.Pending, err)
		}
		if s.Successful != 5 || s.Total != 5 {
			t.Fatalf("%d of %d succeeded: %+v", s.Successful, s.Total, s.Results)
		}
		return nil
	})

	// Every agent ran once, from its beginning to its end.
	repos, err := filepath.Glob(filepath.Join(home, "state", "*", "*", run+"*"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, dir := range repos {
		for n := range 5 {
			cmd := exec.CommandContext(t.Context(), "git", "-c", "safe.directory=*", "-C", dir, "show", fmt.Sprintf("sandbox/%s/%d:out.txt", run, n+1))
			if text, err := cmd.Output(); err == nil {
				found++
				if string(text) != "hello there\ndone\n" {
					t.Errorf("fork %d wrote %q", n+1, text)
				}
			}
		}
	}
	if found != 5 {
		t.Errorf("%d branches in %q", found, repos)
	}

	// Runs can be found by their attributes, on the page too.
	top.until("the run in lists by its attributes", time.Minute, func() error {
		for query, want := range map[string]bool{
			"SandboxStatus = 'success' AND SandboxCostUSD < 1": true, "SandboxRun = '" + run + "'": true, "SandboxStatus = 'failed'": false,
		} {
			if out, err := say("list", "--query", query); err != nil || strings.Contains(string(out), run) != want {
				return fmt.Errorf("%s: %s %w", query, out, err)
			}
		}
		return nil
	})
	res, err := http.Get(page + "/api/v1/namespaces/default/workflows?query=" + `SandboxStatus%3D%22success%22`)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusOK || bytes.Count(body, []byte(`"`+run+`-fork-`)) < 5 {
		t.Errorf("the page: %s %v\n%s", res.Status, err, body)
	}
	second.end(syscall.SIGTERM)
	if left, err := filepath.Glob(filepath.Join(home, "state", "sandboxes", "*", "supervisor.sock")); err != nil || len(left) > 0 {
		t.Errorf("left: %q %v", left, err)
	}
}
