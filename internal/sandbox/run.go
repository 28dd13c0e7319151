package sandbox

import (
	"context"
	"errors"
	"io"
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
	if stdout, err = ReadAll(ctx, p, Stdout, limit); err != nil {
		return nil, nil, Exit{}, err
	}
	stderr, err = ReadAll(ctx, p, Stderr, limit)
	return stdout, stderr, exit, err
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
