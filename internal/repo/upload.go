package repo

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Uploads is where the shared store keeps repositories that a command carried
// there, because the workers cannot see the folder that they are in.
const Uploads = "sources"

// uploadEnd ends the key of an upload.
const uploadEnd = ".bundle"

// UploadKey returns the key under which the store shall hold b, a bundle of
// its commit and nothing else. It is made of what it holds: the same commit,
// of whichever clone, has the same key. All commits that grew from one first
// commit have one mirror on a worker.
func (s *Store) UploadKey(ctx context.Context, b Base) (string, error) {
	const op = "repo: name upload"
	if err := s.check(ctx); err != nil {
		return "", fault.Wrap(op, err)
	}
	src, err := s.origin(ctx, b)
	if err != nil {
		return "", fault.Wrap(op, err)
	}
	mirror, lk, err := s.hold(ctx, src, b.Commit)
	if err != nil {
		return "", fault.Wrap(op, err)
	}
	defer lk.unlock()
	out, err := s.run(ctx, call{gitDir: mirror, args: []string{"rev-list", "--first-parent", "--max-parents=0", b.Commit}})
	if err != nil {
		return "", fault.Wrap(op, s.suspect(ctx, mirror, err))
	}
	return Uploads + "/" + strings.TrimSpace(string(out)) + "/" + b.Commit + uploadEnd, nil
}

// ParseUpload takes a key of UploadKey's apart. The key comes out of a plan,
// which anybody may have written.
func ParseUpload(key string) (root, commit string, err error) {
	rest, ok1 := strings.CutPrefix(key, Uploads+"/")
	rest, ok2 := strings.CutSuffix(rest, uploadEnd)
	root, commit, ok3 := strings.Cut(rest, "/")
	if !ok1 || !ok2 || !ok3 || checkCommit(root) != nil || checkCommit(commit) != nil || objectFormat(root) != objectFormat(commit) {
		return "", "", fault.New("", fault.Invalid, "%q is not the key of an uploaded repository", cut(key, 200))
	}
	return root, commit, nil
}

// origin understands where a base comes from.
func (s *Store) origin(ctx context.Context, b Base) (location, error) {
	if b.Upload == "" {
		return s.locate(ctx, b.Source)
	}
	root, commit, err := ParseUpload(b.Upload)
	if err != nil {
		return location{}, err
	}
	if b.Commit != "" && b.Commit != commit {
		return location{}, fault.New("", fault.Invalid, "the upload %s does not hold commit %s", b.Upload, b.Commit)
	}
	return location{url: b.Source, scheme: "upload", key: "upload:" + root, upload: b.Upload}, nil
}

// Import brings an upload into the mirror, and names its commit. The branch is
// what it was taken from, for people and for the fork's work tree. A second
// call, or one for another run, reads the store no more.
//
// An upload is a stranger's: one that is damaged, too large, incomplete or
// holds anything but the one commit is Invalid. One that is not there is
// NotFound.
func (s *Store) Import(ctx context.Context, source, upload, branch string) (Base, error) {
	const op = "repo: import"
	if err := s.check(ctx); err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	b := Base{Source: source, Upload: upload, Branch: "HEAD"}
	if branch != "" && branch != "HEAD" {
		name, err := branchName(branch)
		if err != nil {
			return Base{}, fault.Wrap(op, err)
		}
		b.Branch = name
	}
	src, err := s.origin(ctx, b)
	if err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	if _, b.Commit, err = ParseUpload(upload); err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	mirror, lk, err := s.hold(ctx, src, b.Commit)
	if err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	lk.unlock()
	b.Mirror = mirror
	return b, nil
}

// takeUpload brings an upload into the mirror, whose lock the caller holds.
func (s *Store) takeUpload(ctx context.Context, l location, mirror, commit string) error {
	if s.holds(ctx, mirror, commit) {
		return nil // somebody else came first
	}
	if s.uploads == nil {
		return fault.New("", fault.Unsupported, "%s was uploaded, and there is no store to read it from", l.url)
	}
	sc, err := s.scratch(ctx)
	if err != nil {
		return err
	}
	defer sc.close()
	file, size, err := s.download(ctx, l, filepath.Join(sc.dir, "upload.bundle"))
	if err != nil {
		return err
	}
	defer file.Close()
	dir := filepath.Join(sc.dir, "upload.git")
	err = s.unpackUpload(ctx, dir, commit, file, size)
	if fault.KindOf(err) == fault.Invalid {
		return &fault.Error{Kind: fault.Invalid, Err: err, Hint: "What was uploaded of " + l.url + " is not what git made of it. Look whether it is sound, with: git fsck; then start the run again."}
	}
	if err != nil {
		return err
	}
	if err := linkObjects(dir, mirror); err != nil {
		return err
	}
	return s.setRefs(ctx, mirror, "update refs/bases/"+commit+" "+commit)
}

// download copies an upload into a file of ours.
func (s *Store) download(ctx context.Context, l location, to string) (*os.File, int64, error) {
	r, err := s.uploads(ctx, l.upload)
	if fault.KindOf(err) == fault.NotFound {
		return nil, 0, &fault.Error{Kind: fault.NotFound, Err: errors.New("the upload of " + l.url + " is not in the artifact store of this worker"),
			Hint: "The worker must have the same SANDBOX_TEMPORAL_ARTIFACTS as the command that starts the run. If it has, start the run again."}
	}
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	f, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, 0, diskFault(err)
	}
	n, err := io.Copy(f, io.LimitReader(r, s.maxBundle+1))
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	switch {
	case err != nil && ctx.Err() != nil:
		err = contextFault(ctx)
	case err != nil:
		err = diskFault(err)
	case n > s.maxBundle:
		err = s.tooLarge(l.url)
	}
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, n, nil
}

// tooLarge is the error of a repository that is not uploaded, or not taken.
func (s *Store) tooLarge(source string) error {
	return fault.New("", fault.Invalid, "the history of %s has more than %d bytes, too many to upload", source, s.maxBundle).
		Hinted("Push it to a server that the workers can reach, and name its URL instead of the path.")
}

// unpackUpload unpacks an upload into a repository of its own at dir. It must
// be complete in itself.
func (s *Store) unpackUpload(ctx context.Context, dir, commit string, file *os.File, size int64) error {
	head, err := readHeader(file)
	if err != nil {
		return refused(err)
	}
	var tip string
	for _, id := range head.refs {
		tip = id
	}
	switch {
	case len(head.refs) != 1 || tip != commit:
		return refused(errors.New("the bundle holds something else than commit " + commit))
	case len(head.requires) > 0:
		return refused(errors.New("the bundle builds on something that is not in it"))
	case head.format != objectFormat(commit):
		return refused(errors.New("the bundle is made with another hash than its commit"))
	}
	if err := s.initBare(ctx, dir, commit); err != nil {
		return err
	}
	// As strict as a fetch is, and no more: a history of many years is what it is.
	if err := s.index(ctx, dir, head, file, size, "--strict"); err != nil {
		return err
	}
	return s.whole(ctx, dir, commit)
}

// Carry writes the bundle that UploadKey names. It is Invalid when the history
// is larger than a worker would take.
func (s *Store) Carry(ctx context.Context, b Base, w io.Writer) error {
	c := &carrier{w: w, left: s.maxBundle}
	b.Branch = "" // the key says nothing of branches, so the bundle does not
	err := s.Bundle(ctx, b, c)
	if c.left < 0 {
		return fault.Wrap("repo: bundle", s.tooLarge(b.Source))
	}
	return err
}

// carrier passes on as many bytes as may be uploaded.
type carrier struct {
	w    io.Writer
	left int64
}

func (c *carrier) Write(p []byte) (int, error) {
	if c.left -= int64(len(p)); c.left < 0 {
		return 0, errors.New("too large")
	}
	return c.w.Write(p)
}
