// Package local runs sandboxes on the worker's own Linux host: namespaces,
// overlayfs and one small supervisor process for each sandbox.
//
// # Who does what
//
//	worker ──socket──► supervisor ──socketpair──► init ──► the agent's processes
//	(comes and goes)   (host, detached)           (PID 1 of the sandbox)
//
// The worker writes what it wants into a folder of the state folder and starts
// a supervisor there, in a session of its own. From then on the supervisor
// owns the sandbox: its namespaces, its processes and their output, its
// deadline, its way to the gateway. It needs no worker to live, and any later
// worker of the same user finds it again through the folder. When a supervisor
// dies, for whatever reason, the kernel kills everything in its sandbox.
//
// Init builds the root file system, drops what it may do, and starts the
// agent's processes. It shares nothing with them but the kernel, and it is
// the only one of ours that a file path of the agent is ever resolved by: a
// link that the agent made can lead nowhere but into its own sandbox.
//
// Most of that is the same for all sandboxes, and can be done before anybody asks
// (see [Options.Spares]): a spare is a supervisor whose init has namespaces and
// the host's part of a root, in a folder without a name. Create writes down what
// is asked for, gives the folder its name and calls the supervisor in, who adds
// the layers, mounts and limits of the spec and confines init. A spare that
// nobody calls ends with its worker, or after a while, and leaves nothing.
//
// # Who the agent is
//
// Inside, the agent is uid 1000 in every sandbox, so that the stat data of a
// git index stays true from the base that was prepared to the forks that
// start from it. Outside, it is an id that owns nothing when the worker is
// root, and the worker's own id, in a user namespace of that single id, when
// the worker is an ordinary user. Where neither can be had, Create fails: a
// sandbox is never less than that.
//
// # Files
//
//	<Dir>/sandboxes/<key>/   spec.json ref.json control.sock life log paused p-<id>.{stdout,stderr}
//	                         fs/{workspace,home,tmp}
//	<Dir>/bases/<key>/       base.json used fs/{workspace,home,tmp} flat/{workspace,home,tmp}
//	<Dir>/sandboxes/.new-<instance>/  a sandbox before it has its name; a spare one waits there
//	<Dir>/trash/<instance>/  what is being removed
//	<Dir>/locks/             one of 64 locks is held while a key is changed; bases, flatten
//
// A base holds the workspace, the home and /tmp of the sandbox it was frozen
// from. A sandbox that starts from a base sees it as the lower layer of an
// overlay. A base frozen from such a sandbox holds what was changed and
// names the bases below it: nothing is copied, and inode numbers and times,
// which a git index remembers, stay. Of a snapshot of a sandbox that lives on,
// the files that it has changed are copied. A chain of bases that has become
// long is copied into one layer in the background; whoever uses the chain
// keeps it.
//
// Nobody writes to a base. Of the host's users, none but the worker's own and
// root can reach it. Sandboxes see it through mounts that are read-only.
//
// Output goes from the agent's process through a pipe into a file that is
// opened for appending, 1 GiB of each stream at most.
//
// # Limits
//
// Every sandbox has the limits of [sandbox.Limits], or else 2 GiB of memory
// (or what the host has), 2048 processes, 10 GiB of disk and as much CPU as
// nobody else wants. Package cgroup says where the kernel is told of them, and
// there memory, processes and CPU time are hard limits, memory with no swap.
//
// A sandbox whose memory runs out, or that has written too much, loses all its
// processes, and their exits say why. The sandbox goes on, so that the work can
// be saved. When the kernel looks for a victim, it prefers the agent's programs
// to init and to the rest of the host, and says no different when it is the
// host that has no memory left. When init dies of it nevertheless, exits and
// output stay, and nothing can be started any more.
//
// Disk is not a hard limit. The supervisor looks at the host's free space, the
// sooner the less is left, and at the files only when it fell; when it fell by
// so much that the limit can have been passed, they are counted while the
// sandbox's cgroup is frozen. A sandbox overshoots by what it writes in some
// hundredths of a second; one file alone cannot be larger than the limit. Every
// file counts 4 KiB at least. What no walk can see is a file without a name
// that is mapped and not open.
//
// Where no cgroup can be had (an ordinary user without a delegated one), CPU
// time is not limited, memory is added up once a second (so that a sandbox can
// overshoot by what it allocates in one), and processes are limited by
// RLIMIT_NPROC, which since Linux 5.14 counts those of one sandbox. [Check] and
// the worker's log say so.
//
// # Going inside
//
// [Provider.Pause] freezes a sandbox, [Provider.OpenTerminal] gives a person a
// terminal in it, [Provider.DialPort] reaches a port in it. Each is a question
// to the supervisor, who has init open what belongs to the sandbox and hands
// the open file out; nothing of the host's is ever handed in. Where that file
// comes from an init that is no longer ours, it is looked at before it is used.
package local

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// ProviderName is the word users write after --provider.
const ProviderName = "local"

// DefaultSpares is what most runs fork at once. Each spare is two idle processes
// and two megabytes, for twenty seconds after the last Create.
const DefaultSpares = 8

// Options says where sandboxes live and how their supervisors are started.
type Options struct {
	// Dir is the state folder, made when it is not there. It must stand on a
	// file system that an overlay can be written to (ext4, xfs, btrfs,
	// tmpfs), and every worker of a host that shall see the same sandboxes
	// needs the same one. Required.
	Dir string

	// Supervisor is the command line that runs [Supervise] with the
	// arguments that are added to it: the sandbox-supervisor program, or
	// another one that has Supervise behind a command. Required.
	Supervisor []string

	// Spares is how many supervisors are kept ready, each with a sandbox that
	// lacks nothing but what a Spec decides, so that Create need not wait for
	// them to start. They are started after the first Create, and end with
	// this process, after a while without a Create, and on [Provider.Close].
	Spares int

	// Logger hears what no caller can be told. Nil: nobody does.
	Logger *slog.Logger
}

// A Provider makes sandboxes on this host. Its zero value is of no use; see
// [New].
type Provider struct {
	dir        string
	supervisor []string
	log        *slog.Logger
	sound      atomic.Bool // the state folder was found fit for sandboxes
	told       atomic.Bool // which limits are not enforced here
	spares     spares
}

var (
	_ sandbox.Provider    = (*Provider)(nil)
	_ sandbox.HostBound   = (*Provider)(nil)
	_ sandbox.Snapshotter = (*Provider)(nil)
	_ sandbox.Pauser      = (*Provider)(nil)
	_ sandbox.Terminaler  = (*Provider)(nil)
	_ sandbox.PortDialer  = (*Provider)(nil)
	_ sandbox.Limiter     = (*Provider)(nil)
	_ sandbox.Meter       = (*Provider)(nil)
)

// New returns a provider. It touches nothing on the host before the first
// Create or Freeze, and holds nothing that must be closed: what it keeps ready
// ends by itself.
func New(o Options) *Provider {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Provider{dir: o.Dir, supervisor: o.Supervisor, log: o.Logger, spares: spares{most: o.Spares}}
}

// Name returns [ProviderName].
func (p *Provider) Name() string { return ProviderName }

// HostBound marks the sandboxes as reachable on this host only.
func (p *Provider) HostBound() {}

// A Finding is one thing that [Check] looked at.
type Finding struct {
	Name string // what was looked at, as "user namespaces"
	OK   bool
	Text string // what was found, one line
	Hint string // what the user can do about it; empty when OK

	Optional bool // a sandbox can do without, and is the less safe for it
}

// String returns the finding in one line, without its hint.
func (f Finding) String() string {
	word := "no"
	if f.OK {
		word = "ok"
	}
	return fmt.Sprintf("%s: %s: %s", f.Name, word, f.Text)
}
