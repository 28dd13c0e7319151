package metrics

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func (m *Metrics) registerSandboxes(reg prometheus.Registerer) {
	m.created = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_created_total",
		Help: "Creations of sandboxes, by provider and by how they ended: success, or the kind of the fault.",
	}, []string{"provider", "outcome"})
	m.creation = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "sandbox_create_seconds",
		Help:    "How long a creation took that succeeded, by provider.",
		Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120},
	}, []string{"provider"})
	m.orphans = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "sandbox_orphans",
		Help: "Sandboxes of ours that no run uses, when the reaper last looked, by provider.",
	}, []string{"provider"})
	m.orphansAll = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sandbox_orphans_found_total",
		Help: "Sandboxes that no run used, each time the reaper found one, by provider.",
	}, []string{"provider"})
	for p := range m.providers {
		m.created.WithLabelValues(p, outcome(nil))
		for _, kind := range kinds {
			m.created.WithLabelValues(p, string(kind))
		}
		m.creation.WithLabelValues(p)
		m.orphans.WithLabelValues(p)
		m.orphansAll.WithLabelValues(p)
	}
	reg.MustRegister(m.created, m.creation, m.orphans, m.orphansAll)
}

// SandboxCreated counts one try to make a sandbox, and how it ended.
func (m *Metrics) SandboxCreated(provider string, took time.Duration, err error) {
	if m == nil {
		return
	}
	provider = in(m.providers, provider)
	m.created.WithLabelValues(provider, outcome(err)).Inc()
	if err == nil {
		observe(m.creation.WithLabelValues(provider), took)
	}
}

// OrphansFound takes down how many sandboxes of the provider no run uses.
func (m *Metrics) OrphansFound(provider string, n int) {
	if m == nil || n < 0 {
		return
	}
	provider = in(m.providers, provider)
	m.orphans.WithLabelValues(provider).Set(float64(n))
	m.orphansAll.WithLabelValues(provider).Add(float64(n))
}

// countTime bounds how long a scrape waits for providers, countAge how long
// what they said is good.
const (
	countTime = 3 * time.Second
	countAge  = 5 * time.Second
)

// ActiveSandboxes registers the number of sandboxes that there are, which
// count tells by provider; a provider that does not answer is left out. It is
// asked when somebody looks at the metrics and at no other time, so that an
// engine nobody watches has nothing to do.
func (m *Metrics) ActiveSandboxes(reg prometheus.Registerer, count func(context.Context) map[string]int) {
	reg.MustRegister(&active{m: m, count: count, desc: prometheus.NewDesc("sandbox_active",
		"Sandboxes of this installation that there are, by provider.", []string{"provider"}, nil)})
}

// active is a collector of what providers tell.
type active struct {
	m     *Metrics
	count func(context.Context) map[string]int
	desc  *prometheus.Desc

	mu   sync.Mutex
	last map[string]int
	at   time.Time
}

// Describe is part of [prometheus.Collector].
func (a *active) Describe(ch chan<- *prometheus.Desc) { ch <- a.desc }

// Collect is part of [prometheus.Collector].
func (a *active) Collect(ch chan<- prometheus.Metric) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.last == nil || time.Since(a.at) > countAge {
		ctx, cancel := context.WithTimeout(context.Background(), countTime)
		defer cancel()
		a.last, a.at = map[string]int{}, time.Now()
		for provider, n := range a.count(ctx) {
			a.last[in(a.m.providers, provider)] += n
		}
	}
	for provider, n := range a.last {
		ch <- prometheus.MustNewConstMetric(a.desc, prometheus.GaugeValue, float64(n), provider)
	}
}
