// Package metrics counts what became of forks, for Prometheus.
//
// Labels come from fixed sets only: the number of series does not depend on
// how many forks there were, nor on what users or agents write.
package metrics

import (
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// other is the label of a value that is in no fixed set.
const other = "other"

// Metrics are the collectors of this program. Its methods are named after
// events and are safe for concurrent use.
type Metrics struct {
	models    map[string]bool
	completed *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	cost      *prometheus.HistogramVec
}

// New registers the collectors with reg. The models are the values that the
// label "model" can have, aliases and full ids; any other model is "other".
// It panics when reg has such collectors already: New is called once for each
// registry.
func New(reg prometheus.Registerer, models []string) *Metrics {
	m := &Metrics{
		models: map[string]bool{},
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
	}
	for _, model := range models {
		m.models[model] = true
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
	reg.MustRegister(m.completed, m.duration, m.cost)
	return m
}

// ForkEnded counts one fork that ended. Calling it twice counts it twice.
func (m *Metrics) ForkEnded(r fork.Result) {
	status, model := string(r.Status), r.Model
	if !slices.Contains(fork.Statuses, r.Status) {
		status = other
	}
	if !m.models[model] {
		model = other
	}
	m.completed.WithLabelValues(status, model).Inc()
	if r.Duration >= 0 { // false for NaN, which would spoil the sum for good
		m.duration.WithLabelValues(status).Observe(r.Duration)
	}
	if r.Cost >= 0 {
		m.cost.WithLabelValues(model).Observe(r.Cost.Float())
	}
}

// Handler serves what g gathers, in the formats of Prometheus. A collector
// that fails does not hide the others.
func Handler(g prometheus.Gatherer) http.Handler {
	return promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}
