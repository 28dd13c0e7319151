package fork

import (
	"fmt"
	"time"
)

// Live is what can be seen of a fork while its agent works. It is the
// heartbeat of the activity that follows the agent, so it is small.
type Live struct {
	Phase  string `json:"phase"`            // "create", "health", "agent", "collect", "verify", "cleanup"
	Turns  int    `json:"num_turns"`        // messages of the model so far
	Cost   USD    `json:"cost_usd"`         // by the gateway's ledger
	Action string `json:"action,omitempty"` // the last thing the agent did, one line
	Offset int64  `json:"offset,omitempty"` // bytes of the agent's output that were read

	Held    string        `json:"held,omitempty"`     // why the fork waits for more money; empty: it does not
	HeldFor time.Duration `json:"held_for,omitempty"` // how long it has, since its deadline was set
}

// A Step is what of a [Live] may stand in workflow history: no word of the
// agent's or of the repository's.
type Step struct {
	Turns int    `json:"num_turns"` // of this attempt
	Cost  USD    `json:"cost_usd"`  // of the fork
	Doing string `json:"doing,omitempty"`
}

// TranscriptName is the artifact that holds what the agent printed in one
// attempt, counted from 1.
func TranscriptName(attempt int) string { return fmt.Sprintf("transcript-%d.jsonl", attempt) }

// RefusedName is the name of the artifact that lists the connections that a
// fork was not let open, a [Refusal] a line.
const RefusedName = "egress.jsonl"

// VerifyName is the name of the artifact that holds what the verification of a
// fork's work printed; its end, when that was much.
const VerifyName = "verify.log"

// A Refusal is a connection that a fork wanted and did not get.
type Refusal struct {
	Time   time.Time `json:"time"` // the first time
	Host   string    `json:"host"` // as the sandbox named it: a stranger's text
	Reason string    `json:"reason"`
}

// ResultName is the name of the artifact that holds what a fork committed, as a
// git bundle that builds on the base commit; ResultRef is the one ref in it.
const (
	ResultName = "result.bundle"
	ResultRef  = "refs/sandbox/result"
)

// SourceName is the name of the artifact of a run (its number is 0) that says
// under which key the store holds the repository. As long as it is there, the
// clean-up keeps that.
const SourceName = "source"
