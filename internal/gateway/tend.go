package gateway

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// What becomes of a batch that nobody asks about:
//
//   - The gateway asks, with its own key, from time to time, and reads the results
//     when there are some. A batch that another start or another gateway has made
//     is no different: the ledger knows it.
//   - When its fork has ended nobody wants it any more. It is cancelled; what was
//     done by then is paid for.
//   - When it cannot be found out what it did cost, it is charged at its
//     reservation, and marked: what is not known may have cost all of it.
const (
	// lostAfter is when a batch that the API does not know will not be found
	// again: batches expire after a day.
	lostAfter = 25 * time.Hour

	// resultsLast is for how long the API keeps results, from the making on.
	resultsLast = 29 * 24 * time.Hour

	// askTime bounds one question about a batch, and readTime all of its results.
	askTime  = time.Minute
	readTime = 30 * time.Minute
)

// lookAfter is how long to wait between two looks at a batch of that age.
func lookAfter(age time.Duration) time.Duration {
	return min(max(age/10, time.Minute), 15*time.Minute)
}

// recall finds the batches again that are not settled.
func (g *Gateway) recall(ctx context.Context) error {
	if g.shared {
		return nil // whoever settles them tells the others nothing: they are counted where they were made
	}
	open, err := g.ledger.OpenBatches(ctx, "", 0)
	if err != nil {
		return err
	}
	for _, b := range open {
		g.observer.reserved(b.Reserved())
		g.pending[b.ID] = b.Reserved()
	}
	return nil
}

// tend looks for batches that nobody has settled until the gateway closes.
func (g *Gateway) tend() {
	tick := time.NewTicker(g.limits.tend)
	defer tick.Stop()
	for {
		g.sweep(g.closing)
		select {
		case <-tick.C:
		case <-g.closing.Done():
			return
		}
	}
}

// sweep asks the API once about every batch that is due.
func (g *Gateway) sweep(ctx context.Context) {
	g.mu.Lock()
	before := len(g.pending)
	g.mu.Unlock()
	open, err := g.ledger.OpenBatches(ctx, "", 0)
	if err != nil {
		if ctx.Err() == nil {
			g.log.Warn("batches that are not settled cannot be listed", "error", err)
		}
		return
	}
	if before > 0 {
		g.forgetSettled(open)
	}
	for _, b := range open {
		if g.now().Sub(b.Looked) < lookAfter(g.now().Sub(b.Created)) {
			continue
		}
		mine, err := b.Look(ctx)
		if err == nil && mine {
			_, err = g.pursue(ctx, b, b.Orphaned)
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			g.log.Info("a batch cannot be settled for now", "run", b.Run, "fork", b.Fork, "batch", b.ID, "error", err)
		}
	}
}

// forgetSettled tells the observer of batches that another gateway has settled.
// One that was accepted since the open ones were read is left alone: it was made
// after them, and is looked up.
func (g *Gateway) forgetSettled(open []*ledger.Batch) {
	still := make(map[string]bool, len(open))
	for _, b := range open {
		still[b.ID] = true
	}
	g.mu.Lock()
	var gone []string
	for id := range g.pending {
		if !still[id] {
			gone = append(gone, id)
		}
	}
	g.mu.Unlock()
	for _, id := range gone {
		settled, err := g.ledger.BatchSettled(g.closing, id)
		if err != nil || !settled {
			continue
		}
		g.mu.Lock()
		held, ok := g.pending[id]
		delete(g.pending, id)
		g.mu.Unlock()
		if ok {
			g.observer.reserved(-held)
		}
	}
}

// finish cancels what a fork that has ended has left, and settles it. It takes
// little longer than patience; what takes longer is left to tend.
func (g *Gateway) finish(ctx context.Context, run string, num int, patience time.Duration) error {
	asking, stop := context.WithTimeout(ctx, patience+finishTime)
	defer stop()
	for wait := firstWait; ; wait *= 2 {
		open, err := g.ledger.OpenBatches(ctx, run, num)
		if err != nil {
			return err
		}
		left := 0
		for _, b := range open {
			done, err := g.pursue(asking, b, true)
			if err != nil && asking.Err() == nil {
				g.log.Info("a batch cannot be settled for now", "run", run, "fork", num, "batch", b.ID, "error", err)
			}
			if !done {
				left++
			}
		}
		switch {
		case left == 0:
			return nil
		case wait > patience || asking.Err() != nil:
			g.log.Info("batches go on after their fork; its cost has the most that they can come to", "run", run, "fork", num, "batches", left)
			return nil
		}
		select {
		case <-time.After(wait):
		case <-asking.Done():
		}
	}
}

// firstWait is how soon a batch that was cancelled is looked at again.
const firstWait = 50 * time.Millisecond

// finishTime is for the API to answer when batches are finished.
const finishTime = 3 * time.Second

// pursue finds out what has become of a batch, and settles it when it has ended
// or when nobody will ever know. An unwanted one that goes on is cancelled.
func (g *Gateway) pursue(ctx context.Context, b *ledger.Batch, unwanted bool) (done bool, err error) {
	if !b.Open {
		return true, nil
	}
	age := g.now().Sub(b.Created)
	state, err := g.batchState(ctx, http.MethodGet, b.ID, "")
	if err == nil && unwanted && !state.ended() && state.CancelAt == nil {
		if state, err = g.batchState(ctx, http.MethodPost, b.ID, "/cancel"); err == nil && !state.ended() {
			state, err = g.batchState(ctx, http.MethodGet, b.ID, "")
		}
	}
	if err == nil && state.ended() {
		err = g.readResults(ctx, b)
	}
	switch kind := fault.KindOf(err); {
	case !b.Open:
		return true, nil
	case kind == fault.Invalid:
		g.writeOff(b, "its results cannot be read")
	case kind == fault.NotFound && age > lostAfter:
		g.writeOff(b, "the API does not know it any more")
	case age > resultsLast:
		g.writeOff(b, "its results are not kept any longer")
	}
	if !b.Open {
		return true, nil
	}
	return false, err
}

// A batchState is what the API says of a batch.
type batchState struct {
	Status   string  `json:"processing_status"`
	CancelAt *string `json:"cancel_initiated_at"`
}

func (s *batchState) ended() bool { return s.Status == "ended" }

// batchState asks about a batch, or cancels it. It is fault.NotFound when the API
// does not know it.
func (g *Gateway) batchState(ctx context.Context, method, id, deed string) (*batchState, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	res, err := g.ask(ctx, method, batchesPath+"/"+id+deed)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close() // it was read as far as it is of use
	text, err := io.ReadAll(io.LimitReader(res.Body, maxError))
	s := new(batchState)
	if err != nil || json.Unmarshal(text, s) != nil || s.Status == "" {
		return nil, fault.New("ask about batch", fault.Unavailable, "the answer of the model API cannot be read")
	}
	return s, nil
}

// cancelBatch cancels a batch.
func (g *Gateway) cancelBatch(ctx context.Context, id string) error {
	_, err := g.batchState(ctx, http.MethodPost, id, "/cancel")
	return err
}

// readResults reads the results of a batch that has ended, and settles it. It is
// fault.Invalid when they are all there and cannot be understood.
func (g *Gateway) readResults(ctx context.Context, b *ledger.Batch) error {
	const op = "read results of batch"
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	res, err := g.ask(ctx, http.MethodGet, batchesPath+"/"+b.ID+"/results")
	if err != nil {
		return err
	}
	defer res.Body.Close() // it was read as far as it is of use
	r := newResults(g.prices, b)
	if _, err := io.Copy(r, res.Body); err != nil {
		return fault.New(op, fault.Unavailable, "they broke off")
	}
	r.close()
	switch {
	case r.broken != "":
		return fault.New(op, fault.Invalid, "%s", r.broken)
	case !r.whole():
		return fault.New(op, fault.Unavailable, "%d of %d are there", len(r.seen), b.Requests)
	}
	g.settleBatch(b, r.settlements())
	return nil
}

// writeOff charges a batch at its reservation.
func (g *Gateway) writeOff(b *ledger.Batch, why string) {
	each := make([]ledger.Settlement, len(b.Calls))
	for i, c := range b.Calls {
		each[i] = ledger.Settlement{State: ledger.Failed, RequestID: b.ID, Cost: c.Reserved, Note: "a batch: " + why + ": charged at its reservation"}
	}
	g.log.Warn("a batch is charged at its reservation", "run", b.Run, "fork", b.Fork, "batch", b.ID, "why", why, "cost", b.Reserved().String())
	g.settleBatch(b, each)
}

// ask makes a call of the gateway's own. The kind of the error is NotFound for
// 404, Denied when there is no key or it is refused, and Unavailable otherwise.
func (g *Gateway) ask(ctx context.Context, method, path string) (*http.Response, error) {
	const op = "ask the model API"
	cred, base, refused := g.authority(ctx, Anthropic)
	if refused != nil {
		return nil, refused.fault(op)
	}
	target := *base
	target.Path, target.RawPath = strings.TrimRight(base.Path, "/")+path, ""
	req, err := http.NewRequestWithContext(ctx, method, target.String(), nil)
	if err != nil {
		return nil, fault.New(op, fault.Internal, "%s", cred.redact(err.Error()))
	}
	req.Header = requestHeader(http.Header{"Anthropic-Version": {"2023-06-01"}, "User-Agent": {"sandbox-temporal"}}, cred)
	res, err := g.transport.RoundTrip(req)
	if err != nil {
		return nil, fault.New(op, fault.Unavailable, "%s", cred.redact(err.Error()))
	}
	if e := res.Header.Get("Content-Encoding"); res.StatusCode == http.StatusOK && (e == "" || e == "identity") {
		return res, nil
	}
	_ = res.Body.Close() // nothing of it is wanted
	kind := fault.Unavailable
	switch res.StatusCode {
	case http.StatusNotFound:
		kind = fault.NotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		kind = fault.Denied
	}
	return nil, fault.New(op, kind, "it answers %d", res.StatusCode)
}
