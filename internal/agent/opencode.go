package agent

import (
	"bytes"
	"encoding/json"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// OpenCode is the opencode CLI, unmodified, inside the sandbox. Facts about it
// were measured with version 1.18.33.
type OpenCode struct{}

var _ Agent = OpenCode{}

// Name returns "opencode".
func (OpenCode) Name() string { return "opencode" }

// Program returns the program "opencode". npm's is a script for Node.js that
// only starts the native one.
func (OpenCode) Program() Program {
	return Program{
		Name: "opencode", Install: "npm install -g opencode-ai",
		Native: []string{"../../opencode-linux-x64/bin/opencode", "../../opencode-linux-arm64/bin/opencode", "../node_modules/opencode-linux-*/bin/opencode"},
	}
}

// Model returns "sonnet".
func (OpenCode) Model() string { return "sonnet" }

// Check refuses a spec without a prompt file.
func (OpenCode) Check(spec Spec) error { return checkTask("opencode", spec) }

// runOpenCode goes on with the last session when there is one. The arguments
// are the file of the prompt, the prompt to go on with, "resume" or not, and
// the flags that both share.
const runOpenCode = `task=$1 prompt=$2 how=$3; shift 3
if [ "$how" = resume ] && opencode session list 2>/dev/null | grep -q ses_; then
	exec opencode run --continue "$@" "$prompt" </dev/null
fi
exec opencode run "$@" <"$task"`

// Command runs opencode without a terminal and without questions. The prompt
// comes on standard input. Models whose name begins with gpt- are reached by
// OpenAI's Responses API, all others by Anthropic's, both at spec.BaseURL.
func (OpenCode) Command(spec Spec) Command {
	model := first(spec.ModelID, spec.Model)
	provider := "anthropic"
	if strings.HasPrefix(model, "gpt-") {
		provider = "openai"
	}
	// Everything that would ask somebody, or somewhere, is off.
	config, err := json.Marshal(map[string]any{
		"autoupdate":        false,
		"share":             "disabled",
		"enabled_providers": []string{provider},
		"small_model":       provider + "/" + model,
		"provider": map[string]any{provider: map[string]any{
			"options": map[string]string{"baseURL": strings.TrimRight(spec.BaseURL, "/") + "/v1", "apiKey": spec.Token},
			// The catalog that opencode was built with may not have it.
			"models": map[string]any{model: map[string]any{}},
		}},
	})
	if err != nil { // strings only
		panic(err)
	}
	how := "begin"
	if spec.Resume {
		how = "resume"
	}
	return Command{
		Args: []string{"/bin/sh", "-c", runOpenCode, "opencode", spec.TaskFile, goOn, how, "--auto", "--format", "json", "--model", provider + "/" + model},
		Env: []string{
			"OPENCODE_CONFIG_CONTENT=" + string(config), "OPENCODE_DISABLE_MODELS_FETCH=1", "OPENCODE_DISABLE_AUTOUPDATE=1",
			"OPENCODE_DISABLE_LSP_DOWNLOAD=1", "OPENCODE_DISABLE_DEFAULT_PLUGINS=1",
		},
	}
}

// openCodeLine is what we read of one line of "opencode run --format json".
type openCodeLine struct {
	Type      string `json:"type"`
	SessionID string `json:"sessionID"`
	Part      struct {
		MessageID string `json:"messageID"`
		Text      string `json:"text"`
		Tool      string `json:"tool"`
		Reason    string `json:"reason"`
		State     struct {
			Status string          `json:"status"`
			Input  json.RawMessage `json:"input"`
			Output string          `json:"output"`
			Error  string          `json:"error"`
		} `json:"state"`
	} `json:"part"`
	Error struct {
		Name string `json:"name"`
		Data struct {
			Message    string `json:"message"`
			StatusCode int    `json:"statusCode"`
		} `json:"data"`
	} `json:"error"`
}

// Decode reads a line of JSON.
func (OpenCode) Decode(line []byte) []Event {
	line = bytes.TrimSpace(line)
	if len(line) == 0 {
		return nil
	}
	var in openCodeLine
	if line[0] != '{' || !lenient(line, &in) {
		return []Event{{Kind: Other, Text: bounded(strings.ToValidUTF8(string(line), "�"))}}
	}
	p := in.Part
	e := Event{Session: word(in.SessionID), Message: word(p.MessageID)}
	switch in.Type {
	case "text":
		e.Kind, e.Text = Text, bounded(p.Text)
	case "reasoning":
		e.Kind, e.Text = Think, bounded(p.Text)
	case "tool_use":
		e.Kind, e.Tool, e.Text = Tool, word(p.Tool), digest(p.Tool, p.State.Input)
		answer := Event{Kind: Output, Session: e.Session, Text: bounded(first(p.State.Output, p.State.Error)), Failed: p.State.Status == "error"}
		return []Event{e, answer}
	case "step_finish":
		if p.Reason != "stop" {
			e.Kind, e.Text = Other, "step "+word(p.Reason)
			break
		}
		e.Kind, e.End = Ended, &Account{Reason: "completed"}
	case "error":
		e.Kind = Ended
		e.End = &Account{Error: true, Reason: "api_error", APIStatus: max(in.Error.Data.StatusCode, 0), Text: fork.Cut(first(in.Error.Data.Message, in.Error.Name), fork.MaxText)}
	default:
		e.Kind, e.Text = Other, word(in.Type)
	}
	return []Event{e}
}

// Judge goes by what opencode says last, and by its exit code when it says
// nothing.
func (o OpenCode) Judge(sum Summary, stderr string, exitCode int) Outcome {
	return judgeStream(o, sum, stderr, exitCode)
}
