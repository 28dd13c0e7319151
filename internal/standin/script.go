package standin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Script is what the stand-in says in one conversation: either Steps, or
// one of several Variants of them. See the package comment for how a
// conversation gets its variant.
type Script struct {
	Steps    []Step         `json:"steps,omitempty"`    // what is said, one step an answer; empty when there are Variants
	Variants [][]Step       `json:"variants,omitempty"` // other ways to play the same script
	Sessions map[string]int `json:"sessions,omitempty"` // session id -> number of its variant, from 1; may be nil
}

// A Step is one answer of the model. The zero Step is an empty answer.
type Step struct {
	Thinking     string   `json:"thinking,omitempty"`
	Text         string   `json:"text,omitempty"`
	Tools        []Tool   `json:"tools,omitempty"`         // the tools that the model calls
	OutputTokens int      `json:"output_tokens,omitempty"` // what is charged; 0: a token for every 4 bytes that are said
	Delay        Duration `json:"delay,omitempty"`         // before the first byte of the answer
	StopReason   string   `json:"stop_reason,omitempty"`   // empty: "tool_use" when Tools has any, else "end_turn"
	Faults       []Fault  `json:"faults,omitempty"`        // what goes wrong before the step succeeds, in order
}

// A Tool is a call of one of the client's tools.
type Tool struct {
	Name  string          `json:"name"`
	Input json.RawMessage `json:"input,omitempty"` // a JSON object; empty: {}
}

// A FaultKind is a way in which a call goes wrong.
type FaultKind string

// The kinds of faults.
const (
	FaultStatus FaultKind = "status" // the answer is an HTTP error
	FaultCut    FaultKind = "cut"    // the connection breaks after After events of the stream
	FaultError  FaultKind = "error"  // after After events the stream says that there was an error, and ends
	FaultHang   FaultKind = "hang"   // no byte is ever sent
	FaultStall  FaultKind = "stall"  // after After events nothing more is sent, and the connection stays open
)

// Always as a Fault's Times makes it hit every call.
const Always = -1

// A Fault spoils calls of a step. The calls are counted by conversation, so
// each of several parallel conversations meets each fault.
type Fault struct {
	Kind    FaultKind         `json:"kind"`
	Status  int               `json:"status,omitempty"`  // of FaultStatus: 400 to 599
	Headers map[string]string `json:"headers,omitempty"` // of FaultStatus, such as retry-after
	Type    string            `json:"type,omitempty"`    // the API's word for the error; empty: the one that belongs to Status, or overloaded_error
	Message string            `json:"message,omitempty"` // the error's text; empty: a standard one
	After   int               `json:"after,omitempty"`   // events sent before FaultCut, FaultError or FaultStall
	Times   int               `json:"times,omitempty"`   // how many calls are hit; 0: one; Always: all
}

// A Duration is a [time.Duration] that is a text such as "1.5s" in JSON.
type Duration time.Duration

// MarshalText returns the duration as [time.Duration.String] writes it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what [time.ParseDuration] understands.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// The bounds of a script file.
const (
	maxScripts = 8 << 20 // bytes
	maxDelay   = Duration(time.Hour)
)

var scriptName = regexp.MustCompile(`^` + namePattern + `$`)

// ParseScripts reads a JSON object of scripts by name, such as
//
//	{"hello": {"steps": [{"text": "Hello."}]}}
//
// It is strict: an unknown field, a name that no prompt can spell, text after
// the object or a step that cannot be played is an error of kind
// [fault.Invalid].
func ParseScripts(r io.Reader) (map[string]Script, error) {
	const op = "read scripts"
	b, err := io.ReadAll(io.LimitReader(r, maxScripts+1))
	if err != nil {
		return nil, &fault.Error{Op: op, Kind: fault.Unavailable, Err: err}
	}
	if len(b) > maxScripts {
		return nil, fault.New(op, fault.Invalid, "more than %d bytes", maxScripts)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var scripts map[string]Script
	if err := dec.Decode(&scripts); err != nil {
		return nil, &fault.Error{Op: op, Kind: fault.Invalid, Err: err}
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fault.New(op, fault.Invalid, "text after the scripts")
	}
	for name, s := range scripts {
		if !scriptName.MatchString(name) {
			return nil, fault.New(op, fault.Invalid, "script name %q: use letters, digits, and single dots, dashes or underscores between them", name)
		}
		if err := s.Validate(); err != nil {
			return nil, fault.Wrap(fmt.Sprintf("%s: %s", op, name), err)
		}
	}
	return scripts, nil
}

// Validate returns nil, or an error of kind [fault.Invalid] that names the
// first thing which cannot be played.
func (s Script) Validate() error {
	bad := func(format string, args ...any) error { return fault.New("script", fault.Invalid, format, args...) }
	if len(s.Steps) > 0 && len(s.Variants) > 0 {
		return bad("both steps and variants")
	}
	if len(s.variants()) == 0 {
		return bad("no steps")
	}
	for session, v := range s.Sessions {
		if v < 1 || v > len(s.variants()) {
			return bad("session %s: no variant %d", session, v)
		}
	}
	for v, steps := range s.variants() {
		if len(steps) == 0 {
			return bad("variant %d: no steps", v+1)
		}
		for i, step := range steps {
			if err := step.validate(); err != nil {
				return bad("variant %d, step %d: %w", v+1, i+1, err)
			}
		}
	}
	return nil
}

func (s Script) variants() [][]Step {
	if len(s.Steps) > 0 {
		return [][]Step{s.Steps}
	}
	return s.Variants
}

func (s Step) validate() error {
	switch {
	case s.OutputTokens < 0:
		return fmt.Errorf("%d output tokens", s.OutputTokens)
	case s.Delay < 0 || s.Delay > maxDelay:
		return fmt.Errorf("delay %s: the most is %s", time.Duration(s.Delay), time.Duration(maxDelay))
	}
	switch s.StopReason {
	case "", "end_turn", "tool_use", "max_tokens", "stop_sequence", "pause_turn", "refusal", "model_context_window_exceeded":
	default:
		return fmt.Errorf("unknown stop reason %q", s.StopReason)
	}
	for _, t := range s.Tools {
		if t.Name == "" {
			return errors.New("a tool without a name")
		}
		var object map[string]any
		if err := json.Unmarshal(t.input(), &object); err != nil || object == nil {
			return fmt.Errorf("tool %s: its input is not a JSON object", t.Name)
		}
	}
	for i, f := range s.Faults {
		if err := f.validate(); err != nil {
			return fmt.Errorf("fault %d: %w", i+1, err)
		}
	}
	return nil
}

func (t Tool) input() []byte {
	if len(t.Input) == 0 {
		return []byte("{}")
	}
	return t.Input
}

func (f Fault) validate() error {
	switch f.Kind {
	case FaultStatus:
		if f.Status < 400 || f.Status > 599 {
			return fmt.Errorf("status %d", f.Status)
		}
	case FaultCut, FaultError, FaultHang, FaultStall:
		if f.Status != 0 || len(f.Headers) > 0 {
			return fmt.Errorf("%q has no status and no headers", f.Kind)
		}
	default:
		return fmt.Errorf("unknown kind %q", f.Kind)
	}
	if f.After < 0 || f.Times < Always {
		return fmt.Errorf("after %d, times %d", f.After, f.Times)
	}
	return nil
}

// faultAt returns the fault that a step's n-th call meets, counted from 0.
func (s Step) faultAt(n int) (Fault, bool) {
	for _, f := range s.Faults {
		switch {
		case f.Times == Always || n < max(f.Times, 1):
			return f, true
		}
		n -= max(f.Times, 1)
	}
	return Fault{}, false
}
