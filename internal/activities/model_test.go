package activities

import (
	"context"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// elsewhere is a provider whose sandboxes are on another host, as far as its
// callers can tell.
type elsewhere struct{ sandbox.Provider }

func (elsewhere) Name() string { return "elsewhere" }

// far adds the provider "elsewhere" to the world, and opens the gateway to its
// sandboxes.
func (w *world) far(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Gateway.ServeNet(ctx, ln, nil) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	w.GatewayURL = "http://" + ln.Addr().String()
	w.Providers = sandbox.NewSet(w.fake, elsewhere{w.fake})
}

const askModel = `curl -sS --fail-with-body -H "x-api-key: $ANTHROPIC_API_KEY" -H 'content-type: application/json' -H 'anthropic-version: 2023-06-01' ` +
	`-d '{"model":"claude-sonnet-5-5","max_tokens":64,"messages":[{"role":"user","content":"Play @script idle"}]}' "$ANTHROPIC_BASE_URL/v1/messages"`

func TestAForkElsewhereReachesTheModelByThePublicAddress(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	w, ctx := setUp(t), t.Context()
	w.far(t)
	p := plan("", "x")
	p.Provider, p.Agent, p.AgentCommand = "elsewhere", "command", askModel
	spec, ref := w.start(t, p)
	if _, err := w.HealthCheck(ctx, orchestrator.HealthCheckInput{Spec: spec, Ref: ref}); err != nil {
		t.Fatal(err)
	}
	out, err := w.RunAgent(ctx, runInput(spec, ref))
	if err != nil || out.Status != fork.Success || out.Usage.Cost == 0 || !strings.Contains(out.Output, "Nothing to do") {
		t.Fatalf("%+v %v", out, err)
	}
}

func TestAnAddressThatDoesNotAnswerIsFoundOutBeforeTheAgentStarts(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("bash is not installed")
	}
	w := setUp(t)
	w.far(t)
	w.GatewayURL = "http://127.0.0.1:1"
	p := plan("", "x")
	p.Provider, p.Agent, p.AgentCommand = "elsewhere", "command", "true"
	spec, ref := w.start(t, p)
	if _, err := w.HealthCheck(t.Context(), orchestrator.HealthCheckInput{Spec: spec, Ref: ref}); err == nil {
		t.Error("a gateway that does not answer is healthy")
	}
}

func TestWhoCannotReachTheModelIsToldBeforeAnythingIsMade(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	w.far(t)
	w.GatewayURL = ""
	for name, c := range map[string]struct {
		provider, agent, credentials string
		want                         fault.Kind
	}{
		"no public address":            {"elsewhere", "claude", "", fault.Invalid},
		"the key where it need not be": {w.fake.Name(), "claude", fork.CredentialsDirect, fault.Invalid},
		"no key of that maker":         {w.fake.Name(), "codex", "", fault.Denied},
	} {
		p := plan(t.TempDir(), "x")
		p.Provider, p.Agent, p.Credentials = c.provider, c.agent, c.credentials
		if _, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000001", Plan: p}); fault.KindOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, err := w.fake.List(t.Context(), nil); err != nil || len(left) != 0 {
		t.Errorf("%v %v", left, err)
	}
}

// fakeClaude says what it was given and an account of what it used, as Claude
// Code does.
const fakeClaude = `#!/bin/sh
test "$ANTHROPIC_API_KEY" = real-key || { echo "no key" >&2; exit 1; }
case "$*" in *"--max-budget-usd $LIMIT"*) ;; *) echo "no limit: $*" >&2; exit 1;; esac
echo '{"type":"result","subtype":"success","is_error":false,"result":"done","num_turns":1,"total_cost_usd":0.75,"terminal_reason":"completed","model_usage_since_last_result":{"claude-sonnet-5-5":{"inputTokens":10,"outputTokens":20,"cacheReadInputTokens":30,"cacheCreationInputTokens":40,"costUSD":0.25}}}'
`

// lend makes a sandbox for a fork whose agent gets the key itself, and returns
// what puts a script into it as the program claude.
func (w *world) lend(t *testing.T) (spec fork.Spec, ref sandbox.Ref, install func(script string)) {
	t.Helper()
	w.far(t)
	p := plan("", "x")
	p.Provider, p.Agent, p.Credentials, p.BudgetPerFork = "elsewhere", "claude", fork.CredentialsDirect, 2*fork.Dollar
	spec, ref = w.start(t, p)
	spec.Credentials = p.Credentials
	return spec, ref, func(script string) {
		t.Helper()
		ctx := t.Context()
		sb, err := w.Providers.Attach(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		defer sb.Close()
		if err := sb.Upload(ctx, sandbox.ProgramDir+"/claude", strings.NewReader(script)); err != nil {
			t.Fatal(err)
		}
		_, _, exit, err := sandbox.Output(ctx, sb, "chmod-"+time.Now().Format("150405.000000000"), sandbox.Cmd{Args: []string{"chmod", "+x", sandbox.ProgramDir + "/claude"}}, 100)
		if err != nil || exit.Code != 0 {
			t.Fatal(exit, err)
		}
	}
}

func TestAnAgentThatWasLentTheKeyIsBilledByItsOwnAccount(t *testing.T) {
	t.Parallel()
	w, ctx := setUp(t), t.Context()
	spec, ref, install := w.lend(t)
	install(strings.ReplaceAll(fakeClaude, "$LIMIT", "2.0000"))
	out, err := w.RunAgent(ctx, runInput(spec, ref))
	want := fork.Usage{Cost: fork.Dollar / 4, InputTokens: 10, OutputTokens: 20, CacheReadTokens: 30, CacheWriteTokens: 40}
	if err != nil || out.Status != fork.Success || out.Usage != want {
		t.Fatalf("%+v %v", out, err)
	}
	// The second one may spend what is left, and is killed before it can say
	// what it did: all of it counts as spent.
	install("#!/bin/sh\ncase \"$*\" in *'--max-budget-usd 1.7500'*) ;; *) exit 1;; esac\nkill -9 $$\n")
	in := runInput(spec, ref)
	in.Attempt = 2
	if out, err = w.RunAgent(ctx, in); err != nil || out.Status != fork.Failed || out.Usage.Cost != 2*fork.Dollar {
		t.Fatalf("%+v %v", out, err)
	}
	done, err := w.CleanupSandbox(ctx, orchestrator.CleanupSandboxInput{Ref: ref, Provider: "elsewhere", Run: spec.Run, Num: 1})
	if err != nil || done.Usage.Cost != 2*fork.Dollar {
		t.Fatalf("%+v %v", done, err)
	}
}

// Claude Code tries again for minutes when the API refuses its key, and was seen
// to say so in this way.
func TestAnAgentWhoseOwnKeyIsRefusedIsNotLetTryAgain(t *testing.T) {
	t.Parallel()
	w, ctx := setUp(t), t.Context()
	spec, ref, install := w.lend(t)
	install(`#!/bin/sh
trap 'echo "{\"type\":\"result\",\"is_error\":true,\"terminal_reason\":\"aborted_streaming\",\"total_cost_usd\":0,\"model_usage_since_last_result\":{}}"; exit 1' INT
echo '{"type":"system","subtype":"api_retry","attempt":1,"max_retries":10,"retry_delay_ms":500,"error_status":401,"error":"authentication_failed"}'
while :; do sleep 0.1; done
`)
	out, err := w.RunAgent(ctx, runInput(spec, ref))
	if err != nil || out.Status != fork.Failed || out.ErrorKind != string(fault.Denied) || out.Again || out.Usage.Cost != 0 || !strings.Contains(out.Hint, "ANTHROPIC_API_KEY") {
		t.Fatalf("%+v %v", out, err)
	}
}
