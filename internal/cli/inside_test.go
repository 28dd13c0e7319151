package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/fake"
)

// newInside is a session with a run of three forks: the first works in a
// sandbox of provider fake, the second has ended, the third has not begun.
func newInside(t *testing.T) (s *session, p *fake.Provider, ref sandbox.Ref) {
	t.Helper()
	m := newMemory()
	m.order = []string{testRun}
	m.plans[testRun] = fork.Plan{Provider: fake.ProviderName}
	m.report.Progress = fork.Progress{Run: testRun, Status: fork.Running, Total: 4, Running: 1, Pending: 1,
		Statuses: []fork.Status{fork.Running, fork.Success, fork.Pending, fork.Running}, Active: []int{1, 4}}
	s = newSession(t, m)
	dir, err := os.MkdirTemp("", "in") // t.TempDir of a test with a long name is too long for some
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p = fake.New(dir)
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.NewSet(p), nil }
	ref, err = p.Create(t.Context(), sandbox.Spec{Key: "box", Deadline: time.Now().Add(time.Minute), Labels: map[string]string{sandbox.LabelRun: testRun, sandbox.LabelFork: "1"}})
	if err != nil {
		t.Fatal(err)
	}
	return s, p, ref
}

func TestAttachRunsACommandAndPassesOnAllOfIt(t *testing.T) {
	s, _, _ := newInside(t)
	s.want(t, exitOK, "attach", "@last/1", "--", "sh", "-c", "echo out; echo err >&2; pwd")
	if !strings.HasPrefix(s.out.String(), "out\n") || !strings.HasSuffix(strings.TrimSpace(s.out.String()), sandbox.Workspace) || s.errors.String() != "err\n" {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	s.want(t, 42, "attach", "@last/1", "--", "sh", "-c", "exit 42")
	s.want(t, 127, "attach", "@last/1", "--", "no-such-program-anywhere")
	if !strings.Contains(s.errors.String(), "command not found") {
		t.Errorf("stderr %q", &s.errors)
	}
	s.want(t, exitOK, "attach", "@last/1", "--", "sh", "-c", "i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")
	if n := strings.Count(s.out.String(), "\n"); n != 20000 || !strings.HasSuffix(s.out.String(), "\n19999\n") {
		t.Errorf("%d lines came", n)
	}
}

func TestAttachReadsStandardInputWhenItIsForTheCommand(t *testing.T) {
	s, p, ref := newInside(t)
	s.env.Stdin = strings.NewReader("echo from a script\nexit 9\n")
	s.want(t, 9, "attach", "@last/1")
	if s.out.String() != "from a script\n" {
		t.Errorf("stdout %q", &s.out)
	}
	s.env.Stdin = strings.NewReader("binary \x00\x04\xff")
	s.want(t, exitOK, "attach", "@last/1", "--stdin", "--", "cat")
	if s.out.String() != "binary \x00\x04\xff" {
		t.Errorf("stdout %q", &s.out)
	}
	// A command that was not promised it does not wait for its end.
	r, w := io.Pipe()
	defer w.Close()
	s.env.Stdin = r
	s.want(t, exitOK, "attach", "@last/1", "--", "cat")
	// Nothing of it stays in the sandbox.
	sb, err := p.Attach(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	out, _, _, err := sandbox.Output(t.Context(), sb, "look", sandbox.Cmd{Args: []string{"ls", "-A", "/tmp"}}, 1000)
	if err != nil || len(out) > 0 {
		t.Errorf("left behind: %q, %v", out, err)
	}
}

func TestAttachEndsItsCommandWhenItIsInterrupted(t *testing.T) {
	s, _, _ := newInside(t)
	file := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.env.Args = []string{"attach", "@last/1", "--", "sh", "-c", "echo $$ > " + file + "; exec sleep 600"}
	code := make(chan int)
	go func() { code <- Main(ctx, s.env) }()
	pid := ""
	for end := time.Now().Add(20 * time.Second); pid == ""; time.Sleep(5 * time.Millisecond) { // another process
		b, _ := os.ReadFile(file)
		if pid = strings.TrimSpace(string(b)); pid == "" && time.Now().After(end) {
			t.Fatal("the command never ran")
		}
	}
	cancel()
	if got := <-code; got != exitDetached {
		t.Errorf("exit %d", got)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err != nil || !strings.Contains(string(stat), "600") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the command goes on")
		}
	}
}

func TestCommandsThatGoInsideSayWhenTheyCannot(t *testing.T) {
	s, p, ref := newInside(t)
	for _, words := range [][]string{{"attach"}, {"forward", "3000"}} {
		verb, rest := words[0], words[1:]
		try := func(code int, target, text string) {
			t.Helper()
			s.want(t, code, append([]string{verb, target}, rest...)...)
			if !strings.Contains(s.errors.String(), text) || strings.Count(s.errors.String(), "\n") != 2 {
				t.Errorf("%s %s: stderr %q, want %q and a hint", verb, target, &s.errors, text)
			}
		}
		try(exitNotFound, "@last/2", "has ended (success)")
		try(exitFailed, "@last/3", "has not started")
		try(exitFailed, "@last/4", "no sandbox that can be seen from here")
		try(exitNotFound, "@last/9", "has no fork 9")
		try(exitUsage, "@last", "for one fork")
		if err := p.Pause(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		try(exitFailed, "@last/1", "is paused")
		if err := p.Resume(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	s.want(t, exitUsage, "attach", "@last/1", "ls", "-la")
	s.want(t, exitUsage, "attach", "@last/1", "ls")
	if !strings.Contains(s.errors.String(), "Put -- before it: sandbox-temporal attach @last/1 -- ls") {
		t.Errorf("stderr %q", &s.errors)
	}
	s.want(t, exitUsage, "attach")
	s.want(t, exitUsage, "forward", "@last/1")
	for _, bad := range []string{"x", "0", "3000:0", "70000", "1:2:3", ":3000", "3000:", "-1"} {
		s.want(t, exitUsage, "forward", "--", "@last/1", bad)
	}
	// A provider that has a sandbox and nothing to go into it with.
	s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.NewSet(plainProvider{p}), nil }
	s.want(t, exitFailed, "forward", "@last/1", "3000")
	if !strings.Contains(s.errors.String(), "provider fake has no ports") {
		t.Errorf("stderr %q", &s.errors)
	}
	s.want(t, exitOK, "attach", "@last/1", "--", "true") // needs none of that
}

// A plainProvider has no optional capability.
type plainProvider struct{ sandbox.Provider }

// echoServer listens on the host, which is where the ports of a fake sandbox
// are.
func echoServer(t *testing.T) (port int, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port, func() { l.Close() }
}

// startForward runs the command in the background and returns what it printed.
func startForward(t *testing.T, s *session, args ...string) (ways []forwarding, end func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	s.env.Args, s.env.Stdout = append([]string{"forward", "@last/1", "-o", "json"}, args...), w
	code := make(chan int, 1)
	go func() {
		code <- Main(ctx, s.env)
		w.Close()
	}()
	end = func() int {
		cancel()
		return <-code
	}
	t.Cleanup(cancel)
	if err := json.NewDecoder(r).Decode(&ways); err != nil {
		t.Fatalf("%v, stderr %q", err, &s.errors)
	}
	go func() { _, _ = io.Copy(io.Discard, r) }()
	return ways, end
}

func talk(t *testing.T, address, text string) string {
	t.Helper()
	c, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() {
		_, _ = io.WriteString(c, text)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	b, _ := io.ReadAll(c) // a reset is an answer too
	return string(b)
}

func TestForwardCarriesConnectionsToTheSandbox(t *testing.T) {
	s, _, _ := newInside(t)
	port, stop := echoServer(t)
	ways, end := startForward(t, s, fmt.Sprintf("0:%d", port), fmt.Sprintf("0:%d", port))
	if len(ways) != 2 || ways[0].Port != port || ways[0].Address != fmt.Sprintf("127.0.0.1:%d", ways[0].Local) || ways[0].Local == ways[1].Local {
		t.Fatalf("%+v", ways)
	}
	long := strings.Repeat("0123456789", 100_000)
	for _, text := range []string{"hello", long, ""} {
		for _, w := range ways {
			if got := talk(t, w.Address, text); got != text {
				t.Errorf("%d bytes came back, want %d", len(got), len(text))
			}
		}
	}
	// A server that is down is one that hangs up, and the user hears of it,
	// once.
	stop()
	for range 3 {
		if got := talk(t, ways[0].Address, "hello"); got != "" {
			t.Errorf("%q from nobody", got)
		}
	}
	if code := end(); code != exitOK {
		t.Errorf("exit %d", code)
	}
	if n := strings.Count(s.errors.String(), "connection refused"); n == 0 || n > 4 {
		t.Errorf("stderr %q", &s.errors)
	}
	if _, err := net.Dial("tcp4", ways[0].Address); err == nil {
		t.Error("it still listens")
	}
}

func TestForwardSaysWhereItListens(t *testing.T) {
	s, p, ref := newInside(t)
	r, w := io.Pipe()
	defer r.Close()
	s.env.Stdout, s.env.Args = w, []string{"forward", "@last/1", "0:3000"}
	code := make(chan int, 1)
	go func() { code <- Main(t.Context(), s.env) }()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "127.0.0.1:") || !strings.HasSuffix(line, " leads to port 3000 of "+testRun+"/1\n") {
		t.Errorf("stdout %q, %v", line, err)
	}
	// It ends with the sandbox, also when nobody connects.
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if got := <-code; got != exitNotFound {
		t.Errorf("exit %d", got)
	}
	if !strings.Contains(s.errors.String(), "is gone: its fork has ended") {
		t.Errorf("stderr %q", &s.errors)
	}
}

func TestForwardTakesAllPortsOrNone(t *testing.T) {
	s, _, _ := newInside(t)
	taken, _ := echoServer(t)
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	s.want(t, exitFailed, "forward", "@last/1", fmt.Sprintf("%d:80", port), fmt.Sprintf("%d:80", taken))
	if !strings.Contains(s.errors.String(), fmt.Sprintf("cannot listen on port %d", taken)) || !strings.Contains(s.errors.String(), "0:80") {
		t.Errorf("stderr %q", &s.errors)
	}
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Errorf("the first port is still taken: %v", err)
	} else {
		l.Close()
	}
}

func TestPauseWithFreeze(t *testing.T) {
	s, _, _ := newInside(t)
	s.want(t, exitOK, "pause", "@last", "--freeze")
	if want := "standing still: fork 1, fork 4\nlet go on with: sandbox-temporal resume " + testRun + "\n"; s.errors.String() != want || len(s.runs.done) != 1 || s.runs.done[0] != "freeze "+testRun {
		t.Errorf("stderr %q, did %q", &s.errors, s.runs.done)
	}
	s.runs.failure = fault.New("", fault.Unsupported, "it cannot")
	s.want(t, exitFailed, "pause", "@last", "--freeze")
}
