package gateway

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func loadPrices(t testing.TB) *Prices {
	t.Helper()
	p, err := LoadPrices(nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The totals are those that Claude Code reported as total_cost_usd for runs
// with these usages, or the list price multiplied by hand.
func TestCostIsTheListPriceToTheLastNanoDollar(t *testing.T) {
	p := loadPrices(t)
	for _, c := range []struct {
		model string
		u     Tokens
		want  string
	}{
		{"claude-opus-5-5", Tokens{CacheRead: 37566, Output: 111}, "0.0097332"},
		{"opus", Tokens{CacheRead: 37566, Output: 111}, "0.0097332"},
		{"claude-sonnet-5-5", Tokens{Input: 1e6}, "2"},
		{"claude-sonnet-5-5", Tokens{CacheWrite5m: 1e6}, "2.5"},
		{"claude-sonnet-5-5", Tokens{CacheWrite1h: 1e6}, "4"},
		{"claude-sonnet-5-5", Tokens{CacheRead: 1e6}, "0.1"},
		{"claude-sonnet-5-5", Tokens{Output: 1e6}, "10"},
		{"claude-haiku-5-5", Tokens{Input: 100_000}, "0.01"},
		{"claude-haiku-5-5", Tokens{Input: 100_001}, "0.0500005"},
		{"claude-haiku-5-5", Tokens{Input: 1, CacheRead: 50_000, CacheWrite5m: 50_000, Output: 10}, "0.033775" + "5"},
		{"claude-haiku-5-5", Tokens{CacheRead: 50_000, CacheWrite5m: 50_000, Output: 10}, "0.006755"},
		{"claude-fable-5-2", Tokens{Input: 3, Output: 2, WebSearches: 2}, "0.020104"},
		{"claude-3-5-haiku-20241022", Tokens{Input: 1000, Output: 10}, "0.00084"},
		{"claude-opus-4-20250514", Tokens{Input: 1}, "0.000015"},
		{"nobody-knows", Tokens{Input: 1, CacheRead: 1, CacheWrite5m: 1, CacheWrite1h: 1, Output: 1}, "0.000152"},
	} {
		want, err := fork.ParseUSD(c.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Cost(c.model, c.u); got != want {
			t.Errorf("%s %+v: %s, want %s", c.model, c.u, got, want)
		}
	}
}

func TestAnotherVersionIsAnotherModel(t *testing.T) {
	p := loadPrices(t)
	for name, want := range map[string]string{
		"sonnet": "claude-sonnet-5-5", "opus": "claude-opus-5-5", "haiku": "claude-haiku-5-5", "fable": "claude-fable-5-2",
		"best": "claude-opus-5-5", "opusplan": "claude-opus-5-5", "opus[1m]": "claude-opus-5-5",
		"claude-sonnet-5-5-20261007": "claude-sonnet-5-5", "claude-sonnet-5-20260101": "claude-sonnet-5",
		"claude-sonnet-4-20250514": "claude-sonnet-4-0", "claude-sonnet-4-5-20250929[1m]": "claude-sonnet-4-5",
		"claude-sonnet-4-5@20250929": "claude-sonnet-4-5", "claude-3-7-sonnet-latest": "claude-3-7-sonnet",
		"claude-opus-5-7": "", "claude-opus-50": "", "claude-opus": "", "": "", "Sonnet": "", "claude-sonnet-5-5-2026100": "",
		"claude-sonnet-5-5-fast": "", "-20261007": "", "[1m]": "",
	} {
		got, ok := p.Resolve(name)
		if got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v; want %q", name, got, ok, want)
		}
	}
}

func TestUnknownModelIsPricedLikeTheDearest(t *testing.T) {
	p := loadPrices(t)
	for range 2000 {
		u := Tokens{Input: rand.Int64N(1e6), CacheWrite5m: rand.Int64N(1e6), CacheWrite1h: rand.Int64N(1e6), CacheRead: rand.Int64N(1e6),
			Output: rand.Int64N(1e6), WebSearches: rand.Int64N(9)}
		for _, m := range p.Models() {
			if known, unknown := p.Cost(m.ID, u), p.Cost("unknown", u); known > unknown {
				t.Fatalf("%s costs %s for %+v, an unknown model only %s", m.ID, known, u, unknown)
			}
		}
	}
}

func TestCostNeverWrapsAround(t *testing.T) {
	p := loadPrices(t)
	big := int64(math.MaxInt64)
	if got := p.Cost("opus", Tokens{Input: big, CacheWrite5m: big, CacheWrite1h: big, CacheRead: big, Output: big, WebSearches: big}); got != maxUSD {
		t.Errorf("%s", got)
	}
	if got := p.Cost("opus", Tokens{Input: -big, CacheWrite5m: -1, CacheWrite1h: -1, CacheRead: -1, Output: -1, WebSearches: -1}); got != 0 {
		t.Errorf("negative counts cost %s", got)
	}
}

func TestOverridePutsItsPricesOverTheList(t *testing.T) {
	p, err := LoadPrices(strings.NewReader(`{"version": "mine", "models": {
		"claude-sonnet-5-5": {"input": "1", "cache_write_5m": "1", "cache_write_1h": "1", "cache_read": "1", "output": "1"},
		"local-model": {"input": "0", "cache_write_5m": "0", "cache_write_1h": "0", "cache_read": "0", "output": "0"}},
		"aliases": {"sonnet": "local-model"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Cost("claude-sonnet-5-5", Tokens{Output: 1e6}); got != fork.Dollar {
		t.Errorf("overridden price %s", got)
	}
	if got := p.Cost("sonnet", Tokens{Output: 1e6}); got != 0 {
		t.Errorf("overridden alias costs %s", got)
	}
	if got := p.Cost("opus", Tokens{Output: 1e6}); got != 20*fork.Dollar {
		t.Errorf("what was not named costs %s", got)
	}
	if list := loadPrices(t).Version(); p.Version() != list+"+mine" {
		t.Errorf("version %q over %q", p.Version(), list)
	}
}

func TestTokensOfABatchCostTheirShareRoundedUp(t *testing.T) {
	p := loadPrices(t)
	if p.Batch().String() != "50 %" {
		t.Errorf("%s", p.Batch())
	}
	used := Tokens{Input: 3, CacheWrite5m: 5, CacheWrite1h: 7, CacheRead: 11, Output: 13, WebSearches: 2}
	// 3·2 + 5·2.5 + 7·4 + 11·0.1 + 13·10 = 177.6 millionths of a dollar
	if got, want := p.BatchCost("sonnet", used), 88_800+2*fork.Dollar/100; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	// A token written by haiku costs 125 billionths.
	if got := p.BatchCost("haiku", Tokens{CacheWrite5m: 1}); got != 63 {
		t.Errorf("%s", got)
	}
	if got := p.BatchCost("haiku", Tokens{Input: 200_000}); got != fork.Dollar*5/100 {
		t.Errorf("a long prompt costs %s", got)
	}
	big := int64(math.MaxInt64)
	if got := p.BatchCost("opus", Tokens{Input: big, Output: big, WebSearches: big}); got != maxUSD {
		t.Errorf("%s", got)
	}
	for share, want := range map[string]fork.USD{"1": fork.Dollar, "0.333333333": 333_333_333, "0.000000001": 1} {
		q, err := LoadPrices(strings.NewReader(`{"version": "mine", "batch": "` + share + `"}`))
		if err != nil {
			t.Fatal(err)
		}
		if got := q.BatchCost("sonnet", Tokens{Output: 100_000}); got != want {
			t.Errorf("%s: %s", share, got)
		}
		if got := q.Cost("sonnet", Tokens{Output: 100_000}); got != fork.Dollar {
			t.Errorf("%s: a call costs %s", share, got)
		}
	}
}

func TestMisspeltPriceIsNoPrice(t *testing.T) {
	model := func(fields string) string { return `{"version": "v", "models": {"m": {` + fields + `}}}` }
	const four = `"cache_write_5m": "1", "cache_write_1h": "1", "cache_read": "1", "output": "1"`
	for name, file := range map[string]string{
		"empty":               ``,
		"no version":          `{"models": {}}`,
		"unknown field":       `{"version": "v", "modles": {}}`,
		"unknown price":       model(`"inptu": "1", ` + four),
		"missing price":       model(four),
		"empty price":         model(`"input": "", ` + four),
		"negative price":      model(`"input": "-1", ` + four),
		"exponent":            model(`"input": "1e3", ` + four),
		"a number, no string": model(`"input": 1, ` + four),
		"too fine":            model(`"input": "0.0001", ` + four),
		"too dear":            model(`"input": "1000000", ` + four),
		"long without tier":   model(`"input": "1", "long_above": 5, ` + four),
		"tier without long":   model(`"input": "1", "long": {"input": "1", ` + four + `}, ` + four),
		"tier half priced":    model(`"input": "1", "long_above": 5, "long": {"input": "1"}, ` + four),
		"alias of nothing":    `{"version": "v", "aliases": {"x": "y"}}`,
		"alias is a model":    `{"version": "v", "aliases": {"claude-opus-5-5": "claude-opus-5"}}`,
		"batches for free":    `{"version": "v", "batch": "0"}`,
		"batches dearer":      `{"version": "v", "batch": "1.01"}`,
		"batches in percent":  `{"version": "v", "batch": "50%"}`,
		"batches in dollars":  `{"version": "v", "batch": "$0.5"}`,
		"batches less":        `{"version": "v", "batch": "-0.5"}`,
		"two tables":          `{"version": "v"} {"version": "v"}`,
		"endless":             `{"version": "` + strings.Repeat("v", maxPricesFile) + `"}`,
	} {
		if _, err := LoadPrices(strings.NewReader(file)); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestModelsCannotBeChangedFromOutside(t *testing.T) {
	p := loadPrices(t)
	list := p.Models()
	for i := range list {
		list[i].Rate = Rate{}
		list[i].Aliases = append(list[i].Aliases[:0], "x")
		if list[i].Long != nil {
			*list[i].Long = Rate{}
		}
	}
	if p.Cost("haiku", Tokens{Input: 200_000}) == 0 {
		t.Error("the long tier was changed through a copy")
	}
	for _, m := range p.Models() {
		if m.Rate.Input == 0 || m.Rate.CacheRead > m.Rate.Input || m.Rate.Output < m.Rate.Input || m.Rate.CacheWrite1h < m.Rate.CacheWrite5m {
			t.Errorf("%s has odd prices: %+v", m.ID, m.Rate)
		}
	}
}
