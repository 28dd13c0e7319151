package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// paused reports what List says of the one sandbox there is.
func paused(t testing.TB, p *Provider) bool {
	t.Helper()
	infos, err := p.List(t.Context(), nil)
	if err != nil || len(infos) != 1 {
		t.Fatalf("list: %+v, %v", infos, err)
	}
	return infos[0].Paused
}

func TestAPausedSandboxDiesWithItsSupervisor(t *testing.T) {
	p := newProvider(t)
	word := marker("a-paused-supervisor")
	ref, sb := newSandbox(t, p, testSpec("frozen"))
	ctx := t.Context()
	if _, err := sb.Start(ctx, "two", sandbox.Cmd{Args: []string{"sh", "-c", "setsid sh -c 'while :; do sleep 1; done' " + word + " & wait", word}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both run", func() bool { return processesNaming(t, word) == 2 })
	if err := p.Pause(ctx, ref); err != nil {
		t.Fatal(err)
	}
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(h.Supervisor.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no process is left", func() bool { return processesNaming(t, word) == 0 })
	eventually(t, "the list has tidied up", func() bool {
		infos, err := p.List(ctx, nil)
		return err == nil && len(infos) == 0
	})
}

func TestDestroyOfAPausedSandboxDoesNotNeedItsSupervisor(t *testing.T) {
	p := newProvider(t)
	word := marker("a-paused-and-stopped")
	ref, sb := newSandbox(t, p, testSpec("stuck"))
	ctx := t.Context()
	if _, err := sb.Start(ctx, "one", sandbox.Cmd{Args: []string{"sh", "-c", "while :; do sleep 1; done", word}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Pause(ctx, ref); err != nil {
		t.Fatal(err)
	}
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	stop(t, h.Supervisor.PID)
	if err := p.Destroy(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if n := processesNaming(t, word) + processesNaming(t, p.dir); n > 0 {
		t.Errorf("%d processes are left", n)
	}
}

func TestAnotherWorkerResumesWhatAKilledOnePaused(t *testing.T) {
	p := newProvider(t)
	ref, kill := startWorker(t, workerOrder{
		Options: testOptions(p.dir), Spec: testSpec("handed"), Pause: true,
		Script: "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done",
	})
	r := ref()
	kill()
	ctx := t.Context()
	defer func() {
		if err := p.Destroy(context.Background(), r); err != nil {
			t.Error(err)
		}
	}()
	if !paused(t, p) {
		t.Fatal("the pause ended with its worker")
	}
	sb, err := p.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	proc, err := sb.Process(ctx, "job")
	if err != nil {
		t.Fatal(err)
	}
	before, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Resume(ctx, r); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it goes on", func() bool {
		now, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, 1<<20)
		return err == nil && len(now) > len(before) && bytes.HasPrefix(now, before)
	})
	if paused(t, p) {
		t.Error("it is listed as paused")
	}
}

// What forks all the time, has threads, or is in the middle of a vfork must
// stand still too, also where there is no cgroup to freeze.
func TestPauseStopsWhatForksAllTheTime(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("forks"))
	ctx := t.Context()
	proc, err := sb.Start(ctx, "forks", sandbox.Cmd{Args: []string{"sh", "-c", "for i in 1 2 3 4; do (while :; do (echo x); /bin/echo y; done) & done; wait"}})
	if err != nil {
		t.Fatal(err)
	}
	said := func() int {
		out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, 64<<20)
		if err != nil {
			t.Fatal(err)
		}
		return len(out)
	}
	for range 5 {
		last := said()
		eventually(t, "it runs", func() bool { return said() > last+40 })
		if err := p.Pause(ctx, ref); err != nil {
			t.Fatal(err)
		}
		// What was written before it came to rest may still be in the pipe.
		before := -1
		eventually(t, "the pipe is empty", func() bool {
			n := said()
			same := n == before
			before = n
			return same
		})
		time.Sleep(50 * time.Millisecond) // nothing must happen in it
		if after := said(); after != before {
			t.Fatalf("%d bytes were written while it was paused", after-before)
		}
		if err := p.Resume(ctx, ref); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatNeedsInitIsAConflictWhilePaused(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("conflict"))
	ctx := t.Context()
	proc, err := sb.Start(ctx, "long", sandbox.Cmd{Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Pause(ctx, ref); err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]func() error{
		"start":    func() error { _, err := sb.Start(ctx, "x", sandbox.Cmd{Args: []string{"true"}}); return err },
		"upload":   func() error { return sb.Upload(ctx, "/tmp/x", strings.NewReader("")) },
		"download": func() error { _, err := sb.Download(ctx, "/etc/passwd"); return err },
		"signal":   func() error { return proc.Signal(ctx, sandbox.Terminate) },
		"health":   func() error { return sb.Health(ctx) },
		"terminal": func() error {
			_, err := p.OpenTerminal(ctx, ref, sandbox.Cmd{Args: []string{"sh"}}, sandbox.TerminalSize{})
			return err
		},
		"dial": func() error { _, err := p.DialPort(ctx, ref, 80); return err },
	} {
		if err := try(); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "Resume") {
			t.Errorf("%s: %v, hint %q", name, err, fault.HintOf(err))
		}
	}
	// The id was not taken by the start that failed, and the process found
	// under its own is the same.
	if _, err := sb.Start(ctx, "long", sandbox.Cmd{Args: []string{"true"}}); err != nil {
		t.Errorf("start again: %v", err)
	}
	if err := p.Resume(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if out := script(t, sb, "x", "echo fine"); out != "fine" {
		t.Error(out)
	}
}

func TestPausesAndStartsAtOnceLoseNothing(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("busy"))
	ctx := t.Context()
	starters, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stop)
		for {
			select {
			case <-starters:
				return
			default:
			}
			if err := errors.Join(p.Pause(ctx, ref), p.Resume(ctx, ref)); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	var all sync.WaitGroup
	for i := range 3 {
		all.Go(func() {
			for n := range 10 {
				id := fmt.Sprintf("p-%d-%d", i, n)
				for {
					out, _, exit, err := sandbox.Output(ctx, sb, id, sandbox.Cmd{Args: []string{"echo", id}}, 100)
					if fault.KindOf(err) == fault.Conflict {
						continue
					}
					if err != nil || exit.Code != 0 || string(out) != id+"\n" {
						t.Errorf("%s: %q, %+v, %v", id, out, exit, err)
					}
					break
				}
			}
		})
	}
	all.Wait()
	close(starters)
	<-stop
}

func TestDestroyDoesNotMindAPauseUnderWay(t *testing.T) {
	p := newProvider(t)
	for i := range 8 {
		ref, sb := newSandbox(t, p, testSpec(fmt.Sprint("race-", i)))
		if _, err := sb.Start(t.Context(), "forks", sandbox.Cmd{Args: []string{"sh", "-c", "while :; do (echo x); done"}}); err != nil {
			t.Fatal(err)
		}
		paused := make(chan error, 1)
		go func() { paused <- p.Pause(context.Background(), ref) }()
		if i%2 == 1 {
			time.Sleep(time.Duration(i) * 200 * time.Microsecond) // another moment each time
		}
		if err := p.Destroy(t.Context(), ref); err != nil {
			t.Error(err)
		}
		if err := <-paused; err != nil && fault.KindOf(err) != fault.NotFound {
			t.Errorf("pause: %v", err)
		}
	}
}

// slowReader lets a test do something in the middle of an upload.
type slowReader struct {
	parts []string
	then  func()
}

func (r *slowReader) Read(b []byte) (int, error) {
	if len(r.parts) == 0 {
		return 0, io.EOF
	}
	if len(r.parts) == 1 {
		r.then()
	}
	n := copy(b, r.parts[0])
	r.parts = r.parts[1:]
	return n, nil
}

func TestAnUploadThatAPauseInterruptsEndsAfterIt(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("upload"))
	ctx := t.Context()
	r := &slowReader{parts: []string{"first ", "second"}, then: func() {
		if err := p.Pause(ctx, ref); err != nil {
			t.Error(err)
		}
		time.AfterFunc(200*time.Millisecond, func() {
			if err := p.Resume(ctx, ref); err != nil {
				t.Error(err)
			}
		})
	}}
	if err := sb.Upload(ctx, "/tmp/file", r); err != nil {
		t.Fatal(err)
	}
	if out := script(t, sb, "look", "cat /tmp/file; ls -A /tmp"); out != "first secondfile" {
		t.Errorf("%q", out)
	}
	// One whose worker gives it up meanwhile leaves nothing either.
	broken := &slowReader{parts: []string{"half ", "", ""}, then: func() {}}
	err := sb.Upload(ctx, "/tmp/other", io.MultiReader(broken, errorReader{func() {
		if err := p.Pause(ctx, ref); err != nil {
			t.Error(err)
		}
	}}))
	if err == nil {
		t.Error("half an upload was kept")
	}
	if err := p.Resume(ctx, ref); err != nil {
		t.Fatal(err)
	}
	n := 0
	eventually(t, "the half is gone", func() bool {
		n++
		return script(t, sb, fmt.Sprint("ls-", n), "ls -A /tmp") == "file"
	})
}

type errorReader struct{ first func() }

func (r errorReader) Read([]byte) (int, error) {
	r.first()
	return 0, errors.New("the worker has had enough")
}

// openTerm opens a terminal that goes with the test.
func openTerm(t *testing.T, p *Provider, ref sandbox.Ref, text string) sandbox.Terminal {
	t.Helper()
	term, err := p.OpenTerminal(t.Context(), ref, sandbox.Cmd{Args: []string{"sh", "-c", text}}, sandbox.TerminalSize{Rows: 24, Columns: 80})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { term.Close() })
	return term
}

func TestATerminalLosesNothing(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("much"))
	term := openTerm(t, p, ref, "stty -onlcr; i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; exit 5")
	out, err := io.ReadAll(term)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range 20000 {
		fmt.Fprintln(&want, i)
	}
	if string(out) != want.String() {
		t.Errorf("%d bytes came, want %d", len(out), want.Len())
	}
	if exit, err := term.Wait(t.Context()); err != nil || exit.Code != 5 {
		t.Errorf("%+v, %v", exit, err)
	}
}

func TestATerminalIsConfinedAsEverythingElse(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("confined"))
	const look = `id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; ls -l /proc/self/fd | sed -n 's/.* -> //p' | grep -v '^/proc/' | sort -u; pwd; echo "$HOME $TERM"; ps -o tty= -p $$ 2>/dev/null | tr -d ' '`
	out, err := io.ReadAll(openTerm(t, p, ref, look))
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(out), "\r", "")), "\n")
	want := strings.Split(script(t, sb, "look", look+" </dev/null"), "\n")
	// Where a process has pipes, this one has its own terminal and nothing more.
	terminals := 0
	for i, line := range got {
		if strings.HasPrefix(line, "/dev/") {
			terminals++
			if line != "/dev/pts/0" {
				t.Errorf("descriptor of %s", line)
			}
		}
		if i < 5 && line != want[i] {
			t.Errorf("line %d is %q, and without a terminal %q", i, line, want[i])
		}
	}
	if terminals != 1 || !strings.Contains(string(out), sandbox.Workspace) || !strings.Contains(string(out), sandbox.Home+" dumb") {
		t.Errorf("it shows %q", out)
	}
}

func TestATerminalIsHungUpWhenItsWorkerIsKilled(t *testing.T) {
	p := newProvider(t)
	word := marker("a-terminal")
	ref, kill := startWorker(t, workerOrder{
		Options: testOptions(p.dir), Spec: testSpec("person"), Script: "exec sleep 987651",
		Terminal: []string{"sh", "-c", "sh -c 'while :; do sleep 1; done' " + word + "; true", word},
	})
	r := ref()
	defer func() {
		if err := p.Destroy(context.Background(), r); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "it runs", func() bool { return processesNaming(t, word) == 3 }) // and the worker's own
	kill()
	eventually(t, "what ran on the terminal is gone", func() bool { return processesNaming(t, word) == 0 })
	sb, err := p.Attach(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	proc, err := sb.Process(t.Context(), "job")
	if err != nil {
		t.Fatal(err)
	}
	if _, ended, err := proc.Exit(t.Context()); ended || err != nil {
		t.Errorf("an ordinary process ended with the terminal: %v", err)
	}
}

func TestACommandThatIgnoresTheHangUpIsKilled(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("stubborn"))
	word := marker("a-stubborn-terminal")
	term := openTerm(t, p, ref, "trap '' HUP TERM INT; while :; do sleep 1; done # "+word)
	eventually(t, "it runs", func() bool { return processesNaming(t, word) == 1 })
	if err := term.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := term.Wait(t.Context()); err == nil {
		t.Error("who hung up was told how the command ended")
	}
	eventually(t, "it is gone", func() bool { return processesNaming(t, word) == 0 })
}

func TestATerminalEndsWithItsSandbox(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("ends"))
	term := openTerm(t, p, ref, "sleep 1000")
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if _, err := term.Wait(t.Context()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("wait: %v", err)
	}
	if _, err := io.ReadAll(term); err != nil {
		t.Errorf("read: %v", err)
	}
}

func TestCloseWakesWhoReadsATerminal(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("reader"))
	term := openTerm(t, p, ref, "sleep 1000")
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(term)
		read <- err
	}()
	if err := term.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-read:
	case <-time.After(20 * time.Second):
		t.Error("the reader still waits")
	}
}

func TestOnlyAFreshOuterEndPassesForATerminal(t *testing.T) {
	master, slave, err := hostPTY()
	if err != nil {
		t.Skipf("no terminals on this host: %v", err)
	}
	defer master.Close()
	defer slave.Close()
	if err := checkMaster(master); err != nil {
		t.Errorf("an outer end: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	for name, f := range map[string]*os.File{"an inner end": slave, "null": null, "a pipe": r, "a file": program} {
		if checkMaster(f) == nil {
			t.Errorf("%s passed for a terminal", name)
		}
	}
}

// hostPTY is openPTY outside a sandbox.
func hostPTY() (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}

func TestOnlyAFreshSocketPassesForOne(t *testing.T) {
	file := func(c interface{ File() (*os.File, error) }, err error) *os.File {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		f, err := c.File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	fresh, err := newSocket("tcp4")
	if err != nil {
		t.Fatal(err)
	}
	ok := os.NewFile(uintptr(fresh), "socket")
	defer ok.Close()
	if err := checkSocket(ok, "tcp4"); err != nil {
		t.Errorf("a fresh socket: %v", err)
	}
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	local, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	for name, f := range map[string]*os.File{
		"a listener": file(l, nil), "a connection": file(conn, nil), "UDP": file(udp, nil), "a unix socket": file(local, nil),
	} {
		if checkSocket(f, "tcp4") == nil {
			t.Errorf("%s passed for a fresh socket", name)
		}
	}
	if checkSocket(ok, "tcp6") == nil {
		t.Error("IPv4 passed for IPv6")
	}
}

func TestDialPortReachesTheSandboxAndNotTheHost(t *testing.T) {
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("ports"))
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	c, err := p.DialPort(t.Context(), ref, port)
	if err == nil {
		c.Close()
	}
	if fault.KindOf(err) != fault.Unavailable {
		t.Errorf("a port of the host: %v", err)
	}
}

func TestDialPortFindsWhatListensOnIPv6Only(t *testing.T) {
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		t.Skip("this kernel has no IPv6")
	}
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("six"))
	const server = `socket(my $s, PF_INET6, SOCK_STREAM, 0) or die $!;
		setsockopt($s, IPPROTO_IPV6, IPV6_V6ONLY, 1) or die $!;
		bind($s, pack_sockaddr_in6(3000, inet_pton(AF_INET6, "::1"))) or die $!;
		listen($s, 1) or die $!; $| = 1; print "up\n"; accept(my $c, $s); syswrite($c, "six"); close($c);`
	proc, err := sb.Start(t.Context(), "server", sandbox.Cmd{Args: []string{"perl", "-MSocket=:all", "-e", server}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it listens", func() bool {
		out, err := sandbox.ReadAll(t.Context(), proc, sandbox.Stdout, 100)
		return err == nil && string(out) == "up\n"
	})
	c, err := p.DialPort(t.Context(), ref, 3000)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if out, err := io.ReadAll(c); err != nil || string(out) != "six" {
		t.Errorf("%q, %v", out, err)
	}
}

// A program that listens and accepts nobody must not keep init, and so the
// whole sandbox, waiting.
func TestAFullQueueKeepsOnlyWhoDialsWaiting(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("full"))
	const server = `socket(my $s, PF_INET, SOCK_STREAM, 0) or die $!; bind($s, sockaddr_in(3000, INADDR_LOOPBACK)) or die $!;
		listen($s, 0) or die $!; $| = 1; print "up\n"; sleep 1000;`
	proc, err := sb.Start(t.Context(), "server", sandbox.Cmd{Args: []string{"perl", "-MSocket", "-e", server}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it listens", func() bool {
		out, err := sandbox.ReadAll(t.Context(), proc, sandbox.Stdout, 100)
		return err == nil && string(out) == "up\n"
	})
	for n := 0; ; n++ {
		if n > 50 {
			t.Fatal("the queue is never full")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		c, err := p.DialPort(ctx, ref, 3000)
		cancel()
		if err != nil {
			break
		}
		defer c.Close()
	}
	if out := script(t, sb, "say", "echo still here"); out != "still here" {
		t.Error(out)
	}
}
