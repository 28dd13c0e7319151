package fork

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Limits bounds what each sandbox of a run may use. Zero: what its provider
// gives to everybody.
type Limits struct {
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	CPUMillis   int64 `json:"cpu_millis,omitempty"` // thousandths of a core
	Processes   int64 `json:"processes,omitempty"`  // and threads
	DiskBytes   int64 `json:"disk_bytes,omitempty"` // of what is written
}

// The bounds of limits: with less no agent gets anywhere, and more is a slip
// of the finger.
const (
	minMemory, maxMemory       = 64 << 20, 1 << 44
	minCPUMillis, maxCPUMillis = 10, 1_000_000
	minProcesses, maxProcesses = 32, 1 << 22
	minDisk, maxDisk           = 16 << 20, 1 << 50
)

// Validate returns a fault of kind Invalid with a hint, or nil.
func (l Limits) Validate() error {
	for _, row := range []struct {
		flag            string
		value, min, max int64
		show            func(int64) string
	}{
		{"memory", l.MemoryBytes, minMemory, maxMemory, FormatBytes},
		{"cpus", l.CPUMillis, minCPUMillis, maxCPUMillis, FormatCPUs},
		{"processes", l.Processes, minProcesses, maxProcesses, func(n int64) string { return strconv.FormatInt(n, 10) }},
		{"disk", l.DiskBytes, minDisk, maxDisk, FormatBytes},
	} {
		if row.value != 0 && (row.value < row.min || row.value > row.max) {
			return fault.New("plan", fault.Invalid, "a limit of %s for %s asked for", row.show(row.value), row.flag).
				Hinted("Use --%s %s to %s.", row.flag, row.show(row.min), row.show(row.max))
		}
	}
	return nil
}

// units are those of ParseBytes. The short forms mean what they mean to
// container programs: powers of 1024.
var units = []struct {
	name string
	size int64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
	{"K", 1 << 10}, {"M", 1 << 20}, {"G", 1 << 30}, {"T", 1 << 40},
}

// ParseBytes reads a size such as "4GiB", "512M" or "1.5 GB". A number without
// a unit is refused: it could be meant in bytes or in anything else.
func ParseBytes(s string) (int64, error) {
	for _, u := range units {
		if n := len(s) - len(u.name); n > 0 && strings.EqualFold(s[n:], u.name) {
			return scaled(strings.TrimSpace(s[:n]), u.size, s)
		}
	}
	return 0, fmt.Errorf("%q is not a size with a unit", s)
}

// ParseCPUs reads a number of cores such as "2" or "1.5" as thousandths.
func ParseCPUs(s string) (int64, error) { return scaled(s, 1000, s) }

// scaled returns number times unit, rounded down.
func scaled(number string, unit int64, all string) (int64, error) {
	if number == "" || len(number) > 20 || strings.Trim(number, "0123456789.") != "" {
		return 0, fmt.Errorf("%q is not a number", all)
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number", all)
	}
	if f *= float64(unit); f < 1 || f > math.MaxInt64/2 {
		return 0, fmt.Errorf("%q is out of range", all)
	}
	return int64(math.Round(f)), nil
}

// FormatBytes writes n in the unit that makes it shortest, so that ParseBytes
// reads the same again.
func FormatBytes(n int64) string {
	best := ""
	for _, u := range units {
		s := strconv.FormatFloat(float64(n)/float64(u.size), 'f', -1, 64) + u.name
		// Of two that are as short, the one that says which of the two
		// thousands it means.
		if again, err := ParseBytes(s); err == nil && again == n && len(u.name) > 1 && (best == "" || len(s) < len(best)) {
			best = s
		}
	}
	if best == "" {
		return strconv.FormatInt(n, 10) + " bytes"
	}
	return best
}

// FormatCPUs writes thousandths of a core as cores.
func FormatCPUs(millis int64) string { return strconv.FormatFloat(float64(millis)/1000, 'f', -1, 64) }
