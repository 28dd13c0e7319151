package main

import (
	"encoding/json"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// cmdE2bserver starts a server that speaks E2B's protocol and has the session
// use it, or skips the session where that makes no sandboxes.
func cmdE2bserver(ts *testscript.TestScript, neg bool, _ []string) {
	if neg {
		ts.Fatalf("usage: e2bserver")
	}
	if err := e2btest.Supported(); err != nil {
		// testscript can only be told by a condition; this one is found here.
		ts.Fatalf("no sandboxes of E2B can be made here: %v", err)
	}
	s := of(ts)
	var o e2btest.Options
	if claude := claudePath(); claude != "" { // as the template "claude" of E2B has it
		o.Mounts = []e2btest.Mount{{Source: claude, Target: sandbox.ProgramDir + "/claude"}}
	}
	s.e2b = e2btest.New(o)
	ts.Setenv("E2B_API_KEY", s.e2b.Key)
	ts.Setenv("E2B_API_URL", s.e2b.APIURL())
	ts.Setenv("E2B_SANDBOX_URL", s.e2b.SandboxURL())
	ts.Setenv("SANDBOX_TEMPORAL_E2B_PLAN", "pro")
}

// cmdE2bgone fails when a sandbox is left at the server; with the word bases,
// also when a base is.
func cmdE2bgone(ts *testscript.TestScript, neg bool, args []string) {
	left := of(ts).e2b.Sandboxes()
	if (len(left) > 0) != neg {
		ts.Fatalf("%d sandboxes are at the server: %+v", len(left), left)
	}
	if len(args) != 1 || args[0] != "bases" {
		return
	}
	if bases := of(ts).e2b.Snapshots(); len(bases) > 0 {
		ts.Fatalf("%d bases are at the server: %v", len(bases), bases)
	}
}

// cmdOvershoot checks that the one fork of a report spent more than its limit,
// and that it had not when it made its last call, by what the model's API
// counted: overshoot REPORT.json LIMIT. The calls are the newest that were
// answered, as many as come to the fork's cost.
func cmdOvershoot(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: overshoot REPORT.json LIMIT")
	}
	var rep struct {
		Results []struct {
			Cost fork.USD `json:"cost_usd"`
		}
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &rep))
	var limit fork.USD
	ts.Check(limit.UnmarshalJSON([]byte(args[1])))
	prices, err := gateway.LoadPrices(nil)
	ts.Check(err)
	var sum, last fork.USD
	calls := of(ts).model.Requests()
	for i := len(calls) - 1; i >= 0 && sum < rep.Results[0].Cost; i-- {
		u := calls[i].Usage
		cost := prices.Cost(calls[i].Model, gateway.Tokens{
			Input: int64(u.Input), CacheWrite5m: int64(u.Creation.FiveMinutes), CacheWrite1h: int64(u.Creation.OneHour), CacheRead: int64(u.CacheRead), Output: int64(u.Output),
		})
		if last == 0 {
			last = cost
		}
		sum += cost
	}
	switch cost := rep.Results[0].Cost; {
	case sum != cost:
		ts.Fatalf("the fork cost %s, and the calls that the API answered come to %s", cost, sum)
	case cost < limit:
		ts.Fatalf("the fork was stopped at %s, before its limit of %s", cost, limit)
	case cost-last >= limit:
		ts.Fatalf("the fork had spent %s of %s before its last call", cost-last, limit)
	}
}
