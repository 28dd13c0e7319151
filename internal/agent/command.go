package agent

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Shell is the agent "command": any program that takes a task, started by a
// shell line of the user. Every line that it prints is an event, and its exit
// code is the verdict.
type Shell struct{}

var _ Agent = Shell{}

const (
	placeholder = "{prompt}"
	promptVar   = "SANDBOX_TEMPORAL_PROMPT"

	// maxArgument bounds a prompt that is given as an argument. Linux takes
	// 128 KiB for one argument (MAX_ARG_STRLEN); the rest is for the words
	// that the user may have put around the prompt.
	maxArgument = 96 << 10
)

// Name returns "command".
func (Shell) Name() string { return "command" }

// Program returns none: what the line needs is in the sandbox already.
func (Shell) Program() Program { return Program{} }

// Model returns "sonnet".
func (Shell) Model() string { return "sonnet" }

// Check refuses an empty line, and a prompt that is too long for the way in
// which the line asks for it.
func (Shell) Check(spec Spec) error {
	switch {
	case strings.TrimSpace(spec.Shell) == "":
		return fault.New("command", fault.Invalid, "no command line given").
			Hinted("Say which program it is: --agent-command 'my-agent {prompt}'.")
	case spec.TaskFile == "":
		return fault.New("command", fault.Invalid, "no file holds the prompt")
	case strings.Contains(spec.Shell, placeholder) && len(spec.Task) > maxArgument:
		return fault.New("command", fault.Invalid, "the prompt has %d bytes, an argument can have %d", len(spec.Task), maxArgument).
			Hinted("Leave {prompt} out of --agent-command: the prompt then comes on standard input, and $SANDBOX_TEMPORAL_PROMPT_FILE names a file that holds it.")
	}
	return nil
}

// Command runs the line with /bin/sh. {prompt} in it stands for the prompt,
// as one argument, inside or outside of quotes. Without {prompt} the prompt
// comes on standard input. Resuming is starting again, in the same workspace.
//
// The prompt never becomes part of the program text: the shell gets it in a
// variable, and {prompt} becomes a reference to it. So a quote or a $(…) in a
// prompt is text and stays text, however the line is written.
func (Shell) Command(spec Spec) Command {
	cmd := Command{
		Args:  []string{"/bin/sh", "-c", spec.Shell},
		Stdin: spec.TaskFile,
		Env: []string{
			"ANTHROPIC_BASE_URL=" + spec.BaseURL,
			"ANTHROPIC_API_KEY=" + spec.Token,
			"SANDBOX_TEMPORAL_PROMPT_FILE=" + spec.TaskFile,
			"SANDBOX_TEMPORAL_MODEL=" + spec.Model,
		},
	}
	if strings.Contains(spec.Shell, placeholder) {
		cmd.Args[2] = substitute(spec.Shell)
		cmd.Stdin = ""
		cmd.Env = append(cmd.Env, promptVar+"="+spec.Task)
	}
	return cmd
}

// substitute replaces {prompt} by a reference to the variable, quoted as the
// place needs. A place that it reads wrongly, in a comment or a here-document,
// can at worst get the prompt split into words.
func substitute(line string) string {
	var b strings.Builder
	around := []byte{0} // what the place stands in, innermost last: 0, a quote, or '(' within $(…)
	for i := 0; i < len(line); {
		c, in := line[i], around[len(around)-1]
		size := 1
		switch {
		case strings.HasPrefix(line[i:], placeholder):
			switch in {
			case '"':
				b.WriteString("${" + promptVar + "}")
			case '\'':
				b.WriteString(`'"${` + promptVar + `}"'`)
			default:
				b.WriteString(`"${` + promptVar + `}"`)
			}
			i += len(placeholder)
			continue
		case c == '\\' && in != '\'' && i+1 < len(line):
			size = 2
		case c == in && c != '(', c == ')' && in == '(':
			around = around[:len(around)-1]
		case in == '\'':
		case strings.HasPrefix(line[i:], "$("):
			around = append(around, '(')
			size = 2
		case in != '"' && (c == '"' || c == '\'' || c == '('):
			around = append(around, c)
		}
		b.WriteString(line[i : i+size])
		i += size
	}
	return b.String()
}

// Decode makes one Text event of a line; a blank one is none.
func (Shell) Decode(line []byte) []Event {
	line = bytes.TrimRight(line, " \t\r")
	if len(bytes.TrimSpace(line)) == 0 {
		return nil
	}
	// Cut before converting: a line may have a megabyte.
	if len(line) > 2*maxEventText {
		line = line[:2*maxEventText]
	}
	return []Event{{Kind: Text, Text: bounded(strings.ToValidUTF8(string(line), "\ufffd"))}}
}

// Judge goes by the exit code. Text is the end of what the program printed.
// Nothing says that trying again could help, so Again is never set.
func (Shell) Judge(sum Summary, stderr string, exitCode int) Outcome {
	o := Outcome{Status: fork.Success, Turns: sum.Turns, Text: sum.Said}
	last := lastWords(stderr)
	if o.Text == "" {
		o.Text = last
	}
	switch {
	case exitCode == 0:
	case killed(exitCode):
		o.fail(fork.Failed, fmt.Sprintf("the agent's command was killed by signal %d", exitCode-128), oomHint(exitCode))
	case exitCode == 126 || exitCode == 127:
		o.fail(fork.Failed, first(last, "the agent's command was not found"),
			"The program must be in the sandbox: install it with --setup or mount it with --mount.")
	default:
		o.fail(fork.Failed, fmt.Sprintf("the agent's command exited with code %d", exitCode), "")
		if last != "" {
			o.Error += ": " + last
		}
	}
	return o.clean()
}
