package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// newHelp makes the "help" command: cobra's own takes a word it does not know
// for a success.
func newHelp(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:         "help [COMMAND|TOPIC]",
		Short:       "Explain a command or a topic",
		Long:        "Help explains a command or a topic, or lists what there is." + exits(exitOK, exitUsage),
		Annotations: settings(noSettings),
		Args:        cobra.ArbitraryArgs,
		Example:     "  sandbox-temporal help fork\n  sandbox-temporal help exit-codes",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
			at, _, err := root.Find(args)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var names []string
			for _, sub := range at.Commands() {
				if strings.HasPrefix(sub.Name(), toComplete) && (sub.IsAvailableCommand() || sub.IsAdditionalHelpTopicCommand()) {
					names = append(names, sub.Name()+"\t"+sub.Short)
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, words []string) error {
			at := root
			for _, word := range words {
				next := child(at, word)
				if next == nil {
					return unknownCommand(at, word)
				}
				at = next
			}
			at.InitDefaultHelpFlag()
			return at.Help()
		},
	}
}

func child(parent *cobra.Command, name string) *cobra.Command {
	for _, sub := range parent.Commands() {
		if sub.Name() == name || sub.HasAlias(name) {
			return sub
		}
	}
	return nil
}

// explainCompletion gives cobra's completion command what ours have.
func explainCompletion(root *cobra.Command) {
	top := child(root, "completion")
	top.Short = "Print the completion script of a shell"
	top.Long = "Completion prints a script that lets your shell complete the commands, flags and\nruns of " + program + "." + exits(exitOK, exitUsage)
	top.Example = "  source <(sandbox-temporal completion bash)"
	top.Annotations = settings(noSettings)
	top.Args, top.RunE = cobra.ArbitraryArgs, onlyCommands
	for _, sub := range top.Commands() {
		sub.Short = "Print the completion script of " + sub.Name()
		sub.Long = strings.TrimSpace(sub.Long) + exits(exitOK, exitUsage)
		sub.Example = "  sandbox-temporal completion " + sub.Name()
		sub.Args = args()
	}
}

// topic makes a page of help that is no command.
func topic(name, short, long string) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Long: long}
	cmd.SetUsageTemplate("")
	return cmd
}

func topicExitCodes() *cobra.Command {
	var b strings.Builder
	b.WriteString("Every command ends with one of these exit codes:\n\n")
	for _, m := range exitMeanings {
		fmt.Fprintf(&b, "%5d  %s\n", m.code, m.text)
	}
	b.WriteString(`
Codes 5, 6 and 7, and 1 for a failed fork, come from the commands that wait for
a run: fork, and status --watch. A run that could not start for a reason of its
own ends with the code of that reason: 3 when the repository or the branch is
not there, 4 when a credential was refused.

An error is one line on standard error that begins with the program's name. The
line after it, where there is one, says what to do.`)
	return topic("exit-codes", "What the exit codes mean", b.String())
}

// variables are the environment variables that users may set.
var variables = []struct{ name, text string }{
	{"ANTHROPIC_API_KEY", "pays for the agents; it never enters a sandbox"},
	{"ANTHROPIC_BASE_URL", "where the model API is, when not at Anthropic"},
	{"E2B_API_KEY", "makes sandboxes at E2B (--provider e2b)"},
	{"GITHUB_TOKEN", "reads private repositories and pushes to them"},
	{"TEMPORAL_ADDRESS", "host:port of a Temporal cluster; unset: the engine on this host"},
	{"TEMPORAL_PROFILE", "a profile of Temporal's own configuration file"},
	{"TEMPORAL_NAMESPACE", "the namespace there (default)"},
	{"TEMPORAL_TASK_QUEUE", "where runs wait (sandbox-orchestration)"},
	{"TEMPORAL_TLS_CERT", "a client certificate, as Temporal Cloud wants one"},
	{"TEMPORAL_TLS_KEY", "the key of that certificate"},
	{"TEMPORAL_API_KEY", "an API key, the other way into Temporal Cloud"},
	{"TEMPORAL_TLS_CA", "the authority that the server's certificate is from"},
	{"TEMPORAL_TLS_SERVER_NAME", "the name that the server has to prove"},
	{"SANDBOX_TEMPORAL_SPARE_SANDBOXES", "local sandboxes to keep ready while runs ask for them (8)"},
	{"SANDBOX_TEMPORAL_PAYLOAD_KEY", "ID:KEY,… that seal what Temporal stores; see codec"},
	{"OTEL_EXPORTER_OTLP_ENDPOINT", "where traces go; unset: nothing is traced"},
	{"METRICS_PORT", "where the engine or worker shows its metrics and health (9090)"},
	{"METRICS_HOST", "the address it shows them on (127.0.0.1); 0.0.0.0 in a container"},
	{"DISABLE_METRICS", "true: show neither"},
	{"SANDBOX_TEMPORAL_HOME", "where everything is kept (~/.local/state/sandbox-temporal)"},
	{"SANDBOX_TEMPORAL_PORT", "the engine's port for Temporal (7233)"},
	{"SANDBOX_TEMPORAL_UI_PORT", "the engine's port for the web UI (8080)"},
	{"SANDBOX_TEMPORAL_CONFIG", "the configuration file (~/.config/sandbox-temporal/config.toml)"},
	{"SANDBOX_TEMPORAL_PRICES", "a file with prices of your own"},
	{"SANDBOX_TEMPORAL_ALLOW_UNPRICED", "true: models without a price may be called, at the dearest price"},
	{"SANDBOX_TEMPORAL_LEDGER_URL", "a PostgreSQL database for the ledger; unset: a file"},
	{"SANDBOX_TEMPORAL_ARTIFACTS", "a folder or URL for transcripts, prompts, bundles; unset: beside the rest"},
	{"SANDBOX_TEMPORAL_BUDGET_PER_DAY", "the most USD that all runs may cost on one day"},
	{"SANDBOX_TEMPORAL_LOG_LEVEL", "debug, info, warn or error, for engine and worker (info)"},
	{"SANDBOX_TEMPORAL_LOG_FORMAT", "text or json, likewise (text)"},
	{"SANDBOX_TEMPORAL_LOG_FILE", "where the lines go; unset: standard error"},
	{"SANDBOX_TEMPORAL_GATEWAY_URL", "where sandboxes on other hosts reach the worker's gateway"},
	{"SANDBOX_TEMPORAL_GATEWAY_LISTEN", "where the gateway answers then (127.0.0.1:8485); none: nowhere here"},
	{"SANDBOX_TEMPORAL_GATEWAY_CERT", "its certificate, a PEM file; without one, it answers on loopback only"},
	{"SANDBOX_TEMPORAL_GATEWAY_KEY", "the key of that certificate"},
	{"SANDBOX_TEMPORAL_DEPLOYMENT", "the label of this installation's sandboxes"},
	{"SANDBOX_TEMPORAL_CLAUDE", "path of the claude program, as --agent-path"},
	{"NO_COLOR", "anything: use no colours"},
}

func topicEnvironment() *cobra.Command {
	var b strings.Builder
	b.WriteString("A flag counts more than a variable, a variable more than the configuration file.\n\n")
	for _, v := range variables {
		fmt.Fprintf(&b, "  %s\n      %s\n", v.name, v.text)
	}
	b.WriteString("\nSee what is in force with: " + program + " config explain")
	return topic("environment", "Which environment variables are read", b.String())
}
