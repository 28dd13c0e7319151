// Package artifact keeps what is too big for workflow history: prompts,
// bundles and the transcripts of agents.
//
// It stands on gocloud.dev/blob, and uses only what every blob store can do:
// whole objects that appear at once, are read by range, listed by prefix and
// deleted. A store is a folder, or a bucket of a server that speaks S3.
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
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"gocloud.dev/blob"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Store is an open store. Its methods may be called at the same time, also
// by several processes on one store.
type Store struct {
	bucket *blob.Bucket
	dir    string // of a folder; empty: the store is on a server

	drop func(ctx context.Context, key string) error // removes an object; one that is not there may be an error
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

// Open opens the store at where: a folder, as a path or as
// "file:///var/lib/x", which is made, with mode 0700, when it is not there; or
// "s3://bucket/folder", see openS3. Nothing is asked of a server yet. Other
// kinds of URL are Unsupported.
func Open(ctx context.Context, where string, options ...Option) (*Store, error) {
	const op = "artifact: open"
	var o settings
	for _, option := range options {
		option(&o)
	}
	scheme, _, isURL := strings.Cut(where, "://")
	if !isURL {
		s, err := openFolder(where)
		return s, fault.Wrap(op, err)
	}
	u, err := url.Parse(where)
	if err != nil || u.User != nil {
		return nil, fault.New(op, fault.Invalid, "the store's URL cannot be read, or holds a key").
			Hinted("Write it as s3://bucket/folder or file:///path, without keys: those come from the environment.")
	}
	var s *Store
	switch scheme {
	case "file":
		if u.Host != "" && u.Host != "localhost" || u.RawQuery != "" || u.Fragment != "" {
			return nil, fault.New(op, fault.Invalid, "%q names no folder", where).Hinted("Write it as file:///path.")
		}
		s, err = openFolder(u.Path)
	case "s3":
		s, err = openS3(ctx, u, o)
	case "gs":
		return nil, fault.New(op, fault.Unsupported, "the protocol of gs:// is not built in").
			Hinted("Google's stores speak S3 too: make an HMAC key and use s3://%s?endpoint=https://storage.googleapis.com.", u.Host)
	case "azblob":
		return nil, fault.New(op, fault.Unsupported, "the protocol of azblob:// is not built in").
			Hinted("Use a store that speaks S3, as s3://bucket?endpoint=https://…, or a folder that all workers mount.")
	default:
		return nil, fault.New(op, fault.Unsupported, "no store of the kind %q is built in", scheme).
			Hinted("Use s3://bucket/folder, or a folder: file:///path, or just /path.")
	}
	return s, fault.Wrap(op, err)
}

// An Option says how a store is opened.
type Option func(*settings)

type settings struct {
	keys  func() Keys
	pause func(attempt int) time.Duration // before a request is tried again; nil: as the SDK has it
}

// Keys open a store on a server. They are secrets.
type Keys struct{ ID, Secret, Session string }

// WithKeys has the store ask for its keys whenever it needs them. Those
// without an ID, like no function at all, mean the usual places: the
// environment, the files of the AWS CLI, the host's own role.
func WithKeys(keys func() Keys) Option { return func(o *settings) { o.keys = keys } }

// WithPause says how long to wait before a request to a server is tried again:
// nobody waits at a terminal for the usual pauses, which grow to many seconds.
func WithPause(pause func(attempt int) time.Duration) Option {
	return func(o *settings) { o.pause = pause }
}

// Close closes the store. Readers that are open may fail then.
func (s *Store) Close() error {
	return fault.Wrap("artifact: close", s.bucket.Close())
}

// Put stores all of r under key, or, when it fails, nothing. What was there
// before is replaced. In a folder, the bytes are on the disk when it returns.
func (s *Store) Put(ctx context.Context, key string, r io.Reader) error {
	const op = "artifact: put"
	if err := checkKey(key); err != nil {
		return fault.Wrap(op, err)
	}
	return fault.Wrap(op, s.write(ctx, key, r, true))
}

// write stores an object; sync makes it outlive a loss of power of the host
// that has the folder.
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
		return classed(cmp.Or(why, err))
	}
	if err := w.Close(); err != nil {
		return classed(cmp.Or(ctx.Err(), err))
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
	return reader{r}, nil
}

// reader gives what goes wrong on the way its kind.
type reader struct{ io.ReadCloser }

func (r reader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fault.Wrap("artifact: read", classed(err))
	}
	return n, err
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
	if missing(err) {
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
		case missing(err):
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
				if s.dir != "" && missing(err) && try < 1000 {
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
	if err := s.remove(ctx, keys...); err != nil {
		return fault.Wrap(op, err)
	}
	if s.dir != "" {
		prune(filepath.Join(s.dir, filepath.FromSlash(prefix)))
		prune(filepath.Join(s.dir, filepath.FromSlash(prefix+chunks)))
	}
	return nil
}

// atOnce is how many objects are read ahead, or removed, at once: a server
// takes its time for each.
const atOnce = 16

// remove removes objects, and ends at the first that it cannot remove.
func (s *Store) remove(ctx context.Context, keys ...string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i := range min(atOnce, len(keys)) {
		wg.Go(func() {
			for ; i < len(keys) && ctx.Err() == nil; i += atOnce {
				if err := s.drop(ctx, keys[i]); err != nil && !missing(err) {
					cancel(classed(err))
				}
			}
		})
	}
	wg.Wait()
	if why := context.Cause(ctx); why != nil {
		return classed(why)
	}
	return nil
}

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

// same reports whether r holds exactly p.
func same(r io.Reader, p []byte) (bool, error) {
	got, err := io.ReadAll(io.LimitReader(r, int64(len(p))+1))
	return bytes.Equal(got, p), err
}
