package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func TestExitCodesAreAsPromised(t *testing.T) {
	for kind, want := range map[fault.Kind]int{
		fault.Internal: 1, fault.Invalid: 2, fault.NotFound: 3, fault.Denied: 4, fault.Unsupported: 1, fault.Unavailable: 1, fault.Unreachable: 8,
		fault.OverBudget: 6, fault.Timeout: 7, fault.Lost: 1, fault.Cancelled: 1, fault.Conflict: 1, fault.Full: 1,
	} {
		s := newSession(t, newMemory())
		s.runs.failure = fmt.Errorf("outer: %w", fault.New("op", kind, "it went wrong").Hinted("Do %s.", "this"))
		s.want(t, want, "status", testRun)
		if got, want := s.errors.String(), "sandbox-temporal: outer: op: it went wrong\nDo this.\n"; got != want {
			t.Errorf("%s: stderr %q, want %q", kind, got, want)
		}
		if s.out.Len() > 0 {
			t.Errorf("%s: stdout %q", kind, &s.out)
		}
	}
}

func TestTemporalThatDoesNotAnswerIsExitCode8(t *testing.T) {
	for _, args := range [][]string{{"fork", remote, "--prompt", "x"}, {"status", "@last"}, {"list"}, {"cancel", "x"}, {"pause", "x"}, {"resume", "x"}, {"logs", "x"}, {"diff", "x/1"}, {"cleanup"}, {"stop-cleanup"}} {
		s := newSession(t, newMemory())
		s.env.Runs = func(context.Context, Globals) (Runs, error) {
			return nil, fault.New("connect", fault.Unreachable, "nothing listens at 127.0.0.1:1").Hinted("Start it.")
		}
		s.want(t, exitUnreachable, args...)
	}
}

func TestErrorsOfOthersAreNotLost(t *testing.T) {
	s := newSession(t, newMemory())
	s.runs.failure = io.ErrUnexpectedEOF
	s.want(t, exitFailed, "list")
	if got := s.errors.String(); got != "sandbox-temporal: unexpected EOF\n" {
		t.Errorf("stderr %q", got)
	}
}

func TestInterruptIsExitCode130(t *testing.T) {
	s := newSession(t, newMemory())
	ctx, cancel := context.WithCancel(t.Context())
	s.env.Runs = func(context.Context, Globals) (Runs, error) {
		cancel()
		return nil, fmt.Errorf("connect: %w", ctx.Err())
	}
	s.env.Args = []string{"list"}
	if got := Main(ctx, s.env); got != exitDetached || s.errors.String() != "sandbox-temporal: interrupted\n" {
		t.Errorf("exit %d, stderr %q", got, &s.errors)
	}
	// Something else that went wrong while it was interrupted is said.
	s.env.Runs = func(context.Context, Globals) (Runs, error) { return nil, errors.New("disk on fire") }
	if got := Main(ctx, s.env); got != exitFailed {
		t.Errorf("exit %d, stderr %q", got, &s.errors)
	}
}

func TestVerdictOfARun(t *testing.T) {
	rep := func(status fork.Status, forks ...fork.Result) fork.Report {
		r := fork.Report{Progress: fork.Progress{Status: status, Total: len(forks)}, Results: forks}
		for i := range r.Results {
			r.Results[i].ForkNum = i + 1
		}
		return r
	}
	is := func(s fork.Status) fork.Result { return fork.Result{Status: s} }
	verified := func(s, v fork.Status) fork.Result { return fork.Result{Status: s, Verify: &fork.Verify{Status: v}} }
	broken := func(kind fault.Kind) fork.Report {
		r := rep(fork.Failed, is(fork.Failed))
		r.Error, r.ErrorKind = "could not begin", string(kind)
		return r
	}
	cancelledEarly := rep(fork.Cancelled)
	for name, c := range map[string]struct {
		rep  fork.Report
		want int
	}{
		"all succeeded":                  {rep(fork.Success, is(fork.Success), is(fork.Success)), 0},
		"one failed":                     {rep(fork.Failed, is(fork.Success), is(fork.Failed)), 1},
		"one lost":                       {rep(fork.Failed, is(fork.Success), is(fork.Lost)), 1},
		"cancelled":                      {rep(fork.Cancelled, is(fork.Success), is(fork.Cancelled)), 1},
		"cancelled before anything":      {cancelledEarly, 1},
		"cancelled after all had ended":  {rep(fork.Cancelled, is(fork.Success)), 1},
		"out of money":                   {rep(fork.BudgetExceeded, is(fork.Success), is(fork.BudgetExceeded), is(fork.BudgetExceeded)), 6},
		"out of money and a failure":     {rep(fork.BudgetExceeded, is(fork.Failed), is(fork.BudgetExceeded)), 1},
		"out of time":                    {rep(fork.TimedOut, is(fork.TimedOut), is(fork.TimedOut)), 7},
		"out of time, some succeeded":    {rep(fork.TimedOut, is(fork.Success), is(fork.TimedOut)), 7},
		"out of time and money":          {rep(fork.BudgetExceeded, is(fork.TimedOut), is(fork.BudgetExceeded)), 1},
		"one verified":                   {rep(fork.Success, verified(fork.Success, fork.Success), verified(fork.Success, fork.Failed)), 0},
		"none verified":                  {rep(fork.Success, verified(fork.Success, fork.Failed), verified(fork.Success, fork.Failed)), 5},
		"none verified, others failed":   {rep(fork.Failed, verified(fork.Success, fork.Failed), is(fork.Failed)), 5},
		"no repository":                  {broken(fault.NotFound), 3},
		"refused":                        {broken(fault.Denied), 4},
		"impossible":                     {broken(fault.Invalid), 2},
		"no money to begin":              {broken(fault.OverBudget), 6},
		"no time to begin":               {broken(fault.Timeout), 7},
		"broken":                         {broken(fault.Internal), 1},
		"broken in a word of the future": {broken("melted"), 1},
		"a status of the future":         {rep("melted", is("melted")), 1},
	} {
		if got := verdict(c.rep); got != c.want {
			t.Errorf("%s: exit %d, want %d", name, got, c.want)
		}
	}
}
