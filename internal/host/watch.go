package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.temporal.io/sdk/client"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/metrics"
)

// The paths of the watch.
const (
	metricsPath = "/metrics"
	healthPath  = "/healthz" // 200 for as long as the process can answer at all
	readyPath   = "/readyz"  // 200 when it takes work and what it depends on answers, else 503
)

// A watch is where others see how the host does: metrics and health. Nothing
// that goes wrong with it stops a run: a port that is taken is tried again.
type watch struct {
	http  *http.Server
	again time.Duration // between two tries for the port
	host  string
	port  int
	log   *slog.Logger

	started  atomic.Bool // the host serves its queues
	draining atomic.Bool // the host lets go of them
	checks   []check

	mu      sync.Mutex
	addr    net.Addr // nil: it does not listen
	trouble error    // why not
}

// A check is one thing that the host cannot work without.
type check struct {
	name string
	ask  func(context.Context) error
}

// checkTime bounds how long readiness waits for all that it asks.
const checkTime = 3 * time.Second

func newWatch(o Options, reg prometheus.Gatherer, checks ...check) *watch {
	w := &watch{again: 15 * time.Second, host: o.MetricsHost, port: o.MetricsPort, log: o.Logger, checks: checks}
	if w.host == "" {
		w.host = DefaultMetricsHost
	}
	mux := http.NewServeMux()
	mux.Handle("GET "+metricsPath, metrics.Handler(reg))
	mux.HandleFunc("GET "+healthPath, func(rw http.ResponseWriter, _ *http.Request) { fmt.Fprintln(rw, "ok") })
	mux.HandleFunc("GET "+readyPath, w.ready)
	w.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(o.Logger.Handler(), slog.LevelDebug),
	}
	return w
}

// serve listens until ctx is done. It returns at once, and says so when it
// could not listen yet.
func (w *watch) serve(ctx context.Context, serving *sync.WaitGroup) {
	ln := w.listen()
	serving.Go(func() {
		defer context.AfterFunc(ctx, func() { _ = w.http.Close() })()
		tick := time.NewTicker(w.again)
		defer tick.Stop()
		for ln == nil {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if ln = w.listen(); ln != nil {
					w.log.Info("Metrics are served now", logs.Address, ln.Addr().String())
				}
			}
		}
		if err := w.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			w.log.Error("Metrics are not served any more", logs.Error, err)
		}
	})
}

// listen tries for the port once. What is wrong is said the first time.
func (w *watch) listen() net.Listener {
	ln, err := net.Listen("tcp", net.JoinHostPort(w.host, strconv.Itoa(w.port)))
	w.mu.Lock()
	defer w.mu.Unlock()
	first := w.trouble == nil
	if err == nil {
		w.addr, w.trouble = ln.Addr(), nil
		return ln
	}
	w.trouble = MetricsFault(w.host, w.port, err)
	if first {
		w.log.Warn("Metrics and health are not served; runs go on, and the port is tried again", logs.Error, w.trouble, logs.Hint, fault.HintOf(w.trouble))
	}
	return nil
}

// MetricsFault says which setting to change when the metrics cannot be served
// at an address, for the error that listening there gave.
func MetricsFault(host string, port int, err error) error {
	const op = "metrics"
	var dns *net.DNSError
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fault.New(op, fault.Conflict, "port %d (METRICS_PORT) is taken", port).
			Hinted("Choose another with --metrics-port or METRICS_PORT (0: any free one), or set DISABLE_METRICS=true.")
	case errors.Is(err, fs.ErrPermission):
		return fault.New(op, fault.Denied, "port %d (METRICS_PORT) may not be listened on by this user", port).
			Hinted("Choose one above 1023 with --metrics-port or METRICS_PORT.")
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.As(err, &dns):
		return fault.New(op, fault.Invalid, "%q (METRICS_HOST) is no address of this host", host).
			Hinted("Set --metrics-host or METRICS_HOST to 127.0.0.1, to 0.0.0.0 for all addresses, or to one that this host has.")
	}
	return fault.New(op, fault.Internal, "METRICS_HOST, METRICS_PORT: %w", err)
}

// url returns where path is served, or "" and why it is not.
func (w *watch) url(path string) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.addr == nil {
		return "", w.trouble
	}
	host, port, _ := net.SplitHostPort(w.addr.String())
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = DefaultMetricsHost // all addresses: that of this host is one
	}
	return "http://" + net.JoinHostPort(host, port) + path, nil
}

// ready answers whether the host takes work.
func (w *watch) ready(rw http.ResponseWriter, r *http.Request) {
	said := struct {
		Ready  bool              `json:"ready"`
		Checks map[string]string `json:"checks"`
	}{Ready: true, Checks: map[string]string{}}
	say := func(name, text string, good bool) {
		said.Checks[name] = text
		said.Ready = said.Ready && good
	}
	switch {
	case w.draining.Load():
		say("worker", "it lets go of its work", false)
	case !w.started.Load():
		say("worker", "it starts", false)
	default:
		say("worker", "ok", true)
		ctx, cancel := context.WithTimeout(r.Context(), checkTime)
		defer cancel()
		for _, c := range w.checks {
			if err := c.ask(ctx); err != nil {
				// The kind only: an error may name hosts and users, and nobody has to log in here.
				say(c.name, string(fault.KindOf(err)), false)
				continue
			}
			say(c.name, "ok", true)
		}
	}
	rw.Header().Set("Content-Type", "application/json")
	if !said.Ready {
		rw.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(rw).Encode(said) // who asked is gone
}

// temporalAnswers is the check of the connection to Temporal.
func temporalAnswers(c client.Client) check {
	return check{"temporal", func(ctx context.Context) error {
		if _, err := c.CheckHealth(ctx, &client.CheckHealthRequest{}); err != nil {
			return &fault.Error{Kind: fault.Unreachable, Err: err}
		}
		return nil
	}}
}
