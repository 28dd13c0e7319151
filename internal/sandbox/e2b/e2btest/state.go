package e2btest

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The states of a sandbox, as E2B names them.
const (
	Running = "running"
	Paused  = "paused"
)

// Sandbox is what [Server.Sandboxes] says of one.
type Sandbox struct {
	ID       string
	Template string
	Metadata map[string]string
	State    string // Running or Paused
	Created  time.Time
	Started  time.Time // or when it was last resumed
	End      time.Time // when it is killed, or paused, by itself; it does not move while paused
}

// A vm is one sandbox.
type vm struct {
	srv   *Server
	id    string
	token string // of its data plane; empty: none is asked for
	dir   string
	spec  spec

	// gate is held for reading by what works in the sandbox, and for writing
	// by what changes its state. The fields below it are written with both
	// it and Server.mu held, and read with one of them.
	gate    sync.RWMutex
	state   string // empty: gone
	created time.Time
	started time.Time
	end     time.Time
	timer   *time.Timer
	hidden  int // lists that do not show it yet

	opening sync.Mutex
	box     *box // nil: nobody has looked inside yet

	mu        sync.Mutex
	conns     map[net.Conn]int // that carry requests to it, and how many
	processes map[int]*process
	watchers  map[string]*watcher
}

// A snapshot is the files of a sandbox.
type snapshot struct {
	id      string
	name    string
	from    string // a sandbox
	dir     string
	created time.Time
}

// spec is what a sandbox was made of.
type spec struct {
	Template   string            `json:"templateID"`
	Timeout    *int              `json:"timeout"`
	Metadata   map[string]string `json:"metadata"`
	Env        map[string]string `json:"envVars"`
	Secure     bool              `json:"secure"`
	AutoPause  bool              `json:"autoPause"`
	AutoResume struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
}

// create makes a sandbox with the files of base, or of a template when base
// is empty.
func (s *Server) create(sp spec, base string, life time.Duration) (*vm, error) {
	id := randomID("i", 10)
	v := &vm{
		srv: s, id: id, dir: filepath.Join(s.dir, "sandboxes", id), spec: sp,
		conns: map[net.Conn]int{}, processes: map[int]*process{}, watchers: map[string]*watcher{},
	}
	if sp.Secure {
		v.token = randomID("ea_", 20)
	}
	if err := s.reserve(); err != nil {
		return nil, err
	}
	err := os.Mkdir(v.dir, 0o700)
	if err == nil && base != "" {
		err = copyTree(base, v.root())
	}
	s.mu.Lock()
	s.making--
	if err == nil && s.closed {
		err = errClosing
	}
	if err != nil {
		s.mu.Unlock()
		return nil, errors.Join(err, os.RemoveAll(v.dir))
	}
	defer s.mu.Unlock()
	v.state, v.hidden = Running, s.late
	v.created = time.Now()
	v.started = v.created
	v.setEnd(life)
	s.vms[id] = v
	return v, nil
}

// reserve takes the place of a sandbox that is being made or resumed.
func (s *Server) reserve() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosing
	}
	if s.opts.MaxConcurrent > 0 && s.running() >= s.opts.MaxConcurrent {
		return errTooMany
	}
	s.making++
	return nil
}

// running counts the sandboxes that run or are being made. The caller holds
// mu.
func (s *Server) running() int {
	n := s.making
	for _, v := range s.vms {
		if v.state == Running {
			n++
		}
	}
	return n
}

func (v *vm) root() string { return filepath.Join(v.dir, "root") }

// setEnd has the sandbox end after life, or at what the plan allows. The
// caller holds Server.mu.
func (v *vm) setEnd(life time.Duration) {
	if v.timer != nil {
		v.timer.Stop()
	}
	v.end = time.Now().Add(life)
	if longest := v.srv.opts.MaxLifetime; longest > 0 && v.end.Sub(v.started) > longest {
		v.end = v.started.Add(longest)
	}
	end := v.end
	v.timer = time.AfterFunc(time.Until(end), func() { v.endOfLife(end) })
}

func (v *vm) endOfLife(end time.Time) {
	v.srv.mu.Lock()
	due := v.state == Running && v.end.Equal(end)
	v.srv.mu.Unlock()
	switch {
	case !due:
	case v.spec.AutoPause:
		_ = v.pause() // who asked for a change meanwhile has it
	default:
		v.kill()
	}
}

// enter returns with the gate held when the sandbox runs, or with why it
// cannot be worked in.
func (v *vm) enter() error {
	v.gate.RLock()
	if v.state == Running {
		return nil
	}
	state := v.state
	v.gate.RUnlock()
	if state == Paused {
		return errPaused
	}
	return errGone
}

func (v *vm) leave() { v.gate.RUnlock() }

var (
	errGone    = errors.New("the sandbox was not found")
	errPaused  = errors.New("the sandbox is paused")
	errTooMany = errors.New("too many sandboxes")
	errClosing = errors.New("the server is closed")
)

// machine returns the box of a sandbox that was entered, and starts it when
// it is the first to look inside.
func (v *vm) machine() (*box, error) {
	v.opening.Lock()
	defer v.opening.Unlock()
	if v.box != nil {
		return v.box, nil
	}
	if err := v.lay(); err != nil {
		return nil, err
	}
	b, err := openBox(v.root(), v.srv.opts.Mounts)
	if err == nil {
		v.box = b
	}
	return b, err
}

// lay makes the files of the sandbox, when they are not there.
func (v *vm) lay() error {
	if _, err := os.Stat(v.root()); err == nil {
		return nil
	}
	half := v.root() + ".half"
	if err := errors.Join(os.RemoveAll(half), os.Mkdir(half, 0o755), plant(half, v.srv.opts.Mounts)); err != nil {
		return fmt.Errorf("make the files of a sandbox: %w", err)
	}
	return os.Rename(half, v.root())
}

// change sets the state. The caller holds the gate.
func (v *vm) change(state string) {
	v.srv.mu.Lock()
	defer v.srv.mu.Unlock()
	v.state = state
	if state != Running {
		v.timer.Stop()
	}
	if state == "" {
		delete(v.srv.vms, v.id)
	}
}

// pause stops every process. The connections are lost.
func (v *vm) pause() error {
	v.gate.Lock()
	defer v.gate.Unlock()
	if err := v.must(Running); err != nil {
		return err
	}
	if err := v.signalAll("STOP"); err != nil {
		return err
	}
	v.change(Paused)
	v.hangUp()
	return nil
}

// must is nil when the sandbox is in the state. The caller holds the gate.
func (v *vm) must(state string) error {
	switch v.state {
	case state:
		return nil
	case "":
		return errGone
	case Paused:
		return errPaused
	}
	return errRuns
}

var errRuns = errors.New("the sandbox is running")

// resume lets a paused sandbox go on for the given time, and reports whether
// it had to. Of one that runs the end is moved, but never closer.
func (v *vm) resume(life time.Duration) (resumed bool, err error) {
	v.gate.Lock()
	defer v.gate.Unlock()
	if v.state == "" {
		return false, errGone
	}
	if v.state == Running {
		v.srv.mu.Lock()
		defer v.srv.mu.Unlock()
		if time.Until(v.end) < life {
			v.setEnd(life)
		}
		return false, nil
	}
	if err := v.srv.reserve(); err != nil {
		return false, err
	}
	err = v.signalAll("CONT")
	v.srv.mu.Lock()
	defer v.srv.mu.Unlock()
	v.srv.making--
	if err != nil {
		return false, err
	}
	v.state, v.started = Running, time.Now()
	v.setEnd(life)
	return true, nil
}

func (v *vm) signalAll(sig string) error {
	v.opening.Lock()
	b := v.box
	v.opening.Unlock()
	if b == nil {
		return nil
	}
	return b.all(sig)
}

// kill ends the sandbox and removes its files. It reports whether there was
// one.
func (v *vm) kill() bool {
	// Who works in it for long is told before the gate is asked for.
	v.hangUp()
	v.gate.Lock()
	if v.state == "" {
		v.gate.Unlock()
		return false
	}
	v.change("")
	v.gate.Unlock()
	v.hangUp()
	v.opening.Lock()
	defer v.opening.Unlock()
	if v.box != nil {
		v.box.close()
	}
	v.forget()
	_ = os.RemoveAll(v.dir) // Close looks whether anything is left
	return true
}

// save copies the files of the sandbox as they stand at one moment. The
// connections are lost, the processes go on.
func (v *vm) save(to string) error {
	v.gate.Lock()
	defer v.gate.Unlock()
	if err := v.must(Running); err != nil {
		return err
	}
	v.opening.Lock()
	err := v.lay()
	v.opening.Unlock()
	if err != nil {
		return err
	}
	if err := v.signalAll("STOP"); err != nil {
		return err
	}
	v.hangUp()
	return errors.Join(copyTree(v.root(), to), v.signalAll("CONT"))
}

// carry notes that a connection carries a request to the sandbox.
func (v *vm) carry(c net.Conn, n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.conns[c] += n; v.conns[c] <= 0 {
		delete(v.conns, c)
	}
}

// hangUp cuts the connections to the sandbox.
func (v *vm) hangUp() {
	v.mu.Lock()
	conns := maps.Clone(v.conns)
	v.mu.Unlock()
	for c := range conns {
		_ = c.Close()
	}
}

func (v *vm) info() Sandbox {
	return Sandbox{ID: v.id, Template: v.spec.Template, Metadata: maps.Clone(v.spec.Metadata), State: v.state, Created: v.created, Started: v.started, End: v.end}
}
