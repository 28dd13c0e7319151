package gateway

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// A refusal is an answer of the gateway's own, in the API's format. Which
// status an agent gives up at, and after how many requests, was measured with
// Claude Code: 402, 403 and 413 at once, 404 after two, 400 after six because
// it tries again with less, and 401, 429 and 5xx at once only with
// x-should-retry: false.
type refusal struct {
	status  int
	kind    string // the API's own type of error
	message string // a whole sentence for the person who reads the agent's output
	final   bool   // the same call can never go through
	after   time.Duration
}

func refuse(status int, kind, message string) *refusal {
	return &refusal{status: status, kind: kind, message: message}
}

// forbid is a refusal that the same call would meet again.
func forbid(status int, kind, message string) *refusal {
	return &refusal{status: status, kind: kind, message: message, final: true}
}

// comeAgain asks the agent to make the same call again after a while.
func comeAgain(after time.Duration, message string) *refusal {
	return &refusal{status: http.StatusTooManyRequests, kind: "rate_limit_error", message: message, after: after}
}

func refuseToken() *refusal {
	return forbid(http.StatusForbidden, "permission_error", "This token is not known, or was revoked because its fork has ended.")
}

func (r *refusal) write(w http.ResponseWriter) {
	body, err := json.Marshal(map[string]any{
		"type":  "error",
		"error": map[string]string{"type": r.kind, "message": r.message},
	})
	if err != nil { // strings only: it cannot be
		body = nil
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if r.final {
		h.Set("X-Should-Retry", "false")
	}
	if r.after > 0 {
		h.Set("Retry-After", strconv.Itoa(int(r.after.Seconds())))
	}
	w.WriteHeader(r.status)
	w.Write(body) //nolint:errcheck // the agent is gone
}
