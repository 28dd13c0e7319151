package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/local"
)

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
	steps := []func(context.Context, *workshop) ([]table, []figure, error){measureSpares(scores), measurePause(scores), measureAttach, measureGit, measureOutput, measureGrowth, measureFormats}
	for _, step := range steps {
		t, f, err := step(ctx, w)
		if err != nil {
			return nil, err
		}
		tables = append(tables, t...)
		figures = append(figures, f...)
	}
	kept := figureTable(figures)
	kept.note = strings.TrimSpace(w.where + " " + w.String())
	return append([]table{kept}, tables...), nil
}

func most(what string, measured, limit time.Duration) figure {
	return figure{what, "≤ " + ms(limit) + " ms", ms(measured) + " ms", measured > 0 && measured <= limit}
}

func figureTable(figures []figure) table {
	t := table{title: "What is promised", columns: []string{"", "promised", "measured", "kept"}}
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
			if err := warm(ctx, s.engine, w.n); err != nil {
				return fmt.Errorf("%s: %w", s.engine.name(), err)
			}
			w.quiet(ctx)
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

// warm makes a sandbox that is not measured and removes it, as a run prepares
// what its forks start from.
func warm(ctx context.Context, e engine, i int) error {
	if err := e.create(ctx, i); err != nil {
		return err
	}
	return e.destroy(ctx, i)
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
		if err := warm(ctx, s.engine, n); err != nil {
			return fmt.Errorf("%s: %w", s.engine.name(), err)
		}
		w.quiet(ctx)
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
		title: "One after the other",
		note: fmt.Sprintf("A sandbox over the same frozen base, copy on write, and in it /bin/true; a further /bin/true; destroyed again, files and all. "+
			"%d of each engine, a fifth of that of those that need more than 60 ms, in turns of %d; before each turn one that is not measured, and a pause. Milliseconds. "+
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
		t.add(s.engine.name(), ms(s.create.p(.5)), ms(s.create.p(.99)), ratio(s.create.p(.5), our.create.p(.5)),
			ms(s.exec.p(.5)), ms(s.exec.p(.99)), ms(s.destroy.p(.5)), ms(s.destroy.p(.99)))
	}
	return t
}

func crowdTable(scores []*score) table {
	t := table{
		title:   fmt.Sprintf("%d at once", width),
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
		title: "Memory of an idle sandbox",
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

// measureSpares makes sandboxes of which none is kept ready.
func measureSpares(scores []*score) func(context.Context, *workshop) ([]table, []figure, error) {
	return func(ctx context.Context, w *workshop) ([]table, []figure, error) {
		options := w.localOptions
		options.Spares = 0
		e := newOurs(w, largeBase)
		e.local = local.New(options)
		defer e.close(context.WithoutCancel(ctx)) //nolint:errcheck // what is left fails the end of the section
		without := &score{engine: e}
		if err := w.sequence(ctx, []*score{without}); err != nil {
			return nil, nil, err
		}
		t := table{
			title: "Sandboxes that are kept ready",
			note: fmt.Sprintf("As many as are by default, and none (SANDBOX_TEMPORAL_SPARE_SANDBOXES=0), which is also what those have that are made "+
				"in a row when no more are ready: new ones are started when nothing was asked of any sandbox for 50 ms. "+
				"One after the other, in turns of %d. Milliseconds.", block),
			columns: []string{"kept ready", "create + first command p50", "p99", "further command p50", "destroy p50"},
		}
		for _, row := range []struct {
			kept int
			*score
		}{{w.localOptions.Spares, scores[0]}, {0, without}} {
			t.add(strconv.Itoa(row.kept), ms(row.create.p(.5)), ms(row.create.p(.99)), ms(row.exec.p(.5)), ms(row.destroy.p(.5)))
		}
		return []table{t}, nil, nil
	}
}

func measurePause(scores []*score) func(context.Context, *workshop) ([]table, []figure, error) {
	return func(ctx context.Context, w *workshop) ([]table, []figure, error) {
		t := table{title: "Pause and resume", note: "Milliseconds.", columns: []string{"engine", "pause p50", "p99", "resume p50", "p99"}}
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
	w.quiet(ctx)
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
		title: "Re-attach", note: "From a ref to the exit of a process that another worker started. Milliseconds.",
		columns: []string{"", "p50", "p99"},
	}
	t.add("attach, find process, exit", ms(times.p(.5)), ms(times.p(.99)))
	return []table{t}, []figure{most("re-attach, p50", times.p(.5), 5*time.Millisecond)}, nil
}

// A growth is what a sandbox cost under one condition.
type growth struct{ create, first, destroy series }

// measureGrowth makes sandboxes beside more and more others, and over bases
// of different sizes.
func measureGrowth(ctx context.Context, w *workshop) ([]table, []figure, error) {
	const rounds = 4
	t := table{
		title: "Growth",
		note: fmt.Sprintf("One after the other, %d each, in turns where that can be. What else runs on the machine adds to p50 more than to the "+
			"lowest tenth (p10), by which growth is judged. Milliseconds.", rounds*block),
		columns: []string{"", "create p10", "p50", "first command p50", "destroy p50"},
	}
	add := func(name string, g growth) {
		t.add(name, ms(g.create.p(.1)), ms(g.create.p(.5)), ms(g.first.p(.5)), ms(g.destroy.p(.5)))
		w.logf("%-34s create %6s (p10 %6s)  first %6s  destroy %6s ms", name, ms(g.create.p(.5)), ms(g.create.p(.1)), ms(g.first.p(.5)), ms(g.destroy.p(.5)))
	}
	if err := w.makeBase(ctx, smallBase, 100); err != nil {
		return nil, nil, err
	}
	names := []string{"no base", "base of 100 files", fmt.Sprintf("base of %d files", w.files)}
	sizes := make([]growth, len(names))
	for range rounds {
		for i, key := range []string{"", smallBase, largeBase} {
			if err := w.grow(ctx, key, &sizes[i]); err != nil {
				return nil, nil, err
			}
		}
	}
	for i, name := range names {
		add(name, sizes[i])
	}
	crowd := newOurs(w, largeBase)
	defer crowd.close(context.WithoutCancel(ctx)) //nolint:errcheck // what is left fails the end of the section
	counts := []int{1, 100, 500}
	lives := make([]growth, len(counts))
	alive := 0
	for i, live := range counts {
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
		for range rounds {
			if err := w.grow(ctx, largeBase, &lives[i]); err != nil {
				return nil, nil, err
			}
		}
		add(fmt.Sprintf("beside %d live ones", live), lives[i])
	}
	_, err := parallel(alive, width, func(i int) error { return crowd.destroy(context.WithoutCancel(ctx), i) })
	return []table{t}, []figure{
		grown("create, from a base of 100 files to one of "+strconv.Itoa(w.files), sizes[1], sizes[2]),
		grown("create, from 1 to 500 live sandboxes", lives[0], lives[2]),
	}, err
}

// grow measures a block of sandboxes.
func (w *workshop) grow(ctx context.Context, base string, g *growth) error {
	const from = 5000 // other keys than those of the crowd
	e := newOurs(w, base)
	if err := warm(ctx, e, from); err != nil {
		return errors.Join(err, e.close(context.WithoutCancel(ctx)))
	}
	w.quiet(ctx)
	for i := range block {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for _, step := range []struct {
			to *series
			do func(context.Context, int) error
		}{{&g.create, e.make}, {&g.first, e.exec}, {&g.destroy, e.destroy}} {
			took, err := timed(func() error { return step.do(ctx, from+i) })
			if err != nil {
				return errors.Join(err, e.close(context.WithoutCancel(ctx)))
			}
			*step.to = append(*step.to, took)
		}
	}
	return nil
}

// grown allows for noise, which on a busy machine is a third.
func grown(what string, from, to growth) figure {
	a, b := from.create.p(.1), to.create.p(.1)
	return figure{what, "does not grow (≤ 1.33 ×)", ratio(b, a), float64(b) <= 1.33*float64(a)}
}

// another is a worker that knows nothing.
func (w *workshop) another() sandbox.Provider {
	return local.New(w.localOptions)
}
