package activities

import (
	"cmp"
	"context"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// How long what lies on a disk is kept that nobody uses. Until then, the logs
// and branches of a run that Temporal has forgotten can be had; those of a run
// that it knows are kept as long as it does.
const (
	BaseAge = 30 * 24 * time.Hour // bases and bundles; the next run that needs one makes it anew
	RunAge  = 30 * 24 * time.Hour // transcripts and branches
)

// storedLimit bounds what one clean-up removes from a disk; the next goes on.
const storedLimit = 50

// Where the artifact store keeps the commits that sandboxes are filled with,
// and the note in a run's folder that says which it uses.
const (
	bundles    = "bases"
	bundleEnd  = ".bundle"
	bundleNote = "bundle"
)

// stored removes what lies on disks and is used by nobody, or in a dry run
// only returns it.
func (s *scan) stored(ctx context.Context, dry bool) []orchestrator.CleanupItem {
	items := s.bases(ctx, dry)
	return append(items, s.files(ctx, dry, storedLimit-len(items))...)
}

// bases removes the bases of this installation that nobody has used for long.
func (s *scan) bases(ctx context.Context, dry bool) []orchestrator.CleanupItem {
	var items []orchestrator.CleanupItem
	for _, name := range s.a.Providers.Names() {
		snap, ok := sandbox.As[sandbox.Snapshotter](s.a.Providers[name])
		if !ok || !ready(ctx, s.a.Providers[name]) {
			continue
		}
		failed := map[string]bool{}
		// What stands on each other goes from the top down, round by round.
		for again := true; again && ctx.Err() == nil && len(items) < storedLimit; {
			again = false
			all, err := snap.Bases(ctx)
			if err != nil {
				s.problem("the bases of %s could not be listed: %v", name, err)
				break
			}
			for _, b := range (sandbox.Retention{Age: BaseAge, Bytes: -1}).Expired(all, s.now) {
				if b.Damaged && s.now.Sub(b.LastUse()) < BaseAge || !sandbox.HasLabels(b.Labels, s.a.ours()) || failed[b.Key] || len(items) == storedLimit {
					continue
				}
				item := orchestrator.CleanupItem{
					Kind: orchestrator.KindBase, Provider: name, ID: b.Key, Since: b.LastUse(), Bytes: b.Bytes, Why: "nobody started from it for 30 days",
				}
				if !dry {
					switch err := snap.RemoveBase(ctx, b.Key); {
					case err == nil:
						again, item.Removed = true, true
					case fault.KindOf(err) == fault.Conflict:
						failed[b.Key] = true
						continue // somebody came just now
					default:
						failed[b.Key] = true
						item.Kept = fork.Cut(err.Error(), 500)
						s.problem("base %s of %s was not removed: %v", b.Key, name, err)
					}
				}
				items = append(items, item)
			}
		}
	}
	return items
}

// runFiles are what the stores hold of one run.
type runFiles struct {
	run    string
	used   time.Time
	bytes  int64
	bundle bool // it says which bundle it uses
	source bool // it says what was uploaded for it
}

// files removes what the stores hold of runs that Temporal has forgotten, and
// bundles that no run uses, when nobody has written to them for long. What a
// sandbox is filled from is used while the run goes on; what was uploaded of a
// repository, as long as anything is stored of the run.
func (s *scan) files(ctx context.Context, dry bool, limit int) []orchestrator.CleanupItem {
	var items []orchestrator.CleanupItem
	runs, ok := s.runs(ctx)
	inUse := map[string]bool{} // bundles
	for _, f := range runs {
		old := s.now.Sub(f.used) >= RunAge
		var state orchestrator.RunState
		var err error
		if old || f.bundle {
			state, err = s.state(ctx, f.run, 0)
		}
		gone := false
		switch {
		case err != nil:
			ok = false
			s.problem("the files of run %s stay, it could not be asked for: %v", f.run, err)
		case state.Open && f.bundle:
			ok = s.uses(ctx, f.run, bundleNote, inUse) && ok
		case old && !state.Known && len(items) < limit:
			item := orchestrator.CleanupItem{Kind: orchestrator.KindRun, ID: f.run, Run: f.run, Since: f.used, Bytes: f.bytes, Why: "Temporal does not know the run any more"}
			if !dry {
				err := s.a.Artifacts.Delete(ctx, "runs/"+f.run)
				if err == nil && strings.HasPrefix(f.run, fork.RunPrefix) {
					err = s.a.Repo.Remove(ctx, f.run)
				}
				s.removed(&item, err)
			}
			items = append(items, item)
			gone = dry || item.Removed
		}
		if f.source && !gone {
			ok = s.uses(ctx, f.run, fork.SourceName, inUse) && ok
		}
	}
	if !ok {
		return items // without knowing all runs nobody knows which bundles they use
	}
	for _, where := range []string{bundles, repo.Uploads} {
		items = append(items, s.unused(ctx, dry, where, inUse, limit-len(items))...)
	}
	return items
}

// unused removes the bundles of one kind that nobody uses.
func (s *scan) unused(ctx context.Context, dry bool, where string, inUse map[string]bool, limit int) (items []orchestrator.CleanupItem) {
	for o, err := range s.a.Artifacts.List(ctx, where) {
		if err != nil {
			s.problem("bundles could not be listed: %v", err)
			break
		}
		if inUse[o.Key] || !strings.HasSuffix(o.Key, bundleEnd) || s.now.Sub(o.ModTime) < BaseAge || len(items) >= limit {
			continue
		}
		item := orchestrator.CleanupItem{Kind: orchestrator.KindBundle, ID: o.Key, Since: o.ModTime, Bytes: o.Size, Why: "no run uses it, nor did one for 30 days"}
		if !dry {
			s.removed(&item, s.a.Artifacts.Delete(ctx, o.Key))
		}
		items = append(items, item)
	}
	return items
}

func (s *scan) removed(item *orchestrator.CleanupItem, err error) {
	if item.Removed = err == nil; err != nil {
		item.Kept = fork.Cut(err.Error(), 500)
		s.problem("%s %s was not removed: %v", item.Kind, item.ID, err)
	}
}

// runs returns the runs that anything is stored of, oldest first, and whether
// those are all.
func (s *scan) runs(ctx context.Context) (list []runFiles, all bool) {
	byRun := map[string]*runFiles{}
	of := func(run string) *runFiles {
		if byRun[run] == nil {
			byRun[run] = &runFiles{run: run}
		}
		return byRun[run]
	}
	all = true
	for o, err := range s.a.Artifacts.List(ctx, "runs") {
		if err != nil {
			s.problem("what is stored of runs could not be listed: %v", err)
			all = false
			break
		}
		run, _, ok := strings.Cut(strings.TrimPrefix(o.Key, "runs/"), "/")
		if !ok {
			continue
		}
		f := of(run)
		f.bytes += o.Size
		if o.ModTime.After(f.used) {
			f.used = o.ModTime
		}
		f.bundle = f.bundle || o.Key == artifact.RunKey(run, 0, bundleNote)
		f.source = f.source || o.Key == artifact.RunKey(run, 0, fork.SourceName)
	}
	repos, err := s.a.Repo.Runs(ctx)
	if err != nil {
		s.problem("the repositories of runs could not be listed: %v", err)
		all = false
	}
	for _, r := range repos {
		if f := of(r.Run); r.Used.After(f.used) {
			f.used = r.Used
		}
	}
	if !all {
		// Half of what a run has could be old while the other is not.
		return nil, false
	}
	for _, f := range byRun {
		list = append(list, *f)
	}
	slices.SortFunc(list, func(a, b runFiles) int { return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.run, b.run)) })
	return list, true
}

// uses adds what a note of the run names to what is in use, and reports whether
// that is known.
func (s *scan) uses(ctx context.Context, run, note string, inUse map[string]bool) bool {
	key, err := s.note(ctx, run, note)
	if err != nil {
		s.problem("which bundle run %s uses is not known: %v", run, err)
	}
	inUse[key] = true
	return err == nil
}

// note reads which bundle a run uses.
func (s *scan) note(ctx context.Context, run, name string) (string, error) {
	r, err := s.a.Artifacts.Get(ctx, artifact.RunKey(run, 0, name))
	if err != nil {
		return "", err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, 1<<10))
	return string(b), err
}
