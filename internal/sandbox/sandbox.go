// Package sandbox is the seam between this program and the places that can
// run an agent. Providers live in the packages below it.
//
// # Lifecycle
//
//	Create(key) -> Ref -> Attach -> Start(id) … Start(id) -> Destroy
//
// A [Ref] is written into workflow history and is enough for any worker (on
// the same host, when the provider is host-bound), after any crash and any
// upgrade, to find the same sandbox again. A [Process] outlives the worker
// that started it: its output goes to a file of the sandbox that can be read
// again from any byte, its exit code stays until the sandbox is destroyed.
//
// # Layout
//
// Inside every sandbox the repository stands at [Workspace], programs lent by
// the host in [ProgramDir], and the agent runs as an ordinary user whose home
// is [Home]. Nothing else of the host can be seen.
package sandbox

import (
	"context"
	"io"
	"time"
)

// Paths inside every sandbox.
const (
	Workspace  = "/workspace"       // the repository's work tree; the working directory of every command
	Home       = "/home/agent"      // the agent's home, private to the sandbox
	ProgramDir = "/opt/sandbox/bin" // first on PATH; programs mounted from the host
)

// GatewayPort is the port on a sandbox's own 127.0.0.1 that leads to
// [Spec].Gateway.
const GatewayPort = 8484

// ChangesPort is the port on a sandbox's own 127.0.0.1 where a provider that
// can answers git's question which files of [Workspace] can have changed. The
// question is a line with a token, the answer is what a file system monitor
// tells git: a new token and paths, each followed by a zero byte (githooks(5),
// fsmonitor-watchman, version 2). The path "/" says that any file may have; in a
// sandbox on no base it is the only answer, with [Unsure] for a token. Nobody
// listens there with other providers.
//
// A base whose index was made up with a token of its own keeps that in the
// file [ChangesToken] of its git folder: the token, a space and the number of
// that file's inode, by which a copy of it is known.
const (
	ChangesPort  = 8485
	ChangesToken = "sandbox-temporal-changes"
	Unsure       = "unsure"
)

// A Provider makes and destroys sandboxes. It is safe for concurrent use and
// keeps no state that a Ref does not carry.
type Provider interface {
	// Name is the word users write after --provider.
	Name() string

	// Create makes a sandbox and returns once commands can be started in it.
	// A second Create with the same Spec.Key returns the sandbox that the
	// first one made, finished or half made; two at once make one. What a
	// failed Create began is gone when it returns.
	Create(ctx context.Context, spec Spec) (Ref, error)

	// Attach finds the sandbox again. The error is of kind fault.NotFound
	// when the sandbox is gone, for whatever reason.
	Attach(ctx context.Context, ref Ref) (Sandbox, error)

	// Destroy frees everything behind ref: when it returns nil, no process
	// of the sandbox lives and none of its files is left. What is already
	// gone is no error.
	Destroy(ctx context.Context, ref Ref) error

	// List returns the sandboxes, of any worker or deployment, whose labels
	// hold all of the given ones.
	List(ctx context.Context, labels map[string]string) ([]Info, error)
}

// A Sandbox is one isolated machine. It is safe for concurrent use.
type Sandbox interface {
	// Start runs cmd under id. When a process was started under that id
	// before, that one is returned, running or ended, and cmd is not run. An
	// id is 1 to 64 of the characters a-z, 0-9, dot, dash and underscore.
	// A program that does not exist is a process with exit code 127, as in a
	// shell.
	Start(ctx context.Context, id string, cmd Cmd) (Process, error)

	// Process finds the process started under id, or fails with
	// fault.NotFound.
	Process(ctx context.Context, id string) (Process, error)

	// Upload writes r to the absolute path, as the agent's user, making its
	// folders. The file is there whole or not at all.
	Upload(ctx context.Context, path string, r io.Reader) error

	// Download reads the file at the absolute path. The bytes were written
	// by a stranger: the caller bounds what it reads. Links are followed
	// inside the sandbox only. fault.NotFound when there is no such file,
	// fault.Invalid when it is not a regular one.
	Download(ctx context.Context, path string) (io.ReadCloser, error)

	// Health returns nil when a command could be started now.
	Health(ctx context.Context) error

	// SetDeadline moves the moment at which the sandbox destroys itself,
	// with or without us.
	SetDeadline(ctx context.Context, t time.Time) error

	// Close lets go of the connection. The sandbox lives on.
	Close() error
}

// A Process is a command that was started in a sandbox. It is safe for
// concurrent use.
type Process interface {
	// ReadAt reads what the process has written so far to the stream, as
	// io.ReaderAt does: it never waits, and returns io.EOF at the end of
	// what is there, whether or not more can come.
	ReadAt(ctx context.Context, stream Stream, p []byte, offset int64) (int, error)

	// Exit returns at once: how the process ended, or ok false while it runs.
	Exit(ctx context.Context) (exit Exit, ok bool, err error)

	// Wait returns when the process has ended or ctx is done.
	Wait(ctx context.Context) (Exit, error)

	// Signal sends a signal to the process and everything it started that
	// is still in its process group. A process that has ended is no error.
	Signal(ctx context.Context, sig Signal) error
}

// A Stream is one of the two outputs of a process.
type Stream string

// The streams.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
)

// A Signal is what a process can be sent.
type Signal string

// The signals, as POSIX names them.
const (
	Interrupt Signal = "INT"
	Terminate Signal = "TERM"
	Kill      Signal = "KILL"
)

// Exit is how a process ended.
type Exit struct {
	Code   int    `json:"code"`             // 128 + the signal's number when a signal ended it
	Signal string `json:"signal,omitempty"` // the signal's name, as "KILL"; empty after an ordinary exit
	Limit  Limit  `json:"limit,omitempty"`  // the limit of the sandbox that ended it; empty when none did
}

// A Limit is one of those of [Limits], as it is told to people.
type Limit string

// The limits. Those of memory and disk end every process of the sandbox, and
// say so in its Exit; the sandbox goes on, and commands can be started in it.
const (
	MemoryLimit  Limit = "memory"    // the sandbox needed more than it may
	DiskLimit    Limit = "disk"      // the sandbox wrote more than it may
	ProcessLimit Limit = "processes" // forks fail with EAGAIN
	CPULimit     Limit = "cpu"       // processes wait for their turn
)

// Cmd has the fields of exec.Cmd that make sense far away.
type Cmd struct {
	Args  []string // the program, looked up on the sandbox's PATH, and its arguments
	Env   []string // "K=V", added to the sandbox's own environment
	Dir   string   // empty: Workspace
	Stdin string   // a file inside the sandbox; empty: no input
}

// Spec describes a sandbox to create.
type Spec struct {
	Key      string            // chosen by the caller, makes Create repeatable; characters as in a process id
	Base     string            // a frozen base to start from (see Snapshotter); empty: an empty Workspace
	Mounts   []Mount           // host files shown read-only; remote providers use those of their template
	Gateway  string            // "unix:/path" of the worker's host, shown as 127.0.0.1:GatewayPort; empty: no way out
	Deadline time.Time         // when the sandbox destroys itself; required
	Labels   map[string]string // who it belongs to; see the Label constants
	Limits   Limits
}

// Limits bounds what a sandbox may use. Zero: the provider's default.
type Limits struct {
	MemoryBytes int64 `json:"memory_bytes,omitempty"` // swap included, there is none
	CPUMillis   int64 `json:"cpu_millis,omitempty"`   // thousandths of a core; at least 10
	Processes   int64 `json:"processes,omitempty"`    // and threads
	DiskBytes   int64 `json:"disk_bytes,omitempty"`   // of what is written; a base below it is not counted
}

// A Mount is a host file or folder that the sandbox sees read-only.
type Mount struct {
	Source string `json:"source"` // absolute, on the worker's host
	Target string `json:"target"` // absolute, in the sandbox
}

// Labels that every sandbox of ours carries.
const (
	LabelDeployment = "deployment" // which installation of this program made it
	LabelNamespace  = "namespace"  // Temporal's
	LabelRun        = "run"
	LabelFork       = "fork"
	LabelCreated    = "created" // RFC 3339
	LabelExpires    = "expires" // RFC 3339
)

// Labels of a sandbox that becomes a base, and so of the base.
const (
	LabelRepository = "repository" // a URL, or a path of the worker's host
	LabelBranch     = "branch"
	LabelCommit     = "commit"
)

// HasLabels reports whether have holds every one of the labels wanted: how a
// List chooses.
func HasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Ref names a sandbox. It holds no secrets. Handle is the provider's own and
// opaque to all others; Version says how to read it.
type Ref struct {
	Provider string `json:"provider"`
	Version  int    `json:"version"`
	ID       string `json:"id"` // what people call it, in logs and reports
	Handle   string `json:"handle"`
}

// Info is what List says of a sandbox.
type Info struct {
	Ref     Ref
	Labels  map[string]string
	Created time.Time
	Paused  bool
	Size    Limits // what it has of each; 0: the list does not say
}
