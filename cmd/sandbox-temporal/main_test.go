package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact/s3test"
	"github.com/sandbox-temporal/sandbox-temporal/internal/demo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// TestSessions runs testdata/script/*.txtar against the real program, which
// has an engine of its own in every session. The folder is globbed: there is
// no list to forget a script in.
func TestSessions(t *testing.T) {
	bin := builtProgram(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup:               func(e *testscript.Env) error { return setUp(e, bin) },
		Condition:           condition,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"gorepo": cmdGorepo, "standin": cmdStandin, "far": cmdFar, "requests": cmdRequests, "until": cmdUntil, "field": cmdField, "kill9": cmdKill9,
			"gone": cmdGone, "spares": cmdSpares, "nokey": cmdNokey, "most": cmdMost, "costs": cmdCosts, "overshoot": cmdOvershoot, "hostport": cmdHostport, "samepid": cmdSamepid,
			"elapsed": cmdElapsed, "gitserver": cmdGitserver, "tmpfs": cmdTmpfs, "bigfile": cmdBigfile, "history": cmdHistory, "fetch": cmdFetch, "address": cmdAddress, "runid": cmdRunid, "details": cmdDetails, "postgres": cmdPostgres,
			"s3server": cmdS3server, "s3holds": cmdS3holds,
			"prometheus": cmdPrometheus, "panels": cmdPanels, "query": cmdQuery, "e2bserver": cmdE2bserver, "e2bgone": cmdE2bgone, "e2bkill": cmdE2bkill, "e2bfault": cmdE2bfault,
			"collector": cmdCollector, "traced": cmdTraced, "spans": cmdSpans, "billed": cmdBilled, "stored": cmdStored, "opened": cmdOpened, "sandboxed": cmdSandboxed,
		},
	})
}

// builtProgram returns the folder of the program under test. It is the one
// that "make build" made, named by SANDBOX_TEMPORAL_BIN, or is built here.
func builtProgram(t *testing.T) string {
	t.Helper()
	if exe := os.Getenv("SANDBOX_TEMPORAL_BIN"); exe != "" {
		return filepath.Dir(exe)
	}
	dir := t.TempDir()
	for _, name := range []string{"sandbox-temporal", "sandbox-supervisor", "sandbox-worker"} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "../"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", name, err, out)
		}
	}
	return dir
}

// session is what one script has beside its files.
type session struct {
	model   *standin.Server
	key     string // the real one of the model API; cmdNokey looks where it must not be
	started time.Time
	pids    map[string]string
	e2b     *e2btest.Server
	s3      *s3test.Server
	relay   *relay // to a model that is far away
	healed  func() // ends what goes wrong there

	prometheus string     // URL of the server that watches the engine
	collector  *collector // of traces
	billed     int        // of the model's requests, how many were checked
}

type sessionKey struct{}

func of(ts *testscript.TestScript) *session { return ts.Value(sessionKey{}).(*session) }

func setUp(e *testscript.Env, bin string) error {
	home := filepath.Join(e.WorkDir, "home")
	state := filepath.Join(e.WorkDir, "state")
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	s := &session{key: "sk-ant-session-test-" + rand.Text(), started: time.Now(), pids: map[string]string{}}
	e.Values[sessionKey{}] = s
	goenv, err := exec.Command("go", "env", "GOROOT", "GOCACHE").Output()
	if err != nil {
		return err
	}
	goroot, gocache, _ := strings.Cut(strings.TrimSpace(string(goenv)), "\n")
	path := bin + ":" + filepath.Join(goroot, "bin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	e.Vars = append(e.Vars,
		"HOME="+home, "PATH="+path, "SANDBOX_TEMPORAL_HOME="+state, "STATE="+state,
		"SANDBOX_TEMPORAL_PORT=0", "SANDBOX_TEMPORAL_UI_PORT=0", "METRICS_PORT=0",
		"ANTHROPIC_API_KEY="+s.key, "OPENAI_API_KEY="+s.key, "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.invalid", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.invalid",
		"NO_COLOR=1", "TERM=dumb", "GOCACHE="+gocache,
	)
	if claude := claudePath(); claude != "" {
		e.Vars = append(e.Vars, "CLAUDE="+claude)
	}
	for name := range otherAgents {
		e.Vars = append(e.Vars, strings.ToUpper(name)+"="+otherPath(name))
	}
	if runsc := os.Getenv("SANDBOX_TEMPORAL_RUNSC"); runsc != "" {
		e.Vars = append(e.Vars, "SANDBOX_TEMPORAL_RUNSC="+runsc)
	}
	// Whatever happens in the script, its engine and its sandboxes go.
	e.Defer(func() {
		down := exec.Command(filepath.Join(bin, "sandbox-temporal"), "down")
		down.Env = e.Vars
		if out, err := down.CombinedOutput(); err != nil {
			e.T().Log(fmt.Sprintf("down: %v\n%s", err, out))
		}
		for pid := range cmdlines() { // workers, and engines of other state folders
			env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			if pid != os.Getpid() && bytes.Contains(env, []byte(e.WorkDir+"/")) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		// Those that are kept ready end with their engine, however it ended.
		spares := eventually(10*time.Second, func() error {
			left := sparesOf(e.WorkDir)
			folders, err := filepath.Glob(filepath.Join(e.WorkDir, "*", "sandboxes", "sandboxes", ".new-*"))
			if len(left) > 0 || len(folders) > 0 || err != nil {
				return errors.Join(err, fmt.Errorf("spare sandboxes outlive their engine: processes %v, folders %v", left, folders))
			}
			return nil
		})
		destroyBoxes(e.T(), e.WorkDir)
		for pid := range processesOf(e.WorkDir) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		unmountBelow(e.WorkDir)
		if s.model != nil {
			s.model.Close()
		}
		if s.e2b != nil {
			if err := s.e2b.Close(); err != nil {
				e.T().Log(err)
			}
		}
		if spares != nil {
			logs, _ := filepath.Glob(filepath.Join(e.WorkDir, "*", "sandboxes", "sandboxes", ".new-*", "log"))
			for _, name := range logs {
				said, _ := os.ReadFile(name)
				e.T().Log(name, string(said))
			}
			e.T().Fatal(spares)
		}
	})
	return nil
}

// claudePath finds the real Claude Code CLI that the tests' package.json
// pins, or the one that the environment names.
func claudePath() string {
	if p := os.Getenv("SANDBOX_TEMPORAL_CLAUDE"); p != "" {
		return p
	}
	p, err := filepath.Abs("../../tests/node_modules/@anthropic-ai/claude-code-linux-x64/claude")
	if err != nil {
		return ""
	}
	if _, err := os.Stat(p); err != nil {
		return ""
	}
	return p
}

// otherAgents are where npm puts the native programs of agents of other makers.
var otherAgents = map[string]string{
	"codex":    "../../tests/node_modules/@openai/codex-linux-*/vendor/*/bin/codex",
	"opencode": "../../tests/node_modules/opencode-linux-*/bin/opencode",
}

func otherPath(name string) string {
	found, err := filepath.Glob(otherAgents[name])
	if err != nil || len(found) == 0 {
		return ""
	}
	path, err := filepath.Abs(found[0])
	if err != nil {
		return ""
	}
	return path
}

func condition(name string) (bool, error) {
	switch name {
	case "codex", "opencode":
		return otherPath(name) != "", nil
	case "claude":
		return claudePath() != "", nil
	case "postgres":
		return ledgertest.Available(), nil
	case "prometheus":
		_, err := exec.LookPath("prometheus")
		return err == nil, nil
	case "gvisor":
		return os.Getenv("SANDBOX_TEMPORAL_RUNSC") != "", nil
	case "root":
		return os.Getuid() == 0, nil
	}
	return false, fmt.Errorf("no condition %q", name)
}

// cmdGorepo writes the demo's repository: gorepo DIR.
func cmdGorepo(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(demo.WriteRepo(context.Background(), ts.MkAbs(args[0])))
}

// cmdStandin starts a stand-in for the model API: standin [SCRIPTS.json]. The
// demo's scripts are always there.
func cmdStandin(ts *testscript.TestScript, _ bool, args []string) {
	scripts := demo.Scripts()
	if len(args) > 0 {
		more, err := standin.ParseScripts(strings.NewReader(ts.ReadFile(args[0])))
		ts.Check(err)
		for name, s := range more {
			scripts[name] = s
		}
	}
	s := of(ts)
	s.model = standin.New(standin.Options{Scripts: scripts, Keys: []string{s.key}})
	srv := httptest.NewServer(s.model)
	ts.Defer(func() { s.model.Close(); srv.Close() })
	ts.Setenv("ANTHROPIC_BASE_URL", srv.URL)
	ts.Setenv("OPENAI_BASE_URL", srv.URL+"/v1")
}

// cmdPostgres starts a PostgreSQL server and makes a variable the address of a
// database on it: postgres VARIABLE.
func cmdPostgres(ts *testscript.TestScript, _ bool, args []string) {
	server, err := ledgertest.Start(true)
	ts.Check(err)
	ts.Defer(func() {
		if err := server.Stop(); err != nil {
			ts.Logf("%v", err)
		}
	})
	url, err := server.URL()
	ts.Check(err)
	ts.Setenv(args[0], url)
}

// cmdS3server starts a server that speaks S3, makes a variable the store in a
// folder of its bucket, and gives the session the keys: s3server VARIABLE FOLDER.
func cmdS3server(ts *testscript.TestScript, _ bool, args []string) {
	s := of(ts)
	var err error
	s.s3, err = s3test.Start()
	ts.Check(err)
	ts.Defer(s.s3.Close)
	ts.Setenv(args[0], s.s3.Place(args[1]))
	ts.Setenv("AWS_ACCESS_KEY_ID", s3test.KeyID)
	ts.Setenv("AWS_SECRET_ACCESS_KEY", s3test.Secret)
}

// cmdS3holds checks that the bucket has something below each prefix: s3holds
// PREFIX….
func cmdS3holds(ts *testscript.TestScript, _ bool, args []string) {
	store, err := artifact.Open(context.Background(), of(ts).s3.Place(""), artifact.WithKeys(func() artifact.Keys {
		return artifact.Keys{ID: s3test.KeyID, Secret: s3test.Secret}
	}))
	ts.Check(err)
	defer store.Close()
	all := []string{}
	for o, err := range store.List(context.Background(), "") {
		ts.Check(err)
		all = append(all, o.Key)
	}
	for _, prefix := range args {
		if !slices.ContainsFunc(all, func(key string) bool { return strings.HasPrefix(key, prefix) }) {
			ts.Fatalf("nothing is below %s, but there is %q", prefix, all)
		}
	}
}

// cmdRequests compares the number of model calls that were answered:
// requests N.
func cmdRequests(ts *testscript.TestScript, neg bool, args []string) {
	n := 0
	for _, r := range of(ts).model.Requests() {
		if r.Outcome == standin.Answered && strings.HasSuffix(r.Path, "/messages") {
			n++
		}
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if (n == want) == neg {
		ts.Fatalf("the model answered %d calls, want %d (negated: %v)", n, want, neg)
	}
}

// cmdUntil repeats a command until its output matches: until SECONDS REGEXP
// PROGRAM ARGS…
func cmdUntil(ts *testscript.TestScript, _ bool, args []string) {
	limit, err := strconv.Atoi(args[0])
	ts.Check(err)
	want := regexp.MustCompile(args[1])
	var out []byte
	pause := 50 * time.Millisecond
	for end := time.Now().Add(time.Duration(limit) * time.Second); time.Now().Before(end); {
		program, err := lookPath(ts, args[2])
		ts.Check(err)
		cmd := exec.Command(program, args[3:]...)
		cmd.Env, cmd.Dir = environ(ts), ts.MkAbs(".")
		out, _ = cmd.CombinedOutput() // it may fail until it does not
		if want.Match(out) {
			return
		}
		time.Sleep(pause) // between two looks at another process, each of which takes what others need to get there
		pause = min(pause*2, 400*time.Millisecond)
	}
	ts.Fatalf("not within %d s: %s\n%s", limit, args[1], out)
}

func environ(ts *testscript.TestScript) []string {
	var env []string
	for _, name := range []string{"HOME", "PATH", "SANDBOX_TEMPORAL_HOME", "SANDBOX_TEMPORAL_PORT", "SANDBOX_TEMPORAL_UI_PORT", "METRICS_PORT",
		"ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "NO_COLOR", "TERM", "WORK", "TMPDIR", "TEMPORAL_ADDRESS", "TEMPORAL_TASK_QUEUE",
		"SANDBOX_TEMPORAL_LEDGER_URL", "SANDBOX_TEMPORAL_BUDGET_PER_DAY", "SANDBOX_TEMPORAL_ARTIFACTS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} {
		if v := ts.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

func lookPath(ts *testscript.TestScript, name string) (string, error) {
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && !st.IsDir() {
			return p, nil
		}
	}
	return "", errors.New(name + " is not on the session's PATH")
}

// cmdField looks into JSON: field FILE PATH REGEXP, where PATH is like
// results.0.status.
func cmdField(ts *testscript.TestScript, neg bool, args []string) {
	dec := json.NewDecoder(strings.NewReader(ts.ReadFile(args[0])))
	dec.UseNumber()
	var v any
	ts.Check(dec.Decode(&v))
	for _, key := range strings.Split(args[1], ".") {
		switch x := v.(type) {
		case map[string]any:
			v = x[key]
		case []any:
			if key == "length" {
				v = len(x)
				continue
			}
			i, err := strconv.Atoi(key)
			ts.Check(err)
			if i >= len(x) {
				ts.Fatalf("%s: only %d elements", args[1], len(x))
			}
			v = x[i]
		default:
			ts.Fatalf("%s: nothing below %v", args[1], v)
		}
	}
	if got := fmt.Sprint(v); regexp.MustCompile(args[2]).MatchString(got) == neg {
		ts.Fatalf("%s is %q, want %s (negated: %v)", args[1], got, args[2], neg)
	}
}

// cmdKill9 kills the engine of the session as a crash would.
func cmdKill9(ts *testscript.TestScript, _ bool, _ []string) {
	ep, err := endpoint.Read(ts.Getenv("STATE"))
	ts.Check(err)
	ts.Check(syscall.Kill(ep.PID, syscall.SIGKILL))
	for ep.Alive() {
		time.Sleep(5 * time.Millisecond) // until the kernel is done with it
	}
}

// cmdSamepid remembers, and then compares, which process of a sandbox has an
// argument: samepid NAME ARGUMENT.
func cmdSamepid(ts *testscript.TestScript, _ bool, args []string) {
	var pids []string
	for pid, cmdline := range cmdlines() {
		for _, a := range cmdline[1:] {
			if a == args[1] {
				pids = append(pids, strconv.Itoa(pid))
				break
			}
		}
	}
	if len(pids) != 1 {
		ts.Fatalf("%d processes have the argument %s: %v", len(pids), args[1], pids)
	}
	s := of(ts)
	if before, ok := s.pids[args[0]]; ok && before != pids[0] {
		ts.Fatalf("process %s was %s and is %s now", args[0], before, pids[0])
	}
	s.pids[args[0]] = pids[0]
}

// cmdGone checks that nothing of the session's sandboxes is left: no process, no
// mount, no folder. What is kept ready is none of a fork's, see isSpare.
func cmdGone(ts *testscript.TestScript, _ bool, _ []string) {
	state := filepath.Join(ts.Getenv("STATE"), "sandboxes")
	var left []string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		left = left[:0]
		for pid, args := range processesOf(state) {
			if !isSpare(args) {
				left = append(left, fmt.Sprint("process ", pid, " ", args))
			}
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		ts.Check(err)
		for _, line := range strings.Split(string(mounts), "\n") {
			if strings.Contains(line, state) {
				left = append(left, "mount "+line)
			}
		}
		if len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		ts.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
	}
	entries, err := os.ReadDir(state)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		ts.Fatalf("%v", err)
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), "sandbox-orch-") {
			ts.Fatalf("left behind: %s", filepath.Join(state, e.Name()))
		}
	}
}

func cmdlines() map[int][]string {
	all := map[int][]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if b, err := os.ReadFile(dir + "/cmdline"); err == nil && len(b) > 0 {
			all[pid] = strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
		}
	}
	return all
}

// destroyBoxes ends the local sandboxes that a script has left in a state folder
// of its, which are more than processes.
func destroyBoxes(t testscript.T, work string) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	dirs, err := filepath.Glob(filepath.Join(work, "*", "sandboxes"))
	for _, dir := range dirs {
		p := local.New(local.Options{Dir: dir, Supervisor: []string{"true"}})
		boxes, listErr := p.List(ctx, nil)
		err = errors.Join(err, listErr)
		for _, b := range boxes {
			err = errors.Join(err, p.Destroy(ctx, b.Ref))
		}
	}
	if err != nil {
		t.Log(err)
	}
}

// isSpare reports whether the process is a local sandbox that is kept ready, for
// as long as its engine lives and wants it: one that was called has no folder of
// that name any more.
func isSpare(args []string) bool {
	if len(args) != 3 || args[1] != "spare" {
		return false
	}
	_, err := os.Lstat(args[2])
	return err == nil
}

func sparesOf(dir string) map[int][]string {
	found := processesOf(dir)
	maps.DeleteFunc(found, func(_ int, args []string) bool { return !isSpare(args) })
	return found
}

// cmdSpares waits until so many local sandboxes are kept ready: spares N.
func cmdSpares(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	ts.Check(eventually(20*time.Second, func() error {
		if got := len(sparesOf(ts.Getenv("WORK"))); got != n {
			return fmt.Errorf("%d spare sandboxes, not %d", got, n)
		}
		return nil
	}))
}

// processesOf finds the processes that have dir, or what is in it, on their
// command line. A name that only begins as dir does is another session's.
func processesOf(dir string) map[int][]string {
	found := cmdlines()
	maps.DeleteFunc(found, func(pid int, args []string) bool {
		line := strings.Join(args, " ") + " "
		return pid == os.Getpid() || !strings.Contains(line, dir+"/") && !strings.Contains(line, dir+" ")
	})
	return found
}

func unmountBelow(dir string) {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	lines := strings.Split(string(mounts), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			_ = syscall.Unmount(f[4], syscall.MNT_DETACH)
		}
	}
}

// keyForms are the ways in which a key could stand in a file: as it is, and
// within base64, which depends on where it begins there.
func keyForms(key string) [][]byte {
	forms := [][]byte{[]byte(key)}
	for begin := range 3 { // of the first group of three bytes
		inner := key[begin:]
		inner = inner[:len(inner)/3*3]
		forms = append(forms, []byte(base64.StdEncoding.EncodeToString([]byte(inner))))
	}
	return forms
}

// cmdNokey checks that the real key stands in no file of the session but the
// one that is for it, and in the environment of no process of a sandbox. Each
// session has a key of its own: what runs beside it is another's.
func cmdNokey(ts *testscript.TestScript, _ bool, _ []string) {
	state, key := ts.Getenv("STATE"), of(ts).key
	read := map[string]bool{} // what there is of runs in databases, so that their silence about the key says something
	ts.Check(filepath.WalkDir(ts.MkAbs("."), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == filepath.Join(state, "secrets") {
			return nil // a file that went away has no key in it
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		for _, text := range keyForms(key) {
			if bytes.Contains(b, text) {
				return fmt.Errorf("%s holds the real key", path)
			}
		}
		if bytes.Contains(b, []byte("sandbox-orch-")) {
			name, _, _ := strings.Cut(filepath.Base(path), ".db")
			read[name] = true
		}
		return nil
	}))
	for _, name := range []string{"temporal", "ledger"} { // workflow histories, and the books
		if !read[name] {
			ts.Fatalf("no run is found in %s.db: this check sees nothing", name)
		}
	}
	st, err := os.Stat(filepath.Join(state, "secrets"))
	ts.Check(err)
	if st.Mode().Perm() != 0o600 {
		ts.Fatalf("the file of credentials has mode %v", st.Mode())
	}
	ep, err := endpoint.Read(state)
	ts.Check(err)
	if res, err := http.Get(ep.Metrics); err == nil { // it may be down
		text, err := io.ReadAll(res.Body)
		ts.Check(errors.Join(err, res.Body.Close()))
		if bytes.Contains(text, []byte(key)) {
			ts.Fatalf("the metrics hold the real key")
		}
	}
	for pid, args := range cmdlines() {
		if pid == os.Getpid() || pid == os.Getppid() {
			continue
		}
		if strings.Contains(strings.Join(args, " "), key) {
			ts.Fatalf("process %d %v has the real key on its command line", pid, args)
		}
		env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if bytes.Contains(env, []byte(key)) && (pid == ep.PID || strings.Contains(string(env), "/workspace")) {
			ts.Fatalf("process %d %v has the real key in its environment", pid, cmdlines()[pid])
		}
	}
}

var forkID = regexp.MustCompile(`sandbox-orch-[0-9a-f]{8}-fork-\d+`)

// cmdMost follows a run to its end and checks that never more forks ran than
// allowed: most RUN N.
func cmdMost(ts *testscript.TestScript, _ bool, args []string) {
	allowed, err := strconv.Atoi(args[1])
	ts.Check(err)
	program, err := lookPath(ts, "sandbox-temporal")
	ts.Check(err)
	most := 0
	end := time.Now().Add(3 * time.Minute)
	for look := 0; time.Now().Before(end); look++ {
		// The sandboxes that have a process are the truth; the report must agree.
		alive := map[string]bool{}
		for _, args := range cmdlines() {
			line := strings.Join(args, " ")
			if strings.Contains(line, ts.Getenv("STATE")) {
				alive[forkID.FindString(line)] = true
			}
		}
		delete(alive, "")
		most = max(most, len(alive))
		var p struct {
			Running, Pending int
			Status           string
		}
		if look%4 == 0 { // it takes a program and the engine, which the forks wait for too
			cmd := exec.Command(program, "status", args[0], "-o", "json")
			cmd.Env = environ(ts)
			out, err := cmd.Output()
			ts.Check(err)
			ts.Check(json.Unmarshal(out, &p))
			most = max(most, p.Running)
		}
		if most > allowed {
			ts.Fatalf("%d forks at once, %d are allowed: %v, and by the report %+v", most, allowed, slices.Sorted(maps.Keys(alive)), p)
		}
		if p.Status != "" && p.Status != "running" {
			if most < allowed {
				ts.Fatalf("never more than %d forks at once were seen: this check saw nothing", most)
			}
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	ts.Fatalf("the run did not end")
}

// cmdCosts compares the cost of every fork in a report with what Claude Code
// itself says in its transcript: costs REPORT.json.
func cmdCosts(ts *testscript.TestScript, _ bool, args []string) {
	var rep struct {
		Run     string `json:"workflow_id"`
		Results []struct {
			Num  int         `json:"fork_num"`
			Cost json.Number `json:"cost_usd"`
		}
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &rep))
	if len(rep.Results) == 0 {
		ts.Fatalf("no results in %s", args[0])
	}
	program, err := lookPath(ts, "sandbox-temporal")
	ts.Check(err)
	for _, r := range rep.Results {
		cmd := exec.Command(program, "logs", fmt.Sprintf("%s/%d", rep.Run, r.Num), "--raw")
		cmd.Env = environ(ts)
		out, err := cmd.Output()
		ts.Check(err)
		var said float64
		for _, line := range strings.Split(string(out), "\n") {
			var e struct {
				Type string
				Cost float64 `json:"total_cost_usd"`
			}
			if json.Unmarshal([]byte(line), &e) == nil && e.Type == "result" {
				said = e.Cost
			}
		}
		ours, err := r.Cost.Float64()
		ts.Check(err)
		if said == 0 || ours-said > 5e-10 || said-ours > 5e-10 {
			ts.Fatalf("fork %d cost %v by the ledger and %v by the agent", r.Num, ours, said)
		}
	}
}

// cmdElapsed checks how long ago it was called last: elapsed reset, elapsed
// SECONDS.
func cmdElapsed(ts *testscript.TestScript, _ bool, args []string) {
	s := of(ts)
	if args[0] != "reset" {
		limit, err := strconv.ParseFloat(args[0], 64)
		ts.Check(err)
		if took := time.Since(s.started); took > time.Duration(limit*float64(time.Second)) {
			ts.Fatalf("took %s, at most %s s are allowed", took, args[0])
		}
	}
	s.started = time.Now()
}
