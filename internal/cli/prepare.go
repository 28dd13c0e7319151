package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

type prepareOptions struct {
	Plan   fork.Plan // only what a base is made from
	Output string
}

// newPrepare makes the "prepare" command.
func newPrepare(env *Env, run func(context.Context, *Env, prepareOptions) error) *cobra.Command {
	if run == nil {
		run = runPrepare
	}
	var branch, agentPathFlag, output string
	cmd := &cobra.Command{
		Use:     "prepare REPO",
		GroupID: groupRuns,
		Short:   "Make what the forks of a repository start from",
		Long: `Prepare fetches a repository, checks it out in a sandbox, runs --setup there and
freezes the result as a base, which the forks of later runs start from in no
time. A run does the same by itself; this does it ahead.

A run uses the base when it would make the same: same repository, branch and
commit, same provider, agent and mounts, same setup and what it may reach, same
operating system. The repository's next commit makes another base.

The key of the base, its size and the time it took go to standard output. A base
that is there already is not made again. When the setup fails, the end of what
it printed is shown and nothing is kept. Ctrl-C does not stop it.` + exits(append([]int{exitTimeout}, common...)...),
		Example: `  sandbox-temporal prepare . --setup 'npm ci --offline'
  sandbox-temporal prepare https://github.com/user/repo --branch main -o json`,
		Args: args("REPO: a git URL or a path"),
		RunE: func(cmd *cobra.Command, words []string) error {
			set := env.Globals.Config.Fork
			opts := prepareOptions{Output: output, Plan: fork.Plan{
				Provider: set.Provider, Isolation: set.Isolation, Agent: set.Agent, AgentCommand: set.AgentCommand,
				Setup: set.Setup, Egress: set.Egress, Mounts: set.Mounts, Limits: set.Limits,
			}}
			if err := completePlan(cmd, env, &opts.Plan, words[0], branch, agentPathFlag); err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringVarP(&branch, "branch", "b", "main", "the `BRANCH` that the forks start from; without this flag, a repository that has no main is taken at its own default")
	sandboxFlags(fs, &agentPathFlag)
	outputFlag(cmd, &output)
	cmd.Annotations = settings(sandboxSettings()...)
	completeFlags(cmd, env)
	return cmd
}

// completePlan checks what can be checked of a plan for a base.
func completePlan(cmd *cobra.Command, env *Env, plan *fork.Plan, source, branch, agentPathFlag string) error {
	var err error
	plan.Repo = source
	if plan.Branch, err = branchFlag(cmd, branch); err != nil {
		return err
	}
	if err := plan.ValidateBase(); err != nil {
		return err
	}
	if err := isolate(env, plan); err != nil {
		return err
	}
	if err := knownPlace(cmd.Context(), env, *plan); err != nil {
		return err
	}
	if plan.AgentPath, err = agentPath(env, plan.Agent, agentPathFlag); err != nil {
		return err
	}
	if err := checkMounts(env, plan.Mounts); err != nil {
		return err
	}
	plan.Repo, err = checkRepo(cmd.Context(), source, plan.Branch)
	return err
}

// prepareTries is how often a connection that broke is replaced.
const prepareTries = 5

// prepared is what "prepare -o json" prints.
type prepared struct {
	Key      string  `json:"key"`
	Commit   string  `json:"commit"`
	Branch   string  `json:"branch"`
	Bytes    int64   `json:"bytes"`
	Made     bool    `json:"made"` // false: it was there already
	Duration float64 `json:"duration_seconds"`
}

func runPrepare(ctx context.Context, env *Env, opts prepareOptions) error {
	warnDirty(ctx, env, opts.Plan.Repo)
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	defer func() { runs.Close() }()
	id := fork.PreparePrefix + randomHex(8)
	if env.BeforeStart != nil {
		if err := env.BeforeStart(ctx, env.Globals, id, &opts.Plan); err != nil {
			return err
		}
	}
	fmt.Fprintf(env.Stderr, "%s: base of %s · provider %s\n", id, flat(opts.Plan.Repo), flat(opts.Plan.Provider))
	begun := env.Now()
	base, err := runs.Prepare(ctx, id, opts.Plan)
	for try := 0; fault.KindOf(err) == fault.Unreachable && ctx.Err() == nil && try < prepareTries; try++ {
		// The engine may have died, or have no room for its state just now.
		next, connectErr := env.runs(ctx)
		if connectErr != nil {
			err = connectErr
			continue
		}
		runs.Close()
		runs = next
		base, err = runs.Prepare(ctx, id, opts.Plan)
	}
	if err != nil && ctx.Err() != nil {
		fmt.Fprintf(env.Stderr, "It goes on; see what came of it with: %s bases\n", program)
		return said{exitDetached}
	}
	if err != nil {
		return err
	}
	p := prepared{base.Frozen, base.Commit, base.Branch, base.Bytes, base.Made, env.Now().Sub(begun).Seconds()}
	if opts.Output == "json" {
		return writeJSON(env.Stdout, p)
	}
	if p.Key == "" {
		// The provider keeps no bases: every fork unpacks the commit.
		fmt.Fprintf(env.Stderr, "Provider %s freezes nothing; the repository was fetched.\n", flat(opts.Plan.Provider))
		return nil
	}
	if !p.Made {
		fmt.Fprintln(env.Stderr, "It was there already.")
	}
	_, err = fmt.Fprintf(env.Stdout, "%s  %s  %s\n", flat(p.Key), byteText(p.Bytes), seconds(p.Duration))
	return err
}
