package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func healthy(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if err := sb.Health(ctx); err != nil {
			return failed("health: %w", err)
		}
		if err := p.Destroy(ctx, ref); err != nil {
			return failed("destroy: %w", err)
		}
		if sb.Health(ctx) == nil {
			return failed("a sandbox that was destroyed is healthy")
		}
		return nil
	})
}

func closeLets(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if _, err := sb.Start(ctx, "slow", shell("while [ ! -e go ]; do sleep 0.02; done; exit 3")); err != nil {
			return failed("start: %w", err)
		}
		if err := sb.Close(); err != nil {
			return failed("close: %w", err)
		}
		again, err := p.Attach(ctx, ref)
		if err != nil {
			return failed("attach after close: %w", err)
		}
		defer again.Close()
		proc, err := again.Process(ctx, "slow")
		if err != nil {
			return failed("find process: %w", err)
		}
		if err := again.Upload(ctx, sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
			return failed("upload: %w", err)
		}
		if exit, err := proc.Wait(ctx); err != nil || exit.Code != 3 {
			return failed("wait: %+v, %v, want code 3", exit, err)
		}
		return nil
	})
}

func attachAfterDestroy(ctx context.Context, p sandbox.Provider, key string) error {
	ref, err := p.Create(ctx, spec(key))
	if err != nil {
		return failed("create: %w", err)
	}
	if err := destroy(ctx, p, ref); err != nil {
		return err
	}
	return isGone(ctx, p, ref)
}

func isGone(ctx context.Context, p sandbox.Provider, ref sandbox.Ref) error {
	sb, err := p.Attach(ctx, ref)
	if err == nil {
		_ = sb.Close()
	}
	return wantKind("attach to a sandbox that is gone", err, fault.NotFound)
}

func destroyTwice(ctx context.Context, p sandbox.Provider, key string) error {
	ref, err := p.Create(ctx, spec(key))
	if err != nil {
		return failed("create: %w", err)
	}
	for range 3 {
		if err := destroy(ctx, p, ref); err != nil {
			return err
		}
	}
	return nil
}

// destroyEnds can look at the processes of sandboxes on this host only: the
// marker in their command line is theirs alone.
func destroyEnds(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		// One that ignores what it can, and one that left the group.
		script := `trap '' TERM INT HUP; (setsid sh -c 'echo up >> started; while :; do sleep 0.05; done' ` + marker(key) + ` &) ; echo up >> started; while :; do sleep 0.05; done`
		cmd := sandbox.Cmd{Args: []string{"sh", "-c", script, marker(key)}}
		proc, err := sb.Start(ctx, "stubborn", cmd)
		if err != nil {
			return failed("start: %w", err)
		}
		n := 0
		err = until(ctx, "both processes run", func() (bool, error) {
			n++
			out, err := run(ctx, sb, fmt.Sprintf("look-%d", n), shell("cat started 2>/dev/null; true"))
			return strings.Count(out, "up") == 2, err
		})
		if err != nil {
			return err
		}
		if err := p.Destroy(ctx, ref); err != nil {
			return failed("destroy: %w", err)
		}
		if _, ok := sandbox.As[sandbox.HostBound](p); ok {
			if alive, err := processesNaming(marker(key)); err != nil || len(alive) > 0 {
				return failed("processes %v live on after destroy (%v)", alive, err)
			}
		}
		if exit, err := proc.Wait(ctx); err == nil && exit.Signal == "" {
			return failed("the process ended by itself: %+v", exit)
		}
		return isGone(ctx, p, ref)
	})
}

func marker(key string) string { return "conformance-marker-" + key + "-end" }

func list(ctx context.Context, p sandbox.Provider, key string) error {
	created := time.Now()
	labelled := func(fork string) sandbox.Spec {
		s := spec(key + "-" + fork)
		s.Labels = map[string]string{sandbox.LabelRun: key, sandbox.LabelFork: fork, sandbox.LabelNamespace: "a b/c.d"}
		return s
	}
	return with(ctx, p, labelled("1"), func(one sandbox.Ref, _ sandbox.Sandbox) error {
		return with(ctx, p, labelled("2"), func(two sandbox.Ref, _ sandbox.Sandbox) error {
			rows := []struct {
				labels map[string]string
				want   []sandbox.Ref
			}{
				{map[string]string{sandbox.LabelRun: key}, []sandbox.Ref{one, two}},
				{map[string]string{sandbox.LabelRun: key, sandbox.LabelFork: "2"}, []sandbox.Ref{two}},
				{map[string]string{sandbox.LabelRun: key, sandbox.LabelFork: "3"}, nil},
				{map[string]string{sandbox.LabelRun: key, sandbox.LabelDeployment: ""}, nil},
				{map[string]string{sandbox.LabelRun: key + "x"}, nil},
			}
			for _, r := range rows {
				infos, err := p.List(ctx, r.labels)
				if err != nil {
					return failed("list %v: %w", r.labels, err)
				}
				if err := wantRefs(infos, r.want); err != nil {
					return failed("list %v: %w", r.labels, err)
				}
				for _, i := range infos {
					if i.Labels[sandbox.LabelRun] != key || i.Labels[sandbox.LabelNamespace] != "a b/c.d" {
						return failed("labels came back as %v", i.Labels)
					}
					if i.Created.Before(created.Add(-time.Minute)) || i.Created.After(time.Now().Add(time.Minute)) || i.Paused {
						return failed("created %v, paused %v", i.Created, i.Paused)
					}
				}
			}
			if err := p.Destroy(ctx, one); err != nil {
				return failed("destroy: %w", err)
			}
			infos, err := p.List(ctx, map[string]string{sandbox.LabelRun: key})
			if err != nil {
				return failed("list: %w", err)
			}
			if err := wantRefs(infos, []sandbox.Ref{two}); err != nil {
				return failed("list after destroy: %w", err)
			}
			// Without labels it lists them all, and whatever else there is.
			infos, err = p.List(ctx, nil)
			if err != nil {
				return failed("list all: %w", err)
			}
			for _, i := range infos {
				if i.Ref == two {
					return nil
				}
			}
			return failed("the list of all does not hold %+v", two)
		})
	})
}

func wantRefs(infos []sandbox.Info, want []sandbox.Ref) error {
	got := map[sandbox.Ref]int{}
	for _, i := range infos {
		got[i.Ref]++
	}
	var err error
	for _, r := range want {
		if got[r] != 1 {
			err = errors.Join(err, failed("%s is there %d times", r.ID, got[r]))
		}
		delete(got, r)
	}
	for r := range got {
		err = errors.Join(err, failed("%s is there too", r.ID))
	}
	return err
}

// shortLife is as short a deadline as the slowest provider can start within,
// on a machine that has time for it.
const shortLife = 3 * time.Second

// A brief is a sandbox that soon ends by itself.
type brief struct {
	ref      sandbox.Ref
	sb       sandbox.Sandbox
	life     time.Duration
	deadline time.Time
	begun    bool // what has to happen before the deadline has
}

// briefly creates a sandbox that soon ends by itself and runs f in it, on a
// slow machine again with a longer life: until f is so far that it sets begun.
func briefly(ctx context.Context, p sandbox.Provider, s sandbox.Spec, f func(b *brief) error) error {
	for b := (brief{life: shortLife}); ; b.life *= 4 {
		b.deadline = time.Now().Add(b.life)
		s.Deadline = b.deadline
		err := with(ctx, p, s, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
			b.ref, b.sb = ref, sb
			return f(&b)
		})
		if err == nil || b.begun || b.life > 10*shortLife || time.Now().Before(b.deadline) {
			return err
		}
	}
}

// untilGone waits for a sandbox to go by itself.
func untilGone(ctx context.Context, p sandbox.Provider, ref sandbox.Ref) error {
	return until(ctx, ref.ID+" to be gone", func() (bool, error) {
		sb, err := p.Attach(ctx, ref)
		if err == nil {
			return false, sb.Close()
		}
		if fault.KindOf(err) == fault.NotFound {
			return true, nil
		}
		return false, err
	})
}

func deadline(ctx context.Context, p sandbox.Provider, key string) error {
	s := spec(key)
	s.Labels = map[string]string{sandbox.LabelRun: key}
	return briefly(ctx, p, s, func(b *brief) error {
		cmd := sandbox.Cmd{Args: []string{"sh", "-c", "while :; do sleep 0.05; done", marker(key)}}
		if _, err := b.sb.Start(ctx, "long", cmd); err != nil {
			return failed("start: %w", err)
		}
		b.begun = true
		if err := untilGone(ctx, p, b.ref); err != nil {
			return err
		}
		if early := time.Until(b.deadline); early > 0 {
			return failed("the sandbox was gone %v before its deadline", early)
		}
		if _, ok := sandbox.As[sandbox.HostBound](p); ok {
			err := until(ctx, "its processes to be gone", func() (bool, error) {
				alive, err := processesNaming(marker(key))
				return len(alive) == 0, err
			})
			if err != nil {
				return err
			}
		}
		infos, err := p.List(ctx, s.Labels)
		if err != nil || len(infos) > 0 {
			return failed("list after the deadline: %+v, %v", infos, err)
		}
		return nil
	})
}

func moveDeadline(ctx context.Context, p sandbox.Provider, key string) error {
	return briefly(ctx, p, spec(key+"-moved"), func(moved *brief) error {
		if err := moved.sb.SetDeadline(ctx, time.Now().Add(lifetime)); err != nil {
			return failed("set deadline: %w", err)
		}
		moved.begun = true
		// One that was created later with the same lifetime is the clock.
		s := spec(key + "-clock")
		s.Deadline = time.Now().Add(moved.life)
		clock, err := p.Create(ctx, s)
		switch {
		case err == nil:
			err = errors.Join(untilGone(ctx, p, clock), destroy(ctx, p, clock))
		case time.Now().After(s.Deadline):
			err = nil // too slow to be made, and as good a clock
		}
		if err != nil {
			return failed("the clock: %w", err)
		}
		if err := moved.sb.Health(ctx); err != nil {
			return failed("after its first deadline: %w", err)
		}
		if err := moved.sb.SetDeadline(ctx, time.Now().Add(time.Second)); err != nil {
			return failed("set deadline: %w", err)
		}
		return untilGone(ctx, p, moved.ref)
	})
}
