package main

import (
	"encoding/json"
	"net"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// cmdE2bserver starts a server that speaks E2B's protocol and has the session
// use it, or skips the session where that makes no sandboxes. With a number no
// more sandboxes than that run at once.
func cmdE2bserver(ts *testscript.TestScript, neg bool, args []string) {
	most := 0
	if len(args) == 1 {
		n, err := strconv.Atoi(args[0])
		ts.Check(err)
		most = n
	}
	if neg || len(args) > 1 {
		ts.Fatalf("usage: e2bserver [sandboxes]")
	}
	if err := e2btest.Supported(); err != nil {
		// testscript can only be told by a condition; this one is found here.
		ts.Fatalf("no sandboxes of E2B can be made here: %v", err)
	}
	s := of(ts)
	o := e2btest.Options{MaxConcurrent: most}
	if claude := claudePath(); claude != "" { // as the template "claude" of E2B has it
		o.Mounts = []e2btest.Mount{{Source: claude, Target: sandbox.ProgramDir + "/claude"}}
	}
	s.e2b = e2btest.New(o)
	ts.Setenv("E2B_API_KEY", s.e2b.Key)
	ts.Setenv("E2B_API_URL", s.e2b.APIURL())
	ts.Setenv("E2B_SANDBOX_URL", s.e2b.SandboxURL())
	ts.Setenv("SANDBOX_TEMPORAL_E2B_PLAN", "pro")
	// Where the engine's gateway can be: its address has to be known before.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Setenv("FREE", ln.Addr().String())
	ts.Check(ln.Close())
}

// cmdE2bkill ends the sandbox of the fork with that number behind everybody's
// back.
func cmdE2bkill(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: e2bkill <fork>")
	}
	srv := of(ts).e2b
	for _, sb := range srv.Sandboxes() {
		if sb.Metadata["sandbox-temporal.label.fork"] == args[0] && srv.Kill(sb.ID) {
			return
		}
	}
	ts.Fatalf("fork %s has no sandbox at the server", args[0])
}

// cmdE2bfault has the server answer all requests like the one named with a
// status; with the word stop, no more.
func cmdE2bfault(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	switch {
	case neg || len(args) == 0 || len(args) > 2:
		ts.Fatalf("usage: e2bfault <method and path> <status> | e2bfault stop")
	case len(args) == 1:
		s.healed()
		return
	}
	status, err := strconv.Atoi(args[1])
	ts.Check(err)
	s.healed = s.e2b.Fault(e2btest.Fault{On: args[0], Status: status, Times: -1})
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
