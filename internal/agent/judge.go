package agent

import (
	"fmt"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// judgeStream says how an agent ended that speaks stream-json. The measured
// facts behind it: the exit code is 1 for every kind of failure and 0 for
// some, the subtype is "success" for API errors; only is_error, the terminal
// reason and the HTTP status of the last model call tell them apart.
func judgeStream(a Agent, sum Summary, stderr string, exitCode int) Outcome {
	o := Outcome{Turns: sum.Turns, Text: sum.Said}
	end := sum.End
	if end != nil {
		o.Cost = end.Cost
	}
	switch {
	case end == nil, sum.after && exitCode != 0:
		o.unfinished(a, stderr, exitCode)
	case end.Reason == "budget_exhausted" || end.Error && end.APIStatus == 402:
		// 402 is the gateway's word, and its text says which limit it was.
		o.fail(fork.BudgetExceeded, end.Text, "Raise --budget, or ask for less.")
	case end.Reason == "aborted_streaming" || end.Reason == "aborted_tools":
		o.fail(fork.Cancelled, "the agent was interrupted", "")
	case !end.Error:
		o.Status = fork.Success
		o.Text = first(end.Text, sum.Said)
	default:
		text := first(end.Text, strings.ReplaceAll(end.Reason, "_", " "))
		hint, again := reason(end)
		o.fail(fork.Failed, text, hint)
		o.Again = again
	}
	return o.clean()
}

// reason says what can be done about a failure, and whether doing the same
// again could help.
func reason(end *Account) (hint string, again bool) {
	switch end.Reason {
	case "max_turns":
		return "Ask for less in one run.", false
	case "prompt_too_long":
		return "Put the long part of the prompt into a file in the repository and refer to it.", false
	case "refusal":
		return "The model declined. Say in the prompt what the work is for, or use another model.", false
	}
	switch s := end.APIStatus; {
	case s == 401:
		return "Set ANTHROPIC_API_KEY to a key that is valid.", false
	case s == 403:
		return "The key may not do this. Use another key or another --model.", false
	case s == 404:
		return "Check the name of the --model.", false
	case s == 408, s == 409, s == 429, s >= 500: // 529: overloaded
		return "The model API is busy or down. Try again later, with a smaller --max-concurrent.", true
	case s == 0 && end.Reason == "api_error":
		return "The model API could not be reached.", true
	}
	return "", false
}

// unfinished judges a process that ended without a word about it.
func (o *Outcome) unfinished(a Agent, stderr string, code int) {
	last := lastWords(stderr)
	switch {
	case killed(code):
		o.fail(fork.Failed, fmt.Sprintf("%s was killed by signal %d before it was done", a.Name(), code-128), oomHint(code))
		o.Again = true
	case code == 126 || code == 127:
		o.fail(fork.Failed, first(last, a.Name()+" is not in the sandbox"), "")
		if install := a.Program().Install; install != "" {
			o.Hint = "Install it with: " + install
		}
	case code == 0:
		o.fail(fork.Failed, a.Name()+" ended without a result", "")
	default:
		o.fail(fork.Failed, first(last, fmt.Sprintf("%s exited with code %d and without a result", a.Name(), code)), "")
	}
}

// lastWords returns the end of what a process wrote to standard error.
func lastWords(stderr string) string { return strings.TrimSpace(Clean(tail(stderr, 2<<10))) }

// killed reports whether an exit code means death by a signal.
func killed(code int) bool { return code > 128 && code <= 128+64 }

func oomHint(code int) string {
	if code == 128+9 {
		return "The sandbox may have run out of memory."
	}
	return ""
}

func (o *Outcome) fail(s fork.Status, text, hint string) { o.Status, o.Error, o.Hint = s, text, hint }

// clean bounds the texts and makes them safe to print: an outcome goes to
// people's terminals and into reports.
func (o *Outcome) clean() Outcome {
	o.Text = fork.Cut(strings.TrimSpace(Clean(o.Text)), fork.MaxText)
	o.Error = fork.Cut(strings.TrimSpace(Clean(o.Error)), maxEventText)
	o.Hint = flat(o.Hint)
	if o.Status != fork.Success && o.Error == "" {
		o.Error = "the agent failed and did not say why"
	}
	return *o
}
