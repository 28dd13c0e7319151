package cli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/egress"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// forkOptions are what a command line of "fork" comes to.
type forkOptions struct {
	Plan   fork.Plan
	Wait   bool
	Output string
}

// forkFlags are the flags of "fork" that are no settings: the others come from
// the configuration, which knows what was given on the command line.
type forkFlags struct {
	branch, prompt, agentPath, name, output string
	wait, noWait                            bool
}

// newFork makes the "fork" command. Tests pass run to see the options that a
// command line comes to; nil runs the real thing.
func newFork(env *Env, run func(context.Context, *Env, forkOptions) error) *cobra.Command {
	if run == nil {
		run = runFork
	}
	var f forkFlags
	cmd := &cobra.Command{
		Use:     "fork REPO --prompt TEXT",
		GroupID: groupRuns,
		Short:   "Give one task to several agents, each in its own sandbox",
		Long: `Fork gives one task to several agents that know nothing of each other. Each
works in a sandbox of its own on a copy of the repository; what it commits or
leaves changed becomes the branch sandbox/RUN/N.

REPO is a git URL or a path. Of a path, the commits count: what is not committed
is no part of the run. Workers on other hosts get the branch through the store
that SANDBOX_TEMPORAL_ARTIFACTS names here and there; what forks made of it
comes back at the end of a run that is waited for, or with apply.

The id of the run goes to standard error; the report, or with --no-wait the id,
to standard output. While it waits, fork shows what the agents do. Ctrl-C (or q)
detaches: the run goes on, and "status --watch" comes back to it.` + exits(ofRuns...),
		Example: `  sandbox-temporal fork . --prompt "make the tests pass" --forks 3
  sandbox-temporal fork https://github.com/user/repo --branch main \
      --prompt @task.md --forks 5 --model opus --max-concurrent 3 --budget 10
  sandbox-temporal fork . --agent command --agent-command 'my-agent {prompt}' \
      --prompt "port the parser" --no-wait
  SANDBOX_TEMPORAL_ARTIFACTS=s3://agents sandbox-temporal fork . \
      --address temporal.example.com:7233 --prompt @task.md`,
		Args: args("REPO: a git URL or a path"),
		RunE: func(cmd *cobra.Command, words []string) error {
			opts, err := f.options(cmd, env, words[0])
			if err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	fs.StringVarP(&f.prompt, "prompt", "p", "", "the task: `TEXT`, @FILE, or - for standard input (required)")
	fs.StringVarP(&f.branch, "branch", "b", "main", "the `BRANCH` that the forks start from; without this flag, a repository that has no main is taken at its own default")
	fs.StringP("forks", "f", "1", fmt.Sprintf("give the task to `N` agents, 1 to %d", fork.MaxForks))
	fs.StringP("model", "m", "sonnet", "the `MODEL`: an alias or a full id; see: prices. Without it, an agent of another maker takes its own default")
	fs.String("max-concurrent", "5", "let at most `N` agents work at once")
	fs.StringP("timeout", "t", "7200", "the most `SECONDS` that one fork may take")
	fs.String("budget", "none", "the most `USD` that the whole run may cost")
	fs.String("budget-per-fork", "none", "the most `USD` that each fork may cost, within the run's")
	fs.String("on-budget", "stop", "`WHAT` a fork does when no budget covers its next call: stop, or pause until there is more money; see: budget")
	fs.String("verify", "", "a shell `LINE` that says with status 0 that a fork's work is good; it runs in a new sandbox with nothing but that work")
	fs.BoolVar(&f.wait, "wait", true, "wait for the run to end and report")
	fs.BoolVar(&f.noWait, "no-wait", false, "start the run and print its id")
	unpricedFlag(cmd)
	sandboxFlags(fs, &f.agentPath)
	fs.StringVar(&f.name, "name", "", "a `NAME` of your own for the run")
	outputFlag(cmd, &f.output)
	cmd.Annotations = settings(append(sandboxSettings(), "forks", "model", "max-concurrent", "timeout", "budget", "budget-per-fork", "on-budget", "verify", "allow-unpriced")...)
	completeFlags(cmd, env)
	return cmd
}

// sandboxFlags adds the flags that say in what a base is made and forks work.
func sandboxFlags(fs *pflag.FlagSet, agentPath *string) {
	fs.String("provider", "local", "the `PROVIDER` that makes the sandboxes; see: providers")
	fs.String("isolation", "", "the `TIER` that sets a local sandbox apart: "+strings.Join(tierNames(), ", ")+"; without this flag, "+tiers[0].name)
	fs.String("agent", "claude", "the `AGENT` that does the work: "+strings.Join(agentNames(), ", "))
	fs.String("agent-command", "", "for --agent command: the shell `LINE` that does the work; {prompt} in it becomes the task")
	fs.StringVar(agentPath, "agent-path", "", "`PATH` of the agent's program on the worker's host; for claude, SANDBOX_TEMPORAL_CLAUDE says the same")
	fs.String("setup", "", "a shell `LINE` that prepares the work tree once, before the forks")
	fs.String("credentials", "gateway", "`HOW` agents come by the model: gateway, or direct: with the real key in their sandboxes, which only claude in sandboxes on other hosts can have")
	fs.String("egress", "registries", "what the sandboxes may reach: none, registries (and the forge of REPO), open, or `HOSTS` such as registries,example.com,*.example.org")
	fs.StringArray("mount", nil, "show `SRC[:DST]` of the worker's host in every sandbox, read-only; can be given several times")
	fs.String("memory", "auto", "let each sandbox use at most `SIZE` of memory, as 4GiB; local gives 2GiB")
	fs.String("cpus", "auto", "let each sandbox use at most `N` cores, as 1.5; local gives what nobody else wants")
	fs.String("processes", "auto", "let each sandbox have at most `N` processes and threads; local gives 2048")
	fs.String("disk", "auto", "let each sandbox write at most `SIZE` to disk, as 20GiB; local gives 10GiB")
}

// sandboxSettings are those of sandboxFlags that the configuration file can
// set too.
func sandboxSettings() []string {
	return []string{"provider", "isolation", "agent", "agent-command", "setup", "credentials", "egress", "mount", "memory", "cpus", "processes", "disk"}
}

// agentNames are the words that --agent takes.
func agentNames() []string {
	var names []string
	for _, a := range agent.All() {
		names = append(names, a.Name())
	}
	return names
}

// options checks everything that can be checked before a run is started.
func (f *forkFlags) options(cmd *cobra.Command, env *Env, source string) (forkOptions, error) {
	opts := forkOptions{Wait: f.wait && !f.noWait, Output: f.output}
	if f.noWait && cmd.Flags().Changed("wait") && f.wait {
		return opts, usage("Leave one of them out.", "--wait and --no-wait are both given")
	}
	set := env.Globals.Config.Fork
	plan := fork.Plan{
		Repo: source, Name: f.name, Forks: set.Forks, Model: set.Model, MaxConcurrent: set.MaxConcurrent, Timeout: set.Timeout,
		Budget: set.Budget, BudgetPerFork: set.BudgetPerFork,
		Provider: set.Provider, Isolation: set.Isolation, Agent: set.Agent, AgentCommand: set.AgentCommand, Setup: set.Setup, Verify: set.Verify, Egress: set.Egress,
		Mounts: set.Mounts, Limits: set.Limits,
	}
	if !env.Globals.Config.IsSet("fork.model") {
		if a, err := agent.ByName(plan.Agent); err == nil {
			plan.Model = a.Model()
		}
	}
	if set.Credentials != fork.CredentialsGateway { // which a plan need not say
		plan.Credentials = set.Credentials
	}
	if set.OnBudget != fork.OnBudgetStop { // which a plan need not say
		plan.OnBudget = set.OnBudget
	}
	var err error
	if plan.Branch, err = branchFlag(cmd, f.branch); err != nil {
		return opts, err
	}
	if len(f.name) > 100 || flat(f.name) != f.name {
		return opts, usage("Use one line of at most 100 bytes.", "--name: %q", fork.Cut(f.name, 120))
	}
	if plan.Prompt, err = readPrompt(env, f.prompt); err != nil {
		return opts, err
	}
	if err := plan.Validate(); err != nil {
		return opts, err
	}
	if err := isolate(env, &plan); err != nil {
		return opts, err
	}
	if err := known(cmd.Context(), env, plan); err != nil {
		return opts, err
	}
	if plan.AgentPath, err = agentPath(env, plan.Agent, f.agentPath); err != nil {
		return opts, err
	}
	if err := checkMounts(env, plan.Mounts); err != nil {
		return opts, err
	}
	plan.Repo, err = checkRepo(cmd.Context(), source, plan.Branch)
	opts.Plan = plan
	return opts, err
}

// branchFlag returns the branch that --branch names, "" when it was not given.
func branchFlag(cmd *cobra.Command, value string) (string, error) {
	if !cmd.Flags().Changed("branch") {
		return "", nil
	}
	branch := strings.TrimPrefix(value, "refs/heads/")
	if !validBranch(branch) {
		return "", usage("Give the name of a branch as \"git branch\" lists it.", "%q cannot be the name of a branch", value)
	}
	return branch, nil
}

// known checks the words of the plan that must be known to this program.
func known(ctx context.Context, env *Env, plan fork.Plan) error {
	if err := knownPlace(ctx, env, plan); err != nil {
		return err
	}
	prices, err := loadPrices(env.Globals.Config)
	if err != nil {
		return err
	}
	if _, ok := prices.Resolve(plan.Model); !ok && !env.Globals.Config.AllowUnpriced {
		return usage("Use one of: "+strings.Join(modelNames(prices), ", ")+"; or give it a price (see: prices), or use --allow-unpriced.", "no price is known for the model %q, so no budget would hold", plan.Model)
	}
	return nil
}

// knownPlace is known without the model.
func knownPlace(ctx context.Context, env *Env, plan fork.Plan) error {
	if _, err := agent.ByName(plan.Agent); err != nil {
		return err
	}
	if env.Providers != nil {
		set, err := env.Providers(env.Globals)
		if err != nil {
			return err
		}
		provider, err := set.Get(plan.Provider)
		if err != nil {
			return err
		}
		// The worker of another engine has credentials of its own.
		if gated, ok := sandbox.As[sandbox.Gated](provider); ok && env.Globals.Config.Embedded() {
			if err := gated.Ready(ctx); err != nil {
				return err
			}
		}
		if err := reachable(env, plan, provider); err != nil {
			return err
		}
	}
	if _, err := egress.ParsePolicy(plan.Egress, plan.Repo); err != nil {
		return fault.Wrap("--egress", err)
	}
	return nil
}

// reachable says why agents in the provider's sandboxes could not reach the
// model. What only the worker of a cluster knows, it says itself.
func reachable(env *Env, plan fork.Plan, p sandbox.Provider) error {
	_, bound := sandbox.As[sandbox.HostBound](p)
	cfg := env.Globals.Config
	switch {
	case plan.Prompt == "": // a base is made ahead of all runs
		return nil
	case bound && plan.Credentials == fork.CredentialsDirect:
		return usage("Leave --credentials out.", "--credentials direct: sandboxes of provider %s reach the gateway, so the key need not be in them", plan.Provider)
	case !bound && plan.Credentials != fork.CredentialsDirect && cfg.GatewayURL == "" && cfg.Embedded():
		return usage("Set SANDBOX_TEMPORAL_GATEWAY_URL, or put the key into the sandboxes with --credentials direct.",
			"sandboxes of provider %s cannot reach the gateway of this host: it has no public address", plan.Provider)
	}
	return nil
}

// readPrompt reads --prompt: text, @FILE, or - for standard input.
func readPrompt(env *Env, s string) (string, error) {
	var r io.Reader
	from := "standard input"
	file, isFile := strings.CutPrefix(s, "@")
	switch {
	case s == "-" && env.Stdin == nil:
		return "", usage("Use --prompt TEXT or --prompt @FILE.", "there is no standard input to read the prompt from")
	case s == "-":
		r = env.Stdin
	case isFile:
		const hint = "A prompt that begins with @ names a file; to say it as it is, use --prompt - and standard input."
		st, err := os.Stat(file)
		if err != nil {
			return "", usage(hint, "--prompt: %v", err)
		}
		if st.IsDir() {
			return "", usage(hint, "--prompt: %s is a folder", file)
		}
		f, err := os.Open(file)
		if err != nil {
			return "", usage(hint, "--prompt: %v", err)
		}
		defer f.Close()
		r, from = f, file
	default:
		return s, nil
	}
	b, err := io.ReadAll(io.LimitReader(r, fork.MaxPrompt+1))
	if err != nil {
		return "", usage("Check the file, or give the prompt as text.", "--prompt: %s: %v", from, err)
	}
	if len(b) > fork.MaxPrompt {
		return "", usage("Put the long part into a file in the repository and refer to it.", "the prompt from %s has more than %d bytes", from, fork.MaxPrompt)
	}
	return string(b), nil
}

// agentPath is the absolute path of the agent's program, or "" when the worker
// shall look it up. The setting for claude is of this host, so it counts only
// when the worker is here too; a path on another host cannot be checked.
func agentPath(env *Env, name, path string) (string, error) {
	cfg, from := env.Globals.Config, "--agent-path"
	if path == "" && name == "claude" && cfg.Embedded() {
		path, from = cfg.ClaudePath, "the path of claude"
	}
	if path == "" {
		return "", nil
	}
	if !cfg.Embedded() {
		if !filepath.IsAbs(path) {
			return "", usage("Write the whole path, as it is on the worker's host.", "%s: %q is not an absolute path", from, path)
		}
		return filepath.Clean(path), nil
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", usage("Write the whole path.", "%s: %v", from, err)
	}
	st, err := os.Stat(abs)
	switch {
	case err != nil:
		return "", usage("Name the program's file.", "%s: %v", from, err)
	case !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
		return "", usage("Name the program's file, and make it executable.", "%s: %s is not a program", from, abs)
	}
	return abs, nil
}

// checkMounts refuses what no sandbox can show.
func checkMounts(env *Env, all []fork.Mount) error {
	taken := map[string]string{}
	for _, m := range all {
		if env.Globals.Config.Embedded() {
			if _, err := os.Stat(m.Source); err != nil {
				return usage("Use --mount /path/on/the/host:/path/in/the/sandbox.", "--mount: %v", err)
			}
		}
		if reason := badTarget(m.Target); reason != "" {
			return usage("Choose another path after the colon, as --mount "+m.Source+":/opt/"+filepath.Base(m.Source)+".", "--mount: %s %s", m.Target, reason)
		}
		if other := taken[m.Target]; other != "" {
			return usage("Give each its own path after the colon.", "--mount: %s and %s would both be %s", other, m.Source, m.Target)
		}
		taken[m.Target] = m.Source
	}
	return nil
}

// badTarget says why nothing can be shown at dst in a sandbox, or "".
func badTarget(dst string) string {
	for _, own := range []string{sandbox.Workspace, sandbox.Home, sandbox.ProgramDir, "/proc", "/sys", "/dev"} {
		if dst == own || strings.HasPrefix(dst, own+"/") || strings.HasPrefix(own, strings.TrimSuffix(dst, "/")+"/") {
			return "is the sandbox's own"
		}
	}
	return ""
}

// newRunID makes the id of a run: 32 random bits after the prefix, which a
// person can still type.
func newRunID() string { return fork.RunPrefix + randomHex(4) }

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

func runFork(ctx context.Context, env *Env, opts forkOptions) error {
	warnDirty(ctx, env, opts.Plan.Repo)
	runs, err := env.runs(ctx)
	if err != nil {
		return err
	}
	w := newWatcher(env, runs)
	defer w.close()
	run, err := start(ctx, env, runs, opts.Plan)
	if err != nil {
		return err
	}
	w.run = run
	p := opts.Plan
	fmt.Fprintf(env.Stderr, "%s: %s of %s · model %s · provider %s\n", run, plural(p.Forks, "fork"), flat(p.Repo), flat(p.Model), flat(p.Provider))
	if p.Credentials == fork.CredentialsDirect {
		fmt.Fprintf(env.Stderr, "%s: the model's key is in the sandboxes of this run (--credentials direct): whatever runs there can read it and spend with it\n", program)
	}
	if !opts.Wait {
		fmt.Fprintf(env.Stderr, "Follow it with: %s status --watch %s\n", program, run)
		if opts.Output == "json" {
			return writeJSON(env.Stdout, struct {
				Run string `json:"workflow_id"`
			}{run})
		}
		_, err := fmt.Fprintln(env.Stdout, run)
		return err
	}
	return waitAndReport(ctx, env, w, opts.Output)
}

// start starts the plan under a new id.
func start(ctx context.Context, env *Env, runs Runs, plan fork.Plan) (string, error) {
	for try := 1; ; try++ {
		run := newRunID()
		if env.BeforeStart != nil {
			if err := env.BeforeStart(ctx, env.Globals, run, &plan); err != nil {
				return "", err
			}
		}
		err := runs.Start(ctx, run, plan)
		switch {
		case err == nil:
			return run, nil
		case fault.KindOf(err) == fault.Conflict && try < 5: // an id of 32 bits can be taken
			continue
		case ctx.Err() != nil:
			// The request may have reached Temporal all the same.
			fmt.Fprintf(env.Stderr, "It is not known whether run %s was started. Look with: %s status %s\n", run, program, run)
			return "", said{exitDetached}
		}
		return "", err
	}
}
