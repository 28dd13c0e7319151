package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
)

// loadPrices reads the price table with the user's own prices put over it.
func loadPrices(cfg *config.Config) (*gateway.Prices, error) {
	if cfg.PricesFile == "" {
		return gateway.LoadPrices(nil)
	}
	f, err := os.Open(cfg.PricesFile)
	if err != nil {
		return nil, usage("Correct the setting prices_file.", "prices: %v", err)
	}
	defer f.Close()
	p, err := gateway.LoadPrices(f)
	return p, fault.Wrap(cfg.PricesFile, err)
}

// modelNames are the words that --model takes, short ones first.
func modelNames(p *gateway.Prices) []string {
	var short, ids []string
	for _, m := range p.Models() {
		short, ids = append(short, m.Aliases...), append(ids, m.ID)
	}
	return append(short, ids...)
}

type pricesOptions struct{ Output string }

// newPrices makes the "prices" command.
func newPrices(env *Env, run func(context.Context, *Env, pricesOptions) error) *cobra.Command {
	if run == nil {
		run = runPrices
	}
	var opts pricesOptions
	cmd := &cobra.Command{
		Use:     "prices",
		GroupID: groupService,
		Short:   "List what the models cost",
		Long: `Prices lists the models that --model takes, their aliases, and what a million
tokens of each costs in US dollars; those of message batches cost a share of it.
Budgets are reckoned with these prices. The setting prices_file names a file
with prices of your own.` + exits(exitOK, exitFailed, exitUsage),
		Example: "  sandbox-temporal prices",
		Args:    args(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runPrices(_ context.Context, env *Env, opts pricesOptions) error {
	p, err := loadPrices(env.Globals.Config)
	if err != nil {
		return err
	}
	if opts.Output == "json" {
		return writeJSON(env.Stdout, struct {
			Version string          `json:"version"`
			Batch   gateway.Share   `json:"batch"` // of the price of tokens
			Models  []gateway.Model `json:"models"`
		}{p.Version(), p.Batch(), p.Models()})
	}
	var rows [][]cell
	add := func(name, aliases string, r gateway.Rate) {
		row := []cell{{name, plain}}
		for _, u := range []fork.USD{r.Input, r.Output, r.CacheRead, r.CacheWrite5m, r.CacheWrite1h} {
			row = append(row, cell{perMillion(u), plain})
		}
		rows = append(rows, append(row, cell{aliases, plain}))
	}
	for _, m := range p.Models() {
		add(flat(m.ID), flat(strings.Join(m.Aliases, ", ")), m.Rate)
		if m.Long != nil {
			add(fmt.Sprintf("  above %d prompt tokens", m.LongAbove), "", *m.Long)
		}
	}
	var b strings.Builder
	err = writeTable(&b, env.paintFor(env.Stdout), []column{
		{"MODEL", false}, {"INPUT", true}, {"OUTPUT", true}, {"CACHE READ", true}, {"WRITE 5M", true}, {"WRITE 1H", true}, {"ALIASES", false},
	}, rows)
	if err != nil {
		return err
	}
	fmt.Fprintf(&b, "US dollars per million tokens, %s of it in message batches · prices of %s\n", p.Batch(), flat(p.Version()))
	_, err = io.WriteString(env.Stdout, b.String())
	return err
}

// perMillion shows a price with two decimals, or as many as it has.
func perMillion(u fork.USD) string {
	s := strings.TrimRight(u.String(), "0")
	whole, frac, _ := strings.Cut(s, ".")
	return whole + "." + frac + strings.Repeat("0", max(2-len(frac), 0))
}
