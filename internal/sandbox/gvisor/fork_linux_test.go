package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// counter counts in a variable of a shell, and says the number when it is
// asked to by a file. It ends with the number that it is told.
const counter = `n=0
while [ ! -e stop ]; do
	n=$((n+1))
	echo $n > at
	if [ -e ask ]; then rm ask; echo "$n $(cat mine)"; fi
	sleep 0.05
done
exit $(cat stop)`

func TestALiveForkGoesOnWhereItsSandboxStands(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	ref, parent := newSandbox(t, p, testSpec("parent"))
	script(t, parent, "prepare", "echo parent > mine; echo kept > $HOME/kept")
	if _, err := parent.Start(ctx, "counter", sandbox.Cmd{Args: []string{"sh", "-c", "echo begun; " + counter}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the counter counts", func() bool { return number(t, parent) > 5 })
	before := number(t, parent)

	specs := []sandbox.Spec{testSpec("fork-1"), testSpec("fork-2"), testSpec("fork-3")}
	for i := range specs {
		specs[i].Labels = map[string]string{sandbox.LabelFork: fmt.Sprint(i + 1)}
	}
	forks, err := p.ForkLive(ctx, ref, specs)
	if err != nil {
		t.Fatalf("%v\n%s", err, fault.HintOf(err))
	}
	after := number(t, parent)
	all := map[string]*attached{"parent": parent}
	for i, f := range forks {
		if f.Err != nil {
			t.Fatalf("fork %d: %v", i+1, f.Err)
		}
		all[specs[i].Key] = attach(t, p, f.Ref)
	}
	for name, sb := range all {
		if name != "parent" {
			if n := number(t, sb); n < before {
				t.Errorf("%s is at %d, and its sandbox was at %d", name, n, before)
			}
			if out := script(t, sb, "files", "cat mine $HOME/kept"); out != "parent\nkept" {
				t.Errorf("%s has other files: %q", name, out)
			}
		}
		// What one writes no other sees.
		script(t, sb, "write", "echo "+name+" > mine; touch ask")
	}
	for name, sb := range all {
		proc, err := sb.Process(ctx, "counter")
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var said string
		eventually(t, name+" answers", func() bool {
			out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			said = string(out)
			return strings.HasSuffix(said, " "+name+"\n")
		})
		// What was said before the fork is there once, and nothing of others.
		if lines := strings.Split(strings.TrimSpace(said), "\n"); len(lines) != 2 || lines[0] != "begun" {
			t.Errorf("%s said %q", name, said)
		}
		if _, ok, err := proc.Exit(ctx); ok || err != nil {
			t.Errorf("%s has ended: %v", name, err)
		}
	}
	// Ids that were used before the fork stay used.
	if out := script(t, all["fork-1"], "prepare", "echo again"); out != "" {
		t.Errorf("the id of an earlier process ran again: %q", out)
	}
	code := 0
	for name, sb := range all {
		code++
		if err := sb.Upload(ctx, sandbox.Workspace+"/stop", strings.NewReader(strconv.Itoa(code))); err != nil {
			t.Fatal(err)
		}
		proc, err := sb.Process(ctx, "counter")
		if err != nil {
			t.Fatal(err)
		}
		if exit, err := proc.Wait(ctx); err != nil || exit != (sandbox.Exit{Code: code}) {
			t.Errorf("%s: %+v, %v, want code %d", name, exit, err, code)
		}
	}
	if after < before {
		t.Errorf("the sandbox itself went back from %d to %d", before, after)
	}
	infos, err := p.List(ctx, map[string]string{sandbox.LabelFork: "2"})
	if err != nil || len(infos) != 1 || infos[0].Ref != forks[1].Ref {
		t.Errorf("list: %+v, %v", infos, err)
	}
	// Create finds a live fork by its key.
	if again, err := p.Create(ctx, specs[0]); err != nil || again != forks[0].Ref {
		t.Errorf("create again: %+v, %v, want %+v", again, err, forks[0].Ref)
	}
}

func TestALiveForkThatCannotBeIsRefused(t *testing.T) {
	p := newProvider(t)
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho first\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := testSpec("parent")
	s.Mounts = []sandbox.Mount{{Source: program, Target: sandbox.ProgramDir + "/program"}}
	ref, sb := newSandbox(t, p, s)
	based := testSpec("based")
	based.Base = "some"
	forks, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{testSpec("UPPER"), testSpec("good"), based, testSpec("parent")})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []fault.Kind{fault.Invalid, "", fault.Invalid, ""} {
		if got := fault.KindOf(forks[i].Err); got != want {
			t.Errorf("fork %d: %v, of kind %q, want %q", i, forks[i].Err, got, want)
		}
	}
	if out := script(t, attach(t, p, forks[1].Ref), "run", "program"); out != "first" {
		t.Error(out)
	}
	if forks[3].Ref != ref {
		t.Errorf("a key that is taken: %+v, want %+v", forks[3].Ref, ref)
	}
	if left, err := filepath.Glob(filepath.Join(p.boxPath("parent"), "save-*")); err != nil || len(left) > 0 {
		eventually(t, "the checkpoint is removed", func() bool {
			left, err := filepath.Glob(filepath.Join(p.boxPath("parent"), "save-*"))
			return err == nil && len(left) == 0
		})
	}
	// In another version of its program a process would be lost.
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho another version\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{testSpec("late")}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("after a change of the program: %v", err)
	}
	if err := sb.Health(t.Context()); err != nil {
		t.Errorf("the sandbox itself is hurt: %v", err)
	}
}

func TestALiveForkHasTheBaseOfItsSandbox(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("prepare"))
	script(t, sb, "fill", "echo base > file; echo removed > removed; ln -s file link; ln file hard; mkfifo pipe; mkdir -p a/b; chmod 640 file")
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("parent")
	s.Base = "base"
	ref, sb = newSandbox(t, p, s)
	script(t, sb, "change", "echo changed >> file; rm removed; echo new > a/b/new")
	forks, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{testSpec("fork")})
	if err != nil || forks[0].Err != nil {
		t.Fatal(err, forks)
	}
	fork := attach(t, p, forks[0].Ref)
	const look = "cat file hard a/b/new; ls; readlink link; stat -c '%a %U %F' file pipe a/b"
	want := script(t, sb, "look", look)
	if out := script(t, fork, "look", look); out != want || !strings.HasPrefix(want, "base\nchanged\n") {
		t.Errorf("%q, want %q", out, want)
	}
	// A fork can be forked, and frozen.
	forks, err = p.ForkLive(t.Context(), forks[0].Ref, []sandbox.Spec{testSpec("grandchild")})
	if err != nil || forks[0].Err != nil {
		t.Fatal(err, forks)
	}
	if out := script(t, attach(t, p, forks[0].Ref), "look-again", look); out != want {
		t.Errorf("%q, want %q", out, want)
	}
}

// number is what the counter has written last, or 0 when it has not begun.
func number(t *testing.T, sb *attached) (n int) {
	t.Helper()
	eventually(t, "the number is whole", func() bool {
		f, err := sb.Download(t.Context(), sandbox.Workspace+"/at")
		if fault.KindOf(err) == fault.NotFound {
			return true
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_, err = fmt.Fscan(f, &n)
		return err == nil // just being written
	})
	return n
}

func BenchmarkLiveFork(b *testing.B) {
	p := newProvider(b)
	ref, sb := newSandbox(b, p, testSpec("parent"))
	if _, err := sb.Start(b.Context(), "counter", sandbox.Cmd{Args: []string{"sh", "-c", counter}}); err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		s := testSpec(fmt.Sprintf("fork-%d", i))
		start := time.Now()
		forks, err := p.ForkLive(b.Context(), ref, []sandbox.Spec{s})
		if err != nil || forks[0].Err != nil {
			b.Fatal(err, forks)
		}
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms/fork")
		if err := p.Destroy(b.Context(), forks[0].Ref); err != nil {
			b.Fatal(err)
		}
	}
}
