// Package gateway stands between the agents and the model API: it meters every
// call, keeps every budget, and is the only one that holds the real key.
//
// An agent reaches the API through [Gateway] with a token that is good for one
// fork and nothing else. Each call goes through the same steps:
//
//	token -> allow-list -> read the body -> reserve -> pace -> forward -> meter -> settle
//
// Reserve writes the most that the call can cost into the ledger before one
// byte goes out; settle replaces it by what the answer's usage comes to. What
// is spent and what is reserved never exceed a budget together, so parallel
// forks cannot overspend it, and a crash in the middle of a call leaves the
// reservation behind as its price. A message batch outlives all of that: its
// reservation stays until its results were seen.
//
// # What the promise rests on
//
// A budget holds as long as no call costs more than was reserved for it. The
// number of output tokens is bounded exactly, by max_tokens. Input has at most a
// token for each byte of the body; where it is the same as in one that was
// answered before, what that one had says more: see prompts. What is assumed
// of pictures, documents and server tools stands beside estimate.
package gateway

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/governor"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// Credentials are the real ones. They are never written to the ledger, to a
// log or into an error.
type Credentials struct {
	APIKey    string // sent as x-api-key; not used when AuthToken is set
	AuthToken string // sent as Authorization: Bearer
	BaseURL   string // http or https; empty: https://api.anthropic.com

	OpenAIKey     string // for agents that speak OpenAI's API
	OpenAIBaseURL string // http or https, with the path; empty: https://api.openai.com/v1
}

// Options say where a gateway keeps its ledger and whom it forwards to.
type Options struct {
	// Ledger says where the money is kept; its Dir is required. Its Logger is
	// the gateway's when it has none.
	Ledger ledger.Options

	// Credentials is required and asked for each call, so that a key which
	// came later works. Empty credentials are no error: the call is answered
	// with 401 and the agent stops.
	Credentials func(context.Context) (Credentials, error)

	// Prices is required; see [LoadPrices].
	Prices *Prices

	// AllowUnpriced lets calls to models pass that Prices does not know. They
	// are priced like the dearest one. The zero value refuses them.
	AllowUnpriced bool

	// MaxOutput is the most output tokens that one call may ask for; a greater
	// max_tokens is lowered to it. 0: 32000.
	MaxOutput int

	// Rate is how many calls a second each model gets before the API's answers
	// have shown what it takes. 0: 8.
	Rate float64

	// Logger gets one line for each settled call (debug) and each refused one
	// (info). Nil: nothing is logged.
	Logger *slog.Logger

	// Observer is told what happens to calls. The zero value is told nothing.
	Observer Observer

	// NetURL is the address of [Gateway.ServeNet] as sandboxes elsewhere see it.
	// Empty: https, and the host that they name.
	NetURL string

	// Transport makes the upstream calls. Nil: HTTP/1.1 with bounded idle
	// connections through the proxy that the environment names.
	Transport http.RoundTripper

	// Tracer records a span for each call. Nil: none is recorded.
	Tracer trace.Tracer

	now func() time.Time // of the age of batches; tests set it
}

// A Gateway is an [http.Handler] that meters. All its methods may be called
// from many goroutines.
type Gateway struct {
	prices        *Prices
	allowUnpriced bool
	maxOutput     int64
	credentials   func(context.Context) (Credentials, error)
	transport     http.RoundTripper
	governor      *governor.Governor
	log           *slog.Logger
	observer      Observer
	limits        limits
	ledger        *ledger.Ledger
	shared        bool // other gateways use the ledger too
	dayBudget     fork.USD
	netURL        string
	now           func() time.Time

	closing context.Context // done when Close begins
	stop    context.CancelFunc
	active  sync.WaitGroup // calls that a handler works on
	tending sync.WaitGroup // the goroutine that sees to batches

	granting sync.Mutex // held through a whole Grant or Revoke

	spans   spans
	prompts *prompts
	lookups chan struct{} // bounds how many tokens are looked up at once

	mu      sync.Mutex
	closed  bool
	tokens  map[ledger.Hash]*grant
	tenants map[tenantKey]*tenant
	unknown int64 // calls with a token that is not good, since the start

	// What the observer was told is held for batches that are not settled.
	pending map[string]fork.USD
}

// limits bound what one call may take. Tests shorten them.
type limits struct {
	body     int64         // bytes of a request
	answer   int64         // bytes of an answer that is no stream
	ask      time.Duration // for the header of a request
	between  time.Duration // for the next request on a connection
	upload   time.Duration // for the whole body of a request
	header   time.Duration // from the request until the upstream's status line
	idle     time.Duration // between two reads of an answer
	drain    time.Duration // for an answer to go on whose agent went away
	write    time.Duration // for the agent to take one piece of an answer
	wait     time.Duration // for other calls to settle
	hold     time.Duration // for somebody to add money, before the agent has to ask again
	trust    time.Duration // in what the ledger last said of a token
	parallel int           // calls of one fork at a time

	elsewhere time.Duration // for other gateways to end their calls of a fork
	tend      time.Duration // between two looks for batches that nobody has settled
}

// The header limit is the agents' own (x-stainless-timeout: 600): an answer
// that is no stream begins only when it is whole. A call waits no longer than
// an agent tolerates silence: Claude Code 2.1.330 was seen to give a request up
// after 360 s without a byte, whatever API_TIMEOUT_MS says.
func defaultLimits() limits {
	return limits{
		body:     40 << 20,
		answer:   64 << 20,
		ask:      10 * time.Second,
		between:  2 * time.Minute,
		upload:   2 * time.Minute,
		header:   10 * time.Minute,
		idle:     3 * time.Minute,
		drain:    10 * time.Second,
		write:    2 * time.Minute,
		wait:     2 * time.Minute,
		hold:     4 * time.Minute,
		trust:    10 * time.Second,
		parallel: 32,

		elsewhere: 15 * time.Second,
		tend:      time.Minute,
	}
}

const defaultMaxOutput = 32000

var _ http.Handler = (*Gateway)(nil)

// Open opens the ledger, making or upgrading it first. Calls that were in flight
// when the last gateway died are settled at their reservation and marked
// crashed; batches that the API had accepted are found again. Tokens that were granted and not revoked work again.
//
// The kind of the error is Invalid for options that cannot be, otherwise that of
// [ledger.Open].
func Open(ctx context.Context, o Options) (*Gateway, error) {
	const op = "open gateway"
	switch {
	case o.Credentials == nil:
		return nil, fault.New(op, fault.Invalid, "nobody to ask for credentials")
	case o.Prices == nil:
		return nil, fault.New(op, fault.Invalid, "no prices")
	case o.MaxOutput < 0:
		return nil, fault.New(op, fault.Invalid, "a negative number of output tokens")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.Transport == nil {
		o.Transport = defaultTransport()
	}
	g := &Gateway{
		prices:        o.Prices,
		allowUnpriced: o.AllowUnpriced,
		maxOutput:     int64(cmp.Or(o.MaxOutput, defaultMaxOutput)),
		credentials:   o.Credentials,
		transport:     o.Transport,
		governor:      governor.New(governor.Options{Rate: o.Rate}),
		log:           o.Logger,
		observer:      o.Observer,
		limits:        defaultLimits(),
		shared:        o.Ledger.URL != "",
		dayBudget:     o.Ledger.DayBudget,
		netURL:        strings.TrimRight(o.NetURL, "/"),
		now:           o.now,
		prompts:       newPrompts(),
		lookups:       make(chan struct{}, 4),
		tokens:        make(map[ledger.Hash]*grant),
		tenants:       make(map[tenantKey]*tenant),
		pending:       make(map[string]fork.USD),
	}
	g.spans.tracer = o.Tracer
	g.closing, g.stop = context.WithCancel(context.Background())
	if o.Ledger.Logger == nil {
		o.Ledger.Logger = o.Logger
	}
	o.Ledger.Revoked = g.abandon
	var err error
	if g.ledger, err = ledger.Open(ctx, o.Ledger); err != nil {
		return nil, fault.Wrap(op, err)
	}
	if err := g.recall(ctx); err != nil {
		return nil, errors.Join(fault.Wrap(op, err), g.ledger.Close())
	}
	g.tending.Go(g.tend)
	return g, nil
}

// ModelID returns the full id of a model that users name by an alias, or ""
// when the price table does not know it.
func (g *Gateway) ModelID(model string) string {
	id, _ := g.prices.Resolve(model)
	return id
}

// Close cuts the calls that are under way, settles them and closes the ledger.
// A second Close does nothing.
func (g *Gateway) Close() error {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil
	}
	g.closed = true
	g.mu.Unlock()
	g.stop()
	g.active.Wait()
	g.tending.Wait()
	return fault.Wrap("close gateway", g.ledger.Close())
}

// Serve answers on ln until ctx is done, then gives the calls under way a
// moment to end, and cuts them. It returns nil when ctx ended it, and closes
// ln in any case. It may be called for several listeners. Any token is good on
// it, as with ServeHTTP.
func (g *Gateway) Serve(ctx context.Context, ln net.Listener) error { return g.serveOn(ctx, ln, g) }

func (g *Gateway) serveOn(ctx context.Context, ln net.Listener, h http.Handler) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: g.limits.ask,
		IdleTimeout:       g.limits.between,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
	}
	drained := make(chan struct{})
	unwatch := context.AfterFunc(ctx, func() {
		defer close(drained)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
		defer cancel()
		if s.Shutdown(grace) != nil {
			s.Close() //nolint:errcheck // the connections are being cut
		}
	})
	err := s.Serve(ln)
	if !unwatch() {
		<-drained
	}
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return &fault.Error{Op: "serve gateway", Kind: fault.Unavailable, Err: err}
}

const shutdownGrace = 3 * time.Second

// defaultTransport speaks HTTP/1.1 only: over HTTP/2 all forks would share one
// connection, and one lost packet or one GOAWAY would hit all of their streams.
func defaultTransport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		Protocols:              protocols,
		TLSHandshakeTimeout:    10 * time.Second,
		MaxIdleConns:           256,
		MaxIdleConnsPerHost:    256,
		IdleConnTimeout:        60 * time.Second,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 256 << 10,
		DisableCompression:     true,
		WriteBufferSize:        64 << 10,
		ReadBufferSize:         32 << 10,
	}
}
