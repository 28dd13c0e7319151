package gateway

import (
	"net/http"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// An Observer is told what happens to calls. Its functions are called on the
// way of the calls themselves, from many goroutines, so they must be quick.
// Those that are nil are not called.
type Observer struct {
	// Admitted is told how long a call took from its last byte until it may go
	// out. One that was held for want of money is left out.
	Admitted func(took time.Duration)

	// Reserved is told what was set aside for a call, and Settled how that call
	// ended: each call of the one is followed by one of the other. A batch has a
	// call for each model in it. One that another gateway has settled is told to
	// Reserved once more, as a negative sum.
	Reserved func(held fork.USD)
	Settled  func(s Settled)

	// Refused is told the status of an answer that was the gateway's own.
	Refused func(status int)

	// Limited is told a status with which the model API says that calls come
	// too fast; Paced, how long a call waited in all for the pace of the fleet.
	Limited func(status int)
	Paced   func(took time.Duration)
}

// Settled is what became of one call.
type Settled struct {
	Run      string
	Fork     int
	Model    string // the full id, where the price table knows it
	Answered bool
	Tokens   Tokens
	Cost     fork.USD
	Reserved fork.USD
}

func (o *Observer) admitted(took time.Duration) {
	if o.Admitted != nil {
		o.Admitted(took)
	}
}

func (o *Observer) reserved(held fork.USD) {
	if o.Reserved != nil {
		o.Reserved(held)
	}
}

func (o *Observer) limited(status int) {
	if o.Limited != nil {
		o.Limited(status)
	}
}

func (o *Observer) paced(took time.Duration) {
	if o.Paced != nil {
		o.Paced(took)
	}
}

// observe tells the observer how a call ended for which it was told that so much
// is held.
func (g *Gateway) observe(run string, num int, model string, s ledger.Settlement, held fork.USD) {
	if g.observer.Settled == nil {
		return
	}
	if id, known := g.prices.Resolve(model); known {
		model = id
	}
	g.observer.Settled(Settled{
		Run: run, Fork: num, Model: model, Answered: s.State == ledger.Settled,
		Tokens: s.Tokens, Cost: s.Cost, Reserved: held,
	})
}

// turnAway answers a call in place of the API.
func (g *Gateway) turnAway(w http.ResponseWriter, r *refusal) {
	if g.observer.Refused != nil {
		g.observer.Refused(r.status)
	}
	r.write(w)
}
