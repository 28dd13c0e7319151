package e2b

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
)

// The Connect protocol with its JSON codec: a stream is frames of one byte of
// flags, four of length, and a message.

const (
	flagCompressed = 1
	flagEnd        = 2

	// maxFrame bounds one message: envd reads pipes in pieces of 32 KiB.
	maxFrame = 4 << 20
)

// frame puts a message into a frame.
func frame(message any) ([]byte, error) {
	b, err := json.Marshal(message)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 5, 5+len(b))
	binary.BigEndian.PutUint32(out[1:], uint32(len(b))) //nolint:gosec // a command line is shorter
	return append(out, b...), nil
}

// readFrame reads the next message of a stream into out, and returns io.EOF
// after the last, or the error that the stream ended with. A stream that
// breaks off is io.ErrUnexpectedEOF.
func readFrame(r io.Reader, out any) error {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	size := binary.BigEndian.Uint32(head[1:])
	switch {
	case head[0]&flagCompressed != 0:
		return unexpected("a compressed frame")
	case size > maxFrame:
		return unexpected("a frame of %d bytes", size)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(size))) // grows with what comes, not with what is claimed
	if err != nil {
		return err
	}
	if len(b) < int(size) {
		return io.ErrUnexpectedEOF
	}
	if head[0]&flagEnd == 0 {
		if err := json.Unmarshal(b, out); err != nil {
			return unexpected("%w", err)
		}
		return nil
	}
	var end struct {
		Error *struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	if err := json.Unmarshal(b, &end); err != nil {
		return unexpected("%w", err)
	}
	if end.Error == nil {
		return io.EOF
	}
	return &StatusError{Status: connectStatus[end.Error.Code], Code: clean(end.Error.Code, 64, nil), Message: clean(end.Error.Message, maxErrorText, nil)}
}

// connectStatus are the statuses that unary calls have for the codes of the
// protocol. What is not among them is 0, and taken for passing trouble.
var connectStatus = map[string]int{
	"invalid_argument": 400, "failed_precondition": 400, "out_of_range": 400, "unauthenticated": 401, "permission_denied": 403,
	"not_found": 404, "already_exists": 409, "aborted": 409, "resource_exhausted": 429, "unimplemented": 501,
	"unavailable": 503, "internal": 500, "unknown": 500, "data_loss": 500, "deadline_exceeded": 504, "canceled": 499,
}
