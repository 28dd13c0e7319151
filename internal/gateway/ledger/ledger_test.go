package ledger

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

func TestLedgerIsTheSameAfterItWasClosed(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Repo: "repo", Fork: 1, RunBudget: 1000, ForkBudget: 500})
		h2 := grant(t, l, Account{Run: "r", Repo: "repo", Fork: 2, RunBudget: 1000})
		c := reserve(t, l, request("r", 1, ask(300)))
		c.Settle(Settlement{State: Settled, Cost: 200, Tokens: Tokens{Input: 1, CacheWrite5m: 2, CacheWrite1h: 3, CacheRead: 4, Output: 5, WebSearches: 6}})
		if _, err := l.Reserve(t.Context(), request("r", 1, ask(301))); !errors.As(err, new(Shortage)) {
			t.Errorf("%v", err)
		}
		want := []Spent{usage(t, l, "r", 0), usage(t, l, "r", 1), usage(t, l, "r", 2)}
		if diff := cmp.Diff(Spent{Usage: fork.Usage{Cost: 200, InputTokens: 1, OutputTokens: 5, CacheReadTokens: 4, CacheWriteTokens: 5}, Calls: 1, Refused: 1, Short: "fork"}, want[0]); diff != "" {
			t.Error(diff)
		}
		for range 2 {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		}
		for _, err := range []error{l.Grant(t.Context(), Account{Run: "r", Fork: 1}, token), l.Revoke(t.Context(), "r", 1), l.SetBudget(t.Context(), "r", 0, 1)} {
			if fault.KindOf(err) != fault.Unavailable {
				t.Errorf("a closed ledger says %v", err)
			}
		}
		if _, err := l.Reserve(t.Context(), request("r", 1, ask(1))); fault.KindOf(err) != fault.Unavailable {
			t.Errorf("a closed ledger says %v", err)
		}

		l = open(t, o)
		for i, w := range want {
			if diff := cmp.Diff(w, usage(t, l, "r", i)); diff != "" {
				t.Errorf("fork %d: %s", i, diff)
			}
		}
		if run, num, err := l.Holder(t.Context(), h2); run != "r" || num != 2 || err != nil {
			t.Errorf("%s/%d %v", run, num, err)
		}
		// The budgets are the old ones: a later grant does not change them.
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 1_000_000, ForkBudget: 1_000_000})
		var short Shortage
		if _, err := l.Reserve(t.Context(), request("r", 1, ask(301))); !errors.As(err, &short) || short != (Shortage{"fork", "fork r/1", 500, 300, 301}) {
			t.Errorf("%v", err)
		}
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestBudgetsLieInOneAnother(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		o.DayBudget = 1000
		l := open(t, o)
		day := time.Date(2026, 11, 23, 23, 59, 0, 0, time.UTC)
		l.now = func() time.Time { return day }
		grant(t, l, Account{Run: "r", Fork: 1, RunBudget: 800, ForkBudget: 300})
		grant(t, l, Account{Run: "r", Fork: 2, RunBudget: 800, ForkBudget: 600})
		grant(t, l, Account{Run: "s", Fork: 1})
		short := func(run string, num int, amount fork.USD, want string) {
			t.Helper()
			_, err := l.Reserve(t.Context(), request(run, num, ask(amount)))
			if err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
		}
		spend := func(run string, num int, amount fork.USD) {
			t.Helper()
			if !reserve(t, l, request(run, num, ask(amount))).Settle(Settlement{State: Settled, Cost: amount}) {
				t.Error("not settled")
			}
		}
		short("r", 1, 301, "The budget of fork r/1 does not cover this call: $0.0000003 of $0.0000003 is left, and the call may cost $0.000000301.")
		spend("r", 1, 300)
		spend("r", 2, 400)
		short("r", 2, 101, "The budget of run r does not cover this call: $0.0000001 of $0.0000008 is left, and the call may cost $0.000000101.")
		spend("s", 1, 250)
		short("r", 2, 60, "The budget of 2026-11-23 (UTC) does not cover this call: $0.00000005 of $0.000001 is left, and the call may cost $0.00000006.")
		late := reserve(t, l, request("s", 1, ask(50)))
		day = day.Add(time.Hour)
		spend("s", 1, 900)
		// What was reserved yesterday is yesterday's.
		late.Settle(Settlement{State: Settled, Cost: 50})
		spend("r", 2, 100)
		short("s", 1, 1, "The budget of 2026-11-24 (UTC) does not cover this call: $0.0000 of $0.000001 is left, and the call may cost $0.000000001.")
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestGrantRefusesAccountsThatCannotBe(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		for _, a := range []Account{{}, {Run: "r"}, {Fork: 1}, {Run: "r", Fork: -1}, {Run: "r", Fork: 1, RunBudget: -1}, {Run: "r", Fork: 1, ForkBudget: -1}, {Run: "r\x00", Fork: 1}} {
			if err := l.Grant(t.Context(), a, token); fault.KindOf(err) != fault.Invalid {
				t.Errorf("%+v: %v", a, err)
			}
		}
		if _, _, err := l.Holder(t.Context(), token); fault.KindOf(err) != fault.NotFound {
			t.Error(err)
		}
		if err := l.SetBudget(t.Context(), "r", 0, -1); fault.KindOf(err) != fault.Invalid {
			t.Error(err)
		}
	})
}

func TestTokenIsGoodUntilTheNextOneOrItsEnd(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		old := grant(t, l, Account{Run: "r", Fork: 1})
		fresh := HashOf("fresh")
		if err := l.Grant(t.Context(), Account{Run: "r", Fork: 1}, fresh); err != nil {
			t.Fatal(err)
		}
		r := request("r", 1, ask(1))
		for _, c := range []struct {
			token Hash
			want  error
		}{{old, ErrRevoked}, {fresh, nil}, {Hash{}, ErrRevoked}} {
			r.Token = c.token
			if _, err := l.Reserve(t.Context(), r); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		}
		for range 2 {
			if err := l.Revoke(t.Context(), "r", 1); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Revoke(t.Context(), "nobody", 7); err != nil {
			t.Error(err)
		}
		r.Token = fresh
		if _, err := l.Reserve(t.Context(), r); !errors.Is(err, ErrRevoked) {
			t.Error(err)
		}
		// An empty column is nobody's token.
		r.Token = Hash{}
		if _, err := l.Reserve(t.Context(), r); !errors.Is(err, ErrRevoked) {
			t.Error(err)
		}
	})
}

// What strangers write into the books can be anything.
func TestHostileTextsAreWritten(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Repo: "\x00\xff" + strings.Repeat("é", 500), Fork: 1})
		r := request("r", 1, ask(1))
		r.Model, r.Path, r.Prices = "a\x00b\xffc", strings.Repeat("é", 150), "'; DROP TABLE calls; --"
		c := reserve(t, l, r)
		c.Settle(Settlement{State: Settled, Model: "\xe2\x82", RequestID: "\x00", Note: strings.Repeat("\u2028", 300), Cost: -5})
		if got := usage(t, l, "r", 1); got.Calls != 1 || got.Cost != 0 {
			t.Errorf("%+v", got)
		}
	})
}

func TestHugeCallIsRefused(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		grant(t, l, Account{Run: "r", Fork: 1})
		for _, a := range []Ask{{Fixed: 1 << 62}, {PerToken: 1 << 40, Want: 1 << 40}, {Fixed: -1}, {PerToken: -1}, {Want: -1}} {
			if _, err := l.Reserve(t.Context(), request("r", 1, a)); fault.KindOf(err) != fault.Invalid {
				t.Errorf("%+v: %v", a, err)
			}
		}
		// A cost beyond belief does not spoil the sums.
		for range 5 {
			reserve(t, l, request("r", 1, ask(1))).Settle(Settlement{State: Settled, Cost: 1 << 61})
		}
		if got := usage(t, l, "r", 1); got.Cost != most {
			t.Errorf("%d", got.Cost)
		}
	})
}

func TestOneGatewayAtATimeInAFolder(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		_, err := Open(t.Context(), o)
		if fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
			t.Errorf("%v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		open(t, o)
	})
}

func TestOpenRefusesWhatCannotBe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("not a folder"), 0o600); err != nil {
		t.Fatal(err)
	}
	garbage := t.TempDir()
	if err := os.WriteFile(filepath.Join(garbage, "ledger.db"), []byte(strings.Repeat("this is no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    Options
		kind fault.Kind
	}{
		"no folder":          {Options{}, fault.Invalid},
		"a negative budget":  {Options{Dir: t.TempDir(), DayBudget: -1}, fault.Invalid},
		"a file":             {Options{Dir: file}, fault.Invalid},
		"no database":        {Options{Dir: garbage}, fault.Invalid},
		"no URL":             {Options{Dir: t.TempDir(), URL: "postgres://user:secret@:port"}, fault.Invalid},
		"a server not there": {Options{Dir: t.TempDir(), URL: "postgres://user:secret@/db?host=" + t.TempDir()}, fault.Unavailable},
	} {
		l, err := Open(t.Context(), c.o)
		if fault.KindOf(err) != c.kind || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: kind %s, %v", name, fault.KindOf(err), err)
		}
		if l != nil {
			t.Errorf("%s: there is a ledger", name)
		}
	}
	everywhere(t, func(t *testing.T, o Options) {
		l := open(t, o)
		if _, err := l.store.read.Exec(`PRAGMA query_only(0)`); err != nil && o.URL == "" {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		s := open2(t, o)
		if _, err := s.write.Exec(`INSERT INTO ` + s.versions + ` (version_id, is_applied) VALUES (999, true)`); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), o); fault.KindOf(err) != fault.Unsupported {
			t.Errorf("a newer version: %v", err)
		}
		if _, err := OpenReader(t.Context(), o); fault.KindOf(err) != fault.Unsupported {
			t.Errorf("a newer version: %v", err)
		}
	})
	t.Run("no such database", func(t *testing.T) {
		url := strings.Replace(ledgertest.Postgres(t), "@/ledger", "@/nothing", 1)
		if _, err := Open(t.Context(), Options{Dir: t.TempDir(), URL: url}); fault.KindOf(err) != fault.Invalid || fault.HintOf(err) == "" {
			t.Error(err)
		}
	})
}

func TestFilesAreForTheirOwnerOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "ledger with space?&#%")
	l := open(t, Options{Dir: dir})
	grant(t, l, Account{Run: "r", Fork: 1})
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "ledger.db")); err != nil {
		t.Error(err)
	}
}

// A ledger that the first version of the program has written is taken over as
// it is: sums, budgets, tokens, and what was in flight.
func TestLedgerOfTheFirstVersionIsUpgraded(t *testing.T) {
	o := Options{Dir: t.TempDir()}
	s, err := openSQLite(t.Context(), o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.provider(s.write)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.UpTo(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	good, bad := HashOf("good"), HashOf("bad")
	ended := time.Date(2026, 10, 1, 12, 0, 0, 0, time.UTC).UnixMilli()
	for _, st := range []struct {
		text string
		args []any
	}{
		{`INSERT INTO grants (token_sha256, run, fork, run_budget, fork_budget, refused, created, revoked) VALUES (?, 'r', 1, 5, 0, 2, 10, 20)`, []any{bad[:]}},
		{`INSERT INTO grants (token_sha256, run, fork, run_budget, fork_budget, refused, created) VALUES (?, 'r', 1, 10000, 4000, 1, 20)`, []any{good[:]}},
		{`INSERT INTO grants (token_sha256, run, fork, run_budget, fork_budget, created, revoked) VALUES (x'00', 'r', 2, 10000, 0, 30, 40)`, nil},
		{`INSERT INTO calls (id, run, fork, model, path, prices, attempt, input, output, cache_read, cache_write_5m, cache_write_1h, reserved, cost, state, status, started, ended)
			VALUES (1, 'r', 1, 'm', '/', 'p', 0, 1, 2, 3, 4, 5, 900, 700, 'settled', 200, ?, ?)`, []any{ended, ended}},
		{`INSERT INTO calls (id, run, fork, model, path, prices, attempt, reserved, state, started) VALUES (2, 'r', 1, 'm', '/', 'p', 0, 300, 'in_flight', ?)`, []any{ended}},
		{`INSERT INTO calls (id, run, fork, model, path, prices, attempt, reserved, cost, state, started, ended) VALUES (3, 'r', 2, 'm', '/', 'p', 0, 60, 60, 'crashed', ?, ?)`, []any{ended, ended}},
	} {
		if _, err := s.write.Exec(st.text, st.args...); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenReader(t.Context(), o); fault.KindOf(err) != fault.Unsupported || fault.HintOf(err) == "" {
		t.Errorf("a reader upgraded it, or read it: %v", err)
	}

	l := open(t, o)
	want := Spent{Usage: fork.Usage{Cost: 1000, InputTokens: 1, OutputTokens: 2, CacheReadTokens: 3, CacheWriteTokens: 9}, Calls: 2, Refused: 3}
	if diff := cmp.Diff(want, usage(t, l, "r", 1)); diff != "" {
		t.Error(diff)
	}
	if got := usage(t, l, "r", 0); got.Cost != 1060 || got.Calls != 3 {
		t.Errorf("%+v", got)
	}
	if run, num, err := l.Holder(t.Context(), good); run != "r" || num != 1 || err != nil {
		t.Errorf("%s/%d, %v", run, num, err)
	}
	for _, h := range []Hash{bad, {}} {
		if _, _, err := l.Holder(t.Context(), h); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%s: %v", hex.EncodeToString(h[:]), err)
		}
	}
	r := request("r", 1, ask(3001))
	r.Token = good
	var short Shortage
	if _, err := l.Reserve(t.Context(), r); !errors.As(err, &short) || short.Budget != 4000 || short.Left != 3000 {
		t.Errorf("%v", err)
	}
	r.Ask = ask(3000)
	c := reserve(t, l, r)
	c.Settle(Settlement{State: Settled, Cost: 3000})
	if err := l.Check(t.Context()); err != nil {
		t.Error(err)
	}
	var day, note string
	if err := l.store.read.QueryRow(`SELECT day, note FROM calls WHERE id = 2 AND state = 'crashed' AND cost = 300`).Scan(&day, &note); err != nil || day != "2026-10-01" || !strings.Contains(note, "died") {
		t.Errorf("%q %q %v", day, note, err)
	}
}

// A ledger of the version before there were batches is taken over in both
// databases.
func TestLedgerOfTheSecondVersionIsUpgraded(t *testing.T) {
	everywhere(t, func(t *testing.T, o Options) {
		s := open2(t, o)
		p, err := s.provider(s.write)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.UpTo(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{
			`INSERT INTO days (day, spent, reserved) VALUES ('2026-11-01', 70, 30)`,
			`INSERT INTO runs (run, budget, spent, reserved, created) VALUES ('r', 1000, 70, 30, 1)`,
			`INSERT INTO forks (run, fork, spent, reserved, calls, token_sha256) VALUES ('r', 1, 70, 30, 1, '` + HashOf("r/1").text() + `')`,
			`INSERT INTO calls (id, owner, run, fork, day, model, path, prices, attempt, reserved, cost, state, started) VALUES (1, 0, 'r', 1, '2026-11-01', 'm', '/', 'p', 0, 90, 70, 'settled', 1)`,
			`INSERT INTO calls (id, owner, run, fork, day, model, path, prices, attempt, reserved, state, started) VALUES (2, 0, 'r', 1, '2026-11-01', 'm', '/', 'p', 0, 30, 'in_flight', 1)`,
		} {
			if _, err := s.write.Exec(text); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
		l := open(t, o)
		if got := usage(t, l, "r", 1); got.Cost != 100 || got.Pending != 0 || got.Calls != 2 {
			t.Errorf("%+v", got)
		}
		accept(t, reserveBatch(t, l, "r", 1, twoModels...), "batch-1")
		if got := usage(t, l, "r", 0); got.Cost != 600 || got.Pending != 500 {
			t.Errorf("%+v", got)
		}
		if err := l.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// fill makes the database behave as on a disk that has room for so many pages.
func fill(t *testing.T, l *Ledger, pages int) {
	t.Helper()
	err := l.do(t.Context(), want{}, func(*sheet) { // in the writer's goroutine
		l.store.begin = []string{fmt.Sprintf("PRAGMA max_page_count = %d", pages), "BEGIN IMMEDIATE"}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestFullDiskStopsReservations(t *testing.T) {
	l := open(t, Options{Dir: t.TempDir()})
	grant(t, l, Account{Run: "r", Fork: 1, RunBudget: fork.Dollar})
	kept := reserve(t, l, request("r", 1, ask(100)))
	fill(t, l, 1)
	var err error
	for range 1000 { // until the last page is full
		var c *Call
		if c, err = l.Reserve(t.Context(), request("r", 1, ask(1))); err != nil {
			break
		}
		c.Settle(Settlement{State: Settled, Cost: 1})
	}
	if fault.KindOf(err) != fault.Full || fault.HintOf(err) == "" {
		t.Fatal(err)
	}
	for n := 1; ; n++ {
		err := l.Grant(t.Context(), Account{Run: strings.Repeat("r", 190), Fork: n}, HashOf(fmt.Sprint(n)))
		if fault.KindOf(err) == fault.Full {
			break
		}
		if err != nil || n > 1000 {
			t.Fatalf("grant: %v", err)
		}
	}
	kept.Settle(Settlement{State: Settled, Cost: 50, Note: strings.Repeat("x", 200)})
	fill(t, l, 1_000_000)
	until(t, "there is room", func() bool {
		c, err := l.Reserve(context.Background(), request("r", 1, ask(1)))
		if err == nil {
			c.Settle(Settlement{State: Failed})
		}
		return err == nil
	})
	if err := l.Check(t.Context()); err != nil {
		t.Error(err)
	}
	var cost int
	if err := l.store.read.QueryRow(`SELECT cost FROM calls WHERE id = $1`, kept.ID()).Scan(&cost); err != nil || cost != 50 {
		t.Errorf("%d %v", cost, err)
	}
}

func TestEveryMigrationHasATwin(t *testing.T) {
	versions := func(s *store) []int64 {
		db, err := sql.Open("sqlite", ":memory:")
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		s.alone = true // no locker is needed to list
		p, err := s.provider(db)
		if err != nil {
			t.Fatal(err)
		}
		var all []int64
		for _, source := range p.ListSources() {
			all = append(all, source.Version)
		}
		return all
	}
	lite, pg := versions(sqliteStore()), versions(postgresStore())
	if diff := cmp.Diff(lite[1:], pg); diff != "" || lite[0] != 1 {
		t.Errorf("PostgreSQL began with version 2: %s", diff)
	}
}
