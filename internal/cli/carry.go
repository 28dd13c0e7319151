package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/host"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

// hintArtifacts says how a folder of this host comes to workers elsewhere, and
// their work back.
const hintArtifacts = "Set SANDBOX_TEMPORAL_ARTIFACTS, here and for the workers, to a folder or bucket that all of them can reach"

// carry puts a repository that is a folder of this host where the workers of a
// cluster can have it. One whose only worker works in the state folder of this
// command sees the folder itself.
func (p *plugged) carry(ctx context.Context, cfg *config.Config, run string, plan *fork.Plan) error {
	if !repo.IsLocal(plan.Repo) {
		return nil
	}
	shared := cfg.Artifacts != ""
	w, err := p.workers(ctx, cfg)
	switch {
	case err != nil:
		return err
	case w.here && (!w.elsewhere || !shared):
		return nil
	case !shared:
		return fault.New("", fault.Invalid, "the workers of this cluster do not see %s: they are not of this state folder, and there is no artifact store that they share with it", plan.Repo).
			Hinted("%s; or name the repository by a URL.", hintArtifacts)
	}
	if _, err := home(cfg); err != nil {
		return err
	}
	store, err := host.Artifacts(ctx, cfg.Home, cfg.Artifacts, storeKeys(cfg, p.secrets(cfg)))
	if err != nil {
		return err
	}
	defer store.Close()
	git := host.Fetched(cfg.Home, nil, store, slog.New(slog.DiscardHandler))
	var sum atomic.Int64
	defer tellCarry(p.env.Stderr, plan.Repo, &sum)()
	src, err := git.Resolve(ctx, plan.Repo, plan.Branch)
	if err != nil {
		return err
	}
	key, err := activities.UploadSource(ctx, git, store, run, src, sum.Store)
	if err != nil {
		return err
	}
	plan.Upload, plan.Branch = key, src.Branch
	return nil
}

// carryTold is how often an upload says how far it is. Most are done before.
const carryTold = 3 * time.Second

// tellCarry says how far the upload of a repository is, until the returned
// function is called. Meanwhile nobody else writes to w.
func tellCarry(w io.Writer, source string, sum *atomic.Int64) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(carryTold)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			if n := sum.Load(); n > 0 {
				fmt.Fprintf(w, "%s of %s are in the artifact store\n", byteText(n), flat(source))
			} else {
				fmt.Fprintf(w, "%s is packed for the artifact store\n", flat(source))
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// workers says who serves the cluster's task queue.
type workers struct {
	here      bool // one that works in the state folder of this command
	elsewhere bool // another one, or nobody knows who will
}

const (
	workersFresh = 2 * time.Minute        // a poll takes a minute, and dead pollers are listed for some more
	workersWait  = 5 * time.Second        // for the first worker of a cluster
	workersLate  = 500 * time.Millisecond // by which one queue of a worker can be listed after the other
	workersAgain = 100 * time.Millisecond
)

// workers looks who serves the task queue of the cluster.
func (p *plugged) workers(ctx context.Context, cfg *config.Config) (workers, error) {
	c, err := p.dial(ctx, cfg, "", slog.New(slog.DiscardHandler), "")
	if err != nil {
		return workers{}, err
	}
	defer c.Close()
	return findWorkers(ctx, cfg.Home, cmp.Or(cfg.TaskQueue, orchestrator.DefaultTaskQueue), func(ctx context.Context, queue string) (map[string]bool, error) {
		return serving(ctx, c, queue)
	})
}

// findWorkers tells the worker of a state folder from others by the queue that
// only that one serves. A worker that is being started just now is waited for a
// moment. Where there is none, the one of this state folder is expected to come
// back, if it ever had one, and others may come first.
func findWorkers(ctx context.Context, home, queue string, serving func(ctx context.Context, queue string) (map[string]bool, error)) (w workers, err error) {
	tick := time.NewTicker(workersAgain)
	defer tick.Stop()
	for begun := time.Now(); ; {
		all, err := serving(ctx, queue)
		if err != nil {
			return w, err
		}
		// A worker gives the folder its name before it serves any queue, and
		// serves its own first: whoever is among all has left both by now.
		known := host.Known(home)
		var mine map[string]bool
		if known {
			own, err := host.Queue(home, queue)
			if err != nil {
				return w, err
			}
			if mine, err = serving(ctx, own); err != nil {
				return w, err
			}
		}
		w = workers{here: len(mine) > 0}
		for who := range all {
			w.elsewhere = w.elsewhere || !mine[who]
		}
		waited := time.Since(begun)
		switch {
		case len(all) > 0 && (w.here || !known || waited >= workersLate):
			return w, nil
		case waited >= workersWait:
			return workers{here: known, elsewhere: true}, nil
		}
		select {
		case <-ctx.Done():
			return w, ctx.Err()
		case <-tick.C:
		}
	}
}

// serving returns who asked a task queue for work lately.
func serving(ctx context.Context, c client.Client, queue string) (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	d, err := c.DescribeTaskQueue(ctx, queue, enumspb.TASK_QUEUE_TYPE_ACTIVITY)
	if err != nil {
		return nil, fault.Wrap("look for workers", orchestrator.Fault(err))
	}
	who := map[string]bool{}
	for _, poller := range d.GetPollers() {
		if time.Since(poller.GetLastAccessTime().AsTime()) < workersFresh {
			who[poller.GetIdentity()] = true
		}
	}
	return who, nil
}
