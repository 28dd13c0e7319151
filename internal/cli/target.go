package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// targetHelp is the part of a command's help that says how runs are named.
const targetHelp = `
RUN is the id of a run, the beginning of one (with or without "` + fork.RunPrefix + `"),
or @last for the newest. RUN/N is its fork number N.`

// A target is what the user named: a run (num 0) or one of its forks.
type target struct {
	word string // for the run, as written
	num  int
}

// parseTarget reads "RUN" or "RUN/N".
func parseTarget(s string) (target, error) {
	word, num, ok := fork.ParseID(s)
	if !ok || flat(word) != word || strings.ContainsAny(word, " '\"\\") {
		return target{}, usage("Write RUN, RUN/N, or @last; see the runs with: "+program+" list", "%q names no run", s)
	}
	return target{word, num}, nil
}

// runArg wants a whole run.
func runArg(s string) (target, error) {
	t, err := parseTarget(s)
	if err == nil && t.num != 0 {
		return t, usage("Leave the number out.", "%q names a fork, and this is for a whole run", s)
	}
	return t, err
}

// forkArg wants one fork.
func forkArg(s string) (target, error) {
	t, err := parseTarget(s)
	if err == nil && t.num == 0 {
		return t, usage("Add its number: "+s+"/1.", "%q names a run, and this is for one fork", s)
	}
	return t, err
}

// open connects and finds the run that t names. The caller closes runs.
func (env *Env) open(ctx context.Context, t target) (runs Runs, run string, err error) {
	if runs, err = env.runs(ctx); err != nil {
		return nil, "", err
	}
	if run, err = runs.Find(ctx, t.word); err != nil {
		runs.Close()
		return nil, "", err
	}
	return runs, run, nil
}

// result returns how fork num of the run ended.
func result(ctx context.Context, runs Runs, run string, num int) (fork.Result, error) {
	rep, err := runs.Report(ctx, run)
	if err != nil {
		return fork.Result{}, err
	}
	if err := hasFork(rep.Progress, run, num); err != nil {
		return fork.Result{}, err
	}
	i := slices.IndexFunc(rep.Results, func(r fork.Result) bool { return r.ForkNum == num })
	if i < 0 {
		return fork.Result{}, fault.New("", fault.Conflict, "fork %d of run %s has not ended", num, run).
			Hinted("Wait for it with: %s logs %s/%d --follow", program, run, num)
	}
	return rep.Results[i], nil
}

// hasFork fails when the run has no fork of that number.
func hasFork(p fork.Progress, run string, num int) error {
	if num <= p.Total {
		return nil
	}
	return fault.New("", fault.NotFound, "run %s has no fork %d", run, num).Hinted("It has %s.", plural(p.Total, "fork"))
}

// completeRuns offers the ids of runs with one of the statuses, or of any. It
// never starts an engine: a key press must not.
func completeRuns(env *Env, statuses ...fork.Status) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		none := cobra.ShellCompDirectiveNoFileComp
		if len(args) > 0 || env.Runs == nil {
			return nil, none
		}
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if env.configure(cmd, nil) != nil {
			return nil, none
		}
		g := env.Globals
		g.NoStart = true
		runs, err := env.Runs(ctx, g)
		if err != nil {
			return nil, none
		}
		defer runs.Close()
		list, err := runs.List(ctx, 50, "")
		if err != nil {
			return nil, none
		}
		ids := []string{"@last\tthe newest run"}
		for _, r := range list {
			if len(statuses) == 0 || slices.Contains(statuses, r.Status) {
				ids = append(ids, flat(r.Run)+"\t"+flat(strings.Join([]string{string(r.Status), r.Name, r.Repo}, " ")))
			}
		}
		return slices.DeleteFunc(ids, func(s string) bool { return !strings.HasPrefix(s, toComplete) }), none
	}
}

// completeFlags offers the values of the flags of "fork" that come from lists.
func completeFlags(cmd *cobra.Command, env *Env) {
	offer := func(flag string, values func() []string) {
		// The only error is a flag that does not exist, which a test sees.
		_ = cmd.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			if env.configure(cmd, nil) != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return values(), cobra.ShellCompDirectiveNoFileComp
		})
	}
	offer("provider", func() []string {
		if env.Providers == nil {
			return nil
		}
		set, err := env.Providers(env.Globals)
		if err != nil {
			return nil
		}
		return set.Names()
	})
	offer("model", func() []string {
		prices, err := loadPrices(env.Globals.Config)
		if err != nil {
			return nil
		}
		return modelNames(prices)
	})
	offer("agent", agentNames)
	offer("isolation", tierNames)
	offer("on-budget", func() []string { return []string{fork.OnBudgetStop, fork.OnBudgetPause} })
	offer("output", func() []string { return []string{"table", "json"} })
}
