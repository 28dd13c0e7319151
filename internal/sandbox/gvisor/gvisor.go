// Package gvisor runs sandboxes on the worker's own Linux host, each with a
// kernel of its own: gVisor's runsc, which must be installed.
//
// # Who does what
//
//	worker ──socket──► guardian ──pipes──► init ──► the agent's processes
//	(comes and goes)   (host, detached)    (PID 1 of the sandbox)
//	                      │
//	                      └── runsc: the kernel in which init runs
//
// The worker writes what it wants into a folder of the state folder and starts
// a guardian there, in a session of its own. The guardian owns the sandbox: it
// starts runsc and dies with it, keeps the deadline, and passes on what
// workers want of init. It needs no worker to live, and any later worker of
// the same user finds it again through the folder. When a guardian dies, for
// whatever reason, the host's kernel kills runsc and all that it started.
//
// Init starts the agent's processes by id and keeps their output and how they
// ended. It does so inside, in the sandbox's own memory and disk: nothing that
// an agent writes becomes a file on the host. Its only way out is the pair of
// pipes that are its standard input and output, which carry many streams: see
// mux. gVisor replaces standard input and output when a sandbox is restored
// from a checkpoint, so init has a way to its guardian in a fork too.
//
// # Files
//
//	<Dir>/sandboxes/<key>/  spec.json ref.json control.sock life log
//	                        root.erofs config.json upper/ output/ state/
//	<Dir>/bases/<key>.erofs
//	<Dir>/programs/         the program that init is, one file for each version
//	<Dir>/trash/<instance>/ what is being removed
//	<Dir>/locks/            one of 64 locks is held while a key is changed
//
// What the agent can write to (the workspace, its home and /tmp) is in one
// file below upper, which gVisor's kernel keeps to itself. A base is an image,
// see imageWriter: one file that holds the three folders whole. Sandboxes that
// start from it see it as the lower layer of an overlay that gVisor makes, so
// they share its pages, on a host where nobody may mount anything as well.
//
// # Live forks
//
// [Provider.ForkLive] has gVisor write a checkpoint of the running sandbox,
// its memory and its files, and restores it in each of the new ones.
package gvisor

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// ProviderName is the word users write after --provider.
const ProviderName = "gvisor"

// TestedVersion is the version of runsc that this package was written for and
// is tested with, as the module proxy names it and as "runsc --version" of a
// build by this repository's Makefile prints it. Others may work.
const TestedVersion = "v0.0.0-20260905035102-160fafc42237"

// Options says where sandboxes live and what they are made with.
type Options struct {
	// Dir is the state folder, made when it is not there. Every worker of a
	// host that shall see the same sandboxes needs the same one. Required.
	Dir string

	// Guardian is the command line that runs [Supervise] with the arguments
	// that are added to it. Its first word is a program of one static file,
	// which is also lent to every sandbox as its init. Required.
	Guardian []string

	// Runsc is the runsc program. Empty: the one that the environment
	// variable SANDBOX_TEMPORAL_RUNSC names, or the one on the PATH.
	Runsc string

	// ModuleVersion returns the version of the module in a Go program, or "".
	// [Check] asks it. It is not part of this package because the packages that
	// it needs are a burden to the supervisor of every sandbox. Nil: nobody is
	// asked.
	ModuleVersion func(program, module string) string `json:"-"`

	// Logger hears what no caller can be told. Nil: nobody does.
	Logger *slog.Logger
}

// A Provider makes sandboxes on this host. Its zero value is of no use; see
// [New].
type Provider struct {
	dir      string
	guardian []string
	runsc    string
	log      *slog.Logger
	told     atomic.Bool // what is not enforced here
}

var (
	_ sandbox.Provider    = (*Provider)(nil)
	_ sandbox.HostBound   = (*Provider)(nil)
	_ sandbox.Snapshotter = (*Provider)(nil)
	_ sandbox.LiveForker  = (*Provider)(nil)
	_ sandbox.Pauser      = (*Provider)(nil)
	_ sandbox.Terminaler  = (*Provider)(nil)
	_ sandbox.PortDialer  = (*Provider)(nil)
	_ sandbox.Limiter     = (*Provider)(nil)
	_ sandbox.Meter       = (*Provider)(nil)
)

// New returns a provider. It touches nothing on the host before the first
// Create or Freeze, looks for runsc only then, and holds nothing that must be
// closed.
func New(o Options) *Provider {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Provider{dir: o.Dir, guardian: o.Guardian, runsc: o.Runsc, log: o.Logger}
}

// Name returns [ProviderName].
func (p *Provider) Name() string { return ProviderName }

// HostBound marks the sandboxes as reachable on this host only.
func (p *Provider) HostBound() {}

// A Finding is one thing that [Check] looked at.
type Finding struct {
	Name string // what was looked at
	OK   bool
	Text string // what was found, one line
	Hint string // what the user can do about it; empty when there is nothing to do
}

// String returns the finding in one line, without its hint.
func (f Finding) String() string {
	word := "no"
	if f.OK {
		word = "ok"
	}
	return fmt.Sprintf("%s: %s: %s", f.Name, word, f.Text)
}
