// Package endpoint is how a command finds the engine of a state folder and
// talks to it without linking it.
//
// The state folder holds four things of ours:
//
//	engine.lock        held by the engine for as long as it lives: see [Acquire]
//	engine-start.lock  held by a command while it starts an engine: see [AcquireStart]
//	engine.json        where the engine listens: see [Endpoint]
//	engine.sock        the engine's control socket: see [Serve] and [Dial]
//
// The lock is the truth: the kernel drops it when its holder dies, however it
// dies. The file and the socket may be left over from an engine that was
// killed, so a reader asks [Endpoint.Alive] before it believes them.
package endpoint

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// The names in the state folder.
const (
	fileName      = "engine.json"
	lockName      = "engine.lock"
	startLockName = "engine-start.lock"
	socketName    = "engine.sock"
)

// maxFile bounds what Read takes in.
const maxFile = 64 << 10

// An Endpoint says where an engine listens and which process it is.
type Endpoint struct {
	Address string `json:"address"`           // host:port of Temporal's gRPC
	UI      string `json:"ui,omitempty"`      // URL of the Web UI; empty: there is none
	Metrics string `json:"metrics,omitempty"` // URL of the metrics; empty: there are none

	// Lacks says what the engine does without though it was asked for, in
	// whole sentences; who starts it is told.
	Lacks []string `json:"lacks,omitempty"`

	// PID, StartTime and Boot name the process beyond doubt. StartTime is in
	// clock ticks since boot, as in /proc/<pid>/stat, so that a pid that was
	// given to another process is not mistaken for the engine; Boot is the
	// kernel's id of this boot, without which the two repeat. [Write] fills
	// in all three, and Socket and Started, where they are zero.
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
	Boot      string `json:"boot,omitempty"`

	Identity string    `json:"identity"` // of the engine's worker, new for each process
	Version  string    `json:"version"`  // of the program
	Socket   string    `json:"socket"`   // path of the control socket
	Started  time.Time `json:"started"`
}

// Write puts e into dir, readable by its owner only. A reader sees the old
// endpoint or the new one, never half of one. The caller holds the [Lock].
func Write(dir string, e Endpoint) error {
	const op = "engine endpoint: write"
	if err := Prepare(dir); err != nil {
		return fault.Wrap(op, err)
	}
	if e.PID == 0 {
		e.PID = os.Getpid()
		self, err := look(e.PID)
		if err != nil {
			return fault.New(op, fault.Internal, "%w", err)
		}
		e.StartTime, e.Boot = self.start, bootID()
	}
	if e.Socket == "" {
		e.Socket = filepath.Join(dir, socketName)
	}
	if e.Started.IsZero() {
		e.Started = time.Now().UTC()
	}
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return fault.New(op, fault.Internal, "%w", err)
	}
	if err := replace(filepath.Join(dir, fileName), append(text, '\n')); err != nil {
		return diskFault(op, dir, err)
	}
	return nil
}

// replace writes a file of mode 0600 in one step.
func replace(path string, text []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// Read returns the endpoint in dir. It is fault.NotFound when there is none;
// one that is there may be of an engine that has died since.
func Read(dir string) (Endpoint, error) {
	const op = "engine endpoint: read"
	f, err := os.Open(filepath.Join(dir, fileName))
	if errors.Is(err, fs.ErrNotExist) {
		return Endpoint{}, fault.New(op, fault.NotFound, "no engine was started in %s", dir)
	}
	if err != nil {
		return Endpoint{}, diskFault(op, dir, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return Endpoint{}, diskFault(op, dir, err)
	}
	e, err := decode(text)
	if err != nil {
		return Endpoint{}, fault.New(op, fault.Invalid, "%s: %w", f.Name(), err).
			Hinted("Remove this file; the next command starts an engine.")
	}
	return e, nil
}

func decode(text []byte) (Endpoint, error) {
	var e Endpoint
	if err := json.Unmarshal(text, &e); err != nil {
		return Endpoint{}, err
	}
	if e.PID <= 0 || e.Address == "" {
		return Endpoint{}, errors.New("no pid or no address")
	}
	return e, nil
}

// Remove takes the endpoint and the socket out of dir; what is already gone is
// no error. The caller holds the [Lock].
func Remove(dir string) error {
	for _, name := range []string{fileName, socketName} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return diskFault("engine endpoint: remove", dir, err)
		}
	}
	return nil
}

// Alive reports whether the very process that wrote e still runs. That it
// runs does not mean that it answers: see [Client.Ping].
func (e Endpoint) Alive() bool {
	return e.PID > 0 && e.Boot == bootID() && alive(e.PID, e.StartTime)
}

func alive(pid int, start uint64) bool {
	p, err := look(pid)
	return err == nil && !p.zombie && p.start == start
}
