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

func startTwice(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		for range 3 {
			if err := wantOutput(ctx, sb, "once", shell("echo x >> runs; wc -l < runs | tr -d ' '"), "1"); err != nil {
				return err
			}
		}
		// Also while it runs, and whatever the second command is.
		if _, err := sb.Start(ctx, "slow", shell("while [ ! -e go ]; do sleep 0.02; done; echo first")); err != nil {
			return failed("start: %w", err)
		}
		second, err := sb.Start(ctx, "slow", shell("echo second"))
		if err != nil {
			return failed("start again: %w", err)
		}
		if err := sb.Upload(ctx, sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
			return failed("upload: %w", err)
		}
		if _, err := second.Wait(ctx); err != nil {
			return failed("wait: %w", err)
		}
		return wantOutput(ctx, sb, "slow", shell("echo third"), "first")
	})
}

func startAtOnce(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		const n = 8
		var errs [n]error
		var all sync.WaitGroup
		for i := range n {
			all.Go(func() {
				errs[i] = wantOutput(ctx, sb, "once", shell("echo x >> runs; wc -l < runs | tr -d ' '"), "1")
			})
		}
		all.Wait()
		return errors.Join(errs[:]...)
	})
}

func startInvalid(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		echo := sandbox.Cmd{Args: []string{"echo"}}
		rows := []struct {
			what, id string
			cmd      sandbox.Cmd
		}{
			{"no id", "", echo},
			{"a path as id", "../x", echo},
			{"a capital in the id", "X", echo},
			{"a long id", strings.Repeat("x", 65), echo},
			{"no command", "none", sandbox.Cmd{}},
			{"a folder that is not there", "nodir", sandbox.Cmd{Args: echo.Args, Dir: sandbox.Workspace + "/not/there"}},
			{"an input that is not there", "noin", sandbox.Cmd{Args: echo.Args, Stdin: sandbox.Workspace + "/not-there"}},
		}
		for _, r := range rows {
			_, err := sb.Start(ctx, r.id, r.cmd)
			if err := wantKind(r.what, err, fault.Invalid); err != nil {
				return err
			}
		}
		// What did not start has not taken the id.
		return wantOutput(ctx, sb, "nodir", sandbox.Cmd{Args: []string{"echo", "now"}}, "now")
	})
}

func processNotFound(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		_, err := sb.Process(ctx, "never")
		if err := wantKind("find a process that was never started", err, fault.NotFound); err != nil {
			return err
		}
		if _, err := sb.Start(ctx, "now", shell("true")); err != nil {
			return failed("start: %w", err)
		}
		if _, err := sb.Process(ctx, "now"); err != nil {
			return failed("find a process that was started: %w", err)
		}
		return nil
	})
}

func programNotFound(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		for i, program := range []string{"no-such-program-anywhere", "/no/such/program", "./no-such-program"} {
			_, _, exit, err := sandbox.Output(ctx, sb, fmt.Sprintf("none-%d", i), sandbox.Cmd{Args: []string{program}}, limit)
			if err != nil {
				return failed("%s: %w", program, err)
			}
			if exit != (sandbox.Exit{Code: 127}) {
				return failed("%s: exit %+v, want code 127", program, exit)
			}
		}
		return nil
	})
}

func exitCode(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		for _, code := range []int{0, 1, 42, 255} {
			id := fmt.Sprintf("exit-%d", code)
			proc, err := sb.Start(ctx, id, shell(fmt.Sprintf("exit %d", code)))
			if err != nil {
				return failed("start: %w", err)
			}
			for range 2 {
				if exit, err := proc.Wait(ctx); err != nil || exit != (sandbox.Exit{Code: code}) {
					return failed("wait: %+v, %v, want code %d", exit, err, code)
				}
			}
			if err := exitAfterAttach(ctx, p, ref, id, code); err != nil {
				return err
			}
		}
		return nil
	})
}

func exitAfterAttach(ctx context.Context, p sandbox.Provider, ref sandbox.Ref, id string, code int) error {
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return failed("attach: %w", err)
	}
	defer sb.Close()
	proc, err := sb.Process(ctx, id)
	if err != nil {
		return failed("find process: %w", err)
	}
	exit, ok, err := proc.Exit(ctx)
	if err != nil || !ok || exit != (sandbox.Exit{Code: code}) {
		return failed("exit after attaching anew: %+v, %v, %v, want code %d", exit, ok, err, code)
	}
	return nil
}

func exitSignal(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		rows := []struct {
			sig  sandbox.Signal
			want sandbox.Exit
		}{
			{sandbox.Interrupt, sandbox.Exit{Code: 130, Signal: "INT"}},
			{sandbox.Kill, sandbox.Exit{Code: 137, Signal: "KILL"}},
			{sandbox.Terminate, sandbox.Exit{Code: 143, Signal: "TERM"}},
		}
		for _, r := range rows {
			proc, err := sb.Start(ctx, strings.ToLower(string(r.sig)), sandbox.Cmd{Args: []string{"sleep", "600"}})
			if err != nil {
				return failed("start: %w", err)
			}
			if err := proc.Signal(ctx, r.sig); err != nil {
				return failed("signal %s: %w", r.sig, err)
			}
			if exit, err := proc.Wait(ctx); err != nil || exit != r.want {
				return failed("after %s: %+v, %v, want %+v", r.sig, exit, err, r.want)
			}
			if err := proc.Signal(ctx, r.sig); err != nil {
				return failed("signal a process that has ended: %w", err)
			}
		}
		return nil
	})
}

func exitWhileRunning(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		proc, err := sb.Start(ctx, "slow", shell("while [ ! -e go ]; do sleep 0.02; done"))
		if err != nil {
			return failed("start: %w", err)
		}
		if exit, ok, err := proc.Exit(ctx); err != nil || ok {
			return failed("exit while it runs: %+v, %v, %v", exit, ok, err)
		}
		soon, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		exit, err := proc.Wait(soon)
		cancel()
		if err == nil {
			return failed("wait returned %+v while the process runs", exit)
		}
		if err := sb.Upload(ctx, sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
			return failed("upload: %w", err)
		}
		if exit, err := proc.Wait(ctx); err != nil || exit != (sandbox.Exit{}) {
			return failed("wait: %+v, %v", exit, err)
		}
		if exit, ok, err := proc.Exit(ctx); err != nil || !ok || exit != (sandbox.Exit{}) {
			return failed("exit after the end: %+v, %v, %v", exit, ok, err)
		}
		return nil
	})
}

func twoOutputs(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		const lines = 40000
		script := fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo out$i; i=$((i+1)); done; echo err >&2; printf 'no newline \\377\\000'", lines)
		stdout, stderr, exit, err := sandbox.Output(ctx, sb, "both", shell(script), limit)
		if err != nil || exit.Code != 0 {
			return failed("run: %+v, %v", exit, err)
		}
		var want bytes.Buffer
		for i := range lines {
			fmt.Fprintf(&want, "out%d\n", i)
		}
		want.WriteString("no newline \xff\x00")
		if !bytes.Equal(stdout, want.Bytes()) {
			return failed("stdout has %d bytes, want %d, or differs", len(stdout), want.Len())
		}
		if string(stderr) != "err\n" {
			return failed("stderr %q", stderr)
		}
		return nil
	})
}

func rereadOutput(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		const all = "0123456789"
		proc, err := sb.Start(ctx, "say", shell("printf "+all))
		if err != nil {
			return failed("start: %w", err)
		}
		if _, err := proc.Wait(ctx); err != nil {
			return failed("wait: %w", err)
		}
		if err := readFromEveryByte(ctx, proc, all); err != nil {
			return err
		}
		again, err := p.Attach(ctx, ref)
		if err != nil {
			return failed("attach: %w", err)
		}
		defer again.Close()
		proc, err = again.Process(ctx, "say")
		if err != nil {
			return failed("find process: %w", err)
		}
		return readFromEveryByte(ctx, proc, all)
	})
}

func readFromEveryByte(ctx context.Context, proc sandbox.Process, all string) error {
	for i := range len(all) + 2 {
		buf := make([]byte, 64)
		n, err := proc.ReadAt(ctx, sandbox.Stdout, buf, int64(i))
		want := ""
		if i < len(all) {
			want = all[i:]
		}
		if string(buf[:n]) != want || !errors.Is(err, io.EOF) {
			return failed("read from byte %d: %q, %v, want %q and EOF", i, buf[:n], err, want)
		}
	}
	buf := make([]byte, 3)
	if n, err := proc.ReadAt(ctx, sandbox.Stdout, buf, 2); n != 3 || string(buf) != all[2:5] || err != nil && !errors.Is(err, io.EOF) {
		return failed("read 3 bytes from byte 2: %q, %v", buf[:n], err)
	}
	return nil
}

func readNeverWaits(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		proc, err := sb.Start(ctx, "slow", shell("echo first; while [ ! -e go ]; do sleep 0.02; done; echo second"))
		if err != nil {
			return failed("start: %w", err)
		}
		err = until(ctx, "the first line", func() (bool, error) {
			out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, limit)
			return string(out) == "first\n", err
		})
		if err != nil {
			return err
		}
		// The process is still there and will say more; that is no reason to
		// wait for it.
		soon, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		buf := make([]byte, 64)
		if n, err := proc.ReadAt(soon, sandbox.Stdout, buf, 6); n != 0 || !errors.Is(err, io.EOF) {
			return failed("read at the end of what is there: %q, %v, want EOF", buf[:n], err)
		}
		if n, err := proc.ReadAt(soon, sandbox.Stderr, buf, 0); n != 0 || !errors.Is(err, io.EOF) {
			return failed("read where nothing was said: %q, %v, want EOF", buf[:n], err)
		}
		if _, ok, err := proc.Exit(ctx); err != nil || ok {
			return failed("the process has ended meanwhile: %v, %v", ok, err)
		}
		if err := sb.Upload(ctx, sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
			return failed("upload: %w", err)
		}
		if _, err := proc.Wait(ctx); err != nil {
			return failed("wait: %w", err)
		}
		out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, limit)
		if err != nil || string(out) != "first\nsecond\n" {
			return failed("output %q, %v", out, err)
		}
		return nil
	})
}

func argumentsArrive(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		args := []string{"", "two words", `q"u'o\te`, "$HOME `id` *", "new\nline", "ümläut", "-n", strings.Repeat("long", 8000)}
		cmd := sandbox.Cmd{Args: append([]string{"printf", "[%s]"}, args...)}
		var want strings.Builder
		for _, a := range args {
			fmt.Fprintf(&want, "[%s]", a)
		}
		return wantOutput(ctx, sb, "args", cmd, want.String())
	})
}

func environment(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		cmd := shell(`printf '%s|%s|%s|%s' "$ADDED" "$EMPTY" "$TWICE" "${PATH:+path}"`)
		cmd.Env = []string{"ADDED=a b=c", "EMPTY=", "TWICE=1", "TWICE=2"}
		if err := wantOutput(ctx, sb, "added", cmd, "a b=c||2|path"); err != nil {
			return err
		}
		// What is added for one process is not there for the next.
		return wantOutput(ctx, sb, "after", shell(`printf '%s' "$ADDED"`), "")
	})
}

func standardInput(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		if err := wantOutput(ctx, sb, "none", shell("cat; echo end"), "end"); err != nil {
			return err
		}
		text := strings.Repeat("from a file\n", 20000)
		name := sandbox.Home + "/in/put"
		if err := sb.Upload(ctx, name, strings.NewReader(text)); err != nil {
			return failed("upload: %w", err)
		}
		return wantOutput(ctx, sb, "some", sandbox.Cmd{Args: []string{"cat"}, Stdin: name}, strings.TrimSuffix(text, "\n"))
	})
}

func workingDirectory(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		if _, err := run(ctx, sb, "here", shell("echo here > default")); err != nil {
			return err
		}
		if err := wantFile(ctx, sb, sandbox.Workspace+"/default", "here\n"); err != nil {
			return failed("a command without a folder does not run in the workspace: %w", err)
		}
		if err := sb.Upload(ctx, sandbox.Workspace+"/sub/file", strings.NewReader("")); err != nil {
			return failed("upload: %w", err)
		}
		there := shell("echo there > told")
		there.Dir = sandbox.Workspace + "/sub"
		if _, err := run(ctx, sb, "there", there); err != nil {
			return err
		}
		return wantFile(ctx, sb, sandbox.Workspace+"/sub/told", "there\n")
	})
}

func home(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		if _, err := run(ctx, sb, "home", shell(`echo mine > "$HOME/file"`)); err != nil {
			return err
		}
		return wantFile(ctx, sb, sandbox.Home+"/file", "mine\n")
	})
}

func signalGroup(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		// The child writes for as long as it lives; the leader only waits.
		proc, err := sb.Start(ctx, "group", shell("(while :; do echo beat >> beats; sleep 0.02; done) & wait"))
		if err != nil {
			return failed("start: %w", err)
		}
		beats := 0
		count := func() (int, error) {
			beats++
			out, err := run(ctx, sb, fmt.Sprintf("count-%d", beats), shell("touch beats; wc -l < beats | tr -d ' '"))
			if err != nil {
				return 0, err
			}
			var n int
			_, err = fmt.Sscan(out, &n)
			return n, err
		}
		err = until(ctx, "the child's first beat", func() (bool, error) {
			n, err := count()
			return n > 0, err
		})
		if err != nil {
			return err
		}
		if err := proc.Signal(ctx, sandbox.Kill); err != nil {
			return failed("signal: %w", err)
		}
		if exit, err := proc.Wait(ctx); err != nil || exit != (sandbox.Exit{Code: 137, Signal: "KILL"}) {
			return failed("wait: %+v, %v", exit, err)
		}
		before, err := count()
		if err != nil {
			return err
		}
		// Long enough for a living child to beat many times.
		if _, err := run(ctx, sb, "rest", sandbox.Cmd{Args: []string{"sleep", "0.5"}}); err != nil {
			return err
		}
		after, err := count()
		if err != nil {
			return err
		}
		if after > before+1 {
			return failed("the child went on after its group was killed: %d beats, then %d", before, after)
		}
		return nil
	})
}
