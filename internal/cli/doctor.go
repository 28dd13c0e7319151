package cli

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/charmbracelet/lipgloss"
	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Finding is what one check of doctor found.
type Finding struct {
	Name   string `json:"name"`           // what was looked at, a word or two
	Health Health `json:"health"`         //
	Text   string `json:"text"`           // what was found, one line
	Hint   string `json:"hint,omitempty"` // what to do about it, one sentence
}

// Health is how a finding bears on runs.
type Health string

// The healths.
const (
	Good Health = "ok"
	Poor Health = "warning" // some runs will fail, or be slower or less safe
	Bad  Health = "problem" // no run can succeed
)

// leastGit is the oldest git that works, see package repo.
var leastGit = [2]int{2, 39}

type doctorOptions struct {
	Output string
	Config error // why there is no configuration
}

// newDoctor makes the "doctor" command.
func newDoctor(env *Env, run func(context.Context, *Env, doctorOptions) error) *cobra.Command {
	if run == nil {
		run = runDoctor
	}
	var opts doctorOptions
	cmd := &cobra.Command{
		Use:     "doctor",
		GroupID: groupService,
		Short:   "Look for what would make a run fail",
		Long: `Doctor looks for what would make a run fail: missing programs, missing
credentials, a kernel that cannot isolate, too little room, ports that are
taken, a ledger that cannot be opened, an artifact store that cannot be written,
a Temporal that does not answer. It changes nothing that stays, says what to do
about each problem, and fails when there is one.` + exits(exitOK, exitFailed, exitUsage, exitDetached),
		Example:     "  sandbox-temporal doctor",
		Annotations: settings(noSettings), // one that cannot be read is a finding, not an error
		Args:        args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts.Config = env.load(cmd)
			return run(cmd.Context(), env, opts)
		},
	}
	outputFlag(cmd, &opts.Output)
	return cmd
}

func runDoctor(ctx context.Context, env *Env, opts doctorOptions) error {
	findings := []Finding{checkGit(ctx), checkConfig(env, opts.Config)}
	if opts.Config == nil && env.Doctor != nil {
		findings = append(findings, env.Doctor(ctx, env.Globals)...)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := printFindings(env, findings, opts.Output); err != nil {
		return err
	}
	for _, f := range findings {
		if f.Health == Bad {
			return said{exitFailed}
		}
	}
	return nil
}

func printFindings(env *Env, findings []Finding, output string) error {
	if output == "json" {
		return writeJSON(env.Stdout, findings)
	}
	p := env.paintFor(env.Stdout)
	width := 0
	for _, f := range findings {
		width = max(width, lipgloss.Width(flat(f.Name)))
	}
	var b strings.Builder
	for _, f := range findings {
		colour := map[Health]string{Good: green, Poor: yellow, Bad: red}[f.Health]
		name := flat(f.Name)
		fmt.Fprintf(&b, "%s  %s%s  %s\n", p.in(colour, fmt.Sprintf("%-7s", flat(string(f.Health)))), name, strings.Repeat(" ", width-lipgloss.Width(name)), flat(f.Text))
		if f.Hint != "" {
			fmt.Fprintf(&b, "%s  %s\n", strings.Repeat(" ", 9+width), flat(f.Hint))
		}
	}
	_, err := io.WriteString(env.Stdout, b.String())
	return err
}

func checkConfig(env *Env, err error) Finding {
	const name = "configuration"
	if err != nil {
		return Finding{name, Bad, err.Error(), fault.HintOf(err)}
	}
	if f := env.Globals.Config.File; f != "" {
		return Finding{name, Good, f, ""}
	}
	return Finding{name, Good, "no file; defaults and environment", ""}
}

func checkGit(ctx context.Context) Finding {
	const name = "git"
	hint := fmt.Sprintf("Install git %d.%d or newer.", leastGit[0], leastGit[1])
	cmd := exec.CommandContext(ctx, "git", "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return Finding{name, Bad, err.Error(), hint}
	}
	text := flat(string(out))
	version, ok := gitVersion(text)
	switch {
	case !ok:
		return Finding{name, Poor, fmt.Sprintf("cannot tell how old it is: %s", text), hint}
	case version[0] < leastGit[0] || version[0] == leastGit[0] && version[1] < leastGit[1]:
		return Finding{name, Bad, text + " is too old", hint}
	}
	return Finding{name, Good, text, ""}
}

// gitVersion reads what "git --version" says.
func gitVersion(s string) (v [2]int, ok bool) {
	m := regexp.MustCompile(`^git version (\d{1,4})\.(\d{1,4})`).FindStringSubmatch(s)
	if m == nil {
		return v, false
	}
	for i := range v {
		v[i], _ = strconv.Atoi(m[i+1]) // the expression lets nothing else through
	}
	return v, true
}
