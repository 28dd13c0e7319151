// Package host is one worker process: the gateway for the sandboxes of this
// host, the activities, the task queues they are served on, and the metrics.
// The command "worker" is one, and the engine holds one.
package host

import (
	"cmp"
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.opentelemetry.io/otel/trace"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/worker"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
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

	GitCredentials  func(context.Context) (repo.Credential, error) // nil: git's own helpers only
	Program         func(name string) (string, error)              // nil: none can be lent
	Namespace       string
	Queue           string // empty: orchestrator.DefaultTaskQueue
	Identity        string // of the workers, in Temporal; empty: the SDK's
	GatewayURL      string // the gateway's public URL, for sandboxes elsewhere; may be empty
	GatewayListen   string // host:port where it answers then; empty: somebody else answers there
	GatewayCert     string // PEM files of its certificate and key; without, only loopback is listened on
	GatewayKey      string
	Deployment      string // label of our sandboxes; empty: this state folder's own
	Artifacts       string // the artifact store, a folder or a URL; empty: a folder of the state folder
	ArtifactOptions []artifact.Option
	Shared          bool     // commands on hosts without a worker see the artifact store, too
	LedgerURL       string   // of the PostgreSQL database that the ledger is in; empty: a file of the state folder
	DayBudget       fork.USD // the most that all runs together may spend on one day, by UTC; 0: no limit
	Version         string   // of the program, for the metrics
	AllowUnpriced   bool     // models without a price may be called, at the price of the dearest
	Logger          *slog.Logger
	Tracer          trace.Tracer // of the gateway's calls; nil: they are not traced. Temporal's are with its client

	// MetricsHost and MetricsPort are where metrics and health are served.
	MetricsHost string // an IP address or a name of this host; empty: DefaultMetricsHost
	MetricsPort int    // 0: any free one; NoMetrics: none

	// Registry is what the metrics are registered with: that of the metrics
	// handler that Temporal was connected with. Nil: one of its own.
	Registry *prometheus.Registry
}

// NoMetrics as a MetricsPort leaves metrics and health out.
const NoMetrics = -1

// DefaultMetricsHost is who can see the metrics: this host and nobody else.
const DefaultMetricsHost = "127.0.0.1"

// A Host serves until Stop.
type Host struct {
	o       Options
	gateway *gateway.Gateway
	doors   *doors
	store   *artifact.Store
	workers []worker.Worker
	watch   *watch // nil: there is none
	failed  chan error
	stop    context.CancelFunc // of the servers below
	serving sync.WaitGroup
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

	reg := o.Registry
	if reg == nil {
		reg = prometheus.NewRegistry()
	}
	m := h.count(reg)
	if h.gateway, err = gateway.Open(ctx, gateway.Options{
		Ledger:      ledger.Options{Dir: LedgerDir(o.Home), URL: o.LedgerURL, Name: id, DayBudget: o.DayBudget},
		Credentials: o.ModelCredentials, Prices: o.Prices, AllowUnpriced: o.AllowUnpriced, Observer: observer(m), Logger: o.Logger, Tracer: o.Tracer,
		NetURL: o.GatewayURL,
	}); err != nil {
		return nil, err
	}
	if err = h.listen(ctx, serve); err != nil {
		return nil, err
	}
	if h.doors, err = newDoors(serve, o.Home, h.gateway, &h.serving, o.Logger); err != nil {
		return nil, err
	}
	if h.store, err = Artifacts(ctx, o.Home, o.Artifacts, o.ArtifactOptions...); err != nil {
		return nil, err
	}
	temp := filepath.Join(o.Home, "tmp")
	if err = freshDir(temp); err != nil {
		return nil, err
	}
	if o.MetricsPort != NoMetrics {
		g := h.gateway
		h.watch = newWatch(o, reg, temporalAnswers(o.Temporal), check{"ledger", func(ctx context.Context) error {
			_, err := g.Usage(ctx, "nobody", 0) // a run that made no call
			return err
		}})
		h.watch.serve(serve, &h.serving)
	}
	own, err := Queue(o.Home, o.Queue)
	if err != nil {
		return nil, err
	}
	acts := activities.New(activities.Options{
		Providers: o.Providers, Gateway: h.gateway, Repo: Repo(o.Home, o.GitCredentials, h.store, o.Logger), Artifacts: h.store, Shared: o.Shared,
		Doors: h.doors, GatewayURL: o.GatewayURL, Program: o.Program,
		State: func(ctx context.Context, run string, num int) (orchestrator.RunState, error) {
			return orchestrator.StateOf(ctx, o.Temporal, run, num)
		},
		Held: func(ctx context.Context, run string, hold fork.Hold) error {
			return orchestrator.Fault(o.Temporal.SignalWorkflow(ctx, run, "", orchestrator.ForkHeld, hold))
		},
		Progress: func(ctx context.Context, run string, num int, step fork.Step) error {
			return orchestrator.Fault(o.Temporal.SignalWorkflow(ctx, fork.WorkflowID(run, num), "", orchestrator.Progress, step))
		},
		Deployment: o.Deployment, Namespace: o.Namespace,
		Queue: o.Queue, HostQueue: own,
		TempDir: temp, Metrics: m, Logger: o.Logger,
	})
	shared := worker.New(o.Temporal, o.Queue, h.workerOptions())
	orchestrator.Serve(shared)
	bound := worker.New(o.Temporal, acts.HostQueue, h.workerOptions())
	h.workers = []worker.Worker{bound, shared}
	for _, w := range h.workers {
		acts.Serve(w)
		if err = w.Start(); err != nil {
			return nil, fault.Wrap("start worker", orchestrator.Fault(err))
		}
	}
	if h.watch != nil {
		h.watch.started.Store(true)
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

// MetricsURL returns where the metrics are; "" when there are none, and why if
// that is not what was asked for.
func (h *Host) MetricsURL() (string, error) {
	if h.watch == nil {
		return "", nil
	}
	return h.watch.url(metricsPath)
}

// Drain says to those who ask for readiness that the host lets go of its work.
func (h *Host) Drain() {
	if h.watch != nil {
		h.watch.draining.Store(true)
	}
}

// Stop lets go of everything. Agents go on in their sandboxes; the next host
// in the same state folder follows them. It takes no more work at once, and
// waits a little for what can end. A second call does nothing.
func (h *Host) Stop() {
	h.Drain()
	var wg sync.WaitGroup
	for _, w := range h.workers {
		wg.Go(w.Stop)
	}
	wg.Wait()
	h.workers = nil
	for _, p := range h.o.Providers {
		if ready, ok := sandbox.As[sandbox.Standby](p); ok {
			ready.Close()
		}
	}
	h.stop()
	h.serving.Wait()
	if h.doors != nil {
		h.doors.leave()
		h.doors = nil
	}
	if h.gateway != nil {
		if err := h.gateway.Close(); err != nil {
			h.o.Logger.Error("The ledger is not closed in order", logs.Error, err)
		}
		h.gateway = nil
	}
	if h.store != nil {
		_ = h.store.Close()
		h.store = nil
	}
}

// count registers what the host counts, and what it is asked for.
func (h *Host) count(reg *prometheus.Registry) *metrics.Metrics {
	models := []string{}
	for _, model := range h.o.Prices.Models() {
		models = append(models, model.ID)
		models = append(models, model.Aliases...)
	}
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m := metrics.New(reg, metrics.Sets{Models: models, Providers: h.o.Providers.Names()})
	metrics.BuildInfo(reg, cmp.Or(h.o.Version, "dev"))
	m.ActiveSandboxes(reg, h.sandboxes)
	return m
}

// sandboxes counts what the providers have of ours.
func (h *Host) sandboxes(ctx context.Context) map[string]int {
	all := map[string]int{}
	for _, name := range h.o.Providers.Names() {
		if gated, ok := sandbox.As[sandbox.Gated](h.o.Providers[name]); ok && gated.Ready(ctx) != nil {
			continue // without a key there is nobody to ask
		}
		infos, err := h.o.Providers[name].List(ctx, map[string]string{
			sandbox.LabelDeployment: h.o.Deployment, sandbox.LabelNamespace: h.o.Namespace,
		})
		if err != nil {
			h.o.Logger.Debug("Sandboxes cannot be counted", logs.Provider, name, logs.Error, err)
			continue
		}
		all[name] = len(infos)
	}
	return all
}

// observer counts what happens at the gateway.
func observer(m *metrics.Metrics) gateway.Observer {
	return gateway.Observer{
		Admitted: m.CallAdmitted, Reserved: m.CallReserved, Refused: m.CallRefused, Limited: m.CallLimited, Paced: m.CallPaced,
		Settled: func(s gateway.Settled) {
			t := s.Tokens
			m.CallSettled(metrics.Call{
				Model: s.Model, Answered: s.Answered, Cost: s.Cost, Reserved: s.Reserved,
				Input: t.Input, Output: t.Output, CacheRead: t.CacheRead, CacheWrite: t.CacheWrite5m + t.CacheWrite1h,
			})
		},
	}
}
