package fork

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// USD is an amount of money in nano-dollars, so that sums are exact. In JSON
// it is a plain number of dollars.
type USD int64

// Dollar is one dollar.
const Dollar USD = 1_000_000_000

// ParseUSD reads a decimal number of dollars, such as "10" or "0.25". More
// than nine decimals, exponents, signs, NaN and infinities are refused.
func ParseUSD(s string) (USD, error) {
	whole, frac, _ := strings.Cut(strings.TrimPrefix(s, "$"), ".")
	if whole == "" {
		whole = "0"
	}
	if len(frac) > 9 || strings.Trim(whole+frac, "0123456789") != "" || s == "" || s == "." {
		return 0, fmt.Errorf("%q is not an amount of dollars", s)
	}
	w, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || w > math.MaxInt64/int64(Dollar)-1 {
		return 0, fmt.Errorf("%q is too many dollars", s)
	}
	n, _ := strconv.ParseInt(frac+strings.Repeat("0", 9-len(frac)), 10, 64)
	return USD(w)*Dollar + USD(n), nil
}

// Float returns the amount in dollars, for metrics and humans.
func (u USD) Float() float64 { return float64(u) / float64(Dollar) }

// String returns the amount with a dollar sign and four decimals at least.
func (u USD) String() string {
	s := u.decimal()
	if i := strings.IndexByte(s, '.'); i < 0 {
		s += ".0000"
	} else if n := len(s) - i - 1; n < 4 {
		s += strings.Repeat("0", 4-n)
	}
	if rest, ok := strings.CutPrefix(s, "-"); ok {
		return "-$" + rest
	}
	return "$" + s
}

func (u USD) decimal() string {
	sign, n := "", uint64(u)
	if u < 0 {
		sign, n = "-", -uint64(u)
	}
	s := sign + strconv.FormatUint(n/uint64(Dollar), 10)
	if frac := n % uint64(Dollar); frac > 0 {
		s += "." + strings.TrimRight(fmt.Sprintf("%09d", frac), "0")
	}
	return s
}

// MarshalJSON writes the amount as a JSON number of dollars, exactly.
func (u USD) MarshalJSON() ([]byte, error) { return []byte(u.decimal()), nil }

// UnmarshalJSON reads a JSON number of dollars, rounded to nano-dollars.
func (u *USD) UnmarshalJSON(b []byte) error {
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || math.IsNaN(f) || math.Abs(f) > 9e9 {
		return fmt.Errorf("%q is not an amount of dollars", b)
	}
	if exact, err := ParseUSD(string(b)); err == nil {
		*u = exact
		return nil
	}
	*u = USD(math.Round(f * float64(Dollar)))
	return nil
}
