// Package host is one worker process: the gateway for the sandboxes of this
// host, the activities, the task queues they are served on, and the metrics.
// The command "worker" is one, and the engine holds one.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.opentelemetry.io/otel/trace"
	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/worker"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/metrics"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// Options is what a host is made of.
type Options struct {
	// Required: the connection, which the host does not close; the state
	// folder; the places where sandboxes are made; who may call the model;
	// the price list.
	Temporal         client.Client
	Home             string
	Providers        sandbox.Set
	ModelCredentials func(context.Context) (gateway.Credentials, error)
	Prices           *gateway.Prices

	GitCredentials func(context.Context) (repo.Credential, error) // nil: git's own helpers only
	Program        func(name string) (string, error)              // nil: none can be lent
	Namespace      string
	Queue          string   // empty: orchestrator.DefaultTaskQueue
	Identity       string   // of the workers, in Temporal; empty: the SDK's
	GatewayURL     string   // the gateway's public URL, for sandboxes elsewhere; may be empty
	Deployment     string   // label of our sandboxes; empty: this state folder's own
	LedgerURL      string   // of the PostgreSQL database that the ledger is in; empty: a file of the state folder
	DayBudget      fork.USD // the most that all runs together may spend on one day, by UTC; 0: no limit
	MetricsPort    int      // 0: any free one; NoMetrics: none
	Logger         *slog.Logger
	Tracer         trace.Tracer // of the gateway's calls; nil: they are not traced. Temporal's are with its client
}

// NoMetrics as a MetricsPort leaves /metrics out.
const NoMetrics = -1

// A Host serves until Stop.
type Host struct {
	o       Options
	gateway *gateway.Gateway
	store   *artifact.Store
	workers []worker.Worker
	metrics net.Listener
	failed  chan error
	stop    context.CancelFunc // of the servers below
	serving sync.WaitGroup
	http    *http.Server
}

// Start opens the gateway and the stores in o.Home and serves the task queues.
func Start(ctx context.Context, o Options) (_ *Host, err error) {
	if o.Queue == "" {
		o.Queue = orchestrator.DefaultTaskQueue
	}
	id, err := ID(o.Home)
	if err != nil {
		return nil, err
	}
	if o.Deployment == "" {
		o.Deployment = id
	}
	serve, stop := context.WithCancel(context.WithoutCancel(ctx))
	h := &Host{o: o, failed: make(chan error, 4), stop: stop}
	defer func() {
		if err != nil {
			h.Stop()
		}
	}()

	if h.gateway, err = gateway.Open(ctx, gateway.Options{
		Ledger:      ledger.Options{Dir: LedgerDir(o.Home), URL: o.LedgerURL, Name: id, DayBudget: o.DayBudget},
		Credentials: o.ModelCredentials, Prices: o.Prices, Logger: o.Logger, Tracer: o.Tracer,
	}); err != nil {
		return nil, err
	}
	doors, err := newDoors(serve, o.Home, h.gateway, &h.serving, o.Logger)
	if err != nil {
		return nil, err
	}
	if h.store, err = Artifacts(ctx, o.Home); err != nil {
		return nil, err
	}
	temp := filepath.Join(o.Home, "tmp")
	if err = freshDir(temp); err != nil {
		return nil, err
	}
	m, err := h.serveMetrics()
	if err != nil {
		return nil, err
	}
	hostname, _ := os.Hostname() // an empty one is still unique by id
	acts := activities.New(activities.Options{
		Providers: o.Providers, Gateway: h.gateway, Repo: Repo(o.Home, o.GitCredentials, o.Logger), Artifacts: h.store,
		Doors: doors, GatewayURL: o.GatewayURL, Program: o.Program, Open: h.open,
		Held: func(ctx context.Context, run string, hold fork.Hold) error {
			return orchestrator.Fault(o.Temporal.SignalWorkflow(ctx, run, "", orchestrator.ForkHeld, hold))
		},
		Deployment: o.Deployment, Namespace: o.Namespace,
		Queue: o.Queue, HostQueue: orchestrator.HostQueue(o.Queue, hostname+"-"+id),
		TempDir: temp, Metrics: m, Logger: o.Logger,
	})
	shared := worker.New(o.Temporal, o.Queue, h.workerOptions())
	orchestrator.Serve(shared)
	own := worker.New(o.Temporal, acts.HostQueue, h.workerOptions())
	h.workers = []worker.Worker{own, shared}
	for _, w := range h.workers {
		acts.Serve(w)
		if err = w.Start(); err != nil {
			return nil, fault.Wrap("start worker", orchestrator.Fault(err))
		}
	}
	return h, nil
}

func (h *Host) workerOptions() worker.Options {
	return worker.Options{
		Identity:     h.o.Identity,
		Interceptors: []interceptor.WorkerInterceptor{&orchestrator.Faults{}},
		// Cancellation comes with the answer to a heartbeat; the SDK would
		// hold heartbeats back for 0.8 of their time-out.
		MaxHeartbeatThrottleInterval:     time.Second,
		DefaultHeartbeatThrottleInterval: time.Second,
		WorkerStopTimeout:                5 * time.Second, // activities let go of their agents
		WorkflowTaskPollerBehavior:       worker.NewPollerBehaviorAutoscaling(worker.PollerBehaviorAutoscalingOptions{InitialNumberOfPollers: 2}),
		ActivityTaskPollerBehavior:       worker.NewPollerBehaviorAutoscaling(worker.PollerBehaviorAutoscalingOptions{InitialNumberOfPollers: 2}),
		OnFatalError:                     func(err error) { h.fail(fault.Wrap("worker", orchestrator.Fault(err))) },
	}
}

// Failed gives the error that ended the host from within.
func (h *Host) Failed() <-chan error { return h.failed }

func (h *Host) fail(err error) {
	select {
	case h.failed <- err:
	default:
	}
}

// MetricsURL returns where the metrics are, or "".
func (h *Host) MetricsURL() string {
	if h.metrics == nil {
		return ""
	}
	return fmt.Sprintf("http://%s/metrics", h.metrics.Addr())
}

// Stop lets go of everything. Agents go on in their sandboxes; the next host
// in the same state folder follows them. A second call does nothing.
func (h *Host) Stop() {
	var wg sync.WaitGroup
	for _, w := range h.workers {
		wg.Go(w.Stop)
	}
	wg.Wait()
	h.workers = nil
	h.stop()
	if h.http != nil {
		_ = h.http.Close()
	}
	h.serving.Wait()
	if h.gateway != nil {
		if err := h.gateway.Close(); err != nil {
			h.o.Logger.Error("Close the ledger", "error", err)
		}
		h.gateway = nil
	}
	if h.store != nil {
		_ = h.store.Close()
		h.store = nil
	}
}

// serveMetrics answers /metrics, and says so when the port is taken.
func (h *Host) serveMetrics() (*metrics.Metrics, error) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	models := []string{}
	for _, model := range h.o.Prices.Models() {
		models = append(models, model.ID)
		models = append(models, model.Aliases...)
	}
	m := metrics.New(reg, models)
	if h.o.MetricsPort == NoMetrics {
		return m, nil
	}
	ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(h.o.MetricsPort)))
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fault.New("metrics", fault.Conflict, "port %d is taken", h.o.MetricsPort).
			Hinted("Choose another with --metrics-port or METRICS_PORT (0: any free one), or set DISABLE_METRICS=true.")
	}
	if err != nil {
		return nil, fault.New("metrics", fault.Internal, "%w", err)
	}
	h.metrics = ln
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics.Handler(reg))
	h.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	h.serving.Go(func() { _ = h.http.Serve(ln) })
	return m, nil
}

// open reports whether the run may still use its sandboxes.
func (h *Host) open(ctx context.Context, run string) (bool, error) {
	if strings.HasPrefix(run, fork.PreparePrefix) {
		return orchestrator.Preparing(ctx, h.o.Temporal, run)
	}
	d, err := h.o.Temporal.DescribeWorkflowExecution(ctx, run, "")
	var gone *serviceerror.NotFound
	if errors.As(err, &gone) {
		return false, nil // closed so long ago that Temporal forgot it
	}
	if err != nil {
		return false, orchestrator.Fault(err)
	}
	return d.WorkflowExecutionInfo.Status == enumspb.WORKFLOW_EXECUTION_STATUS_RUNNING, nil
}
