// Package mini is the program of the built-in agent: the smallest real agent
// loop, for machines without Claude Code. It asks a model over Anthropic's
// Messages API, runs the tools that the model calls (Bash, Read, Write and
// Edit, with the parameters that Claude Code's have), and goes on until the
// model calls none.
//
// On standard output it speaks Claude Code's stream-json, so that one decoder
// serves both. There is no permission system: it is meant to run in a sandbox.
package mini

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// The exit codes of [Main]; they are those of Claude Code.
const (
	exitDone       = 0   // success, or interrupted with a result
	exitFailed     = 1   // with a result that says why, or bad usage without one
	exitTerminated = 143 // SIGTERM: no result
)

// The bounds of one run.
const (
	maxTurns  = 100     // answers of the model
	maxTokens = 16_000  // of one answer; a gateway reserves money for them
	maxPrompt = 4 << 20 // bytes
)

// goOn is what a model is told whose agent died and came back.
const goOn = "Continue where you left off."

type options struct {
	model    string
	session  string
	resume   bool
	turns    int
	prompt   string
	baseURL  string
	key      string
	home     string
	dir      string
	patience time.Duration // how long one failing call of the model is repeated
}

// Main runs the agent in the working directory and returns its exit code.
//
// args are those of Claude Code, without the program's name: --model NAME,
// --session-id UUID or --resume UUID, --max-turns N, and the prompt, which is
// read from stdin when it is not given. env is asked for ANTHROPIC_BASE_URL,
// ANTHROPIC_API_KEY, HOME, and MINI_PATIENCE: for how long one call of the model
// is repeated that fails, as "3m", which is the standard.
//
// The conversation is kept in $HOME/.mini/SESSION.json and is written before
// and after each call of the model and each round of tools. --resume goes on
// with it after any death, without running a command twice; a session that was never begun begins with the
// prompt, and one that had ended only reports its result again. A session
// cannot be begun twice.
//
// The end of ctx and SIGINT end the run with a result that says it was
// interrupted, and exit code 0. SIGTERM ends it without a result and with exit
// code 143. Main takes both signals itself: a ctx that ends by SIGTERM too
// would make the one look like the other.
func Main(ctx context.Context, args []string, env func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	o, err := parse(args, env, stdin, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitDone
	}
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "mini:", err)
		if hint := fault.HintOf(err); hint != "" {
			_, _ = fmt.Fprintln(stderr, hint)
		}
		return exitFailed
	}
	return run(ctx, o, stdout, stderr)
}

var errTerminated = errors.New("terminated")

// run plays one session until its end or a signal.
func run(ctx context.Context, o options, stdout, stderr io.Writer) int {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	signals := make(chan os.Signal, 4)
	// SIGPIPE is taken too: a reader of our events that goes away is no reason
	// to stop, and a signal that is caught, unlike one that is ignored, is as
	// usual for the commands we run.
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGPIPE)
	defer signal.Stop(signals)
	go func() {
		for {
			select {
			case s := <-signals:
				switch s {
				case syscall.SIGTERM:
					cancel(errTerminated)
				case os.Interrupt:
					cancel(nil)
				}
			case <-ctx.Done():
				return
			}
		}
	}()

	l, err := begin(o, stdout)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "mini:", err)
		return exitFailed
	}
	end := l.play(ctx)
	if errors.Is(context.Cause(ctx), errTerminated) {
		return exitTerminated
	}
	l.events.result(end)
	if end.isError && end.reason != abortedStreaming && end.reason != abortedTools {
		return exitFailed
	}
	return exitDone
}

var uuidShape = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

func parse(args []string, env func(string) string, stdin io.Reader, stderr io.Writer) (options, error) {
	const op = "arguments"
	o := options{patience: 3 * time.Minute}
	var begin, resume string
	fs := flag.NewFlagSet("mini", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Bool("p", true, "print and exit; always so")
	fs.StringVar(&o.model, "model", "sonnet", "alias or full id of the model")
	fs.StringVar(&begin, "session-id", "", "UUID of the session to begin")
	fs.StringVar(&resume, "resume", "", "UUID of the session to go on with")
	fs.IntVar(&o.turns, "max-turns", maxTurns, "most answers of the model to one prompt")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	switch {
	case begin != "" && resume != "":
		return o, fault.New(op, fault.Invalid, "both --session-id and --resume")
	case resume != "":
		o.session, o.resume = resume, true
	case begin != "":
		o.session = begin
	default:
		o.session = newUUID()
	}
	// The session becomes a file name.
	if !uuidShape.MatchString(o.session) {
		return o, fault.New(op, fault.Invalid, "session %q is no UUID", o.session)
	}
	if o.turns < 1 || o.turns > maxTurns {
		return o, fault.New(op, fault.Invalid, "--max-turns %d: it can be 1 to %d", o.turns, maxTurns)
	}
	o.prompt = strings.Join(fs.Args(), " ")
	if o.prompt == "" {
		b, err := io.ReadAll(io.LimitReader(stdin, maxPrompt+1))
		if err != nil {
			return o, &fault.Error{Op: "read the prompt", Kind: fault.Unavailable, Err: err}
		}
		o.prompt = string(b)
	}
	o.prompt = strings.ToValidUTF8(strings.TrimSpace(o.prompt), "\ufffd")
	if len(o.prompt) > maxPrompt {
		return o, fault.New(op, fault.Invalid, "the prompt has more than %d bytes", maxPrompt)
	}
	if o.prompt == "" && !o.resume {
		return o, fault.New(op, fault.Invalid, "no prompt").Hinted("Give it as an argument or on standard input.")
	}
	o.model = modelID(o.model)
	if o.baseURL = strings.TrimRight(env("ANTHROPIC_BASE_URL"), "/"); o.baseURL == "" {
		o.baseURL = "https://api.anthropic.com"
	}
	o.key = env("ANTHROPIC_API_KEY")
	if s := env("MINI_PATIENCE"); s != "" {
		patience, err := time.ParseDuration(s)
		if err != nil || patience < 0 {
			return o, fault.New(op, fault.Invalid, "MINI_PATIENCE %q is no duration", s)
		}
		o.patience = patience
	}
	if o.home = env("HOME"); o.home == "" {
		return o, fault.New(op, fault.Invalid, "HOME is not set").Hinted("Set HOME to a folder where the session can be kept.")
	}
	dir, err := os.Getwd()
	if err != nil {
		return o, &fault.Error{Op: "working directory", Kind: fault.Unavailable, Err: err}
	}
	o.dir = dir
	return o, nil
}

// modelID resolves the aliases of Claude Code 2.1.330.
func modelID(name string) string {
	switch name {
	case "sonnet":
		return "claude-sonnet-5-5"
	case "opus", "best":
		return "claude-opus-5-5"
	case "haiku":
		return "claude-haiku-5-5"
	case "fable":
		return "claude-fable-5-2"
	}
	return name
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// mustJSON encodes what this package made itself, which always can be.
func mustJSON(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
