package cli

import (
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

type spendingOptions struct {
	By     string
	Since  string
	Output string
}

// newSpending makes the "report" command.
func newSpending(env *Env, run func(context.Context, *Env, spendingOptions) error) *cobra.Command {
	if run == nil {
		run = runSpending
	}
	var opts spendingOptions
	cmd := &cobra.Command{
		Use:     "report",
		GroupID: groupWork,
		Short:   "Say who spent what on what",
		Long: `Report sums up the ledger, in which every call of the model stands, by run,
model, day or repository. It needs no Temporal: the ledger is that of this
host's engine or worker, or the database that SANDBOX_TEMPORAL_LEDGER_URL names,
and it remembers runs that Temporal has forgotten.

Days are those of UTC.` + exits(exitOK, exitFailed, exitUsage, exitNotFound, exitDenied),
		Example: `  sandbox-temporal report --since 7d
  sandbox-temporal report --by repo --since 2026-11-01 --output csv`,
		Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), env, opts) },
	}
	var groups []string
	for _, g := range ledger.Groups {
		groups = append(groups, string(g))
	}
	cmd.Flags().Var(newChoice(&opts.By, groups...), "by", "what a line is about")
	cmd.Flags().StringVar(&opts.Since, "since", "", "leave out what is older than `TIME`: 7d, 12h, a date, or a date and time as in RFC 3339")
	cmd.Flags().VarP(newChoice(&opts.Output, "table", "json", "csv"), "output", "o", "how to print the result")
	return cmd
}

// spending is the report as JSON; scripts depend on it.
type spending struct {
	By    ledger.Group  `json:"by"`
	Since *time.Time    `json:"since,omitempty"`
	Lines []ledger.Line `json:"lines"`
	Total ledger.Line   `json:"total"`
}

func runSpending(ctx context.Context, env *Env, opts spendingOptions) error {
	s := spending{By: ledger.Group(opts.By), Total: ledger.Line{Key: "total"}}
	if opts.Since != "" {
		at, err := parseSince(opts.Since, env.Now())
		if err != nil {
			return err
		}
		s.Since = &at
	}
	books, err := env.books(ctx)
	if err != nil {
		return err
	}
	defer books.Close()
	q := ledger.Query{By: s.By}
	if s.Since != nil {
		q.Since = *s.Since
	}
	if s.Lines, err = books.Report(ctx, q); err != nil {
		return err
	}
	for _, l := range s.Lines {
		s.Total = s.Total.Add(l)
	}
	switch opts.Output {
	case "json":
		return writeJSON(env.Stdout, s)
	case "csv":
		return writeSpendingCSV(env.Stdout, s)
	}
	return printSpending(env, s)
}

// parseSince reads how far back to look, or from when on.
func parseSince(s string, now time.Time) (time.Time, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.Atoi(days); err == nil && n >= 0 && n < 100_000 {
			return now.Add(-time.Duration(n) * 24 * time.Hour).UTC(), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d).UTC(), nil
	}
	for _, layout := range []string{time.DateOnly, time.RFC3339} {
		if at, err := time.Parse(layout, s); err == nil {
			return at.UTC(), nil
		}
	}
	return time.Time{}, usage("Use a duration such as 7d or 12h, or a date such as 2026-11-01.", "--since %q is no time", fork.Cut(s, 100))
}

func printSpending(env *Env, s spending) error {
	head := strings.ToUpper(string(s.By))
	columns := []column{
		{head, false}, {"CALLS", true}, {"COST", true}, {"INPUT", true}, {"OUTPUT", true}, {"CACHE READ", true}, {"CACHE WRITE", true},
	}
	line := func(l ledger.Line, colour string) []cell {
		key := flat(l.Key)
		if key == "" {
			key = "(not known)"
		}
		return []cell{
			{fit(key, 60), colour}, {fmt.Sprint(l.Calls), colour}, {dollars(l.Cost), colour}, {fmt.Sprint(l.InputTokens), colour}, {fmt.Sprint(l.OutputTokens), colour},
			{fmt.Sprint(l.CacheReadTokens), colour}, {fmt.Sprint(l.CacheWrite5mTokens + l.CacheWrite1hTokens), colour},
		}
	}
	var rows [][]cell
	for _, l := range s.Lines {
		rows = append(rows, line(l, plain))
	}
	rows = append(rows, line(s.Total, bold))
	var out strings.Builder
	if err := writeTable(&out, env.paintFor(env.Stdout), columns, rows); err != nil {
		return err
	}
	if n := s.Total.Crashed; n > 0 {
		fmt.Fprintf(&out, "%s charged at what had been reserved, because the gateway died before the answer came\n", plural(int(n), "call"))
	}
	if n := s.Total.InFlight; n > 0 {
		fmt.Fprintf(&out, "%s under way; up to %s more is reserved\n", plural(int(n), "call"), dollars(s.Total.Reserved))
	}
	_, err := io.WriteString(env.Stdout, out.String())
	return err
}

func writeSpendingCSV(w io.Writer, s spending) error {
	out := csv.NewWriter(w)
	rows := [][]string{{
		string(s.By), "calls", "failed", "crashed", "cost_usd", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_5m_tokens",
		"cache_write_1h_tokens", "web_searches", "in_flight", "reserved_usd", "first", "last",
	}}
	for _, l := range s.Lines {
		row := []string{flat(l.Key)}
		for _, n := range []int64{l.Calls, l.Failed, l.Crashed} {
			row = append(row, strconv.FormatInt(n, 10))
		}
		row = append(row, strings.TrimPrefix(l.Cost.String(), "$"))
		for _, n := range []int64{l.InputTokens, l.OutputTokens, l.CacheReadTokens, l.CacheWrite5mTokens, l.CacheWrite1hTokens, l.WebSearches, l.InFlight} {
			row = append(row, strconv.FormatInt(n, 10))
		}
		rows = append(rows, append(row, strings.TrimPrefix(l.Reserved.String(), "$"), l.First.Format(time.RFC3339), l.Last.Format(time.RFC3339)))
	}
	if err := out.WriteAll(rows); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}
