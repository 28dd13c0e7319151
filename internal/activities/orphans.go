package activities

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// listTime is how long one provider may take to list its sandboxes: the others
// are waiting.
const listTime = time.Minute

// Why a sandbox of ours stays. The words are keys of CleanupOutput.Kept.
const (
	keptOpen     = "in use"
	keptYoung    = "younger than the age asked for"
	keptClosing  = "its run ended just now"
	keptDoubtful = "not known whether its run goes on"
	keptUnowned  = "without a run's label"
	keptUndated  = "of unknown age"
	keptGone     = "gone already"
)

// orphan is a sandbox that can go.
type orphan struct {
	sandbox.Info
	provider string
	num      int // of the fork; 0: a base
	born     time.Time
	why      string
}

// order is where an orphan stands among the others, in every scan.
func (o orphan) order() string { return o.provider + "/" + o.Ref.ID + "/" + o.Ref.Handle }

// ours are the labels of everything that this installation has made.
func (a *Activities) ours() map[string]string {
	return map[string]string{sandbox.LabelDeployment: a.Deployment, sandbox.LabelNamespace: a.Namespace}
}

// FindOrphanedSandboxes lists a page of what carries our labels, is old enough
// and belongs to nothing that goes on. What one provider does not say, or
// Temporal of one run, is a problem in the output and keeps nothing else back.
func (a *Activities) FindOrphanedSandboxes(ctx context.Context, in orchestrator.FindOrphanedSandboxesInput) (orchestrator.FindOrphanedSandboxesOutput, error) {
	defer beat(ctx, phase("scan"))()
	out := orchestrator.FindOrphanedSandboxesOutput{Orphans: []orchestrator.CleanupSandboxInput{}, Kept: map[string]int{}, Queue: a.HostQueue}
	s := &scan{a: a, rule: in.OrphanRule, now: time.Now(), states: map[owner]answer{}}
	if in.After == "" {
		out.Stored = s.stored(ctx, in.DryRun)
		s.strangers(ctx)
	}
	var found []orphan
	for _, name := range a.Providers.Names() {
		if !ready(ctx, a.Providers[name]) {
			continue // strangers says so when it was ever used
		}
		orphans := s.provider(ctx, name, out.Kept)
		found = append(found, orphans...)
		if in.After == "" && !in.DryRun { // once a round
			a.Metrics.OrphansFound(name, len(orphans))
			for _, o := range orphans {
				a.about(o.Labels[sandbox.LabelRun], o.num, o.Ref.ID).
					WarnContext(ctx, "Sandbox found that no run uses", logs.Provider, name, logs.Age, s.now.Sub(o.born).Seconds())
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return out, err
	}
	slices.SortFunc(found, func(a, b orphan) int { return cmp.Compare(a.order(), b.order()) })
	limit, last := cmp.Or(in.Limit, orchestrator.CleanupPage), ""
	for _, o := range found {
		if in.After != "" && o.order() <= in.After {
			continue
		}
		if len(out.Orphans) == limit {
			out.Next = last
			break
		}
		last = o.order()
		out.Orphans = append(out.Orphans, orchestrator.CleanupSandboxInput{
			Ref: o.Ref, Provider: o.provider, Run: o.Labels[sandbox.LabelRun], Num: o.num, Orphan: &in.OrphanRule,
		})
		out.Sandboxes = append(out.Sandboxes, s.item(o))
	}
	out.Problems = s.problems
	return out, nil
}

// removeOrphan destroys one sandbox that a scan found, when it is still there
// and still an orphan, and else says why it stays. Between the two a worker
// can have died and an hour gone by: its name can have been given to another.
func (a *Activities) removeOrphan(ctx context.Context, p sandbox.Provider, in orchestrator.CleanupSandboxInput) (kept string, err error) {
	labels := a.ours()
	labels[sandbox.LabelRun] = in.Run
	infos, err := p.List(ctx, labels)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(infos, func(info sandbox.Info) bool { return info.Ref == in.Ref })
	if i < 0 {
		return keptGone, nil
	}
	s := &scan{a: a, rule: *in.Orphan, now: time.Now(), states: map[owner]answer{}}
	if _, kept, err = s.judge(ctx, p.Name(), infos[i]); err != nil || kept != "" {
		return kept, err
	}
	return "", a.destroy(ctx, p, in.Ref, in.Run, in.Num)
}

// scan is one look at everything, at one moment.
type scan struct {
	a        *Activities
	rule     orchestrator.OrphanRule
	now      time.Time
	states   map[owner]answer
	silent   int // how often Temporal did not answer
	problems []string
}

type owner struct {
	run string
	num int
}

type answer struct {
	orchestrator.RunState
	err error
}

// problemLimit bounds what a scan tells: the first ones say it all.
const problemLimit = 20

func (s *scan) problem(format string, args ...any) {
	if len(s.problems) < problemLimit {
		s.problems = append(s.problems, fork.Cut(fmt.Sprintf(format, args...), 500))
	}
}

// provider returns the orphans of one provider, and counts what stays.
func (s *scan) provider(ctx context.Context, name string, kept map[string]int) []orphan {
	p := s.a.Providers[name]
	limited, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	infos, err := p.List(limited, s.a.ours())
	if err != nil {
		s.problem("the sandboxes of %s could not be listed: %v", name, err)
		return nil
	}
	var found []orphan
	for _, info := range infos {
		o, why, err := s.judge(ctx, name, info)
		switch {
		case err != nil:
			kept[keptDoubtful]++
			s.problem("sandbox %s of %s stays, its run %s could not be asked for: %v", info.Ref.ID, name, info.Labels[sandbox.LabelRun], err)
		case why != "":
			kept[why]++
		case o.provider != "":
			found = append(found, o)
		}
	}
	return found
}

// judge says that the sandbox is an orphan, or why it stays. Of one that is
// not ours it says neither.
func (s *scan) judge(ctx context.Context, provider string, info sandbox.Info) (o orphan, kept string, err error) {
	if s.a.Deployment == "" || s.a.Namespace == "" || !sandbox.HasLabels(info.Labels, s.a.ours()) {
		return o, "", nil // whatever the provider's filter let through
	}
	run := info.Labels[sandbox.LabelRun]
	if run == "" {
		return o, keptUnowned, nil
	}
	// Labels can be inherited, and a service can count from a resume: the
	// later of the two never makes a sandbox older than it is.
	born := info.Created
	if t, err := time.Parse(time.RFC3339, info.Labels[sandbox.LabelCreated]); err == nil && t.After(born) {
		born = t
	}
	num, _ := strconv.Atoi(info.Labels[sandbox.LabelFork]) // 0: a base
	// Whether it is in use comes first: that is what people ask about.
	state, err := s.state(ctx, run, num)
	switch {
	case err != nil:
		return o, "", err
	case state.Open:
		return o, keptOpen, nil
	case born.IsZero():
		return o, keptUndated, nil
	case s.now.Sub(born) < s.rule.MaxAge:
		return o, keptYoung, nil
	case state.Known && s.now.Sub(state.Closed) < s.rule.Grace:
		return o, keptClosing, nil
	}
	why := "Temporal does not know its run"
	if state.Known {
		why = "its run ended " + state.Closed.UTC().Format("2006-01-02 15:04") + " UTC"
	}
	return orphan{Info: info, provider: provider, num: num, born: born, why: why}, "", nil
}

// silentLimit is after how many questions without an answer no more are asked:
// every one can take a while.
const silentLimit = 3

// state asks Temporal, once in a scan for each.
func (s *scan) state(ctx context.Context, run string, num int) (orchestrator.RunState, error) {
	key := owner{run, num}
	got, asked := s.states[key]
	if !asked && s.silent >= silentLimit {
		return orchestrator.RunState{}, fault.New("ask for a run", fault.Unavailable, "Temporal did not answer %d times", s.silent)
	}
	if !asked {
		got.RunState, got.err = s.a.State(ctx, run, num)
		if got.err != nil {
			s.silent++
		}
		s.states[key] = got
	}
	return got.RunState, got.err
}

func (s *scan) item(o orphan) orchestrator.CleanupItem {
	item := orchestrator.CleanupItem{
		Kind: orchestrator.KindSandbox, Provider: o.provider, ID: o.Ref.ID, Run: o.Labels[sandbox.LabelRun], ForkNum: o.num,
		Since: o.born, Paused: o.Paused, Why: o.why,
	}
	if p, ok := sandbox.As[sandbox.Pricer](s.a.Providers[o.provider]); ok {
		if nano, ok := p.HourlyPrice(o.Info); ok {
			usd := fork.USD(nano)
			item.Hourly = &usd
		}
	}
	return item
}

// providersUsed is where the artifact store remembers which providers this
// installation has made sandboxes with.
const providersUsed = "providers"

// remember writes down, before the first sandbox is asked for, that the
// provider is used. Which sandbox it will be stands in the history of its
// workflow, and on its labels; this is how a clean-up knows of a provider that
// is not configured any more.
func (a *Activities) remember(ctx context.Context, provider string) error {
	a.mu.Lock()
	known := a.used[provider]
	a.mu.Unlock()
	if known {
		return nil
	}
	err := a.Artifacts.Put(ctx, providersUsed+"/"+provider, strings.NewReader(a.Deployment+"\n"))
	if err != nil {
		return fault.Wrap("remember provider "+provider, err)
	}
	a.mu.Lock()
	a.used[provider] = true
	a.mu.Unlock()
	return nil
}

// strangers tells of providers that were used and that this worker has not.
func (s *scan) strangers(ctx context.Context) {
	for o, err := range s.a.Artifacts.List(ctx, providersUsed) {
		if err != nil {
			s.problem("which providers were used is not known: %v", err)
			return
		}
		name := strings.TrimPrefix(o.Key, providersUsed+"/")
		switch p := s.a.Providers[name]; {
		case p == nil:
			s.problem("provider %s has made sandboxes for this installation and is not configured any more: nobody looks for what it may still run", name)
		case !ready(ctx, p):
			s.problem("provider %s has made sandboxes for this installation and has no key any more: nobody looks for what it may still run", name)
		}
	}
}
