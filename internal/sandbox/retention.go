package sandbox

import (
	"cmp"
	"slices"
	"time"
)

// A Retention says which bases are kept: those that were used, or made, within
// Age, and of these the last used ones, as many as take no more than Bytes. One
// that somebody stands on is always kept, and a damaged one otherwise never.
type Retention struct {
	Age   time.Duration
	Bytes int64 // below 0: no limit
}

// LastUse is when a sandbox was last started from the base, or else when it
// was made.
func (b BaseInfo) LastUse() time.Time {
	if b.Used.After(b.Created) {
		return b.Used
	}
	return b.Created
}

// Expired returns those of the bases that need not be kept, longest unused
// first. What one stands on can expire with it: when it was removed, look
// again.
func (r Retention) Expired(bases []BaseInfo, now time.Time) []BaseInfo {
	order := slices.Clone(bases)
	slices.SortFunc(order, func(a, b BaseInfo) int {
		return cmp.Or(a.LastUse().Compare(b.LastUse()), cmp.Compare(a.Key, b.Key))
	})
	var total int64
	gone := make([]bool, len(order))
	for i, b := range order {
		gone[i] = b.Users == 0 && (b.Damaged || now.Sub(b.LastUse()) >= r.Age)
		if !gone[i] {
			total += b.Bytes
		}
	}
	var expired []BaseInfo
	for i, b := range order {
		if !gone[i] && b.Users == 0 && r.Bytes >= 0 && total > r.Bytes {
			gone[i] = true
			total -= b.Bytes
		}
		if gone[i] {
			expired = append(expired, b)
		}
	}
	return expired
}
