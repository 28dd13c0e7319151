package repo

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// ApplyResult says what Apply did.
type ApplyResult struct {
	Files    []string // that were changed, by their names in the repository
	ThreeWay bool     // the work tree had moved on from the base, and the changes were merged
}

// Apply puts a fork's changes into the work tree that dir lies in, as changes
// that are not committed. It works in any clone, whether it has the base or
// not. All changes are made or none: what stands in the way is a Conflict.
//
// The changes are made as git-apply(1) does. Where the work tree has moved on
// from the base they are first merged with its HEAD, outside of its
// repository. The index, the refs and the objects of the repository are not
// touched, and none of its hooks or merge drivers run.
func (s *Store) Apply(ctx context.Context, run string, num int, dir string) (ApplyResult, error) {
	const op = "repo: apply"
	repo, base, tip, err := s.find(ctx, run, num)
	if err != nil {
		return ApplyResult{}, fault.Wrap(op, err)
	}
	top, err := s.workTree(ctx, dir)
	if err != nil {
		return ApplyResult{}, fault.Wrap(op, err)
	}
	sc, err := s.scratch(ctx)
	if err != nil {
		return ApplyResult{}, fault.Wrap(op, err)
	}
	defer sc.close()

	var out ApplyResult
	var touched []string
	err = s.changes(ctx, call{gitDir: repo}, base, tip, func(c change) {
		out.Files = append(out.Files, c.path)
		touched = append(touched, c.touches()...)
	})
	if err != nil || len(out.Files) == 0 {
		return out, fault.Wrap(op, err)
	}
	patch, err := s.patch(ctx, sc.dir, call{gitDir: repo}, base, tip)
	if err != nil {
		return ApplyResult{}, fault.Wrap(op, err)
	}
	failed := s.applyPatch(ctx, top, patch, touched, filepath.Join(sc.dir, "before"))
	if failed == nil {
		return out, nil
	}
	if !gitFailed(failed) {
		return ApplyResult{}, fault.Wrap(op, failed)
	}
	conflict := &fault.Error{Op: op, Kind: fault.Conflict, Err: failed,
		Hint: "Nothing was changed. Commit or put away your own changes to these files, or merge the branch: git merge " + fork.Branch(run, num)}

	merged, files, err := s.merge(ctx, sc.dir, repo, top, base, tip)
	if err != nil {
		return ApplyResult{}, fault.Wrap(op, err)
	}
	if merged == nil {
		if len(files) > 0 {
			conflict.Hint = "Nothing was changed. Both sides changed " + strings.Join(files, ", ") + ". Merge the branch by hand: git merge " + fork.Branch(run, num)
		}
		return ApplyResult{}, conflict
	}
	out = ApplyResult{Files: merged.files, ThreeWay: true}
	if len(out.Files) == 0 {
		return out, nil // HEAD has the changes already
	}
	if err := s.applyPatch(ctx, top, merged.patch, merged.touched, filepath.Join(sc.dir, "before-merge")); err != nil {
		if !gitFailed(err) {
			return ApplyResult{}, fault.Wrap(op, err)
		}
		conflict.Err = err
		return ApplyResult{}, conflict
	}
	return out, nil
}

// workTree returns the top of the work tree that dir lies in.
func (s *Store) workTree(ctx context.Context, dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if info, err := os.Stat(abs); err != nil || !info.IsDir() {
		return "", fault.New("", fault.NotFound, "there is no folder %s", dir).Hinted("Name a folder in a clone of the repository.")
	}
	out, err := s.run(ctx, call{user: true, dir: abs, args: []string{"rev-parse", "--show-toplevel"}})
	if gitFailed(err) {
		err = s.notARepository(ctx, abs, err)
		if fault.KindOf(err) == fault.NotFound {
			err = &fault.Error{Err: err, Hint: "Go to a clone of the repository, or name one."}
		}
		return "", err
	}
	return strings.TrimSuffix(string(out), "\n"), err
}

// patch writes the difference of two trees to a file in dir.
func (s *Store) patch(ctx context.Context, dir string, in call, from, to string) (string, error) {
	f, err := os.CreateTemp(dir, "patch-")
	if err != nil {
		return "", diskFault(err)
	}
	defer f.Close()
	in.args = append(diffArgs(), "--patch", "--binary", "--full-index", from, to, "--")
	in.bounded, in.stdout = true, f
	_, err = s.run(ctx, in)
	return f.Name(), err
}

// applyPatch makes all changes of a patch in the work tree, or none. Files
// are those that the patch names; of a rename, both names.
//
// git-apply refuses paths in .git, outside of the tree, or behind a symbolic
// link, and looks whether all changes fit before it makes the first. But a
// write can still fail, when a file stands where a folder has to be or when
// the disk is full: then what was there is put back.
func (s *Store) applyPatch(ctx context.Context, top, patch string, files []string, safe string) error {
	c := call{user: true, dir: top, args: []string{"apply", "--whitespace=nowarn", "--check", "--", patch}}
	if _, err := s.run(ctx, c); err != nil {
		return err
	}
	b, err := backUp(top, files, safe)
	if err != nil {
		return err
	}
	defer b.close()
	c.args = []string{"apply", "--whitespace=nowarn", "--", patch}
	if _, err = s.run(ctx, c); err != nil {
		return errors.Join(err, b.restore())
	}
	return nil
}

// A merger is what a merge comes to.
type merger struct {
	patch          string // a file, from the work tree's HEAD
	files, touched []string
}

// merge merges the fork's changes with the HEAD of a work tree, in a
// repository of our own that sees the objects of both. It returns nil and the
// files in conflict when that cannot be done.
func (s *Store) merge(ctx context.Context, dir, repo, top, base, tip string) (*merger, []string, error) {
	unmerged := func(err error) (*merger, []string, error) {
		if gitFailed(err) {
			s.log.Debug("changes could not be merged", logs.Error, err)
			return nil, nil, nil
		}
		return nil, nil, err
	}
	out, err := s.run(ctx, call{user: true, dir: top, args: []string{"rev-parse", "--verify", "--quiet", "HEAD^{commit}"}})
	if gitFailed(err) {
		return nil, nil, nil // nothing is committed there
	}
	if err != nil {
		return nil, nil, err
	}
	head := strings.TrimSpace(string(out))
	out, err = s.run(ctx, call{user: true, dir: top, args: []string{"rev-parse", "--path-format=absolute", "--git-path", "objects"}})
	if err != nil {
		return nil, nil, err
	}
	theirs := strings.TrimSuffix(string(out), "\n")
	if objectFormat(head) != objectFormat(base) {
		return nil, nil, nil
	}
	own := filepath.Join(dir, "merge.git")
	if err := s.borrow(ctx, own, repo, base); err != nil {
		return nil, nil, err
	}
	in := call{gitDir: own, bounded: true, env: []string{
		`GIT_ALTERNATE_OBJECT_DIRECTORIES="` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(theirs) + `"`,
		"GIT_AUTHOR_NAME=sandbox-temporal", "GIT_AUTHOR_EMAIL=noreply@localhost", "GIT_AUTHOR_DATE=@0 +0000",
		"GIT_COMMITTER_NAME=sandbox-temporal", "GIT_COMMITTER_EMAIL=noreply@localhost", "GIT_COMMITTER_DATE=@0 +0000"}}
	git := func(args ...string) (string, error) {
		c := in
		c.args = args
		out, err := s.run(ctx, c)
		return strings.TrimSuffix(string(out), "\n"), err
	}
	// git-merge-tree finds the merge base by itself. Two commits of our own
	// with the base as parent make sure that it is the base and not an older
	// one, whatever the histories look like.
	var id [3]string
	for i, tree := range []string{base, head, tip} {
		args := []string{"commit-tree", "-m", strconv.Itoa(i)}
		if i > 0 {
			args = append(args, "-p", id[0])
		}
		if id[i], err = git(append(args, tree+"^{tree}")...); err != nil {
			return unmerged(err)
		}
	}
	said, err := git("merge-tree", "--write-tree", "--name-only", "--no-messages", "-z", id[1], id[2])
	tree, files, _ := strings.Cut(said, "\x00")
	var failed *gitError
	if errors.As(err, &failed) && failed.code == 1 { // 1: conflicts; more: trouble
		list := strings.FieldsFunc(files, func(r rune) bool { return r == 0 })
		slices.Sort(list)
		return nil, slices.Compact(list), nil
	}
	if err != nil {
		return unmerged(err)
	}
	var m merger
	err = s.changes(ctx, in, head, tree, func(c change) {
		m.files = append(m.files, c.path)
		m.touched = append(m.touched, c.touches()...)
	})
	if err != nil {
		return unmerged(err)
	}
	if m.patch, err = s.patch(ctx, dir, in, head, tree); err != nil {
		return unmerged(err)
	}
	return &m, nil, nil
}
