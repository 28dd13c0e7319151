package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// timing is how often a command looks and how long it puts up with silence.
// A zero field has its default; tests are less patient.
type timing struct {
	poll      time.Duration // between two looks at a run
	look      time.Duration // the most one look may take
	reconnect time.Duration // of trouble, before a new connection is tried
	giveUp    time.Duration // of trouble, before the command ends
	output    time.Duration // between two reads of what a command in a sandbox says
	alive     time.Duration // between two looks whether a sandbox is still there
}

func (t timing) complete() timing {
	for _, d := range []struct {
		is   *time.Duration
		want time.Duration
	}{{&t.poll, 500 * time.Millisecond}, {&t.look, 15 * time.Second}, {&t.reconnect, 3 * time.Second}, {&t.giveUp, 3 * time.Minute}, {&t.output, 100 * time.Millisecond}, {&t.alive, 2 * time.Second}} {
		if *d.is == 0 {
			*d.is = d.want
		}
	}
	return t
}

// A sight is what one look at a run showed.
type sight struct {
	At       time.Time
	Progress fork.Progress
	Live     map[int]fork.Live // of the running forks
	Trouble  string            // why this look failed; the rest is of the one before
}

// status is that of fork num.
func (s sight) status(num int) fork.Status {
	if num >= 1 && num <= len(s.Progress.Statuses) {
		return s.Progress.Statuses[num-1]
	}
	return fork.Pending
}

// spent is the cost of the run, with what the running forks spent so far:
// Progress knows that of the ended ones only.
func (s sight) spent() fork.USD {
	sum := s.Progress.Cost
	for num, l := range s.Live {
		if s.status(num) == fork.Running {
			sum += l.Cost
		}
	}
	return sum
}

// A watcher looks at a run again and again, and outlives the connection, and
// the engine, that it looks through.
type watcher struct {
	env  *Env
	runs Runs // replaced when it breaks
	run  string
	last sight
}

func newWatcher(env *Env, runs Runs) *watcher { return &watcher{env: env, runs: runs} }

func (w *watcher) close() { w.runs.Close() }

// passing reports whether err says that the same question may be answered
// later.
func passing(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	k := fault.KindOf(err)
	return k == fault.Unavailable || k == fault.Unreachable || errors.Is(err, context.DeadlineExceeded)
}

// follow calls show after every look, until the run has ended. Show is called
// from one goroutine.
func (w *watcher) follow(ctx context.Context, show func(sight)) (fork.Progress, error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var through Runs // what closed waits through
	var closed <-chan error
	gone := false
	for {
		if err := w.patiently(ctx, show, w.look); err != nil {
			return w.last.Progress, err
		}
		show(w.last)
		if w.last.Progress.Status.Ended() {
			return w.last.Progress, nil
		}
		if gone {
			return w.last.Progress, fault.New("", fault.Cancelled, "run %s was ended from outside, before its forks had ended", w.run).
				Hinted("Temporal's own records say by whom. What its forks left is removed by: %s cleanup", program)
		}
		if through != w.runs {
			through, closed = w.runs, w.closing(ctx)
		}
		timer := time.NewTimer(w.env.timing.poll)
		select {
		case err := <-closed:
			// It has ended, and says so the next time it is looked at, or
			// never: one that was terminated in Temporal can say nothing.
			gone = err == nil
			if err != nil && ctx.Err() == nil && !passing(ctx, err) {
				timer.Stop()
				return w.last.Progress, err
			}
			through, closed = nil, nil
			<-timer.C
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return w.last.Progress, ctx.Err()
		}
	}
}

// closing waits, beside the looks, for Temporal to close the run.
func (w *watcher) closing(ctx context.Context) <-chan error {
	runs, done := w.runs, make(chan error, 1)
	go func() {
		_, err := runs.Wait(ctx, w.run)
		done <- err
	}()
	return done
}

// look asks once.
func (w *watcher) look(ctx context.Context) error {
	p, err := w.runs.Progress(ctx, w.run)
	if err != nil {
		return err
	}
	live := map[int]fork.Live{}
	if len(p.Active) > 0 {
		// What forks are doing right now is worth no error.
		if l, err := w.runs.Live(ctx, w.run, p.Active); err == nil {
			live = l
		} else if ctx.Err() != nil {
			return ctx.Err()
		} else {
			live = w.last.Live
		}
	}
	w.last = sight{At: w.env.Now(), Progress: p, Live: live}
	return nil
}

// patiently asks until there is an answer, an error that will not pass, or no
// patience left. It connects anew when trouble lasts, which starts the engine
// again when it was the engine that died.
func (w *watcher) patiently(ctx context.Context, show func(sight), ask func(context.Context) error) error {
	var since, tried time.Time
	for {
		limited, cancel := context.WithTimeout(ctx, w.env.timing.look)
		err := ask(limited)
		cancel()
		if err == nil {
			w.last.Trouble = ""
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !passing(ctx, err) {
			return err
		}
		now := w.env.Now()
		if since.IsZero() {
			since, tried = now, now
		}
		if now.Sub(since) >= w.env.timing.giveUp {
			return &fault.Error{
				Kind: fault.Unreachable, Err: fmt.Errorf("run %s cannot be followed: %w", w.run, err),
				Hint: fmt.Sprintf("The run goes on as soon as Temporal does. Come back with: %s status --watch %s", program, w.run),
			}
		}
		w.last.At, w.last.Trouble = now, flat(err.Error())
		show(w.last)
		if now.Sub(tried) >= w.env.timing.reconnect {
			tried = now
			if runs, err := w.env.runs(ctx); err == nil {
				w.runs.Close()
				w.runs = runs
			}
		}
		if err := pause(ctx, w.env.timing.poll); err != nil {
			return err
		}
	}
}

// pause waits for d, or fails when ctx is done.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// watch shows what the run does until it has ended: drawn anew on a terminal,
// as lines elsewhere. It fails with said{exitDetached}, having told how to come
// back, when the user lets go of it.
func watch(ctx context.Context, env *Env, w *watcher) error {
	var err error
	if env.IsTerminal(env.Stderr) && env.Getenv("TERM") != "dumb" {
		err = watchLive(ctx, env, w)
	} else {
		lines := newLines(env.Stderr)
		_, err = w.follow(ctx, lines.show)
		lines.flush()
	}
	if err != nil && (errors.Is(err, errDetached) || ctx.Err() != nil) {
		sayDetached(env.Stderr, w.run)
		return said{exitDetached}
	}
	return err
}

// errDetached is the error of a watch that its user ended.
var errDetached = errors.New("detached")

func sayDetached(w io.Writer, run string) {
	run = flat(run)
	fmt.Fprintf(w, "Detached. The run goes on.\nCome back with: %s status --watch %s\nEnd it with:    %s cancel %s\n", program, run, program, run)
}

// waitAndReport follows the run to its end, prints its report and fails with
// the exit code that the report deserves.
func waitAndReport(ctx context.Context, env *Env, w *watcher, output string) error {
	if err := watch(ctx, env, w); err != nil {
		return err
	}
	var rep fork.Report
	err := w.patiently(ctx, func(sight) {}, func(ctx context.Context) (err error) {
		rep, err = w.runs.Report(ctx, w.run)
		return err
	})
	if err != nil {
		return err
	}
	bringHome(ctx, env, w.runs, rep)
	if err := printReport(env, rep, nil, output); err != nil {
		return err
	}
	if code := verdict(rep); code != exitOK {
		return said{code}
	}
	return nil
}
