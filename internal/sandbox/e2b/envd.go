package e2b

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The users of a sandbox of E2B.
const (
	userAgentOf = "user" // every template has it; the agent's
	userRoot    = "root"
)

// basic says who asks.
var basic = map[string][]string{
	userAgentOf: {"Basic " + base64.StdEncoding.EncodeToString([]byte(userAgentOf+":"))},
	userRoot:    {"Basic " + base64.StdEncoding.EncodeToString([]byte(userRoot+":"))},
}

// envd speaks to the agent process in one sandbox.
type envd struct {
	c       *client
	id      string
	base    string // URL
	token   string
	version string
}

func (c *client) envd(m machine) *envd {
	return &envd{c: c, id: m.ID, base: c.settings.sandbox(m.ID, m.Domain, envdPort), token: m.Token, version: m.EnvdVersion}
}

// request makes a request that carries who asks and of which sandbox. No
// deadline is ever told to envd: it would be the process's.
func (e *envd) request(ctx context.Context, method, path, user string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, e.base+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("E2b-Sandbox-Id", e.id)
	req.Header.Set("E2b-Sandbox-Port", strconv.Itoa(envdPort))
	req.Header.Set("User-Agent", userAgent)
	req.Header.Set("Accept-Encoding", "identity")
	if user != "" {
		req.Header["Authorization"] = basic[user]
	}
	if e.token != "" {
		req.Header.Set("X-Access-Token", e.token)
	}
	return req, nil
}

// do sends a request. What is no success is an error, but for the statuses
// that are allowed.
func (e *envd) do(req *http.Request, allowed ...int) (*http.Response, error) {
	resp, err := e.c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	for _, s := range allowed {
		if resp.StatusCode == s {
			return resp, nil
		}
	}
	defer drain(resp.Body)
	return nil, readError(resp, e.c.settings.Key, e.token)
}

func (e *envd) health(ctx context.Context) error {
	req, err := e.request(ctx, http.MethodGet, "/health", "", nil)
	if err != nil {
		return err
	}
	resp, err := e.do(req) //nolint:bodyclose // drain closes it
	if err != nil {
		return err
	}
	drain(resp.Body)
	return nil
}

// command is what a process is started with.
type command struct {
	Cmd  string            `json:"cmd"`
	Args []string          `json:"args,omitempty"`
	Envs map[string]string `json:"envs,omitempty"`
	Cwd  string            `json:"cwd,omitempty"`
}

type terminalSize struct {
	Size struct {
		Cols uint16 `json:"cols"`
		Rows uint16 `json:"rows"`
	} `json:"size"`
}

type startRequest struct {
	Process command       `json:"process"`
	PTY     *terminalSize `json:"pty,omitempty"`
	Stdin   bool          `json:"stdin"`
}

// event is what a stream says of a process; one of the four.
type event struct {
	Event struct {
		Start *struct {
			PID int `json:"pid"`
		} `json:"start"`
		Data *struct {
			Stdout []byte `json:"stdout"`
			Stderr []byte `json:"stderr"`
			PTY    []byte `json:"pty"`
		} `json:"data"`
		End *struct {
			ExitCode int    `json:"exitCode"`
			Exited   bool   `json:"exited"`
			Status   string `json:"status"`
		} `json:"end"`
		Keepalive *struct{} `json:"keepalive"`
	} `json:"event"`
}

// A stream is what envd says of a process that it started. It is cut when
// nothing has come for long, not even a sign of life: a connection that hangs
// says nothing either.
type stream struct {
	body   io.ReadCloser
	cancel context.CancelCauseFunc
	ctx    context.Context
	dog    *time.Timer
	idle   time.Duration
}

var errSilent = errors.New("the sandbox has been silent for too long")

// watchdog says how often signs of life are asked for, and how long there may
// be none. Load balancers cut what is silent for ten minutes.
type watchdog struct{ ping, idle time.Duration }

// open starts a process and returns what is said of it. When ctx ends the
// stream does, and the process goes on.
func (e *envd) open(ctx context.Context, user string, in startRequest, w watchdog) (*stream, error) {
	// The one message is sent as a whole, with its length: proxies break
	// streams whose request has none.
	b, err := frame(in)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	s := &stream{cancel: cancel, ctx: ctx, idle: w.idle, dog: time.AfterFunc(w.idle, func() { cancel(errSilent) })}
	req, err := e.request(ctx, http.MethodPost, "/process.Process/Start", user, bytes.NewReader(b))
	if err == nil {
		req.Header.Set("Content-Type", "application/connect+json")
		req.Header.Set("Connect-Protocol-Version", "1")
		req.Header.Set("Keepalive-Ping-Interval", strconv.Itoa(max(seconds(w.ping), 1)))
		var resp *http.Response
		if resp, err = e.do(req); err == nil { //nolint:bodyclose // the stream closes it
			s.body = resp.Body
			return s, nil
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	s.close()
	return nil, err
}

// next returns the next event that is no sign of life; io.EOF after the last.
func (s *stream) next() (event, error) {
	for {
		var ev event
		if err := readFrame(s.body, &ev); err != nil {
			if cause := context.Cause(s.ctx); cause != nil {
				err = cause
			}
			if err == io.EOF { //nolint:errorlint // the end of the stream, and of nothing in it
				s.finish()
			}
			return ev, err
		}
		s.dog.Reset(s.idle)
		if ev.Event.Keepalive == nil {
			return ev, nil
		}
	}
}

// finish reads the end of the answer, which comes behind that of the stream,
// so that the connection can be used again.
func (s *stream) finish() {
	s.dog.Reset(time.Second) // who does not end it loses the connection
	_, _ = io.CopyN(io.Discard, s.body, 1)
}

func (s *stream) close() {
	s.dog.Stop()
	s.cancel(context.Canceled)
	if s.body != nil {
		_ = s.body.Close()
	}
}

// result is how a short command ended.
type result struct {
	code           int
	stdout, stderr []byte
}

// maxSaid bounds what is kept of a short command's outputs.
const maxSaid = 4 << 20

// run runs a short command to its end.
func (e *envd) run(ctx context.Context, user string, cmd command, w watchdog) (result, error) {
	var r result
	s, err := e.open(ctx, user, startRequest{Process: cmd}, w)
	if err != nil {
		return r, err
	}
	defer s.close()
	ended := false
	for {
		ev, err := s.next()
		switch {
		case errors.Is(err, io.EOF) && ended:
			return r, nil
		case errors.Is(err, io.EOF):
			return r, io.ErrUnexpectedEOF
		case err != nil:
			return r, err
		}
		if d := ev.Event.Data; d != nil {
			r.stdout = append(r.stdout, d.Stdout[:min(len(d.Stdout), maxSaid-len(r.stdout))]...)
			r.stderr = append(r.stderr, d.Stderr[:min(len(d.Stderr), maxSaid-len(r.stderr))]...)
		}
		if end := ev.Event.End; end != nil {
			r.code, ended = end.ExitCode, true
			if !end.Exited && r.code <= 0 {
				r.code = -1 // a signal
			}
		}
	}
}

func filesPath(path, user string) string {
	return "/files?" + url.Values{"path": {path}, "username": {user}}.Encode()
}

// errNoRange is returned when the file is sent from its beginning whatever
// part was asked for.
var errNoRange = errors.New("the service does not know ranges")

// readAt reads a part of a file, as io.ReaderAt does.
func (e *envd) readAt(ctx context.Context, path string, p []byte, offset int64) (int, error) {
	req, err := e.request(ctx, http.MethodGet, filesPath(path, userAgentOf), userAgentOf, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+int64(len(p))-1))
	resp, err := e.do(req, http.StatusRequestedRangeNotSatisfiable)
	if err != nil {
		return 0, err
	}
	defer drain(resp.Body)
	switch resp.StatusCode {
	case http.StatusRequestedRangeNotSatisfiable:
		return 0, io.EOF
	case http.StatusPartialContent:
	default:
		// An empty file is answered so too.
		if offset > 0 && resp.ContentLength != 0 {
			_ = resp.Body.Close()
			return 0, errNoRange
		}
	}
	n, err := io.ReadFull(resp.Body, p)
	if errors.Is(err, io.ErrUnexpectedEOF) && n == 0 {
		err = io.EOF
	}
	if errors.Is(err, io.ErrUnexpectedEOF) && (resp.ContentLength < 0 || int64(n) == resp.ContentLength) {
		err = io.EOF // all that is there, and not a connection that broke
	}
	return n, err
}

// download returns a file.
func (e *envd) download(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := e.request(ctx, http.MethodGet, filesPath(path, userAgentOf), userAgentOf, nil)
	if err != nil {
		return nil, err
	}
	resp, err := e.do(req)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// upload writes a file in place: who breaks off leaves half of it.
func (e *envd) upload(ctx context.Context, path string, r io.Reader) error {
	kind, body := "application/octet-stream", r
	if e.version != "" && older(e.version, 0, 5, 7) {
		pr, pw := io.Pipe()
		form := multipart.NewWriter(pw)
		go func() {
			part, err := form.CreateFormFile("file", "file")
			if err == nil {
				_, err = io.Copy(part, r)
			}
			if err == nil {
				err = form.Close()
			}
			pw.CloseWithError(err)
		}()
		defer pr.Close()
		kind, body = form.FormDataContentType(), pr
	}
	req, err := e.request(ctx, http.MethodPost, filesPath(path, userAgentOf), userAgentOf, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	resp, err := e.do(req) //nolint:bodyclose // drain closes it
	if err != nil {
		return err
	}
	drain(resp.Body)
	return nil
}

// older reports whether a version is below another. One that cannot be read
// is taken for a new one.
func older(version string, want ...int) bool {
	for i, part := range strings.SplitN(version, ".", len(want)) {
		n, err := strconv.Atoi(part)
		if err != nil || n != want[i] {
			return err == nil && n < want[i]
		}
	}
	return false
}
