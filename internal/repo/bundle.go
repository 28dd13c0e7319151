package repo

import (
	"context"
	"io"
	"os"
	"path/filepath"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Bundle writes a git bundle to w that holds b.Commit with all of its
// history, under the name b.Ref. "git clone --branch" takes it. What was
// written before an error is no bundle.
//
// A worker that does not have the commit yet fetches it. When the mirror
// turns out to be broken the error is Unavailable, and the next call works
// on a new one.
func (s *Store) Bundle(ctx context.Context, b Base, w io.Writer) error {
	const op = "repo: bundle"
	if err := s.check(ctx); err != nil {
		return fault.Wrap(op, err)
	}
	if err := checkCommit(b.Commit); err != nil {
		return fault.Wrap(op, err)
	}
	if b.Branch != "" && b.Branch != "HEAD" {
		if _, err := branchName(b.Branch); err != nil {
			return fault.Wrap(op, err)
		}
	}
	src, err := s.origin(ctx, b)
	if err != nil {
		return fault.Wrap(op, err)
	}
	mirror, lk, err := s.hold(ctx, src, b.Commit)
	if err != nil {
		return fault.Wrap(op, err)
	}
	defer lk.unlock()

	// A bundle names refs as its repository does, and the mirror has no
	// branches: a repository that borrows the mirror's objects has one.
	sc, err := s.scratch(ctx)
	if err != nil {
		return fault.Wrap(op, err)
	}
	defer sc.close()
	dir := filepath.Join(sc.dir, "bundle.git")
	if err := s.borrow(ctx, dir, mirror, b.Commit); err != nil {
		return fault.Wrap(op, err)
	}
	if err := s.setRefs(ctx, dir, "create "+b.Ref()+" "+b.Commit); err != nil {
		return fault.Wrap(op, s.suspect(ctx, mirror, err))
	}
	out := &told{w: w}
	_, err = s.run(ctx, call{gitDir: dir, stdout: out, args: []string{"bundle", "create", "--quiet", "-", b.Ref()}})
	if out.err != nil {
		return fault.Wrap(op, diskFault(out.err)) // git only saw a closed pipe
	}
	if err != nil {
		return fault.Wrap(op, s.suspect(ctx, mirror, err))
	}
	return nil
}

// borrow makes an empty repository at dir that sees another one's objects.
func (s *Store) borrow(ctx context.Context, dir, from, commit string) error {
	if err := s.initBare(ctx, dir, commit); err != nil {
		return err
	}
	line := filepath.Join(from, "objects") + "\n"
	return diskFault(os.WriteFile(filepath.Join(dir, "objects", "info", "alternates"), []byte(line), 0o600))
}

// suspect marks a mirror that lacks objects, so that the next who wants it
// makes it again.
func (s *Store) suspect(ctx context.Context, mirror string, err error) error {
	if !gitFailed(err) || s.sound(ctx, mirror) {
		return err
	}
	if err := os.WriteFile(filepath.Join(mirror, brokenMark), nil, 0o600); err != nil {
		return diskFault(err)
	}
	return &fault.Error{Kind: fault.Unavailable, Err: err, Hint: "The mirror of the repository is damaged. Try again: it is made anew."}
}

// told remembers whether anything was written and why writing failed.
type told struct {
	w     io.Writer
	wrote bool
	err   error
}

func (t *told) Write(p []byte) (int, error) {
	t.wrote = t.wrote || len(p) > 0
	n, err := t.w.Write(p)
	if err != nil {
		t.err = err
	}
	return n, err
}
