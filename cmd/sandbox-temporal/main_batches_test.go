package main

import (
	"encoding/json"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
)

// cmdBilled checks that a run cost exactly what the model's API has charged
// since the last check, batches at their price: billed REPORT.json. What is not
// certain yet may be in the report too; then it cost at most that.
func cmdBilled(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: billed REPORT.json")
	}
	var rep struct {
		Cost    fork.USD `json:"total_cost_usd"`
		Results []fork.Result
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &rep))
	prices, err := gateway.LoadPrices(nil)
	ts.Check(err)
	s := of(ts)
	var sum, pending fork.USD
	for _, r := range s.model.Requests()[s.billed:] {
		s.billed++
		u := gateway.Tokens{
			Input: int64(r.Usage.Input), CacheWrite5m: int64(r.Usage.Creation.FiveMinutes), CacheWrite1h: int64(r.Usage.Creation.OneHour),
			CacheRead: int64(r.Usage.CacheRead), Output: int64(r.Usage.Output),
		}
		if r.Usage.Tier == "batch" {
			sum += prices.BatchCost(r.Model, u)
		} else {
			sum += prices.Cost(r.Model, u)
		}
	}
	for _, r := range rep.Results {
		pending += r.Pending
	}
	if sum > rep.Cost || pending == 0 && sum != rep.Cost || sum == 0 {
		ts.Fatalf("the run cost %s, of which %s is not certain, and the API has charged %s", rep.Cost, pending, sum)
	}
}
