package main

import (
	"github.com/rogpeppe/go-internal/testscript"

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
	s.e2b = e2btest.New(e2btest.Options{})
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
