// Package fault is how this program says what went wrong.
//
// Every error that crosses a floor carries a [Kind]. The kind decides three
// things: whether Temporal tries again, which status the CLI exits with, and
// what the user is told to do.
package fault

import (
	"errors"
	"fmt"
	"strings"
)

// A Kind classes an error. Kinds travel in workflow history, so a value that
// was released once never changes its meaning.
type Kind string

// The kinds. Internal is the kind of an error that names none.
const (
	Internal    Kind = "internal"    // a bug, or something not yet classed
	Invalid     Kind = "invalid"     // the caller asked for something impossible
	NotFound    Kind = "not_found"   // the thing is not there, or is gone
	Denied      Kind = "denied"      // credentials are missing or were refused
	Unsupported Kind = "unsupported" // this provider, kernel or agent cannot do that
	Unavailable Kind = "unavailable" // not now; the same call may go through later
	Unreachable Kind = "unreachable" // Temporal itself does not answer
	OverBudget  Kind = "over_budget" // a limit of money that the user set was reached
	Timeout     Kind = "timeout"     // a limit of time that the user set was reached
	Lost        Kind = "lost"        // a sandbox vanished and what it held cannot be had back
	Cancelled   Kind = "cancelled"   // somebody asked for the work to stop
	Conflict    Kind = "conflict"    // another process or run holds what was asked for
	Full        Kind = "full"        // no space is left on a disk
)

// Retryable reports whether doing the same again could succeed.
func (k Kind) Retryable() bool {
	return k == Unavailable || k == Unreachable || k == Internal || k == ""
}

// An Error is one operation that failed. Its text is Op, then the cause; the
// hint is shown to the user on a line of its own and is not part of the text.
type Error struct {
	Op   string // what was being done, as "local: create sandbox"
	Kind Kind   // zero: that of Err, or Internal
	Err  error  // the cause; nil when Op and Kind say it all
	Hint string // what the user can do about it, one whole sentence; may be empty
}

// Error returns the operation and its cause in one line.
func (e *Error) Error() string {
	parts := make([]string, 0, 2)
	if e.Op != "" {
		parts = append(parts, e.Op)
	}
	if e.Err != nil {
		parts = append(parts, e.Err.Error())
	} else {
		parts = append(parts, strings.ReplaceAll(string(e.Kind), "_", " "))
	}
	return strings.Join(parts, ": ")
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New makes an Error whose cause is the formatted text; %w works as in
// [fmt.Errorf].
func New(op string, kind Kind, format string, args ...any) *Error {
	return &Error{Op: op, Kind: kind, Err: fmt.Errorf(format, args...)}
}

// Hinted returns e with its hint set, for use in a return statement.
func (e *Error) Hinted(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// Wrap puts op before err and keeps its kind and hint. It returns nil when err
// is nil.
func Wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Op: op, Err: err}
}

// KindOf returns the first kind named in err's tree, outermost first, and
// Internal when none is. The kind of nil is the empty Kind.
func KindOf(err error) Kind {
	if err == nil {
		return ""
	}
	for e := (*Error)(nil); errors.As(err, &e); err = e.Err {
		if e.Kind != "" {
			return e.Kind
		}
		if e.Err == nil {
			break
		}
	}
	return Internal
}

// HintOf returns the first hint in err's tree, outermost first, or "".
func HintOf(err error) string {
	for e := (*Error)(nil); errors.As(err, &e); err = e.Err {
		if e.Hint != "" {
			return e.Hint
		}
		if e.Err == nil {
			break
		}
	}
	return ""
}
