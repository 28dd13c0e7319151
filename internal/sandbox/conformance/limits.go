package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// The programs below are hogs that know their measure: where nobody holds them
// back they take some hundred megabytes for some seconds, and no more.

// enforces reports whether p promises the limits that l asks for here.
func enforces(p sandbox.Provider, l sandbox.Limits) bool {
	limiter, ok := sandbox.As[sandbox.Limiter](p)
	return ok && len(limiter.Unenforced(l)) == 0
}

// limited creates a sandbox with limits and runs f in it, when p promises
// them.
func limited(ctx context.Context, p sandbox.Provider, key string, l sandbox.Limits, f func(sb sandbox.Sandbox) error) error {
	if !enforces(p, l) {
		return nil
	}
	s := spec(key)
	s.Limits = l
	return with(ctx, p, s, func(_ sandbox.Ref, sb sandbox.Sandbox) error { return f(sb) })
}

func limitsInvalid(ctx context.Context, p sandbox.Provider, key string) error {
	if _, ok := sandbox.As[sandbox.Limiter](p); !ok {
		return nil
	}
	for i, l := range []sandbox.Limits{{MemoryBytes: -1}, {CPUMillis: -1}, {Processes: -1}, {DiskBytes: -1}, {MemoryBytes: 1}} {
		s := spec(fmt.Sprintf("%s-%d", key, i))
		s.Limits = l
		ref, err := p.Create(ctx, s)
		if err == nil {
			err = destroy(ctx, p, ref)
		}
		if err := wantKind(fmt.Sprintf("create with %+v", l), err, fault.Invalid); err != nil {
			return err
		}
	}
	return nil
}

// wantLimit waits for a process that a limit has to end, and for another one
// to see that the sandbox goes on.
func wantLimit(ctx context.Context, sb sandbox.Sandbox, id string, want sandbox.Limit) error {
	p, err := sb.Process(ctx, id)
	if err != nil {
		return failed("find %s: %w", id, err)
	}
	exit, err := p.Wait(ctx)
	if err != nil {
		return failed("wait for %s: %w", id, err)
	}
	if exit != (sandbox.Exit{Code: 137, Signal: string(sandbox.Kill), Limit: want}) {
		return failed("%s: exit %+v, want killed by the limit of %s", id, exit, want)
	}
	return nil
}

func memoryLimit(ctx context.Context, p sandbox.Provider, key string) error {
	return limited(ctx, p, key, sandbox.Limits{MemoryBytes: 96 << 20}, func(sb sandbox.Sandbox) error {
		// The one that hogs is a grandchild; the other has nothing to do
		// with it, but shares the sandbox. Tail keeps a line until it ends.
		if _, err := sb.Start(ctx, "other", shell("while :; do sleep 1; done")); err != nil {
			return failed("start: %w", err)
		}
		if _, err := sb.Start(ctx, "hog", shell("echo saved > work; { head -c 250000000 /dev/zero; sleep 6; } | tail -n 1 | wc -c")); err != nil {
			return failed("start: %w", err)
		}
		for _, id := range []string{"hog", "other"} {
			if err := wantLimit(ctx, sb, id, sandbox.MemoryLimit); err != nil {
				return err
			}
		}
		return wantOutput(ctx, sb, "after", shell("cat work"), "saved")
	})
}

func processLimit(ctx context.Context, p sandbox.Provider, key string) error {
	const most = 40
	return limited(ctx, p, key, sandbox.Limits{Processes: most}, func(sb sandbox.Sandbox) error {
		// A shell that cannot fork says so and ends, some only after they
		// have tried for a while.
		bomb, err := sb.Start(ctx, "bomb", shell(`i=0; while [ $i -lt 120 ]; do sleep 25 & i=$((i+1)); echo $i; done; echo all`))
		if err != nil {
			return failed("start: %w", err)
		}
		full := func() (bool, error) {
			if err := sb.Health(ctx); err != nil {
				return false, failed("health: %w", err)
			}
			out, err := sandbox.ReadAll(ctx, bomb, sandbox.Stderr, limit)
			if err != nil {
				return false, err
			}
			_, ended, err := bomb.Exit(ctx)
			return len(out) > 0 || ended, err
		}
		if err := until(ctx, "a fork fails", full); err != nil {
			return err
		}
		out, err := sandbox.ReadAll(ctx, bomb, sandbox.Stdout, limit)
		if err != nil {
			return failed("read: %w", err)
		}
		if n := strings.Count(string(out), "\n"); n >= most || slices.Contains(strings.Fields(string(out)), "all") {
			return failed("%d processes were started where %d are allowed", n, most)
		}
		if err := bomb.Signal(ctx, sandbox.Kill); err != nil {
			return failed("signal: %w", err)
		}
		if _, err := bomb.Wait(ctx); err != nil {
			return failed("wait: %w", err)
		}
		// The killed ones make room; the last may still be on their way out.
		n := 0
		return until(ctx, "a process can be started again", func() (bool, error) {
			n++
			_, _, exit, err := sandbox.Output(ctx, sb, fmt.Sprintf("after-%d", n), shell("true"), limit)
			if fault.KindOf(err) == fault.Unavailable {
				return false, nil
			}
			return exit.Code == 0, err
		})
	})
}

func diskLimit(ctx context.Context, p sandbox.Provider, key string) error {
	return limited(ctx, p, key, sandbox.Limits{DiskBytes: 32 << 20}, func(sb sandbox.Sandbox) error {
		// In several folders, and no file of it too large by itself.
		const hog = `echo saved > work; i=0
while [ $i -lt 4 ]; do for d in . "$HOME" "${TMPDIR:-/tmp}"; do dd if=/dev/zero of="$d/hog-` + "%s" + `-$i" bs=1048576 count=8 2>/dev/null; done; i=$((i+1)); done
sleep 8; rm -f hog-* "$HOME"/hog-* "${TMPDIR:-/tmp}"/hog-*`
		if _, err := sb.Start(ctx, "hog", shell(fmt.Sprintf(hog, key))); err != nil {
			return failed("start: %w", err)
		}
		if err := wantLimit(ctx, sb, "hog", sandbox.DiskLimit); err != nil {
			return err
		}
		// There is room left to save the work.
		return wantOutput(ctx, sb, "after", shell(`cat work; dd if=/dev/zero of=bundle bs=1048576 count=8 2>/dev/null && rm -f bundle hog-* "$HOME"/hog-* "${TMPDIR:-/tmp}"/hog-*`), "saved")
	})
}

func cpuLimit(ctx context.Context, p sandbox.Provider, key string) error {
	const millis = 100
	l := sandbox.Limits{CPUMillis: millis}
	if !enforces(p, l) {
		return nil
	}
	s := spec(key)
	s.Limits = l
	return with(ctx, p, s, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		// Four loops that would take all there is. How much they took is
		// asked of the host where it counts that, and else of the system in
		// the sandbox, in hundredths of a second: how long they waited
		// depends on what else the host does.
		const loops = `for i in 1 2 3 4; do (while :; do :; done) & all="$all $!"; done; sleep 2; kill $all; wait $all 2>/dev/null; times`
		before, err := cpuTime(ctx, p, ref)
		if err != nil {
			return err
		}
		begin := time.Now()
		out, err := run(ctx, sb, "loops", shell(loops))
		if err != nil {
			return err
		}
		elapsed := time.Since(begin)
		used, err := cpuTime(ctx, p, ref)
		if err != nil {
			return err
		}
		if used -= before; used == 0 {
			if used, err = timesOfChildren(out); err != nil {
				return err
			}
		}
		if most := elapsed*millis/1000*3/2 + 200*time.Millisecond; used > most {
			return failed("%s of CPU time in %s, at most %s should have been", used, elapsed, most)
		}
		return nil
	})
}

// cpuTime is what the sandbox has used, as far as p knows; 0 when it does not.
func cpuTime(ctx context.Context, p sandbox.Provider, ref sandbox.Ref) (time.Duration, error) {
	meter, ok := sandbox.As[sandbox.Meter](p)
	if !ok {
		return 0, nil
	}
	u, err := meter.Usage(ctx, ref)
	if err != nil {
		return 0, failed("usage: %w", err)
	}
	return u.CPU, nil
}

// timesOfChildren reads the last line of what the shell's times says: that of
// the children, user and system.
func timesOfChildren(out string) (used time.Duration, err error) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for _, word := range strings.Fields(lines[len(lines)-1]) {
		d, err := time.ParseDuration(word)
		if err != nil {
			return 0, failed("times: %q: %w", out, err)
		}
		used += d
	}
	return used, nil
}
