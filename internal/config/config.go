// Package config finds out how this program was set up.
//
// A value comes from a flag, else from the environment, else from the file,
// else from the defaults. The file is TOML; a key in it that is not known is
// an error, because a misspelt budget is no budget. Secrets are not part of
// it: see [Secrets].
package config

import (
	"log/slog"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Config is how this program was set up. Only [Load] makes one.
type Config struct {
	Home string // where state is kept; absolute
	File string // the file that was read; empty: there was none

	Port           int    // of the embedded Temporal server; 0: any free one
	UIPort         int    // of its web page; 0: any free one
	MetricsHost    string // address that metrics and health are served on
	MetricsPort    int    // 0: any free one
	DisableMetrics bool   // serve neither metrics nor health

	TemporalAddress string // host:port of a Temporal cluster
	TemporalProfile string // a profile of Temporal's own configuration file; the SDK reads it
	Namespace       string
	TaskQueue       string

	// GatewayURL is where sandboxes on other hosts reach this worker's gateway;
	// empty: they cannot. It answers at GatewayListen, with the certificate and
	// its key where they are named; without, only a proxy on this host reaches it.
	GatewayURL    string
	GatewayListen string // host:port, or NoListener
	GatewayCert   string // PEM files
	GatewayKey    string

	Deployment string // the label of this installation's sandboxes; empty: the one that Home was given
	ClaudePath string // the claude program; empty: looked up on PATH
	PricesFile string // prices that replace the built-in ones; empty: none
	LogLevel   slog.Level
	LogFormat  string // "text" or "json"
	LogFile    string // where the lines go; empty: standard error

	AllowUnpriced bool // models without a price may be called, at the price of the dearest

	// LedgerURL names the PostgreSQL database that the gateway's ledger is in.
	// There may be a password in it. Empty: a file in Home.
	LedgerURL    Secret
	BudgetPerDay fork.USD // for all runs that share a ledger, by UTC; 0: no limit

	// Artifacts is where transcripts, prompts and bundles are: an absolute
	// folder or the URL of a store; empty: a folder in Home.
	Artifacts string

	Fork Defaults

	settings []Setting
}

// Defaults are what a fork command does not need to say.
type Defaults struct {
	Forks         int
	Model         string
	MaxConcurrent int
	Timeout       time.Duration
	Budget        fork.USD // 0: no limit
	BudgetPerFork fork.USD // 0: no limit
	OnBudget      string   // fork.OnBudgetStop or fork.OnBudgetPause
	Provider      string
	Isolation     string // the tier of a local sandbox; empty: the provider's own choice
	Agent         string
	AgentCommand  string // for the agent "command"
	Credentials   string // fork.CredentialsGateway or fork.CredentialsDirect
	Egress        string // what the sandboxes may reach
	Setup         string // a shell line that prepares the base
	Verify        string // a shell line that judges a fork's work
	Mounts        []fork.Mount
	Limits        fork.Limits // of each sandbox
}

// Embedded reports whether commands talk to an engine of this host, because
// no other Temporal was named.
func (c *Config) Embedded() bool { return c.TemporalAddress == "" && c.TemporalProfile == "" }

// IsSet reports whether somebody chose the value of the key, which is named as
// in a [Setting], and it is not just the default.
func (c *Config) IsSet(key string) bool {
	for _, s := range c.settings {
		if s.Key == key {
			return s.Source != standardSource
		}
	}
	return false
}

const standardSource = "default"

// A Setting is one value and where it came from.
type Setting struct {
	Key    string // as in the file; those of a table with its name, as "fork.model"
	Value  string
	Source string // "flag --port", "environment METRICS_PORT", "file /etc/…", "default"
}

// Explain returns every value with its source, in the order of the
// documentation. There are no secrets among them.
func (c *Config) Explain() []Setting { return append([]Setting(nil), c.settings...) }
