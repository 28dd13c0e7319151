package e2b

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A StatusError is an answer of E2B that is no success. Its body was written
// by a stranger: it is short, of printable characters, and has no key in it.
type StatusError struct {
	Status     int
	Code       string        // E2B's error_code, or the code of the Connect protocol; may be empty
	Message    string        // what it says
	RequestID  string        // to be told to E2B's people
	RetryAfter time.Duration // of a rate limit; 0: none was said
	Limited    bool          // a limit of the rate of requests, and not of what may run at once
}

// Error returns the status, the code, the message and the request.
func (e *StatusError) Error() string {
	text := "status " + strconv.Itoa(e.Status)
	if e.Code != "" && e.Code != strconv.Itoa(e.Status) {
		text += " (" + e.Code + ")"
	}
	if e.Message != "" {
		text += ": " + e.Message
	}
	if e.RequestID != "" {
		text += " (request " + e.RequestID + ")"
	}
	return text
}

const (
	maxErrorBody = 64 << 10
	maxErrorText = 500
)

// readError makes an error of an answer. Secrets are taken out of what it
// says.
func readError(resp *http.Response, secrets ...string) *StatusError {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // half of it is better than nothing
	e := &StatusError{Status: resp.StatusCode, RequestID: firstOf(resp.Header, "X-Request-Id", "X-Trace-Id", "Cf-Ray")}
	var said struct {
		Code      json.RawMessage `json:"code"`
		ErrorCode string          `json:"error_code"`
		Message   string          `json:"message"`
	}
	if json.Unmarshal(b, &said) == nil && (said.Message != "" || len(said.Code) > 0 || said.ErrorCode != "") {
		e.Code, e.Message = said.ErrorCode, said.Message
		if e.Code == "" {
			e.Code = strings.Trim(string(said.Code), `"`)
		}
	} else {
		e.Message = string(b)
	}
	e.Code, e.Message, e.RequestID = clean(e.Code, 64, secrets), clean(e.Message, maxErrorText, secrets), clean(e.RequestID, 128, secrets)
	if e.Status == http.StatusTooManyRequests {
		e.RetryAfter = retryAfter(resp.Header)
		e.Limited = resp.Header.Get("Retry-After") != "" || resp.Header.Get("Ratelimit-Limit") != ""
	}
	return e
}

func firstOf(h http.Header, names ...string) string {
	for _, n := range names {
		if v := h.Get(n); v != "" {
			return v
		}
	}
	return ""
}

// retryAfter reads seconds or a date.
func retryAfter(h http.Header) time.Duration {
	const most = 10 * time.Minute
	text := firstOf(h, "Retry-After", "Ratelimit-Reset")
	if n, err := strconv.ParseFloat(text, 64); err == nil && n >= 0 {
		return time.Duration(min(n, most.Seconds()) * float64(time.Second))
	}
	if t, err := http.ParseTime(text); err == nil {
		return min(max(time.Until(t), 0), most)
	}
	return 0
}

// clean makes a stranger's text fit to be shown.
func clean(text string, most int, secrets []string) string {
	for _, s := range secrets {
		if s != "" {
			text = strings.ReplaceAll(text, s, "[redacted]")
		}
	}
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return -1
		}
		return r
	}, text)
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return strings.TrimSpace(text)
}

// kinds of what E2B answers, where it means the same whatever was asked.
func (e *StatusError) kind() fault.Kind {
	switch e.Status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return fault.Invalid
	case http.StatusUnauthorized, http.StatusForbidden:
		return fault.Denied
	case http.StatusNotFound, http.StatusGone:
		return fault.NotFound
	case http.StatusConflict:
		return fault.Conflict
	case http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return fault.Unsupported
	case http.StatusInsufficientStorage:
		return fault.Full
	}
	return fault.Unavailable
}

func (e *StatusError) hint() string {
	switch {
	case e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden:
		return "E2B refused the key; see whether E2B_API_KEY is one of the right team and was not revoked."
	case e.Status == http.StatusTooManyRequests && e.Limited:
		return "E2B asks to be asked less often; the plan's rate is set by SANDBOX_TEMPORAL_E2B_PLAN."
	case e.Status == http.StatusTooManyRequests:
		return "The team runs as many sandboxes as its plan allows; run fewer at once with --max-concurrent, or end some with sandbox-temporal cleanup."
	case e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusNotImplemented:
		return "The service at E2B_API_URL speaks only a part of E2B's protocol."
	case e.Status >= 500:
		return "E2B has trouble; see https://status.e2b.dev."
	}
	return ""
}

// asFault gives an error its kind.
func asFault(op string, err error) error {
	var status *StatusError
	var known *fault.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return fault.Wrap(op, err)
	case errors.As(err, &status):
		return &fault.Error{Op: op, Kind: status.kind(), Err: err, Hint: status.hint()}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return &fault.Error{Op: op, Kind: fault.Cancelled, Err: err}
	case untrusted(err):
		return &fault.Error{Op: op, Kind: fault.Denied, Err: err, Hint: "Who answered did not prove to be the service that was asked for; if it has certificates of its own, name the file of their authority with SANDBOX_TEMPORAL_E2B_CA."}
	}
	return &fault.Error{Op: op, Kind: fault.Unavailable, Err: err, Hint: "E2B could not be reached; see whether this host may reach it, and E2B_API_URL and E2B_DOMAIN."}
}

// untrusted reports whether the other end's certificate was refused: it would be
// again.
func untrusted(err error) bool {
	var e *tls.CertificateVerificationError
	return errors.As(err, &e)
}

// statusOf returns the status of an answer that was no success, or 0.
func statusOf(err error) int {
	var e *StatusError
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

func unexpected(format string, args ...any) error {
	return fmt.Errorf("an answer that is not of E2B's protocol: "+format, args...)
}
