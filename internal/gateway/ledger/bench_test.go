package ledger

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger/ledgertest"
)

// BenchmarkCalls measures how many calls a second are reserved and settled, each
// reservation durable before it is answered: one after the other, and 64 at a
// time from 64 forks of a run, within three budgets.
func BenchmarkCalls(b *testing.B) {
	for _, name := range []string{"sqlite", "postgres"} {
		for _, parallel := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d", name, parallel), func(b *testing.B) {
				o := Options{Dir: b.TempDir(), DayBudget: 1 << 50}
				if name == "postgres" {
					var err error
					if o.URL, err = ledgertest.New(b, true).URL(); err != nil {
						b.Fatal(err)
					}
				}
				l := open(b, o)
				for num := 1; num <= parallel; num++ {
					grant(b, l, Account{Run: "r", Fork: num, RunBudget: 1 << 50, ForkBudget: 1 << 49})
				}
				var next, left atomic.Int64
				left.Store(int64(b.N))
				done := make(chan error, parallel)
				b.ResetTimer()
				start := time.Now()
				for range parallel {
					r := request("r", int(next.Add(1)), Ask{Fixed: 100, PerToken: 1, Want: 4096, Enough: 4096, Least: 1024})
					go func() {
						for left.Add(-1) >= 0 {
							c, err := l.Reserve(b.Context(), r)
							if err != nil {
								done <- err
								return
							}
							c.Settle(Settlement{State: Settled, Status: 200, Cost: fork.USD(50), RequestID: "req_0123456789", Tokens: Tokens{Input: 10, Output: 20}})
						}
						done <- nil
					}()
				}
				for range parallel {
					if err := <-done; err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "calls/s")
			})
		}
	}
}
