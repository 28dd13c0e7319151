package ledger

import (
	"cmp"
	"context"
	"database/sql"
	"maps"
	"slices"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A balance is one budget and what was taken from it.
type balance struct {
	budget   fork.USD // 0: none
	spent    fork.USD
	reserved fork.USD
}

// The rows of the accounts.
type (
	dayRow struct {
		day string
		balance
	}
	runRow struct {
		run, repo string
		pause     bool
		created   int64
		balance
	}
	forkRow struct {
		forkKey
		balance
		calls, input, output, cacheRead, cacheWrite, refused int64

		token   string // see Hash.text
		granted int64
		held    string
		short   string
	}
)

type forkKey struct {
	run string
	num int
}

func (k forkKey) compare(o forkKey) int {
	return cmp.Or(cmp.Compare(k.run, o.run), cmp.Compare(k.num, o.num))
}

// A callRow is what is known of a call that is to be settled.
type callRow struct {
	id         int64
	state      string
	reserved   fork.USD
	cost       fork.USD
	known      bool // that it is ours and in flight, without looking
	settlement *Settlement
}

// A sheet is what one transaction works on: the rows it has read, changed in
// memory, and the new ones. Nothing of it counts before it is committed.
type sheet struct {
	days    map[string]*dayRow
	runs    map[string]*runRow
	forks   map[forkKey]*forkRow
	calls   map[int64]*callRow
	batches map[string]*batchRow

	changedDays    map[string]bool
	changedRuns    map[string]bool
	changedForks   map[forkKey]bool
	changedTokens  map[forkKey]bool
	changedBatches map[string]bool
	opened         []*Call         // that were reserved
	closed         []*callRow      // that were settled
	joined         []joining       // calls that belong to a batch from now on
	freed          map[string]bool // see marks
}

// A want is what an entry reads.
type want struct {
	day    string // empty: none
	run    string // empty: none
	num    int    // 0: no fork
	calls  []int64
	ours   bool   // the calls are this gateway's own
	batch  string // empty: none
	create bool   // the run and the fork are made when they are missing
	repo   string
	pause  bool
	budget [2]fork.USD // of the run and of the fork, when they are made
	at     int64
}

// change marks a fork's rows as changed: its own and its run's, or all three
// with the day's.
func (s *sheet) change(day string, key forkKey) {
	s.changedForks[key] = true
	s.changedRuns[key.run] = true
	if day != "" {
		s.changedDays[day] = true
	}
}

// free marks that money came back to a fork's budgets, or was added.
func (s *sheet) free(day string, key forkKey) {
	for _, mark := range marks(day, key) {
		s.freed[mark] = true
	}
}

// marks names the three budgets of a fork's call.
func marks(day string, key forkKey) [3]string {
	return [3]string{"fork " + fork.Spec{Run: key.run, Num: key.num}.ID(), "run " + key.run, "day " + day}
}

// balances are those that a call of the fork is paid from.
func (s *sheet) balances(day string, key forkKey) [3]*balance {
	return [3]*balance{&s.forks[key].balance, &s.runs[key.run].balance, &s.days[day].balance}
}

// empty reports whether there is nothing to write.
func (s *sheet) empty() bool {
	return len(s.changedDays)+len(s.changedRuns)+len(s.changedForks)+len(s.changedTokens)+len(s.changedBatches)+len(s.opened)+len(s.closed)+len(s.joined) == 0
}

// A cache is what is known to stand in the database. It is used only where
// nobody else writes.
type cache struct {
	days  map[string]dayRow
	runs  map[string]runRow
	forks map[forkKey]forkRow
}

func newCache() *cache {
	return &cache{days: map[string]dayRow{}, runs: map[string]runRow{}, forks: map[forkKey]forkRow{}}
}

// keep takes over what was committed. A cache that has grown large is begun
// anew: what is needed is read again.
func (c *cache) keep(s *sheet) {
	const large = 10_000
	if len(c.days)+len(c.runs)+len(c.forks) > large {
		*c = *newCache()
	}
	for k, v := range s.days {
		c.days[k] = *v
	}
	for k, v := range s.runs {
		c.runs[k] = *v
	}
	for k, v := range s.forks {
		c.forks[k] = *v
	}
}

// load reads the rows that are wanted, those in known without a look at the
// database.
func (p *pen) load(ctx context.Context, wants []want, known *cache) (*sheet, error) {
	s := &sheet{
		days: map[string]*dayRow{}, runs: map[string]*runRow{}, forks: map[forkKey]*forkRow{}, calls: map[int64]*callRow{}, batches: map[string]*batchRow{},
		changedDays: map[string]bool{}, changedRuns: map[string]bool{}, changedForks: map[forkKey]bool{}, changedTokens: map[forkKey]bool{},
		changedBatches: map[string]bool{},
		freed:          map[string]bool{},
	}
	days, runs, forks, calls, batches := map[string]bool{}, map[string]want{}, map[forkKey]want{}, map[int64]bool{}, map[string]bool{}
	for _, w := range wants {
		if w.day != "" {
			days[w.day] = true
		}
		if w.run != "" && (w.create || runs[w.run].run == "") {
			runs[w.run] = w
		}
		if key := (forkKey{w.run, w.num}); w.num != 0 && (w.create || forks[key].run == "") {
			forks[key] = w
		}
		for _, id := range w.calls {
			if w.ours && p.store.alone {
				s.calls[id] = &callRow{id: id, known: true}
			} else {
				calls[id] = true
			}
		}
		if w.batch != "" {
			batches[w.batch] = true
		}
	}
	for day := range days {
		if row, ok := known.days[day]; ok {
			s.days[day] = &row
			delete(days, day)
		}
	}
	for run := range runs {
		if row, ok := known.runs[run]; ok {
			s.runs[run] = &row
			delete(runs, run)
		}
	}
	for key := range forks {
		if row, ok := known.forks[key]; ok {
			s.forks[key] = &row
			delete(forks, key)
		}
	}
	if err := p.loadDays(ctx, s, days); err != nil {
		return nil, err
	}
	if err := p.loadRuns(ctx, s, runs); err != nil {
		return nil, err
	}
	if err := p.loadForks(ctx, s, forks); err != nil {
		return nil, err
	}
	if err := p.loadCalls(ctx, s, calls); err != nil {
		return nil, err
	}
	return s, p.loadBatches(ctx, s, batches)
}

var (
	makeDay  = insert("days (day)", "ON CONFLICT (day) DO NOTHING", text)
	makeRun  = insert("runs (run, repo, budget, pause, created)", "ON CONFLICT (run) DO NOTHING", text, text, number, number, number)
	makeFork = insert("forks (run, fork, budget)", "ON CONFLICT (run, fork) DO NOTHING", text, number, number)

	findDay  = find("SELECT day, budget, spent, reserved FROM days", []string{"day"}, text)
	findRun  = find("SELECT run, repo, budget, pause, spent, reserved, created FROM runs", []string{"run"}, text)
	findFork = find("SELECT "+forkColumns+" FROM forks", []string{"run", "fork"}, text, number)
	findCall = find("SELECT id, state, reserved, cost FROM calls", []string{"id"}, number)
)

func (p *pen) loadDays(ctx context.Context, s *sheet, days map[string]bool) error {
	var keys [][]any
	for _, day := range slices.Sorted(maps.Keys(days)) {
		keys = append(keys, []any{day})
	}
	if err := p.put(ctx, makeDay, keys); err != nil {
		return err
	}
	return p.get(ctx, findDay, keys, func(r *sql.Rows) error {
		row := new(dayRow)
		err := r.Scan(&row.day, &row.budget, &row.spent, &row.reserved)
		s.days[row.day] = row
		return err
	})
}

func (p *pen) loadRuns(ctx context.Context, s *sheet, runs map[string]want) error {
	var keys, fresh [][]any
	for _, run := range slices.Sorted(maps.Keys(runs)) {
		keys = append(keys, []any{run})
		if w := runs[run]; w.create {
			fresh = append(fresh, []any{run, w.repo, int64(w.budget[0]), bit(w.pause), w.at})
		}
	}
	if err := p.put(ctx, makeRun, fresh); err != nil {
		return err
	}
	return p.get(ctx, findRun, keys, func(r *sql.Rows) error {
		row := new(runRow)
		var pause int
		err := r.Scan(&row.run, &row.repo, &row.budget, &pause, &row.spent, &row.reserved, &row.created)
		row.pause = pause != 0
		s.runs[row.run] = row
		return err
	})
}

func (p *pen) loadForks(ctx context.Context, s *sheet, forks map[forkKey]want) error {
	var keys, fresh [][]any
	for _, key := range slices.SortedFunc(maps.Keys(forks), forkKey.compare) {
		keys = append(keys, []any{key.run, int64(key.num)})
		if w := forks[key]; w.create {
			fresh = append(fresh, []any{key.run, int64(key.num), int64(w.budget[1])})
		}
	}
	if err := p.put(ctx, makeFork, fresh); err != nil {
		return err
	}
	return p.get(ctx, findFork, keys, func(r *sql.Rows) error {
		row, err := scanFork(r)
		s.forks[row.forkKey] = row
		return err
	})
}

const forkColumns = "run, fork, budget, spent, reserved, calls, input, output, cache_read, cache_write, refused, token_sha256, granted, held, short"

func scanFork(r *sql.Rows) (*forkRow, error) {
	row := new(forkRow)
	err := r.Scan(&row.run, &row.num, &row.budget, &row.spent, &row.reserved, &row.calls, &row.input, &row.output,
		&row.cacheRead, &row.cacheWrite, &row.refused, &row.token, &row.granted, &row.held, &row.short)
	return row, err
}

func (p *pen) loadCalls(ctx context.Context, s *sheet, calls map[int64]bool) error {
	var keys [][]any
	for _, id := range slices.Sorted(maps.Keys(calls)) {
		keys = append(keys, []any{id})
	}
	return p.get(ctx, findCall, keys, func(r *sql.Rows) error {
		row := new(callRow)
		err := r.Scan(&row.id, &row.state, &row.reserved, &row.cost)
		s.calls[row.id] = row
		return err
	})
}

func bit(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

var (
	saveDay  = update("days", []string{"budget", "spent", "reserved"}, []string{"day"}, number, number, number, text)
	saveRun  = update("runs", []string{"repo", "budget", "pause", "spent", "reserved"}, []string{"run"}, text, number, number, number, number, text)
	saveFork = update("forks", []string{
		"budget", "spent", "reserved", "calls", "input", "output", "cache_read", "cache_write", "refused", "held", "short",
	}, []string{"run", "fork"}, number, number, number, number, number, number, number, number, number, text, text, text, number)
	// By itself, for there is an index of it, which calls need not write anew.
	saveToken = update("forks", []string{"token_sha256", "granted"}, []string{"run", "fork"}, text, number, text, number)
	openCall  = insert("calls (id, owner, run, fork, day, model, path, prices, attempt, reserved, state, started)", "",
		number, number, text, number, text, text, text, text, number, number, text, number)
	closeCall = update("calls", []string{
		"model", "input", "cache_write_5m", "cache_write_1h", "cache_read", "output", "web_searches", "cost", "state", "status", "request_id", "note", "ended",
	}, []string{"id"}, text, number, number, number, number, number, number, number, text, number, text, text, number, number)
)

// save writes what the sheet has changed.
func (p *pen) save(ctx context.Context, s *sheet, owner int64) error {
	var days, runs, forks, tokens, opened, closed, joined, batches [][]any
	for _, day := range slices.Sorted(maps.Keys(s.changedDays)) {
		r := s.days[day]
		days = append(days, []any{int64(r.budget), int64(r.spent), int64(r.reserved), r.day})
	}
	for _, run := range slices.Sorted(maps.Keys(s.changedRuns)) {
		r := s.runs[run]
		runs = append(runs, []any{r.repo, int64(r.budget), bit(r.pause), int64(r.spent), int64(r.reserved), r.run})
	}
	for _, key := range slices.SortedFunc(maps.Keys(s.changedForks), forkKey.compare) {
		r := s.forks[key]
		forks = append(forks, []any{int64(r.budget), int64(r.spent), int64(r.reserved), r.calls, r.input, r.output,
			r.cacheRead, r.cacheWrite, r.refused, r.held, r.short, r.run, int64(r.num)})
	}
	for _, key := range slices.SortedFunc(maps.Keys(s.changedTokens), forkKey.compare) {
		r := s.forks[key]
		tokens = append(tokens, []any{r.token, r.granted, r.run, int64(r.num)})
	}
	for _, c := range s.opened {
		opened = append(opened, []any{c.id, owner, c.fork.run, int64(c.fork.num), c.day, c.request.Model, c.request.Path, c.request.Prices,
			int64(c.request.Attempt), int64(c.Reserved), inFlight, millis(c.started)})
	}
	for _, c := range s.closed {
		e := c.settlement
		closed = append(closed, []any{e.Model, e.Tokens.Input, e.Tokens.CacheWrite5m, e.Tokens.CacheWrite1h, e.Tokens.CacheRead,
			e.Tokens.Output, e.Tokens.WebSearches, int64(e.Cost), string(e.State), int64(e.Status), e.RequestID, e.Note, millis(e.ended), c.id})
	}
	for _, j := range s.joined {
		joined = append(joined, []any{j.batch, j.call})
	}
	for _, id := range slices.Sorted(maps.Keys(s.changedBatches)) {
		b := s.batches[id]
		batches = append(batches, []any{b.id, b.run, int64(b.num), int64(b.requests), b.state, bit(b.deleted), b.created, b.looked})
	}
	for _, each := range []struct {
		st   statement
		rows [][]any
	}{{saveDay, days}, {saveRun, runs}, {saveFork, forks}, {saveToken, tokens}, {openCall, opened}, {closeCall, closed}, {joinCall, joined}, {saveBatch, batches}} {
		if err := p.put(ctx, each.st, each.rows); err != nil {
			return err
		}
	}
	return nil
}
