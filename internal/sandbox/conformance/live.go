package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// counter counts for as long as it may, one number a line.
const counter = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"

// rest lets some time go by: there is no other way to see that nothing
// happens in it.
func rest(ctx context.Context) error {
	select {
	case <-time.After(300 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// output reads all that a process has said so far.
func output(ctx context.Context, proc sandbox.Process) (string, error) {
	out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, limit)
	if err != nil {
		return "", failed("read output: %w", err)
	}
	return string(out), nil
}

// saysMore waits until the process has said something more than before, and
// the words in it.
func saysMore(ctx context.Context, proc sandbox.Process, before string, words ...string) error {
	return until(ctx, "the process to say more", func() (bool, error) {
		out, err := output(ctx, proc)
		fresh := out[min(len(before), len(out)):]
		for _, w := range words {
			if !strings.Contains(fresh, w) {
				return false, err
			}
		}
		return fresh != "", err
	})
}

// standsStill fails when the process says anything for a while.
func standsStill(ctx context.Context, proc sandbox.Process) (string, error) {
	before, err := output(ctx, proc)
	if err != nil {
		return "", err
	}
	if err := rest(ctx); err != nil {
		return "", err
	}
	after, err := output(ctx, proc)
	if err == nil && after != before {
		err = failed("a paused process went on for %d bytes", len(after)-len(before))
	}
	return before, err
}

func wantPaused(ctx context.Context, p sandbox.Provider, ref sandbox.Ref, key string, want bool) error {
	infos, err := p.List(ctx, map[string]string{sandbox.LabelRun: key})
	if err != nil {
		return failed("list: %w", err)
	}
	if err := wantRefs(infos, []sandbox.Ref{ref}); err != nil {
		return failed("list: %w", err)
	}
	if infos[0].Paused != want {
		return failed("list says paused is %v, want %v", infos[0].Paused, want)
	}
	return nil
}

func pauseStandsStill(ctx context.Context, p sandbox.Provider, key string) error {
	pauser, ok := sandbox.As[sandbox.Pauser](p)
	if !ok {
		return nil
	}
	s := spec(key)
	s.Labels = map[string]string{sandbox.LabelRun: key}
	return with(ctx, p, s, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		// One in the group and one that left it; both are heard.
		proc, err := sb.Start(ctx, "count", shell("(setsid sh -c 'while :; do echo far; sleep 0.01; done' &); "+counter))
		if err != nil {
			return failed("start: %w", err)
		}
		if err := saysMore(ctx, proc, "", "10\n", "far\n"); err != nil {
			return err
		}
		for range 2 {
			if err := pauser.Pause(ctx, ref); err != nil {
				return failed("pause: %w", err)
			}
		}
		before, err := standsStill(ctx, proc)
		if err != nil {
			return err
		}
		if err := wantPaused(ctx, p, ref, key, true); err != nil {
			return err
		}
		soon, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		_, err = sb.Start(soon, "early", shell("true"))
		waited := soon.Err() != nil
		cancel()
		if err == nil || !waited && fault.KindOf(err) != fault.Conflict {
			return failed("start in a paused sandbox: %v, want it to wait or to fail with %s", err, fault.Conflict)
		}
		for range 2 {
			if err := pauser.Resume(ctx, ref); err != nil {
				return failed("resume: %w", err)
			}
		}
		if err := saysMore(ctx, proc, before, "far", "1"); err != nil {
			return err
		}
		if err := wantPaused(ctx, p, ref, key, false); err != nil {
			return err
		}
		if err := sb.Health(ctx); err != nil {
			return failed("health after resume: %w", err)
		}
		// It went on from where it stood.
		out, err := output(ctx, proc)
		if err != nil {
			return err
		}
		n := 0
		for _, line := range strings.SplitAfter(out[:strings.LastIndexByte(out, '\n')+1], "\n") {
			if line == "far\n" || line == "" {
				continue
			}
			if n++; line != fmt.Sprintln(n) {
				return failed("line %d of the counter is %q", n, line)
			}
		}
		return nil
	})
}

func pausedWorks(ctx context.Context, p sandbox.Provider, key string) error {
	pauser, ok := sandbox.As[sandbox.Pauser](p)
	if !ok {
		return nil
	}
	return in2(ctx, p, key, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		done, err := sb.Start(ctx, "done", shell("echo said; exit 4"))
		if err != nil {
			return failed("start: %w", err)
		}
		if _, err := done.Wait(ctx); err != nil {
			return failed("wait: %w", err)
		}
		running, err := sb.Start(ctx, "running", sandbox.Cmd{Args: []string{"sh", "-c", counter, marker(key)}})
		if err != nil {
			return failed("start: %w", err)
		}
		if err := saysMore(ctx, running, ""); err != nil {
			return err
		}
		if err := pauser.Pause(ctx, ref); err != nil {
			return failed("pause: %w", err)
		}
		// Also for a worker that comes only now.
		late, err := p.Attach(ctx, ref)
		if err != nil {
			return failed("attach to a paused sandbox: %w", err)
		}
		defer late.Close()
		if done, err = late.Process(ctx, "done"); err != nil {
			return failed("find process: %w", err)
		}
		if exit, ok, err := done.Exit(ctx); err != nil || !ok || exit != (sandbox.Exit{Code: 4}) {
			return failed("exit while paused: %+v, %v, %v", exit, ok, err)
		}
		if out, err := output(ctx, done); err != nil || out != "said\n" {
			return failed("output while paused: %q, %v", out, err)
		}
		if exit, ok, err := running.Exit(ctx); err != nil || ok {
			return failed("exit of a process that stands still: %+v, %v, %v", exit, ok, err)
		}
		if err := late.SetDeadline(ctx, time.Now().Add(lifetime)); err != nil {
			return failed("set deadline while paused: %w", err)
		}
		if late.Health(ctx) == nil {
			return failed("a paused sandbox says that a command could be started")
		}
		if err := p.Destroy(ctx, ref); err != nil {
			return failed("destroy while paused: %w", err)
		}
		if _, ok := sandbox.As[sandbox.HostBound](p); ok {
			if alive, err := processesNaming(marker(key)); err != nil || len(alive) > 0 {
				return failed("processes %v live on after destroy (%v)", alive, err)
			}
		}
		if err := isGone(ctx, p, ref); err != nil {
			return err
		}
		if err := wantKind("pause a sandbox that is gone", pauser.Pause(ctx, ref), fault.NotFound); err != nil {
			return err
		}
		return wantKind("resume a sandbox that is gone", pauser.Resume(ctx, ref), fault.NotFound)
	})
}

func pausedDeadline(ctx context.Context, p sandbox.Provider, key string) error {
	pauser, ok := sandbox.As[sandbox.Pauser](p)
	if !ok {
		return nil
	}
	return briefly(ctx, p, spec(key), func(b *brief) error {
		if err := pauser.Pause(ctx, b.ref); err != nil {
			return failed("pause: %w", err)
		}
		b.begun = true
		return untilGone(ctx, p, b.ref)
	})
}

// in2 is in for checks that need the ref too.
func in2(ctx context.Context, p sandbox.Provider, key string, f func(ref sandbox.Ref, sb sandbox.Sandbox) error) error {
	return with(ctx, p, spec(key), f)
}

// onTerminal runs cmd on a terminal and gives f what it shows.
func onTerminal(ctx context.Context, p sandbox.Provider, key string, cmd sandbox.Cmd, f func(sb sandbox.Sandbox, t sandbox.Terminal, s *shown) error) error {
	terminaler, _ := sandbox.As[sandbox.Terminaler](p)
	return in2(ctx, p, key, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		t, err := terminaler.OpenTerminal(ctx, ref, cmd, sandbox.TerminalSize{Rows: 30, Columns: 100})
		if err != nil {
			return failed("open terminal: %w", err)
		}
		s := newShown(t)
		err = f(sb, t, s)
		closeErr := t.Close()
		<-s.over
		return errors.Join(err, closeErr)
	})
}

// shown gathers what a terminal shows.
type shown struct {
	over chan struct{}
	mu   sync.Mutex
	text bytes.Buffer
	err  error
}

func newShown(t sandbox.Terminal) *shown {
	s := &shown{over: make(chan struct{})}
	go func() {
		defer close(s.over)
		buf := make([]byte, 4096)
		for s.err == nil && s.text.Len() < limit {
			n, err := t.Read(buf)
			s.mu.Lock()
			s.text.Write(buf[:n])
			s.err = err
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *shown) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// await waits until the terminal has shown text.
func (s *shown) await(ctx context.Context, text string) error {
	err := until(ctx, fmt.Sprintf("%q on the terminal", text), func() (bool, error) { return strings.Contains(s.String(), text), nil })
	if err != nil {
		return failed("%w; it shows %q", err, s.String())
	}
	return nil
}

func hasTerminals(p sandbox.Provider) bool {
	_, ok := sandbox.As[sandbox.Terminaler](p)
	return ok
}

func terminal(ctx context.Context, p sandbox.Provider, key string) error {
	if !hasTerminals(p) {
		return nil
	}
	cmd := shell(`test -t 0 && test -t 1 && test -t 2 && echo "size $(stty size) $ADDED" || echo no; echo first; read -r line; echo "got $line, $(stty size)"; echo here > default; exit 7`)
	cmd.Env = []string{"ADDED=a b"}
	return onTerminal(ctx, p, key, cmd, func(sb sandbox.Sandbox, t sandbox.Terminal, s *shown) error {
		if err := s.await(ctx, "first\r\n"); err != nil {
			return err
		}
		if text := s.String(); !strings.HasPrefix(text, "size 30 100 a b\r\n") {
			return failed("the terminal shows %q", text)
		}
		if err := t.Resize(sandbox.TerminalSize{Rows: 41, Columns: 123}); err != nil {
			return failed("resize: %w", err)
		}
		if _, err := io.WriteString(t, "typed wörds\n"); err != nil {
			return failed("type: %w", err)
		}
		exit, err := t.Wait(ctx)
		if err != nil || exit != (sandbox.Exit{Code: 7}) {
			return failed("wait: %+v, %v, want code 7; it shows %q", exit, err, s.String())
		}
		select {
		case <-s.over:
		case <-ctx.Done():
			return failed("the terminal does not end with its command")
		}
		if !errors.Is(s.err, io.EOF) {
			return failed("the terminal ends with %v, want EOF", s.err)
		}
		// Echoed by the terminal, and answered by the command.
		if text := s.String(); !strings.Contains(text, "typed wörds\r\ngot typed wörds, 41 123") {
			return failed("the terminal shows %q", text)
		}
		return wantFile(ctx, sb, sandbox.Workspace+"/default", "here\n")
	})
}

func terminalKeys(ctx context.Context, p sandbox.Provider, key string) error {
	if !hasTerminals(p) {
		return nil
	}
	return onTerminal(ctx, p, key, shell("echo up; exec sleep 600"), func(_ sandbox.Sandbox, t sandbox.Terminal, s *shown) error {
		if err := s.await(ctx, "up"); err != nil {
			return err
		}
		soon, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		exit, err := t.Wait(soon)
		cancel()
		if err == nil {
			return failed("wait returned %+v while the command runs", exit)
		}
		if _, err := io.WriteString(t, "\x03"); err != nil {
			return failed("type: %w", err)
		}
		if exit, err := t.Wait(ctx); err != nil || exit != (sandbox.Exit{Code: 130, Signal: "INT"}) {
			return failed("after Ctrl-C: %+v, %v", exit, err)
		}
		return nil
	})
}

func terminalHangUp(ctx context.Context, p sandbox.Provider, key string) error {
	if !hasTerminals(p) {
		return nil
	}
	const beating = "echo up; while :; do echo beat >> beats; sleep 0.02; done"
	return onTerminal(ctx, p, key, shell(beating), func(sb sandbox.Sandbox, t sandbox.Terminal, s *shown) error {
		if err := s.await(ctx, "up"); err != nil {
			return err
		}
		if err := t.Close(); err != nil {
			return failed("close: %w", err)
		}
		last, n := "", 0
		return until(ctx, "the command to end with its terminal", func() (bool, error) {
			n++
			out, err := run(ctx, sb, fmt.Sprintf("count-%d", n), shell("touch beats; sleep 0.3; wc -l < beats"))
			same := out == last
			last = out
			return same, err
		})
	})
}

func terminalNotFound(ctx context.Context, p sandbox.Provider, key string) error {
	terminaler, ok := sandbox.As[sandbox.Terminaler](p)
	if !ok {
		return nil
	}
	size := sandbox.TerminalSize{Rows: 24, Columns: 80}
	var old sandbox.Ref
	err := in2(ctx, p, key, func(ref sandbox.Ref, _ sandbox.Sandbox) error {
		old = ref
		t, err := terminaler.OpenTerminal(ctx, ref, sandbox.Cmd{Args: []string{"no-such-program-anywhere"}}, size)
		if err != nil {
			return failed("open terminal: %w", err)
		}
		defer t.Close()
		if exit, err := t.Wait(ctx); err != nil || exit.Code != 127 {
			return failed("wait: %+v, %v, want code 127", exit, err)
		}
		for what, cmd := range map[string]sandbox.Cmd{"no command": {}, "a folder that is not there": {Args: []string{"true"}, Dir: sandbox.Workspace + "/not/there"}} {
			if t, err = terminaler.OpenTerminal(ctx, ref, cmd, size); err == nil {
				_ = t.Close()
			}
			if err := wantKind(what, err, fault.Invalid); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	t, err := terminaler.OpenTerminal(ctx, old, shell("true"), size)
	if err == nil {
		_ = t.Close()
	}
	return wantKind("a terminal in a sandbox that is gone", err, fault.NotFound)
}

// server listens on a port of the loopback that is free, says which, and gives
// two callers back what they send. Perl stands on every Debian, and Python
// where Perl does not.
const server = `
if command -v perl >/dev/null; then
exec perl -MSocket -e '
$| = 1;
socket(my $s, PF_INET, SOCK_STREAM, 0) or die $!;
bind($s, sockaddr_in(0, INADDR_LOOPBACK)) or die $!;
listen($s, 8) or die $!;
my ($port) = sockaddr_in(getsockname($s));
print "$port\n";
for (1 .. 2) {
	accept(my $c, $s) or die $!;
	while (sysread($c, my $buf, 65536)) {
		for (my $at = 0; $at < length $buf;) { $at += syswrite($c, $buf, length($buf) - $at, $at) // die $! }
	}
	close($c);
}'
fi
exec python3 -u -c '
import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
s.listen(8)
print(s.getsockname()[1])
for _ in range(2):
    c, _ = s.accept()
    while b := c.recv(65536):
        c.sendall(b)
    c.close()
'`

func dialPort(ctx context.Context, p sandbox.Provider, key string) error {
	dialer, ok := sandbox.As[sandbox.PortDialer](p)
	if !ok {
		return nil
	}
	return in2(ctx, p, key, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		proc, err := sb.Start(ctx, "server", shell(server))
		if err != nil {
			return failed("start: %w", err)
		}
		port := 0
		err = until(ctx, "the server to listen", func() (bool, error) {
			out, err := output(ctx, proc)
			if _, ended, _ := proc.Exit(ctx); ended {
				err = errors.Join(err, errors.New("it has ended"))
			}
			_, scanErr := fmt.Sscanf(out, "%d\n", &port)
			return scanErr == nil && strings.HasSuffix(out, "\n"), err
		})
		if err != nil {
			return err
		}
		for _, text := range []string{"hello", strings.Repeat("0123456789abcdef", 64<<10)} {
			if err := echo(ctx, dialer, ref, port, text); err != nil {
				return err
			}
		}
		if exit, err := proc.Wait(ctx); err != nil || exit.Code != 0 {
			return failed("the server: %+v, %v", exit, err)
		}
		c, err := dialer.DialPort(ctx, ref, port)
		if err == nil {
			_ = c.Close()
		}
		if err := wantKind("dial a port where nobody listens", err, fault.Unavailable); err != nil {
			return err
		}
		for _, bad := range []int{0, -1, 65536} {
			c, err := dialer.DialPort(ctx, ref, bad)
			if err == nil {
				_ = c.Close()
			}
			if err := wantKind(fmt.Sprintf("dial port %d", bad), err, fault.Invalid); err != nil {
				return err
			}
		}
		return nil
	})
}

// echo sends text on one way of a connection, ends that way, and wants all of
// it back on the other.
func echo(ctx context.Context, dialer sandbox.PortDialer, ref sandbox.Ref, port int, text string) error {
	c, err := dialer.DialPort(ctx, ref, port)
	if err != nil {
		return failed("dial: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c, text)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	back, err := io.ReadAll(io.LimitReader(c, limit))
	if err := errors.Join(err, <-sent); err != nil {
		return failed("talk to the server: %w", err)
	}
	if string(back) != text {
		return failed("%d bytes came back, want %d, or they differ", len(back), len(text))
	}
	return nil
}
