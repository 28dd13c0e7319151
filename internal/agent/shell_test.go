package agent_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// sh carries out the command of the agent "command" with the machine's shell.
func sh(t *testing.T, spec agent.Spec) string {
	t.Helper()
	if err := (agent.Shell{}).Check(spec); err != nil {
		t.Fatal(err)
	}
	c := agent.Shell{}.Command(spec)
	cmd := exec.CommandContext(t.Context(), c.Args[0], c.Args[1:]...)
	cmd.Dir = t.TempDir()
	cmd.Env = append([]string{"PATH=/usr/bin:/bin"}, c.Env...)
	if c.Stdin != "" {
		f, err := os.Open(c.Stdin)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.Stdin = f
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", spec.Shell, err, out)
	}
	if left, _ := os.ReadDir(cmd.Dir); len(left) > 0 {
		t.Errorf("%s: the prompt was executed: it made %s", spec.Shell, left[0].Name())
	}
	return string(out)
}

func shellSpec(t *testing.T, line, prompt string) agent.Spec {
	t.Helper()
	file := filepath.Join(t.TempDir(), "prompt")
	if err := os.WriteFile(file, []byte(prompt), 0o600); err != nil {
		t.Fatal(err)
	}
	return agent.Spec{Shell: line, Task: prompt, TaskFile: file}
}

// nasty is a prompt that would do something if a shell read it as a program.
const nasty = "-n it's \"quoted\" `touch a` $(touch b) ${HOME} \\' \\\" ; touch c & | > d\n* ? [a] {prompt} #é\n"

func TestPromptIsOneArgumentAndNeverAProgram(t *testing.T) {
	for line, want := range map[string]string{
		`printf '<%s>' {prompt}`:                                                   "<" + nasty + ">",
		`printf '<%s>' "{prompt}"`:                                                 "<" + nasty + ">",
		`printf '<%s>' '{prompt}'`:                                                 "<" + nasty + ">",
		`printf '<%s>' --task={prompt} end`:                                        "<--task=" + nasty + "><end>",
		`printf '<%s>' "do: {prompt}!"`:                                            "<do: " + nasty + "!>",
		`printf '<%s>' 'do: {prompt}!'`:                                            "<do: " + nasty + "!>",
		`printf '<%s>' a\"b "c\"" {prompt}`:                                        `<a"b><c">` + "<" + nasty + ">",
		`printf '<%s>' {prompt} {prompt}`:                                          "<" + nasty + "><" + nasty + ">",
		`f() { printf '<%s>' {prompt}; }; set -- x; f y`:                           "<" + nasty + ">",
		`printf '<%s>' "$(printf %s {prompt} | wc -l | tr -d ' ')"`:                "<2>",
		`printf '<%s>' "$(printf "%s" "{prompt}" | wc -l | tr -d ' ')" "{prompt}"`: "<2><" + nasty + ">",
		`(printf '<%s>' "a ) $( (echo b) ) c" "{prompt}")`:                         "<a ) b c><" + nasty + ">",
	} {
		if got := sh(t, shellSpec(t, line, nasty)); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	// Places that are hard to read: whatever comes of them, sh checks that
	// nothing in the prompt was executed.
	for _, line := range []string{
		"# it's\nprintf '%s\\n' '{prompt}'",
		"# \"\nprintf '%s\\n' \"{prompt}\" # '",
		"cat <<EOF\n{prompt}\nEOF\n",
		"cat <<'EOF'\n{prompt}\nEOF\n",
		"printf '%s\\n' `printf %s {prompt}`",
		"printf '%s\\n' \"`printf %s {prompt}`\"",
		`printf '%s\n' "${X:-{prompt}}"`,
		`printf '%s\n' \{prompt}`,
	} {
		sh(t, shellSpec(t, line, nasty))
	}
}

func TestPromptComesOnStandardInputWhenTheLineDoesNotNameIt(t *testing.T) {
	prompt := nasty + strings.Repeat("x", fork.MaxPrompt-len(nasty))
	if got := sh(t, shellSpec(t, "cat", prompt)); got != prompt {
		t.Errorf("%d bytes came, %d were sent", len(got), len(prompt))
	}
	if got := sh(t, shellSpec(t, `cat "$SANDBOX_TEMPORAL_PROMPT_FILE"`, prompt)); got != prompt {
		t.Errorf("%d bytes came, %d were sent", len(got), len(prompt))
	}
}

func TestLongestPromptFitsAnArgument(t *testing.T) {
	prompt := strings.Repeat("x", 96<<10)
	if got := sh(t, shellSpec(t, "/usr/bin/printf %s {prompt}", prompt)); got != prompt {
		t.Errorf("%d bytes came, %d were sent", len(got), len(prompt))
	}
}
