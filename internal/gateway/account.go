package gateway

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// An Account names who pays: one fork of one run.
type Account = ledger.Account

// Spent is what a fork or a run has used, by the ledger. Calls under way are
// not in it.
type Spent = ledger.Spent

// A Way is how a sandbox comes to the gateway. A token is good on one way only:
// the way is a part of it, so a token that is changed to look like one of
// another way is not known at all.
type Way int

// The ways.
const (
	ByDoor Way = iota // through the [Door] of its own sandbox
	ByNet             // through the listener that sandboxes elsewhere reach; see [Gateway.ServeNet]
)

// The beginnings of tokens make them recognisable to people and to secret
// scanners, and say which way they are for.
var tokenPrefixes = [...]string{ByDoor: "sbxt-", ByNet: "sbxn-"}

// tokenSize is the length of every token.
var tokenSize = len(tokenPrefixes[ByDoor]) + base64.RawURLEncoding.EncodedLen(32)

// shaped reports whether a text can be a token for the way.
func (way Way) shaped(token string) bool {
	return len(token) == tokenSize && strings.HasPrefix(token, tokenPrefixes[way])
}

// A tenant is a fork as this gateway sees it: what is not money.
type tenant struct {
	run    string
	num    int
	grant  *grant        // the one that is good, as far as is known here; nil: none
	active int           // calls that a handler works on
	quiet  chan struct{} // closed when active is 0 again; nil: nobody waits for that
	noted  int64         // refusals for other reasons than money, and failures, since the start
	broke  int64         // refusals for want of money, since the start
	denied bool          // there is no key for its calls, or the API refused it

	patience context.Context // done when calls under way are to be cut off; see Settle
	cut      context.CancelFunc
}

// name is how the fork is told from all others.
func (t *tenant) name() string { return t.run + "/" + strconv.Itoa(t.num) }

// A grant is a token, as far as it is known here.
type grant struct {
	hash     ledger.Hash
	tenant   *tenant
	patience context.Context // the tenant's, when the token was given out
	revoked  bool
	checked  time.Time // when the ledger last said that it is good
}

type tenantKey struct {
	run string
	num int
}

// tenant returns that of the fork, making it first if need be. The caller holds
// g.mu.
func (g *Gateway) tenant(run string, num int) *tenant {
	key := tenantKey{run, num}
	t := g.tenants[key]
	if t == nil {
		t = &tenant{run: run, num: num}
		t.patience, t.cut = context.WithCancel(context.Background())
		g.tenants[key] = t
	}
	return t
}

// Grant gives a fork a token, which agents use as their API key. The token is
// random; only its hash is kept, so it cannot be had a second time. It is good
// until it is revoked, also after a restart of the gateway, and in every gateway
// that shares the ledger. A second Grant for the same fork revokes the earlier
// token, so whoever attaches to an agent that runs on must not call it. What the
// budgets mean is said at [ledger.Ledger.Grant].
//
// The kind of the error is Invalid for an account that cannot be, Full when the
// ledger's disk is, and Unavailable when the gateway is closed or the ledger's
// database does not answer.
func (g *Gateway) Grant(ctx context.Context, a Account) (token string, err error) {
	return g.GrantFor(ctx, a, ByDoor)
}

// GrantFor is Grant of a token for the way by which the fork's sandbox comes.
func (g *Gateway) GrantFor(ctx context.Context, a Account, way Way) (token string, err error) {
	const op = "grant token"
	if err := ctx.Err(); err != nil {
		return "", &fault.Error{Op: op, Kind: fault.Cancelled, Err: err}
	}
	var secret [32]byte
	rand.Read(secret[:]) // it crashes the program rather than fail
	token = tokenPrefixes[way] + base64.RawURLEncoding.EncodeToString(secret[:])
	hash := ledger.HashOf(token)

	g.granting.Lock()
	defer g.granting.Unlock()
	if err := g.ledger.Grant(ctx, a, hash); err != nil {
		return "", err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.tenant(a.Run, a.Fork)
	t.dismiss()
	if t.patience.Err() != nil { // the account was settled and is opened again
		t.patience, t.cut = context.WithCancel(context.Background())
	}
	g.keep(hash, t)
	return token, nil
}

// keep remembers a good token. The caller holds g.mu.
func (g *Gateway) keep(hash ledger.Hash, t *tenant) *grant {
	t.grant = &grant{hash: hash, tenant: t, patience: t.patience, checked: time.Now()}
	g.tokens[hash] = t.grant
	return t.grant
}

// Revoke takes the token of a fork back: its next call is refused with 403, and
// so are the calls that wait. Calls that were forwarded go on to their end. To
// revoke what was never granted, or a second time, is no error.
func (g *Gateway) Revoke(ctx context.Context, run string, num int) error {
	const op = "revoke token"
	if err := ctx.Err(); err != nil {
		return &fault.Error{Op: op, Kind: fault.Cancelled, Err: err}
	}
	g.granting.Lock()
	defer g.granting.Unlock()
	// In memory first: a ledger that cannot be written must not keep a token
	// alive.
	g.mu.Lock()
	if t := g.tenants[tenantKey{run, num}]; t != nil {
		t.dismiss()
	}
	g.mu.Unlock()
	g.prompts.forget(tenantKey{run, num})
	return g.ledger.Revoke(ctx, run, num)
}

// dismiss makes the fork's token bad. The caller holds g.mu.
func (t *tenant) dismiss() {
	if t.grant != nil {
		t.grant.revoked = true
		t.grant = nil
	}
}

// Settle returns when no call of the fork is under way, so that what Usage
// says after a Revoke is final. Calls that go on for longer than patience are
// cut off then, and charged as those are whose end nobody saw. Batches of the
// fork are cancelled and settled; one that has not ended by then is in Usage at
// the most that it can cost, and settled later.
func (g *Gateway) Settle(ctx context.Context, run string, num int, patience time.Duration) error {
	const op = "settle account"
	g.mu.Lock()
	if t := g.tenants[tenantKey{run, num}]; t != nil && t.active > 0 {
		if t.quiet == nil {
			t.quiet = make(chan struct{})
		}
		quiet := t.quiet
		defer time.AfterFunc(patience, t.cut).Stop()
		g.mu.Unlock()
		select {
		case <-quiet:
		case <-ctx.Done():
			return &fault.Error{Op: op, Kind: fault.Cancelled, Err: ctx.Err()}
		}
	} else {
		g.mu.Unlock()
	}
	if err := g.settleElsewhere(ctx, run, num, patience); err != nil {
		return err
	}
	return fault.Wrap(op, g.finish(ctx, run, num, patience))
}

// settleElsewhere waits for the calls of the fork in other gateways, which cut
// them off when they next look at the ledger.
func (g *Gateway) settleElsewhere(ctx context.Context, run string, num int, patience time.Duration) error {
	const op = "settle account"
	if !g.shared {
		return nil
	}
	late := time.NewTimer(patience + g.limits.elsewhere)
	defer late.Stop()
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for {
		n, err := g.ledger.InFlight(ctx, run, num)
		if err != nil || n == 0 {
			return err
		}
		select {
		case <-look.C:
		case <-late.C:
			g.log.Warn("calls of a fork go on in another gateway; their cost is not in its result", "run", run, "fork", num, "calls", n)
			return nil
		case <-ctx.Done():
			return &fault.Error{Op: op, Kind: fault.Cancelled, Err: ctx.Err()}
		}
	}
}

// Denied reports whether a call of the fork failed because there is no key, or
// the API refused it, since this gateway was started.
func (g *Gateway) Denied(run string, num int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.tenants[tenantKey{run, num}]
	return t != nil && t.denied
}

func (g *Gateway) deny(t *tenant) {
	g.mu.Lock()
	defer g.mu.Unlock()
	t.denied = true
}

// abandon ends the calls of a fork whose token another gateway has revoked.
func (g *Gateway) abandon(run string, num int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t := g.tenants[tenantKey{run, num}]; t != nil {
		t.dismiss()
		t.cut()
	}
}

// SetBudget makes budget that of the run, or with a num above 0 of the fork.
// Calls that are held for want of money go on when there is enough of it.
func (g *Gateway) SetBudget(ctx context.Context, run string, num int, budget fork.USD) error {
	return g.ledger.SetBudget(ctx, run, num, budget)
}

// Usage returns what a fork has spent, or the whole run when num is 0. Of a run
// that made no call it returns zeros.
func (g *Gateway) Usage(ctx context.Context, run string, num int) (Spent, error) {
	if err := ctx.Err(); err != nil {
		return Spent{}, &fault.Error{Op: "read usage", Kind: fault.Cancelled, Err: err}
	}
	return g.ledger.Usage(ctx, run, num)
}
