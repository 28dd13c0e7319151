package sandbox

// A Capability is one line of the table of what providers can do.
type Capability struct {
	Name string // as in JSON; it never changes
	Text string // what a user gets from it

	// Has reports whether the provider has it.
	Has func(p Provider) bool
}

// Capabilities is the table: whatever providers may have or not, in the order
// in which people are told.
func Capabilities() []Capability {
	return []Capability{
		{"host_bound", "sandboxes live on the worker's own host", has[HostBound]},
		{"freeze", "a prepared repository is frozen once and forks start from it", has[Freezer]},
		{"snapshot", "a base can be made of a sandbox that runs on; `bases` keeps account", has[Snapshotter]},
		{"pause", "`pause --freeze` holds the agents still", has[Pauser]},
		{"terminal", "`attach` gives a terminal", has[Terminaler]},
		{"ports", "`forward` reaches ports in the sandbox", has[PortDialer]},
		{"live_fork", "a running sandbox is split, processes and all", has[LiveForker]},
		{"limits", "`--memory`, `--cpus`, `--processes` and `--disk` hold", has[Limiter]},
		{"meter", "what a sandbox uses is known", has[Meter]},
		{"price", "what a sandbox costs in an hour is known", has[Pricer]},
		{"spares", "a few are kept ready while runs ask for more", has[Standby]},
		{"list_lag", "a list can miss what was made just now; clean-ups look again", has[Lagger]},
		{"needs_key", "it is asked for nothing before there is a key", has[Gated]},
	}
}

func has[C any](p Provider) bool {
	_, ok := As[C](p)
	return ok
}
