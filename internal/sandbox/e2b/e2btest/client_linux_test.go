package e2btest_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// A client speaks the protocol as little as the tests need.
type client struct {
	t testing.TB
	s *e2btest.Server
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   string
}

func (c client) send(req *http.Request) answer {
	c.t.Helper()
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	return answer{res.StatusCode, res.Header, string(b)}
}

func (c client) request(method, url, body string) *http.Request {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	return req
}

// api calls the control plane.
func (c client) api(method, path, body string) answer {
	c.t.Helper()
	req := c.request(method, c.s.APIURL()+path, body)
	req.Header.Set("X-API-Key", c.s.Key)
	req.Header.Set("Content-Type", "application/json")
	return c.send(req)
}

// must calls the control plane and wants a status.
func (c client) must(want int, method, path, body string) answer {
	c.t.Helper()
	a := c.api(method, path, body)
	if a.status != want {
		c.t.Fatalf("%s %s: status %d, want %d: %s", method, path, a.status, want, a.body)
	}
	return a
}

// box is a sandbox.
type box struct {
	client
	ID    string `json:"sandboxID"`
	Token string `json:"envdAccessToken"`
}

func (c client) box(body string) *box {
	c.t.Helper()
	b := &box{client: c}
	decode(c.t, body, b)
	return b
}

func decode(t testing.TB, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}

func (c client) create(body string) *box {
	c.t.Helper()
	return c.box(c.must(http.StatusCreated, http.MethodPost, "/v2/sandboxes", body).body)
}

const plain = `{"templateID":"base"}`

// path is that of the sandbox in the control plane.
func (b *box) path(rest string) string { return "/sandboxes/" + b.ID + rest }

// data makes a request to the agent process.
func (b *box) data(method, path, body string) *http.Request {
	b.t.Helper()
	req := b.request(method, b.s.SandboxURL()+path, body)
	req.Header.Set("E2b-Sandbox-Id", b.ID)
	req.Header.Set("E2b-Sandbox-Port", "49983")
	req.Header.Set("X-Access-Token", b.Token)
	return req
}

// call makes a call of one message each way.
func (b *box) call(method, body string) answer {
	b.t.Helper()
	req := b.data(http.MethodPost, "/"+method, body)
	req.Header.Set("Content-Type", "application/json")
	return b.send(req)
}

type message struct {
	Event struct {
		Start     *struct{ PID int }
		Data      *struct{ Stdout, Stderr, PTY []byte }
		End       *struct{ ExitCode int }
		Keepalive *struct{}
	}
	Error *struct{ Code, Message string }
}

// stream is a call with many answers.
type stream struct {
	t    testing.TB
	body io.ReadCloser
	stop context.CancelFunc
}

// open makes such a call; its headers come in pairs.
func (b *box) open(method, body string, headers ...string) *stream {
	b.t.Helper()
	var frame bytes.Buffer
	frame.WriteByte(0)
	_ = binary.Write(&frame, binary.BigEndian, uint32(len(body))) // into memory
	frame.WriteString(body)
	req := b.data(http.MethodPost, "/"+method, frame.String())
	req.Header.Set("Content-Type", "application/connect+json")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	ctx, stop := context.WithCancel(b.t.Context())
	res, err := http.DefaultClient.Do(req.WithContext(ctx))
	if err != nil {
		stop()
		b.t.Fatalf("%s: %v", method, err)
	}
	b.t.Cleanup(func() {
		stop()
		_ = res.Body.Close()
	})
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(res.Body)
		b.t.Fatalf("%s: status %d: %s", method, res.StatusCode, text)
	}
	return &stream{b.t, res.Body, stop}
}

// errEnd comes with the frame that ends a stream.
var errEnd = errors.New("the end of the stream")

// next reads a message; errEnd with the last.
func (s *stream) next() (m message, err error) {
	var head [5]byte
	if _, err := io.ReadFull(s.body, head[:]); err != nil {
		return m, fmt.Errorf("the stream is cut: %w", err)
	}
	b := make([]byte, binary.BigEndian.Uint32(head[1:]))
	if _, err := io.ReadFull(s.body, b); err != nil {
		return m, err
	}
	err = json.Unmarshal(b, &m)
	if head[0]&2 != 0 && err == nil {
		err = errEnd
	}
	return m, err
}

// rest reads to the end.
func (s *stream) rest() (stdout, stderr string, code int, last *message, err error) {
	var out, problems strings.Builder
	code = -100
	for {
		m, err := s.next()
		switch {
		case errors.Is(err, errEnd):
			return out.String(), problems.String(), code, &m, nil
		case err != nil:
			return out.String(), problems.String(), code, nil, err
		case m.Event.Data != nil:
			out.Write(m.Event.Data.Stdout)
			problems.Write(m.Event.Data.Stderr)
		case m.Event.End != nil:
			code = m.Event.End.ExitCode
		}
	}
}

// pid reads the first message.
func (s *stream) pid() int {
	s.t.Helper()
	m, err := s.next()
	if err != nil || m.Event.Start == nil {
		s.t.Fatalf("no start: %+v, %v", m, err)
	}
	return m.Event.Start.PID
}

// shell is a request to start a script.
func shell(script string) string {
	b, _ := json.Marshal(map[string]any{"cmd": "/bin/sh", "args": []string{"-c", script}}) // strings
	return `{"process":` + string(b) + `}`
}

func (b *box) start(script string, headers ...string) *stream {
	b.t.Helper()
	return b.open("process.Process/Start", shell(script), headers...)
}

// run runs a script to its end.
func (b *box) run(script string) string {
	b.t.Helper()
	stdout, stderr, code, _, err := b.start(script).rest()
	if err != nil || code != 0 {
		b.t.Fatalf("%s: code %d, %v: %s", script, code, err, stderr)
	}
	return stdout
}

func (b *box) write(path, text string) {
	b.t.Helper()
	req := b.data(http.MethodPost, "/files?path="+path, text)
	req.Header.Set("Content-Type", "application/octet-stream")
	if a := b.send(req); a.status != http.StatusOK {
		b.t.Fatalf("write %s: %d: %s", path, a.status, a.body)
	}
}

// read reads a file, or a part of it.
func (b *box) read(path, part string) answer {
	b.t.Helper()
	req := b.data(http.MethodGet, "/files?path="+path, "")
	if part != "" {
		req.Header.Set("Range", part)
	}
	return b.send(req)
}

// until waits for what comes by itself.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func base64Of(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }
