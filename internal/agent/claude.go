package agent

import (
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Claude is the Claude Code CLI of Anthropic, unmodified, inside the sandbox.
// Facts about it were measured with version 2.1.330.
type Claude struct{}

var _ Agent = Claude{}

// claudeHome is where Claude Code keeps its sessions, in the sandbox.
const claudeHome = "/home/agent/.claude"

// goOn is the prompt of an agent that resumes its session.
const goOn = "Continue where you left off."

// Name returns "claude".
func (Claude) Name() string { return "claude" }

// Program returns the program "claude".
func (Claude) Program() Program {
	return Program{Name: "claude", Install: "npm install -g @anthropic-ai/claude-code"}
}

// Model returns "sonnet".
func (Claude) Model() string { return "sonnet" }

// Check refuses a spec without a prompt file or without a session.
func (Claude) Check(spec Spec) error { return checkSession("claude", spec) }

func checkSession(op string, spec Spec) error {
	if err := checkTask(op, spec); err != nil {
		return err
	}
	if !uuidShaped(spec.Session) {
		return fault.New(op, fault.Invalid, "the session %q is not a UUID", word(spec.Session))
	}
	return nil
}

func checkTask(op string, spec Spec) error {
	if spec.TaskFile == "" {
		return fault.New(op, fault.Invalid, "no file holds the prompt")
	}
	return nil
}

func uuidShaped(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range []byte(s) {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			if c != '-' {
				return false
			}
		} else if !strings.ContainsRune("0123456789abcdef", rune(c)) {
			return false
		}
	}
	return true
}

// resumeClaude goes on with a session, or begins it when the process died
// before it had written anything: resuming what is not there is an error. The
// arguments are the session, the file of the prompt, the prompt to go on with
// and the flags that both share.
const resumeClaude = `session=$1 task=$2 prompt=$3; shift 3
for f in "$CLAUDE_CONFIG_DIR"/projects/*/"$session.jsonl"; do
	if [ -s "$f" ]; then exec claude --resume "$session" "$@" "$prompt" </dev/null; fi
done
exec claude --session-id "$session" "$@" <"$task"`

// Command runs claude without a terminal and without questions: the sandbox is
// the permission system. The prompt comes on standard input, because it may be
// longer than an argument can be and may begin with a dash.
//
// All of claude's traffic goes to spec.BaseURL. It retries failed model calls
// itself for about three minutes, so that a gateway may restart.
func (Claude) Command(spec Spec) Command {
	flags := []string{"-p", "--output-format", "stream-json", "--verbose", "--dangerously-skip-permissions"}
	if spec.Model != "" {
		flags = append(flags, "--model", spec.Model)
	}
	if spec.Remaining > 0 {
		// A second line behind the gateway: it can overshoot by one call.
		flags = append(flags, "--max-budget-usd", strings.TrimPrefix(spec.Remaining.String(), "$"))
	}
	key := "ANTHROPIC_API_KEY"
	if spec.Bearer {
		key = "ANTHROPIC_AUTH_TOKEN"
	}
	cmd := Command{
		Args:  append([]string{"claude", "--session-id", spec.Session}, flags...),
		Stdin: spec.TaskFile,
		Env: []string{
			"ANTHROPIC_BASE_URL=" + spec.BaseURL,
			key + "=" + spec.Token,
			"CLAUDE_CONFIG_DIR=" + claudeHome,
			"IS_SANDBOX=1", // allows --dangerously-skip-permissions as root
			"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1",
			"DISABLE_AUTOUPDATER=1",
			// The default of 128,000 would be reserved from the budget for
			// every call in flight.
			"CLAUDE_CODE_MAX_OUTPUT_TOKENS=32000",
			// A stream that stalls is dropped after two minutes, not five.
			"CLAUDE_ENABLE_BYTE_WATCHDOG=1",
			"CLAUDE_BYTE_STREAM_IDLE_TIMEOUT_MS=120000",
		},
	}
	if spec.Patient {
		// A gateway that waits for more money answers 503 every few minutes.
		// With this, Claude Code was seen to go on trying, at most 40 s apart
		// and 300 times by its own account, where it else gives up after 10;
		// after 429 it would wait for up to six minutes.
		cmd.Env = append(cmd.Env, "CLAUDE_CODE_RETRY_WATCHDOG=1")
	}
	if spec.Resume {
		cmd.Args = append([]string{"/bin/sh", "-c", resumeClaude, "claude", spec.Session, spec.TaskFile, goOn}, flags...)
		cmd.Stdin = ""
	}
	return cmd
}

// Decode reads a line of stream-json.
func (Claude) Decode(line []byte) []Event { return decodeStream(line) }

// Judge goes by what claude says of its end; see [Agent].
func (c Claude) Judge(sum Summary, stderr string, exitCode int) Outcome {
	return judgeStream(c, sum, stderr, exitCode)
}
