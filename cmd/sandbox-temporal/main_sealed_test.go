package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	commonpb "go.temporal.io/api/common/v1"
	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/engine"
)

// cmdStored checks that each text stands somewhere in what Temporal has
// written to the disk, or with ! that none does: stored TEXT….
func cmdStored(ts *testscript.TestScript, neg bool, args []string) {
	files, err := filepath.Glob(filepath.Join(ts.Getenv("SANDBOX_TEMPORAL_HOME"), engine.DatabaseName+"*"))
	ts.Check(err)
	var all []byte
	for _, file := range files {
		b, err := os.ReadFile(file)
		ts.Check(err)
		all = append(all, b...)
	}
	if !bytes.Contains(all, []byte("sandbox-orch-")) {
		ts.Fatalf("no run is in %q", files)
	}
	for _, text := range args {
		if bytes.Contains(all, []byte(text)) == neg {
			ts.Fatalf("%q in Temporal's database: %v", text, neg)
		}
	}
}

// cmdOpened has the codec endpoint of the address in a file open what a run was
// started with, as Temporal's web page at the origin does: opened FILE ORIGIN
// REPORT.json TEXT.
func cmdOpened(ts *testscript.TestScript, _ bool, args []string) {
	var url string
	ts.Check(eventually(20*time.Second, func() error {
		b, err := os.ReadFile(ts.MkAbs(args[0]))
		if url = strings.TrimSpace(string(b)); err == nil && url == "" {
			err = fmt.Errorf("%s is empty", args[0])
		}
		return err
	}))
	var rep struct {
		Run string `json:"workflow_id"`
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[2])), &rep))
	ep, err := endpoint.Read(ts.Getenv("SANDBOX_TEMPORAL_HOME"))
	ts.Check(err)
	c, err := client.Dial(client.Options{HostPort: ep.Address})
	ts.Check(err)
	defer c.Close()
	first, err := c.GetWorkflowHistory(context.Background(), rep.Run, "", false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT).Next()
	ts.Check(err)
	sealed, err := protojson.Marshal(first.GetWorkflowExecutionStartedEventAttributes().GetInput())
	ts.Check(err)
	if bytes.Contains(sealed, []byte(args[3])) {
		ts.Fatalf("%q is not sealed", args[3])
	}
	req, err := http.NewRequest(http.MethodPost, url+"/decode", bytes.NewReader(sealed))
	ts.Check(err)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Origin", args[1])
	res, err := http.DefaultClient.Do(req)
	ts.Check(err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ts.Check(err)
	var open commonpb.Payloads
	if err := protojson.Unmarshal(body, &open); err != nil || res.StatusCode != http.StatusOK {
		ts.Fatalf("%s: %s %v", url, res.Status, err)
	}
	if len(open.Payloads) != 1 || !bytes.Contains(open.Payloads[0].Data, []byte(args[3])) {
		ts.Fatalf("%q is not in %s", args[3], body)
	}
}

// cmdSandboxed checks that a text stands in the environment of a process of
// the session's sandboxes, or with ! that it stands in none: sandboxed TEXT.
func cmdSandboxed(ts *testscript.TestScript, neg bool, args []string) {
	dir := filepath.Join(ts.Getenv("SANDBOX_TEMPORAL_HOME"), "sandboxes")
	seen, found := 0, 0
	for pid, line := range cmdlines() {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil || !strings.Contains(strings.Join(line, " ")+string(env), dir) && !bytes.Contains(env, []byte("/workspace")) {
			continue
		}
		seen++
		if bytes.Contains(env, []byte(args[0])) {
			found++
		}
	}
	if seen == 0 || (found > 0) == neg {
		ts.Fatalf("%d of %d processes of sandboxes have it", found, seen)
	}
}
