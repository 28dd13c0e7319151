package agent

// Mini is the built-in agent: this program itself, lent to the sandbox, with
// the smallest real agent loop in it. It speaks Claude Code's stream-json.
type Mini struct{}

var _ Agent = Mini{}

// Name returns "mini".
func (Mini) Name() string { return "mini" }

// Program returns this program. Nothing has to be installed for it.
func (Mini) Program() Program { return Program{Name: "sandbox-temporal"} }

// Model returns "sonnet".
func (Mini) Model() string { return "sonnet" }

// Check refuses a spec without a prompt file or without a session.
func (Mini) Check(spec Spec) error { return checkSession("mini", spec) }

// Command runs the hidden subcommand "mini-agent". The prompt comes on
// standard input, on resumption too: a session that was never begun begins
// with it.
func (Mini) Command(spec Spec) Command {
	session := "--session-id"
	if spec.Resume {
		session = "--resume"
	}
	cmd := Command{
		Args:  []string{"sandbox-temporal", "mini-agent", session, spec.Session},
		Stdin: spec.TaskFile,
		Env: []string{
			"ANTHROPIC_BASE_URL=" + spec.BaseURL,
			"ANTHROPIC_API_KEY=" + spec.Token,
		},
	}
	if spec.Model != "" {
		cmd.Args = append(cmd.Args, "--model", spec.Model)
	}
	return cmd
}

// Decode reads a line of stream-json.
func (Mini) Decode(line []byte) []Event { return decodeStream(line) }

// Judge goes by what the agent says of its end; see [Agent].
func (m Mini) Judge(sum Summary, stderr string, exitCode int) Outcome {
	return judgeStream(m, sum, stderr, exitCode)
}
