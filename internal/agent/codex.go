package agent

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Codex is the Codex CLI of OpenAI, unmodified, inside the sandbox. Facts about
// it were measured with version 0.169.0.
type Codex struct{}

var _ Agent = Codex{}

// codexHome is where Codex keeps its sessions, in the sandbox.
const codexHome = "/home/agent/.codex"

// Name returns "codex".
func (Codex) Name() string { return "codex" }

// Program returns the program "codex". npm's is a script for Node.js that only
// starts the native one.
func (Codex) Program() Program {
	return Program{
		Name: "codex", Install: "npm install -g @openai/codex",
		Native: []string{"../../codex-linux-*/vendor/*/bin/codex", "../node_modules/@openai/codex-linux-*/vendor/*/bin/codex"},
	}
}

// Model returns the model that Codex itself takes by default.
func (Codex) Model() string { return "gpt-6.1-sol" }

// Check refuses a spec without a prompt file.
func (Codex) Check(spec Spec) error { return checkTask("codex", spec) }

// runCodex begins a session. To resume, it goes on with the one that there is,
// or begins it when the process died before it had written anything. The
// arguments are the file of the prompt, the prompt to go on with, "resume" or
// not, and the flags that both share. Codex wants its home to be there.
const runCodex = `task=$1 prompt=$2 how=$3; shift 3
mkdir -p "$CODEX_HOME"
if [ "$how" = resume ] && find "$CODEX_HOME/sessions" -name '*.jsonl' -size +0 2>/dev/null | grep -q .; then
	exec codex exec resume --last "$@" "$prompt" </dev/null
fi
exec codex exec "$@" - <"$task"`

// Command runs codex without a terminal, without questions and without its own
// sandbox: ours is the permission system. The model is reached at spec.BaseURL,
// by the Responses API.
func (Codex) Command(spec Spec) Command {
	flags := []string{
		"--json", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check",
		"-c", `model_provider="sandbox"`,
		"-c", fmt.Sprintf(`model_providers.sandbox={name="sandbox",base_url=%q,env_key="OPENAI_API_KEY",wire_api="responses"}`, strings.TrimRight(spec.BaseURL, "/")+"/v1"),
		// The API would run it, at a price of its own.
		"-c", `web_search="disabled"`,
		"-c", `analytics.enabled=false`,
	}
	if spec.Model != "" {
		flags = append(flags, "--model", first(spec.ModelID, spec.Model))
	}
	how := "begin"
	if spec.Resume {
		how = "resume"
	}
	return Command{
		Args: append([]string{"/bin/sh", "-c", runCodex, "codex", spec.TaskFile, goOn, how}, flags...),
		Env:  []string{"CODEX_HOME=" + codexHome, "OPENAI_API_KEY=" + spec.Token},
	}
}

// codexLine is what we read of one line of "codex exec --json".
type codexLine struct {
	Type     string    `json:"type"`
	ThreadID string    `json:"thread_id"`
	Message  string    `json:"message"` // of an error
	Item     codexItem `json:"item"`
	Error    struct {
		Message string `json:"message"`
	} `json:"error"` // of turn.failed
}

type codexItem struct {
	ID      string `json:"id"`
	Type    string `json:"type"`
	Text    string `json:"text"`
	Message string `json:"message"`
	Command string `json:"command"`
	Output  string `json:"aggregated_output"`
	Exit    *int   `json:"exit_code"`
	Status  string `json:"status"`
	Server  string `json:"server"`
	Tool    string `json:"tool"`
	Query   string `json:"query"`
	Changes []struct {
		Path string `json:"path"`
		Kind string `json:"kind"`
	} `json:"changes"`
}

// Decode reads a line of JSON.
func (Codex) Decode(line []byte) []Event {
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return nil
	}
	var in codexLine
	if line[0] != '{' || !lenient(line, &in) {
		return []Event{{Kind: Other, Text: bounded(strings.ToValidUTF8(string(line), "�"))}}
	}
	switch in.Type {
	case "thread.started":
		return []Event{{Kind: Started, Session: word(in.ThreadID)}}
	case "turn.completed":
		return []Event{{Kind: Ended, End: &Account{Reason: "completed"}}}
	case "turn.failed":
		return []Event{{Kind: Ended, End: &Account{Error: true, Reason: "turn_failed", Text: fork.Cut(in.Error.Message, fork.MaxText)}}}
	case "error":
		return []Event{{Kind: Retry, Text: bounded(in.Message)}}
	case "item.started", "item.completed":
		if e, ok := in.Item.event(in.Type == "item.completed"); ok {
			return []Event{e}
		}
	}
	return []Event{{Kind: Other, Text: word(in.Type) + " " + word(in.Item.Type)}}
}

// event returns what an item is that has begun, or is done. Most are told
// twice; each half has its own kind.
func (i codexItem) event(done bool) (Event, bool) {
	id := word(i.ID)
	switch i.Type {
	case "agent_message":
		return Event{Kind: Text, Message: id, Text: bounded(i.Text)}, done
	case "reasoning":
		return Event{Kind: Think, Message: id, Text: bounded(i.Text)}, done
	case "command_execution":
		if done {
			return Event{Kind: Output, Text: bounded(i.Output), Failed: i.Exit == nil || *i.Exit != 0}, true
		}
		return Event{Kind: Tool, Message: id, Tool: "exec", Text: bounded(i.Command)}, true
	case "file_change":
		var paths []string
		for _, c := range i.Changes[:min(len(i.Changes), maxEvents)] {
			paths = append(paths, word(c.Kind)+" "+c.Path)
		}
		return Event{Kind: Tool, Message: id, Tool: "edit", Text: bounded(strings.Join(paths, ", "))}, done
	case "mcp_tool_call":
		return Event{Kind: Tool, Message: id, Tool: word(i.Tool), Text: word(i.Server)}, !done
	case "web_search":
		return Event{Kind: Tool, Message: id, Tool: "search", Text: bounded(i.Query)}, done
	case "error":
		return Event{Kind: Other, Text: bounded(i.Message)}, true
	}
	return Event{}, false
}

// Judge goes by what codex says of its last turn, and by its exit code when it
// says nothing.
func (c Codex) Judge(sum Summary, stderr string, exitCode int) Outcome {
	if sum.End != nil && !sum.End.Error && exitCode != 0 {
		sum.End = nil // it went on after that, and failed
	}
	return judgeStream(c, sum, stderr, exitCode)
}
