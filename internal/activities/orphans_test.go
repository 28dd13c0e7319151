package activities

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// remote is a provider as a service elsewhere can be: it tells another age of
// its sandboxes than they have, its filter does not filter, it knows a price,
// it can be down, and what it made just now is not listed yet.
type remote struct {
	sandbox.Provider
	name string

	mu    sync.Mutex
	down  error
	late  int                      // how many more lists show nothing
	lists int                      // how many were asked for
	aged  map[string]time.Duration // by key
}

func (r *remote) Name() string { return r.name }

func (r *remote) List(ctx context.Context, _ map[string]string) ([]sandbox.Info, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lists++
	if r.down != nil {
		return nil, r.down
	}
	if r.late > 0 {
		r.late--
		return nil, nil
	}
	infos, err := r.Provider.List(ctx, nil)
	for i := range infos {
		infos[i].Created = infos[i].Created.Add(-r.aged[infos[i].Ref.ID])
	}
	return infos, err
}

func (r *remote) HourlyPrice(info sandbox.Info) (int64, bool) {
	return 50_000_000, info.Labels["cheap"] == ""
}

func (*remote) ListLag() time.Duration { return time.Minute }

// field is a world whose only provider is remote.
func field(t *testing.T) (*world, *remote) {
	t.Helper()
	w := setUp(t)
	r := &remote{Provider: w.fake, name: "fake", aged: map[string]time.Duration{}}
	w.Providers = sandbox.NewSet(r)
	return w, r
}

// plant makes a sandbox of a run that is age old.
func (r *remote) plant(t *testing.T, key string, age time.Duration, labels map[string]string) sandbox.Ref {
	t.Helper()
	all := map[string]string{sandbox.LabelDeployment: "d", sandbox.LabelNamespace: "n", sandbox.LabelRun: "over", sandbox.LabelFork: "1"}
	maps.Copy(all, labels)
	ref, err := r.Create(t.Context(), sandbox.Spec{Key: key, Deadline: time.Now().Add(time.Hour), Labels: all})
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.aged[key] = age
	return ref
}

// left returns the keys of what there is, sorted.
func (r *remote) left(t *testing.T) []string {
	t.Helper()
	infos, err := r.Provider.List(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, info := range infos {
		keys = append(keys, info.Ref.ID)
	}
	slices.Sort(keys)
	return keys
}

// sweep does what the workflow does, page by page.
func (w *world) sweep(t *testing.T, in orchestrator.FindOrphanedSandboxesInput) (removed []string, first orchestrator.FindOrphanedSandboxesOutput) {
	t.Helper()
	for page := 0; ; page++ {
		found, err := w.FindOrphanedSandboxes(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		if page == 0 {
			first = found
		}
		if len(found.Orphans) != len(found.Sandboxes) {
			t.Fatalf("%d orphans, %d are described", len(found.Orphans), len(found.Sandboxes))
		}
		for _, o := range found.Orphans {
			out, err := w.CleanupSandbox(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if out.Kept == "" {
				removed = append(removed, o.Ref.ID)
			}
		}
		if found.Next == "" {
			slices.Sort(removed)
			return removed, first
		}
		in.After = found.Next
	}
}

var rule = orchestrator.OrphanRule{MaxAge: time.Hour, Grace: time.Minute}

func TestExactlyTheOrphansGo(t *testing.T) {
	t.Parallel()
	w, r := field(t)
	now := time.Now()
	w.states["busy"] = orchestrator.RunState{Known: true, Open: true}
	w.states["ended"] = orchestrator.RunState{Known: true, Closed: now.Add(-30 * time.Minute)}
	w.states["ending"] = orchestrator.RunState{Known: true, Closed: now.Add(-time.Second)}
	w.states["killed"] = orchestrator.RunState{Known: true, Closed: now.Add(-time.Hour)}
	w.states["killed-fork-2"] = orchestrator.RunState{Known: true, Open: true}
	const old = 3 * time.Hour
	of := func(run string) map[string]string { return map[string]string{sandbox.LabelRun: run} }

	r.plant(t, "orphan", old, nil)
	r.plant(t, "orphan-ended", old, of("ended"))
	r.plant(t, "orphan-base", old, map[string]string{sandbox.LabelFork: "base"})
	paused := r.plant(t, "orphan-paused", old, nil)
	r.plant(t, "orphan-cheap", old, map[string]string{"cheap": "yes"})
	r.plant(t, "orphan-of-killed", old, of("killed"))

	r.plant(t, "busy", old, of("busy"))
	busyPaused := r.plant(t, "busy-paused", old, of("busy"))
	r.plant(t, "fresh", time.Minute, nil)
	r.plant(t, "ending", old, of("ending"))
	r.plant(t, "fork-goes-on", old, map[string]string{sandbox.LabelRun: "killed", sandbox.LabelFork: "2"})
	r.plant(t, "doubtful", old, of("unknown"))
	r.plant(t, "unowned", old, of(""))
	r.plant(t, "other-deployment", old, map[string]string{sandbox.LabelDeployment: "d2"})
	r.plant(t, "other-namespace", old, map[string]string{sandbox.LabelNamespace: "n2"})
	r.plant(t, "resumed", old, map[string]string{sandbox.LabelCreated: now.UTC().Format(time.RFC3339)})
	// Not one label of it is ours.
	if _, err := r.Create(t.Context(), sandbox.Spec{Key: "foreign", Deadline: now.Add(time.Hour), Labels: map[string]string{"owner": "somebody"}}); err != nil {
		t.Fatal(err)
	}
	r.aged["foreign"] = old
	for _, ref := range []sandbox.Ref{paused, busyPaused} {
		if err := w.fake.Pause(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	all := r.left(t)

	// A dry run removes nothing and says all.
	dry, err := w.FindOrphanedSandboxes(t.Context(), orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule, DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"orphan", "orphan-base", "orphan-cheap", "orphan-ended", "orphan-of-killed", "orphan-paused"}
	var named []string
	for _, item := range dry.Sandboxes {
		named = append(named, item.ID)
		if item.Why == "" || now.Sub(item.Since) < old-time.Minute || (item.Hourly == nil) != (item.ID == "orphan-cheap") ||
			item.Hourly != nil && *item.Hourly != fork.Dollar/20 || item.Paused != (item.ID == "orphan-paused") {
			t.Errorf("%+v", item)
		}
	}
	slices.Sort(named)
	if diff := cmp.Diff(want, named); diff != "" {
		t.Errorf("a dry run names (-want +got):\n%s", diff)
	}
	kept := map[string]int{keptOpen: 3, keptYoung: 2, keptClosing: 1, keptDoubtful: 1, keptUnowned: 1}
	if diff := cmp.Diff(kept, dry.Kept); diff != "" {
		t.Errorf("kept (-want +got):\n%s", diff)
	}
	if len(dry.Problems) != 1 || !strings.Contains(dry.Problems[0], "doubtful") {
		t.Errorf("%q", dry.Problems)
	}
	if diff := cmp.Diff(all, r.left(t)); diff != "" {
		t.Fatalf("a dry run removed something:\n%s", diff)
	}

	removed, _ := w.sweep(t, orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule, Limit: 2})
	if diff := cmp.Diff(want, removed); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
	stay := slices.DeleteFunc(all, func(key string) bool { return slices.Contains(want, key) })
	if diff := cmp.Diff(stay, r.left(t)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

func TestOneProvidersFailureIsToldAndStopsNoOther(t *testing.T) {
	t.Parallel()
	w, r := field(t)
	other := &remote{Provider: w.fake, name: "broken", down: fault.New("list", fault.Unavailable, "region outage"), aged: map[string]time.Duration{}}
	w.Providers = sandbox.NewSet(r, other)
	r.plant(t, "orphan", 2*time.Hour, nil)
	if err := w.remember(t.Context(), "departed"); err != nil {
		t.Fatal(err)
	}
	removed, first := w.sweep(t, orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule})
	if !slices.Equal(removed, []string{"orphan"}) {
		t.Errorf("removed %v", removed)
	}
	told := strings.Join(first.Problems, "\n")
	if !strings.Contains(told, "broken") || !strings.Contains(told, "region outage") || !strings.Contains(told, "departed has made sandboxes") {
		t.Errorf("%s", told)
	}
	_, err := w.CleanupSandbox(t.Context(), orchestrator.CleanupSandboxInput{Provider: "departed", Run: "over", Num: 1, Orphan: &rule})
	if fault.KindOf(err) != fault.Invalid {
		t.Errorf("the orphan of a provider that is not there counts as removed: %v", err)
	}
}

func TestASilentTemporalKeepsEverything(t *testing.T) {
	t.Parallel()
	w, r := field(t)
	asked := 0
	w.State = func(context.Context, string, int) (orchestrator.RunState, error) {
		asked++
		return orchestrator.RunState{}, fault.New("", fault.Unreachable, "nobody answers")
	}
	for i := range 30 {
		r.plant(t, fmt.Sprintf("box-%d", i), 2*time.Hour, map[string]string{sandbox.LabelRun: fmt.Sprint("run", i)})
	}
	removed, first := w.sweep(t, orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule})
	if len(removed) != 0 || first.Kept[keptDoubtful] != 30 || len(first.Problems) == 0 || len(first.Problems) > problemLimit || asked != silentLimit {
		t.Errorf("removed %v; %+v; asked %d times", removed, first, asked)
	}
}

func TestVeryManyOrphansComeInSmallPages(t *testing.T) {
	t.Parallel()
	w, r := field(t)
	const n = 120
	for i := range n {
		r.plant(t, fmt.Sprintf("box-%03d", i), 2*time.Hour, nil)
	}
	found, err := w.FindOrphanedSandboxes(t.Context(), orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule})
	if err != nil || len(found.Orphans) != orchestrator.CleanupPage || found.Next == "" {
		t.Fatalf("%d orphans, next %q, %v", len(found.Orphans), found.Next, err)
	}
	// One that cannot be removed does not keep the pages from going on.
	seen := map[string]bool{}
	for in := (orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule}); ; {
		found, err := w.FindOrphanedSandboxes(t.Context(), in)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range found.Orphans {
			if seen[o.Ref.ID] {
				t.Fatalf("%s comes twice", o.Ref.ID)
			}
			seen[o.Ref.ID] = true
		}
		if in.After = found.Next; found.Next == "" {
			break
		}
	}
	if len(seen) != n {
		t.Errorf("%d of %d", len(seen), n)
	}
}

func TestAnOrphanIsJudgedAgainBeforeItGoes(t *testing.T) {
	t.Parallel()
	w, r := field(t)
	r.plant(t, "reopened", 2*time.Hour, map[string]string{sandbox.LabelRun: "again"})
	reused := r.plant(t, "reused", 2*time.Hour, nil)
	found, err := w.FindOrphanedSandboxes(t.Context(), orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule})
	if err != nil || len(found.Orphans) != 2 {
		t.Fatalf("%+v, %v", found, err)
	}
	// The run of one goes on after all, and the other's key now names another
	// sandbox.
	w.states["again"] = orchestrator.RunState{Known: true, Open: true}
	if err := r.Destroy(t.Context(), reused); err != nil {
		t.Fatal(err)
	}
	r.plant(t, "reused", 2*time.Hour, map[string]string{sandbox.LabelRun: "again"})
	for _, o := range found.Orphans {
		out, err := w.CleanupSandbox(t.Context(), o)
		if err != nil || out.Kept == "" {
			t.Errorf("%s: %+v, %v", o.Ref.ID, out, err)
		}
	}
	if left := r.left(t); !slices.Equal(left, []string{"reopened", "reused"}) {
		t.Errorf("left: %v", left)
	}
	// A second removal of what is gone is none.
	again := orchestrator.CleanupSandboxInput{Ref: reused, Provider: "fake", Run: "over", Num: 1, Orphan: &rule}
	if out, err := w.CleanupSandbox(t.Context(), again); err != nil || out.Kept != keptGone {
		t.Errorf("%+v, %v", out, err)
	}
}

func TestACreationThatWasCutOffIsFoundInAListThatLags(t *testing.T) {
	t.Parallel()
	w, r := field(t)
	r.plant(t, "half-made", 0, map[string]string{sandbox.LabelRun: "run", sandbox.LabelFork: "3"})
	r.late = 1
	if _, err := w.CleanupSandbox(t.Context(), orchestrator.CleanupSandboxInput{Provider: "fake", Run: "run", Num: 3}); err != nil {
		t.Fatal(err)
	}
	if left := r.left(t); len(left) > 0 || r.lists < 2 {
		t.Errorf("left %v after %d lists", left, r.lists)
	}
}

func TestCreationIsRememberedBeforeItBegins(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	noted := false
	w.Providers = sandbox.NewSet(&watched{Provider: w.fake, before: func() {
		for o := range w.Artifacts.List(context.Background(), providersUsed) {
			noted = noted || o.Key == providersUsed+"/fake"
		}
	}})
	_, _ = w.start(t, plan("", "x"))
	if !noted {
		t.Error("the first sandbox was asked for before the provider was written down")
	}
}

// watched looks before anything is made.
type watched struct {
	sandbox.Provider
	before func()
}

// HostBound: as the one that it wraps.
func (w *watched) HostBound() {}

func (w *watched) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
	w.before()
	return w.Provider.Create(ctx, spec)
}

func TestFilesOfRunsThatTemporalKnowsStay(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	put := func(key, text string) {
		t.Helper()
		if err := w.Artifacts.Put(t.Context(), key, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	const known, gone, open = fork.RunPrefix + "aaaaaaaa", fork.RunPrefix + "bbbbbbbb", fork.RunPrefix + "cccccccc"
	w.states[known] = orchestrator.RunState{Known: true, Closed: time.Now()}
	w.states[open] = orchestrator.RunState{Known: true, Open: true}
	for _, run := range []string{known, gone, open} {
		put(artifact.RunKey(run, 1, "transcript"), "said")
	}
	put("bases/used.bundle", "x")
	put("bases/unused.bundle", "x")
	put("texts/prompt", "x")
	put(artifact.RunKey(open, 0, bundleNote), "bases/used.bundle")

	keys := func() []string {
		var keys []string
		for o, err := range w.Artifacts.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, o.Key)
		}
		return keys
	}
	before := keys()
	sweep := func(later time.Duration, dry bool) []orchestrator.CleanupItem {
		s := &scan{a: w.Activities, now: time.Now().Add(later), states: map[owner]answer{}}
		items := s.stored(t.Context(), dry)
		if len(s.problems) > 0 {
			t.Errorf("%q", s.problems)
		}
		return items
	}
	if items := sweep(RunAge-time.Hour, false); len(items) > 0 {
		t.Errorf("too early: %+v", items)
	}
	if items := sweep(RunAge+time.Hour, true); len(items) != 2 || !slices.Equal(keys(), before) {
		t.Errorf("a dry run: %+v, left %v", items, keys())
	}
	items := sweep(RunAge+time.Hour, false)
	if len(items) != 2 || items[0].Kind != orchestrator.KindRun || items[0].ID != gone || items[1].ID != "bases/unused.bundle" || !items[0].Removed || !items[1].Removed {
		t.Errorf("%+v", items)
	}
	left := slices.DeleteFunc(before, func(key string) bool { return strings.Contains(key, gone) || strings.Contains(key, "unused") })
	if diff := cmp.Diff(left, keys()); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	// Where one run cannot be asked for, no bundle goes: it could be its.
	put(artifact.RunKey("unknown", 0, bundleNote), "bases/unused.bundle")
	put("bases/unused.bundle", "x")
	s := &scan{a: w.Activities, now: time.Now().Add(RunAge + time.Hour), states: map[owner]answer{}}
	if items := s.stored(t.Context(), false); len(items) != 0 || len(s.problems) == 0 {
		t.Errorf("%+v, %q", items, s.problems)
	}
}
