package cli

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// screen is a real pseudo-terminal: what a program writes to tty, and keys.
type screen struct {
	tty    *os.File
	master *os.File
	mu     sync.Mutex
	seen   bytes.Buffer
	done   chan struct{}
}

func newScreen(t *testing.T, columns, rows uint16) *screen {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	var n int
	raw, err := master.SyscallConn()
	if err == nil {
		e := raw.Control(func(fd uintptr) {
			if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
				n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
			}
			if err == nil {
				err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
			}
		})
		if err == nil {
			err = e
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &screen{tty: tty, master: master, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			s.mu.Lock()
			s.seen.Write(buf[:n])
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		tty.Close()
		master.Close()
		<-s.done
	})
	return s
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.String()
}

// await waits for text on the screen.
func (s *screen) await(t *testing.T, text string) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !strings.Contains(s.String(), text) {
		if time.Now().After(deadline) {
			t.Fatalf("%q never came; the screen got %q", text, s.String())
		}
		time.Sleep(5 * time.Millisecond) // the other end of a terminal cannot be waited for
	}
}

func (s *screen) press(t *testing.T, keys string) {
	t.Helper()
	if _, err := s.master.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

// onTerminal makes standard input and error of the session the screen.
func onTerminal(s *session, scr *screen) {
	s.env.Stdin, s.env.Stderr = scr.tty, scr.tty
	s.env.IsTerminal = func(x any) bool {
		f, ok := x.(*os.File)
		return ok && term.IsTerminal(int(f.Fd()))
	}
	s.env.timing.poll = 5 * time.Millisecond
}

// See package hush: without it, every command asks the terminal for its
// background colour and waits five seconds for an answer.
func TestTheProgramAsksTheTerminalNothingWhenItStarts(t *testing.T) {
	scr := newScreen(t, 80, 24)
	if os.Getenv("TERM_SHALL_BE") != "" { // this is the program that was started
		if os.Getenv("TERM") != os.Getenv("TERM_SHALL_BE") {
			t.Errorf("TERM is %q", os.Getenv("TERM"))
		}
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "TERM=xterm-256color", "TERM_SHALL_BE=xterm-256color", "CI=")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = scr.tty, scr.tty, scr.tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true} // who is not in the foreground does not ask
	if err := cmd.Run(); err != nil {
		t.Errorf("%v: %s", err, scr.String())
	}
	scr.await(t, "PASS")
	if strings.ContainsRune(scr.String(), 0x1b) {
		t.Errorf("the terminal was asked: %q", scr.String())
	}
}

func TestLiveViewOnATerminalDetachesAndLeavesItAsItWas(t *testing.T) {
	for name, key := range map[string]string{"q": "q", "ctrl-c": "\x03"} {
		t.Run(name, func(t *testing.T) {
			m := twoForks()
			m.order = []string{testRun}
			m.script = m.script[:3]
			scr := newScreen(t, 100, 20)
			before, err := term.GetState(int(scr.tty.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			s := newSession(t, m)
			onTerminal(s, scr)
			s.env.Args = []string{"status", "@last", "--watch"}
			code := make(chan int)
			go func() { code <- Main(t.Context(), s.env) }()
			scr.await(t, "Bash go test ./...")
			scr.press(t, key)
			if got := <-code; got != exitDetached {
				t.Errorf("exit %d", got)
			}
			scr.await(t, "Come back with: sandbox-temporal status --watch "+testRun)
			after, err := term.GetState(int(scr.tty.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			if *before != *after {
				t.Error("the terminal is not as it was")
			}
			if i, j := strings.LastIndex(scr.String(), "\x1b[?25l"), strings.LastIndex(scr.String(), "\x1b[?25h"); j < i {
				t.Errorf("the cursor stays hidden: %q", scr.String())
			}
			if s.out.Len() > 0 {
				t.Errorf("stdout %q", &s.out)
			}
		})
	}
}

func TestLiveViewOnATerminalEndsWithTheRun(t *testing.T) {
	scr := newScreen(t, 100, 20)
	s := newSession(t, twoForks())
	onTerminal(s, scr)
	s.env.Args = []string{"fork", remote, "--prompt", "x", "--forks", "2"}
	if got := Main(t.Context(), s.env); got != exitOK {
		t.Errorf("exit %d, screen %q", got, scr.String())
	}
	if !strings.Contains(s.out.String(), "2 of 2 succeeded") {
		t.Errorf("stdout %q", &s.out)
	}
}

// The prompt can be standard input: then keys must not be read from there, and
// nothing else must be taken for a keyboard.
func TestLiveViewWithAPromptOnStandardInput(t *testing.T) {
	scr := newScreen(t, 100, 20)
	s := newSession(t, twoForks())
	onTerminal(s, scr)
	s.env.Stdin = strings.NewReader("do it, quickly")
	s.env.Args = []string{"fork", remote, "--prompt", "-", "--forks", "2"}
	if got := Main(t.Context(), s.env); got != exitOK {
		t.Errorf("exit %d, screen %q", got, scr.String())
	}
	if p := s.runs.plans[s.runs.order[0]]; p.Prompt != "do it, quickly" {
		t.Errorf("prompt %q", p.Prompt)
	}
}

func TestLiveViewOnATerminalDetachesOnASignal(t *testing.T) {
	m := twoForks()
	m.order = []string{testRun}
	m.script = []step{at(map[int]fork.Live{1: working(1, 1, "working hard")}, fork.Running)}
	scr := newScreen(t, 100, 20)
	s := newSession(t, m)
	onTerminal(s, scr)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.env.Args = []string{"status", "@last", "--watch"}
	code := make(chan int)
	go func() { code <- Main(ctx, s.env) }()
	scr.await(t, "working hard")
	cancel()
	if got := <-code; got != exitDetached {
		t.Errorf("exit %d", got)
	}
	scr.await(t, "Detached. The run goes on.")
}

func TestAttachJoinsTwoTerminals(t *testing.T) {
	if signal.Ignored(os.Interrupt) {
		// As for what a script runs in the background; and so it would be for
		// all that this test starts, unless it was handled here.
		handled := make(chan os.Signal, 1)
		signal.Notify(handled, os.Interrupt)
		defer signal.Stop(handled)
	}
	scr := newScreen(t, 97, 31)
	before, err := term.GetState(int(scr.tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	s, _, _ := newInside(t)
	onTerminal(s, scr)
	s.env.Stdout = scr.tty
	s.vars["TERM"] = "screen-256color"
	s.env.Args = []string{"attach", "@last/1"}
	code := make(chan int)
	go func() { code <- Main(t.Context(), s.env) }()
	scr.await(t, "orkspace") // some prompt; the host's files of bash decide here
	scr.press(t, "echo \"$TERM $(stty size)\"; test -t 0 && test -t 1 && echo both\r")
	scr.await(t, "screen-256color 31 97")
	scr.await(t, "both")
	// A key that would end this program, were it not the other terminal's.
	// It says itself that it runs: before that, the key would reach the shell.
	scr.press(t, "sh -c 'echo begun $((20+1)); exec sleep 600'\r")
	scr.await(t, "begun 21")
	scr.press(t, "\x03")
	scr.press(t, "echo still $((40+2)) here\r")
	scr.await(t, "still 42 here")
	if err := unix.IoctlSetWinsize(int(scr.tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 11, Col: 57}); err != nil {
		t.Fatal(err)
	}
	// The signal of a terminal goes to its foreground, which this test is not.
	if err := syscall.Kill(os.Getpid(), syscall.SIGWINCH); err != nil {
		t.Fatal(err)
	}
	scr.press(t, "until [ \"$(stty size)\" = '11 57' ]; do sleep 0.02; done; echo now $((1+1))\r")
	scr.await(t, "now 2")
	scr.press(t, "exit 42\r")
	if got := <-code; got != 42 {
		t.Errorf("exit %d", got)
	}
	after, err := term.GetState(int(scr.tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if *before != *after {
		t.Error("the terminal is not as it was")
	}
}

func TestAttachGivesTheTerminalBackWhenTheSandboxGoes(t *testing.T) {
	for name, row := range map[string]struct {
		end  func(t *testing.T, cancel func(), destroy func())
		code int
	}{
		"destroyed":   {func(_ *testing.T, _, destroy func()) { destroy() }, 137},
		"interrupted": {func(_ *testing.T, cancel, _ func()) { cancel() }, exitDetached},
	} {
		t.Run(name, func(t *testing.T) {
			scr := newScreen(t, 80, 24)
			before, err := term.GetState(int(scr.tty.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			s, p, ref := newInside(t)
			onTerminal(s, scr)
			s.env.Stdout = scr.tty
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			s.env.Args = []string{"attach", "@last/1", "--", "sh", "-c", "echo up; sleep 600"}
			code := make(chan int)
			go func() { code <- Main(ctx, s.env) }()
			scr.await(t, "up")
			row.end(t, cancel, func() {
				if err := p.Destroy(context.Background(), ref); err != nil {
					t.Error(err)
				}
			})
			if got := <-code; got != row.code {
				t.Errorf("exit %d", got)
			}
			after, err := term.GetState(int(scr.tty.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			if *before != *after {
				t.Error("the terminal is not as it was")
			}
		})
	}
}
