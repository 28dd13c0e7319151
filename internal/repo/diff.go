package repo

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// DiffOptions say how a diff is shown.
type DiffOptions struct {
	Stat   bool // files and line counts instead of the changes
	Color  bool // as git colours for a terminal
	Binary bool // changes of binary files too, so that git-apply(1) can make them
}

// Diff writes what a fork changed since its base, as git-diff(1) does. The
// contents are the fork's: they may hold anything, escape sequences of a
// terminal too. It is a NotFound when there is no such branch.
func (s *Store) Diff(ctx context.Context, run string, num int, w io.Writer, o DiffOptions) error {
	const op = "repo: diff"
	dir, base, tip, err := s.find(ctx, run, num)
	if err != nil {
		return fault.Wrap(op, err)
	}
	args := diffArgs()
	if o.Stat {
		args = append(args, "--stat")
	} else {
		args = append(args, "--patch")
	}
	if o.Binary {
		args = append(args, "--binary", "--full-index")
	}
	if o.Color {
		args = append(args, "--color=always")
	}
	out := &told{w: w}
	_, err = s.run(ctx, call{gitDir: dir, bounded: true, stdout: out, args: append(args, base, tip, "--")})
	if out.err != nil {
		err = diskFault(out.err)
	}
	return fault.Wrap(op, err)
}

// diffArgs are the same wherever two commits are compared, so that numbers
// and patches agree.
func diffArgs() []string {
	return []string{"diff", "--no-ext-diff", "--no-textconv", "--no-color", "--find-renames", "--submodule=short",
		"--src-prefix=a/", "--dst-prefix=b/"}
}

// A change is one file in a diff. Lines are 0 for binary files.
type change struct {
	path, old         string // old is empty unless the file was renamed
	inserted, deleted int
}

// touches returns the files that making the change touches.
func (c change) touches() []string {
	if c.old == "" {
		return []string{c.path}
	}
	return []string{c.path, c.old}
}

// changes calls each for every file that differs between two commits.
func (s *Store) changes(ctx context.Context, in call, from, to string, each func(change)) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		err := readNumstat(r, each)
		_ = r.Close() // git stops when nobody reads
		done <- err
	}()
	in.bounded, in.stdout = true, w
	in.args = append(diffArgs(), "--numstat", "-z", from, to, "--")
	_, err = s.run(ctx, in)
	_ = w.Close()
	if read := <-done; read != nil {
		return refused(read)
	}
	if gitFailed(err) {
		return refused(err)
	}
	return err
}

// count sums the changes up.
func (s *Store) count(ctx context.Context, dir, base, tip string) (files, inserted, deleted int, err error) {
	err = s.changes(ctx, call{gitDir: dir}, base, tip, func(c change) {
		files++
		inserted += c.inserted
		deleted += c.deleted
	})
	return files, inserted, deleted, err
}

const (
	maxFiles = 1_000_000 // that one fork may change
	maxPath  = 64 << 10
)

// readNumstat reads the output of git diff --numstat -z.
func readNumstat(r io.Reader, each func(change)) error {
	in := bufio.NewReader(r)
	field := func(end byte) (string, error) {
		var b strings.Builder
		for {
			c, err := in.ReadByte()
			if err != nil {
				return b.String(), err
			}
			if c == end {
				return b.String(), nil
			}
			if b.Len() == maxPath {
				return "", errors.New("the name of a file is too long")
			}
			b.WriteByte(c)
		}
	}
	for n := 0; ; n++ {
		ins, err := field('\t')
		if errors.Is(err, io.EOF) && ins == "" {
			return nil
		}
		if err != nil {
			return err
		}
		if n == maxFiles {
			return errors.New("more than " + strconv.Itoa(maxFiles) + " files were changed")
		}
		del, err := field('\t')
		if err != nil {
			return err
		}
		old := ""
		path, err := field(0)
		if err == nil && path == "" { // a rename: the old name, then the new one
			if old, err = field(0); err == nil {
				path, err = field(0)
			}
		}
		if err != nil {
			return err
		}
		c := change{path: path, old: old}
		if ins != "-" {
			if c.inserted, err = strconv.Atoi(ins); err != nil {
				return err
			}
			if c.deleted, err = strconv.Atoi(del); err != nil {
				return err
			}
		}
		each(c)
	}
}
