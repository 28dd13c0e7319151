// Package metrics counts what became of forks, of sandboxes and of calls of
// the model, for Prometheus, and takes in what Temporal's SDK counts.
//
// Labels come from fixed sets only: the number of series does not depend on
// how many forks there were, nor on what users or agents write.
package metrics

import (
	"math"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// other is the label of a value that is in no fixed set.
const other = "other"

// Sets are the values that labels can have; any other value is "other".
type Sets struct {
	Models    []string // aliases and full ids
	Providers []string
}

// Metrics are the collectors of this program. Its methods are named after
// events and are safe for concurrent use. Those of a nil Metrics do nothing.
type Metrics struct {
	models, providers map[string]bool

	completed *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	cost      *prometheus.HistogramVec
	cancel    prometheus.Histogram
	verified  *prometheus.CounterVec
	verifying prometheus.Histogram

	created    *prometheus.CounterVec
	creation   *prometheus.HistogramVec
	orphans    *prometheus.GaugeVec
	orphansAll *prometheus.CounterVec

	calls    *prometheus.CounterVec
	tokens   *prometheus.CounterVec
	spent    *prometheus.CounterVec
	reserved atomic.Int64 // fork.USD
	refused  *prometheus.CounterVec
	limited  *prometheus.CounterVec
	added    prometheus.Histogram
	paced    prometheus.Histogram
}

// New registers the collectors with reg. It panics when reg has such
// collectors already: New is called once for each registry.
func New(reg prometheus.Registerer, sets Sets) *Metrics {
	m := &Metrics{
		models:    set(sets.Models),
		providers: set(sets.Providers),
		completed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sandbox_fork_completed_total",
			Help: "Forks that ended, by how they ended and by model.",
		}, []string{"status", "model"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sandbox_fork_duration_seconds",
			Help: "Time from the creation of a fork's sandbox to its end.",
			// 1 s to 2 h, the default timeout of a fork.
			Buckets: []float64{1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 5400, 7200},
		}, []string{"status"}),
		cost: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "sandbox_fork_cost_usd",
			Help:    "What the model calls of a fork cost, in US dollars, by the gateway's ledger.",
			Buckets: []float64{.001, .005, .01, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100},
		}, []string{"model"}),
		cancel: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "sandbox_cancel_seconds",
			Help:    "Time from the cancellation of a fork until nothing of its sandbox was left.",
			Buckets: []float64{.25, .5, 1, 2, 3, 4, 5, 7.5, 10, 15, 30, 60, 300},
		}),
		verified: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sandbox_fork_verified_total",
			Help: "Verifications of the work of forks, by how they ended.",
		}, []string{"outcome"}),
		verifying: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "sandbox_fork_verify_seconds",
			Help:    "How long verifications of the work of forks took that came to an end of their own.",
			Buckets: []float64{.1, .5, 1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600},
		}),
	}
	// The counters begin at 0 and not at the first fork, so that a rate sees
	// the first one too.
	for _, status := range fork.Statuses {
		if !status.Ended() {
			continue
		}
		m.duration.WithLabelValues(string(status))
		for model := range m.models {
			m.completed.WithLabelValues(string(status), model)
		}
		m.completed.WithLabelValues(string(status), other)
	}
	for _, outcome := range fork.VerifyOutcomes {
		m.verified.WithLabelValues(outcome)
	}
	reg.MustRegister(m.completed, m.duration, m.cost, m.cancel, m.verified, m.verifying)
	m.registerSandboxes(reg)
	m.registerGateway(reg)
	return m
}

// ForkEnded counts one fork that ended. Calling it twice counts it twice.
func (m *Metrics) ForkEnded(r fork.Result) {
	if m == nil {
		return
	}
	status, model := string(r.Status), in(m.models, r.Model)
	if !slices.Contains(fork.Statuses, r.Status) {
		status = other
	}
	m.completed.WithLabelValues(status, model).Inc()
	if r.Duration >= 0 { // false for NaN, which would spoil the sum for good
		m.duration.WithLabelValues(status).Observe(r.Duration)
	}
	if r.Cost >= 0 {
		m.cost.WithLabelValues(model).Observe(r.Cost.Float())
	}
	if r.Verify == nil {
		return
	}
	outcome := r.Verify.Outcome()
	m.verified.WithLabelValues(outcome).Inc()
	if took := r.Verify.Duration; took >= 0 && (outcome == fork.VerifyPassed || outcome == fork.VerifyFailed) {
		m.verifying.Observe(took)
	}
}

// ForkCancelled takes down how long it took from the cancellation of a fork
// until nothing of its sandbox was left.
func (m *Metrics) ForkCancelled(took time.Duration) {
	if m != nil {
		observe(m.cancel, took)
	}
}

// BuildInfo registers a series that is always 1 and names the version.
func BuildInfo(reg prometheus.Registerer, version string) {
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "sandbox_build_info",
		Help:        "Always 1; the label says which version runs.",
		ConstLabels: prometheus.Labels{"version": version},
	}, func() float64 { return 1 }))
}

// Handler serves what g gathers, in the formats of Prometheus. A collector
// that fails does not hide the others.
func Handler(g prometheus.Gatherer) http.Handler {
	return promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}

func set(words []string) map[string]bool {
	s := map[string]bool{}
	for _, w := range words {
		s[w] = true
	}
	return s
}

func in(s map[string]bool, word string) string {
	if s[word] {
		return word
	}
	return other
}

// outcome is the label of how a deed ended: "success", or the kind of its
// fault.
func outcome(err error) string {
	kind := fault.KindOf(err)
	switch {
	case err == nil:
		return "success"
	case slices.Contains(kinds, kind):
		return string(kind)
	}
	return other
}

var kinds = []fault.Kind{
	fault.Internal, fault.Invalid, fault.NotFound, fault.Denied, fault.Unsupported, fault.Unavailable, fault.Unreachable,
	fault.OverBudget, fault.Timeout, fault.Lost, fault.Cancelled, fault.Conflict, fault.Full,
}

// observe leaves out what no clock can have shown.
func observe(h prometheus.Observer, took time.Duration) {
	if s := took.Seconds(); s >= 0 && !math.IsInf(s, 0) {
		h.Observe(s)
	}
}
