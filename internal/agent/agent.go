// Package agent knows the command lines and output streams of the agent CLIs.
//
// It runs nothing: it turns a [Spec] into a [Command], lines of output into
// [Event]s, and the events and exit code of an ended process into an
// [Outcome]. That makes each agent a handful of pure functions.
package agent

import (
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// An Agent is one program that does the work. Its methods are pure.
type Agent interface {
	// Name is the word users write after --agent.
	Name() string

	// Program says which program of the host the sandbox must be lent.
	Program() Program

	// Model returns the model of those who name none; empty: the model must
	// be said, or the agent needs none.
	Model() string

	// Check returns an error of kind fault.Invalid when the agent cannot be
	// asked to do spec, with a hint for the user. It is called before Command.
	Check(spec Spec) error

	// Command returns how to carry out spec without asking anybody anything.
	// Its environment holds everything the agent needs but PATH and HOME.
	Command(spec Spec) Command

	// Decode reads one line of the agent's standard output. What it does not
	// understand is an Event of kind Other, never an error, never a panic.
	Decode(line []byte) []Event

	// Judge says how the agent ended, from the sum of its events, the end of
	// its standard error and its exit code.
	Judge(sum Summary, stderr string, exitCode int) Outcome
}

// A Program is an executable that an agent needs.
type Program struct {
	Name    string // looked up on the host's PATH; empty: none is needed
	Install string // the command that installs it, for the hint

	// Native are patterns of path/filepath.Match that lead from the folder of
	// a program that is only a script to the native one, which runs alone.
	Native []string
}

// A Spec is what an agent is asked to do.
type Spec struct {
	Task      string   // the prompt
	TaskFile  string   // a file in the sandbox that holds the prompt
	Model     string   // alias or full id
	ModelID   string   // full id; empty: not known
	Session   string   // a UUID, the same for every attempt of one fork
	Resume    bool     // go on with Session, whose process died, instead of beginning it
	Shell     string   // for "command": the user's shell line
	BaseURL   string   // where the model API is, as seen in the sandbox
	Token     string   // what the sandbox uses as API key there
	Bearer    bool     // Token is sent as a bearer token, not as an API key
	Patient   bool     // a model call may have to wait for hours: for a person who adds to the budget
	Remaining fork.USD // what is left of the budget; 0: no limit
}

// A Command is how a process is started in the sandbox.
type Command struct {
	Args  []string
	Env   []string // "K=V"
	Stdin string   // a file in the sandbox; empty: no input
}

// A Kind says what an Event is.
type Kind string

// The kinds of events.
const (
	Started Kind = "started" // the agent is ready; Session and Model are set
	Text    Kind = "text"    // the agent said something
	Think   Kind = "think"   // the agent thought something
	Tool    Kind = "tool"    // the agent uses a tool; Tool is its name, Text what it does with it
	Output  Kind = "output"  // what a tool answered
	Retry   Kind = "retry"   // a model call failed and is tried again; Text says why, and Status is HTTP's
	Ended   Kind = "ended"   // the agent's own account of how it ended; there can be several, the last counts
	Other   Kind = "other"   // anything else
)

// An Event is one thing that an agent said or did.
type Event struct {
	Kind    Kind     `json:"kind"`
	Text    string   `json:"text,omitempty"` // at most maxEventText bytes
	Tool    string   `json:"tool,omitempty"`
	Failed  bool     `json:"failed,omitempty"`  // a tool's answer was an error
	Nested  bool     `json:"nested,omitempty"`  // said by a sub-agent
	Message string   `json:"message,omitempty"` // the id of the model's message; several events share one
	Model   string   `json:"model,omitempty"`
	Session string   `json:"session,omitempty"`
	Status  int      `json:"status,omitempty"` // for Retry; 0: there was no answer, or nobody says
	End     *Account `json:"end,omitempty"`    // for Ended
}

// An Account is what an agent says at its end.
type Account struct {
	Error     bool     `json:"error"`      // the agent calls it a failure
	Reason    string   `json:"reason"`     // its own word: "completed", "max_turns", "api_error", "refusal", …
	APIStatus int      `json:"api_status"` // HTTP status of the model call that ended it; 0: none
	Text      string   `json:"text"`       // its last words, or the error; at most fork.MaxText bytes
	Turns     int      `json:"turns"`      // its own count
	Cost      fork.USD `json:"cost_usd"`   // its own reckoning; the gateway's ledger is the truth

	// Since is what it used since its last account, or since it was started:
	// unlike Cost it leaves out what a resumed session used before.
	Since *fork.Usage `json:"since,omitempty"`
}

// A Summary is what is kept of a stream of events of any length.
type Summary struct {
	Session string
	Model   string
	Turns   int    // messages of the model, sub-agents' left out
	Action  string // the last thing worth showing, one line
	Doing   string // the same in one word of ours, or the name of a tool
	Said    string // the agent's last message, the end of it when it is long; for lines of no message, the last of them
	End     *Account
	Used    *fork.Usage `json:",omitempty"` // the sum of what the accounts say of this process; nil: none did
	Denied  bool        `json:",omitempty"` // a model call was refused for its key, whether or not it is tried again

	message string // the last message that was counted as a turn
	said    string // the message that Said belongs to
	after   bool   // the agent went on after End: a sub-agent in the background had something to say
}

// unauthorized is the HTTP status of a call whose key is not good.
const unauthorized = 401

// Add takes one more event into the sum.
func (s *Summary) Add(e Event) {
	if e.Session != "" {
		s.Session = e.Session
	}
	if e.Model != "" && !e.Nested {
		s.Model = e.Model
	}
	if e.Message != "" && e.Message != s.message && !e.Nested {
		s.message = e.Message
		s.Turns++
	}
	switch e.Kind {
	case Started, Text, Think, Tool, Output, Retry:
		s.after = s.End != nil
	case Ended:
		s.after = false
	}
	switch e.Kind {
	case Text:
		if line := oneLine(e.Text); line != "" {
			s.Action, s.Doing = line, "writes"
		}
		if e.Nested {
			break
		}
		if e.Message != s.said || s.Said == "" {
			s.Said, s.said = e.Text, e.Message
		} else {
			s.Said = tail(s.Said+"\n"+e.Text, maxEventText)
		}
	case Tool:
		s.Action, s.Doing = oneLine(e.Tool+" "+e.Text), toolName(e.Tool)
	case Think:
		s.Action, s.Doing = "thinking", "thinks"
	case Retry:
		s.Action, s.Doing = oneLine("retrying: "+e.Text), "tries again"
		s.Denied = s.Denied || e.Status == unauthorized
	case Ended:
		s.End = e.End
		s.Denied = s.Denied || e.End != nil && e.End.APIStatus == unauthorized
		if e.End != nil && e.End.Since != nil {
			sum := *e.End.Since
			if s.Used != nil {
				sum = s.Used.Add(sum)
			}
			s.Used = &sum
		}
	}
}

// An Outcome is how an agent's process ended.
type Outcome struct {
	Status fork.Status // Success, Failed, BudgetExceeded, TimedOut or Cancelled
	Text   string      // the agent's last words
	Error  string      // why Status is not Success
	Hint   string      // what the user can do about it
	Turns  int
	Cost   fork.USD // the agent's own reckoning
	Again  bool     // trying again could help
}

// All returns the agents, the default first.
func All() []Agent { return []Agent{Claude{}, Codex{}, OpenCode{}, Mini{}, Shell{}} }

func names() string {
	var list []string
	for _, a := range All() {
		list = append(list, a.Name())
	}
	return strings.Join(list, ", ")
}

// ByName returns the agent that users call name, or an error of kind
// fault.Invalid that says which ones there are.
func ByName(name string) (Agent, error) {
	for _, a := range All() {
		if a.Name() == name {
			return a, nil
		}
	}
	return nil, fault.New("choose agent", fault.Invalid, "no agent %q", name).Hinted("Use one of: %s.", names())
}
