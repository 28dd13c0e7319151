package e2b

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func FuzzReadFrame(f *testing.F) {
	whole, err := frame(map[string]any{"event": map[string]any{"start": map[string]int{"pid": 3}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte("\x02\x00\x00\x00\x02{}"))
	f.Add([]byte("\x02\x00\x00\x00\x23{\"error\":{\"code\":\"not_found\",\"m\":1}}"))
	f.Add([]byte("\x00\xff\xff\xff\xff"))
	f.Add([]byte("\x01\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for range len(b) + 1 { // each frame is five bytes at least
			var ev event
			if err := readFrame(r, &ev); err != nil {
				return
			}
		}
		t.Error("a stream without an end")
	})
}

func TestAStreamThatBreaksOffIsNotOneThatEnded(t *testing.T) {
	var ev event
	for _, text := range []string{"", "\x00\x00", "\x00\x00\x00\x00\x09{}"} {
		if err := readFrame(strings.NewReader(text), &ev); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := readFrame(strings.NewReader("\x02\x00\x00\x00\x02{}"), &ev); err != io.EOF { //nolint:errorlint // exactly
		t.Errorf("%v", err)
	}
}

func TestAnErrorsBodyIsBoundedAndHasNoKeyInIt(t *testing.T) {
	rec := httptest.NewRecorder()
	rec.Header().Set("X-Request-Id", "r1")
	rec.WriteHeader(http.StatusInternalServerError)
	rec.WriteString(`{"code":500,"error_code":"internal_server_error","message":"key e2b_secret ` + strings.Repeat("x", 5000) + `\u001b[2J"}`)
	e := readError(rec.Result(), "e2b_secret")
	if e.Code != "internal_server_error" || e.RequestID != "r1" || len(e.Message) > 600 || strings.Contains(e.Error(), "e2b_secret") || strings.Contains(e.Error(), "\x1b") {
		t.Errorf("%v", e)
	}
	if err := asFault("op", e); fault.KindOf(err) != fault.Unavailable || fault.HintOf(err) == "" {
		t.Errorf("%v", err)
	}
}

func TestAddressesOfSandboxes(t *testing.T) {
	for _, r := range []struct {
		s    Settings
		want string
	}{
		{Settings{}, "https://49983-i1.e2b.app"},
		{Settings{Domain: "e2b.test:8443"}, "https://49983-i1.e2b.test:8443"},
		{Settings{Debug: true}, "http://localhost:49983"},
		{Settings{SandboxURL: "http://127.0.0.1:3/"}, "http://127.0.0.1:3"},
		{Settings{SandboxURL: "https://x.example/kruise/{sandbox}/{port}"}, "https://x.example/kruise/i1/49983"},
	} {
		if got := r.s.sandbox("i1", "", envdPort); got != r.want {
			t.Errorf("%+v: %s, want %s", r.s, got, r.want)
		}
	}
}
