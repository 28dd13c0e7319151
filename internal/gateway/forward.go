package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/governor"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// A forwarding is one call on its way to the API and back.
type forwarding struct {
	g        *Gateway
	w        http.ResponseWriter
	out      *http.ResponseController // of w
	in       *http.Request
	ctx      context.Context // of the upstream call
	cancel   context.CancelCauseFunc
	maker    Maker
	cred     Credentials
	base     *url.URL
	body     []byte
	tenant   *tenant
	patience context.Context // the fork's, when the call came
	call     *call           // nil for a call that costs nothing
	request  *request        // nil for a call that costs nothing
	batch    *order          // nil: it makes none, or the API has it
	path     string          // the API's, as the agent writes it
	query    string
	pace     string // whose pace it goes at, when that is no model's; empty: nobody's
	outside  string // the gateway's address, as the agent sees it

	gone    atomic.Bool // the agent went away
	leave   func()      // to be called when the agent went away
	dialing atomic.Bool // the transport looks for a connection
	linked  atomic.Bool // it has one, so the request may be on its way
}

var (
	errNoHeader = errors.New("the model API did not answer in time")
	errIdle     = errors.New("the model API stopped in the middle of its answer")
	errGone     = errors.New("the agent went away")
	errClosing  = errors.New("the gateway closes")
)

// run makes the call. However it ends, also by a panic, it is settled: what is
// not known to be cheaper costs its reservation.
func (f *forwarding) run() {
	defer f.charge(whole, ledger.Settlement{State: ledger.Failed, Note: "ended without an account"})
	defer f.begin()()
	res, err := f.send()
	if err != nil {
		f.unanswered(err)
		return
	}
	defer res.Body.Close() // it was read as far as it is of use
	body, unwatch := f.watch(res)
	defer unwatch()
	encoding := res.Header.Get("Content-Encoding")
	switch {
	case res.StatusCode/100 != 2:
		f.refusedUpstream(res, body)
	case f.call == nil:
		f.pass(res, body)
	case res.StatusCode != http.StatusOK || encoding != "" && encoding != "identity":
		// It was asked for something else. What cannot be read is charged as
		// dearly as it can be.
		f.charge(whole, f.answered(res, "an answer that cannot be read"))
		f.pass(res, body)
	case isStream(res):
		f.stream(res, body)
	default:
		f.answer(res, body)
	}
}

// watch gives an answer's body, whose silence ends the call.
func (f *forwarding) watch(res *http.Response) (body io.Reader, unwatch func()) {
	idle := time.AfterFunc(f.g.limits.idle, func() { f.cancel(errIdle) })
	return &watched{from: res.Body, timer: idle, limit: f.g.limits.idle}, func() { idle.Stop() }
}

// begin makes what the call is cut off by. What it returns is to be called at
// the call's end.
func (f *forwarding) begin() (end func()) {
	// An answer whose agent goes away is read on for a while: what it costs is
	// told at its end, and an agent that could make calls cheaper by leaving
	// them would have a way around its budget.
	f.ctx, f.cancel = context.WithCancelCause(context.WithoutCancel(f.in.Context()))
	open := context.AfterFunc(f.g.closing, func() { f.cancel(errClosing) })
	patient := context.AfterFunc(f.patience, func() { f.cancel(errGone) })
	drain := time.AfterFunc(time.Hour, func() { f.cancel(errGone) })
	drain.Stop()
	making := f.batch != nil
	f.leave = func() {
		switch {
		case f.gone.Swap(true):
		case making: // it takes no longer than its request does, and is made in any case
		case f.call == nil:
			f.cancel(errGone)
		default:
			drain.Reset(f.g.limits.drain)
		}
	}
	stay := context.AfterFunc(f.in.Context(), f.leave)
	return func() {
		// A deadline stays with the connection, which the agent may use again.
		f.out.SetWriteDeadline(time.Time{}) //nolint:errcheck // not every server has one
		stay()
		drain.Stop()
		patient()
		open()
		f.cancel(nil)
	}
}

// errPace is a call that the governor could not let through in time.
var errPace = errors.New("the model API takes no more calls for now")

// send makes the call at the pace of the fleet. What the API refuses because
// it came too fast costs nothing and is sent again, for as long as an agent
// tolerates silence; then the agent is told, and tries again by itself.
func (f *forwarding) send() (*http.Response, error) {
	pace := f.pace
	switch {
	case f.call != nil:
		pace = f.g.prices.pace(f.call.model)
	case pace == "":
		return f.try() // counts against other limits, of which little is known
	}
	patience, cancel := context.WithTimeoutCause(f.ctx, f.g.limits.wait, errPace)
	defer cancel()
	var last *http.Response // that refused the call
	var waited time.Duration
	defer func() { f.g.observer.paced(waited) }()
	for {
		asked := time.Now()
		permit, err := f.g.governor.Acquire(patience, pace, f.tenant.name(), 1)
		waited += time.Since(asked)
		if errors.Is(err, errPace) && last != nil {
			return last, nil
		}
		if err != nil {
			return nil, err
		}
		res, err := f.try()
		if err != nil {
			permit.Done(0, nil)
			return nil, err
		}
		told := res.Header
		if f.call == nil {
			told = untoken(told)
		}
		permit.Done(res.StatusCode, told)
		again := res.StatusCode == http.StatusTooManyRequests || res.StatusCode == governor.StatusOverloaded
		if again {
			f.g.observer.limited(res.StatusCode)
		}
		if !again || res.Header.Get("X-Should-Retry") == "false" {
			return res, nil
		}
		text, err := io.ReadAll(io.LimitReader(res.Body, maxError))
		_ = res.Body.Close()
		if err != nil {
			text = nil // the status says enough
		}
		last, res.Body = res, io.NopCloser(bytes.NewReader(text))
	}
}

// try sends the call once. From the answer's header on, it is silence that
// ends a call.
func (f *forwarding) try() (*http.Response, error) {
	watch := time.AfterFunc(f.g.limits.header, func() { f.cancel(errNoHeader) })
	f.dialing.Store(false)
	f.linked.Store(false)
	res, err := f.g.transport.RoundTrip(f.upstream())
	if !watch.Stop() {
		<-f.ctx.Done()
	}
	return res, err
}

func isStream(res *http.Response) bool {
	t, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	return err == nil && t == "text/event-stream"
}

// upstream is the request that goes to the API.
func (f *forwarding) upstream() *http.Request {
	target := *f.base
	path := f.path
	if f.maker == OpenAI {
		path = strings.TrimPrefix(path, openAIPath)
	}
	target.Path = strings.TrimRight(f.base.Path, "/") + path
	target.RawPath = ""
	target.RawQuery = f.query
	out := &http.Request{
		Method:     f.in.Method,
		URL:        &target,
		Host:       target.Host,
		Proto:      "HTTP/1.1",
		ProtoMajor: 1,
		ProtoMinor: 1,
		Header:     requestHeader(f.in.Header, f.cred),
	}
	if f.pace == batchPace {
		// The gateway finds a batch again where the key leads to.
		for key := range out.Header {
			if strings.HasPrefix(key, "Anthropic-Workspace") {
				delete(out.Header, key)
			}
		}
	}
	if f.in.Method == http.MethodPost && f.body != nil {
		out.Header.Set("Content-Type", "application/json")
		out.ContentLength = int64(len(f.body))
		out.Body = io.NopCloser(bytes.NewReader(f.body))
		// With it, a connection that the API closed while it was idle is
		// replaced without anybody noticing. Go does so only when nothing of
		// the request was written, so nothing is paid twice.
		out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(f.body)), nil }
	}
	return out.WithContext(httptrace.WithClientTrace(f.ctx, &httptrace.ClientTrace{
		GetConn: func(string) { f.dialing.Store(true) },
		GotConn: func(httptrace.GotConnInfo) { f.linked.Store(true) },
	}))
}

// A bound is a part of the reservation that a call is charged when its usage
// was not told.
type bound int

const (
	nothing bound = iota // the call was not processed
	prompt               // its prompt may have been read, no answer was seen
	whole                // all of it may have been done
)

// charge settles the call at a part of its reservation.
func (f *forwarding) charge(b bound, s ledger.Settlement) {
	if f.batch != nil {
		f.batch.charge(b, s)
		return
	}
	if f.call == nil {
		return
	}
	switch b {
	case prompt:
		s.Cost = min(f.call.ask.Fixed, f.call.Reserved)
		s.Note += ": charged for the prompt that was reserved"
	case whole:
		s.Cost = f.call.Reserved
		s.Note += ": charged at its reservation"
	}
	f.call.settle(s)
}

// bill settles the call by what it used.
func (f *forwarding) bill(model string, t Tokens, s ledger.Settlement) {
	s.Tokens = t
	f.g.prompts.learn(tenantKey{f.tenant.run, f.tenant.num}, f.request, f.call.marks, t.Prompt())
	s.Cost = f.price(model, t)
	s.Model = shorten(model)
	f.call.settle(s)
}

// price returns what t costs. The API may have let another model answer than
// was asked: one that the call named is billed at its price, and for one that
// it did not name the dearest of all of them counts.
func (f *forwarding) price(model string, t Tokens) fork.USD {
	prices := f.g.prices
	id, known := prices.Resolve(model)
	var most fork.USD
	for _, name := range f.request.models() {
		if asked, ok := prices.Resolve(name); known && ok && asked == id {
			return prices.Cost(id, t)
		}
		most = max(most, prices.Cost(name, t))
	}
	if known {
		most = max(most, prices.Cost(id, t))
	}
	return most
}

// answered begins the settlement of a call that the API answered.
func (f *forwarding) answered(res *http.Response, note string) ledger.Settlement {
	return ledger.Settlement{State: ledger.Settled, Status: res.StatusCode, RequestID: requestID(res.Header), Note: note}
}

// unanswered ends a call that has no answer. When no connection was made it
// costs nothing. Otherwise the API may have worked on it: on the prompt if the
// answer is a stream, because a stream begins before the first token of the
// answer does, and on all of it if it is not.
func (f *forwarding) unanswered(err error) {
	cause := context.Cause(f.ctx)
	s := ledger.Settlement{State: ledger.Failed, Note: "no answer"}
	dial, ok := errors.AsType[*net.OpError](err)
	switch {
	case errors.Is(err, errPace):
		s.Note = "waited for the API's limits"
		f.charge(nothing, s)
	case ok && dial.Op == "dial", f.dialing.Load() && !f.linked.Load():
		s.Note = "no connection"
		f.charge(nothing, s)
	case f.request != nil && f.request.stream:
		f.charge(prompt, s)
	default:
		f.charge(whole, s)
	}
	if f.gone.Load() {
		return // nobody listens
	}
	r := refuse(http.StatusBadGateway, "api_error", "The gateway cannot reach the model API.")
	switch {
	case errors.Is(err, errPace):
		r = refuse(http.StatusTooManyRequests, "rate_limit_error", "The model API's rate limit is used up by this fleet; the call waited for "+f.g.limits.wait.String()+".")
		r.after = paceRetry
	case errors.Is(cause, errClosing):
		r = refuse(http.StatusServiceUnavailable, "api_error", "The gateway is closing.")
	case errors.Is(cause, errNoHeader):
		r = refuse(http.StatusGatewayTimeout, "timeout_error", "The model API did not answer in time.")
	case distrusted(err):
		// Trying again does not help.
		r = forbid(http.StatusBadGateway, "api_error", "The gateway does not trust the certificate of the model API: SSL_CERT_FILE, in the environment of the engine or the worker, names a file of authorities.")
		f.g.note(f.tenant, "the certificate of the model API is not trusted", "error", f.cred.redact(err.Error()))
	default:
		// The agent is not told more: the text may name hosts of this network.
		f.g.note(f.tenant, "the model API cannot be reached", "error", f.cred.redact(err.Error()))
	}
	f.g.turnAway(f.w, r)
}

func distrusted(err error) bool {
	_, ok := errors.AsType[*tls.CertificateVerificationError](err)
	return ok
}

// paceRetry is when an agent may come back that has waited in vain.
const paceRetry = 5 * time.Second

// maxError bounds the body of an error, in bytes.
const maxError = 1 << 20

// refusedUpstream passes an error of the API on. It costs nothing. Status and
// body are the API's own, so that agents can wait and try again as they do
// without a gateway; only a refused key is final, for agents would try it for
// minutes.
func (f *forwarding) refusedUpstream(res *http.Response, body io.Reader) {
	s := f.answered(res, "")
	s.State = ledger.Failed
	f.charge(nothing, s)
	text, err := io.ReadAll(io.LimitReader(body, maxError))
	if err != nil && f.ctx.Err() != nil {
		text = nil // the status says enough
	}
	if f.cred.within(text) {
		text = []byte(f.cred.redact(string(text)))
	}
	h := f.w.Header()
	responseHeader(h, res.Header, f.cred)
	if res.StatusCode == http.StatusUnauthorized {
		h.Set("X-Should-Retry", "false")
		f.g.note(f.tenant, "the model API refuses the key")
		f.g.deny(f.tenant)
	}
	h.Set("Content-Length", strconv.Itoa(len(text)))
	f.w.WriteHeader(res.StatusCode)
	f.put(text) //nolint:errcheck // the agent is gone
}

// answer passes an answer on that is no stream. It is read whole and settled
// first, so that an agent's next call finds the money of this one.
func (f *forwarding) answer(res *http.Response, body io.Reader) {
	text, err := io.ReadAll(io.LimitReader(body, f.g.limits.answer+1))
	if err != nil || int64(len(text)) > f.g.limits.answer {
		f.charge(whole, f.answered(res, "its answer broke off"))
		if !f.gone.Load() {
			f.g.turnAway(f.w, refuse(http.StatusBadGateway, "api_error", "The answer of the model API broke off."))
		}
		return
	}
	if model, t, ok := f.usageOf(text); ok {
		f.bill(model, t, f.answered(res, ""))
	} else {
		f.charge(whole, f.answered(res, "its answer tells no usage"))
	}
	h := f.w.Header()
	responseHeader(h, res.Header, f.cred)
	h.Set("Content-Length", strconv.Itoa(len(text)))
	f.w.WriteHeader(res.StatusCode)
	f.put(text) //nolint:errcheck // the agent is gone
}

// stream passes server-sent events on as they come and meters them.
func (f *forwarding) stream(res *http.Response, body io.Reader) {
	m := f.meterOf()
	defer func() { f.settleStream(m, res) }()
	f.copy(res, body, func(p []byte) {
		m.Write(p) //nolint:errcheck // it never fails
		if m.state().ended {
			// Before the agent sees the end, so that its next call finds the
			// money of this one.
			f.settleStream(m, res)
		}
	})
}

func (f *forwarding) settleStream(from meter, res *http.Response) {
	from.close()
	m := from.state()
	t, note, ok := m.outcome(f.call.Output)
	s := f.answered(res, note)
	switch {
	case ok:
		f.bill(m.model, t, s)
	case m.broken:
		f.charge(whole, s)
	case m.failed: // an error came in place of an answer
		s.State = ledger.Failed
		f.charge(nothing, s)
	default: // broke off before it began
		s.State = ledger.Failed
		f.charge(prompt, s)
	}
}

// pass copies an answer that is not metered.
func (f *forwarding) pass(res *http.Response, body io.Reader) {
	f.copy(res, body, func([]byte) {})
}

// copy passes an answer on piece by piece and shows each piece to see first.
// An answer that breaks off breaks off for the agent too: it must not take half
// of it for the whole.
func (f *forwarding) copy(res *http.Response, body io.Reader, see func([]byte)) {
	responseHeader(f.w.Header(), res.Header, f.cred)
	if res.ContentLength >= 0 {
		f.w.Header().Set("Content-Length", strconv.FormatInt(res.ContentLength, 10))
	}
	f.w.WriteHeader(res.StatusCode)
	if f.out.Flush() != nil {
		f.leave()
	}
	buf := make([]byte, 32<<10)
	var r rush
	for {
		n, err := body.Read(buf)
		if n > 0 {
			r.calm(n, time.Now())
			see(buf[:n])
			if !f.gone.Load() && f.put(buf[:n]) != nil {
				f.leave()
			}
		}
		switch {
		case err == io.EOF:
			return
		case err != nil:
			panic(http.ErrAbortHandler)
		}
	}
}

// A rush is a stream whose pieces come faster than any model speaks. Each of
// them wakes us and then the agent, which takes longer than to pass on many of
// them at once.
type rush struct {
	pieces int // that came right after one another
	last   time.Time
}

// calm lets more of a rush gather, for a time that nobody notices.
func (r *rush) calm(n int, now time.Time) {
	const near, many, small, wait = 100 * time.Microsecond, 16, 8 << 10, 100 * time.Microsecond
	if n >= small || now.Sub(r.last) > near {
		r.pieces = 0
	}
	r.last = now
	if r.pieces++; r.pieces > many {
		time.Sleep(wait)
		r.last = time.Now()
	}
}

// put writes one piece and sees to it that it leaves. An agent that does not
// take it in time is given up.
func (f *forwarding) put(p []byte) error {
	f.out.SetWriteDeadline(time.Now().Add(f.g.limits.write)) //nolint:errcheck // not every server has one
	if _, err := f.w.Write(p); err != nil {
		return fmt.Errorf("write to the agent: %w", err)
	}
	return f.out.Flush()
}

// A watched body puts the watch off each time something comes.
type watched struct {
	from  io.Reader
	timer *time.Timer
	limit time.Duration
}

func (b *watched) Read(p []byte) (int, error) {
	n, err := b.from.Read(p)
	b.timer.Reset(b.limit)
	return n, err
}
