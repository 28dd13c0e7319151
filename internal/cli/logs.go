package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

type logsOptions struct {
	Target target
	Follow bool
	Raw    bool
	Verify bool
}

// newLogs makes the "logs" command.
func newLogs(env *Env, run func(context.Context, *Env, logsOptions) error) *cobra.Command {
	if run == nil {
		run = runLogs
	}
	var opts logsOptions
	cmd := &cobra.Command{
		Use:     "logs RUN[/N]",
		GroupID: groupWork,
		Short:   "Show what agents said and did",
		Long: `Logs shows what the agent of one fork said and did, or those of all forks of a
run, each line with the number of its fork. With --follow it goes on until the
forks have ended. With --verify it shows what the verification of their work
printed instead; see fork --verify.
` + targetHelp + exits(common...),
		Example:           "  sandbox-temporal logs @last/1 --follow\n  sandbox-temporal logs @last/1 --raw > transcript.jsonl\n  sandbox-temporal logs @last/2 --verify",
		Args:              args("RUN or RUN/N"),
		ValidArgsFunction: completeRuns(env),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = parseTarget(words[0]); err != nil {
				return err
			}
			if opts.Verify && (opts.Follow || opts.Raw) {
				return usage("Leave one of them out.", "--verify is given with --follow or --raw, which are about the agent")
			}
			return run(cmd.Context(), env, opts)
		},
	}
	cmd.Flags().BoolVarP(&opts.Follow, "follow", "f", false, "go on until the forks have ended")
	cmd.Flags().BoolVar(&opts.Raw, "raw", false, "print the lines as the agent wrote them; for one fork only")
	cmd.Flags().BoolVar(&opts.Verify, "verify", false, "show what the verification of the work printed")
	return cmd
}

func runLogs(ctx context.Context, env *Env, opts logsOptions) error {
	runs, run, err := env.open(ctx, opts.Target)
	if err != nil {
		return err
	}
	w := newWatcher(env, runs)
	defer w.close()
	w.run = run
	p, err := runs.Progress(ctx, run)
	if err != nil {
		return err
	}
	if err := hasFork(p, run, opts.Target.num); err != nil {
		return err
	}
	if opts.Raw && opts.Target.num == 0 && p.Total > 1 {
		return usage("Name one, as "+run+"/1.", "--raw is for one fork, and run %s has %d", run, p.Total)
	}
	plan, err := runs.Plan(ctx, run)
	if err != nil {
		return err
	}
	ag, err := agent.ByName(plan.Agent)
	if err != nil {
		return err
	}
	if env.Artifacts == nil {
		return missing("artifact store")
	}
	store, err := env.Artifacts(ctx, env.Globals)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(env.Stdout)
	l := &logReader{
		store: store, run: run, agent: ag, out: out, paint: env.paintFor(env.Stdout), raw: opts.Raw, only: opts.Target.num,
		harmless: opts.Raw && env.IsTerminal(env.Stdout), many: opts.Target.num == 0 && p.Total > 1,
	}
	nothing := "The agent has said nothing yet."
	switch {
	case opts.Verify:
		nothing = "Nothing was verified yet."
		if plan.Verify == "" {
			nothing = "Nothing is verified of this run: it was started without --verify."
		}
		err = l.verified(ctx, p.Total)
	case opts.Follow:
		err = l.follow(ctx, w)
	default:
		err = l.all(ctx, sight{Progress: p})
	}
	if e := out.Flush(); err == nil {
		err = e
	}
	if err == nil && !l.found {
		fmt.Fprintln(env.Stderr, nothing)
		if cfg := env.Globals.Config; !cfg.Embedded() && cfg.Artifacts == "" {
			fmt.Fprintf(env.Stderr, "What forks on other hosts say is in the artifact store of their workers. %s.\n", hintArtifacts)
		}
	}
	if err != nil && ctx.Err() != nil && opts.Follow {
		sayDetached(env.Stderr, run)
		return said{exitDetached}
	}
	return err
}

// logReader prints the transcripts of a run's forks.
type logReader struct {
	store    Artifacts
	run      string
	agent    agent.Agent
	out      *bufio.Writer
	paint    paint
	raw      bool // as the agent wrote it
	harmless bool // but with nothing in it that a terminal obeys
	only     int  // one fork; 0: all
	many     bool // lines say whose they are
	found    bool // there was something to print
	forks    map[int]*transcript
}

// transcript is how far that of one fork was read.
type transcript struct {
	attempt int
	offset  int64
	lines   agent.Lines
	ended   bool // nothing more will come
}

// all prints what there is of the forks that have begun.
func (l *logReader) all(ctx context.Context, s sight) error {
	if l.forks == nil {
		l.forks = map[int]*transcript{}
	}
	for num := 1; num <= s.Progress.Total; num++ {
		status := s.status(num)
		if l.only != 0 && num != l.only || status == fork.Pending {
			continue
		}
		t := l.forks[num]
		if t == nil {
			t = &transcript{attempt: 1}
			l.forks[num] = t
		}
		if t.ended {
			continue
		}
		if err := l.read(ctx, num, t); err != nil {
			return err
		}
		if status.Ended() {
			t.ended = true
			t.lines.Flush(l.line(num))
			if err := l.refused(ctx, num); err != nil {
				return err
			}
		}
	}
	return l.out.Flush()
}

// follow prints until the forks that it is for have ended.
func (l *logReader) follow(ctx context.Context, w *watcher) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var failed error
	trouble := false
	_, err := w.follow(ctx, func(s sight) {
		if s.Trouble != "" {
			if !trouble {
				fmt.Fprintf(w.env.Stderr, "waiting for Temporal: %s\n", s.Trouble)
			}
			trouble = true
			return
		}
		trouble = false
		if failed == nil {
			failed = l.all(ctx, s)
		}
		if failed != nil || l.only != 0 && s.status(l.only).Ended() {
			stop()
		}
	})
	switch {
	case failed != nil:
		return failed
	case l.only != 0 && l.forks[l.only] != nil && l.forks[l.only].ended:
		return nil // stopped by us
	}
	return err
}

// read prints what came to the fork's transcript since the last call.
func (l *logReader) read(ctx context.Context, num int, t *transcript) error {
	for {
		n, err := l.attempt(ctx, num, t)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
		l.found = l.found || n > 0
		// The agent may have been started again: then no more comes here.
		next := &transcript{attempt: t.attempt + 1}
		if err != nil || !l.exists(ctx, num, next.attempt) {
			return nil
		}
		// What came between the two looks.
		if _, err := l.attempt(ctx, num, t); err != nil {
			return err
		}
		t.lines.Flush(l.line(num))
		*t = *next
	}
}

// refused prints what the fork's sandbox was not let do.
func (l *logReader) refused(ctx context.Context, num int) error {
	if l.raw {
		return nil // it is no word of the agent's
	}
	r, err := l.store.Refused(ctx, l.run, num)
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer r.Close()
	prefix := l.prefix(num)
	for d := json.NewDecoder(io.LimitReader(r, 1<<20)); ; {
		var refusal fork.Refusal
		if err := d.Decode(&refusal); err != nil {
			return nil //nolint:nilerr // the end, or a line that was cut off
		}
		fmt.Fprintln(l.out, prefix+l.paint.in(yellow, fmt.Sprintf("! no connection to %s: %s", flat(refusal.Host), flat(refusal.Reason))))
	}
}

// verified prints what the verifications of the forks' work printed.
func (l *logReader) verified(ctx context.Context, total int) error {
	for num := 1; num <= total; num++ {
		if l.only != 0 && num != l.only {
			continue
		}
		r, err := l.store.Verified(ctx, l.run, num)
		if fault.KindOf(err) == fault.NotFound {
			continue
		}
		if err != nil {
			return err
		}
		l.found = true
		var lines agent.Lines
		show := func(line []byte) { fmt.Fprintln(l.out, l.prefix(num)+clean(string(line))) }
		buf := make([]byte, 64<<10)
		for n := 0; err == nil; {
			n, err = r.Read(buf)
			lines.Feed(buf[:n], show)
		}
		lines.Flush(show)
		_ = r.Close()
		if !errors.Is(err, io.EOF) {
			return err
		}
	}
	return nil
}

// prefix says whose a line is, when there is more than one fork.
func (l *logReader) prefix(num int) string {
	if !l.many {
		return ""
	}
	return l.paint.in(dim, fmt.Sprintf("%d| ", num))
}

func (l *logReader) exists(ctx context.Context, num, attempt int) bool {
	r, err := l.store.Transcript(ctx, l.run, num, attempt, 0)
	if err != nil {
		return false
	}
	_ = r.Close() // nothing was read of it
	return true
}

// attempt prints what came to the transcript of one attempt.
func (l *logReader) attempt(ctx context.Context, num int, t *transcript) (int64, error) {
	r, err := l.store.Transcript(ctx, l.run, num, t.attempt, t.offset)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	var sum int64
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		t.offset += int64(n)
		sum += int64(n)
		if l.raw && !l.harmless {
			if _, err := l.out.Write(buf[:n]); err != nil {
				return sum, err
			}
		} else {
			t.lines.Feed(buf[:n], l.line(num))
		}
		if errors.Is(err, io.EOF) {
			return sum, nil
		}
		if err != nil {
			return sum, err
		}
	}
}

// line returns what prints a line of the transcript of fork num. Errors of the
// writer are kept by it and come with Flush.
func (l *logReader) line(num int) func([]byte) {
	prefix := l.prefix(num)
	return func(line []byte) {
		if l.raw {
			if l.harmless {
				fmt.Fprintln(l.out, oneRow(string(line)))
			}
			return
		}
		for _, e := range l.agent.Decode(line) {
			text, colour := describeEvent(e)
			for row := range strings.SplitSeq(text, "\n") {
				if text != "" {
					fmt.Fprintln(l.out, prefix+l.paint.in(colour, row))
				}
			}
		}
	}
}

// maxAnswer bounds how many lines of a tool's answer are shown.
const maxAnswer = 12

// describeEvent tells an event to a person, and in which colour; "" when there
// is nothing to tell.
func describeEvent(e agent.Event) (text, colour string) {
	said := strings.TrimSpace(clean(e.Text))
	nested := ""
	if e.Nested {
		nested = "  "
	}
	switch e.Kind {
	case agent.Started:
		return strings.TrimSpace("started " + flat(e.Model)), dim
	case agent.Text:
		text, colour = said, plain
	case agent.Think:
		text, colour = said, dim
	case agent.Tool:
		text, colour = strings.TrimSpace("> "+flat(e.Tool)+" "+said), cyan
	case agent.Output:
		rows := strings.Split(said, "\n")
		if len(rows) > maxAnswer {
			more := len(rows) - maxAnswer
			rows = append(rows[:maxAnswer], fmt.Sprintf("… (%s more)", plural(more, "line")))
		}
		text, colour = "  "+strings.Join(rows, "\n  "), dim
		if said == "" {
			text = ""
		}
		if e.Failed {
			colour = red
		}
	case agent.Retry:
		text, colour = strings.TrimSpace("! trying again: "+said), yellow
	case agent.Ended:
		if e.End == nil {
			return "ended", dim
		}
		word, colour := "ended", green
		if e.End.Error {
			word, colour = "ended with an error", red
		}
		parts := []string{word}
		if r := flat(e.End.Reason); r != "" {
			parts = append(parts, r)
		}
		parts = append(parts, plural(e.End.Turns, "turn"))
		if e.End.Error && e.End.Text != "" {
			parts = append(parts, flat(e.End.Text))
		}
		return strings.Join(parts, " · "), colour
	}
	if text == "" {
		return "", plain
	}
	return nested + strings.ReplaceAll(text, "\n", "\n"+nested), colour
}
