// Package engine runs a Temporal server, and its Web UI, inside this process:
// what a command talks to when no cluster was named.
//
// All state is one SQLite file. The server has no say in which version of its
// schema it finds there, so the file carries a stamp of ours and is rebuilt
// when that is not the stamp of this build: see schema.go.
//
// The build tag noembed leaves the server out, for workers of a cluster that
// have no use for its 130 MB; [Start] is then fault.Unsupported. Only the
// files named *_embed.go import it.
package engine

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	enumspb "go.temporal.io/api/enums/v1"

	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// DatabaseName is the name of the SQLite file in the state folder. The file
// of the version before, which a rebuild leaves, has ".bak" behind it.
const DatabaseName = "temporal.db"

// The defaults of [Options].
const (
	DefaultHost      = "127.0.0.1"
	DefaultNamespace = "default"
	DefaultRetention = 7 * 24 * time.Hour
)

// NoUI as the UIPort leaves the Web UI out.
const NoUI = -1

// Options say what to start.
type Options struct {
	// Dir is the state folder. Required.
	Dir string

	// Lock is the caller's hold on Dir. Nil: Start takes the lock, which is
	// fault.Conflict when another engine has it, and Stop gives it back.
	Lock *endpoint.Lock

	// Host is the IP address to listen on; empty: 127.0.0.1. Neither Temporal
	// nor its UI asks who calls, so anything else is for a machine that
	// guards its ports in another way.
	Host string

	// Port is Temporal's gRPC port, UIPort that of the Web UI; 0: any free
	// one. NoUI leaves the UI out.
	Port, UIPort int

	// Namespace is made when it is missing; empty: "default".
	Namespace string

	// SearchAttributes of the namespace are added when they are missing. One
	// that is there with another type is fault.Conflict.
	SearchAttributes map[string]enumspb.IndexedValueType

	// Retention is how long an ended workflow is kept; 0: seven days. It
	// holds for workflows that end from now on.
	Retention time.Duration

	// Logger takes what the server has to say; nil: nobody does. Level is the
	// least of it that is wanted; nil: warnings.
	Logger *slog.Logger
	Level  slog.Leveler
}

// withDefaults returns o with its zero values filled in, or what is wrong
// with it.
func (o Options) withDefaults() (Options, error) {
	const op = "engine: options"
	if o.Dir == "" {
		return o, fault.New(op, fault.Invalid, "no state folder was named")
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return o, fault.New(op, fault.Internal, "%w", err)
	}
	if o.Lock != nil && filepath.Clean(o.Lock.Dir()) != filepath.Clean(o.Dir) {
		return o, fault.New(op, fault.Internal, "the lock is on %s, not on %s", o.Lock.Dir(), o.Dir)
	}
	o.Dir = dir
	if o.Host == "" {
		o.Host = DefaultHost
	}
	if net.ParseIP(o.Host) == nil {
		return o, fault.New(op, fault.Invalid, "%q is not an IP address", o.Host)
	}
	if o.Port < 0 || o.Port > 65535 {
		return o, fault.New(op, fault.Invalid, "no port has the number %d", o.Port)
	}
	if o.UIPort < NoUI || o.UIPort > 65535 {
		return o, fault.New(op, fault.Invalid, "no port has the number %d", o.UIPort)
	}
	if o.Namespace == "" {
		o.Namespace = DefaultNamespace
	}
	if o.Retention == 0 {
		o.Retention = DefaultRetention
	}
	// The server takes no less: see MinRetentionLocal in its common/namespace.
	if o.Retention < time.Hour {
		return o, fault.New(op, fault.Invalid, "a retention of %v is under an hour", o.Retention)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Level == nil {
		o.Level = slog.LevelWarn
	}
	return o, nil
}

// An Engine is a server that runs.
type Engine struct {
	address string
	ui      string
	file    string
	quiet   *threshold
	web     *http.Server
	server  interface{ Stop() error }
	lock    *endpoint.Lock // nil: it is the caller's
	failed  chan error

	stop    sync.Once
	stopErr error
}

// Start starts the server and waits until the namespace can be worked in,
// which takes about half a second. A port that is taken is fault.Conflict; a
// database that this build cannot read is fault.Unsupported or fault.Invalid
// and is left as it is. ctx bounds the start only.
func Start(ctx context.Context, o Options) (_ *Engine, err error) {
	const op = "engine: start"
	if !Embedded {
		return nil, fault.New(op, fault.Unsupported, "this binary was built without the embedded server").
			Hinted("Install sandbox-engine beside it, or set TEMPORAL_ADDRESS to a Temporal server.")
	}
	if o, err = o.withDefaults(); err != nil {
		return nil, err
	}
	e := &Engine{
		file:   filepath.Join(o.Dir, DatabaseName),
		quiet:  newThreshold(o.Level),
		failed: make(chan error, 1),
	}
	e.quiet.hush()
	var undo []func()
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				undo[i]()
			}
		}
	}()

	if o.Lock == nil {
		if e.lock, err = endpoint.Acquire(o.Dir); err != nil {
			return nil, err
		}
		undo = append(undo, func() { _ = e.lock.Release() })
	}

	// What can be refused is refused before the server starts: it ends the
	// process when it cannot have a port.
	var ui net.Listener
	if o.UIPort != NoUI {
		if ui, err = listen(ctx, uiPort, o.Host, o.UIPort); err != nil {
			return nil, err
		}
		undo = append(undo, func() { _ = ui.Close() })
	}
	ports, err := choosePorts(ctx, o.Host, o.Port)
	if err != nil {
		return nil, err
	}
	want, err := builtSchema()
	if err != nil {
		return nil, fault.New(op, fault.Internal, "%w", err)
	}
	if err := prepare(ctx, e.file, want, o.Logger); err != nil {
		return nil, err
	}

	e.address = net.JoinHostPort(dialable(o.Host), strconv.Itoa(ports.frontend))
	logger := slog.New(e.quiet.over(o.Logger.Handler()))
	if e.server, err = launch(ctx, launchOptions{Options: o, file: e.file, address: e.address, ports: ports, logger: logger, failed: e.failed}); err != nil {
		return nil, fault.Wrap(op, err)
	}
	undo = append(undo, func() { _ = e.stopServer() })
	if err := ready(ctx, e.address, o); err != nil {
		return nil, err
	}
	if ui != nil {
		_, port, _ := net.SplitHostPort(ui.Addr().String())
		e.ui = (&url.URL{Scheme: "http", Host: net.JoinHostPort(dialable(o.Host), port)}).String()
		handler, err := webHandler(e.address, o.Namespace)
		if err != nil {
			return nil, fault.New(op, fault.Internal, "web ui: %w", err)
		}
		e.web = &http.Server{
			Handler:           guardHost(handler, o.Host, port),
			ReadHeaderTimeout: 10 * time.Second,
			ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
		}
		go func() {
			if err := e.web.Serve(ui); !errors.Is(err, http.ErrServerClosed) {
				report(e.failed, fault.New("engine: web ui", fault.Internal, "%w", err))
			}
		}()
	}
	e.quiet.unhush()
	return e, nil
}

// stopWithin bounds the server's stop: a part of it that has died may be
// waited for by the others.
const stopWithin = 20 * time.Second

func (e *Engine) stopServer() error {
	done := make(chan error, 1)
	go func() { done <- e.server.Stop() }()
	select {
	case err := <-done:
		return err
	case <-time.After(stopWithin):
		return fault.New("server", fault.Timeout, "it has not ended within %v", stopWithin)
	}
}

// report keeps the first error only: what follows follows from it.
func report(failed chan<- error, err error) {
	select {
	case failed <- err:
	default:
	}
}

// Address returns the host:port of Temporal's gRPC.
func (e *Engine) Address() string { return e.address }

// UIAddress returns the URL of the Web UI, "" when there is none.
func (e *Engine) UIAddress() string { return e.ui }

// Failed yields an error when a part of the engine has died by itself, once at
// most. All that is left to do is Stop, and start again.
func (e *Engine) Failed() <-chan error { return e.failed }

// Stop ends the UI and the server, which takes about a second, and leaves the
// database in one file. Workers and clients of this engine should be closed
// before. A second call waits for the first and returns the same.
//
// The server's SQLite plugin never closes a file, so this process may start
// another engine on the same Dir, but not after the file was replaced.
func (e *Engine) Stop() error {
	e.stop.Do(func() {
		const op = "engine: stop"
		e.quiet.hush()
		var errs []error
		if e.web != nil {
			errs = append(errs, e.web.Close())
		}
		errs = append(errs, e.stopServer())
		if err := checkpoint(context.Background(), e.file); err != nil {
			errs = append(errs, err)
		}
		if e.lock != nil {
			errs = append(errs, e.lock.Release())
		}
		if err := errors.Join(errs...); err != nil {
			e.stopErr = fault.New(op, fault.Internal, "%w", err)
		}
	})
	return e.stopErr
}
