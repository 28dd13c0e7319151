package endpoint

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// MaxSecrets is the most bytes that SetSecrets carries.
const MaxSecrets = 1 << 20

// Control is what an engine lets a command do.
type Control struct {
	// Stop starts the engine's orderly end. It is called once at most, on a
	// goroutine of its own, after the command has its answer; the context of
	// [Serve] may end because of it.
	Stop func()

	// SetSecrets takes credentials, in a form that the two ends agree on.
	// They go nowhere but here. Nil: fault.Unsupported.
	SetSecrets func(ctx context.Context, secrets []byte) error

	// Status returns what [Client.Ping] shows, a value that marshals to JSON.
	// Nil: nothing.
	Status func() any
}

// The paths of the control socket.
const (
	readyPath   = "/v1/ready"
	stopPath    = "/v1/stop"
	secretsPath = "/v1/secrets"
)

// answer is the body of every answer.
type answer struct {
	PID       int             `json:"pid"`
	StartTime uint64          `json:"start_time"`
	Status    json.RawMessage `json:"status,omitempty"`
	Fault     *faultAnswer    `json:"fault,omitempty"`
}

type faultAnswer struct {
	Kind fault.Kind `json:"kind"`
	Text string     `json:"text"`
	Hint string     `json:"hint,omitempty"`
}

// Serve answers commands on ln, which comes from [Lock.Listen], until ctx
// ends; then it lets the calls in flight finish, closes ln and returns nil. An
// engine that answers is taken to be ready, so call it last.
func Serve(ctx context.Context, ln net.Listener, c Control) error {
	const op = "engine control"
	self, err := look(os.Getpid())
	if err != nil {
		return fault.New(op, fault.Internal, "%w", err)
	}
	me := answer{PID: os.Getpid(), StartTime: self.start}

	var once sync.Once
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+readyPath, func(w http.ResponseWriter, _ *http.Request) {
		a := me
		if c.Status != nil {
			status, err := json.Marshal(c.Status())
			if err != nil {
				refuse(w, me, fault.New("status", fault.Internal, "%w", err))
				return
			}
			a.Status = status
		}
		reply(w, http.StatusOK, a)
	})
	mux.HandleFunc("POST "+stopPath, func(w http.ResponseWriter, _ *http.Request) {
		if c.Stop == nil {
			refuse(w, me, fault.New("stop", fault.Unsupported, "this engine cannot be stopped from outside"))
			return
		}
		reply(w, http.StatusAccepted, me)
		_ = http.NewResponseController(w).Flush()
		once.Do(func() { go c.Stop() })
	})
	mux.HandleFunc("PUT "+secretsPath, func(w http.ResponseWriter, r *http.Request) {
		if c.SetSecrets == nil {
			refuse(w, me, fault.New("set secrets", fault.Unsupported, "this engine takes no secrets"))
			return
		}
		secrets, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxSecrets))
		if err != nil {
			refuse(w, me, fault.New("set secrets", fault.Invalid, "%w", err))
			return
		}
		if err := c.SetSecrets(r.Context(), secrets); err != nil {
			refuse(w, me, err)
			return
		}
		reply(w, http.StatusOK, me)
	})

	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		// The answer to "stop" itself may be on its way.
		grace, stop := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer stop()
		if err = srv.Shutdown(grace); err != nil {
			err = errors.Join(err, srv.Close())
		}
		if served := <-done; err == nil {
			err = served
		}
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fault.New(op, fault.Internal, "%w", err)
	}
	return nil
}

func reply(w http.ResponseWriter, status int, a answer) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(a) // the command may be gone
}

func refuse(w http.ResponseWriter, a answer, err error) {
	a.Fault = &faultAnswer{Kind: fault.KindOf(err), Text: err.Error(), Hint: fault.HintOf(err)}
	reply(w, http.StatusUnprocessableEntity, a)
}
