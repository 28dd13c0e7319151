package cli

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/host"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

func TestWhoseTheWorkersAreIsToldByTheirQueues(t *testing.T) {
	const queue = "q"
	for name, c := range map[string]struct {
		known     bool          // the state folder had a worker
		mine, all string        // who serves, in the end
		late      time.Duration // after which they do
		want      workers
		took      time.Duration // at most
	}{
		"the folder's own":                 {true, "a", "a", 0, workers{here: true}, 0},
		"the folder's own, and a dead one": {true, "a b", "a b", 0, workers{here: true}, 0},
		"also another":                     {true, "a", "a c", 0, workers{here: true, elsewhere: true}, 0},
		"only another":                     {true, "", "c", 0, workers{elsewhere: true}, workersLate},
		"a folder that never had one":      {false, "", "c", 0, workers{elsewhere: true}, 0},
		"one that is being started":        {true, "a", "a", time.Second, workers{here: true}, 1100 * time.Millisecond},
		"nobody":                           {true, "", "", 0, workers{here: true, elsewhere: true}, workersWait},
		"nobody, in a folder without":      {false, "", "", 0, workers{elsewhere: true}, workersWait},
	} {
		t.Run(name, func(t *testing.T) {
			home := t.TempDir()
			if c.known {
				if _, err := host.ID(home); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				got, err := findWorkers(t.Context(), home, queue, func(_ context.Context, q string) (map[string]bool, error) {
					who := map[string]bool{}
					names := c.mine
					if q == queue {
						names = c.all
					}
					for _, n := range strings.Fields(names) {
						if time.Since(begun) >= c.late {
							who[n] = true
						}
					}
					return who, nil
				})
				if took := time.Since(begun); err != nil || got != c.want || took > c.took {
					t.Errorf("%+v after %s, %v; want %+v after %s", got, took, err, c.want, c.took)
				}
			})
			if !c.known && host.Known(home) {
				t.Error("the look at others left a name in the folder")
			}
		})
	}
}

func TestALongUploadSaysHowFarItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		var sum atomic.Int64
		stop := tellCarry(&out, "/home/ada/project", &sum)
		time.Sleep(carryTold + time.Millisecond)
		sum.Store(5 << 20)
		time.Sleep(carryTold)
		stop()
		time.Sleep(time.Hour)
		if want := "/home/ada/project is packed for the artifact store\n5.0 MiB of /home/ada/project are in the artifact store\n"; out.String() != want {
			t.Errorf("%q, want %q", &out, want)
		}
		stop = tellCarry(&out, "x", &sum)
		stop() // most are done before anything is said
	})
}

// onCluster is a session whose Temporal is a cluster, of a run that was given
// a folder.
func onCluster(t *testing.T, plan fork.Plan) (*session, *desk) {
	t.Helper()
	s := newSession(t, ended(mixedReport()))
	s.vars["TEMPORAL_ADDRESS"] = "temporal.example.com:7233"
	plan.Agent = "claude"
	s.runs.plans[testRun] = plan
	d := &desk{}
	s.env.Work = func(context.Context, Globals) (Work, error) { return d, nil }
	return s, d
}

func TestWorkOfAClusterIsBroughtBeforeItIsShown(t *testing.T) {
	dir := newRepo(t, "main")
	s, d := onCluster(t, fork.Plan{Repo: dir, Upload: "sources/x"})
	s.want(t, exitOK, "diff", "@last/1")
	s.want(t, exitOK, "apply", "@last/1", "--dir", dir)
	if want := []string{testRun + "/1 beside .", testRun + "/1 beside " + dir}; !cmp.Equal(d.brought, want) {
		t.Errorf("brought %q, want %q", d.brought, want)
	}
	if want := []string{testRun + "/1 to " + dir}; !cmp.Equal(d.delivered, want) || len(d.applied) != 1 {
		t.Errorf("delivered %q, want %q; applied %q", d.delivered, want, d.applied)
	}
	// A folder that cannot take the branch gets the changes.
	d.undelivered = fault.New("", fault.NotFound, "another repository")
	s.want(t, exitOK, "apply", "@last/1", "--dir", dir)
	if strings.Contains(s.errors.String(), "another repository") {
		t.Errorf("stderr %q", &s.errors)
	}
	d.undelivered = fault.New("", fault.Conflict, "it is checked out\x1b[2J")
	s.want(t, exitOK, "apply", "@last/1", "--dir", dir)
	if !strings.Contains(s.errors.String(), "warning: it is checked out") || len(d.applied) != 3 {
		t.Errorf("stderr %q", &s.errors)
	}
	d.away = fault.New("", fault.NotFound, "not in the store").Hinted("Look elsewhere.")
	for _, cmd := range [][]string{{"diff", "@last/1"}, {"apply", "@last/1", "--dir", dir}} {
		s.want(t, exitNotFound, cmd...)
		if s.errors.String() != "sandbox-temporal: not in the store\nLook elsewhere.\n" {
			t.Errorf("stderr %q", &s.errors)
		}
	}
	// Of a repository that the workers have themselves, nothing is delivered.
	s, d = onCluster(t, fork.Plan{Repo: remote})
	s.want(t, exitOK, "apply", "@last/1", "--dir", dir)
	if len(d.delivered) > 0 || len(d.brought) != 1 {
		t.Errorf("%q, %q", d.delivered, d.brought)
	}
	// And where the engine is, nothing is brought.
	delete(s.vars, "TEMPORAL_ADDRESS")
	s.want(t, exitOK, "apply", "@last/1", "--dir", dir)
	if len(d.brought) != 1 {
		t.Errorf("%q", d.brought)
	}
}

func TestTheEndOfARunBringsItsBranchesHome(t *testing.T) {
	dir := newRepo(t, "main")
	s, d := onCluster(t, fork.Plan{Repo: dir, Upload: "sources/x"})
	var want []string
	for _, r := range s.runs.report.Results {
		if r.Commit != "" {
			want = append(want, fork.Spec{Run: testRun, Num: r.ForkNum}.ID()+" to "+dir)
		}
	}
	code := s.run(t, "status", "--watch", "@last")
	if !cmp.Equal(d.delivered, want) || !strings.Contains(s.errors.String(), "fetched into "+dir) {
		t.Errorf("delivered %q, want %q; stderr %q", d.delivered, want, &s.errors)
	}
	// That it cannot be done changes nothing of how the run ended.
	d.undelivered = fault.New("", fault.Conflict, "it is checked out").Hinted("Leave it.")
	if got := s.run(t, "status", "--watch", "@last"); got != code || !strings.Contains(s.errors.String(), "warning: "+branchesText(len(want))+" not fetched into "+dir+", which apply can do later: it is checked out\nLeave it.\n") {
		t.Errorf("exit %d, want %d; stderr %q", got, code, &s.errors)
	}
	for name, plan := range map[string]fork.Plan{
		"one that the worker sees":           {Repo: dir},
		"one that all have from a server":    {Repo: remote},
		"a plan that an older version wrote": {},
	} {
		s, d := onCluster(t, plan)
		s.run(t, "status", "--watch", "@last")
		if len(d.brought)+len(d.delivered) > 0 || strings.Contains(s.errors.String(), "warning") {
			t.Errorf("%s: %q, %q, stderr %q", name, d.brought, d.delivered, &s.errors)
		}
	}
	// Whoever wrote the plan could have named any folder of this host.
	s, d = onCluster(t, fork.Plan{Repo: dir, Upload: "sources/x"})
	d.stranger = true
	s.run(t, "status", "--watch", "@last")
	if len(d.brought)+len(d.delivered) > 0 || strings.Contains(s.errors.String(), "warning") {
		t.Errorf("%q, %q, stderr %q", d.brought, d.delivered, &s.errors)
	}
}

func TestLogsThatAreElsewhereAreSaidToBe(t *testing.T) {
	s, _ := onCluster(t, fork.Plan{Repo: remote})
	s.env.Artifacts = func(context.Context, Globals) (Artifacts, error) { return &shelf{}, nil }
	s.want(t, exitOK, "logs", "@last/1")
	if !strings.Contains(s.errors.String(), "Set SANDBOX_TEMPORAL_ARTIFACTS") {
		t.Errorf("stderr %q", &s.errors)
	}
	s.vars["SANDBOX_TEMPORAL_ARTIFACTS"] = t.TempDir()
	s.want(t, exitOK, "logs", "@last/1")
	if strings.Contains(s.errors.String(), "SANDBOX_TEMPORAL_ARTIFACTS") {
		t.Errorf("stderr %q", &s.errors)
	}
}

// away is a run whose worker works in another state folder, and has put what
// its fork made into a store.
type away struct {
	store *artifact.Store
	vars  map[string]string
	plan  fork.Plan
	fork  fork.Result
	dir   string // the repository
}

func newAway(t *testing.T) *away {
	t.Helper()
	t.Setenv("GIT_CONFIG_GLOBAL", "/dev/null")
	ctx, dir := t.Context(), newRepo(t, "main")
	a := &away{dir: dir, vars: map[string]string{"HOME": t.TempDir(), "SANDBOX_TEMPORAL_HOME": filepath.Join(t.TempDir(), "desk"),
		"SANDBOX_TEMPORAL_ARTIFACTS": t.TempDir(), "TEMPORAL_ADDRESS": "temporal.example.com:7233"}}
	var err error
	if a.store, err = artifact.Open(ctx, a.vars["SANDBOX_TEMPORAL_ARTIFACTS"]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.store.Close() })
	git := repo.New(repo.Options{Dir: t.TempDir()})
	base, err := git.Resolve(ctx, dir, "")
	if err != nil {
		t.Fatal(err)
	}
	a.plan = fork.Plan{Repo: dir}
	if a.plan.Upload, err = activities.UploadSource(ctx, git, a.store, testRun, base, nil); err != nil {
		t.Fatal(err)
	}
	a.fork = fork.Result{ForkNum: 1, BaseCommit: base.Commit}
	a.fork.Commit = a.make(t, "made by a fork\n")
	return a
}

// make puts the work of a fork into the store and returns its commit.
func (a *away) make(t *testing.T, text string) string {
	t.Helper()
	work := filepath.Join(t.TempDir(), "work")
	gitIn(t, "/", "clone", "--quiet", a.dir, work)
	write(t, filepath.Join(work, "made.txt"), text)
	gitIn(t, work, "add", ".")
	gitIn(t, work, "commit", "--quiet", "--message", "work")
	gitIn(t, work, "update-ref", fork.ResultRef, "HEAD")
	gitIn(t, work, "bundle", "create", "--quiet", "out.bundle", fork.ResultRef, "--not", a.fork.BaseCommit)
	b, err := os.ReadFile(filepath.Join(work, "out.bundle"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.store.Put(t.Context(), artifact.RunKey(testRun, 1, fork.ResultName), bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	return gitIn(t, work, "rev-parse", "HEAD")
}

// desk opens what a command on another host sees.
func (a *away) desk(t *testing.T) Work {
	t.Helper()
	getenv := func(name string) string { return a.vars[name] }
	cfg, err := config.Load(getenv)
	if err != nil {
		t.Fatal(err)
	}
	p := &plugged{env: &Env{Getenv: getenv, Stderr: os.Stderr}}
	w, err := p.work(t.Context(), Globals{Config: cfg})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// shows brings the fork's work and fails unless the diff shows it.
func (a *away) shows(t *testing.T, w Work, dir string) {
	t.Helper()
	if err := w.Bring(t.Context(), testRun, a.plan, a.fork, dir); err != nil {
		t.Fatalf("%v (hint: %s)", err, fault.HintOf(err))
	}
	var out bytes.Buffer
	if err := w.Diff(t.Context(), testRun, 1, &out, repo.DiffOptions{}); err != nil || !strings.Contains(out.String(), "+made by a fork") {
		t.Errorf("%q, %v", &out, err)
	}
}

func TestWorkIsBroughtFromWhereverItsBaseCanBeHad(t *testing.T) {
	a := newAway(t)
	clone := filepath.Join(t.TempDir(), "clone")
	gitIn(t, "/", "clone", "--quiet", a.dir, clone)
	if err := os.Mkdir(filepath.Join(clone, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	uploaded := a.plan.Upload
	for _, c := range []struct{ name, repo, upload, dir string }{
		{"the folder of the run", a.dir, uploaded, ""},
		{"a clone that the command is in", "/nowhere", "", filepath.Join(clone, "sub")},
		{"the store, as the plan says", "/nowhere", uploaded, t.TempDir()},
		{"the store, as the run's note says", "/nowhere", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			a.vars["SANDBOX_TEMPORAL_HOME"] = filepath.Join(t.TempDir(), "desk")
			a.plan.Repo, a.plan.Upload = c.repo, c.upload
			a.shows(t, a.desk(t), c.dir)
			a.shows(t, a.desk(t), c.dir) // it is here now
		})
	}
	if out := gitIn(t, clone, "branch", "--all", "--list", "*sandbox*"); out != "" {
		t.Errorf("a look left branches: %s", out)
	}
	a.vars["SANDBOX_TEMPORAL_HOME"] = filepath.Join(t.TempDir(), "desk") // that of the last one is gone
	w := a.desk(t)
	a.shows(t, w, "")
	for range 2 {
		if err := w.Deliver(t.Context(), testRun, 1, clone); err != nil {
			t.Fatal(err)
		}
	}
	if got := gitIn(t, clone, "rev-parse", fork.Branch(testRun, 1)); got != a.fork.Commit {
		t.Errorf("the branch is at %s", got)
	}
	if done, err := w.Apply(t.Context(), testRun, 1, clone); err != nil || !slices.Equal(done.Files, []string{"made.txt"}) {
		t.Errorf("%+v, %v", done, err)
	}
	// The host that has made it needs no store.
	a.vars["SANDBOX_TEMPORAL_HOME"] = filepath.Join(t.TempDir(), "desk")
	near := host.Repo(a.vars["SANDBOX_TEMPORAL_HOME"], nil, nil, slog.New(slog.DiscardHandler))
	file := filepath.Join(t.TempDir(), "b")
	r, err := a.store.Get(t.Context(), artifact.RunKey(testRun, 1, fork.ResultName))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	write(t, file, b.String())
	if _, err := near.Receive(t.Context(), repo.ReceiveInput{Run: testRun, Num: 1, Base: repo.Base{Source: a.dir, Commit: a.fork.BaseCommit}, Ref: fork.ResultRef, Bundle: file, Keep: true}); err != nil {
		t.Fatal(err)
	}
	if err := a.store.Delete(t.Context(), "runs/"+testRun); err != nil {
		t.Fatal(err)
	}
	a.shows(t, a.desk(t), "")
}

func TestWorkThatCannotBeBroughtSaysWhy(t *testing.T) {
	a := newAway(t)
	bring := func(kind fault.Kind, said, hint string) {
		t.Helper()
		a.vars["SANDBOX_TEMPORAL_HOME"] = filepath.Join(t.TempDir(), "desk")
		err := a.desk(t).Bring(t.Context(), testRun, a.plan, a.fork, "")
		if fault.KindOf(err) != kind || !strings.Contains(err.Error(), said) || !strings.Contains(fault.HintOf(err), hint) {
			t.Errorf("%v (kind %q, hint %q); want %q", err, fault.KindOf(err), fault.HintOf(err), said)
		}
	}
	// Somebody else's work in its place.
	a.make(t, "made by a stranger\n")
	bring(fault.Invalid, "the artifact store holds", "worker")
	put := func(key, text string) {
		t.Helper()
		if err := a.store.Put(t.Context(), key, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	put(artifact.RunKey(testRun, 1, fork.ResultName), "# v2 git bundle\nno")
	bring(fault.Invalid, "bundle", "")

	a.fork.Commit = a.make(t, "made by a fork\n")
	a.plan.Repo = "/nowhere"
	put(a.plan.Upload, "# v2 git bundle\nno")
	bring(fault.Invalid, "bundle", "")
	if err := a.store.Delete(t.Context(), a.plan.Upload); err != nil {
		t.Fatal(err)
	}
	bring(fault.NotFound, "which the fork began at", "clone")
	a.plan.Upload = ""
	put(artifact.RunKey(testRun, 0, fork.SourceName), "../../etc/passwd")
	bring(fault.Invalid, "is not the key", "")
	put(artifact.RunKey(testRun, 0, fork.SourceName), repo.Uploads+"/"+a.fork.BaseCommit+"/"+a.fork.Commit+".bundle")
	bring(fault.Invalid, "another commit", "")

	if err := a.store.Delete(t.Context(), "runs/"+testRun); err != nil {
		t.Fatal(err)
	}
	bring(fault.NotFound, "neither on this host", "another SANDBOX_TEMPORAL_ARTIFACTS")
	delete(a.vars, "SANDBOX_TEMPORAL_ARTIFACTS")
	bring(fault.NotFound, "neither on this host", "Set SANDBOX_TEMPORAL_ARTIFACTS")
}

func TestWhatWasFetchedLongAgoGoes(t *testing.T) {
	a := newAway(t)
	a.shows(t, a.desk(t), "")
	dir := filepath.Join(a.vars["SANDBOX_TEMPORAL_HOME"], "fetched", "runs", testRun+".git")
	old := time.Now().Add(-activities.RunAge - time.Hour)
	for _, part := range []string{"objects/pack", "objects", "refs", "."} {
		if err := os.Chtimes(filepath.Join(dir, part), old, old); err != nil {
			t.Fatal(err)
		}
	}
	a.fork.ForkNum = 2
	if err := a.desk(t).Bring(t.Context(), testRun, a.plan, a.fork, ""); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it is still there")
	}
	a.fork.ForkNum = 1
	a.shows(t, a.desk(t), "")
}
