package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// ReceiveInput names a bundle that a fork made.
type ReceiveInput struct {
	Run    string
	Num    int    // the fork's number, from 1
	Base   Base   // Source, Upload and Commit count; Mirror and Branch do not
	Ref    string // the one ref in the bundle, as "refs/heads/x"
	Bundle string // the file on the worker

	// Keep: the base's source is only read. A local one does not get the
	// branch (see Deliver).
	Keep bool
}

// Received is a fork's work as it is stored now.
type Received struct {
	Branch string // sandbox/<run>/<n>
	Commit string
	// What differs between the base and Commit. A binary file counts as a
	// file and has no lines.
	FilesChanged, Insertions, Deletions int
	// Delivered: the source is a local repository and has the branch.
	Delivered bool
	// Undelivered says why a local source did not get the branch. The branch
	// is stored all the same, and another Receive tries again.
	Undelivered error
}

// Receive takes in the bundle that a fork made, as the branch
// sandbox/<run>/<n> of the run's repository, and, when the base's source is a
// local repository, of that one too. The bundle may build on the base and on
// what came before it, and holds exactly one ref. A second call with the same
// bundle gives the same answer; one with another bundle replaces the branch.
//
// A bundle that is damaged, too large, builds on something else, holds
// anything else, or carries objects that could hurt who checks them out is
// refused with the kind Invalid, and leaves nothing behind.
func (s *Store) Receive(ctx context.Context, in ReceiveInput) (Received, error) {
	const op = "repo: receive"
	if err := s.check(ctx); err != nil {
		return Received{}, fault.Wrap(op, err)
	}
	if err := errors.Join(checkRun(in.Run, in.Num), checkCommit(in.Base.Commit)); err != nil {
		return Received{}, fault.Wrap(op, err)
	}
	if name, ok := strings.CutPrefix(in.Ref, "refs/"); !ok || badRef(name) != "" {
		return Received{}, fault.New(op, fault.Invalid, "%q is not a ref", in.Ref)
	}
	file, size, err := s.openBundle(in.Bundle)
	if err != nil {
		return Received{}, fault.Wrap(op, err)
	}
	defer file.Close()
	head, err := readHeader(file)
	if err != nil {
		return Received{}, fault.Wrap(op, refused(err))
	}
	tip, ok := head.refs[in.Ref]
	switch {
	case !ok:
		return Received{}, fault.Wrap(op, refused(errors.New("the bundle does not hold "+in.Ref)))
	case len(head.refs) > 1:
		return Received{}, fault.Wrap(op, refused(errors.New("the bundle holds more refs than "+in.Ref)))
	case head.format != objectFormat(in.Base.Commit):
		return Received{}, fault.Wrap(op, refused(errors.New("the bundle is made with another hash than the repository")))
	}

	// The location of a source that is gone does not matter any more once
	// the run has its base.
	src, srcErr := s.origin(ctx, in.Base)
	run := s.runDir(in.Run)
	if err := s.openRun(ctx, in.Run, src, srcErr, in.Base.Commit); err != nil {
		return Received{}, fault.Wrap(op, err)
	}
	out := Received{Branch: fork.Branch(in.Run, in.Num), Commit: tip}
	from := run
	if !s.has(ctx, run, in.Num, out.Branch, in.Base.Commit, tip) {
		sc, err := s.scratch(ctx)
		if err != nil {
			return Received{}, fault.Wrap(op, err)
		}
		defer sc.close()
		from = filepath.Join(sc.dir, "received.git")
		if err := s.inspect(ctx, from, run, in.Base.Commit, tip, head, file, size); err != nil {
			return Received{}, fault.Wrap(op, s.blame(ctx, in.Run, src, in.Base.Commit, err))
		}
	}
	if out.FilesChanged, out.Insertions, out.Deletions, err = s.count(ctx, from, in.Base.Commit, tip); err != nil {
		return Received{}, fault.Wrap(op, err)
	}
	if from != run {
		if err := s.keep(ctx, from, in.Run, in.Num, in.Base.Commit, tip); err != nil {
			return Received{}, fault.Wrap(op, err)
		}
	}
	switch {
	case in.Keep || in.Base.Upload != "":
	case srcErr != nil && IsLocal(in.Base.Source):
		out.Undelivered = srcErr
	case srcErr == nil && src.local():
		out.Undelivered = fault.Wrap("repo: deliver "+out.Branch, s.deliver(ctx, src, run, out.Branch, tip))
		out.Delivered = out.Undelivered == nil
	}
	if ctx.Err() != nil {
		return Received{}, fault.Wrap(op, contextFault(ctx))
	}
	return out, nil
}

func refused(err error) error {
	return &fault.Error{Kind: fault.Invalid, Err: err, Hint: "The fork's work was not taken; its log says what it did."}
}

// openBundle opens a plain file of a bearable size. A link or a pipe that
// stands in its place is not followed.
func (s *Store) openBundle(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, fault.New("", fault.NotFound, "no bundle at %s", path)
	}
	if errors.Is(err, syscall.ELOOP) {
		return nil, 0, refused(errors.New("the bundle is a symbolic link"))
	}
	if err != nil {
		return nil, 0, diskFault(err)
	}
	info, err := f.Stat()
	switch {
	case err != nil:
		err = diskFault(err)
	case !info.Mode().IsRegular():
		err = refused(errors.New("the bundle is not a plain file"))
	case info.Size() > s.maxBundle:
		err = fault.New("", fault.Invalid, "the bundle has %d bytes, the most is %d", info.Size(), s.maxBundle).
			Hinted("The fork committed something very large: name it in .gitignore.")
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// inspect unpacks a bundle into a repository of its own at dir, which sees
// the run's objects, and checks that it is sound and complete.
func (s *Store) inspect(ctx context.Context, dir, run, base, tip string, head bundleHeader, file *os.File, size int64) error {
	if err := s.borrow(ctx, dir, run, base); err != nil {
		return err
	}
	// What it builds on must be the base or older. git-rev-list prints
	// commits that the base does not have, and fails when one is missing.
	var ask bytes.Buffer
	for _, id := range head.requires {
		ask.WriteString(id + "^{commit}\n")
	}
	ask.WriteString("^" + base + "\n")
	stdin, err := s.spool(filepath.Dir(dir), ask.Bytes())
	if err != nil {
		return err
	}
	defer stdin.Close()
	out, err := s.run(ctx, call{gitDir: dir, bounded: true, stdin: stdin, args: []string{"rev-list", "--max-count=1", "--stdin"}})
	if gitFailed(err) {
		err = refused(err)
	}
	if err != nil {
		return err
	}
	if newer := strings.TrimSpace(string(out)); newer != "" {
		return refused(errors.New("the bundle builds on " + newer + ", which is not in the history of the base"))
	}
	// An unknown file mode is only noted by default; git would take it for a
	// submodule.
	if err := s.index(ctx, dir, head, file, size, "--strict=badfilemode=error"); err != nil {
		return err
	}
	return s.whole(ctx, dir, tip, "--not", base)
}

// index unpacks the pack of a bundle into the repository at dir, and checks
// every object of it.
func (s *Store) index(ctx context.Context, dir string, head bundleHeader, file *os.File, size int64, strict string) error {
	// Git 2.39 does not check the objects of a bundle that it fetches from,
	// whatever fetch.fsckObjects says, and puts them into the repository
	// before it looks whether any are missing. So the pack is taken out of the
	// bundle and indexed as a server does with what is pushed to it.
	if _, err := file.Seek(head.size, io.SeekStart); err != nil {
		return diskFault(err)
	}
	sep := "="
	if strings.Contains(strict, "=") {
		sep = ","
	}
	for _, id := range tolerated() {
		strict += sep + strings.ToLower(id) + "=ignore"
		sep = ","
	}
	_, err := s.run(ctx, call{gitDir: dir, bounded: true, stdin: file, args: []string{"index-pack", "--stdin", "--fix-thin", strict, "--threads=1",
		"--max-input-size=" + strconv.FormatInt(size, 10)}})
	if gitFailed(err) {
		return refused(err)
	}
	return err
}

// whole checks that tip is a commit of which nothing is missing, but for what
// comes with not, and that its tree can be listed.
func (s *Store) whole(ctx context.Context, dir, tip string, not ...string) error {
	git := func(args ...string) (string, error) {
		out, err := s.run(ctx, call{gitDir: dir, bounded: true, args: args})
		if gitFailed(err) {
			err = refused(err)
		}
		return strings.TrimSpace(string(out)), err
	}
	kind, err := git("cat-file", "-t", tip)
	if err != nil {
		return err
	}
	if kind != "commit" {
		return refused(errors.New("the ref of the bundle names a " + kind))
	}
	if _, err = git(append([]string{"rev-list", "--objects", "--quiet", tip}, not...)...); err != nil {
		return err
	}
	// A tree can hold itself many times over, level by level. Git lists it
	// without holding it in memory, but compares two only with both in it.
	files := &counter{left: maxTree}
	_, err = s.run(ctx, call{gitDir: dir, bounded: true, stdout: files, args: []string{"ls-tree", "-r", "-z", "--name-only", tip}})
	if files.left < 0 {
		return refused(fmt.Errorf("its tree has more than %d files", maxTree))
	}
	if gitFailed(err) {
		return refused(err)
	}
	return err
}

// maxTree bounds the files in a fork's tree.
const maxTree = 2_000_000

// counter counts names that end with NUL, and fails when there are too many.
type counter struct{ left int }

func (c *counter) Write(p []byte) (int, error) {
	if c.left -= bytes.Count(p, []byte{0}); c.left < 0 {
		return 0, errors.New("too many")
	}
	return len(p), nil
}

// spool writes data to a file without a name, to be read by a child.
func (s *Store) spool(dir string, data []byte) (*os.File, error) {
	f, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, diskFault(err)
	}
	defer os.Remove(f.Name())
	if _, err = f.Write(data); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		_ = f.Close()
		return nil, diskFault(err)
	}
	return f, nil
}
