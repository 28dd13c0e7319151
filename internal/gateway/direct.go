package gateway

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"net/http"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// Ready reports whether there is a key for the maker's models, as far as can be
// told without using it: fault.Denied when there is none, or none that can be
// one.
func (g *Gateway) Ready(ctx context.Context, of Maker) error {
	_, _, refused := g.authority(ctx, of)
	return refused.fault("model key")
}

// fault is the refusal as an error; nil when r is nil.
func (r *refusal) fault(op string) error {
	if r == nil {
		return nil
	}
	kind := fault.Unavailable
	switch r.status {
	case http.StatusUnauthorized:
		kind = fault.Denied
	case http.StatusNotFound:
		kind = fault.Invalid
	}
	return fault.New(op, kind, "%s", r.message)
}

// A Loan is the real key, for an agent that calls the API without the gateway,
// and how much it may spend.
type Loan struct {
	Credentials
	Limit fork.USD // 0: none
}

// directPath stands in the books for calls that nobody saw.
const directPath = "(direct)"

// cent is the least that is worth lending.
const cent = fork.Dollar / 100

// Lend gives out the real key for one attempt of a fork. There is no other way
// to get it, and what it says of money is as good as what the agent says: what is
// left for the fork is reserved as a whole, so that others do not spend it too,
// until Repay tells what the attempt did cost. An agent that keeps to its limit
// after each call spends more than that by one call at most.
//
// The fork needs a budget of its own where any budget is to hold. The kind of
// the error is Denied without a key, OverBudget when less than a cent is left,
// and Invalid for an account that cannot be.
func (g *Gateway) Lend(ctx context.Context, a Account, model string, attempt int) (Loan, error) {
	const op = "lend key"
	cred, base, refused := g.authority(ctx, Anthropic)
	if refused != nil {
		return Loan{}, refused.fault(op)
	}
	cred.BaseURL = base.String()
	if a.ForkBudget == 0 && (a.RunBudget > 0 || g.dayBudget > 0) {
		return Loan{}, fault.New(op, fault.Invalid, "without the gateway, a budget holds only for a fork that has its own").
			Hinted("Use --budget-per-fork USD.")
	}
	// An attempt that was lent to and never began owes nothing.
	if err := g.repay(ctx, a.Run, a.Fork, attempt, ledger.Settlement{State: ledger.Failed, Note: "never used"}); err != nil && fault.KindOf(err) != fault.NotFound {
		return Loan{}, err
	}
	var secret [32]byte
	rand.Read(secret[:]) // it crashes the program rather than fail
	// Nobody gets to see this token: it only opens the account.
	hash := ledger.HashOf(base64.RawURLEncoding.EncodeToString(secret[:]))
	if err := g.ledger.Grant(ctx, a, hash); err != nil {
		return Loan{}, err
	}
	id := g.ModelID(model)
	c, err := g.ledger.Reserve(ctx, ledger.Request{
		Run: a.Run, Fork: a.Fork, Token: hash, Model: id, Path: directPath, Prices: g.prices.Version(), Attempt: attempt, Patience: g.limits.wait,
		Ask: ledger.Ask{PerToken: cent, Want: int64(a.ForkBudget / cent), Enough: min(1, int64(a.ForkBudget/cent)), Least: min(1, int64(a.ForkBudget/cent))},
	})
	var short ledger.Shortage
	switch {
	case errors.As(err, &short):
		return Loan{}, &fault.Error{Op: op, Kind: fault.OverBudget, Err: short}
	case errors.Is(err, ledger.ErrBusy):
		return Loan{}, &fault.Error{Op: op, Kind: fault.OverBudget, Err: err}
	case err != nil:
		return Loan{}, fault.Wrap(op, err)
	case a.ForkBudget > 0 && c.Reserved < cent:
		c.Settle(ledger.Settlement{State: ledger.Failed, Note: "never used"})
		return Loan{}, fault.New(op, fault.OverBudget, "a budget of %s for a fork is too little without the gateway", a.ForkBudget)
	}
	g.log.Info("the model key was lent to a sandbox", "run", a.Run, "fork", a.Fork, "attempt", attempt, "limit", c.Reserved.String())
	return Loan{Credentials: cred, Limit: c.Reserved}, nil
}

// Repay ends a loan with what the attempt did use, by the agent's own account.
// It counts once, also after a crash, whose charge it takes the place of. It is
// fault.NotFound when nothing was lent.
func (g *Gateway) Repay(ctx context.Context, run string, num, attempt int, used fork.Usage) error {
	return g.repay(ctx, run, num, attempt, ledger.Settlement{
		State: ledger.Settled, Status: http.StatusOK, Cost: used.Cost, Note: "by the agent's own account",
		Tokens: ledger.Tokens{Input: used.InputTokens, CacheWrite5m: used.CacheWriteTokens, CacheRead: used.CacheReadTokens, Output: used.OutputTokens},
	})
}

func (g *Gateway) repay(ctx context.Context, run string, num, attempt int, s ledger.Settlement) error {
	c, err := g.ledger.Find(ctx, run, num, directPath, attempt)
	if err != nil {
		return err
	}
	c.Settle(s)
	return nil
}

// WriteOff ends a loan of which nobody can say what it did cost: it is charged
// whole.
func (g *Gateway) WriteOff(ctx context.Context, run string, num, attempt int) error {
	c, err := g.ledger.Find(ctx, run, num, directPath, attempt)
	if err != nil {
		return err
	}
	c.Settle(ledger.Settlement{State: ledger.Failed, Cost: c.Reserved, Note: "ended without an account: charged at its reservation"})
	return nil
}
