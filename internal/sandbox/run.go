package sandbox

import (
	"context"
	"errors"
	"io"
	"sync"
)

// Output runs cmd under id to its end and returns how it ended and at most
// limit bytes of each of its outputs. A second call with the same id returns
// the same again without running anything.
func Output(ctx context.Context, sb Sandbox, id string, cmd Cmd, limit int) (stdout, stderr []byte, exit Exit, err error) {
	p, err := sb.Start(ctx, id, cmd)
	if err != nil {
		return nil, nil, Exit{}, err
	}
	if exit, err = p.Wait(ctx); err != nil {
		return nil, nil, Exit{}, err
	}
	// Far away each is a request, and neither needs to wait for the other.
	var wg sync.WaitGroup
	var errOut, errErr error
	wg.Go(func() { stderr, errErr = ReadAll(ctx, p, Stderr, limit) })
	stdout, errOut = ReadAll(ctx, p, Stdout, limit)
	wg.Wait()
	if err := errors.Join(errOut, errErr); err != nil {
		return nil, nil, Exit{}, err
	}
	return stdout, stderr, exit, nil
}

// ReadAll reads what is there of a stream, at most limit bytes.
func ReadAll(ctx context.Context, p Process, stream Stream, limit int) ([]byte, error) {
	buf := make([]byte, 0, min(limit, 64<<10))
	for len(buf) < limit {
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, min(len(buf), limit-len(buf)))...)[:len(buf)]
		}
		n, err := p.ReadAt(ctx, stream, buf[len(buf):min(cap(buf), limit)], int64(len(buf)))
		buf = buf[:len(buf)+n]
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return buf, nil
}

// Tail reads the end of what is there of a stream, at most limit bytes. The
// stream has no length to ask for: its end is looked for.
func Tail(ctx context.Context, p Process, stream Stream, limit int) ([]byte, error) {
	has := func(size int64) (bool, error) {
		if size == 0 {
			return true, nil
		}
		n, err := p.ReadAt(ctx, stream, make([]byte, 1), size-1)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return n == 1, err
	}
	var least, most int64 = 0, int64(max(limit, 1))
	for {
		ok, err := has(most)
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		least, most = most, 2*most
	}
	for least+1 < most {
		middle := least + (most-least)/2
		ok, err := has(middle)
		if err != nil {
			return nil, err
		}
		if ok {
			least = middle
		} else {
			most = middle
		}
	}
	buf := make([]byte, min(int64(limit), least))
	n, err := p.ReadAt(ctx, stream, buf, least-int64(len(buf)))
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf[:n], err
}
