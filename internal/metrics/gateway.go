package metrics

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// The outcomes of a call: its answer was had and paid for, or not.
const (
	callAnswered = "answered"
	callFailed   = "failed"
)

// The kinds of tokens.
var tokenKinds = []string{"input", "output", "cache_read", "cache_write"}

// refusals are the statuses that the gateway itself answers with, limits those
// with which the model API says that calls come too fast.
var (
	refusals = []int{400, 401, 402, 403, 404, 408, 413, 415, 429, 502, 503, 504}
	limits   = []int{429, 529}
)

func (m *Metrics) registerGateway(reg prometheus.Registerer) {
	m.calls = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_gateway_calls_total",
		Help: "Calls of the model that were let through, by model and by whether an answer came.",
	}, []string{"model", "outcome"})
	m.tokens = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_gateway_tokens_total",
		Help: "Tokens that calls were billed for, by model and kind.",
	}, []string{"model", "kind"})
	m.spent = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_gateway_cost_usd_total",
		Help: "What calls were charged, in US dollars, by model.",
	}, []string{"model"})
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_gateway_refused_total",
		Help: "Calls that the gateway itself refused, by HTTP status; 402 is a budget, 429 and 503 ask to come again.",
	}, []string{"code"})
	m.limited = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_gateway_rate_limited_total",
		Help: "Times that the model API said calls come too fast, by HTTP status. The gateway sends these again.",
	}, []string{"code"})
	m.added = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "sandbox_gateway_added_seconds",
		Help:    "What the gateway adds to a call: from its last byte until it may go out. Waits for money or for the pace of the fleet are not in it.",
		Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5},
	})
	m.paced = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "sandbox_gateway_paced_seconds",
		Help:    "How long a call waited for the pace of the fleet, retries of what came too fast included.",
		Buckets: []float64{.001, .01, .05, .1, .5, 1, 2.5, 5, 10, 30, 60, 120},
	})
	held := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "sandbox_gateway_reserved_usd",
		Help: "What calls under way may cost at most, in US dollars.",
	}, func() float64 { return fork.USD(m.reserved.Load()).Float() })
	for model := range m.models {
		for _, outcome := range []string{callAnswered, callFailed} {
			m.calls.WithLabelValues(model, outcome)
		}
		for _, kind := range tokenKinds {
			m.tokens.WithLabelValues(model, kind)
		}
		m.spent.WithLabelValues(model)
	}
	for _, code := range refusals {
		m.refused.WithLabelValues(strconv.Itoa(code))
	}
	for _, code := range limits {
		m.limited.WithLabelValues(strconv.Itoa(code))
	}
	reg.MustRegister(m.calls, m.tokens, m.spent, m.refused, m.limited, m.added, m.paced, held)
}

// A Call is one call of the model that ended.
type Call struct {
	Model                                string
	Answered                             bool
	Input, Output, CacheRead, CacheWrite int64    // tokens
	Cost                                 fork.USD // that was charged
	Reserved                             fork.USD // that was held for it until now
}

// CallReserved takes down that money is held for a call.
func (m *Metrics) CallReserved(held fork.USD) {
	if m != nil {
		m.reserved.Add(int64(held))
	}
}

// CallSettled counts a call for which CallReserved was called.
func (m *Metrics) CallSettled(c Call) {
	if m == nil {
		return
	}
	m.reserved.Add(-int64(c.Reserved))
	model, outcome := in(m.models, c.Model), callFailed
	if c.Answered {
		outcome = callAnswered
	}
	m.calls.WithLabelValues(model, outcome).Inc()
	for i, n := range []int64{c.Input, c.Output, c.CacheRead, c.CacheWrite} {
		m.tokens.WithLabelValues(model, tokenKinds[i]).Add(float64(max(n, 0)))
	}
	m.spent.WithLabelValues(model).Add(max(c.Cost, 0).Float())
}

// CallRefused counts a call that the gateway answered itself.
func (m *Metrics) CallRefused(status int) {
	if m != nil {
		m.refused.WithLabelValues(code(refusals, status)).Inc()
	}
}

// CallLimited counts an answer of the API that calls come too fast.
func (m *Metrics) CallLimited(status int) {
	if m != nil {
		m.limited.WithLabelValues(code(limits, status)).Inc()
	}
}

// CallAdmitted takes down how long it took until a call could go out.
func (m *Metrics) CallAdmitted(took time.Duration) {
	if m != nil {
		observe(m.added, took)
	}
}

// CallPaced takes down how long a call waited for the pace of the fleet.
func (m *Metrics) CallPaced(took time.Duration) {
	if m != nil {
		observe(m.paced, took)
	}
}

func code(known []int, status int) string {
	if slices.Contains(known, status) {
		return strconv.Itoa(status)
	}
	return other
}
