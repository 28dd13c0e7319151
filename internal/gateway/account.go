package gateway

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"strconv"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// An Account names who pays: one fork of one run. A fork's budget lies inside
// the run's, which it shares with the run's other forks.
type Account struct {
	Run        string
	Fork       int      // from 1
	RunBudget  fork.USD // 0: none
	ForkBudget fork.USD // 0: none
}

// Spent is what a fork or a run has used, by the ledger. Calls under way are
// not in it.
type Spent struct {
	fork.Usage
	Calls   int // that were forwarded and have ended, well or not
	Refused int // that were answered with 402, because no budget was left
}

func (s Spent) add(t Spent) Spent {
	return Spent{Usage: s.Usage.Add(t.Usage), Calls: s.Calls + t.Calls, Refused: s.Refused + t.Refused}
}

type tokenHash [sha256.Size]byte

// tokenPrefix makes a token recognisable to people and to secret scanners.
const tokenPrefix = "sbxt-"

func hashToken(token string) tokenHash { return sha256.Sum256([]byte(token)) }

// A grant is a token that was given out.
type grant struct {
	hash     tokenHash
	fork     *forkAccount
	patience context.Context // the fork's, when the token was given out
	revoked  bool
}

// A purse is one budget and what was taken from it.
type purse struct {
	budget   fork.USD // 0: none
	spent    Spent
	reserved fork.USD
}

// A runAccount is a run and its forks.
type runAccount struct {
	purse
	name    string
	forks   map[int]*forkAccount
	waiting []*waiter // oldest first
}

// A forkAccount is one fork of a run.
type forkAccount struct {
	purse
	run    *runAccount
	num    int
	grant  *grant        // the one that is good; nil: none
	active int           // calls that a handler works on
	quiet  chan struct{} // closed when active is 0 again; nil: nobody waits for that
	noted  int64         // refusals for other reasons than money, and failures, since the start
	dense  bool          // a prompt of this fork had more tokens than were reserved for it

	patience context.Context // done when calls under way are to be cut off; see Settle
	cut      context.CancelFunc
}

// name is how the fork is told from all others.
func (f *forkAccount) name() string { return f.run.name + "/" + strconv.Itoa(f.num) }

// purses lists the budgets that a fork's call is paid from.
func (f *forkAccount) purses() [2]*purse { return [2]*purse{&f.purse, &f.run.purse} }

// account returns the accounts of a fork, making them first if need be. The
// caller holds g.mu.
func (g *Gateway) account(run string, num int) *forkAccount {
	r := g.runs[run]
	if r == nil {
		r = &runAccount{name: run, forks: make(map[int]*forkAccount)}
		g.runs[run] = r
	}
	f := r.forks[num]
	if f == nil {
		f = &forkAccount{run: r, num: num}
		f.patience, f.cut = context.WithCancel(context.Background())
		r.forks[num] = f
	}
	return f
}

// restore makes the balances from the ledger.
func (g *Gateway) restore(ctx context.Context) error {
	crashed, err := g.ledger.settleCrashed(ctx, time.Now())
	if err != nil {
		return err
	}
	if crashed > 0 {
		g.log.Warn("calls were in flight when the gateway last died; they are charged at their reservations", "calls", crashed)
	}
	if g.lastID, err = g.ledger.lastCall(ctx); err != nil {
		return ledgerFault("read ledger", err)
	}
	err = g.ledger.balances(ctx, func(run string, num int, s Spent) {
		f := g.account(run, num)
		for _, p := range f.purses() {
			p.spent = p.spent.add(s)
		}
	})
	if err != nil {
		return ledgerFault("read ledger", err)
	}
	err = g.ledger.grants(ctx, func(row granted) {
		f := g.account(row.account.Run, row.account.Fork)
		for _, p := range f.purses() {
			p.spent.Refused += row.refused
		}
		f.budget, f.run.budget = row.account.ForkBudget, row.account.RunBudget
		gr := &grant{hash: row.hash, fork: f, patience: f.patience, revoked: row.revoked}
		g.tokens[row.hash] = gr
		if !row.revoked {
			f.grant = gr
		}
	})
	if err != nil {
		return ledgerFault("read ledger", err)
	}
	return nil
}

// Grant gives a fork a token, which agents use as their API key. The token is
// random; only its hash is kept, so it cannot be had a second time. It is good
// until it is revoked, also after a restart of the gateway. A second Grant for
// the same fork revokes the earlier token, so whoever attaches to an agent that
// runs on must not call it. The budgets of the latest Grant of a run, or fork,
// count, and money that was spent before counts against them.
//
// The kind of the error is Invalid for an account that cannot be, Full when the
// ledger's disk is, and Unavailable when the gateway is closed.
func (g *Gateway) Grant(ctx context.Context, a Account) (token string, err error) {
	const op = "grant token"
	if a.Run == "" || a.Fork < 1 || a.RunBudget < 0 || a.ForkBudget < 0 {
		return "", fault.New(op, fault.Invalid, "run %q, fork %d, budgets %s and %s", a.Run, a.Fork, a.RunBudget, a.ForkBudget)
	}
	if err := ctx.Err(); err != nil {
		return "", &fault.Error{Op: op, Kind: fault.Cancelled, Err: err}
	}
	var secret [32]byte
	rand.Read(secret[:]) // it crashes the program rather than fail
	token = tokenPrefix + base64.RawURLEncoding.EncodeToString(secret[:])
	hash := hashToken(token)

	g.granting.Lock()
	defer g.granting.Unlock()
	if err := g.record(g.ledger.grantToken(hash, a, time.Now())); err != nil {
		return "", fault.Wrap(op, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.account(a.Run, a.Fork)
	f.dismiss()
	if f.patience.Err() != nil { // the account was settled and is opened again
		f.patience, f.cut = context.WithCancel(context.Background())
	}
	f.grant = &grant{hash: hash, fork: f, patience: f.patience}
	f.budget, f.run.budget = a.ForkBudget, a.RunBudget
	g.tokens[hash] = f.grant
	g.serve(f.run)
	return token, nil
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
	if r := g.runs[run]; r != nil && r.forks[num] != nil {
		r.forks[num].dismiss()
		g.serve(r)
	}
	g.mu.Unlock()
	return fault.Wrap(op, g.record(g.ledger.revokeFork(run, num, time.Now())))
}

// Settle returns when no call of the fork is under way, so that what Usage
// says after a Revoke is final. Calls that go on for longer than patience are
// cut off then, and charged as those are whose end nobody saw.
func (g *Gateway) Settle(ctx context.Context, run string, num int, patience time.Duration) error {
	g.mu.Lock()
	r := g.runs[run]
	if r == nil || r.forks[num] == nil || r.forks[num].active == 0 {
		g.mu.Unlock()
		return nil
	}
	f := r.forks[num]
	if f.quiet == nil {
		f.quiet = make(chan struct{})
	}
	quiet, cut := f.quiet, f.cut
	g.mu.Unlock()
	defer time.AfterFunc(patience, cut).Stop()
	select {
	case <-quiet:
		return nil
	case <-ctx.Done():
		return &fault.Error{Op: "settle account", Kind: fault.Cancelled, Err: ctx.Err()}
	}
}

// dismiss makes the fork's token bad. The caller holds g.mu.
func (f *forkAccount) dismiss() {
	if f.grant != nil {
		f.grant.revoked = true
		f.grant = nil
	}
}

// record appends an entry and waits until it is on the disk.
func (g *Gateway) record(e *entry) error {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return fault.New("write ledger", fault.Unavailable, "the gateway is closed")
	}
	g.active.Add(1)
	g.ledger.append(e)
	g.mu.Unlock()
	defer g.active.Done()
	return <-e.done
}

// Usage returns what a fork has spent, or the whole run when num is 0. Of a run
// that made no call it returns zeros.
func (g *Gateway) Usage(ctx context.Context, run string, num int) (Spent, error) {
	if err := ctx.Err(); err != nil {
		return Spent{}, &fault.Error{Op: "read usage", Kind: fault.Cancelled, Err: err}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.runs[run]
	switch {
	case r == nil:
		return Spent{}, nil
	case num == 0:
		return r.spent, nil
	case r.forks[num] == nil:
		return Spent{}, nil
	}
	return r.forks[num].spent, nil
}
