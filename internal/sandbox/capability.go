package sandbox

import (
	"context"
	"io"
	"time"
)

// HostBound is implemented by providers whose sandboxes live on the worker's
// own host, so that only workers there can reach them. Their sandboxes reach
// [Spec].Gateway at 127.0.0.1:GatewayPort.
type HostBound interface {
	HostBound()
}

// Freezer is implemented by providers that can freeze a prepared sandbox and
// start others from it.
type Freezer interface {
	// Base returns nil when a base is stored under key, whole and unharmed,
	// and fault.NotFound when there is none.
	Base(ctx context.Context, key string) error

	// Freeze stores the files of the sandbox as the base named key. The
	// sandbox is used up by it and must be destroyed. When the base is there
	// already, that one stays.
	Freeze(ctx context.Context, ref Ref, key string) error
}

// Snapshotter is implemented by providers that can make a base of a sandbox
// that runs on, and keep account of their bases.
type Snapshotter interface {
	Freezer

	// Snapshot stores the files of the sandbox as they stand at one moment,
	// as the base named key, and lets the sandbox live on: its processes are
	// held while it is done and notice nothing. When the base is there
	// already, that one stays.
	Snapshot(ctx context.Context, ref Ref, key string) error

	// Bases returns what is stored, whole or not.
	Bases(ctx context.Context) ([]BaseInfo, error)

	// RemoveBase frees the base named key. It fails with fault.Conflict while
	// a sandbox or another base stands on it. What is already gone is no
	// error.
	RemoveBase(ctx context.Context, key string) error
}

// BaseInfo is what Bases says of a base.
type BaseInfo struct {
	Key     string
	Labels  map[string]string // of the sandbox that it was made from
	Created time.Time
	Used    time.Time // when a sandbox was last started from it; zero: never
	Bytes   int64     // on the disk, without the bases below it
	Layers  int       // how many bases it consists of, with itself
	Users   int       // sandboxes and bases that stand on it now
	Damaged bool      // it cannot be started from and may be removed
}

// Pauser is implemented by providers that can hold a sandbox still.
type Pauser interface {
	// Pause stops every process of the sandbox where it stands; it keeps its
	// memory and its files. Paused twice is paused once. The deadline goes
	// on, and so do the clocks that processes look at. While paused, a Start
	// waits or fails with fault.Conflict, Health fails, and Attach, Destroy,
	// List, SetDeadline, output and Exit work as ever.
	Pause(ctx context.Context, ref Ref) error

	// Resume lets a paused sandbox go on. One that runs is no error.
	Resume(ctx context.Context, ref Ref) error
}

// Terminaler is implemented by providers that can give a person a terminal.
type Terminaler interface {
	// OpenTerminal runs cmd, which has no id and is not kept, on a terminal
	// of its own in the sandbox. It is hung up by Close, and when the
	// connection is lost.
	OpenTerminal(ctx context.Context, ref Ref, cmd Cmd, size TerminalSize) (Terminal, error)
}

// A Terminal is the outer end of a terminal in a sandbox: Read returns what
// the sandbox shows, which a stranger wrote, and io.EOF when the command has
// ended; Write types.
type Terminal interface {
	io.ReadWriteCloser
	Resize(size TerminalSize) error

	// Wait returns how the command ended, or when ctx is done.
	Wait(ctx context.Context) (Exit, error)
}

// TerminalSize is in characters.
type TerminalSize struct {
	Rows, Columns uint16
}

// PortDialer is implemented by providers whose sandboxes' ports can be
// reached from the worker's host.
type PortDialer interface {
	// DialPort connects to the TCP port on the sandbox's own loopback.
	// fault.Unavailable when nobody listens there.
	DialPort(ctx context.Context, ref Ref, port int) (Conn, error)
}

// A Conn is a connection that can be closed one way at a time.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// LiveForker is implemented by providers that can split a running sandbox.
type LiveForker interface {
	// ForkLive makes one new sandbox for each spec, in which every process
	// that the sandbox's init started goes on from where it stands now,
	// memory, files and all, under the ids it was started with. The sandbox
	// itself lives on. Of a spec, Base must be empty, and Mounts are those of
	// the sandbox. Each fork succeeds or fails alone; the results are in the
	// order of the specs.
	ForkLive(ctx context.Context, ref Ref, specs []Spec) ([]LiveFork, error)
}

// A LiveFork is one result of ForkLive.
type LiveFork struct {
	Ref Ref
	Err error // nil: the fork lives
}

// Limiter is implemented by providers that hold their sandboxes to
// [Spec].Limits, as far as the host lets them.
type Limiter interface {
	// Unenforced returns which of the limits that l asks for would not hold
	// in a sandbox made now. What is 0 in l is the provider's default and not
	// asked for.
	Unenforced(l Limits) []Limit
}

// Meter is implemented by providers that know what a sandbox uses.
type Meter interface {
	// Usage returns what the sandbox uses now; fault.NotFound when it is gone.
	Usage(ctx context.Context, ref Ref) (Usage, error)
}

// Usage is what a sandbox uses. What its host does not count is 0.
type Usage struct {
	MemoryBytes int64         `json:"memory_bytes"` // without files that are only kept in memory while there is room
	Processes   int64         `json:"processes"`    // and threads
	CPU         time.Duration `json:"cpu"`          // since the sandbox was made, of all cores
	DiskBytes   int64         `json:"disk_bytes"`   // what was written, when it was last looked at
}

// Pricer is implemented by providers whose sandboxes cost money as long as
// they are there.
type Pricer interface {
	// HourlyPrice returns what the sandbox costs in an hour as it is now, in
	// billionths of a dollar, and ok false when nobody can say. It asks nobody:
	// a list of a thousand sandboxes asks for each.
	HourlyPrice(info Info) (nanoUSD int64, ok bool)
}

// Lagger is implemented by providers whose List can miss a sandbox for a while
// after it was made.
type Lagger interface {
	// ListLag is how long a List can be behind.
	ListLag() time.Duration
}

// As finds the first provider in p's chain of wrappers that has capability C.
// A wrapper shows what it wraps by a method Unwrap() Provider.
func As[C any](p Provider) (c C, ok bool) {
	for p != nil {
		if c, ok = p.(C); ok {
			return c, true
		}
		w, wraps := p.(interface{ Unwrap() Provider })
		if !wraps {
			break
		}
		p = w.Unwrap()
	}
	return c, false
}

// Standby is implemented by providers that keep sandboxes ready before anybody
// asks for them.
type Standby interface {
	// Close ends what is kept ready, and returns when it is gone. Sandboxes
	// live on, and the provider can still be used.
	Close()
}

// Gated is implemented by providers that need something of the user, such as
// a key, before anything can be asked of them.
type Gated interface {
	// Ready returns nil when it is there. It does not ask whether what is
	// there is good.
	Ready(ctx context.Context) error
}
