package governor

import (
	"net/http"
	"strconv"
	"time"
)

// An allowance is one limit as the API told it last: a bucket of its own,
// which the API fills evenly (docs: API, Rate limits, "token bucket
// algorithm"). The zero value knows of no limit.
type allowance struct {
	known  bool
	most   float64
	level  float64
	rate   float64 // a second
	at     time.Time
	pinned time.Time // the level below is true from then on
}

// headerPrefix begins the names of all of the API's limits (docs: API, Rate
// limits, "Response headers").
const headerPrefix = "Anthropic-Ratelimit-"

// read takes in the three headers of the limit. What is missing or makes no
// sense is passed over: a limit that is not understood is found out by feel.
func (a *allowance) read(now time.Time, h http.Header, kind string) {
	most, err1 := strconv.ParseFloat(h.Get(headerPrefix+kind+"-limit"), 64)
	left, err2 := strconv.ParseFloat(h.Get(headerPrefix+kind+"-remaining"), 64)
	reset, err3 := time.Parse(time.RFC3339, h.Get(headerPrefix+kind+"-reset"))
	if err1 != nil || err2 != nil || err3 != nil || !(most > 0 && most < 1e15) || !(left >= 0 && left <= most) {
		return
	}
	full := reset.Sub(now).Seconds()
	a.known, a.most, a.at = true, most, now
	if left < most && full > 0 {
		a.rate = max((most-left)/full, most/maxWindow)
	} else if a.rate == 0 {
		a.rate = most / 60 // limits are told by the minute
	}
	// Calls that are under way are not in what the API counted; what we
	// counted holds when it is less, for a moment.
	a.refill(now)
	if a.level > left || now.After(a.pinned) {
		a.level, a.pinned = left, now.Add(time.Second)
	}
}

// maxWindow is the longest, in seconds, that a limit is taken to need to fill.
const maxWindow = 3600

func (a *allowance) refill(now time.Time) {
	if d := now.Sub(a.at).Seconds(); d > 0 {
		a.level = min(a.most, a.level+d*a.rate)
		a.at = now
	}
}

// wait returns how long until n are there. What is more than the limit ever
// holds waits until it is full.
func (a *allowance) wait(now time.Time, n float64) time.Duration {
	if !a.known {
		return 0
	}
	a.refill(now)
	n = min(n, a.most)
	if a.level >= n {
		return 0
	}
	return seconds((n - a.level) / a.rate)
}

func (a *allowance) take(n float64) {
	if a.known {
		a.level = max(a.level-n, -a.most)
	}
}

// Bounds of what a refusal may ask for.
const (
	leastPause = 200 * time.Millisecond
	mostPause  = 2 * time.Minute
	pause      = time.Second // when it does not say
)

// retryAfter reads the header of that name (RFC 9110, section 10.2.3: seconds,
// or a date) and its sibling in milliseconds that the API's own clients know.
func retryAfter(now time.Time, h http.Header) time.Duration {
	d := pause
	if ms, err := strconv.ParseFloat(h.Get("Retry-After-Ms"), 64); err == nil {
		d = seconds(ms / 1000)
	} else if v := h.Get("Retry-After"); v != "" {
		if s, err := strconv.ParseFloat(v, 64); err == nil {
			d = seconds(s)
		} else if at, err := http.ParseTime(v); err == nil {
			d = at.Sub(now)
		}
	}
	return min(max(d, leastPause), mostPause)
}
