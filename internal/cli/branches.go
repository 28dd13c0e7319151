package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/host"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

// work opens the git stores of the state folder.
func (p *plugged) work(_ context.Context, g Globals) (Work, error) {
	cfg, err := home(g.Config)
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.DiscardHandler)
	near := host.Repo(cfg.Home, nil, nil, log)
	return &branches{Store: near, near: near, p: p, cfg: cfg}, nil
}

// branches are those of the runs that the state folder's own worker carried
// out, and those of others that were brought here.
type branches struct {
	*repo.Store // that holds the branch: near or far
	near        *repo.Store
	far         *repo.Store     // nil: not opened yet
	store       *artifact.Store // likewise
	p           *plugged
	cfg         *config.Config
}

var _ Work = (*branches)(nil)

// Bring makes the branch of an ended fork available here: what follows is
// about it. Work of another host comes out of the shared artifact store, and is
// checked as the worker checked it.
func (b *branches) Bring(ctx context.Context, run string, plan fork.Plan, r fork.Result, dir string) error {
	b.Store = b.near
	if has, err := b.Has(ctx, run, r.ForkNum, r.Commit); has || err != nil || b.cfg.Embedded() {
		return err
	}
	if b.far == nil {
		if err := b.open(ctx); err != nil {
			return err
		}
	}
	b.Store = b.far
	if has, err := b.Has(ctx, run, r.ForkNum, r.Commit); has || err != nil {
		return err
	}
	bundle, err := b.download(ctx, run, r.ForkNum)
	if err != nil {
		return err
	}
	defer os.Remove(bundle)
	base, err := b.base(ctx, run, plan, r.BaseCommit, dir)
	if err != nil {
		return err
	}
	got, err := b.far.Receive(ctx, repo.ReceiveInput{Run: run, Num: r.ForkNum, Base: base, Ref: fork.ResultRef, Bundle: bundle, Keep: true})
	if err == nil && got.Commit != r.Commit {
		err = fault.New("", fault.Invalid, "the artifact store holds %s as the work of fork %d, but that is %s", shortCommit(got.Commit), r.ForkNum, shortCommit(r.Commit)).
			Hinted("Somebody replaced it there. Who has the host of the worker can show the branch with: %s diff %s/%d", program, run, r.ForkNum)
	}
	return err
}

// open opens the shared store and what was fetched from there before. Of that,
// what came long ago goes: as long as it is of use, it can be had again.
func (b *branches) open(ctx context.Context) error {
	secrets := b.p.secrets(b.cfg)
	var err error
	if b.store, err = host.Artifacts(ctx, b.cfg.Home, b.cfg.Artifacts, storeKeys(b.cfg, secrets)); err != nil {
		return err
	}
	b.far = host.Fetched(b.cfg.Home, func(context.Context) (repo.Credential, error) {
		s := secrets()
		return repo.Credential{Server: s.GitHubServer, Token: string(s.GitHubToken)}, nil
	}, b.store, slog.New(slog.DiscardHandler))
	runs, err := b.far.Runs(ctx)
	if err != nil {
		return err
	}
	for _, r := range runs {
		if time.Since(r.Used) > activities.RunAge {
			if err := b.far.Remove(ctx, r.Run); err != nil {
				return err
			}
		}
	}
	return nil
}

// Carried reports whether the run was given the folder by this state folder.
func (b *branches) Carried(ctx context.Context, path, commit string) bool {
	return host.Fetched(b.cfg.Home, nil, nil, slog.New(slog.DiscardHandler)).Mirrors(ctx, path, commit)
}

// download copies what the fork committed into a file.
func (b *branches) download(ctx context.Context, run string, num int) (string, error) {
	r, err := b.store.Get(ctx, artifact.RunKey(run, num, fork.ResultName))
	if fault.KindOf(err) == fault.NotFound {
		hint := hintArtifacts + "."
		if b.cfg.Artifacts != "" {
			hint = "The worker may have another SANDBOX_TEMPORAL_ARTIFACTS than this command, or a clean-up has removed it."
		}
		return "", fault.New("", fault.NotFound, "the work of fork %d of run %s is neither on this host nor in its artifact store", num, run).Hinted("%s", hint)
	}
	if err != nil {
		return "", err
	}
	defer r.Close()
	f, err := os.CreateTemp("", program+"-*.bundle")
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, io.LimitReader(r, activities.MaxBundle+1)) // the git store refuses what is larger
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// base says where the commit can be had that the fork began at: from the
// folder that the command works in, that which the user gave to the run, the
// shared store, or the server that the run had it from.
func (b *branches) base(ctx context.Context, run string, plan fork.Plan, commit, dir string) (repo.Base, error) {
	for _, path := range []string{topOf(ctx, dir), plan.Repo} {
		if path == "" {
			continue
		}
		// A folder that is gone, or is none of ours, is just not the place.
		if there, err := b.far.Knows(ctx, path, commit); err == nil && there {
			return repo.Base{Source: path, Commit: commit}, nil
		}
	}
	key := plan.Upload
	if key == "" {
		var err error
		if key, err = b.note(ctx, run); err != nil {
			return repo.Base{}, err
		}
	}
	if key != "" {
		_, holds, err := repo.ParseUpload(key)
		if err == nil && holds != commit {
			err = fault.New("", fault.Invalid, "the artifact store has another commit for run %s than its forks began at", run)
		}
		if err != nil {
			return repo.Base{}, err
		}
		src, err := b.far.Import(ctx, plan.Repo, key, "")
		if fault.KindOf(err) != fault.NotFound {
			return src, err
		}
	}
	if !repo.IsLocal(plan.Repo) {
		return repo.Base{Source: plan.Repo, Commit: commit}, nil
	}
	return repo.Base{}, fault.New("", fault.NotFound, "commit %s of %s, which the fork began at, is neither here nor in the artifact store", shortCommit(commit), plan.Repo).
		Hinted("Go to a clone of the repository that holds the commit.")
}

// note reads under which key the store holds the run's repository; "" when it
// does not.
func (b *branches) note(ctx context.Context, run string) (string, error) {
	r, err := b.store.Get(ctx, artifact.RunKey(run, 0, fork.SourceName))
	if fault.KindOf(err) == fault.NotFound {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer r.Close()
	key, err := io.ReadAll(io.LimitReader(r, 1<<10))
	return string(key), err
}

// topOf returns the top of the work tree that dir lies in, or "".
func topOf(ctx context.Context, dir string) string {
	if dir == "" {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, gitPatience)
	defer cancel()
	top, err := git(ctx, dir, "rev-parse", "--show-toplevel")
	if err != nil {
		return ""
	}
	return top
}

// bringTime bounds how long the end of a run is held up by its branches.
const bringTime = 5 * time.Minute

// bringHome fetches the branches of a run, whose workers cannot reach the
// user's folder, into that folder. What cannot be brought now, apply brings
// later.
func bringHome(ctx context.Context, env *Env, runs Runs, rep fork.Report) {
	if env.Globals.Config.Embedded() || env.Work == nil {
		return
	}
	plan, err := runs.Plan(ctx, rep.Run)
	if err != nil || plan.Upload == "" {
		return // the worker did it, or said why not
	}
	ctx, cancel := context.WithTimeout(ctx, bringTime)
	defer cancel()
	work, err := env.Work(ctx, env.Globals)
	if err != nil {
		fmt.Fprintf(env.Stderr, "warning: no branch was fetched into %s: %s\n", flat(plan.Repo), clean(err.Error()))
		return
	}
	fetched, missed := 0, 0
	for _, r := range rep.Results {
		if r.Commit == "" {
			continue
		}
		if !work.Carried(ctx, plan.Repo, r.BaseCommit) {
			return // another host or user did, who may have named any folder; this one only looks on
		}
		e := work.Bring(ctx, rep.Run, plan, r, "")
		if e == nil {
			e = work.Deliver(ctx, rep.Run, r.ForkNum, plan.Repo)
		}
		if e == nil {
			fetched++
			continue
		}
		if missed++; err == nil {
			err = e // one is enough to be told of
		}
	}
	if fetched > 0 {
		fmt.Fprintf(env.Stderr, "%s fetched into %s\n", branchesText(fetched), flat(plan.Repo))
	}
	if missed > 0 {
		fmt.Fprintf(env.Stderr, "warning: %s not fetched into %s, which apply can do later: %s\n", branchesText(missed), flat(plan.Repo), clean(err.Error()))
		if hint := fault.HintOf(err); hint != "" {
			fmt.Fprintln(env.Stderr, clean(hint))
		}
	}
}

func branchesText(n int) string {
	if n == 1 {
		return "1 branch was"
	}
	return fmt.Sprintf("%d branches were", n)
}
