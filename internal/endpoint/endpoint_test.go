package endpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// roleEnv makes the test binary one of the processes that a test needs.
const roleEnv = "ENDPOINT_TEST_ROLE"

func TestMain(m *testing.M) {
	role, dir, _ := strings.Cut(os.Getenv(roleEnv), ":")
	var err error
	switch role {
	case "":
		os.Exit(m.Run())
	case "engine":
		err = beEngine(dir)
	case "starter":
		err = beStarter(dir)
	case "user 0", "user 65534":
		err = beUser(role, dir)
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// beEngine does what an engine does, in its order.
func beEngine(dir string) error {
	l, err := Acquire(dir)
	if err != nil {
		return err
	}
	defer func() { _ = l.Release() }()
	ln, err := l.Listen()
	if err != nil {
		return err
	}
	if err := Write(dir, Endpoint{Address: "127.0.0.1:7233", Identity: "test", Version: "v0"}); err != nil {
		return err
	}
	fmt.Println("up")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	err = Serve(ctx, ln, Control{
		Stop: cancel,
		SetSecrets: func(_ context.Context, b []byte) error {
			if string(b) == "refuse" {
				return fault.New("keep secrets", fault.Full, "no room").Hinted("Make room.")
			}
			return os.WriteFile(filepath.Join(dir, "secrets"), b, 0o600)
		},
		Status: func() any { return map[string]int{"pid": os.Getpid()} },
	})
	return errors.Join(err, Remove(dir))
}

// beStarter does what a command does that needs an engine: start one unless
// one runs. It says "started" or "found".
func beStarter(dir string) error {
	l, err := AcquireStart(context.Background(), dir)
	if err != nil {
		return err
	}
	defer func() { _ = l.Release() }()
	if e, err := Read(dir); err == nil && e.Alive() {
		fmt.Println("found", e.PID)
		return nil
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"=engine:"+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := Dial(dir).Ready(ctx); err != nil {
		return err
	}
	fmt.Println("started", cmd.Process.Pid)
	return nil
}

// beUser knocks at the socket as another user and says how many bytes came
// back.
func beUser(role, dir string) error {
	var uid int
	if _, err := fmt.Sscanf(role, "user %d", &uid); err != nil {
		return err
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
		return err
	}
	conn, err := net.Dial("unix", filepath.Join(dir, socketName))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET /v1/ready HTTP/1.0\r\n\r\n") // a stranger may find it closed
	b, _ := io.ReadAll(conn)
	fmt.Println(len(b))
	return nil
}

// spawn runs the test binary in a role and waits for the first line it says.
func spawn(t *testing.T, role, dir string) (*exec.Cmd, string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleEnv+"="+role+":"+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("%s said %q: %v", role, line, err)
	}
	return cmd, strings.TrimSpace(line)
}

// stateDir makes a state folder whose path may be far too long for a socket.
func stateDir(t *testing.T, deep bool) string {
	dir := filepath.Join(t.TempDir(), "state")
	if deep {
		dir = filepath.Join(dir, strings.Repeat("d", 100), strings.Repeat("e", 100))
	}
	if err := Prepare(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func wantKind(t *testing.T, err error, kind fault.Kind) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		t.Fatalf("got %v (%s), want %s", err, fault.KindOf(err), kind)
	}
}

func TestEndpointIsReadAsWritten(t *testing.T) {
	dir := stateDir(t, false)
	want := Endpoint{
		Address: "127.0.0.1:1", UI: "http://127.0.0.1:2", Metrics: "http://127.0.0.1:3/metrics", PID: 7, StartTime: 1 << 60,
		Boot: "b", Identity: "i", Version: "v", Socket: "/s", Started: time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC),
	}
	if err := Write(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	st, err := os.Stat(filepath.Join(dir, fileName))
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

func TestWriteNamesThisProcess(t *testing.T) {
	dir := stateDir(t, false)
	if err := Write(dir, Endpoint{Address: "127.0.0.1:1"}); err != nil {
		t.Fatal(err)
	}
	e, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if e.PID != os.Getpid() || !e.Alive() || e.Socket != filepath.Join(dir, "engine.sock") || e.Started.IsZero() {
		t.Errorf("%+v, alive %v", e, e.Alive())
	}
	other := e
	other.StartTime++
	if other.Alive() {
		t.Error("another process with our pid passes for us")
	}
	other = e
	other.Boot += "x"
	if other.Alive() {
		t.Error("a process of another boot passes for us")
	}
}

func TestReadOfNothingIsNotFound(t *testing.T) {
	_, err := Read(filepath.Join(t.TempDir(), "never"))
	wantKind(t, err, fault.NotFound)
	dir := stateDir(t, false)
	_, err = Read(dir)
	wantKind(t, err, fault.NotFound)
	if err := Remove(dir); err != nil {
		t.Errorf("remove what is not there: %v", err)
	}
}

func TestReadRefusesAFileThatIsNotAnEndpoint(t *testing.T) {
	dir := stateDir(t, false)
	for _, text := range []string{"", "{", "[]", "{}", `{"pid":-1,"address":"x"}`, strings.Repeat(" ", maxFile+1) + `{"pid":1,"address":"x"}`} {
		if err := os.WriteFile(filepath.Join(dir, fileName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Read(dir)
		wantKind(t, err, fault.Invalid)
	}
}

func TestKilledEngineIsSeenAsDead(t *testing.T) {
	dir := stateDir(t, false)
	cmd, _ := spawn(t, "engine", dir)
	e, err := Read(dir)
	if err != nil || !e.Alive() || e.PID != cmd.Process.Pid {
		t.Fatalf("%+v, %v", e, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// Until it is waited for it is a zombie, which is dead as well.
	deadline := time.Now().Add(10 * time.Second)
	for e.Alive() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if e.Alive() {
		t.Error("the zombie passes for alive")
	}
	_ = cmd.Wait()
	if e.Alive() {
		t.Error("the dead passes for alive")
	}
	if _, err := Read(dir); err != nil {
		t.Errorf("its endpoint is gone: %v", err)
	}
	wantKind(t, Dial(dir).Ping(t.Context(), nil), fault.NotFound)
	// What it left must not be in the way of the next one.
	next, _ := spawn(t, "engine", dir)
	if err := Dial(dir).Ping(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if e, err := Read(dir); err != nil || e.PID != next.Process.Pid || !e.Alive() {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestParseStat(t *testing.T) {
	row := func(name, state string) string {
		return "42 (" + name + ") " + state + " 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 2 3\n"
	}
	for _, tt := range []struct {
		text string
		want process
	}{
		{row("cat", "S"), process{start: 987654}},
		{row("a) Z (b", "R"), process{start: 987654}},
		{row("", "Z"), process{start: 987654, zombie: true}},
	} {
		got, err := parseStat([]byte(tt.text))
		if err != nil || got != tt.want {
			t.Errorf("%q: %+v, %v", tt.text, got, err)
		}
	}
	for _, text := range []string{"", "1 (x) S 1", row("x", "S")[:30]} {
		if got, err := parseStat([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"pid":1,"address":"127.0.0.1:7233","started":"2030-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"pid":1e99}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := decode(text)
		if err == nil && (e.PID <= 0 || e.Address == "") {
			t.Errorf("%+v", e)
		}
		_ = e.Alive()
		_, _ = parseStat(text)
	})
}

var _ io.Closer = (*guarded)(nil)
