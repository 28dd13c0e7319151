package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
)

// The groups under which help lists the commands.
const (
	groupRuns    = "runs"
	groupWork    = "work"
	groupService = "service"
)

const usageTemplate = `Usage:{{if .HasAvailableSubCommands}}
  {{.CommandPath}} COMMAND{{else}}
  {{.UseLine}}{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableSubCommands}}{{$cmds := .Commands}}{{range $group := .Groups}}

{{.Title}}{{range $cmds}}{{if (and (eq .GroupID $group.ID) .IsAvailableCommand)}}
  {{rpad .Name .NamePadding }} {{.Short}}{{end}}{{end}}{{end}}

{{if .Groups}}Other commands:{{else}}Commands:{{end}}{{range $cmds}}{{if (and (eq .GroupID "") .IsAvailableCommand)}}
  {{rpad .Name .NamePadding }} {{.Short}}{{end}}{{end}}{{end}}{{if .HasHelpSubCommands}}

Topics:{{range .Commands}}{{if .IsAdditionalHelpTopicCommand}}
  {{rpad .Name .NamePadding }} {{.Short}}{{end}}{{end}}{{end}}{{if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsagesWrapped 80 | trimTrailingWhitespaces}}{{end}}{{if .HasAvailableInheritedFlags}}

Flags of every command:
{{.InheritedFlags.FlagUsagesWrapped 80 | trimTrailingWhitespaces}}{{end}}{{if .HasAvailableSubCommands}}

See "{{.CommandPath}} COMMAND --help" for more about a command.{{end}}
`

// newRoot makes the whole tree of commands. Nothing dear happens until one of
// them runs.
func newRoot(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   program,
		Short: "Run coding agents side by side, each in its own sandbox",
		Long: `Run coding agents side by side, each in its own sandbox.

One command gives a repository and a task to any number of agents ("forks"),
watches the money, survives the death of any process, and hands back branches
that you can compare and take.` + exits(exitOK, exitUsage) + `

See "` + program + ` help exit-codes" for those of the commands.`,
		Example: `  sandbox-temporal fork . --prompt "make the tests pass" --forks 3 --budget 5
  sandbox-temporal status @last
  sandbox-temporal apply @last/2`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE:          onlyCommands,
	}
	cmd.SetIn(env.Stdin)
	cmd.SetOut(env.Stdout)
	cmd.SetErr(env.Stderr)
	cmd.SetUsageTemplate(usageTemplate)
	cmd.SetFlagErrorFunc(flagError(cmd, env.Args))
	cmd.AddGroup(
		&cobra.Group{ID: groupRuns, Title: "Runs:"},
		&cobra.Group{ID: groupWork, Title: "What came of them:"},
		&cobra.Group{ID: groupService, Title: "Machinery:"},
	)

	f := cmd.PersistentFlags()
	f.Var(newChoice(&env.Globals.Color, "auto", "always", "never"), "color", "whether to use colours; NO_COLOR is honoured")
	f.String("config", "", "read settings from this `FILE`")
	f.String("home", "", "keep everything in this `FOLDER`")
	f.String("address", "", "use Temporal at `HOST:PORT` and not the engine of this host")
	f.String("namespace", "default", "the `NAME` of Temporal's namespace")
	f.String("profile", "", "use the profile `NAME` of Temporal's configuration file")
	cmd.PersistentPreRunE = env.configure

	cmd.AddCommand(
		newFork(env, nil), newPrepare(env, nil), newStatus(env, nil), newList(env, nil), newCancel(env, nil), newPause(env, nil), newResume(env, nil), newBudget(env),
		newLogs(env, nil), newDiff(env, nil), newApply(env, nil), newSpending(env, nil), newAttach(env, nil), newForward(env, nil),
		newCleanup(env, nil), newStopCleanup(env, nil), newDoctor(env, nil), newProviders(env, nil), newBases(env), newPrices(env, nil),
		newConfig(env), newVersion(env, nil),
		topicExitCodes(), topicEnvironment(),
	)
	for _, add := range env.Commands {
		cmd.AddCommand(add(env))
	}
	cmd.SetHelpCommand(newHelp(cmd))
	cmd.InitDefaultHelpCmd()
	cmd.InitDefaultCompletionCmd()
	explainCompletion(cmd)
	return cmd
}

// settingsKey annotates a command with the flags of its own that are settings:
// what configure loads them with.
const settingsKey = "settings"

// noSettings is the annotation of a command that works without any, and so
// with a broken configuration file too.
const noSettings = "-"

// settings returns the annotation of a command whose flags of these names set
// what the configuration file can set too.
func settings(flags ...string) map[string]string {
	return map[string]string{settingsKey: strings.Join(flags, " ")}
}

// configure finds out how the program was set up, before a command runs.
func (env *Env) configure(cmd *cobra.Command, _ []string) error {
	own := ""
	for at := cmd; at != nil; at = at.Parent() {
		if s, ok := at.Annotations[settingsKey]; ok {
			own = s
			break
		}
	}
	if own == noSettings || !cmd.HasParent() {
		return nil
	}
	return env.load(cmd, strings.Fields(own)...)
}

// load reads the configuration with the flags of cmd that are settings: those
// of every command, and its own.
func (env *Env) load(cmd *cobra.Command, own ...string) error {
	var given []config.Flag
	for _, name := range append([]string{"config", "home", "address", "namespace", "profile"}, own...) {
		f := cmd.Flags().Lookup(name)
		if f == nil || !f.Changed {
			continue
		}
		values := []string{f.Value.String()}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values = list.GetSlice()
		}
		given = append(given, config.Flag{Name: name, Values: values})
	}
	var err error
	env.Globals.Config, err = config.Load(env.Getenv, given...)
	return err
}

// onlyCommands is what a command does that has nothing but commands below it.
func onlyCommands(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return unknownCommand(cmd, args[0])
	}
	return cmd.Help()
}

// unknownCommand is the error of a word that is no command below parent.
func unknownCommand(parent *cobra.Command, word string) error {
	hint := fmt.Sprintf("See: %s --help", parent.CommandPath())
	parent.SuggestionsMinimumDistance = 2
	if near := parent.SuggestionsFor(word); len(near) > 0 {
		hint = fmt.Sprintf("Did you mean %s? %s", strings.Join(near, " or "), hint)
	}
	return usage(hint, "%s has no command %q", parent.CommandPath(), word)
}
