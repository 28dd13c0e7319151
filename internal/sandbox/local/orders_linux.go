package local

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// An order is what the supervisor tells init; every order has one answer with
// the same Seq. Strings that people outside chose are bytes: arguments and
// file names need not be text.
type order struct {
	Seq     uint64   `json:"seq"`
	Op      string   `json:"op"`
	Setup   *setup   `json:"setup,omitempty"`   // opStage, opSetup
	ID      string   `json:"id,omitempty"`      // opStart, opSignal, opTerminal
	Cmd     *command `json:"cmd,omitempty"`     // opStart, whose stdout and stderr travel along, and opTerminal
	Signal  int      `json:"signal,omitempty"`  // opSignal
	Path    []byte   `json:"path,omitempty"`    // opRead, opWrite
	Token   uint64   `json:"token,omitempty"`   // opCommit, opAbort: the Seq of the opWrite
	Patient bool     `json:"patient,omitempty"` // opHalt: also what the kernel keeps waiting must have stopped
	Size    *size    `json:"size,omitempty"`    // opTerminal

	Network string `json:"network,omitempty"` // opDial
	Most    int64  `json:"most,omitempty"`    // opUsage: at more memory than this, init looks closely
}

const (
	opStage   = "stage" // the first order: makes what all sandboxes have
	opSetup   = "setup" // the second: makes it the one that was asked for
	opPing    = "ping"
	opStart   = "start"
	opSignal  = "signal"
	opRead    = "read"
	opWrite   = "write"
	opCommit  = "commit"
	opAbort   = "abort"
	opHalt    = "halt"     // everything but init stops
	opWake    = "wake"     // and goes on
	opKillAll = "kill-all" // everything but init
)

// A setup says what a sandbox is made of. For opStage that is the identity and
// the links of the record, and mounts of the host's system; for opSetup all but
// those.
type setup struct {
	Record    record            `json:"record"`
	Box       string            `json:"box"`    // the sandbox's folder, of use to an ordinary user only
	Mounts    []mount           `json:"mounts"` // their descriptors travel along; absent: init opens them
	HostLinks map[string]string `json:"host_links"`
}

// A command is a sandbox.Cmd on its way.
type command struct {
	Args  [][]byte `json:"args"`
	Env   [][]byte `json:"env"`
	Dir   []byte   `json:"dir,omitempty"`
	Stdin []byte   `json:"stdin,omitempty"`
}

// An answer is what init says: to an order, or, with Seq 0, that a process
// has ended.
type answer struct {
	Seq   uint64       `json:"seq,omitempty"`
	Fault *wireFault   `json:"fault,omitempty"`
	Ended *ended       `json:"ended,omitempty"`
	Exit  sandbox.Exit `json:"exit"`           // of an opStart whose program could not run: Note says why
	Note  string       `json:"note,omitempty"` // for the process's stderr

	Usage *sandbox.Usage `json:"usage,omitempty"` // opUsage
}

type ended struct {
	ID   string       `json:"id"`
	Exit sandbox.Exit `json:"exit"`
}

// A wireFault is a fault.Error on its way. Its texts are cut: they can hold
// names that a stranger chose.
type wireFault struct {
	Kind fault.Kind `json:"kind"`
	Text string     `json:"text"`
	Hint string     `json:"hint,omitempty"`
}

const maxText = 4096

func toWire(err error) *wireFault {
	if err == nil {
		return nil
	}
	return &wireFault{Kind: fault.KindOf(err), Text: cut(err.Error()), Hint: cut(fault.HintOf(err))}
}

// kinds are those that can come over the wire. A kind decides what is tried
// again and what users are told: nobody else may make one up.
var kinds = []fault.Kind{fault.Internal, fault.Invalid, fault.NotFound, fault.Denied, fault.Unsupported, fault.Unavailable, fault.Unreachable,
	fault.OverBudget, fault.Timeout, fault.Lost, fault.Cancelled, fault.Conflict, fault.Full}

// err returns the fault as an error of op, or nil.
func (w *wireFault) err(op string) error {
	if w == nil {
		return nil
	}
	kind := fault.Internal
	if slices.Contains(kinds, w.Kind) {
		kind = w.Kind
	}
	return &fault.Error{Op: op, Kind: kind, Err: errors.New(cut(w.Text)), Hint: cut(w.Hint)}
}

func cut(s string) string {
	if len(s) > maxText {
		return s[:maxText] + "…"
	}
	return s
}

// pathFault gives an error about a path inside the sandbox its kind: a path
// is the caller's choice.
func pathFault(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return fault.New(op, fault.NotFound, "%w", err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fileFault(op, err)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return fault.New(op, fault.Unavailable, "%w", err)
	}
	return fault.New(op, fault.Invalid, "%w", err)
}
