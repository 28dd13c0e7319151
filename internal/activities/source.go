package activities

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

// source brings the base commit of a plan into the mirror: from where the
// repository is, or from the store, where a command has put it.
func (a *Activities) source(ctx context.Context, in orchestrator.PrepareBaseInput) (repo.Base, error) {
	if in.Plan.Upload == "" {
		src, err := a.Repo.Resolve(ctx, in.Plan.Repo, in.Plan.Branch)
		if err == nil && a.Shared && repo.IsLocal(in.Plan.Repo) {
			// Nobody but this host has it, and without it nobody else could
			// look at what the forks make of it.
			_, err = UploadSource(ctx, a.Repo, a.Artifacts, in.Run, src, nil)
		}
		return src, err
	}
	src, err := a.Repo.Import(ctx, in.Plan.Repo, in.Plan.Upload, in.Plan.Branch)
	if _, _, odd := repo.ParseUpload(in.Plan.Upload); odd == nil && fault.KindOf(err) == fault.Invalid {
		// Whoever starts the run again shall not find it there.
		if e := a.Artifacts.Delete(ctx, in.Plan.Upload); e != nil {
			return src, e
		}
	}
	return src, err
}

// freshFor is how long an upload is used again as it is. One that is older is
// made anew, long before a clean-up may take it for forgotten.
const freshFor = BaseAge / 2

// UploadSource puts the base of a run into the store, unless it is there, and
// returns its key. The run's note comes first: from then on, no clean-up
// removes what it names. Passed hears how many bytes went out so far; nil:
// nobody does. A second call does no harm and, in general, nothing.
func UploadSource(ctx context.Context, r *repo.Store, store *artifact.Store, run string, src repo.Base, passed func(int64)) (key string, err error) {
	const op = "upload repository"
	if key, err = r.UploadKey(ctx, src); err != nil {
		return "", err
	}
	if err := store.Put(ctx, artifact.RunKey(run, 0, fork.SourceName), strings.NewReader(key)); err != nil {
		return "", fault.Wrap(op, err)
	}
	for o, err := range store.List(ctx, key) {
		if err != nil {
			return "", fault.Wrap(op, err)
		}
		if o.Key == key && time.Since(o.ModTime) < freshFor {
			return key, nil
		}
	}
	out, in := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		in.CloseWithError(r.Carry(ctx, src, &meter{w: in, passed: passed}))
	}()
	err = store.Put(ctx, key, out)
	_ = out.Close() // lets git go when the store failed
	<-done
	return key, fault.Wrap(op, err)
}

// meter tells how much was written.
type meter struct {
	w      io.Writer
	sum    int64
	passed func(int64)
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	if m.sum += int64(n); m.passed != nil {
		m.passed(m.sum)
	}
	return n, err
}
