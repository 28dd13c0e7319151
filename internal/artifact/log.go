package artifact

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const (
	chunks  = ".chunks"
	segment = 256 << 10 // bytes of a log whose chunks lie together
)

// A chunk is a part of a log.
type chunk struct{ offset, length int64 }

func (c chunk) end() int64 { return c.offset + c.length }

func segmentPrefix(log string, n int64) string { return fmt.Sprintf("%s%s/%08x/", log, chunks, n) }

func (c chunk) key(log string) string {
	return segmentPrefix(log, c.offset/segment) + fmt.Sprintf("%016d-%06d", c.offset, c.length)
}

// parseChunk is the inverse of chunk.key. It takes no other spelling.
func parseChunk(key string) (log string, c chunk, ok bool) {
	log, rest, found := strings.Cut(key, chunks+"/")
	_, name, _ := strings.Cut(rest, "/")
	a, b, _ := strings.Cut(name, "-")
	offset, err1 := strconv.ParseInt(a, 10, 64)
	length, err2 := strconv.ParseInt(b, 10, 64)
	c = chunk{offset, length}
	ok = found && err1 == nil && err2 == nil && offset >= 0 && length > 0 && length <= segment && c.key(log) == key && checkKey(log) == nil
	return log, c, ok
}

// Append adds p to a log at offset. The same bytes at the same offset again
// change nothing; other ones of the same length are a Conflict. So is
// anything but a repetition when the log is sealed. Readers see bytes once
// all before them are there.
//
// A chunk is in the store when Append returns, but a loss of power may take
// it: ReadLog then ends before it, and whoever writes goes on from there.
func (s *Store) Append(ctx context.Context, key string, offset int64, p []byte) error {
	const op = "artifact: append"
	if err := checkKey(key); err != nil {
		return fault.Wrap(op, err)
	}
	if offset < 0 {
		return fault.New(op, fault.Invalid, "offset %d", offset)
	}
	size, sealed, err := s.stat(ctx, key)
	if err != nil {
		return fault.Wrap(op, err)
	}
	if sealed {
		return fault.Wrap(op, s.repeats(ctx, key, size, offset, p))
	}
	for len(p) > 0 {
		n := min(int64(len(p)), segment-offset%segment)
		if err := s.put(ctx, key, chunk{offset, n}, p[:n]); err != nil {
			return fault.Wrap(op, err)
		}
		offset, p = offset+n, p[n:]
	}
	return nil
}

// repeats reports, as an error, whether p is not what a sealed log holds.
func (s *Store) repeats(ctx context.Context, key string, size, offset int64, p []byte) error {
	conflict := fault.New("", fault.Conflict, "log %s is sealed at %d bytes", key, size)
	if offset+int64(len(p)) > size {
		return conflict
	}
	if len(p) == 0 {
		return nil
	}
	r, err := s.bucket.NewRangeReader(ctx, key, offset, int64(len(p)), nil)
	if err != nil {
		return classed(err)
	}
	defer r.Close()
	if ok, err := same(r, p); err != nil || !ok {
		return errors.Join(classed(err), conflict)
	}
	return nil
}

func (s *Store) put(ctx context.Context, log string, c chunk, p []byte) error {
	r, err := s.bucket.NewReader(ctx, c.key(log), nil)
	switch {
	case missing(err):
		return s.write(ctx, c.key(log), bytes.NewReader(p), false)
	case err != nil:
		return classed(err)
	}
	defer r.Close()
	if r.Size() != c.length { // torn by a loss of power
		return s.write(ctx, c.key(log), bytes.NewReader(p), false)
	}
	ok, err := same(r, p)
	if err == nil && !ok {
		return fault.New("", fault.Conflict, "log %s holds other bytes at %d", log, c.offset)
	}
	return classed(err)
}

// ReadLog opens what a log holds from byte from on, and returns how long the
// log is now. To follow it, call again with from set to that size. A from
// beyond the end gives an empty reader. A log that nobody has written to is a
// NotFound. Sealing a log changes nothing for its readers, also for those
// that are open.
func (s *Store) ReadLog(ctx context.Context, key string, from int64) (r io.ReadCloser, size int64, err error) {
	const op = "artifact: read log"
	if err := checkKey(key); err != nil {
		return nil, 0, fault.Wrap(op, err)
	}
	if from < 0 {
		return nil, 0, fault.New(op, fault.Invalid, "offset %d", from)
	}
	size, sealed, err := s.stat(ctx, key)
	if err != nil {
		return nil, 0, fault.Wrap(op, err)
	}
	var row []chunk
	if !sealed {
		var begun bool
		if row, size, begun, err = s.row(ctx, key, from); err != nil {
			return nil, 0, fault.Wrap(op, err)
		}
		// Chunks go away only after the sealed log is there: if it is there
		// now, they may have gone while they were listed.
		whole, there, err := s.stat(ctx, key)
		if err != nil {
			return nil, 0, fault.Wrap(op, err)
		}
		if there {
			row, size = nil, whole
		} else if !begun {
			return nil, 0, fault.New(op, fault.NotFound, "there is no log %s", key)
		}
	}
	return s.newLogReader(ctx, key, row, from, max(size, from)), size, nil
}

// row returns the chunks that hold a log from byte from to its end, and where
// that is.
func (s *Store) row(ctx context.Context, key string, from int64) (row []chunk, size int64, begun bool, err error) {
	// Everything before the segment of the last byte that the reader has is
	// there, since he has it.
	start := max(from-1, 0) / segment
	for {
		row, size = nil, start*segment
		for n := start; ; n++ {
			part, err := s.list(ctx, key, n)
			if err != nil {
				return nil, 0, false, err
			}
			begun = begun || len(part) > 0
			for _, c := range part {
				if c.offset > size {
					break
				}
				if c.end() > size {
					row, size = append(row, c), c.end()
				}
			}
			if size < (n+1)*segment {
				break
			}
		}
		if size >= from || start == 0 {
			return row, size, begun, nil
		}
		start = 0 // the reader is ahead of the log: count from the beginning
	}
}

// list returns the chunks of a segment by offset.
func (s *Store) list(ctx context.Context, log string, n int64) ([]chunk, error) {
	var out []chunk
	for o, err := range s.under(ctx, segmentPrefix(log, n)) {
		if err != nil {
			return nil, err
		}
		if _, c, ok := parseChunk(o.Key); ok && o.Size == c.length {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b chunk) int {
		return cmp.Or(cmp.Compare(a.offset, b.offset), cmp.Compare(b.length, a.length))
	})
	return out, nil
}

// A logReader reads one chunk after the other, or the sealed log once there
// is one.
type logReader struct {
	ctx      context.Context
	cancel   context.CancelFunc
	s        *Store
	key      string
	row      []chunk
	ahead    []*fetched // the first chunks of row, from a server
	pos, end int64
	part     io.ReadCloser
}

func (s *Store) newLogReader(ctx context.Context, key string, row []chunk, pos, end int64) *logReader {
	r := &logReader{s: s, key: key, row: row, pos: pos, end: end}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// fetched is a chunk that is there, or on its way, before it is its turn: a log
// has thousands, and a server takes its time for each.
type fetched struct {
	done chan struct{}
	text []byte
	err  error
}

// fetch begins to get the next chunks, as many as are got at once.
func (r *logReader) fetch() {
	for _, c := range r.row[len(r.ahead):min(atOnce, len(r.row))] {
		f := &fetched{done: make(chan struct{})}
		r.ahead = append(r.ahead, f)
		go func() {
			defer close(f.done)
			f.text, f.err = r.s.bucket.ReadAll(r.ctx, c.key(r.key))
		}()
	}
}

// chunk opens the first chunk of the row at the next byte.
func (r *logReader) chunk() (io.ReadCloser, error) {
	c := r.row[0]
	if r.s.dir != "" {
		return r.s.bucket.NewRangeReader(r.ctx, c.key(r.key), r.pos-c.offset, -1, nil)
	}
	r.fetch()
	f := r.ahead[0]
	<-f.done
	if f.err != nil {
		return nil, f.err
	}
	return io.NopCloser(bytes.NewReader(f.text[min(r.pos-c.offset, int64(len(f.text))):])), nil
}

func (r *logReader) Read(p []byte) (int, error) {
	for {
		if r.pos >= r.end {
			return 0, io.EOF
		}
		if r.part == nil {
			if err := r.open(); err != nil {
				return 0, fault.Wrap("artifact: read log", err)
			}
		}
		n, err := r.part.Read(p[:min(int64(len(p)), r.end-r.pos)])
		r.pos += int64(n)
		if errors.Is(err, io.EOF) {
			err = r.closePart()
			if err == nil && n == 0 && len(p) > 0 && r.stuck() {
				err = io.ErrUnexpectedEOF
			}
		}
		if n > 0 || err != nil || len(p) == 0 {
			return n, classed(err)
		}
	}
}

// stuck reports whether no chunk that is left holds the next byte.
func (r *logReader) stuck() bool {
	return !slices.ContainsFunc(r.row, func(c chunk) bool { return c.offset <= r.pos && r.pos < c.end() })
}

// open opens whatever holds the next byte.
func (r *logReader) open() error {
	for len(r.row) > 0 && r.row[0].end() <= r.pos {
		r.row, r.ahead = r.row[1:], r.ahead[min(1, len(r.ahead)):]
	}
	if len(r.row) > 0 {
		part, err := r.chunk()
		if err == nil {
			r.part = part
			return nil
		}
		if !missing(err) {
			return classed(err)
		}
		r.row = nil // sealed meanwhile
	}
	part, err := r.s.bucket.NewRangeReader(r.ctx, r.key, r.pos, -1, nil)
	if err != nil {
		return classed(err)
	}
	r.part = part
	return nil
}

// Close closes the reader.
func (r *logReader) Close() error {
	r.cancel()
	for _, f := range r.ahead {
		<-f.done
	}
	r.end = r.pos // nothing more is to be had
	return r.closePart()
}

func (r *logReader) closePart() error {
	if r.part == nil {
		return nil
	}
	err := r.part.Close()
	r.part = nil
	return err
}

// Seal makes one object of a log, which Get can open, and removes its chunks.
// It is called when nobody writes any more; a log without a single byte
// becomes an empty object. A second Seal, also one after a crash in the
// middle of the first, finishes the work. A log with a gap is a Conflict and
// stays as it is.
func (s *Store) Seal(ctx context.Context, key string) error {
	const op = "artifact: seal"
	if err := checkKey(key); err != nil {
		return fault.Wrap(op, err)
	}
	size, sealed, err := s.stat(ctx, key)
	if err != nil {
		return fault.Wrap(op, err)
	}
	var row []chunk
	if !sealed {
		if row, size, _, err = s.row(ctx, key, 0); err != nil {
			return fault.Wrap(op, err)
		}
		// As in ReadLog: what another Seal had removed would not be in this one.
		whole, there, err := s.stat(ctx, key)
		if err != nil {
			return fault.Wrap(op, err)
		}
		if there {
			size, sealed = whole, true
		}
	}
	if !sealed {
		for o, err := range s.under(ctx, key+chunks+"/") {
			if err != nil {
				return fault.Wrap(op, err)
			}
			if _, c, ok := parseChunk(o.Key); ok && o.Size == c.length && c.offset > size {
				return fault.New(op, fault.Conflict, "log %s lacks the bytes from %d to %d", key, size, c.offset)
			}
		}
		r := s.newLogReader(ctx, key, row, 0, size)
		err := s.write(ctx, key, r, true)
		_ = r.Close()
		if err != nil {
			return fault.Wrap(op, err)
		}
	}
	var gone []string
	for o, err := range s.under(ctx, key+chunks+"/") {
		if err != nil {
			return fault.Wrap(op, err)
		}
		// A chunk that came after the row was read holds bytes that the
		// sealed log has not: it is kept for a person to find.
		if _, c, ok := parseChunk(o.Key); !ok || c.end() <= size {
			gone = append(gone, o.Key)
		}
	}
	if err := s.remove(ctx, gone...); err != nil {
		return fault.Wrap(op, err)
	}
	if s.dir != "" {
		prune(filepath.Join(s.dir, filepath.FromSlash(key+chunks)))
	}
	return nil
}

// Sealed reports whether a log is sealed.
func (s *Store) Sealed(ctx context.Context, key string) (bool, error) {
	const op = "artifact: sealed"
	if err := checkKey(key); err != nil {
		return false, fault.Wrap(op, err)
	}
	_, there, err := s.stat(ctx, key)
	return there, fault.Wrap(op, err)
}
