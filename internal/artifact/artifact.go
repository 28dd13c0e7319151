// Package artifact keeps what is too big for workflow history: prompts,
// bundles and the transcripts of agents.
//
// It stands on gocloud.dev/blob, and uses only what every blob store can do:
// whole objects that appear at once, are read by range, listed by prefix and
// deleted. A folder is the one kind of store that is linked in today.
//
// # Logs
//
// A transcript grows, and objects cannot. So a log is a row of chunks, each
// an object of its own that says in its name which bytes it holds:
//
//	runs/r/1/transcript.chunks/<segment>/<offset>-<length>
//
// A segment is 256 KiB of the log and no chunk crosses its edge, so whoever
// follows a log lists only the segment that he has come to. Chunks may overlap
// when two workers wrote for a while: a log is the longest row from byte 0
// without a gap. Seal makes one object of it, under the log's own key.
package artifact

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
	"gocloud.dev/gcerrors"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Store is an open store. Its methods may be called at the same time, also
// by several processes on one store.
type Store struct {
	bucket *blob.Bucket
	dir    string
}

// An Object is one thing in the store.
type Object struct {
	Key     string
	Size    int64     // in bytes; of a log that still grows, up to its last chunk
	ModTime time.Time // when it was last written
}

// RunKey returns the key of something that belongs to a fork, as
// "runs/<run>/<num>/<name>". What belongs to the whole run has the number 0.
func RunKey(run string, num int, name string) string {
	return "runs/" + run + "/" + strconv.Itoa(num) + "/" + name
}

// Open opens the store at a folder, named by its path or by a URL
// ("file:///var/lib/x"), and makes it, with mode 0700, when it is not there.
// Other kinds of URL are Unsupported.
func Open(_ context.Context, where string) (*Store, error) {
	const op = "artifact: open"
	dir := where
	if scheme, _, isURL := strings.Cut(where, "://"); isURL {
		u, err := url.Parse(where)
		switch {
		case scheme != "file":
			return nil, fault.New(op, fault.Unsupported, "no store of the kind %q is built in", scheme).
				Hinted("Use a folder: file:///path, or just /path.")
		case err != nil || u.Host != "" && u.Host != "localhost" || u.RawQuery != "" || u.Fragment != "":
			return nil, fault.New(op, fault.Invalid, "%q names no folder", where).Hinted("Write it as file:///path.")
		}
		dir = u.Path
	}
	if dir == "" {
		return nil, fault.New(op, fault.Invalid, "no folder was named").Hinted("Write it as file:///path, or just /path.")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(op, classed(err))
	}
	bucket, err := fileblob.OpenBucket(dir, &fileblob.Options{
		DirFileMode: 0o700,
		NoTempDir:   true, // a rename works only within one file system
		Metadata:    fileblob.MetadataDontWrite,
	})
	if err != nil {
		return nil, fault.Wrap(op, classed(err))
	}
	sweep(dir)
	return &Store{bucket: bucket, dir: dir}, nil
}

// Close closes the store. Readers that are open may fail then.
func (s *Store) Close() error {
	return fault.Wrap("artifact: close", s.bucket.Close())
}

// Put stores all of r under key, or, when it fails, nothing. What was there
// before is replaced. The bytes are on the disk when it returns.
func (s *Store) Put(ctx context.Context, key string, r io.Reader) error {
	const op = "artifact: put"
	if err := checkKey(key); err != nil {
		return fault.Wrap(op, err)
	}
	return fault.Wrap(op, s.write(ctx, key, r, true))
}

// write stores an object; sync makes it outlive a loss of power.
func (s *Store) write(ctx context.Context, key string, r io.Reader, sync bool) error {
	ctx, cancel := context.WithCancel(ctx) // cancelled before Close: nothing is stored
	defer cancel()
	var file *os.File
	w, err := s.bucket.NewWriter(ctx, key, &blob.WriterOptions{
		ContentType: "application/octet-stream", // else the first bytes are held back to guess it
		BeforeWrite: func(as func(any) bool) error { as(&file); return nil },
	})
	if err != nil {
		return classed(err)
	}
	in := &source{r: r}
	_, err = io.Copy(w, in)
	if err == nil && sync && file != nil {
		err = file.Sync()
	}
	if err != nil {
		why := ctx.Err()
		cancel()
		_ = w.Close()
		if in.err != nil && why == nil {
			return in.err // the caller's own trouble keeps its kind
		}
		return classed(err)
	}
	if err := w.Close(); err != nil {
		return classed(err)
	}
	if sync && file != nil {
		return classed(syncDir(filepath.Dir(file.Name())))
	}
	return nil
}

// source remembers that it was reading that failed, and not writing.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// syncDir puts a rename on the disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Get opens what is stored under key. It is a NotFound when nothing is; a
// log can be had once it is sealed (see ReadLog). An object that is replaced
// meanwhile is read as it was.
func (s *Store) Get(ctx context.Context, key string) (io.ReadCloser, error) {
	const op = "artifact: get"
	if err := checkKey(key); err != nil {
		return nil, fault.Wrap(op, err)
	}
	r, err := s.bucket.NewReader(ctx, key, nil)
	if err != nil {
		return nil, fault.Wrap(op, classed(err))
	}
	return r, nil
}

// PutText stores a text under a key made of its hash, and returns the key.
// The same text has the same key and is stored once.
func (s *Store) PutText(ctx context.Context, text string) (key string, err error) {
	const op = "artifact: put text"
	sum := sha256.Sum256([]byte(text))
	key = "texts/" + hex.EncodeToString(sum[:])
	size, there, err := s.stat(ctx, key)
	if err != nil {
		return "", fault.Wrap(op, err)
	}
	if there && size == int64(len(text)) {
		return key, nil
	}
	return key, fault.Wrap(op, s.write(ctx, key, strings.NewReader(text), true))
}

// Try stores an object, finds, reads and removes it: what a worker has to be
// allowed to do.
func (s *Store) Try(ctx context.Context) error {
	const op, text = "artifact: try", "Of a test that was interrupted: it can be removed.\n"
	key := "tries/" + rand.Text()
	if err := s.write(ctx, key, strings.NewReader(text), true); err != nil {
		return fault.Wrap(op, err)
	}
	err := s.holds(ctx, key, text)
	return fault.Wrap(op, errors.Join(err, s.Delete(ctx, key)))
}

// holds reports, as an error, whether key is not listed or not this text.
func (s *Store) holds(ctx context.Context, key, text string) error {
	listed := false
	for o, err := range s.under(ctx, key) {
		if err != nil {
			return err
		}
		listed = listed || o.Key == key
	}
	r, err := s.bucket.NewReader(ctx, key, nil)
	if err != nil {
		return classed(err)
	}
	defer r.Close()
	switch ok, err := same(r, []byte(text)); {
	case err != nil:
		return classed(err)
	case !ok || !listed:
		return fault.New("", fault.Conflict, "what was stored just now is not there").
			Hinted("Use a store that shows at once what was written to it.")
	}
	return nil
}

// stat returns the size of an object.
func (s *Store) stat(ctx context.Context, key string) (size int64, there bool, err error) {
	a, err := s.bucket.Attributes(ctx, key)
	if gcerrors.Code(err) == gcerrors.NotFound {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, classed(err)
	}
	return a.Size, true, nil
}

// List yields the objects under prefix by key: the one with that very key,
// and what lies in it as in a folder. The empty prefix means all. A log is
// one object, whether it is sealed or not.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	const op = "artifact: list"
	return func(yield func(Object, error) bool) {
		if prefix != "" {
			if err := checkKey(prefix); err != nil {
				yield(Object{}, fault.Wrap(op, err))
				return
			}
		}
		seen := map[string]bool{}
		var open Object // a log whose chunks go by
		flush := func() bool {
			o := open
			open = Object{}
			if o.Key == "" || seen[o.Key] {
				return true
			}
			seen[o.Key] = true
			return yield(o, nil)
		}
		for o, err := range s.objects(ctx, prefix) {
			if err != nil {
				yield(Object{}, fault.Wrap(op, err))
				return
			}
			if log, c, ok := parseChunk(o.Key); ok {
				if open.Key != log && !flush() {
					return
				}
				open.Key, open.Size = log, max(open.Size, c.end())
				if o.ModTime.After(open.ModTime) {
					open.ModTime = o.ModTime
				}
				continue
			}
			if checkKey(o.Key) != nil {
				continue // a file that is being written, or not ours
			}
			if !flush() {
				return
			}
			seen[o.Key] = true
			if !yield(o, nil) {
				return
			}
		}
		flush()
	}
}

// objects yields whatever is stored at and under prefix, chunks and
// unfinished files too.
func (s *Store) objects(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	if prefix == "" {
		return s.under(ctx, "")
	}
	return func(yield func(Object, error) bool) {
		a, err := s.bucket.Attributes(ctx, prefix)
		switch {
		case gcerrors.Code(err) == gcerrors.NotFound:
		case err != nil:
			yield(Object{}, classed(err))
			return
		case !yield(Object{Key: prefix, Size: a.Size, ModTime: a.ModTime}, nil):
			return
		}
		for _, p := range []string{prefix + chunks + "/", prefix + "/"} {
			for o, err := range s.under(ctx, p) {
				if !yield(o, err) || err != nil {
					return
				}
			}
		}
	}
}

// under yields whatever has a key that starts with prefix, by key. An error
// is the last that it yields.
func (s *Store) under(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		last := ""
		for try := 0; ; try++ {
			list := s.bucket.List(&blob.ListOptions{Prefix: prefix})
			for {
				o, err := list.Next(ctx)
				if errors.Is(err, io.EOF) {
					return
				}
				if gcerrors.Code(err) == gcerrors.NotFound && try < 1000 {
					// fileblob fails when a file goes away while it lists, as
					// every unfinished one does: list again from here.
					break
				}
				if err != nil {
					yield(Object{}, classed(err))
					return
				}
				if o.Key <= last {
					continue
				}
				last = o.Key
				if !yield(Object{Key: o.Key, Size: o.Size, ModTime: o.ModTime}, nil) {
					return
				}
			}
		}
	}
}

// Delete removes what List(prefix) yields. The empty prefix is refused.
// Nothing there is no error.
func (s *Store) Delete(ctx context.Context, prefix string) error {
	const op = "artifact: delete"
	if err := checkKey(prefix); err != nil {
		return fault.Wrap(op, err)
	}
	var keys []string
	for o, err := range s.objects(ctx, prefix) {
		if err != nil {
			return fault.Wrap(op, err)
		}
		keys = append(keys, o.Key)
	}
	for _, key := range keys {
		if err := s.remove(ctx, key); err != nil {
			return fault.Wrap(op, err)
		}
	}
	s.prune(prefix)
	s.prune(prefix + chunks)
	return nil
}

func (s *Store) remove(ctx context.Context, key string) error {
	err := s.bucket.Delete(ctx, key)
	if gcerrors.Code(err) == gcerrors.NotFound {
		return nil
	}
	return classed(err)
}

// prune removes the folders that have become empty: fileblob leaves them.
func (s *Store) prune(prefix string) {
	var dirs []string
	_ = filepath.WalkDir(filepath.Join(s.dir, filepath.FromSlash(prefix)), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		_ = os.Remove(dirs[i]) // fails when something lies in it
	}
}

const (
	sweptMark = ".swept"
	sweepAge  = 24 * time.Hour
)

// sweep removes, at most once a day, what processes that were killed while
// they wrote left behind.
func sweep(dir string) {
	mark := filepath.Join(dir, sweptMark)
	if info, err := os.Stat(mark); err == nil && time.Since(info.ModTime()) < sweepAge {
		return
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, unfinished) {
			return nil
		}
		if info, err := d.Info(); err == nil && time.Since(info.ModTime()) > sweepAge {
			_ = os.Remove(path)
		}
		return nil
	})
	if err := os.WriteFile(mark, nil, 0o600); err == nil {
		now := time.Now()
		_ = os.Chtimes(mark, now, now)
	}
}

// unfinished is how fileblob ends the name of a file that it still writes.
const unfinished = ".tmp"

// keyPart is what may stand between the slashes of a key.
var keyPart = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@+=-]{0,199}$`)

// checkKey refuses keys that could leave the store or that collide with
// files of our own.
func checkKey(key string) error {
	bad := fault.New("", fault.Invalid, "%q is no key", key)
	if len(key) > 800 {
		return bad
	}
	for p := range strings.SplitSeq(key, "/") {
		if !keyPart.MatchString(p) || strings.HasSuffix(p, unfinished) || strings.HasSuffix(p, ".attrs") || strings.HasSuffix(p, chunks) {
			return bad
		}
	}
	return nil
}

// classed gives an error of the blob store its kind.
func classed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return &fault.Error{Kind: fault.Cancelled, Err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &fault.Error{Kind: fault.Unavailable, Err: err}
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return &fault.Error{Kind: fault.Full, Err: err, Hint: "Free some space on the disk that holds the artifact store, then try again."}
	case errors.Is(err, syscall.ENOTDIR):
		return &fault.Error{Kind: fault.Invalid, Err: err, Hint: "Set SANDBOX_TEMPORAL_ARTIFACTS to a folder."}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return &fault.Error{Kind: fault.Denied, Err: err, Hint: "Let the worker's user write to the artifact store."}
	}
	switch gcerrors.Code(err) {
	case gcerrors.NotFound:
		return &fault.Error{Kind: fault.NotFound, Err: err}
	case gcerrors.PermissionDenied:
		return &fault.Error{Kind: fault.Denied, Err: err}
	case gcerrors.ResourceExhausted, gcerrors.DeadlineExceeded:
		return &fault.Error{Kind: fault.Unavailable, Err: err}
	}
	return err
}

// same reports whether r holds exactly p.
func same(r io.Reader, p []byte) (bool, error) {
	got, err := io.ReadAll(io.LimitReader(r, int64(len(p))+1))
	return bytes.Equal(got, p), err
}
