package fork

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestSizesAreReadAsTheyAreWritten(t *testing.T) {
	for s, want := range map[string]int64{
		"4GiB": 4 << 30, "4G": 4 << 30, "4g": 4 << 30, "4GB": 4e9, "512 MiB": 512 << 20, "1.5TiB": 3 << 39, "64k": 64 << 10, "0.5kb": 500,
	} {
		if got, err := ParseBytes(s); err != nil || got != want {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "4", "GiB", "-4GiB", "4XiB", "1e3GiB", "NaNGiB", "infG", "0GiB", "9999999999999TiB", "4GiB5", "1.2.3G", "4B", strings.Repeat("9", 400) + "G"} {
		if got, err := ParseBytes(s); err == nil {
			t.Errorf("%q became %d", s, got)
		}
	}
	for s, want := range map[string]int64{"1": 1000, "1.5": 1500, "0.01": 10, "64": 64000} {
		if got, err := ParseCPUs(s); err != nil || got != want || FormatCPUs(got) != s {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
}

func FuzzParseBytes(f *testing.F) {
	for _, s := range []string{"4GiB", "1.5 GB", "0.1k", "99999999T", "1M"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseBytes(s)
		if err != nil {
			return
		}
		if n < 1 {
			t.Fatalf("%q became %d", s, n)
		}
		// What is shown is what is meant, but for sizes no one writes.
		if n < 1000 || n > 1<<50 {
			return
		}
		if again, err := ParseBytes(FormatBytes(n)); err != nil || again != n {
			t.Fatalf("%q is %d, shown as %q, which is %d, %v", s, n, FormatBytes(n), again, err)
		}
	})
}

func TestAPlanWithoutLimitsIsWrittenAsBeforeThereWereAny(t *testing.T) {
	for _, v := range []any{Plan{}, Spec{}} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "limits") {
			t.Errorf("%s", b)
		}
	}
}

func TestLimitsThatHelpNobodyAreInvalid(t *testing.T) {
	if err := (Limits{}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (Limits{MemoryBytes: 4 << 30, CPUMillis: 1500, Processes: 100, DiskBytes: 1 << 30}).Validate(); err != nil {
		t.Error(err)
	}
	for _, l := range []Limits{
		{MemoryBytes: 1}, {MemoryBytes: -1}, {MemoryBytes: 1 << 60}, {CPUMillis: 1}, {CPUMillis: -5}, {Processes: 1}, {Processes: 1 << 40}, {DiskBytes: 1}, {DiskBytes: -1},
	} {
		if err := l.Validate(); fault.KindOf(err) != fault.Invalid || !strings.HasPrefix(fault.HintOf(err), "Use --") {
			t.Errorf("%+v: %v (%s)", l, err, fault.HintOf(err))
		}
	}
}
