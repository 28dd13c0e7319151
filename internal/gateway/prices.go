package gateway

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// The list prices that this version was built with. They change with dates, so
// the file carries one and users can override it.
//
//go:embed prices.json
var listPrices []byte

// Tokens is what one call used, by price class.
type Tokens = ledger.Tokens

// A Rate is a price list, in dollars per million tokens.
type Rate struct {
	Input        fork.USD `json:"input"`
	CacheWrite5m fork.USD `json:"cache_write_5m"`
	CacheWrite1h fork.USD `json:"cache_write_1h"`
	CacheRead    fork.USD `json:"cache_read"`
	Output       fork.USD `json:"output"`
}

// A Model is what one model costs.
type Model struct {
	ID        string   `json:"id"`
	Aliases   []string `json:"aliases,omitempty"` // sorted
	Rate      Rate     `json:"rate"`
	LongAbove int64    `json:"long_above,omitempty"` // prompt tokens above which Long applies; 0: never
	Long      *Rate    `json:"long,omitempty"`
}

// rate is the one for a prompt of that many tokens.
func (m *Model) rate(prompt int64) *Rate {
	if m.Long != nil && prompt > m.LongAbove {
		return m.Long
	}
	return &m.Rate
}

// Prices is a price table. It never changes once it was loaded.
type Prices struct {
	version   string
	webSearch fork.USD // for one request
	batch     Share    // of the price of tokens, for those of a message batch
	models    map[string]*Model
	aliases   map[string]string
	dearest   *Model
}

// pricesFile is the data file. Prices are decimal strings, so that no float is
// between what a person wrote and what is charged.
type pricesFile struct {
	Version   string               `json:"version"`
	Source    string               `json:"source"`
	WebSearch string               `json:"web_search"`
	Batch     string               `json:"batch"`
	Models    map[string]modelFile `json:"models"`
	Aliases   map[string]string    `json:"aliases"`
}

type modelFile struct {
	rateFile
	LongAbove int64     `json:"long_above"`
	Long      *rateFile `json:"long"`
}

type rateFile struct {
	Input        string `json:"input"`
	CacheWrite5m string `json:"cache_write_5m"`
	CacheWrite1h string `json:"cache_write_1h"`
	CacheRead    string `json:"cache_read"`
	Output       string `json:"output"`
}

// maxPricesFile bounds an override, in bytes.
const maxPricesFile = 1 << 20

// LoadPrices returns the embedded prices, with those of override put over them
// when it is not nil: a model or an alias that override names replaces the
// embedded one whole, the others stay. An unknown field, a price that is
// missing, negative or finer than a nano-dollar a token, a share for batches that
// is not above 0 and at most 1, and an alias of nothing are errors of kind
// Invalid: a misspelt price is no price.
func LoadPrices(override io.Reader) (*Prices, error) {
	const op = "load prices"
	p := &Prices{models: make(map[string]*Model), aliases: make(map[string]string)}
	if err := p.merge(listPrices); err != nil {
		return nil, fault.New(op, fault.Internal, "embedded table: %w", err)
	}
	if override != nil {
		b, err := io.ReadAll(io.LimitReader(override, maxPricesFile+1))
		if err != nil {
			return nil, fault.New(op, fault.Invalid, "read: %w", err)
		}
		if len(b) > maxPricesFile {
			return nil, fault.New(op, fault.Invalid, "the file is larger than %d bytes", maxPricesFile)
		}
		if err := p.merge(b); err != nil {
			return nil, fault.New(op, fault.Invalid, "%w", err).
				Hinted(`Prices are strings of dollars per million tokens, such as "input": "2.50"; a model needs all five of them.`)
		}
	}
	if err := p.finish(); err != nil {
		return nil, fault.New(op, fault.Invalid, "%w", err)
	}
	return p, nil
}

func (p *Prices) merge(b []byte) error {
	var f pricesFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("something follows the table")
	}
	if f.Version == "" {
		return fmt.Errorf("the table has no version")
	}
	if p.version != "" {
		p.version += "+"
	}
	p.version += f.Version
	if f.WebSearch != "" {
		v, err := fork.ParseUSD(f.WebSearch)
		if err != nil {
			return fmt.Errorf("web_search: %w", err)
		}
		p.webSearch = v
	}
	if f.Batch != "" {
		v, err := fork.ParseUSD(f.Batch)
		if err != nil || v <= 0 || v > fork.Dollar || f.Batch[0] == '$' {
			return fmt.Errorf("batch: %q is no share: it is more than 0 and at most 1", f.Batch)
		}
		p.batch = Share(v)
	}
	for id, m := range f.Models {
		if id == "" {
			return fmt.Errorf("a model has no name")
		}
		rate, err := m.rate()
		if err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		model := &Model{ID: id, Rate: rate, LongAbove: m.LongAbove}
		if m.LongAbove < 0 || (m.LongAbove > 0) != (m.Long != nil) {
			return fmt.Errorf("%s: long_above and long go together", id)
		}
		if m.Long != nil {
			long, err := m.Long.rate()
			if err != nil {
				return fmt.Errorf("%s: long: %w", id, err)
			}
			model.Long = &long
		}
		p.models[id] = model
		delete(p.aliases, id)
	}
	for alias, id := range f.Aliases {
		if _, ok := p.models[alias]; ok || alias == "" {
			return fmt.Errorf("alias %q is a model's own name", alias)
		}
		p.aliases[alias] = id
	}
	return nil
}

func (r rateFile) rate() (rate Rate, err error) {
	for _, f := range []struct {
		name, text string
		to         *fork.USD
	}{
		{"input", r.Input, &rate.Input},
		{"cache_write_5m", r.CacheWrite5m, &rate.CacheWrite5m},
		{"cache_write_1h", r.CacheWrite1h, &rate.CacheWrite1h},
		{"cache_read", r.CacheRead, &rate.CacheRead},
		{"output", r.Output, &rate.Output},
	} {
		v, err := fork.ParseUSD(f.text)
		switch {
		case f.text == "":
			return rate, fmt.Errorf("no price for %s", f.name)
		case err != nil:
			return rate, fmt.Errorf("%s: %w", f.name, err)
		case v%perMillion != 0:
			return rate, fmt.Errorf("%s: %q is finer than a nano-dollar a token", f.name, f.text)
		case v > maxRate:
			return rate, fmt.Errorf("%s: %q is more than %s per million tokens", f.name, f.text, maxRate)
		}
		*f.to = v
	}
	return rate, nil
}

const (
	perMillion = 1_000_000
	maxRate    = 100_000 * fork.Dollar
)

// A Share is a part of a price, in thousand millionths.
type Share int64

const wholePrice = Share(fork.Dollar)

// String is the share in percent, as "50 %".
func (s Share) String() string {
	whole, part, _ := strings.Cut(fork.USD(s * 100).String()[1:], ".")
	if part = strings.TrimRight(part, "0"); part != "" {
		whole += "." + part
	}
	return whole + " %"
}

// MarshalJSON writes the share as a number, as 0.5.
func (s Share) MarshalJSON() ([]byte, error) { return fork.USD(s).MarshalJSON() }

// of returns the share of an amount, rounded up.
func (s Share) of(u fork.USD) fork.USD {
	if u <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(u), uint64(s))
	lo, carry := bits.Add64(lo, uint64(wholePrice)-1, 0)
	quo, _ := bits.Div64(hi+carry, lo, uint64(wholePrice)) // hi is less: no share is more than the whole
	return fork.USD(quo)
}

// finish checks the aliases and finds the dearest model.
func (p *Prices) finish() error {
	p.dearest = &Model{}
	for _, m := range p.models {
		m.Aliases = nil
		for _, r := range []*Rate{&m.Rate, m.Long} {
			if r != nil {
				p.dearest.Rate = p.dearest.Rate.max(r)
			}
		}
	}
	for _, alias := range slices.Sorted(maps.Keys(p.aliases)) {
		m, ok := p.models[p.aliases[alias]]
		if !ok {
			return fmt.Errorf("alias %q stands for %q, which has no price", alias, p.aliases[alias])
		}
		m.Aliases = append(m.Aliases, alias)
	}
	return nil
}

func (r Rate) max(s *Rate) Rate {
	return Rate{
		Input:        max(r.Input, s.Input),
		CacheWrite5m: max(r.CacheWrite5m, s.CacheWrite5m),
		CacheWrite1h: max(r.CacheWrite1h, s.CacheWrite1h),
		CacheRead:    max(r.CacheRead, s.CacheRead),
		Output:       max(r.Output, s.Output),
	}
}

// write is the dearest way in which a token of the prompt can be billed.
func (r *Rate) write(hour bool) fork.USD {
	w := max(r.Input, r.CacheWrite5m, r.CacheRead)
	if hour {
		w = max(w, r.CacheWrite1h)
	}
	return w
}

// Version names the table: the embedded one's date, and after a "+" what an
// override calls itself.
func (p *Prices) Version() string { return p.version }

// Models lists the table by name, as a copy.
func (p *Prices) Models() []Model {
	list := make([]Model, 0, len(p.models))
	for _, id := range slices.Sorted(maps.Keys(p.models)) {
		m := *p.models[id]
		m.Aliases = slices.Clone(m.Aliases)
		if m.Long != nil {
			long := *m.Long
			m.Long = &long
		}
		list = append(list, m)
	}
	return list
}

// WebSearch is the price of one web search by the API.
func (p *Prices) WebSearch() fork.USD { return p.webSearch }

// Batch is what tokens of a message batch cost, of what they cost elsewhere. What
// the API's tools cost is the same in a batch.
func (p *Prices) Batch() Share { return p.batch }

// Resolve returns the name under which the table prices model, which may be an
// alias ("sonnet") or a full id with a date or a variant behind it
// ("claude-sonnet-5-5-20261007", "opus[1m]"). The longest name that fits wins.
// Another version is another model: "claude-opus-5-7" is not "claude-opus-5".
func (p *Prices) Resolve(model string) (canonical string, ok bool) {
	name := model
	for {
		if _, ok := p.models[name]; ok {
			return name, true
		}
		if id, ok := p.aliases[name]; ok {
			return id, true
		}
		if name, ok = trimVariant(name); !ok {
			return "", false
		}
	}
}

// trimVariant takes one suffix off that does not change the price.
func trimVariant(name string) (string, bool) {
	if s, ok := strings.CutSuffix(name, "[1m]"); ok {
		return s, true
	}
	if s, ok := strings.CutSuffix(name, "-latest"); ok {
		return s, true
	}
	if i := len(name) - len("-2026-10-07"); i > 0 && isDate(name[i:]) {
		return name[:i], true
	}
	const date = len("-20261007")
	i := len(name) - date
	if i <= 0 || name[i] != '-' && name[i] != '@' || strings.Trim(name[i+1:], "0123456789") != "" {
		return "", false
	}
	return name[:i], true
}

// isDate accepts "-2026-10-07".
func isDate(s string) bool {
	_, err := time.Parse("-2006-01-02", s)
	return err == nil
}

// lookup returns the prices of model, or the dearest ones.
func (p *Prices) lookup(model string) (m *Model, known bool) {
	if id, ok := p.Resolve(model); ok {
		return p.models[id], true
	}
	return p.dearest, false
}

// pace names the limit that calls to the model share. Models that nobody knows
// share one, so that an agent cannot make up any number of them.
func (p *Prices) pace(model string) string {
	id, _ := p.Resolve(model)
	return id
}

// Cost returns what u costs with model. A model that is not in the table is
// priced like the dearest, class by class, so that a budget fails safe.
// Negative counts count as none, and a sum that no int64 holds is the greatest
// amount there is.
func (p *Prices) Cost(model string, u Tokens) fork.USD {
	return plus(p.tokens(model, u), times(u.WebSearches, p.webSearch))
}

// BatchCost is Cost of a request in a message batch.
func (p *Prices) BatchCost(model string, u Tokens) fork.USD {
	return plus(p.batch.of(p.tokens(model, u)), times(u.WebSearches, p.webSearch))
}

// tokens is what the tokens of u cost.
func (p *Prices) tokens(model string, u Tokens) fork.USD {
	m, _ := p.lookup(model)
	r := m.rate(u.Prompt())
	var sum fork.USD
	for _, c := range []struct {
		n    int64
		rate fork.USD
	}{
		{u.Input, r.Input},
		{u.CacheWrite5m, r.CacheWrite5m},
		{u.CacheWrite1h, r.CacheWrite1h},
		{u.CacheRead, r.CacheRead},
		{u.Output, r.Output},
	} {
		sum = plus(sum, times(c.n, c.rate/perMillion))
	}
	return sum
}

// maxUSD is far above any bill, and low enough for a sum of many.
const maxUSD fork.USD = 1 << 56

// times and plus stop at maxUSD instead of wrapping around.
func times(n int64, price fork.USD) fork.USD {
	if n <= 0 || price <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(price))
	if hi != 0 || lo > uint64(maxUSD) {
		return maxUSD
	}
	return fork.USD(lo)
}

func plus(a, b fork.USD) fork.USD { return min(a+b, maxUSD) }
