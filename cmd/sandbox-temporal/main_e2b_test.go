package main

import (
	"net"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"

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
	s.e2b = e2btest.New(e2btest.Options{MaxConcurrent: most})
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
