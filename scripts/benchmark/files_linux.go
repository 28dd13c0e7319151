package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// measureGit compares the first "git status" in a fork of the large base with
// one in an ordinary folder that was made by the same commands.
func measureGit(ctx context.Context, w *workshop) ([]table, []figure, error) {
	native := filepath.Join(w.dir, "native")
	if err := os.Mkdir(native, 0o755); err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(native)
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	make := exec.CommandContext(ctx, "sh", "-c", treeScript)
	make.Dir, make.Env = native, append(cleanGit(), "TREE="+self, "FILES="+strconv.Itoa(w.files))
	if out, err := make.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("make the tree: %w: %s", err, firstLine(string(out)))
	}
	status := func(dir string) (time.Duration, error) {
		cmd := exec.CommandContext(ctx, "git", "status", "--porcelain")
		cmd.Dir, cmd.Env = dir, cleanGit()
		return timed(func() error {
			out, err := cmd.Output()
			if err == nil && len(out) > 0 {
				err = fmt.Errorf("git status in %s: %s", dir, firstLine(string(out)))
			}
			return err
		})
	}
	var plain, bare, first, second, changed, alone series
	type look struct {
		to           *series
		before, args string // what is not measured, and what is
	}
	forks := [][]look{
		{{&first, "true", "git status --porcelain"}, {&second, "true", "git status --porcelain"}, {&changed, "sed -i s/nil/null/ d001/e02/f03.go", "git status --porcelain"}},
		{{&alone, "true", "git -c core.fsmonitor=false status --porcelain"}},
	}
	const rounds = 7
	for i := range rounds {
		w.quiet(ctx)
		took, err := status(native)
		if err != nil {
			return nil, nil, err
		}
		plain = append(plain, took)
		o := w.newOverlay("native", i)
		took, err = func() (time.Duration, error) {
			defer o.remove() //nolint:errcheck // what is left fails the end of the section
			if err := o.mount(native); err != nil {
				return 0, err
			}
			return status(o.merged())
		}()
		if err != nil {
			w.logf("overlay alone: %v", err)
		} else {
			bare = append(bare, took)
		}
		for _, looks := range forks {
			err := w.inFork(ctx, func(sb sandbox.Sandbox) error {
				for n, l := range looks {
					if err := runIn(ctx, sb, fmt.Sprintf("before-%d", n), sandbox.Cmd{Args: strings.Fields(l.before)}); err != nil {
						return err
					}
					took, err := timed(func() error {
						return runIn(ctx, sb, fmt.Sprintf("status-%d", n), sandbox.Cmd{Args: strings.Fields(l.args)})
					})
					if err != nil {
						return err
					}
					*l.to = append(*l.to, took)
				}
				return nil
			})
			if err != nil {
				return nil, nil, err
			}
		}
	}
	var fresh series
	for range rounds {
		// What is left is the page cache, as of a folder that was just made.
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
			w.logf("native, first: %v", err)
			break
		}
		took, err := status(native)
		if err != nil {
			return nil, nil, err
		}
		fresh = append(fresh, took)
	}
	remember := exec.CommandContext(ctx, "sh", "-c", cacheScript)
	remember.Dir, remember.Env = native, cleanGit()
	if out, err := remember.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("have git remember folders: %w: %s", err, firstLine(string(out)))
	}
	var remembered series
	for range rounds {
		took, err := status(native)
		if err != nil {
			return nil, nil, err
		}
		remembered = append(remembered, took)
	}
	t := table{
		title: "git status",
		note: fmt.Sprintf("Of %d files, all in the page cache, %d times each, those that do not clear the caches in turns. Native is an ordinary folder, where it is not the first one; "+
			"before its first one the kernel was told to forget its names and inodes. "+
			"The overlay alone stands over that folder, and is new each time. A base, and with it its forks, has git's untracked cache, and git asks there what has changed, but for the row in which it is told not to ask. Milliseconds.", w.files, rounds),
		columns: []string{"", "p50", "lowest", "× native"},
	}
	for _, r := range []struct {
		name string
		s    series
	}{{"native", plain}, {"native, first", fresh}, {"native, with the untracked cache", remembered}, {"overlay alone, first", bare}, {"sandbox-temporal, first in a fork", first}, {"sandbox-temporal, second", second},
		{"sandbox-temporal, after a file was changed", changed}, {"sandbox-temporal, first, without asking", alone}} {
		t.add(r.name, ms(r.s.p(.5)), ms(r.s.p(0)), ratio(r.s.p(.5), plain.p(.5)))
		w.logf("%-44s %6s ms", r.name, ms(r.s.p(.5)))
	}
	return []table{t}, []figure{{
		"first git status in a fork", "≤ 1.3 × native", ratio(first.p(.5), plain.p(.5)), float64(first.p(.5)) <= 1.3*float64(plain.p(.5)),
	}}, nil
}

// inFork does something in a new fork of the large base.
func (w *workshop) inFork(ctx context.Context, do func(sandbox.Sandbox) error) error {
	e := newOurs(w, largeBase)
	defer e.close(context.WithoutCancel(ctx)) //nolint:errcheck // what is left fails the end of the section
	if err := e.create(ctx, 0); err != nil {
		return err
	}
	return do(e.box(0).sb)
}

// cleanGit is an environment in which nobody's configuration counts.
func cleanGit() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_OPTIONAL_LOCKS=1",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"}
}

// measureOutput has a program write as fast as it can.
func measureOutput(ctx context.Context, w *workshop) ([]table, []figure, error) {
	const size = 1000 << 20
	// What the program itself needed is what it was stalled by; until the
	// last byte can be read is what a worker waits.
	script := fmt.Sprintf(`s=$(date +%%s%%N); head -c %d /dev/zero; e=$(date +%%s%%N); echo $((e-s)) >&2`, size)
	var direct, wrote, all series
	const rounds = 5
	e := newOurs(w, "")
	defer e.close(context.WithoutCancel(ctx)) //nolint:errcheck // what is left fails the end of the section
	for i := range rounds {
		w.quiet(ctx)
		took, err := writeDirect(ctx, w, script)
		if err != nil {
			return nil, nil, err
		}
		direct = append(direct, took)
		took, total, err := writeSandboxed(ctx, e, i, script, size)
		if err != nil {
			return nil, nil, err
		}
		wrote, all = append(wrote, took), append(all, total)
	}
	rate := func(d time.Duration) string { return fmt.Sprintf("%.0f", size/1e6/d.Seconds()) }
	t := table{
		title:   "Output",
		note:    fmt.Sprintf("head(1) writes %d MiB of zeros, %d times in turns. MB a second, p50.", size>>20, rounds),
		columns: []string{"", "MB/s"},
	}
	t.add("straight into a file", rate(direct.p(.5)))
	t.add("in a sandbox, until the program is done", rate(wrote.p(.5)))
	t.add("in a sandbox, until all can be read", rate(all.p(.5)))
	w.logf("output: %s MB/s direct, %s in a sandbox", rate(direct.p(.5)), rate(all.p(.5)))
	reached := size / 1e6 / all.p(.5).Seconds()
	return []table{t}, []figure{{"output into the file", "≥ 500 MB/s", fmt.Sprintf("%.0f MB/s", reached), reached >= 500}}, nil
}

func writeDirect(ctx context.Context, w *workshop, script string) (time.Duration, error) {
	name := filepath.Join(w.dir, "output")
	defer os.Remove(name)
	f, err := os.Create(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.Stdout = f
	return timed(func() error { return cmd.Run() })
}

func writeSandboxed(ctx context.Context, e *ours, i int, script string, size int64) (wrote, all time.Duration, err error) {
	if err := e.create(ctx, i); err != nil {
		return 0, 0, err
	}
	start := time.Now()
	p, err := e.box(i).sb.Start(ctx, "write", sandbox.Cmd{Args: []string{"sh", "-c", script}})
	if err != nil {
		return 0, 0, err
	}
	if _, err := p.Wait(ctx); err != nil {
		return 0, 0, err
	}
	all = time.Since(start)
	var nanos int64
	text := make([]byte, 64)
	n, _ := p.ReadAt(ctx, sandbox.Stderr, text, 0)
	if _, err := fmt.Sscan(string(text[:n]), &nanos); err != nil {
		return 0, 0, fmt.Errorf("the program said %q: %w", text[:n], err)
	}
	var last [1]byte
	if n, _ := p.ReadAt(ctx, sandbox.Stdout, last[:], size-1); n != 1 {
		return 0, 0, fmt.Errorf("not all of the output is there")
	}
	return time.Duration(nanos), all, e.destroy(ctx, i)
}
