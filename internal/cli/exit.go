package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// The exit codes. Scripts depend on them: they never change.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitDenied      = 4
	exitUnverified  = 5
	exitBudget      = 6
	exitTimeout     = 7
	exitUnreachable = 8
	exitDetached    = 130
)

// exitMeanings says what each code means to the user.
var exitMeanings = []struct {
	code int
	text string
}{
	{exitOK, "it worked; of a run: every fork succeeded"},
	{exitFailed, "it failed; of a run: some fork failed or was cancelled"},
	{exitUsage, "the command line makes no sense"},
	{exitNotFound, "there is no such run, fork, repository or branch"},
	{exitDenied, "credentials are missing or were refused"},
	{exitUnverified, "the run ended, and none of its forks passed verification"},
	{exitBudget, "the budget ran out, and nothing else went wrong"},
	{exitTimeout, "the time ran out, and nothing else went wrong"},
	{exitUnreachable, "Temporal does not answer"},
	{exitDetached, "interrupted; a run that was waited for goes on"},
}

// exits is the end of every command's help: which exit codes it has and what
// they mean.
func exits(codes ...int) string {
	var b strings.Builder
	b.WriteString("\n\nExit status:\n")
	for _, m := range exitMeanings {
		if slices.Contains(codes, m.code) {
			fmt.Fprintf(&b, "%5d  %s\n", m.code, m.text)
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// common are the exit codes of every command that asks Temporal.
var common = []int{exitOK, exitFailed, exitUsage, exitNotFound, exitDenied, exitUnreachable, exitDetached}

// ofRuns are the exit codes of commands that wait for a run.
var ofRuns = []int{
	exitOK, exitFailed, exitUsage, exitNotFound, exitDenied, exitUnverified, exitBudget, exitTimeout, exitUnreachable,
	exitDetached,
}

// said is the error of a command that has told the user all there is to tell.
type said struct{ code int }

func (s said) Error() string { return fmt.Sprintf("exit status %d", s.code) }

// usage is an error in the command line.
func usage(hint, format string, args ...any) error {
	return fault.New("", fault.Invalid, format, args...).Hinted("%s", hint)
}

// exit says what went wrong, once, and what to do about it.
func exit(ctx context.Context, env *Env, err error) int {
	var s said
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &s):
		return s.code
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		fmt.Fprintf(env.Stderr, "%s: interrupted\n", program)
		return exitDetached
	}
	fmt.Fprintf(env.Stderr, "%s: %s\n", program, clean(strings.TrimSpace(err.Error())))
	if hint := fault.HintOf(err); hint != "" {
		fmt.Fprintln(env.Stderr, clean(hint))
	}
	return exitCode(fault.KindOf(err))
}

// exitCode is the exit code of an error, or of a run that ended with one.
func exitCode(k fault.Kind) int {
	switch k {
	case fault.Invalid:
		return exitUsage
	case fault.NotFound:
		return exitNotFound
	case fault.Denied:
		return exitDenied
	case fault.OverBudget:
		return exitBudget
	case fault.Timeout:
		return exitTimeout
	case fault.Unreachable:
		return exitUnreachable
	}
	return exitFailed
}

// exitKind is the kind of the error that another command of this program ended
// with, as far as its exit code tells.
func exitKind(code int) fault.Kind {
	switch code {
	case exitUsage:
		return fault.Invalid
	case exitDenied:
		return fault.Denied
	}
	return fault.Conflict
}

// verdict is the exit code of a run that ended.
func verdict(rep fork.Report) int {
	if rep.ErrorKind != "" {
		return exitCode(fault.Kind(rep.ErrorKind))
	}
	if rep.Error != "" {
		return exitFailed
	}
	if slices.ContainsFunc(rep.Results, func(r fork.Result) bool { return r.ErrorKind == string(fault.Denied) }) {
		return exitDenied
	}
	verified, passed := 0, 0
	failures := map[fork.Status]int{}
	for _, r := range rep.Results {
		if r.Status != fork.Success {
			failures[r.Status]++
		}
		if r.Verify != nil {
			verified++
			if r.Verify.Status == fork.Success {
				passed++
			}
		}
	}
	switch {
	case verified > 0 && passed == 0:
		return exitUnverified
	case rep.Status == fork.Success && len(failures) == 0:
		return exitOK
	case len(failures) == 1 && failures[fork.BudgetExceeded] > 0, len(failures) == 0 && rep.Status == fork.BudgetExceeded:
		return exitBudget
	case len(failures) == 1 && failures[fork.TimedOut] > 0, len(failures) == 0 && rep.Status == fork.TimedOut:
		return exitTimeout
	}
	return exitFailed
}
