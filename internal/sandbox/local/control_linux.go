package local

import (
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A request is what a worker asks a supervisor, one on each connection. A
// write has a second frame, opCommit, after the worker has filled the file. A
// terminal has a second response, with the exit of its command, and is hung up
// when the connection ends before.
type request struct {
	Version  int       `json:"version"` // protocol
	Op       string    `json:"op"`
	ID       string    `json:"id,omitempty"`
	Cmd      *command  `json:"cmd,omitempty"`
	Signal   string    `json:"signal,omitempty"`
	Path     []byte    `json:"path,omitempty"`
	Deadline time.Time `json:"deadline,omitzero"`
	Base     string    `json:"base,omitempty"`
	Size     *size     `json:"size,omitempty"`    // opTerminal
	Network  string    `json:"network,omitempty"` // opDial: "tcp4" or "tcp6"
}

// A size is a sandbox.TerminalSize on its way.
type size struct {
	Rows    uint16 `json:"rows"`
	Columns uint16 `json:"columns"`
}

// What a worker can ask, beside opStart, opSignal, opRead and opWrite.
const (
	opHello    = "hello"
	opHealth   = "health"
	opProcess  = "process" // how is it; at once
	opWait     = "wait"    // the same, when it has ended
	opDeadline = "deadline"
	opFreeze   = "freeze"
	opSnapshot = "snapshot" // called off when the worker goes away
	opUsage    = "usage"    // what the sandbox uses; init is asked the same
	opDestroy  = "destroy"  // answered when everything but the supervisor itself is gone
	opPause    = "pause"
	opResume   = "resume"
	opTerminal = "terminal" // its outer end comes with the answer
	opDial     = "dial"     // a socket of the sandbox's network comes with the answer, for the worker to connect
)

// A response answers a request.
type response struct {
	Version  int            `json:"version"`
	Fault    *wireFault     `json:"fault,omitempty"`
	Instance string         `json:"instance,omitempty"` // opHello
	State    state          `json:"state,omitempty"`    // opHello
	Exit     *sandbox.Exit  `json:"exit,omitempty"`     // absent: it runs
	Usage    *sandbox.Usage `json:"usage,omitempty"`    // opUsage
}

// A state of a sandbox.
type state string

const (
	starting state = "starting"
	ready    state = "ready"
	used     state = "used"  // frozen into a base; it can only be destroyed
	spent    state = "spent" // init died for want of memory; exits and output are there
	dying    state = "dying"
)

// A greeting is the first thing a supervisor says, to the worker that started
// it: that the sandbox is ready, or why there is none.
type greeting struct {
	Fault *wireFault `json:"fault,omitempty"`

	// Missing are the limits that no cgroup enforces.
	Missing []sandbox.Limit `json:"missing,omitempty"`
}

// The descriptors that a supervisor is started with.
const (
	lifeFD     = 3 // the life file, locked
	greetingFD = 4
	callFD     = 5 // of a spare one only: what it is to become comes from here
)
