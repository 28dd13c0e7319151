package gvisor

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A worker asks a guardian one thing on each connection. The guardian answers
// what is its own, and passes everything else on to init over a stream, as it
// is: so there is one protocol for both. Each message is four bytes of length,
// big-endian, then so many bytes of JSON; raw bytes follow some of them.
//
// protocol is its version. Fields are added, never re-meant, and what one side
// does not know it answers with fault.Unsupported, so that each can be the
// older one.
const protocol = 1

const (
	maxRequest = 8 << 20   // arguments and environment, which the kernel bounds at 2 MiB, in base64
	maxReply   = 256 << 10 // what comes back is a sentence at most
	maxChunk   = 256 << 10 // of output, and of a file that goes in
	maxText    = 4096
)

// A request is what a worker wants. Strings that people outside chose are
// bytes: arguments and names of files need not be text.
type request struct {
	Version  int            `json:"version"` // protocol
	Op       string         `json:"op"`
	ID       string         `json:"id,omitempty"`
	Cmd      *command       `json:"cmd,omitempty"`
	Signal   string         `json:"signal,omitempty"`
	Path     []byte         `json:"path,omitempty"`
	Stream   sandbox.Stream `json:"stream,omitempty"`
	Offset   int64          `json:"offset,omitempty"`
	Size     int            `json:"size,omitempty"`
	Deadline time.Time      `json:"deadline,omitzero"`
	Base     string         `json:"base,omitempty"`
	Setup    *setup         `json:"setup,omitempty"`
	Port     int            `json:"port,omitempty"`

	TerminalSize *sandbox.TerminalSize `json:"terminal_size,omitempty"`
}

// What the guardian answers.
const (
	opHello    = "hello"
	opDeadline = "deadline"
	opFreeze   = "freeze"
	opSave     = "save" // write a checkpoint; it is there until the connection is closed
	opSnapshot = "snapshot"
	opUsage    = "usage"
	opPause    = "pause" // these two have init do it
	opResume   = "resume"
	opDestroy  = "destroy" // answered when everything but the guardian itself is gone
)

// What init answers.
const (
	opSetup   = "setup" // the guardian's first
	opHealth  = "health"
	opStart   = "start"
	opProcess = "process" // how is it; at once
	opWait    = "wait"    // the same, when it has ended
	opSignal  = "signal"
	opOutput  = "output" // raw: Size bytes of the response
	opRead    = "read"   // raw: the file, to the end of the stream
	opWrite   = "write"  // raw, to init: chunks, the last one empty; then a second response
	opPack    = "pack"   // the guardian's; raw: packed files, all that a base holds
	opCopy    = "copy"   // the guardian's; the same, of a sandbox that goes on

	opTerminal = "terminal" // raw, both ways: chunks, see chunkData
	opDial     = "dial"     // raw, both ways: what the connection carries
)

// A response answers a request.
type response struct {
	Version  int           `json:"version"`
	Fault    *wireFault    `json:"fault,omitempty"`
	Instance string        `json:"instance,omitempty"` // opHello
	State    state         `json:"state,omitempty"`    // opHello
	Exit     *sandbox.Exit `json:"exit,omitempty"`     // opProcess, opWait; absent: it runs
	Size     int           `json:"size,omitempty"`     // opOutput
	Image    string        `json:"image,omitempty"`    // opSave: the folder of the checkpoint

	Usage *sandbox.Usage `json:"usage,omitempty"` // opUsage
}

// A state of a sandbox.
type state string

const (
	starting state = "starting"
	ready    state = "ready"
	used     state = "used" // frozen into a base; it can only be destroyed
	dying    state = "dying"
)

// A setup tells init what to make of an empty sandbox.
type setup struct {
	Base    bool            `json:"base"`    // there is an image below the folders that can be written to
	Gateway bool            `json:"gateway"` // somebody outside answers
	Limits  sandbox.Limits  `json:"limits"`
	Mounts  []sandbox.Mount `json:"mounts"` // those that stand in folders that can be written to; Source is a path inside
}

// A command is a sandbox.Cmd on its way.
type command struct {
	Args  [][]byte `json:"args"`
	Env   [][]byte `json:"env"`
	Dir   []byte   `json:"dir,omitempty"`
	Stdin []byte   `json:"stdin,omitempty"`
}

// A greeting is the first thing a guardian says, to the worker that started
// it: that the sandbox is ready, or why there is none.
type greeting struct {
	Fault *wireFault `json:"fault,omitempty"`
}

// A wireFault is a fault.Error on its way. Its texts are cut: they can hold
// names that a stranger chose.
type wireFault struct {
	Kind fault.Kind `json:"kind"`
	Text string     `json:"text"`
	Hint string     `json:"hint,omitempty"`
}

func toWire(err error) *wireFault {
	if err == nil {
		return nil
	}
	return &wireFault{Kind: fault.KindOf(err), Text: cut(err.Error()), Hint: cut(fault.HintOf(err))}
}

// err returns the fault as an error of op, or nil.
func (w *wireFault) err(op string) error {
	if w == nil {
		return nil
	}
	return &fault.Error{Op: op, Kind: w.Kind, Err: errors.New(cut(w.Text)), Hint: cut(w.Hint)}
}

func cut(s string) string {
	if len(s) > maxText {
		return s[:maxText] + "…"
	}
	return s
}

var (
	errMessage = errors.New("malformed message")
	errEmpty   = errors.New("an empty message")
)

// readMessage reads one message of at most limit bytes. An empty one is
// errEmpty.
func readMessage(r io.Reader, v any, limit int) error {
	body, err := readChunk(r, limit)
	if err != nil {
		return err
	}
	if len(body) == 0 {
		return errEmpty
	}
	if err := json.Unmarshal(body, v); err != nil {
		return errors.Join(errMessage, err)
	}
	return nil
}

func writeMessage(w io.Writer, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeChunk(w, body)
}

// readChunk reads four bytes of length and so many bytes.
func readChunk(r io.Reader, limit int) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if int64(n) > int64(limit) {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", errMessage, n, limit)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, errors.Join(errMessage, err)
	}
	return body, nil
}

func writeChunk(w io.Writer, body []byte) error {
	out := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(out, uint32(len(body)))
	_, err := w.Write(append(out, body...))
	return err
}

func cleanAbsolute(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && !strings.ContainsRune(p, 0) && len(p) < 4096
}

// checkStart reads an opStart the way a stranger's form is read.
func checkStart(op string, q request) error {
	bad := func(format string, args ...any) error { return fault.New(op, fault.Invalid, format, args...) }
	if !sandbox.ValidID(q.ID) {
		return bad("%q is not an id of a process", cut(q.ID))
	}
	if q.Cmd == nil || len(q.Cmd.Args) == 0 {
		return bad("the command is empty")
	}
	for _, list := range [][][]byte{q.Cmd.Args, q.Cmd.Env} {
		for _, s := range list {
			if strings.IndexByte(string(s), 0) >= 0 {
				return bad("arguments and environment cannot hold a zero byte")
			}
		}
	}
	for _, kv := range q.Cmd.Env {
		if strings.IndexByte(string(kv), '=') <= 0 {
			return bad("%q in the environment is not K=V", cut(string(kv)))
		}
	}
	if !cleanAbsolute(string(q.Cmd.Dir)) {
		return bad("folder %q is not a clean absolute path", cut(string(q.Cmd.Dir)))
	}
	if len(q.Cmd.Stdin) > 0 && !cleanAbsolute(string(q.Cmd.Stdin)) {
		return bad("standard input %q is not a clean absolute path", cut(string(q.Cmd.Stdin)))
	}
	return nil
}
