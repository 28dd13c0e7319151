package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/governor"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// Message batches are requests that the API carries out by itself, within a day,
// at a share of the price. What they cost is told by their results and nowhere
// else, long after the call that made them, maybe after its fork and its gateway:
//
//	reserve -> make -> the ledger has the API's name for it -> results -> settle
//
// Until the results were seen, whole, the batch stays reserved; see also tend.

const (
	batchesPath = messagesPath + "/batches"

	// batchPace is the pace of everything about batches. The API limits it apart
	// from the models, and apart from their tokens.
	batchPace = "message batches"
)

// An order is a batch that is being made.
type order struct {
	*ledger.Batch
	g        *Gateway
	tenant   *tenant
	requests int
}

// charge settles every call of the batch at a part of its reservation. Of a batch
// it is all or nothing.
func (o *order) charge(b bound, s ledger.Settlement) {
	if b != nothing {
		s.Note += ": charged at its reservation"
	}
	for _, c := range o.Calls {
		one := s
		if b != nothing {
			one.Cost = c.Reserved
		}
		if c.Settle(one) {
			o.g.told(c, o.tenant.run, o.tenant.num, one, c.Reserved)
		}
	}
}

// meterBatch reads what the new batch may cost and reserves it.
func (f *forwarding) meterBatch(gr *grant) (held bool, _ *refusal) {
	g := f.g
	all, err := readBatch(f.body)
	if err != nil {
		return false, forbid(http.StatusBadRequest, "invalid_request_error", "The gateway cannot read the batch: "+err.Error()+".")
	}
	for i, q := range all {
		if refused := g.unpriced(q.request, gr); refused != nil {
			refused.message = "Request " + strconv.Itoa(i+1) + " of the batch: " + refused.message
			return false, refused
		}
		if q.endless {
			const why = "A tool that runs at the API has no max_uses; in a batch nobody bounds how often it runs, so it cannot be metered."
			g.note(gr.tenant, "call refused: unpriced feature", "why", why)
			return false, forbid(http.StatusForbidden, "permission_error", "Request "+strconv.Itoa(i+1)+" of the batch: "+why)
		}
	}
	parts := g.prices.parts(all, g.maxOutput)
	if len(parts) > maxBatchModels {
		return false, forbid(http.StatusBadRequest, "invalid_request_error", fmt.Sprintf("The batch names more than %d models.", maxBatchModels))
	}
	model := parts[0].Model
	if len(parts) > 1 {
		model += " and others"
	}
	o := &order{g: g, tenant: gr.tenant, requests: len(all)}
	held, refused := g.set(f.in.Context(), gr.tenant, model, func(ctx context.Context, r ledger.Request) (err error) {
		r.Token, r.Path, r.Attempt = gr.hash, f.path, retries(f.in.Header)
		o.Batch, err = g.ledger.ReserveBatch(ctx, r, parts)
		return err
	})
	if refused != nil {
		return held, refused
	}
	for _, c := range o.Calls {
		g.observer.reserved(c.Reserved)
	}
	f.batch, f.pace = o, batchPace
	f.body = clampBatch(f.body, all, g.maxOutput)
	return held, nil
}

// make makes the batch. However it ends, nothing is forgotten: either the ledger
// has the API's name for it, or it is settled.
func (f *forwarding) make() {
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
	s := f.answered(res, "")
	s.State = ledger.Failed
	if res.StatusCode/100 != 2 {
		// An error of a server in between does not say that there is no batch.
		if res.StatusCode >= http.StatusInternalServerError && res.StatusCode != governor.StatusOverloaded {
			s.Note = "the API may have made a batch"
			f.charge(whole, s)
		}
		f.refusedUpstream(res, body)
		return
	}
	text, err := io.ReadAll(io.LimitReader(body, f.g.limits.answer))
	var made struct {
		ID   string `json:"id"`
		Type string `json:"type"`
	}
	if err != nil || json.Unmarshal(text, &made) != nil || made.Type != "message_batch" || !batchID(made.ID) {
		s.Note = "the answer names no batch"
		f.charge(whole, s)
		f.g.turnAway(f.w, refuse(http.StatusBadGateway, "api_error", "The answer of the model API names no batch."))
		return
	}
	if err := f.g.accept(f.batch, made.ID); err != nil {
		s.Note = "the ledger could not take the batch " + made.ID
		f.charge(whole, s)
		f.g.log.Warn("a batch is cancelled because the ledger cannot take it", "run", f.tenant.run, "fork", f.tenant.num, "batch", made.ID, "error", err)
		f.g.cancelBatch(f.ctx, made.ID) //nolint:errcheck // it is paid for
		f.g.turnAway(f.w, refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot write its ledger: the batch is cancelled."))
		return
	}
	f.batch = nil
	f.reply(res, f.own(made.ID, text))
}

// accept writes the batch into the ledger and returns when it is on the disk.
func (g *Gateway) accept(o *order, id string) error {
	if err := o.Accept(context.Background(), id, o.requests); err != nil {
		return err
	}
	g.mu.Lock()
	g.pending[id] = o.Reserved()
	g.mu.Unlock()
	g.log.Debug("batch accepted", "run", o.tenant.run, "fork", o.tenant.num, "batch", id, "requests", o.requests, "reserved", o.Reserved().String())
	return nil
}

// batch returns the fork's batch. One of another fork is not there.
func (g *Gateway) batch(ctx context.Context, t *tenant, id string) (*ledger.Batch, *refusal) {
	b, err := g.ledger.Batch(ctx, t.run, t.num, id)
	switch fault.KindOf(err) {
	case "":
		return b, nil
	case fault.NotFound:
		return nil, forbid(http.StatusNotFound, "not_found_error", "There is no such message batch.")
	}
	g.log.Warn("a batch cannot be looked up", "error", err)
	return nil, refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot read its ledger.")
}

// errand passes a call on that is about batches which were made before.
func (f *forwarding) errand(what errand, b *ledger.Batch) {
	defer f.begin()()
	f.pace = batchPace
	switch what {
	case listing:
		f.list()
		return
	case deleting:
		// With the batch goes what says what it did cost.
		if refused := f.settled(b); refused != nil {
			f.g.turnAway(f.w, refused)
			return
		}
	}
	res, err := f.send()
	if err != nil {
		f.unanswered(err)
		return
	}
	defer res.Body.Close() // it was read as far as it is of use
	body, unwatch := f.watch(res)
	defer unwatch()
	switch {
	case res.StatusCode/100 != 2:
		f.refusedUpstream(res, body)
		return
	case what == fetching:
		f.results(b, res, body)
		return
	}
	text, err := io.ReadAll(io.LimitReader(body, f.g.limits.answer))
	if err != nil {
		f.g.turnAway(f.w, refuse(http.StatusBadGateway, "api_error", "The answer of the model API broke off."))
		return
	}
	if what == deleting {
		if err := b.Delete(f.ctx); err != nil {
			f.g.log.Warn("a deleted batch is not marked in the ledger", "batch", b.ID, "error", err)
		}
	}
	f.reply(res, f.own(b.ID, text))
}

// settled sees to it that the batch is, before its results are gone.
func (f *forwarding) settled(b *ledger.Batch) *refusal {
	if !b.Open {
		return nil
	}
	switch done, err := f.g.pursue(f.ctx, b, false); {
	case err != nil:
		f.g.log.Warn("a batch that is to be deleted cannot be settled", "batch", b.ID, "error", err)
		return refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot read what the batch did cost, and does not delete it before.")
	case !done:
		return forbid(http.StatusBadRequest, "invalid_request_error", "The batch has not ended: cancel it first, and delete it when it has.")
	}
	return nil
}

// results passes the results of a batch on. The batch is settled before the agent
// sees the end of them, and not at all when they break off.
func (f *forwarding) results(b *ledger.Batch, res *http.Response, body io.Reader) {
	encoding := res.Header.Get("Content-Encoding")
	if !b.Open || res.StatusCode != http.StatusOK || encoding != "" && encoding != "identity" {
		f.pass(res, body)
		return
	}
	r := newResults(f.g.prices, b)
	settle := func() {
		if b.Open && r.whole() {
			f.g.settleBatch(b, r.settlements())
		}
	}
	f.copy(res, body, func(p []byte) {
		r.Write(p) //nolint:errcheck // it never fails
		settle()
	})
	r.close()
	settle()
}

// settleBatch writes what the batch did cost. A ledger that cannot be written
// leaves it as it is, for later.
func (g *Gateway) settleBatch(b *ledger.Batch, each []ledger.Settlement) {
	first, err := b.Settle(context.Background(), each)
	if err != nil {
		g.log.Warn("a batch cannot be settled for now", "run", b.Run, "fork", b.Fork, "batch", b.ID, "error", err)
		return
	}
	if !first {
		return
	}
	g.mu.Lock()
	_, counted := g.pending[b.ID]
	delete(g.pending, b.ID)
	g.mu.Unlock()
	for i, c := range b.Calls {
		held := c.Reserved
		if !counted {
			held = 0
		}
		g.told(c, b.Run, b.Fork, each[i], held)
	}
}

// told tells log and observer how a call of a batch ended, for which the observer
// was told that so much is held.
func (g *Gateway) told(c *ledger.Call, run string, num int, s ledger.Settlement, held fork.USD) {
	model := s.Model
	if model == "" {
		model = c.Model()
	}
	g.observe(run, num, model, s, held)
	if s.Cost > c.Reserved {
		g.log.Warn("a batch cost more than was reserved for it", "run", run, "fork", num, "model", model, "cost", s.Cost.String(), "reserved", c.Reserved.String())
	}
	g.log.Debug("batch settled", "run", run, "fork", num, "call", c.ID(), "model", model, "status", s.Status, "state", string(s.State),
		"input", s.Tokens.Input, "write_5m", s.Tokens.CacheWrite5m, "write_1h", s.Tokens.CacheWrite1h, "read", s.Tokens.CacheRead, "output", s.Tokens.Output,
		"cost", s.Cost.String(), "reserved", c.Reserved.String(), "request", s.RequestID, "note", s.Note)
}

// reply passes an answer on that was read.
func (f *forwarding) reply(res *http.Response, text []byte) {
	h := f.w.Header()
	responseHeader(h, res.Header, f.cred)
	h.Set("Content-Length", strconv.Itoa(len(text)))
	f.w.WriteHeader(res.StatusCode)
	f.put(text) //nolint:errcheck // the agent is gone
}

// own returns a batch as the API tells it, with the address of its results at the
// gateway in place of that at the API, where the agent's token is of no use and
// which its sandbox does not reach. No other byte changes.
func (f *forwarding) own(id string, text []byte) []byte {
	s := scanner{b: text, out: new(request)}
	start, end := 0, 0
	err := s.members(func(name string) error {
		at := s.i
		err := s.value(atElsewhere, nil)
		if name == "results_url" && text[at] == '"' {
			start, end = at, s.i
		}
		return err
	})
	if err != nil || end == 0 {
		return text
	}
	address, err := json.Marshal(f.outside + batchesPath + "/" + id + "/results")
	if err != nil { // a string: it cannot be
		return text
	}
	return slices.Concat(text[:start], address, text[end:])
}

// untoken is a header without what the API says of tokens: it speaks of those of
// calls, which batches do not share.
func untoken(h http.Header) http.Header {
	to := h.Clone()
	for key := range to {
		if strings.HasPrefix(key, "Anthropic-Ratelimit-") && strings.Contains(key, "okens") {
			delete(to, key)
		}
	}
	return to
}

// maxPage is the most batches on one page. The API lists those of everybody who
// uses the key, so each is asked for by its name.
const maxPage = 20

// list answers with the fork's own batches, the newest first.
func (f *forwarding) list() {
	mine, err := f.g.ledger.Batches(f.ctx, f.tenant.run, f.tenant.num)
	if err != nil {
		f.g.log.Warn("batches cannot be listed", "error", err)
		f.g.turnAway(f.w, refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot read its ledger."))
		return
	}
	q := f.in.URL.Query()
	page, more, err := pageOf(mine, q)
	if err != nil {
		f.g.turnAway(f.w, forbid(http.StatusBadRequest, "invalid_request_error", "The gateway cannot read the request: "+err.Error()+"."))
		return
	}
	for _, key := range []string{"limit", "after_id", "before_id"} {
		q.Del(key)
	}
	f.query = q.Encode()
	type list struct {
		Data  []json.RawMessage `json:"data"`
		More  bool              `json:"has_more"`
		First *string           `json:"first_id"`
		Last  *string           `json:"last_id"`
	}
	out := list{Data: []json.RawMessage{}, More: more}
	for _, b := range page {
		f.path = batchesPath + "/" + b.ID
		text, ok := f.one()
		if !ok {
			return
		}
		if text == nil {
			continue // somebody with the key has deleted it
		}
		if out.First == nil {
			out.First = &b.ID
		}
		out.Last = &b.ID
		out.Data = append(out.Data, f.own(b.ID, text))
	}
	text, err := json.Marshal(out)
	if err != nil {
		f.g.turnAway(f.w, refuse(http.StatusBadGateway, "api_error", "The answer of the model API cannot be read."))
		return
	}
	h := f.w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	f.put(text) //nolint:errcheck // the agent is gone
}

// one asks for one batch of a list; the text is nil for one that is not there.
// When it returns false, the agent has been answered.
func (f *forwarding) one() (text []byte, ok bool) {
	res, err := f.send()
	if err != nil {
		f.unanswered(err)
		return nil, false
	}
	defer res.Body.Close() // it was read as far as it is of use
	body, unwatch := f.watch(res)
	defer unwatch()
	switch {
	case res.StatusCode == http.StatusNotFound:
		return nil, true
	case res.StatusCode/100 != 2:
		f.refusedUpstream(res, body)
		return nil, false
	}
	text, err = io.ReadAll(io.LimitReader(body, maxError))
	if err != nil || !json.Valid(text) {
		f.g.turnAway(f.w, refuse(http.StatusBadGateway, "api_error", "The answer of the model API broke off."))
		return nil, false
	}
	return bytes.TrimSpace(text), true
}

// pageOf returns the part of a list that the query asks for, and whether there is
// more in its direction.
func pageOf(all []*ledger.Batch, q url.Values) (page []*ledger.Batch, more bool, err error) {
	limit := maxPage
	if s := q.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return nil, false, errors.New("limit is no number of batches")
		}
		limit = min(n, maxPage)
	}
	after, before := q.Get("after_id"), q.Get("before_id")
	find := func(id string) int { return slices.IndexFunc(all, func(b *ledger.Batch) bool { return b.ID == id }) }
	switch {
	case after != "" && before != "":
		return nil, false, errors.New("after_id and before_id do not go together")
	case after != "":
		i := find(after)
		if i < 0 {
			return nil, false, errors.New("after_id is no batch")
		}
		all = all[i+1:]
	case before != "":
		i := find(before)
		if i < 0 {
			return nil, false, errors.New("before_id is no batch")
		}
		all = all[:i]
		return all[max(len(all)-limit, 0):], len(all) > limit, nil
	}
	return all[:min(len(all), limit)], len(all) > limit, nil
}

// retries is the agent's own count of how often it tried before.
func retries(h http.Header) int {
	n, err := strconv.Atoi(h.Get("X-Stainless-Retry-Count"))
	if err != nil || n < 0 || n > 1000 {
		return 0
	}
	return n
}
