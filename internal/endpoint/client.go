package endpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// maxAnswer bounds what a client reads of an answer.
const maxAnswer = 1 << 20

// pollEvery is how often a client looks again while it waits for an engine to
// come or to go.
const pollEvery = 20 * time.Millisecond

// A Client talks to the engine of a state folder over its control socket. It
// holds no connection between calls, so it needs no closing and survives a
// new engine. The methods are fault.NotFound when no engine listens there.
type Client struct {
	dir  string
	http *http.Client
}

// Dial returns a client of the engine in dir, without connecting yet.
func Dial(dir string) *Client {
	return &Client{dir: dir, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dial(ctx, dir)
		},
	}}}
}

// Ping asks once whether the engine is up, and puts what it says of itself
// into status, which may be nil.
func (c *Client) Ping(ctx context.Context, status any) error {
	const op = "engine: ping"
	a, err := c.call(ctx, op, http.MethodGet, readyPath, nil)
	if err != nil {
		return err
	}
	if status != nil && len(a.Status) > 0 {
		if err := json.Unmarshal(a.Status, status); err != nil {
			return fault.New(op, fault.Internal, "%w", err)
		}
	}
	return nil
}

// Ready waits until an engine is up, be it one that has yet to be started.
// When ctx ends first the error is fault.Timeout or fault.Cancelled: who
// started the engine ends ctx when that process died.
func (c *Client) Ready(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := c.Ping(ctx, nil)
		if err == nil {
			return nil
		}
		// An engine that is on its way out may take a call and not answer it.
		if kind := fault.KindOf(err); ctx.Err() == nil && kind != fault.NotFound && kind != fault.Unreachable {
			return err
		}
		select {
		case <-ctx.Done():
			return ended(ctx, "engine: wait until it is ready", "nothing answers in "+c.dir)
		case <-tick.C:
		}
	}
}

// Stop asks the engine to end and returns when its process is gone. When ctx
// ends first the engine is still on its way out.
func (c *Client) Stop(ctx context.Context) error {
	const op = "engine: stop"
	a, err := c.call(ctx, op, http.MethodPost, stopPath, nil)
	if err != nil {
		return err
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for alive(a.PID, a.StartTime) {
		select {
		case <-ctx.Done():
			return ended(ctx, op, fmt.Sprintf("process %d still runs", a.PID))
		case <-tick.C:
		}
	}
	return nil
}

// SetSecrets hands credentials to the engine, MaxSecrets bytes at most. A
// second call replaces what the first one gave.
func (c *Client) SetSecrets(ctx context.Context, secrets []byte) error {
	const op = "engine: set secrets"
	if len(secrets) > MaxSecrets {
		return fault.New(op, fault.Invalid, "%d bytes are more than %d", len(secrets), MaxSecrets)
	}
	_, err := c.call(ctx, op, http.MethodPut, secretsPath, secrets)
	return err
}

func (c *Client) call(ctx context.Context, op, method, path string, body []byte) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, bytes.NewReader(body))
	if err != nil {
		return answer{}, fault.New(op, fault.Internal, "%w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{}, c.callFault(ctx, op, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return answer{}, c.callFault(ctx, op, err)
	}
	var a answer
	if err := json.Unmarshal(text, &a); err != nil {
		return answer{}, fault.New(op, fault.Unreachable, "status %d, not in our words: %w", resp.StatusCode, err)
	}
	if f := a.Fault; f != nil {
		return answer{}, &fault.Error{Op: op, Kind: f.Kind, Err: errors.New(f.Text), Hint: f.Hint}
	}
	return a, nil
}

func (c *Client) callFault(ctx context.Context, op string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fault.New(op, fault.NotFound, "no engine runs in %s: %w", c.dir, err).
			Hinted("Start one with up.")
	case errors.Is(err, fs.ErrPermission):
		return fault.New(op, fault.Denied, "%w", err).Hinted("The engine belongs to another user.")
	case ctx.Err() != nil:
		return ended(ctx, op, "the engine has not answered")
	}
	return fault.New(op, fault.Unreachable, "%w", err)
}
