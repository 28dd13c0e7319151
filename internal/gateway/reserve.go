package gateway

import (
	"context"
	"errors"
	"net/http"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// A call is one reservation, and what is known of what it was made for.
type call struct {
	*ledger.Call
	g       *Gateway
	tenant  *tenant
	model   string
	path    string
	attempt int
	ask     ask
	marks   *marks
	held    bool // for a while, for want of money
	started time.Time
	span    trace.Span // nil: the call is not traced
}

// errHeldLong ends the wait of a call that is held for want of money.
var errHeldLong = errors.New("held for as long as an agent waits in silence")

// reserve holds the most that c can cost in every budget it is paid from, and
// returns when that is durable.
func (g *Gateway) reserve(ctx context.Context, c *call, hash ledger.Hash) *refusal {
	held, refused := g.set(ctx, c.tenant, c.model, func(ctx context.Context, r ledger.Request) (err error) {
		r.Token, r.Path, r.Attempt, r.Ask = hash, c.path, c.attempt, c.ask.Ask
		c.Call, err = g.ledger.Reserve(ctx, r)
		return err
	})
	c.held = held
	if refused == nil {
		g.observer.reserved(c.Reserved)
	}
	return refused
}

// set has the fork's money set aside by do, and says why where that cannot be.
// Held is true when there was none for a while.
func (g *Gateway) set(ctx context.Context, t *tenant, model string, do func(context.Context, ledger.Request) error) (held bool, _ *refusal) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(g.closing, func() { cancel(errClosing) })()
	var late *time.Timer
	err := do(ctx, ledger.Request{
		Run: t.run, Fork: t.num, Model: model, Prices: g.prices.Version(), Patience: g.limits.wait,
		Held: func(short ledger.Shortage) {
			held = true
			if late == nil {
				late = time.AfterFunc(g.limits.hold, func() { cancel(errHeldLong) })
			}
			g.say(&t.broke, t, "a call is held until there is more money", "whose", short.Whose, "left", short.Left.String(), "need", short.Need.String())
		},
	})
	if late != nil {
		late.Stop()
	}
	var short ledger.Shortage
	switch {
	case err == nil:
		return held, nil
	case errors.As(err, &short):
		g.say(&t.broke, t, "call refused: over budget", "model", model, "whose", short.Whose, "left", short.Left.String(), "need", short.Need.String())
		return held, forbid(http.StatusPaymentRequired, "billing_error", short.Error())
	case errors.Is(err, ledger.ErrRevoked):
		return held, refuseToken()
	case errors.Is(err, ledger.ErrBusy):
		return held, comeAgain(5*time.Second, "What is left of the budget is held by other calls.")
	case context.Cause(ctx) == errHeldLong: //nolint:errorlint // it is never wrapped
		r := refuse(http.StatusServiceUnavailable, "api_error", "The budget does not cover this call, and the run waits for more money: come again.")
		r.after = time.Second
		return held, r
	case g.closing.Err() != nil:
		return held, refuse(http.StatusServiceUnavailable, "api_error", "The gateway is closing.")
	}
	switch fault.KindOf(err) {
	case fault.Cancelled:
		return held, refuse(http.StatusServiceUnavailable, "api_error", "The call was given up while it waited for other calls.")
	case fault.Invalid:
		return held, forbid(http.StatusBadRequest, "invalid_request_error", "The call asks for more than any account covers.")
	}
	g.log.Warn("a call is refused because its reservation cannot be written", "run", t.run, "fork", t.num, "error", err)
	return held, refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot write its ledger, and forwards nothing unmetered.")
}

// seldom is true for 1, 2, 4, 8 …: what an agent can repeat as fast as it likes
// must not fill the log.
func seldom(n int64) bool { return n&(n-1) == 0 }

// say logs what an agent can bring about as often as it likes, and counts it.
func (g *Gateway) say(count *int64, t *tenant, what string, args ...any) {
	g.mu.Lock()
	*count++
	n := *count
	g.mu.Unlock()
	if seldom(n) {
		g.log.Info("a call was not served", append([]any{"what", what, "run", t.run, "fork", t.num, "times", n}, args...)...)
	}
}

// settle replaces the reservation by the cost. Only the first settlement of a
// call counts.
func (c *call) settle(s ledger.Settlement) {
	g := c.g
	if !c.Settle(s) {
		return
	}
	model := s.Model
	if model == "" {
		model = c.model
	}
	g.observe(c.tenant.run, c.tenant.num, model, s, c.Reserved)
	c.record(s)
	if s.Cost > c.Reserved {
		g.log.Warn("a call cost more than was reserved for it", "run", c.tenant.run, "fork", c.tenant.num, "cost", s.Cost.String(), "reserved", c.Reserved.String(),
			"prompt", s.Tokens.Prompt(), "estimate", c.ask.prompt)
	}
	g.log.Debug("call settled", "run", c.tenant.run, "fork", c.tenant.num, "call", c.ID(), "model", s.Model, "status", s.Status, "state", string(s.State),
		"input", s.Tokens.Input, "write_5m", s.Tokens.CacheWrite5m, "write_1h", s.Tokens.CacheWrite1h, "read", s.Tokens.CacheRead, "output", s.Tokens.Output,
		"cost", s.Cost.String(), "reserved", c.Reserved.String(), "attempt", c.attempt, "took", time.Since(c.started).Round(time.Millisecond).String(), "note", s.Note)
}
