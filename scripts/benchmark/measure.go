package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// A series is the times that one thing took.
type series []time.Duration

// p returns the quantile q of the series by nearest rank.
func (s series) p(q float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// ms writes milliseconds with three figures.
func ms(d time.Duration) string {
	v := float64(d) / float64(time.Millisecond)
	switch {
	case d == 0:
		return "–"
	case v < 0.1:
		return fmt.Sprintf("%.3f", v)
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// ratio writes how many times b goes into a.
func ratio(a, b time.Duration) string {
	if a == 0 || b == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f ×", float64(a)/float64(b))
}

// timed returns what f took.
func timed(f func() error) (time.Duration, error) {
	start := time.Now()
	err := f()
	return time.Since(start), err
}

// parallel calls f with 0 to n-1, width of them at a time, and returns the
// time until the last was done and the first error.
func parallel(n, width int, f func(i int) error) (time.Duration, error) {
	start := time.Now()
	next := make(chan int)
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	for range width {
		wg.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					once.Do(func() { first = err })
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	return time.Since(start), first
}

// A watch counts how often other work went on beside a measurement.
type watch struct{ looked, busy int }

// quiet waits until the machine has nothing else to do, for at most two
// seconds: what else runs there distorts the figures.
func (w *watch) quiet(ctx context.Context) {
	w.looked++
	if !isQuiet(ctx) {
		w.busy++
	}
}

func (w *watch) String() string {
	return fmt.Sprintf("Before %d of %d measurements the machine had other work to do.", w.busy, w.looked)
}

func isQuiet(ctx context.Context) bool {
	for range 5 {
		before, ok := cpuTimes()
		select {
		case <-ctx.Done():
			return false
		case <-time.After(400 * time.Millisecond):
		}
		after, ok2 := cpuTimes()
		if !ok || !ok2 {
			return true // nobody can tell
		}
		if total := after.total - before.total; total > 0 && after.idle-before.idle > total*9/10 {
			return true
		}
	}
	return false
}

type cpuTime struct{ idle, total uint64 }

func cpuTimes() (t cpuTime, ok bool) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return t, false
	}
	line, _, _ := strings.Cut(string(b), "\n")
	for i, f := range strings.Fields(line)[1:] {
		var v uint64
		if _, err := fmt.Sscan(f, &v); err != nil {
			return t, false
		}
		t.total += v
		if i == 3 || i == 4 { // idle, iowait
			t.idle += v
		}
	}
	return t, true
}
