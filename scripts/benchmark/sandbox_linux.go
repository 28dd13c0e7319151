package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

const sandboxCommand = "make bench ONLY=sandbox"

// A figure is what was promised of a measurement.
type figure struct {
	what     string
	limit    string
	measured string
	met      bool
}

// width is how many sandboxes are made at once in the crowded table.
const width = 16

// A score is what an engine was measured with.
type score struct {
	engine  engine
	missing string // why it was not measured

	create, exec, destroy series // one after the other
	crowded               series // create, width at once
	rate                  float64
	memory                int64 // bytes a sandbox
	processes             float64
	paused, resumed       series
	busy                  bool
}

// measureSandboxes compares local sandboxes with their peers, and then looks
// at what only they promise.
func measureSandboxes(ctx context.Context, o options) (tables []table, err error) {
	w, err := newWorkshop(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.close(context.WithoutCancel(ctx))) }()

	engines := append([]engine{newOurs(w, largeBase)}, peers(w)...)
	scores := make([]*score, len(engines))
	for i, e := range engines {
		defer func() { err = errors.Join(err, e.close(context.WithoutCancel(ctx))) }()
		s := &score{engine: e}
		scores[i] = s
		var missing errMissing
		if err := e.open(ctx); errors.As(err, &missing) {
			s.missing = string(missing)
			o.logf("%s: %s", e.name(), missing)
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", e.name(), err)
		}
	}
	if err := w.sequence(ctx, scores); err != nil {
		return nil, err
	}
	if err := w.crowd(ctx, scores); err != nil {
		return nil, err
	}
	our := scores[0]
	figures := []figure{
		most("create from the base and first command, p50", our.create.p(.5), 10*time.Millisecond),
		{"creates a second, 16 at once", "≥ 120", fmt.Sprintf("%.0f", our.rate), our.rate >= 120},
		most("further command, p50", our.exec.p(.5), 2*time.Millisecond),
		most("destroy, p50", our.destroy.p(.5), 3*time.Millisecond),
		{"idle memory a sandbox", "≤ 2 MiB", mib(our.memory), our.memory <= 2<<20},
	}
	tables = append(tables, sequenceTable(scores, o.n), crowdTable(scores), memoryTable(scores))
	steps := []func(context.Context, *workshop) ([]table, []figure, error){measurePause(scores), measureAttach, measureGit, measureOutput, measureGrowth}
	for _, step := range steps {
		t, f, err := step(ctx, w)
		if err != nil {
			return nil, err
		}
		tables = append(tables, t...)
		figures = append(figures, f...)
	}
	return append([]table{figureTable(figures)}, tables...), nil
}

func most(what string, measured, limit time.Duration) figure {
	return figure{what, "≤ " + ms(limit) + " ms", ms(measured) + " ms", measured > 0 && measured <= limit}
}

func figureTable(figures []figure) table {
	t := table{title: "What is promised", command: sandboxCommand, columns: []string{"", "promised", "measured", "kept"}}
	for _, f := range figures {
		kept := "no"
		if f.met {
			kept = "yes"
		}
		t.add(f.what, f.limit, f.measured, kept)
	}
	return t
}

// block is how many sandboxes an engine makes before it is the next one's
// turn.
const block = 10

// sequence makes sandboxes one after the other. The engines take turns. Slow
// ones have fewer.
func (w *workshop) sequence(ctx context.Context, scores []*score) error {
	for start := 0; start < w.n; start += block {
		for _, s := range scores {
			if s.missing != "" || (start >= w.n/5 && s.create.p(.5) > 60*time.Millisecond) {
				continue
			}
			if !quiet(ctx) {
				s.busy = true
			}
			count := min(block, w.n-start)
			for _, step := range []struct {
				to *series
				do func(context.Context, int) error
			}{{&s.create, s.engine.create}, {&s.exec, s.engine.exec}, {&s.destroy, s.engine.destroy}} {
				for i := range count {
					if ctx.Err() != nil {
						return context.Cause(ctx)
					}
					took, err := timed(func() error { return step.do(ctx, start+i) })
					if err != nil {
						return fmt.Errorf("%s: %w", s.engine.name(), err)
					}
					*step.to = append(*step.to, took)
				}
			}
		}
	}
	for _, s := range scores {
		w.logf("%-34s create+first %6s  further %6s  destroy %6s ms", s.engine.name(), ms(s.create.p(.5)), ms(s.exec.p(.5)), ms(s.destroy.p(.5)))
	}
	return nil
}

// crowd makes many at once, and looks at the memory while they all live.
func (w *workshop) crowd(ctx context.Context, scores []*score) error {
	for _, s := range scores {
		if s.missing != "" {
			continue
		}
		n := w.n
		if s.create.p(.5) > 60*time.Millisecond {
			n = max(width, n/5)
		}
		quiet(ctx)
		before, procsBefore := w.memory()
		s.crowded = make(series, n)
		wall, err := parallel(n, width, func(i int) (err error) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			s.crowded[i], err = timed(func() error { return s.engine.create(ctx, i) })
			return err
		})
		if err != nil {
			return fmt.Errorf("%s: %w", s.engine.name(), err)
		}
		s.rate = float64(n) / wall.Seconds()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(2 * time.Second): // idle
		}
		after, procs := w.memory()
		s.memory, s.processes = (after-before)/int64(n), float64(procs-procsBefore)/float64(n)
		if p, ok := s.engine.(pauser); ok {
			if err := s.holdStill(ctx, p, min(n, 20)); err != nil {
				w.logf("%s: pause: %v", s.engine.name(), err)
				s.paused, s.resumed = nil, nil
			}
		}
		if _, err := parallel(n, width, func(i int) error { return s.engine.destroy(ctx, i) }); err != nil {
			return fmt.Errorf("%s: %w", s.engine.name(), err)
		}
		w.logf("%-34s %4.0f/s  %s  %.1f processes", s.engine.name(), s.rate, mib(s.memory), s.processes)
	}
	return nil
}

func (s *score) holdStill(ctx context.Context, p pauser, n int) error {
	for i := range n {
		took, err := timed(func() error { return p.pause(ctx, i) })
		if err != nil {
			return err
		}
		s.paused = append(s.paused, took)
		took, err = timed(func() error { return p.resume(ctx, i) })
		if err != nil {
			return err
		}
		s.resumed = append(s.resumed, took)
	}
	return nil
}

func mib(n int64) string { return fmt.Sprintf("%.2f MiB", float64(n)/(1<<20)) }

func sequenceTable(scores []*score, n int) table {
	t := table{
		title: "One after the other", command: sandboxCommand,
		note: fmt.Sprintf("A sandbox over the same frozen base, copy on write, and in it /bin/true; a further /bin/true; destroyed again, files and all. "+
			"%d of each engine, a fifth of that of those that need more than 60 ms, in turns of %d. Milliseconds. "+
			"Bubblewrap and nsenter(1) keep no supervisor, no limits, and no way back to a sandbox for a second process; "+
			"the overlay is mounted by this program for them, and for runsc and docker.", n, block),
		columns: []string{"engine", "create + first command p50", "p99", "× ours", "further command p50", "p99", "destroy p50", "p99"},
	}
	our := scores[0]
	for _, s := range scores {
		if s.missing != "" {
			t.add(s.engine.name(), s.missing, "–", "–", "–", "–", "–", "–")
			continue
		}
		name := s.engine.name()
		if s.busy {
			name += " (machine was busy)"
		}
		t.add(name, ms(s.create.p(.5)), ms(s.create.p(.99)), ratio(s.create.p(.5), our.create.p(.5)),
			ms(s.exec.p(.5)), ms(s.exec.p(.99)), ms(s.destroy.p(.5)), ms(s.destroy.p(.99)))
	}
	return t
}

func crowdTable(scores []*score) table {
	t := table{
		title: fmt.Sprintf("%d at once", width), command: sandboxCommand,
		note:    "The same create with first command. Milliseconds.",
		columns: []string{"engine", "p50", "p99", "creates a second", "× ours"},
	}
	for _, s := range scores {
		if s.missing != "" {
			t.add(s.engine.name(), s.missing, "–", "–", "–")
			continue
		}
		t.add(s.engine.name(), ms(s.crowded.p(.5)), ms(s.crowded.p(.99)), fmt.Sprintf("%.0f", s.rate), fmt.Sprintf("%.2f ×", s.rate/scores[0].rate))
	}
	return t
}

func memoryTable(scores []*score) table {
	t := table{
		title: "Memory of an idle sandbox", command: sandboxCommand,
		note: "All processes that stay for one sandbox, two seconds after the last command; pages that several share count by their part (Pss). " +
			"A daemon that all sandboxes share is not in it. The peers' sandboxes hold a shell and a sleep, ours need nothing to stay alive.",
		columns: []string{"engine", "memory", "processes"},
	}
	for _, s := range scores {
		if s.missing != "" {
			t.add(s.engine.name(), s.missing, "–")
			continue
		}
		t.add(s.engine.name(), mib(s.memory), fmt.Sprintf("%.1f", s.processes))
	}
	return t
}

func measurePause(scores []*score) func(context.Context, *workshop) ([]table, []figure, error) {
	return func(ctx context.Context, w *workshop) ([]table, []figure, error) {
		t := table{title: "Pause and resume", command: sandboxCommand, note: "Milliseconds.", columns: []string{"engine", "pause p50", "p99", "resume p50", "p99"}}
		our := scores[0]
		if our.paused == nil {
			t.add(our.engine.name(), "not offered", "–", "–", "–")
		}
		for _, s := range scores {
			if s.paused != nil {
				t.add(s.engine.name(), ms(s.paused.p(.5)), ms(s.paused.p(.99)), ms(s.resumed.p(.5)), ms(s.resumed.p(.99)))
			}
		}
		return []table{t}, []figure{most("pause, p50", our.paused.p(.5), 5*time.Millisecond), most("resume, p50", our.resumed.p(.5), 5*time.Millisecond)}, nil
	}
}

// measureAttach finds a sandbox and a process in it again, as a worker does
// that knows nothing but the ref.
func measureAttach(ctx context.Context, w *workshop) ([]table, []figure, error) {
	e := newOurs(w, largeBase)
	defer e.close(context.WithoutCancel(ctx)) //nolint:errcheck // what is left fails the end of the section
	if err := e.create(ctx, 0); err != nil {
		return nil, nil, err
	}
	var times series
	quiet(ctx)
	for range w.n {
		took, err := timed(func() error {
			sb, err := w.another().Attach(ctx, e.box(0).ref)
			if err != nil {
				return err
			}
			defer sb.Close()
			p, err := sb.Process(ctx, "true-1")
			if err != nil {
				return err
			}
			_, ok, err := p.Exit(ctx)
			if err == nil && !ok {
				err = errors.New("the process has no exit")
			}
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		times = append(times, took)
	}
	t := table{
		title: "Re-attach", command: sandboxCommand, note: "From a ref to the exit of a process that another worker started. Milliseconds.",
		columns: []string{"", "p50", "p99"},
	}
	t.add("attach, find process, exit", ms(times.p(.5)), ms(times.p(.99)))
	return []table{t}, []figure{most("re-attach, p50", times.p(.5), 5*time.Millisecond)}, nil
}

// measureGrowth makes sandboxes beside more and more others, and over bases
// of different sizes.
func measureGrowth(ctx context.Context, w *workshop) ([]table, []figure, error) {
	const sample = 20
	t := table{
		title: "Growth", command: sandboxCommand,
		note:    fmt.Sprintf("Create and first command, one after the other, %d each. Milliseconds.", sample),
		columns: []string{"", "p50", "p99", "create alone p50", "destroy p50"},
	}
	var figures []figure
	one := func(e *ours, from int) (created, alone, destroyed series, err error) {
		quiet(ctx)
		for i := range sample {
			start := time.Now()
			ref, err := w.local.Create(ctx, e.spec(from+i))
			if err != nil {
				return nil, nil, nil, err
			}
			alone = append(alone, time.Since(start))
			// Found again under its key, at once.
			took, err := timed(func() error { return e.create(ctx, from+i) })
			if err != nil {
				return nil, nil, nil, errors.Join(err, w.local.Destroy(ctx, ref))
			}
			created = append(created, alone[i]+took)
			took, err = timed(func() error { return e.destroy(ctx, from+i) })
			if err != nil {
				return nil, nil, nil, err
			}
			destroyed = append(destroyed, took)
		}
		return created, alone, destroyed, nil
	}
	row := func(name string, created, alone, destroyed series) {
		t.add(name, ms(created.p(.5)), ms(created.p(.99)), ms(alone.p(.5)), ms(destroyed.p(.5)))
		w.logf("%-34s create+first %6s  destroy %6s ms", name, ms(created.p(.5)), ms(destroyed.p(.5)))
	}
	var bases series
	if err := w.makeBase(ctx, smallBase, 100); err != nil {
		return nil, nil, err
	}
	for _, b := range []struct{ key, name string }{{"", "no base"}, {smallBase, "base of 100 files"}, {largeBase, fmt.Sprintf("base of %d files", w.files)}} {
		e := newOurs(w, b.key)
		created, alone, destroyed, err := one(e, 5000)
		if err := errors.Join(err, e.close(context.WithoutCancel(ctx))); err != nil {
			return nil, nil, err
		}
		row(b.name, created, alone, destroyed)
		bases = append(bases, alone.p(.5))
	}
	figures = append(figures, grown("create alone, from 100 files to "+strconv.Itoa(w.files), bases[1], bases[2]))

	crowd := newOurs(w, largeBase)
	defer crowd.close(context.WithoutCancel(ctx)) //nolint:errcheck // what is left fails the end of the section
	var lives series
	alive := 0
	for _, live := range []int{1, 100, 500} {
		from := alive
		alive = live
		if _, err := parallel(live-from, width, func(i int) error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return crowd.create(ctx, from+i)
		}); err != nil {
			return nil, nil, err
		}
		e := newOurs(w, largeBase)
		created, alone, destroyed, err := one(e, 5000)
		if err := errors.Join(err, e.close(context.WithoutCancel(ctx))); err != nil {
			return nil, nil, err
		}
		row(fmt.Sprintf("beside %d live ones", live), created, alone, destroyed)
		lives = append(lives, alone.p(.5))
	}
	figures = append(figures, grown("create alone, from 1 to 500 live sandboxes", lives[0], lives[2]))
	_, err := parallel(alive, width, func(i int) error { return crowd.destroy(context.WithoutCancel(ctx), i) })
	return []table{t}, figures, err
}

// grown allows for noise, which on a busy machine is a third.
func grown(what string, from, to time.Duration) figure {
	return figure{what, "does not grow (≤ 1.33 ×)", ratio(to, from), float64(to) <= 1.33*float64(from)}
}

// another is a worker that knows nothing.
func (w *workshop) another() sandbox.Provider {
	return local.New(w.localOptions)
}
