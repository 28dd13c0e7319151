package repo

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// A tip is what a branch stood at when the remote was asked.
type tip struct {
	branch string // without refs/heads/
	ref    string
	commit string // of a tag: what it points at
}

// incoming is where a fetched branch lies for a moment, under one name for
// all branches: a remote may turn "a" into "a/b", which no two refs can be.
const incoming = "refs/incoming/"

// lookUp asks the remote what it has.
func (s *Store) lookUp(ctx context.Context, l location, branch string) (tip, error) {
	want := []string{"HEAD", "refs/heads/main"}
	if branch != "" {
		want = []string{"refs/heads/" + branch, "refs/tags/" + branch, "refs/tags/" + branch + "^{}"}
	}
	refs, head, err := s.list(ctx, l, want...)
	if err != nil {
		return tip{}, err
	}
	if branch == "" {
		if id := refs["refs/heads/main"]; id != "" {
			return tip{"main", "refs/heads/main", id}, nil
		}
		if id := refs["HEAD"]; id != "" {
			if name, ok := strings.CutPrefix(head, "refs/heads/"); ok && badRef(name) == "" && !strings.HasPrefix(name, "-") {
				return tip{name, head, id}, nil
			}
			return tip{"HEAD", "HEAD", id}, nil
		}
	} else {
		if id := refs["refs/heads/"+branch]; id != "" {
			return tip{branch, "refs/heads/" + branch, id}, nil
		}
		if id := refs["refs/tags/"+branch+"^{}"]; id != "" {
			return tip{branch, "refs/tags/" + branch, id}, nil
		}
		if id := refs["refs/tags/"+branch]; id != "" {
			return tip{branch, "refs/tags/" + branch, id}, nil
		}
	}

	all, _, err := s.list(ctx, l, "refs/heads/*")
	if err != nil {
		return tip{}, err
	}
	var names []string
	for ref := range all {
		names = append(names, strings.TrimPrefix(ref, "refs/heads/"))
	}
	slices.Sort(names)
	switch {
	case len(names) == 0 && branch == "":
		return tip{}, fault.New("", fault.NotFound, "the repository %s has no commits", l.url).Hinted("Commit something and push it first.")
	case len(names) == 0:
		return tip{}, fault.New("", fault.NotFound, "no branch %q in %s: it has no branches", branch, l.url).Hinted("Commit something and push it first.")
	case branch == "":
		return tip{}, fault.New("", fault.NotFound, "%s has neither a branch main nor a default branch", l.url).
			Hinted("Name a branch with --branch, for example %s.", strings.Join(near("main", names), ", "))
	}
	return tip{}, fault.New("", fault.NotFound, "no branch %q in %s", branch, l.url).
		Hinted("It has %d branches, among them: %s.", len(names), strings.Join(near(branch, names), ", "))
}

// list returns the remote's refs that match the patterns, and what HEAD
// points at.
func (s *Store) list(ctx context.Context, l location, patterns ...string) (refs map[string]string, head string, err error) {
	c, err := s.remoteCall(ctx, l, call{args: append([]string{"ls-remote", "--symref", "--end-of-options", l.url}, patterns...)})
	if err != nil {
		return nil, "", err
	}
	out, err := s.run(ctx, c)
	if err != nil {
		if gitFailed(err) {
			err = s.diagnose(ctx, l, err)
		}
		return nil, "", err
	}
	refs = map[string]string{}
	for line := range strings.Lines(string(out)) {
		left, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		if !ok {
			continue
		}
		if target, symbolic := strings.CutPrefix(left, "ref: "); symbolic {
			if name == "HEAD" {
				head = target
			}
			continue
		}
		if checkCommit(left) == nil {
			refs[name] = left
		}
	}
	return refs, head, nil
}

// fetchTip brings t into the mirror.
func (s *Store) fetchTip(ctx context.Context, l location, t tip) (mirror, commit string, err error) {
	mirror = s.mirrorDir(l, t.commit)
	lk, err := acquire(ctx, mirror+".lock", false)
	if err != nil {
		return "", "", err
	}
	there := s.holds(ctx, mirror, t.commit)
	lk.unlock()
	if there {
		return mirror, t.commit, nil
	}
	err = s.grow(ctx, l, mirror, t.commit, func() error {
		if err := s.fetchRefs(ctx, l, mirror, "+"+t.ref+":"+incoming+"tip"); err != nil {
			return err
		}
		// The branch may have moved on since the remote was asked: what was
		// fetched counts.
		commit, err = s.resolveRef(ctx, mirror, incoming+"tip")
		if err == nil && commit == "" {
			err = fault.New("", fault.Invalid, "%s of %s is not a commit", t.ref, l.url).Hinted("Name a branch.")
		}
		if err != nil {
			return err
		}
		return s.setRefs(ctx, mirror, "update refs/bases/"+commit+" "+commit, "delete "+incoming+"tip")
	})
	return mirror, commit, err
}

// hold returns the mirror with a commit in it, and a shared lock that keeps
// the mirror as it is. A worker that never saw the repository fetches all of
// it, since the commit may no longer be any branch's newest.
func (s *Store) hold(ctx context.Context, l location, commit string) (mirror string, lk *lock, err error) {
	mirror = s.mirrorDir(l, commit)
	for range 3 {
		if lk, err = acquire(ctx, mirror+".lock", false); err != nil {
			return "", nil, err
		}
		if s.holds(ctx, mirror, commit) {
			return mirror, lk, nil
		}
		lk.unlock()
		if ctx.Err() != nil {
			return "", nil, contextFault(ctx)
		}
		fetch := s.fetchCommit
		if l.upload != "" {
			fetch = s.takeUpload
		} else if _, _, err := s.list(ctx, l, "HEAD"); err != nil {
			return "", nil, err
		}
		if err = s.grow(ctx, l, mirror, commit, func() error { return fetch(ctx, l, mirror, commit) }); err != nil {
			return "", nil, err
		}
	}
	return "", nil, fault.New("", fault.Unavailable, "the mirror of %s does not keep %s", l.url, commit)
}

func (s *Store) fetchCommit(ctx context.Context, l location, mirror, commit string) error {
	if err := s.fetchRefs(ctx, l, mirror, "+refs/heads/*:"+incoming+"heads/*"); err != nil {
		return err
	}
	id, err := s.resolveRef(ctx, mirror, commit)
	if err != nil {
		return err
	}
	if id == "" {
		// Servers may refuse to give a commit by its id; many do not.
		if err := s.fetchRefs(ctx, l, mirror, "+"+commit+":"+incoming+"tip"); err != nil && !gitFailed(err) {
			return err
		}
		if id, err = s.resolveRef(ctx, mirror, commit); err != nil {
			return err
		}
	}
	lines := []string{}
	if id != "" {
		lines = append(lines, "update refs/bases/"+commit+" "+commit)
	}
	out, err := s.run(ctx, call{gitDir: mirror, args: []string{"for-each-ref", "--format=delete %(refname)", incoming}})
	if err != nil {
		return err
	}
	lines = append(lines, strings.Split(strings.TrimSpace(string(out)), "\n")...)
	if err := s.setRefs(ctx, mirror, lines...); err != nil {
		return err
	}
	if id == "" {
		return fault.New("", fault.NotFound, "commit %s is no longer in %s", commit, l.url).
			Hinted("The branch was rewritten since the run began. Start a new run.")
	}
	return nil
}

// fetchRefs fetches into a mirror by one refspec.
func (s *Store) fetchRefs(ctx context.Context, l location, mirror, refspec string) error {
	c, err := s.remoteCall(ctx, l, call{gitDir: mirror, config: []string{"fetch.unpackLimit=1"}, args: []string{
		"fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules",
		"--no-show-forced-updates", "--refmap=", "--end-of-options", l.url, refspec}})
	if err != nil {
		return err
	}
	_, err = s.run(ctx, c)
	return err
}

// holds reports whether the mirror has all of a commit's history. A ref in
// refs/bases is written after a fetch is complete, and only then.
func (s *Store) holds(ctx context.Context, mirror, commit string) bool {
	if _, err := os.Stat(filepath.Join(mirror, brokenMark)); err == nil {
		return false
	}
	if _, err := os.Stat(mirror); err != nil {
		return false
	}
	id, err := s.resolveRef(ctx, mirror, "refs/bases/"+commit)
	return err == nil && id == commit
}

// brokenMark is a file in a mirror that turned out to miss objects.
const brokenMark = "broken"

// grow runs a fetch into the mirror, alone. A mirror that does not stand the
// test after a failed fetch is made again, once.
func (s *Store) grow(ctx context.Context, l location, mirror, commit string, fetch func() error) error {
	lk, err := acquire(ctx, mirror+".lock", true)
	if err != nil {
		return err
	}
	defer lk.unlock()
	if _, err := os.Stat(filepath.Join(mirror, brokenMark)); err == nil {
		if err := s.drop(mirror); err != nil {
			return err
		}
	}
	fresh, err := s.open(ctx, mirror, commit)
	if err != nil {
		return err
	}
	err = fetch()
	if err == nil {
		s.compact(ctx, mirror)
		return s.refuseShallow(mirror, l)
	}
	if !gitFailed(err) {
		tidy(mirror)
		return err
	}
	if !fresh && !s.sound(ctx, mirror) {
		s.log.Warn("mirror is broken, making it again", logs.Repository, l.url, logs.Mirror, mirror)
		if err := s.drop(mirror); err != nil {
			return err
		}
		if _, err := s.open(ctx, mirror, commit); err != nil {
			return err
		}
		if err = fetch(); err == nil {
			return s.refuseShallow(mirror, l)
		}
	}
	tidy(mirror)
	if !gitFailed(err) {
		return err
	}
	if l.upload != "" {
		return err // of our own repositories, so the disk is to blame
	}
	// The remote answered a moment ago. If it does not any more, that is why.
	if _, _, asked := s.list(ctx, l, "HEAD"); asked != nil {
		return asked
	}
	return &fault.Error{Kind: fault.Unavailable, Err: err, Hint: "Try again; if it stays so, look with: git clone " + l.url}
}

// open makes the mirror when it is not there, and tidies it when it is.
func (s *Store) open(ctx context.Context, mirror, commit string) (fresh bool, err error) {
	if _, err := os.Stat(filepath.Join(mirror, "HEAD")); err == nil {
		tidy(mirror)
		return false, nil
	}
	if err := s.drop(mirror); err != nil {
		return false, err
	}
	sc, err := s.scratch(ctx)
	if err != nil {
		return false, err
	}
	defer sc.close()
	made := filepath.Join(sc.dir, "mirror.git")
	if err := s.initBare(ctx, made, commit); err != nil {
		return false, err
	}
	return true, diskFault(os.Rename(made, mirror))
}

// drop removes a mirror: out of sight at once, then for good.
func (s *Store) drop(mirror string) error {
	away := filepath.Join(s.dir, "tmp", randomName())
	if err := os.MkdirAll(filepath.Dir(away), 0o700); err != nil {
		return diskFault(err)
	}
	// The lock file makes what a crash leaves here fit for sweep.
	lk, err := tryLock(away+".lock", true)
	if err != nil {
		return err
	}
	err = os.Rename(mirror, away)
	if lk != nil {
		(&scratch{dir: away, lock: lk}).close()
	}
	if err != nil && !os.IsNotExist(err) {
		return diskFault(err)
	}
	return nil
}

// tidy removes what a git that was killed left in a repository. The caller
// holds its lock, so nobody else works on it and every lock file is stale.
func tidy(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		name := d.Name()
		switch {
		case d.IsDir() && strings.HasPrefix(name, "tmp_objdir-"):
			_ = os.RemoveAll(path)
			return fs.SkipDir
		case !d.IsDir() && (strings.HasSuffix(name, ".lock") || strings.HasPrefix(name, "tmp_") || strings.HasPrefix(name, ".tmp-") || strings.HasPrefix(name, "refs-")):
			_ = os.Remove(path)
		}
		return nil
	})
}

// sound tells whether every object that a mirror's refs need is there.
func (s *Store) sound(ctx context.Context, mirror string) bool {
	_, err := s.run(ctx, call{gitDir: mirror, args: []string{"fsck", "--connectivity-only", "--no-dangling", "--no-progress"}})
	return !gitFailed(err)
}

// compact packs a mirror together when it has grown by many small fetches.
// Failing at it does no harm.
func (s *Store) compact(ctx context.Context, mirror string) {
	packs, _ := filepath.Glob(filepath.Join(mirror, "objects", "pack", "*.pack"))
	if len(packs) <= s.maxPacks {
		return
	}
	if _, err := s.run(ctx, call{gitDir: mirror, args: []string{"repack", "-a", "-d", "-q", "--threads=1"}}); err != nil {
		s.log.Debug("mirror could not be packed", logs.Mirror, mirror, logs.Error, err)
		tidy(mirror)
	}
}

// refuseShallow refuses a remote whose history is cut short.
func (s *Store) refuseShallow(mirror string, l location) error {
	if _, err := os.Stat(filepath.Join(mirror, "shallow")); err != nil {
		return nil
	}
	if err := s.drop(mirror); err != nil {
		return err
	}
	return fault.New("", fault.Unsupported, "the history of %s is cut short", l.url).Hinted("Use a repository with its full history.")
}
