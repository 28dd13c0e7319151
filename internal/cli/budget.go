package cli

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// newBudget makes the "budget" command.
func newBudget(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "budget",
		GroupID: groupRuns,
		Short:   "Look at the budgets of a run, and add to them",
		Long: `Budget has commands for the money of a run. A call of the model is paid from
three budgets that lie inside one another: that of its fork (--budget-per-fork),
that of its run (--budget), and that of the day by UTC, which all runs share
(the setting budget_per_day). What a call may cost at most is reserved in all
three before it is made.` + exits(exitOK, exitUsage),
		Example: "  sandbox-temporal budget show @last\n  sandbox-temporal budget add @last 5",
		Args:    cobra.ArbitraryArgs,
		RunE:    onlyCommands,
	}
	cmd.AddCommand(newBudgetAdd(env, nil), newBudgetShow(env, nil))
	return cmd
}

type budgetAddOptions struct {
	Target target
	Amount fork.USD
}

// newBudgetAdd makes the "budget add" command.
func newBudgetAdd(env *Env, run func(context.Context, *Env, budgetAddOptions) error) *cobra.Command {
	if run == nil {
		run = runBudgetAdd
	}
	return &cobra.Command{
		Use:   "add RUN[/N] USD",
		Short: "Give a run more money, or one fork of it",
		Long: `Add raises the budget of a run, or with RUN/N that of one fork within it. Forks
that wait for money, because the run was started with --on-budget pause, go on
at once when there is enough of it.
` + targetHelp + exits(common...),
		Example:           "  sandbox-temporal budget add @last 5\n  sandbox-temporal budget add 3f9c/2 0.50",
		Args:              args("RUN or RUN/N", "USD: an amount of dollars"),
		ValidArgsFunction: completeRuns(env, fork.Running),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			var opts budgetAddOptions
			if opts.Target, err = parseTarget(words[0]); err != nil {
				return err
			}
			if opts.Amount, err = fork.ParseUSD(words[1]); err != nil || opts.Amount == 0 {
				return usage("Use an amount of dollars above 0, such as 2.50.", "%q is no amount to add", words[1])
			}
			return run(cmd.Context(), env, opts)
		},
	}
}

func runBudgetAdd(ctx context.Context, env *Env, opts budgetAddOptions) error {
	runs, run, err := env.open(ctx, opts.Target)
	if err != nil {
		return err
	}
	defer runs.Close()
	if opts.Target.num > 0 {
		p, err := runs.Progress(ctx, run)
		if err == nil {
			err = hasFork(p, run, opts.Target.num)
		}
		if err != nil {
			return err
		}
	}
	p, err := runs.AddBudget(ctx, run, opts.Target.num, opts.Amount)
	if err != nil {
		return err
	}
	return sayProgress(env, p)
}

type budgetShowOptions struct {
	Target target
	Output string
}

// newBudgetShow makes the "budget show" command.
func newBudgetShow(env *Env, run func(context.Context, *Env, budgetShowOptions) error) *cobra.Command {
	if run == nil {
		run = runBudgetShow
	}
	var opts budgetShowOptions
	cmd := &cobra.Command{
		Use:   "show RUN",
		Short: "Show what is left of the budgets of a run",
		Long: `Show reads in the ledger how the budgets of a run and of its forks stand, and
that of today: what has been spent, what is reserved for calls under way, and
what is left for others. The ledger is that of this host's engine or worker, or
the database that SANDBOX_TEMPORAL_LEDGER_URL names. It remembers runs that
Temporal has forgotten; of those, write the whole id.
` + targetHelp + exits(common...),
		Example:           "  sandbox-temporal budget show @last",
		Args:              args("RUN"),
		ValidArgsFunction: completeRuns(env),
		RunE: func(cmd *cobra.Command, words []string) (err error) {
			if opts.Target, err = runArg(words[0]); err != nil {
				return err
			}
			return run(cmd.Context(), env, opts)
		},
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runBudgetShow(ctx context.Context, env *Env, opts budgetShowOptions) error {
	run, err := env.fullID(ctx, opts.Target.word)
	if err != nil {
		return err
	}
	books, err := env.books(ctx)
	if err != nil {
		return err
	}
	defer books.Close()
	b, err := books.Budgets(ctx, run)
	if err != nil {
		return err
	}
	if opts.Output == "json" {
		return writeJSON(env.Stdout, b)
	}
	return printBudgets(env, b)
}

// fullID returns the id of the run that word means. One that is whole need not
// be known to Temporal.
func (env *Env) fullID(ctx context.Context, word string) (string, error) {
	if strings.HasPrefix(word, fork.RunPrefix) && len(word) == len(fork.RunPrefix)+8 {
		return word, nil
	}
	runs, run, err := env.open(ctx, target{word: word})
	if err != nil {
		return "", err
	}
	runs.Close()
	return run, nil
}

func printBudgets(env *Env, b ledger.Budgets) error {
	row := func(name string, x ledger.Budget) []cell {
		limit, left := "none", ""
		if x.Limit > 0 {
			limit, left = dollars(x.Limit), dollars(x.Left())
		}
		return []cell{{name, plain}, {limit, plain}, {dollars(x.Spent), plain}, {dollars(x.Reserved), plain}, {left, plain}}
	}
	rows := [][]cell{row("day "+b.Day, b.Today), row("run", b.Whole)}
	var held strings.Builder
	for _, f := range b.Forks {
		rows = append(rows, row(fmt.Sprintf("fork %d", f.Num), f.Budget))
		if f.Held != "" {
			fmt.Fprintf(&held, "fork %d waits: %s\n", f.Num, flat(f.Held))
		}
	}
	var out strings.Builder
	what := "forks end when no budget covers their next call"
	if b.Pause {
		what = "forks wait when no budget covers their next call"
	}
	p := env.paintFor(env.Stdout)
	fmt.Fprintf(&out, "%s · %s · %s\n\n", p.in(bold, flat(b.Run)), flat(b.Repo), what)
	err := writeTable(&out, p, []column{{"BUDGET", false}, {"LIMIT", true}, {"SPENT", true}, {"RESERVED", true}, {"LEFT", true}}, rows)
	if err != nil {
		return err
	}
	if held.Len() > 0 {
		out.WriteString("\n" + held.String())
	}
	if _, err := io.WriteString(env.Stdout, out.String()); err != nil {
		return err
	}
	if held.Len() > 0 {
		fmt.Fprintf(env.Stderr, "\nLet them go on with: %s budget add %s USD\n", program, flat(b.Run))
	}
	return nil
}
