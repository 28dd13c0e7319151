package activities

import (
	"context"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.temporal.io/sdk/testsuite"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// worked is a fork whose agent has run line and whose work was collected.
func worked(t *testing.T, w *world, line string) orchestrator.VerifyForkInput {
	t.Helper()
	ctx := t.Context()
	p := plan(t.TempDir(), "work")
	p.Agent, p.AgentCommand = "command", line
	if err := newRepo(p.Repo); err != nil {
		t.Fatal(err)
	}
	spec, ref, err := w.begin(ctx, "sandbox-orch-00000001", p)
	if err != nil {
		t.Fatal(err)
	}
	base, err := w.PrepareBase(ctx, orchestrator.PrepareBaseInput{Run: spec.Run, Plan: p})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := w.RunAgent(ctx, runInput(spec, ref)); err != nil || out.Status != fork.Success {
		t.Fatalf("%+v, %v", out, err)
	}
	got, err := w.CollectResult(ctx, orchestrator.CollectResultInput{Spec: spec, Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	return orchestrator.VerifyForkInput{Spec: spec, Ref: ref, Base: base, Commit: got.Commit, Deadline: time.Now().Add(time.Hour)}
}

// sandboxes are those of the fork that there are.
func (w *world) sandboxes(t *testing.T) []sandbox.Ref {
	t.Helper()
	infos, err := w.fake.List(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var refs []sandbox.Ref
	for _, i := range infos {
		refs = append(refs, i.Ref)
	}
	return refs
}

func TestWorkIsVerifiedWhereTheAgentHasNeverBeen(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		agent, verify string
		timeout       time.Duration
		want          fork.Verify
		output        string
	}{
		"good work": {`echo two >> a.txt`, `echo looking; test "$(cat a.txt)" = "one
two"`, time.Minute, fork.Verify{Status: fork.Success}, ""},
		"bad work":      {`echo three >> a.txt`, `echo "a.txt is wrong" >&2; exit 3`, time.Minute, fork.Verify{Status: fork.Failed, ExitCode: 3}, "a.txt is wrong"},
		"what was left": {`echo two >> a.txt; echo mine > "$HOME/left"; echo mine > .git/left`, `test ! -e "$HOME/left" && test ! -e .git/left`, time.Minute, fork.Verify{Status: fork.Success}, ""},
		"no change":     {`true`, `test "$(cat a.txt)" = one`, time.Minute, fork.Verify{Status: fork.Success}, ""},
		"too slow":      {`echo two >> a.txt`, `echo begun; sleep 1000`, time.Second, fork.Verify{Status: fork.TimedOut, ExitCode: fork.Unverified}, "it did not end within 1s\nbegun"},
		"escapes":       {`echo two >> a.txt`, `printf 'red \033[31malert\n'; exit 1`, time.Minute, fork.Verify{Status: fork.Failed, ExitCode: 1}, "red alert"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := setUp(t)
			in := worked(t, w, row.agent)
			in.Spec.Verify, in.Spec.Timeout = row.verify, row.timeout
			got, err := w.VerifyFork(t.Context(), in)
			if err != nil || got.Status != row.want.Status || got.ExitCode != row.want.ExitCode || got.Output != row.output {
				t.Errorf("%+v, %v; want %+v and %q", got, err, row.want, row.output)
			}
			if refs := w.sandboxes(t); len(refs) > 0 {
				t.Errorf("the sandboxes %v are left", refs)
			}
			r, err := w.Artifacts.Get(t.Context(), artifact.RunKey(in.Spec.Run, 1, fork.VerifyName))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if log, err := io.ReadAll(r); err != nil || strings.Contains(row.verify, "looking") && string(log) != "looking\n" {
				t.Errorf("the log is %q, %v", log, err)
			}
		})
	}
}

func TestVerificationIsFollowedOnByTheNextWorker(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	in := worked(t, w, `echo two >> a.txt`)
	gate := filepath.Join(t.TempDir(), "gate")
	in.Spec.Verify = `echo begun; while [ ! -e ` + gate + ` ]; do sleep 0.02; done; echo ended; exit 4`
	var suite testsuite.WorkflowTestSuite
	env := suite.NewTestActivityEnvironment()
	stop := make(chan struct{})
	env.SetWorkerStopChannel(stop)
	env.RegisterActivity(w.VerifyFork)
	go func() { // when the command is in the middle of it
		for {
			infos, _ := w.fake.List(context.WithoutCancel(t.Context()), nil)
			for _, i := range infos {
				if i.Ref == in.Ref {
					continue
				}
				if sb, err := w.fake.Attach(t.Context(), i.Ref); err == nil {
					_, err := sb.Process(t.Context(), "verify")
					_ = sb.Close()
					if err == nil {
						close(stop)
						return
					}
				}
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if _, err := env.ExecuteActivity(w.VerifyFork, in); err == nil || !strings.Contains(err.Error(), orchestrator.ErrWorkerStopping.Error()) {
		t.Fatalf("the first worker: %v", err)
	}
	if refs := w.sandboxes(t); len(refs) != 1 || refs[0] == in.Ref {
		t.Fatalf("%v is left to the next worker, want the sandbox of the verification", refs)
	}
	if out, err := exec.CommandContext(t.Context(), "touch", gate).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := w.VerifyFork(t.Context(), in)
	if err != nil || got.ExitCode != 4 || got.Output != "begun\nended" {
		t.Errorf("the second worker: %+v, %v; want one run of the command", got, err)
	}
}

func TestATokenInTheWorkIsGoodForNothing(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	in := worked(t, w, `echo "$ANTHROPIC_API_KEY" > token`)
	in.Spec.Verify = "true"
	token, err := exec.CommandContext(t.Context(), "git", "-C", in.Spec.Repo, "show", fork.Branch(in.Spec.Run, 1)+":token").Output()
	if err != nil || len(token) < 20 {
		t.Fatalf("the work holds %q, %v", token, err)
	}
	socket := filepath.Join(w.dir, "gw.sock")
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	ask := func() int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://gateway/v1/messages", strings.NewReader(
			`{"model": "claude-sonnet-4-5", "max_tokens": 10, "messages": [{"role": "user", "content": "Play @script idle"}]}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Api-Key", strings.TrimSpace(string(token)))
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Anthropic-Version", "2023-06-01")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if got := ask(); got != http.StatusOK {
		t.Fatalf("while the agent may work: %d", got)
	}
	if got, err := w.VerifyFork(t.Context(), in); err != nil || got.Status != fork.Success {
		t.Fatalf("%+v, %v", got, err)
	}
	if got := ask(); got != http.StatusForbidden {
		t.Errorf("when its work is verified: %d, want 403", got)
	}
}
