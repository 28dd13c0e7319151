package e2btest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// An rpcError is an error of the Connect protocol.
type rpcError struct {
	Code    string `json:"code"`
	Message string `json:"message,omitempty"`
}

func (e *rpcError) Error() string { return e.Code + ": " + e.Message }

func rpcErrorf(code, format string, args ...any) *rpcError {
	return &rpcError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// rpcStatus are the HTTP statuses of the codes.
var rpcStatus = map[string]int{
	"canceled": 499, "unknown": 500, "invalid_argument": 400, "deadline_exceeded": 504, "not_found": 404, "already_exists": 409,
	"permission_denied": 403, "resource_exhausted": 429, "failed_precondition": 400, "aborted": 409, "out_of_range": 400,
	"unimplemented": 501, "internal": 500, "unavailable": 503, "data_loss": 500, "unauthenticated": 401,
}

// asRPC makes an error of the protocol of any other.
func asRPC(err error) *rpcError {
	var e *rpcError
	if errors.As(err, &e) {
		return e
	}
	return rpcErrorf("internal", "%v", err)
}

// maxMessage bounds a message.
const maxMessage = 64 << 20

// unary answers a call that has one message each way.
func unary[In any](w http.ResponseWriter, r *http.Request, f func(in In) (any, error)) {
	if !speaks(w, r, "application/json") {
		return
	}
	var in In
	b, err := io.ReadAll(io.LimitReader(r.Body, maxMessage))
	if err == nil {
		err = json.Unmarshal(b, &in)
	}
	if err != nil {
		unaryError(w, rpcErrorf("invalid_argument", "unmarshal message: %v", err))
		return
	}
	out, err := f(in)
	if err != nil {
		unaryError(w, asRPC(err))
		return
	}
	if out == nil {
		out = struct{}{}
	}
	b, err = json.Marshal(out)
	if err != nil {
		unaryError(w, asRPC(err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

func unaryError(w http.ResponseWriter, e *rpcError) {
	b, _ := json.Marshal(e) // two strings
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(rpcStatus[e.Code])
	_, _ = w.Write(b)
}

// speaks refuses calls in another encoding than JSON.
func speaks(w http.ResponseWriter, r *http.Request, kind string) bool {
	got, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch {
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		w.WriteHeader(http.StatusMethodNotAllowed)
	case strings.TrimSpace(got) != kind:
		w.Header().Set("Accept-Post", kind)
		w.WriteHeader(http.StatusUnsupportedMediaType)
	default:
		return true
	}
	return false
}

const streamType = "application/connect+json"

// readFrame reads one message of a stream.
func readFrame(r io.Reader, into any) (end bool, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return false, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	switch {
	case n > maxMessage:
		return false, fmt.Errorf("a message of %d bytes is too large", n)
	case head[0]&1 != 0:
		return false, fmt.Errorf("compressed messages are not understood")
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return false, err
	}
	if head[0]&2 != 0 {
		return true, nil
	}
	return false, json.Unmarshal(b, into)
}

// A stream is an answer of many messages.
type stream struct {
	w    http.ResponseWriter
	rc   *http.ResponseController
	ping time.Duration // between signs of life
}

// openStream reads the one message of a call and begins to answer it.
func openStream(w http.ResponseWriter, r *http.Request, in any) (*stream, bool) {
	if !speaks(w, r, streamType) {
		return nil, false
	}
	s := &stream{w: w, rc: http.NewResponseController(w), ping: 90 * time.Second}
	if n, err := strconv.Atoi(r.Header.Get("Keepalive-Ping-Interval")); err == nil && n > 0 {
		s.ping = time.Duration(n) * time.Second
	}
	w.Header().Set("Content-Type", streamType)
	_, err := readFrame(r.Body, in)
	if err == nil {
		// The caller's leaving is seen only when nothing more is to be read.
		_, err = io.Copy(io.Discard, io.LimitReader(r.Body, maxMessage))
	}
	if err != nil {
		s.end(rpcErrorf("invalid_argument", "protocol error: %v", err))
		return nil, false
	}
	return s, true
}

// send writes a message out at once.
func (s *stream) send(message any) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	return s.frame(0, b)
}

func (s *stream) frame(flags byte, b []byte) error {
	frame := make([]byte, 5, 5+len(b))
	frame[0] = flags
	binary.BigEndian.PutUint32(frame[1:], uint32(len(b)))
	if _, err := s.w.Write(append(frame, b...)); err != nil {
		return err
	}
	return s.rc.Flush()
}

// end writes the last frame. That it cannot be written means that nobody
// reads it.
func (s *stream) end(e *rpcError) {
	b := []byte("{}")
	if e != nil {
		b, _ = json.Marshal(map[string]any{"error": e})
	}
	_ = s.frame(2, b)
}

// callTimeout is the age at which the caller wants a call to be over; 0: it
// does not.
func callTimeout(r *http.Request) time.Duration {
	n, err := strconv.ParseInt(r.Header.Get("Connect-Timeout-Ms"), 10, 64)
	if err != nil || n <= 0 {
		return 0
	}
	return time.Duration(n) * time.Millisecond
}
