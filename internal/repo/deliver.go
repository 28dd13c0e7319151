package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// deliver fetches a branch out of the run's repository into the user's own.
// Only objects, the one ref and its log are written: no hook runs, and work
// tree, index, HEAD and configuration stay as they are.
func (s *Store) deliver(ctx context.Context, src location, run, branch, tip string) error {
	sum := sha256.Sum256([]byte(src.owner))
	lk, err := acquire(ctx, filepath.Join(s.dir, "mirrors", hex.EncodeToString(sum[:16])+".deliver.lock"), true)
	if err != nil {
		return err
	}
	defer lk.unlock()

	ref := "refs/heads/" + branch
	git := func(args ...string) (string, error) {
		c := call{user: true, dir: src.url, args: args, config: []string{"protocol.file.allow=always", "core.alternateRefsCommand=true"},
			env: []string{"GIT_ALLOW_PROTOCOL=file"}}
		for _, id := range tolerated() {
			c.config = append(c.config, "fetch.fsck."+id+"=ignore")
		}
		out, err := s.run(ctx, c)
		return strings.TrimSpace(string(out)), err
	}
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		// Git refuses to fetch into a branch that is checked out, even when
		// nothing would change.
		if there, err := git("rev-parse", "--verify", "--quiet", ref); err == nil && there == tip {
			return nil
		}
		_, err := git("fetch", "--quiet", "--no-tags", "--no-prune", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules",
			"--no-show-forced-updates", "--refmap=", "--end-of-options", run, "+"+ref+":"+ref)
		if !gitFailed(err) {
			return err
		}
		// The user's own git may hold a lock just now.
		if wait > 800*time.Millisecond {
			return &fault.Error{Kind: fault.Conflict, Err: err,
				Hint: "Look whether the branch is checked out, whether a branch named sandbox is in its way, and whether the worker's user may write to the repository. Then fetch it yourself: git fetch " + run + " " + ref}
		}
		select {
		case <-ctx.Done():
			return contextFault(ctx)
		case <-time.After(wait):
		}
	}
}

// Deliver fetches the branch of a fork, which Receive has taken in, into the
// local repository at path. A repository that does not hold the base is another
// one, or an older copy: it is NotFound, and left as it is.
func (s *Store) Deliver(ctx context.Context, run string, num int, path string) error {
	op := "repo: deliver " + fork.Branch(run, num)
	dir, base, tip, err := s.find(ctx, run, num)
	if err != nil {
		return fault.Wrap(op, err)
	}
	if !IsLocal(path) {
		return fault.New(op, fault.Invalid, "%s is not a local repository", path).Hinted(hintSource)
	}
	src, err := s.locate(ctx, path)
	if err != nil {
		return fault.Wrap(op, err)
	}
	switch there, err := s.knows(ctx, src, base); {
	case err != nil:
		return fault.Wrap(op, err)
	case !there:
		return fault.New(op, fault.NotFound, "%s does not hold commit %s, which the fork began at", path, base).
			Hinted("Fetch it into the repository first, or take the fork's changes with: apply")
	}
	return fault.Wrap(op, s.deliver(ctx, src, dir, fork.Branch(run, num), tip))
}

// Knows reports whether the local repository at path holds the commit.
func (s *Store) Knows(ctx context.Context, path, commit string) (bool, error) {
	const op = "repo: look for a commit"
	if err := errors.Join(s.check(ctx), checkCommit(commit)); err != nil {
		return false, fault.Wrap(op, err)
	}
	if !IsLocal(path) {
		return false, nil
	}
	src, err := s.locate(ctx, path)
	if err != nil {
		return false, fault.Wrap(op, err)
	}
	there, err := s.knows(ctx, src, commit)
	return there, fault.Wrap(op, err)
}

// Mirrors reports whether the commit was taken from the local repository at path
// before: one that is not there any more, or is another's, is not.
func (s *Store) Mirrors(ctx context.Context, path, commit string) bool {
	if s.check(ctx) != nil || checkCommit(commit) != nil || !IsLocal(path) {
		return false
	}
	src, err := s.locate(ctx, path)
	if err != nil {
		return false
	}
	mirror := s.mirrorDir(src, commit)
	lk, err := acquire(ctx, mirror+".lock", false)
	if err != nil {
		return false
	}
	defer lk.unlock()
	return s.holds(ctx, mirror, commit)
}

func (s *Store) knows(ctx context.Context, l location, commit string) (bool, error) {
	_, err := s.run(ctx, call{user: true, dir: l.url, args: []string{"cat-file", "-e", commit + "^{commit}"}})
	if gitFailed(err) {
		return false, nil
	}
	return err == nil, err
}

// Dirty reports whether the work tree at path has changes that are not
// committed, untracked files among them: a fork would not see those. A bare
// repository is never dirty. The kinds of the error are those of Resolve.
func (s *Store) Dirty(ctx context.Context, path string) (bool, error) {
	const op = "repo: look for changes"
	if err := s.check(ctx); err != nil {
		return false, fault.Wrap(op, err)
	}
	if !IsLocal(path) {
		return false, nil
	}
	src, err := s.locate(ctx, path)
	if err != nil {
		return false, fault.Wrap(op, err)
	}
	out, err := s.run(ctx, call{user: true, dir: src.url, args: []string{"rev-parse", "--is-inside-work-tree"}})
	if err != nil || strings.TrimSpace(string(out)) != "true" {
		return false, fault.Wrap(op, err)
	}
	seen := &told{w: io.Discard}
	_, err = s.run(ctx, call{user: true, dir: src.url, stdout: seen, args: []string{"status", "--porcelain", "-z", "--untracked-files=normal", "--ignore-submodules=all"}})
	return seen.wrote, fault.Wrap(op, err)
}
