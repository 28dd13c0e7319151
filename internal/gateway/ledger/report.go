package ledger

import (
	"context"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A Group is what the lines of a report are about.
type Group string

// The groups.
const (
	ByRun   Group = "run"
	ByModel Group = "model" // that answered, or was asked when none did
	ByDay   Group = "day"   // by UTC
	ByRepo  Group = "repo"
)

// Groups lists them.
var Groups = []Group{ByRun, ByModel, ByDay, ByRepo}

// A Query says what a report is to be about.
type Query struct {
	By    Group
	Since time.Time // calls that began earlier are left out; zero: none is
}

// A Line is the account of one run, model, day or repository. Its JSON is a
// promise to scripts.
type Line struct {
	Key     string   `json:"key"`
	Calls   int64    `json:"calls"`             // that have ended
	Failed  int64    `json:"failed,omitempty"`  // of these: not answered
	Crashed int64    `json:"crashed,omitempty"` // of these: charged at their reservation, because their gateway died
	Cost    fork.USD `json:"cost_usd"`

	InputTokens        int64 `json:"input_tokens"`
	OutputTokens       int64 `json:"output_tokens"`
	CacheReadTokens    int64 `json:"cache_read_tokens"`
	CacheWrite5mTokens int64 `json:"cache_write_5m_tokens"`
	CacheWrite1hTokens int64 `json:"cache_write_1h_tokens"`
	WebSearches        int64 `json:"web_searches"`

	InFlight int64    `json:"in_flight,omitempty"` // calls under way
	Reserved fork.USD `json:"reserved_usd,omitempty"`

	First time.Time `json:"first"` // when the first of these calls began
	Last  time.Time `json:"last"`  // when the last one did
}

// Add returns the sum of two lines, under the key of the first.
func (a Line) Add(b Line) Line {
	sum := Line{
		Key: a.Key, Calls: a.Calls + b.Calls, Failed: a.Failed + b.Failed, Crashed: a.Crashed + b.Crashed, Cost: a.Cost + b.Cost,
		InputTokens: a.InputTokens + b.InputTokens, OutputTokens: a.OutputTokens + b.OutputTokens, CacheReadTokens: a.CacheReadTokens + b.CacheReadTokens,
		CacheWrite5mTokens: a.CacheWrite5mTokens + b.CacheWrite5mTokens, CacheWrite1hTokens: a.CacheWrite1hTokens + b.CacheWrite1hTokens,
		WebSearches: a.WebSearches + b.WebSearches, InFlight: a.InFlight + b.InFlight, Reserved: a.Reserved + b.Reserved, First: a.First, Last: a.Last,
	}
	if sum.First.IsZero() || !b.First.IsZero() && b.First.Before(sum.First) {
		sum.First = b.First
	}
	if b.Last.After(sum.Last) {
		sum.Last = b.Last
	}
	return sum
}

// report reads the lines, in the order of time for days and of cost, the
// dearest first, for the others.
func (s *store) report(ctx context.Context, q Query) ([]Line, error) {
	const op = "report"
	key, join, order := "", "", "4 DESC, 1"
	switch q.By {
	case ByRun:
		key = "c.run"
	case ByModel:
		key = "c.model"
	case ByDay:
		key, order = "c.day", "1"
	case ByRepo:
		key, join = "COALESCE(r.repo, '')", "LEFT JOIN runs r ON r.run = c.run"
	default:
		return nil, fault.New(op, fault.Invalid, "a report by %q", q.By)
	}
	since := int64(0)
	if !q.Since.IsZero() {
		since = millis(q.Since)
	}
	count := func(condition string) string {
		return "CAST(SUM(CASE WHEN " + condition + " THEN 1 ELSE 0 END) AS bigint)"
	}
	sum := func(what string) string { return "CAST(SUM(" + what + ") AS bigint)" }
	found, err := s.read.QueryContext(ctx, `SELECT `+key+`, `+count("c.state <> 'in_flight'")+`, `+count("c.state = 'failed'")+`, `+sum("c.cost")+`, `+
		count("c.state = 'crashed'")+`, `+sum("c.input")+`, `+sum("c.output")+`, `+sum("c.cache_read")+`, `+sum("c.cache_write_5m")+`, `+
		sum("c.cache_write_1h")+`, `+sum("c.web_searches")+`, `+count("c.state = 'in_flight'")+`, `+
		sum("CASE WHEN c.state = 'in_flight' THEN c.reserved ELSE 0 END")+`, MIN(c.started), MAX(c.started)
		FROM calls c `+join+` WHERE c.started >= $1 GROUP BY 1 ORDER BY `+order, since)
	if err != nil {
		return nil, s.fault(op, err)
	}
	defer found.Close() // Err tells
	lines := []Line{}
	for found.Next() {
		var l Line
		var first, last int64
		if err := found.Scan(&l.Key, &l.Calls, &l.Failed, &l.Cost, &l.Crashed, &l.InputTokens, &l.OutputTokens, &l.CacheReadTokens,
			&l.CacheWrite5mTokens, &l.CacheWrite1hTokens, &l.WebSearches, &l.InFlight, &l.Reserved, &first, &last); err != nil {
			return nil, s.fault(op, err)
		}
		l.First, l.Last = time.UnixMilli(first).UTC(), time.UnixMilli(last).UTC()
		lines = append(lines, l)
	}
	if err := found.Err(); err != nil {
		return nil, s.fault(op, err)
	}
	return lines, nil
}
