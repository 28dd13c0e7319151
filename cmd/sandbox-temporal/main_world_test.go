package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	enumspb "go.temporal.io/api/enums/v1"
	historypb "go.temporal.io/api/history/v1"
	sdkpb "go.temporal.io/api/sdk/v1"
	"go.temporal.io/sdk/client"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
)

var update = flag.Bool("update", false, "record the histories that internal/orchestrator replays")

// cmdHostport listens on the host's loopback with a secret behind it, and
// puts the address into the variable: hostport VAR.
func cmdHostport(ts *testscript.TestScript, _ bool, args []string) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "host-secret") }))
	ts.Defer(srv.Close)
	ts.Setenv(args[0], strings.TrimPrefix(srv.URL, "http://"))
}

// gitToken is what the private git server demands.
const gitToken = "ghp_sessiontest0123456789"

// cmdGitserver serves the bare repositories of a folder over HTTP, for those
// who have the token: gitserver DIR.
func cmdGitserver(ts *testscript.TestScript, _ bool, args []string) {
	core, err := exec.Command("git", "--exec-path").Output()
	ts.Check(err)
	backend := &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(core)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + ts.MkAbs(args[0]), "GIT_HTTP_EXPORT_ALL=1", "HOME=" + ts.Getenv("HOME"), "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"},
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, password, ok := r.BasicAuth(); !ok || password != gitToken {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		backend.ServeHTTP(w, r)
	}))
	ts.Defer(srv.Close)
	ts.Setenv("GITSERVER", srv.URL)
	ts.Setenv("GITTOKEN", gitToken)
}

// cmdTmpfs mounts a small file system: tmpfs DIR SIZE.
func cmdTmpfs(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+args[1]))
	ts.Defer(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
}

// cmdBigfile writes a file that does not compress: bigfile FILE MEGABYTES.
func cmdBigfile(ts *testscript.TestScript, _ bool, args []string) {
	out, err := exec.Command("sh", "-c", `head -c "$2"M /dev/urandom > "$1"`, "sh", ts.MkAbs(args[0]), args[1]).CombinedOutput()
	if err != nil {
		ts.Fatalf("%v: %s", err, out)
	}
}

// cmdHistory records the history of a run, and of its first forks, for the
// replay test: history RUN NAME FORKS. It does so only with -update.
func cmdHistory(ts *testscript.TestScript, _ bool, args []string) {
	forks, err := strconv.Atoi(args[2])
	ts.Check(err)
	if !*update {
		return
	}
	ep, err := endpoint.Read(ts.Getenv("STATE"))
	ts.Check(err)
	c, err := client.Dial(client.Options{HostPort: ep.Address})
	ts.Check(err)
	defer c.Close()
	run := strings.TrimSpace(args[0])
	record(ts, c, run, args[1])
	for n := 1; n <= forks; n++ {
		record(ts, c, fmt.Sprintf("%s-fork-%d", run, n), fmt.Sprintf("%s-fork-%d", args[1], n))
	}
}

func record(ts *testscript.TestScript, c client.Client, id, name string) {
	var h historypb.History
	for it := c.GetWorkflowHistory(context.Background(), id, "", false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT); it.HasNext(); {
		e, err := it.Next()
		ts.Check(err)
		h.Events = append(h.Events, e)
	}
	b, err := protojson.MarshalOptions{Indent: " "}.Marshal(&h)
	ts.Check(err)
	dir := filepath.Join("..", "..", "internal", "orchestrator", "testdata", "history")
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(os.WriteFile(filepath.Join(dir, name+".json"), append(b, '\n'), 0o644))
}

// cmdRunid puts the id of the run in a report into a variable: runid
// REPORT.json VAR.
func cmdRunid(ts *testscript.TestScript, _ bool, args []string) {
	var rep struct {
		Run string `json:"workflow_id"`
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &rep))
	ts.Setenv(args[1], rep.Run)
}

// cmdDetails waits until Temporal's web page would say of a workflow what the
// pattern matches: details ID REGEXP.
func cmdDetails(ts *testscript.TestScript, _ bool, args []string) {
	ep, err := endpoint.Read(ts.Getenv("STATE"))
	ts.Check(err)
	c, err := client.Dial(client.Options{HostPort: ep.Address})
	ts.Check(err)
	defer c.Close()
	pattern := regexp.MustCompile(args[1])
	ts.Check(eventually(time.Minute, func() error {
		v, err := c.QueryWorkflow(context.Background(), args[0], "", "__temporal_workflow_metadata")
		var m sdkpb.WorkflowMetadata
		if err == nil {
			err = v.Get(&m)
		}
		if err == nil && !pattern.MatchString(m.GetCurrentDetails()) {
			err = fmt.Errorf("%s says\n%s", args[0], m.GetCurrentDetails())
		}
		return err
	}))
}

// cmdFetch reads the engine's metrics, its health or its web page: fetch
// metrics|healthz|readyz|ui REGEXP.
func cmdFetch(ts *testscript.TestScript, _ bool, args []string) {
	ep, err := endpoint.Read(ts.Getenv("STATE"))
	ts.Check(err)
	url := map[string]string{"metrics": ep.Metrics, "ui": ep.UI}[args[0]]
	if url == "" {
		url = strings.TrimSuffix(ep.Metrics, "metrics") + args[0]
	}
	res, err := http.Get(url)
	ts.Check(err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ts.Check(err)
	if res.StatusCode != http.StatusOK || !regexp.MustCompile("(?m)"+args[1]).Match(body) {
		ts.Fatalf("%s: %s\n%s", url, res.Status, body)
	}
}

// cmdAddress puts the address of the engine's Temporal into a variable:
// address VAR.
func cmdAddress(ts *testscript.TestScript, _ bool, args []string) {
	ep, err := endpoint.Read(ts.Getenv("STATE"))
	ts.Check(err)
	ts.Setenv(args[0], ep.Address)
}
