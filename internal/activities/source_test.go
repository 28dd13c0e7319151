package activities

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A desk is a host without a worker, that has a repository.
type desk struct {
	*repo.Store
	dir  string // of the repository
	base repo.Base
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{Store: repo.New(repo.Options{Dir: t.TempDir()}), dir: t.TempDir()}
	if err := newRepo(d.dir); err != nil {
		t.Fatal(err)
	}
	var err error
	if d.base, err = d.Resolve(t.Context(), d.dir, ""); err != nil {
		t.Fatal(err)
	}
	return d
}

// upload carries the desk's repository to the world's store, and returns how
// many bytes that took.
func (d *desk) upload(t *testing.T, w *world, run string) (key string, n int64) {
	t.Helper()
	key, err := UploadSource(t.Context(), d.Store, w.Artifacts, run, d.base, func(sum int64) { n = sum })
	if err != nil {
		t.Fatal(err)
	}
	return key, n
}

func TestAFolderThatNoWorkerSeesIsWorkedOnAndComesBack(t *testing.T) {
	t.Parallel()
	const run = "sandbox-orch-00000001"
	w, d, ctx := setUp(t), newDesk(t), t.Context()
	p := plan("/home/ada/project", "Play @script write")
	p.Upload, _ = d.upload(t, w, run)
	spec, ref, err := w.begin(ctx, run, p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.RunAgent(ctx, runInput(spec, ref)); err != nil {
		t.Fatal(err)
	}
	var got orchestrator.CollectResultOutput
	for range 2 { // a retry is the same
		if got, err = w.CollectResult(ctx, orchestrator.CollectResultInput{Spec: spec, Ref: ref}); err != nil || got.Commit == "" || got.FilesChanged != 1 || got.Warning != "" {
			t.Fatalf("%+v, %v", got, err)
		}
	}

	// The desk takes the branch out of the store.
	r, err := w.Artifacts.Get(ctx, artifact.RunKey(run, 1, fork.ResultName))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bundle")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	back, err := d.Receive(ctx, repo.ReceiveInput{Run: run, Num: 1, Base: d.base, Ref: fork.ResultRef, Bundle: file})
	if err != nil || !back.Delivered || back.Commit != got.Commit {
		t.Fatalf("%+v, %v", back, err)
	}
	out, err := exec.Command("git", "-C", d.dir, "show", got.Branch+":a.txt").CombinedOutput()
	if err != nil || string(out) != "one\nmore\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestRunsOfOneUploadShareABaseWhereverItCameFrom(t *testing.T) {
	t.Parallel()
	w, d := setUp(t), newDesk(t)
	var first orchestrator.Base
	for i, path := range []string{"/home/ada/project", "/home/ben/checkout"} {
		run := fork.RunPrefix + strings.Repeat("a", i+1)
		p := plan(path, "x")
		p.Upload, _ = d.upload(t, w, run)
		base, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: run, Plan: p})
		if err != nil || base.Commit != d.base.Commit || base.Made != (i == 0) || i > 0 && base.Frozen != first.Frozen {
			t.Errorf("%s: %+v, %v", path, base, err)
		}
		if i == 0 {
			first = base
		}
	}
	infos, err := w.fake.Bases(t.Context())
	if err != nil || len(infos) != 1 || infos[0].Labels[sandbox.LabelRepository] != "/home/ada/project" {
		t.Errorf("%+v, %v", infos, err)
	}
	// Where nothing can be frozen, sandboxes are filled from the upload itself.
	w.Providers = sandbox.NewSet(unfrozen{w.fake})
	p := plan("/home/ada/project", "Play @script write")
	p.Upload, _ = d.upload(t, w, "sandbox-orch-0000000c")
	if spec, _, err := w.begin(t.Context(), "sandbox-orch-0000000c", p); err != nil || spec.BaseCommit != d.base.Commit {
		t.Errorf("%+v, %v", spec, err)
	}
}

func TestARepositoryIsUploadedOnceUntilThatIsLongAgo(t *testing.T) {
	t.Parallel()
	w, d := setUp(t), newDesk(t)
	key, n := d.upload(t, w, "sandbox-orch-00000001")
	if n == 0 {
		t.Fatal("nothing was uploaded")
	}
	for _, run := range []string{"sandbox-orch-00000001", "sandbox-orch-00000002"} {
		again, n := d.upload(t, w, run)
		if again != key || n != 0 {
			t.Errorf("%s: %s, %d bytes", run, again, n)
		}
		r, err := w.Artifacts.Get(t.Context(), artifact.RunKey(run, 0, fork.SourceName))
		if err != nil {
			t.Fatal(err)
		}
		note, err := io.ReadAll(r)
		_ = r.Close()
		if err != nil || string(note) != key {
			t.Errorf("%s notes %q, %v", run, note, err)
		}
	}
	old := time.Now().Add(-freshFor - time.Hour)
	if err := os.Chtimes(filepath.Join(w.dir, "artifacts", key), old, old); err != nil {
		t.Fatal(err)
	}
	if _, n := d.upload(t, w, "sandbox-orch-00000003"); n == 0 {
		t.Error("an upload that the next clean-up may remove was relied on")
	}
	// One that is too large is not uploaded by halves.
	tight := repo.New(repo.Options{Dir: t.TempDir(), MaxBundle: 10})
	if err := w.Artifacts.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if _, err := UploadSource(t.Context(), tight, w.Artifacts, "sandbox-orch-00000004", d.base, nil); fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), "URL") {
		t.Errorf("%v (hint %q)", err, fault.HintOf(err))
	}
	if _, err := w.Artifacts.Get(t.Context(), key); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a part of it: %v", err)
	}
	// Whatever goes wrong leaves nothing half done.
	ctx, cancel := context.WithCancel(t.Context())
	if err := w.Artifacts.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if _, err := UploadSource(ctx, d.Store, w.Artifacts, "sandbox-orch-00000004", d.base, func(int64) { cancel() }); fault.KindOf(err) != fault.Cancelled {
		t.Errorf("%v", err)
	}
	if _, err := w.Artifacts.Get(t.Context(), key); fault.KindOf(err) != fault.NotFound {
		t.Errorf("half an upload: %v", err)
	}
}

func TestADamagedUploadIsRefusedAndOutOfTheWay(t *testing.T) {
	t.Parallel()
	const run = "sandbox-orch-00000001"
	w, d := setUp(t), newDesk(t)
	p := plan("/home/ada/project", "x")
	p.Upload, _ = d.upload(t, w, run)
	prepare := func() error {
		_, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: run, Plan: p})
		return err
	}
	if err := w.Artifacts.Put(t.Context(), p.Upload, strings.NewReader("# v2 git bundle\nno")); err != nil {
		t.Fatal(err)
	}
	if err := prepare(); fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), "again") {
		t.Errorf("%v (hint %q)", err, fault.HintOf(err))
	}
	if err := prepare(); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_ARTIFACTS") {
		t.Errorf("%v (hint %q)", err, fault.HintOf(err))
	}
	if _, n := d.upload(t, w, run); n == 0 {
		t.Error("it was not uploaded again")
	}
	if err := prepare(); err != nil {
		t.Error(err)
	}
	// A key that is none removes nothing.
	p.Upload = "runs"
	if err := prepare(); fault.KindOf(err) != fault.Invalid {
		t.Errorf("%v", err)
	}
	if _, err := w.Artifacts.Get(t.Context(), artifact.RunKey(run, 0, fork.SourceName)); err != nil {
		t.Error(err)
	}
}

func TestAFolderOfTheWorkersHostIsInASharedStore(t *testing.T) {
	t.Parallel()
	w, d := setUp(t), newDesk(t)
	for _, shared := range []bool{false, true} {
		w.Shared = shared
		if _, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000001", Plan: plan(d.dir, "x")}); err != nil {
			t.Fatal(err)
		}
		n := 0
		for o, err := range w.Artifacts.List(t.Context(), repo.Uploads) {
			if err != nil {
				t.Fatal(err)
			}
			_, commit, err := repo.ParseUpload(o.Key)
			if err != nil || commit != d.base.Commit {
				t.Errorf("%s: %v", o.Key, err)
			}
			n++
		}
		if shared != (n == 1) {
			t.Errorf("shared %v: %d uploads", shared, n)
		}
	}
	var b bytes.Buffer
	if err := w.Repo.Carry(t.Context(), d.base, &b); err != nil {
		t.Error(err)
	}
}

func TestAnUploadGoesWithTheLastRunThatNamesIt(t *testing.T) {
	t.Parallel()
	w, d := setUp(t), newDesk(t)
	const known, gone = fork.RunPrefix + "aaaaaaaa", fork.RunPrefix + "bbbbbbbb"
	w.states[known] = orchestrator.RunState{Known: true, Closed: time.Now()}
	key, _ := d.upload(t, w, known)
	d.upload(t, w, gone)
	sweep := func(later time.Duration, dry bool) (ids []string) {
		t.Helper()
		s := &scan{a: w.Activities, now: time.Now().Add(later), states: map[owner]answer{}}
		for _, item := range s.stored(t.Context(), dry) {
			ids = append(ids, item.ID)
			if !dry && !item.Removed {
				t.Errorf("%+v", item)
			}
		}
		if len(s.problems) > 0 {
			t.Errorf("%q", s.problems)
		}
		return ids
	}
	if ids := sweep(RunAge-time.Hour, false); len(ids) > 0 {
		t.Errorf("too early: %v", ids)
	}
	if ids := sweep(RunAge+time.Hour, false); len(ids) != 1 || ids[0] != gone {
		t.Errorf("while a run that Temporal knows needs it: %v", ids)
	}
	delete(w.states, known)
	for _, dry := range []bool{true, false} {
		if ids := sweep(RunAge+time.Hour, dry); len(ids) != 2 || ids[0] != known || ids[1] != key {
			t.Errorf("dry %v: %v", dry, ids)
		}
	}
	for o := range w.Artifacts.List(t.Context(), "") {
		t.Errorf("left: %s", o.Key)
	}
}
