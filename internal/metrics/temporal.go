package metrics

import (
	"maps"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/contrib/opentelemetry"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Temporal registers what Temporal's SDK counts, and returns what counts it.
// The names are the SDK's own with Prometheus' suffixes, as in
// temporal_request_latency_seconds, but for one that Prometheus keeps for
// other things: temporal_workflow_active_threads.
func Temporal(reg prometheus.Registerer) (client.MetricsHandler, error) {
	exporter, err := otelprom.New(otelprom.WithRegisterer(reg), otelprom.WithoutTargetInfo(), otelprom.WithoutScopeInfo())
	if err != nil {
		return nil, fault.New("metrics of Temporal's SDK", fault.Internal, "%w", err)
	}
	provider := metric.NewMeterProvider(metric.WithReader(exporter), metric.WithView(temporalView))
	return &temporalHandler{opentelemetry.NewMetricsHandler(opentelemetry.MetricsHandlerOptions{
		Meter:                provider.Meter("temporal-sdk-go"),
		OnError:              func(error) {}, // a number that is missing stops nothing
		UseMonotonicCounters: true,
	})}, nil
}

// temporalBuckets reach from a call over loopback to a whole run.
var temporalBuckets = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200}

// temporalLabels are those whose values come from fixed sets.
var temporalLabels = attribute.NewAllowKeysFilter(
	"namespace", "task_queue", "workflow_type", "activity_type", "worker_type", "poller_type", "operation", "status_code", "failure_reason", "cause")

// temporalView gives an instrument of the SDK what it lacks: a text for
// people, and buckets for seconds.
func temporalView(i metric.Instrument) (metric.Stream, bool) {
	s := metric.Stream{Name: i.Name, Unit: i.Unit, AttributeFilter: temporalLabels}
	if i.Kind == metric.InstrumentKindHistogram {
		s.Aggregation = metric.AggregationExplicitBucketHistogram{Boundaries: temporalBuckets}
	}
	if i.Name == "temporal_workflow_active_thread_count" {
		s.Name = "temporal_workflow_active_threads"
	}
	what := strings.ReplaceAll(strings.TrimPrefix(i.Name, "temporal_"), "_", " ")
	s.Description = "Temporal SDK: " + what + "."
	return s, true
}

// temporalHandler keeps the names of hosts out of the labels: a host's own
// task queue is called after it.
type temporalHandler struct{ client.MetricsHandler }

// WithTags is part of [client.MetricsHandler].
func (h *temporalHandler) WithTags(tags map[string]string) client.MetricsHandler {
	const queue = "task_queue"
	if shared, _, own := strings.Cut(tags[queue], "@"); own {
		tags = maps.Clone(tags)
		tags[queue] = shared + "@host"
	}
	return &temporalHandler{h.MetricsHandler.WithTags(tags)}
}
