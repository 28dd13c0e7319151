package e2b

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A client speaks to E2B's control plane as one team.
type client struct {
	settings Settings
	plan     plan
	http     *http.Client
	firstV1  atomic.Bool // sandboxes are made by the first version of the call, as it has no second
	listV1   atomic.Bool // and listed

	mu   sync.Mutex
	next time.Time // when a sandbox may be made again
}

func newClient(s Settings) (*client, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	t, err := s.transport()
	if err != nil {
		return nil, err
	}
	return &client{settings: s, plan: plans[s.Plan], http: &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // the key is for one address
	}}}, nil
}

// maxAnswer bounds an answer of the control plane: a page of a hundred.
const maxAnswer = 8 << 20

// callTime bounds one call of the control plane. Pauses and snapshots move
// gigabytes.
const callTime = 3 * time.Minute

// tries is how often a call is made that can be made again.
const tries = 5

// call makes a call until it goes through, when again says that it may be
// made again.
func (c *client) call(ctx context.Context, method, path string, in, out any, again bool) (http.Header, error) {
	wait := 100 * time.Millisecond
	for n := 1; ; n++ {
		h, err := c.once(ctx, method, path, in, out)
		var status *StatusError
		switch {
		case err == nil:
			return h, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.As(err, &status) && status.Limited:
			// A request that was refused was not carried out.
			wait = max(wait, status.RetryAfter)
		case !again, untrusted(err), errors.As(err, &status) && (status.Status < 500 || status.Status == http.StatusNotImplemented):
			return h, err
		}
		if n == tries {
			return h, err
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (c *client) once(ctx context.Context, method, path string, in, out any) (http.Header, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, callTime, fmt.Errorf("E2B did not answer within %s", callTime))
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.settings.api()+path, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.settings.Key != "" {
		req.Header.Set("X-API-Key", c.settings.Key)
	}
	req.Header.Set("User-Agent", userAgent)
	resp, err := c.http.Do(req) //nolint:bodyclose // drain closes it
	if err != nil {
		return nil, err
	}
	defer drain(resp.Body)
	if resp.StatusCode/100 != 2 {
		return resp.Header, readError(resp, c.settings.Key)
	}
	if out == nil {
		return resp.Header, nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxAnswer {
		return nil, unexpected("more than %d bytes", maxAnswer)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return nil, unexpected("%w", err)
	}
	return resp.Header, nil
}

const userAgent = "sandbox-temporal"

// drain lets the connection be used again.
func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, 64<<10)
	_ = body.Close()
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// machine is what E2B says of a sandbox.
type machine struct {
	ID          string            `json:"sandboxID"`
	Template    string            `json:"templateID"`
	Token       string            `json:"envdAccessToken"`
	EnvdVersion string            `json:"envdVersion"`
	Domain      string            `json:"domain"`
	State       string            `json:"state"`
	Metadata    map[string]string `json:"metadata"`
	Started     time.Time         `json:"startedAt"`
	End         time.Time         `json:"endAt"`
	CPUs        int64             `json:"cpuCount"`
	MemoryMB    int64             `json:"memoryMB"`
}

const statePaused = "paused"

// validMachineID keeps what a stranger said out of paths and host names.
func validMachineID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for _, c := range []byte(id) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

type newMachine struct {
	Template string            `json:"templateID"`
	Timeout  int               `json:"timeout"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Secure   bool              `json:"secure,omitempty"` // v1 only: v2 always is
}

// create makes one sandbox, or fails; it is not tried again here, as nobody
// knows whether a call that was not answered was carried out.
func (c *client) create(ctx context.Context, in newMachine) (machine, error) {
	var m machine
	if !c.firstV1.Load() {
		_, err := c.call(ctx, http.MethodPost, "/v2/sandboxes", in, &m, false)
		if s := statusOf(err); s != http.StatusNotFound && s != http.StatusMethodNotAllowed {
			return m, checkMachine(m, err)
		}
	}
	// Not found is the version, or the template: the first version knows.
	in.Secure = true
	_, err := c.call(ctx, http.MethodPost, "/sandboxes", in, &m, false)
	if err == nil {
		c.firstV1.Store(true)
	}
	return m, checkMachine(m, err)
}

func checkMachine(m machine, err error) error {
	if err == nil && !validMachineID(m.ID) {
		return unexpected("a sandbox without a usable id")
	}
	return err
}

// pace waits until a sandbox may be made.
func (c *client) pace(ctx context.Context) error {
	c.mu.Lock()
	now := time.Now()
	at := c.next
	if at.Before(now) {
		at = now
	}
	c.next = at.Add(c.plan.pace)
	c.mu.Unlock()
	return sleep(ctx, at.Sub(now))
}

func (c *client) get(ctx context.Context, id string) (machine, error) {
	var m machine
	_, err := c.call(ctx, http.MethodGet, "/sandboxes/"+url.PathEscape(id), nil, &m, true)
	return m, checkMachine(m, err)
}

// list returns the sandboxes that have the metadata, running or paused.
func (c *client) list(ctx context.Context, metadata map[string]string) ([]machine, error) {
	q := url.Values{"state": {"running,paused"}, "limit": {"100"}}
	if len(metadata) > 0 {
		inner := url.Values{}
		for k, v := range metadata {
			inner.Set(k, v)
		}
		q.Set("metadata", inner.Encode())
	}
	if !c.listV1.Load() {
		all, err := pages[machine](ctx, c, "/v2/sandboxes", q)
		if !absent(err) {
			return all, err
		}
	}
	q.Del("state") // the first version has it not, and no pages
	q.Del("limit")
	all, err := pages[machine](ctx, c, "/sandboxes", q)
	if err == nil {
		c.listV1.Store(true)
	}
	return all, err
}

// absent reports whether a service does not know what it was asked, when that
// names no sandbox that could be gone.
func absent(err error) bool {
	switch statusOf(err) {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return true
	}
	return false
}

// lacks tells a call that the service does not know from a sandbox that it does
// not know.
func (c *client) lacks(ctx context.Context, id, what string, err error) error {
	if !absent(err) {
		return err
	}
	if _, getErr := c.get(ctx, id); getErr != nil {
		return err
	}
	return lacking(what, err)
}

func lacking(what string, err error) error {
	return fault.New("", fault.Unsupported, "the service cannot %s: %v", what, err).
		Hinted("The service at E2B_API_URL speaks only a part of E2B's protocol.")
}

// pages reads a list to its end. A token that comes back twice would never
// end.
func pages[T any](ctx context.Context, c *client, path string, q url.Values) ([]T, error) {
	var all []T
	for seen := map[string]bool{}; ; {
		var page []T
		h, err := c.call(ctx, http.MethodGet, path+"?"+q.Encode(), nil, &page, true)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		token := h.Get("X-Next-Token")
		if token == "" {
			return all, nil
		}
		if seen[token] {
			return nil, unexpected("a list without an end")
		}
		seen[token] = true
		q.Set("nextToken", token)
	}
}

// seconds is how a time to live is told: whole, and never too short.
func seconds(d time.Duration) int { return int((max(d, 0) + time.Second - 1) / time.Second) }

type timeout struct {
	Timeout int `json:"timeout"`
}

// connect resumes a sandbox that is paused, and has it live that long at
// least.
func (c *client) connect(ctx context.Context, id string, life time.Duration) (machine, error) {
	var m machine
	_, err := c.call(ctx, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/connect", timeout{seconds(life)}, &m, true)
	return m, checkMachine(m, c.lacks(ctx, id, "resume sandboxes", err))
}

func (c *client) setTimeout(ctx context.Context, id string, life time.Duration) error {
	_, err := c.call(ctx, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/timeout", timeout{seconds(life)}, nil, true)
	return c.lacks(ctx, id, "change a sandbox's timeout", err)
}

// pause is no error when it is paused already.
func (c *client) pause(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/pause", struct{}{}, nil, true)
	if statusOf(err) == http.StatusConflict {
		if m, getErr := c.get(ctx, id); getErr == nil && m.State == statePaused {
			return nil
		}
	}
	return c.lacks(ctx, id, "pause sandboxes", err)
}

func (c *client) kill(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/sandboxes/"+url.PathEscape(id), nil, nil, true)
	if statusOf(err) == http.StatusNotFound {
		return nil
	}
	return err
}

// A snapshot is a template that was made of a sandbox.
type snapshot struct {
	ID    string   `json:"snapshotID"`
	Names []string `json:"names"`
}

// named reports whether it was made under the name, however the team and the
// tag are written around it.
func (s snapshot) named(name string) bool {
	for _, n := range append(s.Names, s.ID) {
		if bareName(n) == name {
			return true
		}
	}
	return false
}

func bareName(n string) string {
	n = n[strings.LastIndexByte(n, '/')+1:]
	n, _, _ = strings.Cut(n, ":")
	return n
}

func (c *client) snapshot(ctx context.Context, id, name string) (snapshot, error) {
	var s snapshot
	_, err := c.call(ctx, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/snapshots", map[string]string{"name": name}, &s, true)
	err = c.lacks(ctx, id, "make snapshots", err)
	if err == nil && s.ID == "" {
		err = unexpected("a snapshot without an id")
	}
	return s, err
}

func (c *client) snapshots(ctx context.Context) ([]snapshot, error) {
	all, err := pages[snapshot](ctx, c, "/snapshots", url.Values{"limit": {"100"}})
	if absent(err) {
		return nil, nil // who makes none has none
	}
	return all, err
}

// findSnapshot returns the snapshot of that name; ok is false when there is
// none.
func (c *client) findSnapshot(ctx context.Context, name string) (s snapshot, ok bool, err error) {
	all, err := pages[snapshot](ctx, c, "/snapshots", url.Values{"limit": {"100"}, "name": {name}})
	if absent(err) {
		return s, false, lacking("make snapshots", err)
	}
	for _, s := range all {
		if s.named(name) {
			return s, true, err
		}
	}
	return s, false, err
}

func (c *client) removeTemplate(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/templates/"+url.PathEscape(id), nil, nil, true)
	if statusOf(err) == http.StatusNotFound {
		return nil
	}
	return err
}

// A forked sandbox, or why there is none.
type forked struct {
	Sandbox *machine `json:"sandbox"`
	Error   *struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

// err is why the fork failed. The kind of limit is not said here: a 429 among
// siblings that were made is one of what may run at once.
func (f forked) err(secrets ...string) error {
	switch {
	case f.Error != nil:
		return &StatusError{Status: f.Error.Code, Code: strconv.Itoa(f.Error.Code), Message: clean(f.Error.Message, maxErrorText, secrets)}
	case f.Sandbox == nil || !validMachineID(f.Sandbox.ID):
		return unexpected("a fork without a usable id")
	}
	return nil
}

// fork splits a running sandbox. The forks have its metadata: who needs to
// tell them apart makes sandboxes of a snapshot instead.
func (c *client) fork(ctx context.Context, id string, count int, life time.Duration) ([]forked, error) {
	if count < 1 || count > 100 {
		return nil, fault.New("e2b: fork sandbox", fault.Invalid, "%d forks in one call; from 1 to 100 can be asked for", count)
	}
	var out []forked
	_, err := c.call(ctx, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/fork", map[string]int{"count": count, "timeout": seconds(life)}, &out, false)
	return out, c.lacks(ctx, id, "fork sandboxes", err)
}
