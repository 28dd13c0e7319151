package logs

// The keys of attributes. A line carries Run, Fork and Sandbox wherever they
// are known.
const (
	Run     = "run"     // id of a run
	Fork    = "fork"    // number of a fork in its run; 0: the base that all start from
	Sandbox = "sandbox" // id of a sandbox

	Error    = "error"
	Kind     = "kind"   // of a fault
	Status   = "status" // how a fork ended
	Took     = "took"   // seconds
	Attempt  = "attempt"
	Provider = "provider"
	Agent    = "agent"
	Model    = "model"
	Process  = "process" // id of a process in a sandbox
	Exit     = "exit"    // code of a process
	Cost     = "cost"
	Turns    = "turns"
	Base     = "base"
	Made     = "made" // now, and not found there
	Commit   = "commit"
	Branch   = "branch"
	Files    = "files" // number of
	Count    = "count"
	Age      = "age" // of a sandbox, seconds

	Host       = "host"
	Reason     = "reason"
	Repository = "repository"
	Mirror     = "mirror"
	Name       = "name" // of a thing of ours on this host
	Activities = "activities"
	Queue      = "queue"
	Namespace  = "namespace"
	Address    = "address"
	URL        = "url"
	TLS        = "tls" // whether
	Hint       = "hint"
)
