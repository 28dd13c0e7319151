package repo

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func (s *Store) runDir(run string) string { return filepath.Join(s.dir, "runs", run+".git") }

func (s *Store) lockRun(ctx context.Context, run string) (*lock, error) {
	return acquire(ctx, filepath.Join(s.dir, "runs", run+".lock"), true)
}

// baseRef is where a run's repository keeps the base of a fork.
func baseRef(num int) string { return "refs/bases/" + strconv.Itoa(num) }

// openRun sees to it that the run's repository is there and holds the base.
func (s *Store) openRun(ctx context.Context, run string, src location, srcErr error, base string) error {
	lk, err := s.lockRun(ctx, run)
	if err != nil {
		return err
	}
	defer lk.unlock()
	dir := s.runDir(run)
	if id, err := s.resolveRef(ctx, dir, "refs/bases/"+base); err != nil || id == base {
		return err
	}
	if srcErr != nil {
		return srcErr
	}
	mirror, held, err := s.hold(ctx, src, base)
	if err != nil {
		return err
	}
	defer held.unlock()
	if _, err := os.Stat(filepath.Join(dir, "HEAD")); err != nil {
		sc, err := s.scratch(ctx)
		if err != nil {
			return err
		}
		defer sc.close()
		made := filepath.Join(sc.dir, "run.git")
		if err := s.initBare(ctx, made, base); err != nil {
			return err
		}
		if err := linkObjects(mirror, made); err != nil {
			return err
		}
		if err := s.setRefs(ctx, made, "create refs/bases/"+base+" "+base); err != nil {
			return s.suspect(ctx, mirror, err)
		}
		return diskFault(os.Rename(made, dir))
	}
	tidy(dir)
	if err := linkObjects(mirror, dir); err != nil {
		return err
	}
	if err := s.setRefs(ctx, dir, "update refs/bases/"+base+" "+base); err != nil {
		return s.suspect(ctx, mirror, err)
	}
	return nil
}

// blame looks whether a bundle was refused because the run's own repository
// lacks objects. Then the fork did nothing wrong, and the next call gets what
// is missing from a new mirror.
func (s *Store) blame(ctx context.Context, run string, src location, base string, err error) error {
	dir := s.runDir(run)
	if fault.KindOf(err) != fault.Invalid || s.sound(ctx, dir) || ctx.Err() != nil {
		return err
	}
	lk, lockErr := s.lockRun(ctx, run)
	if lockErr != nil {
		return lockErr
	}
	defer lk.unlock()
	if err := s.setRefs(ctx, dir, "delete refs/bases/"+base); err != nil {
		return err
	}
	if mirror := s.mirrorDir(src, base); src.key != "" && !s.sound(ctx, mirror) {
		if err := os.WriteFile(filepath.Join(mirror, brokenMark), nil, 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
			return diskFault(err)
		}
	}
	return fault.New("", fault.Unavailable, "the repository of run %s lacks objects of its base", run).
		Hinted("The state folder is damaged. Try again: what is missing is fetched anew.")
}

// linkObjects gives a repository all objects of another by hard links. Git
// never writes into an object file, so the two cannot disturb each other.
func linkObjects(from, to string) error {
	from, to = filepath.Join(from, "objects"), filepath.Join(to, "objects")
	var late []string // an index makes its pack known, so it comes last
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir() && rel == "info":
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case !d.Type().IsRegular() || strings.HasPrefix(d.Name(), "tmp_") || strings.HasPrefix(d.Name(), ".tmp-"):
			return nil
		case strings.HasSuffix(rel, ".idx"):
			late = append(late, rel)
			return nil
		}
		return link(path, filepath.Join(to, rel))
	})
	for _, rel := range late {
		if err == nil {
			err = link(filepath.Join(from, rel), filepath.Join(to, rel))
		}
	}
	return diskFault(err)
}

func link(from, to string) error {
	err := os.Link(from, to)
	if errors.Is(err, os.ErrExist) {
		return nil // the name of an object file is the hash of what is in it
	}
	return err
}

// has reports whether the run has this very branch already.
func (s *Store) has(ctx context.Context, dir string, num int, branch, base, tip string) bool {
	a, err1 := s.resolveRef(ctx, dir, "refs/heads/"+branch)
	b, err2 := s.resolveRef(ctx, dir, baseRef(num))
	return err1 == nil && err2 == nil && a == tip && b == base
}

// keep moves the checked objects of a fork into the run's repository, and
// sets its branch.
func (s *Store) keep(ctx context.Context, from, run string, num int, base, tip string) error {
	lk, err := s.lockRun(ctx, run)
	if err != nil {
		return err
	}
	defer lk.unlock()
	dir := s.runDir(run)
	if _, err := os.Stat(dir); err != nil {
		return fault.New("", fault.NotFound, "run %s was removed meanwhile", run)
	}
	if err := linkObjects(from, dir); err != nil {
		return err
	}
	return s.setRefs(ctx, dir, "update refs/heads/"+fork.Branch(run, num)+" "+tip, "update "+baseRef(num)+" "+base)
}

// find returns the repository, the base and the commit of a fork.
func (s *Store) find(ctx context.Context, run string, num int) (dir, base, tip string, err error) {
	if err := s.check(ctx); err != nil {
		return "", "", "", err
	}
	if err := checkRun(run, num); err != nil {
		return "", "", "", err
	}
	dir = s.runDir(run)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return "", "", "", noBranch(run, num)
	} else if err != nil {
		return "", "", "", diskFault(err)
	}
	if tip, err = s.resolveRef(ctx, dir, "refs/heads/"+fork.Branch(run, num)); err != nil {
		return "", "", "", err
	}
	if base, err = s.resolveRef(ctx, dir, baseRef(num)); err != nil {
		return "", "", "", err
	}
	if tip == "" || base == "" {
		return "", "", "", noBranch(run, num)
	}
	return dir, base, tip, nil
}

// Has reports whether the run's own repository is here and holds this commit
// as the branch of the fork.
func (s *Store) Has(ctx context.Context, run string, num int, commit string) (bool, error) {
	_, _, tip, err := s.find(ctx, run, num)
	if fault.KindOf(err) == fault.NotFound {
		return false, nil
	}
	return err == nil && tip == commit, fault.Wrap("repo: look for a branch", err)
}

func noBranch(run string, num int) error {
	return fault.New("", fault.NotFound, "there is no branch %s", fork.Branch(run, num)).
		Hinted("The fork has not ended yet, or it changed nothing.")
}

// A RunInfo is what Runs says of a run's repository.
type RunInfo struct {
	Run  string
	Used time.Time // when objects last came into it
}

// Runs returns the runs that have a repository here.
func (s *Store) Runs(_ context.Context) ([]RunInfo, error) {
	const op = "repo: list runs"
	entries, err := os.ReadDir(filepath.Join(s.dir, "runs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(op, diskFault(err))
	}
	var runs []RunInfo
	for _, e := range entries {
		run, ok := strings.CutSuffix(e.Name(), ".git")
		if !ok || !e.IsDir() || checkRun(run, 1) != nil {
			continue
		}
		info := RunInfo{Run: run}
		for _, part := range []string{".", "objects", filepath.Join("objects", "pack"), "refs"} {
			if st, err := os.Stat(filepath.Join(s.runDir(run), part)); err == nil && st.ModTime().After(info.Used) {
				info.Used = st.ModTime()
			}
		}
		if !info.Used.IsZero() { // it was removed just now
			runs = append(runs, info)
		}
	}
	return runs, nil
}

// Remove deletes a run's repository and the branches in it. Branches that a
// local source was given stay. A run that is not there is no error.
func (s *Store) Remove(ctx context.Context, run string) error {
	const op = "repo: remove"
	if err := checkRun(run, 1); err != nil {
		return fault.Wrap(op, err)
	}
	lk, err := s.lockRun(ctx, run)
	if err != nil {
		return fault.Wrap(op, err)
	}
	defer lk.unlock()
	defer os.Remove(filepath.Join(s.dir, "runs", run+".lock"))
	err = s.drop(s.runDir(run))
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	return fault.Wrap(op, err)
}
