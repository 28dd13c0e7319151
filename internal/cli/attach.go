package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

type attachOptions struct {
	Target  target
	Command []string
	Stdin   bool
}

// newAttach makes the "attach" command.
func newAttach(env *Env, run func(context.Context, *Env, attachOptions) error) *cobra.Command {
	if run == nil {
		run = runAttach
	}
	var opts attachOptions
	cmd := &cobra.Command{
		Use:     "attach RUN/N [-- COMMAND [ARG...]]",
		GroupID: groupRuns,
		Short:   "Open a shell in the sandbox of a fork that runs",
		Long: `Attach runs a shell, or COMMAND, in the sandbox of a fork while its agent works
there: as the agent's user, in its work tree. End the shell with exit or Ctrl-D.
The sandbox goes when its fork ends, whoever is attached.

On a terminal the command gets a terminal of its own in the sandbox. What it
shows comes to yours as it is, as with ssh: in there works a program that you
may have reason not to trust, and escape sequences of its making can change your
terminal's title, colours and, where the terminal allows it, the clipboard. It
can also read what you type. See "logs" for a view that is made harmless.

Without a terminal, standard output and error are those of the command. Without
COMMAND the shell reads standard input to its end; with one, --stdin hands it
standard input.
` + targetHelp + exits(common...) + `

A command that was run passes its own exit code on, whatever that means.`,
		Example: "  sandbox-temporal attach @last/1\n" +
			"  sandbox-temporal attach 3f9c/2 -- git diff --stat\n" +
			"  sandbox-temporal attach @last/1 --stdin -- patch -p1 < fix.patch",
		Args: func(cmd *cobra.Command, words []string) error {
			if dash := cmd.ArgsLenAtDash(); dash >= 0 {
				words = words[:dash]
			} else if len(words) > 1 {
				return usage(fmt.Sprintf("Put -- before it: %s %s -- %s", cmd.CommandPath(), words[0], strings.Join(words[1:], " ")),
					"%s does not know what to do with %q", cmd.CommandPath(), words[1])
			}
			return args("RUN/N")(cmd, words)
		},
		ValidArgsFunction: completeRuns(env, fork.Running),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = forkArg(words[0]); err != nil {
				return err
			}
			opts.Command = words[1:]
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().BoolVarP(&opts.Stdin, "stdin", "i", false, "hand standard input to COMMAND, when it is no terminal")
	return cmd
}

func runAttach(ctx context.Context, env *Env, opts attachOptions) error {
	in, err := env.inside(ctx, opts.Target)
	if err != nil {
		return err
	}
	if env.IsTerminal(env.Stdin) && env.IsTerminal(env.Stdout) {
		return attachTerminal(ctx, env, in, opts.Command)
	}
	var stdin io.Reader
	if len(opts.Command) == 0 {
		opts.Command, opts.Stdin = []string{"sh"}, true
	}
	if opts.Stdin && !env.IsTerminal(env.Stdin) {
		stdin = env.Stdin
	}
	return attachPlain(ctx, env, in, opts.Command, stdin)
}

// endOf is what becomes of a command that ended in a sandbox.
func endOf(exit sandbox.Exit) error {
	if exit.Code != exitOK {
		return said{exit.Code}
	}
	return nil
}

// attachTerminal joins the user's terminal to one in the sandbox.
func attachTerminal(ctx context.Context, env *Env, in inside, command []string) (err error) {
	terminaler, ok := sandbox.As[sandbox.Terminaler](in.provider)
	if !ok {
		return in.cannot("terminals")
	}
	if len(command) == 0 {
		command = []string{"sh", "-c", shellScript, "sh", in.id}
	}
	var size sandbox.TerminalSize
	out, _ := env.Stdout.(*os.File)
	measure := func() bool {
		if out == nil {
			return false
		}
		columns, rows, err := term.GetSize(int(out.Fd()))
		if err != nil {
			return false // as it was
		}
		now := sandbox.TerminalSize{Rows: uint16(rows), Columns: uint16(columns)}
		changed := now != size
		size = now
		return changed
	}
	measure()
	cmd := sandbox.Cmd{Args: command, Env: []string{"TERM=" + terminalName(env.Getenv("TERM"))}}
	t, err := terminaler.OpenTerminal(ctx, in.ref, cmd, size)
	if err != nil {
		return err
	}
	defer t.Close()
	stop := context.AfterFunc(ctx, func() { _ = t.Close() })
	defer stop()
	if keys, ok := env.Stdin.(*os.File); ok {
		before, err := term.MakeRaw(int(keys.Fd()))
		if err != nil {
			return fmt.Errorf("set mode of terminal: %w", err)
		}
		defer func() { err = errors.Join(err, term.Restore(int(keys.Fd()), before)) }()
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case <-changed:
				if measure() {
					_ = t.Resize(size) // it is on its way out
				}
			case <-over:
				return
			}
		}
	}()
	// What is typed goes in until the program ends: a read from a terminal
	// cannot be broken off.
	go func() { _, _ = io.Copy(t, env.Stdin) }()
	_, showErr := io.Copy(env.Stdout, t)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if showErr != nil {
		return fmt.Errorf("show the terminal: %w", showErr)
	}
	exit, err := t.Wait(ctx)
	if err != nil {
		return err
	}
	return endOf(exit)
}

// shellScript starts the best shell there is, with a prompt that says where
// one is. Its argument is the id of the fork.
const shellScript = `if command -v bash >/dev/null; then PS1="$1:"'\w\$ ' exec bash; fi; PS1="$1\$ " exec sh`

var validTerm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

// terminalName is what programs in a sandbox are told that they draw on.
func terminalName(name string) string {
	if !validTerm.MatchString(name) {
		return "xterm"
	}
	return name
}

// attachPlain runs a command without a terminal. What comes on stdin, unless
// it is nil, is all there before the command starts.
func attachPlain(ctx context.Context, env *Env, in inside, command []string, stdin io.Reader) error {
	sb, err := in.provider.Attach(ctx, in.ref)
	if err != nil {
		return err
	}
	defer sb.Close()
	id := "attach-" + strings.ToLower(rand.Text())
	if stdin != nil {
		name := "/tmp/." + id
		if err := sb.Upload(ctx, name, stdin); err != nil {
			return err
		}
		// The file is gone as soon as it is open.
		command = append([]string{"sh", "-c", `exec <"$1" && rm -f "$1" && shift && exec "$@"`, "sh", name}, command...)
	}
	p, err := sb.Start(ctx, id, sandbox.Cmd{Args: command})
	if err != nil {
		return err
	}
	exit, err := copyOutput(ctx, env, p)
	if err != nil {
		// Nobody is there any more who would want its end.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		return errors.Join(err, p.Signal(last, sandbox.Kill))
	}
	return endOf(exit)
}

// copyOutput copies what p says until it has ended.
func copyOutput(ctx context.Context, env *Env, p sandbox.Process) (exit sandbox.Exit, err error) {
	ended := make(chan error, 1)
	go func() {
		var err error
		exit, err = p.Wait(ctx)
		ended <- err
	}()
	streams := []struct {
		from   sandbox.Stream
		to     io.Writer
		offset int64
	}{{sandbox.Stdout, env.Stdout, 0}, {sandbox.Stderr, env.Stderr, 0}}
	tick := time.NewTicker(env.timing.output)
	defer tick.Stop()
	buf := make([]byte, 64<<10)
	for over := false; ; {
		for i := range streams {
			s := &streams[i]
			for {
				n, err := p.ReadAt(ctx, s.from, buf, s.offset)
				s.offset += int64(n)
				if _, e := io.Copy(s.to, bytes.NewReader(buf[:n])); e != nil {
					return exit, e
				}
				if errors.Is(err, io.EOF) || err == nil && n == 0 {
					break
				}
				if err != nil {
					return exit, err
				}
			}
		}
		if over {
			return exit, nil
		}
		select {
		case err := <-ended:
			if err != nil {
				if ctx.Err() != nil {
					err = ctx.Err()
				}
				return exit, err
			}
			over = true // what it said last is still to be read
		case <-tick.C:
		}
	}
}
