package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// maxResult bounds one line of results, in bytes. The longest answer there is has
// a fraction of that.
const maxResult = 32 << 20

// results meters the results of a batch, one JSON object a line, as they pass.
// Feed it with Write, call close at their end and then ask whole.
type results struct {
	prices *Prices
	batch  *ledger.Batch
	sums   []ledger.Settlement // by call
	seen   map[string]bool     // custom ids
	counts map[string]int      // by type of result
	broken string              // why what came is not to be believed; empty: it is

	line []byte // the part of a line that has come so far
}

func newResults(p *Prices, b *ledger.Batch) *results {
	return &results{prices: p, batch: b, sums: make([]ledger.Settlement, len(b.Calls)), seen: map[string]bool{}, counts: map[string]int{}}
}

// Write takes the next piece, cut anywhere. It never fails.
func (r *results) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 && r.broken == "" {
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			end = len(p)
		}
		switch {
		case len(r.line)+end > maxResult:
			r.broken = "a result is too long to be read"
		case end == len(p):
			r.line = append(r.line, p...)
			return n, nil
		case len(r.line) == 0:
			r.result(p[:end])
		default:
			r.line = append(r.line, p[:end]...)
			r.close()
		}
		p = p[end+1:]
	}
	return n, nil
}

// close takes the last line, which need not end like the others.
func (r *results) close() {
	if len(r.line) > 0 && r.broken == "" {
		r.result(r.line)
	}
	r.line = r.line[:0]
}

// The types of results.
const (
	succeeded = "succeeded"
	errored   = "errored"
	canceled  = "canceled"
	expired   = "expired"
)

// result takes one line. Only what succeeded is billed.
func (r *results) result(line []byte) {
	if len(bytes.TrimSpace(line)) == 0 {
		return
	}
	var v struct {
		ID     string `json:"custom_id"`
		Result struct {
			Type    string          `json:"type"`
			Message json.RawMessage `json:"message"`
		} `json:"result"`
	}
	switch err := json.Unmarshal(line, &v); {
	case err != nil || v.ID == "":
		r.broken = "a result cannot be read"
		return
	case r.seen[v.ID]:
		r.broken = "a result came twice"
		return
	case len(r.seen) == r.batch.Requests:
		r.broken = "there are more results than requests"
		return
	}
	switch v.Result.Type {
	case succeeded:
		model, t, ok := answerUsage(v.Result.Message)
		if !ok {
			r.broken = "a result tells no usage"
			return
		}
		r.add(model, t)
	case errored, canceled, expired:
	default:
		r.broken = "a result is of no known type"
		return
	}
	r.seen[v.ID] = true
	r.counts[v.Result.Type]++
}

// add books what one request used to the model that answered. One that nobody
// asked for counts as the dearest of them all; compare forwarding.price.
func (r *results) add(model string, t Tokens) {
	at, key := -1, r.prices.key(model)
	_, known := r.prices.Resolve(model)
	cost := r.prices.BatchCost(model, t)
	if !known {
		cost = 0
	}
	for i, c := range r.batch.Calls {
		if r.prices.key(c.Model()) == key {
			at, cost = i, r.prices.BatchCost(model, t)
			break
		}
		cost = max(cost, r.prices.BatchCost(c.Model(), t))
	}
	s := &r.sums[max(at, 0)]
	if at >= 0 {
		s.Model = shorten(model)
	}
	s.Tokens = sum(s.Tokens, t)
	s.Cost = plus(s.Cost, cost)
}

// sum adds tokens up.
func sum(t, v Tokens) Tokens {
	return Tokens{
		Input: t.Input + v.Input, CacheWrite5m: t.CacheWrite5m + v.CacheWrite5m, CacheWrite1h: t.CacheWrite1h + v.CacheWrite1h,
		CacheRead: t.CacheRead + v.CacheRead, Output: t.Output + v.Output, WebSearches: t.WebSearches + v.WebSearches,
	}
}

// whole reports whether there was a result for every request.
func (r *results) whole() bool {
	return r.broken == "" && len(r.line) == 0 && len(r.seen) == r.batch.Requests
}

// settlements is what the calls of the batch come to.
func (r *results) settlements() []ledger.Settlement {
	note := ""
	for _, kind := range []string{succeeded, errored, canceled, expired} {
		if n := r.counts[kind]; n > 0 {
			note += fmt.Sprintf(", %d %s", n, kind)
		}
	}
	for i := range r.sums {
		s := &r.sums[i]
		s.State, s.Status, s.RequestID, s.Note = ledger.Settled, http.StatusOK, r.batch.ID, "a batch: "+note[2:]
		if r.counts[succeeded] == 0 {
			s.State = ledger.Failed
		}
		// With other prices than it was reserved with, a batch could cost more
		// than was there.
		if c := r.batch.Calls[i]; c.Prices() != r.prices.Version() && s.Cost > c.Reserved {
			s.Cost = c.Reserved
			s.Note += ", at no more than was reserved with the prices then"
		}
	}
	return r.sums
}
