package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// A key is one setting: its names, its standard value, and how it is read and
// shown.
type key struct {
	name     string // in the file
	env      string // empty: no variable sets it
	flag     string // empty: no flag sets it
	standard []string
	list     bool // takes any number of values
	text     bool // takes any text; in the file, it has to be quoted
	hint     string
	set      func(c *Config, l *loader, values []string) error
	show     func(c *Config) string
}

// keys is the one list of settings, in the order in which they are explained.
var keys = []key{
	pathKey("home", "SANDBOX_TEMPORAL_HOME", "home", func(c *Config) *string { return &c.Home }),
	portKey("port", "SANDBOX_TEMPORAL_PORT", "port", 7233, func(c *Config) *int { return &c.Port }),
	portKey("ui_port", "SANDBOX_TEMPORAL_UI_PORT", "ui-port", 8080, func(c *Config) *int { return &c.UIPort }),
	textKey("metrics_host", "METRICS_HOST", "metrics-host", "127.0.0.1", `Use an address of this host, such as 127.0.0.1, or 0.0.0.0 for all of them.`, hostname, func(c *Config) *string { return &c.MetricsHost }),
	portKey("metrics_port", "METRICS_PORT", "metrics-port", 9090, func(c *Config) *int { return &c.MetricsPort }),
	boolKey("disable_metrics", "DISABLE_METRICS", "disable-metrics", func(c *Config) *bool { return &c.DisableMetrics }),

	textKey("temporal_address", "TEMPORAL_ADDRESS", "address", "", `Use host:port, as localhost:7233 is.`, address, func(c *Config) *string { return &c.TemporalAddress }),
	textKey("temporal_profile", "TEMPORAL_PROFILE", "profile", "", `Use the name of a profile in Temporal's configuration file.`, nil, func(c *Config) *string { return &c.TemporalProfile }),
	textKey("namespace", "TEMPORAL_NAMESPACE", "namespace", "default", `Use the name of a Temporal namespace.`, needed, func(c *Config) *string { return &c.Namespace }),
	textKey("task_queue", "TEMPORAL_TASK_QUEUE", "task-queue", "sandbox-orchestration", `Use the name of a Temporal task queue.`, needed, func(c *Config) *string { return &c.TaskQueue }),

	textKey("gateway_url", "SANDBOX_TEMPORAL_GATEWAY_URL", "gateway-url", "", `Use an address such as https://gateway.example.com, without a path.`, publicAddress, func(c *Config) *string { return &c.GatewayURL }),
	textKey("gateway_listen", "SANDBOX_TEMPORAL_GATEWAY_LISTEN", "gateway-listen", "127.0.0.1:8485", `Use host:port, as :8443 is, or "none".`, listenAddress, func(c *Config) *string { return &c.GatewayListen }),
	pathKey("gateway_cert", "SANDBOX_TEMPORAL_GATEWAY_CERT", "gateway-cert", func(c *Config) *string { return &c.GatewayCert }),
	pathKey("gateway_key", "SANDBOX_TEMPORAL_GATEWAY_KEY", "gateway-key", func(c *Config) *string { return &c.GatewayKey }),
	textKey("deployment", "SANDBOX_TEMPORAL_DEPLOYMENT", "deployment", "", `Use a short name.`, nil, func(c *Config) *string { return &c.Deployment }),
	pathKey("claude_path", "SANDBOX_TEMPORAL_CLAUDE", "claude-path", func(c *Config) *string { return &c.ClaudePath }),
	pathKey("prices_file", "SANDBOX_TEMPORAL_PRICES", "prices-file", func(c *Config) *string { return &c.PricesFile }),
	boolKey("allow_unpriced", "SANDBOX_TEMPORAL_ALLOW_UNPRICED", "allow-unpriced", func(c *Config) *bool { return &c.AllowUnpriced }),
	levelKey("log_level", "SANDBOX_TEMPORAL_LOG_LEVEL", "log-level"),
	textKey("log_format", "SANDBOX_TEMPORAL_LOG_FORMAT", "log-format", "text", `Use "text" or "json".`, logFormat, func(c *Config) *string { return &c.LogFormat }),
	pathKey("log_file", "SANDBOX_TEMPORAL_LOG_FILE", "log-file", func(c *Config) *string { return &c.LogFile }),
	ledgerKey("ledger_url", "SANDBOX_TEMPORAL_LEDGER_URL"),
	placeKey("artifacts", "SANDBOX_TEMPORAL_ARTIFACTS", func(c *Config) *string { return &c.Artifacts }),
	budgetKey("budget_per_day", "SANDBOX_TEMPORAL_BUDGET_PER_DAY", "budget-per-day", func(c *Config) *fork.USD { return &c.BudgetPerDay }),

	countKey("fork.forks", "forks", 1, fork.MaxForks, func(c *Config) *int { return &c.Fork.Forks }),
	textKey("fork.model", "", "model", "sonnet", `Use an alias such as "sonnet", or the full id of a model.`, needed, func(c *Config) *string { return &c.Fork.Model }),
	countKey("fork.max_concurrent", "max-concurrent", 5, fork.MaxForks, func(c *Config) *int { return &c.Fork.MaxConcurrent }),
	timeoutKey("fork.timeout", "timeout"),
	budgetKey("fork.budget", "", "budget", func(c *Config) *fork.USD { return &c.Fork.Budget }),
	budgetKey("fork.budget_per_fork", "", "budget-per-fork", func(c *Config) *fork.USD { return &c.Fork.BudgetPerFork }),
	textKey("fork.on_budget", "", "on-budget", fork.OnBudgetStop, `Use "stop" or "pause".`, onBudget, func(c *Config) *string { return &c.Fork.OnBudget }),
	textKey("fork.provider", "", "provider", "local", `Use the name of a provider, such as "local".`, needed, func(c *Config) *string { return &c.Fork.Provider }),
	textKey("fork.isolation", "", "isolation", "", `Use the name of a tier, such as "namespaces" or "gvisor".`, nil, func(c *Config) *string { return &c.Fork.Isolation }),
	textKey("fork.agent", "", "agent", "claude", `Use the name of an agent, such as "claude".`, needed, func(c *Config) *string { return &c.Fork.Agent }),
	textKey("fork.agent_command", "", "agent-command", "", `Use a shell line, such as 'my-agent {prompt}'.`, nil, func(c *Config) *string { return &c.Fork.AgentCommand }),
	textKey("fork.credentials", "", "credentials", fork.CredentialsGateway, `Use "gateway" or "direct".`, credentials, func(c *Config) *string { return &c.Fork.Credentials }),
	textKey("fork.egress", "", "egress", "registries", `Use none, registries, open, or names such as registries,example.com.`, needed, func(c *Config) *string { return &c.Fork.Egress }),
	textKey("fork.setup", "", "setup", "", `Use a shell line.`, nil, func(c *Config) *string { return &c.Fork.Setup }),
	textKey("fork.verify", "", "verify", "", `Use a shell line.`, nil, func(c *Config) *string { return &c.Fork.Verify }),
	mountsKey("fork.mounts", "mount"),
	limitKey("fork.memory", "memory", `Use a size with a unit, such as 4GiB, or "auto" for what the provider gives.`, fork.ParseBytes, fork.FormatBytes, func(l *fork.Limits) *int64 { return &l.MemoryBytes }),
	limitKey("fork.cpus", "cpus", `Use a number of cores, such as 1.5, or "auto" for what the provider gives.`, fork.ParseCPUs, fork.FormatCPUs, func(l *fork.Limits) *int64 { return &l.CPUMillis }),
	limitKey("fork.processes", "processes", `Use a whole number, or "auto" for what the provider gives.`, parseCount, formatCount, func(l *fork.Limits) *int64 { return &l.Processes }),
	limitKey("fork.disk", "disk", `Use a size with a unit, such as 20GiB, or "auto" for what the provider gives.`, fork.ParseBytes, fork.FormatBytes, func(l *fork.Limits) *int64 { return &l.DiskBytes }),
}

func index(name string) int {
	return slices.IndexFunc(keys, func(k key) bool { return k.name == name })
}

func isTable(name string) bool {
	return slices.ContainsFunc(keys, func(k key) bool { return strings.HasPrefix(k.name, name+".") })
}

func names() []string {
	var list []string
	for _, k := range keys {
		list = append(list, k.name)
	}
	return list
}

func pathKey(name, env, flag string, field func(*Config) *string) key {
	return key{name: name, env: env, flag: flag, standard: []string{""}, text: true, hint: "Use the path of a file or folder.",
		set: func(c *Config, l *loader, v []string) (err error) {
			if *field(c) = v[0]; v[0] != "" {
				*field(c), err = l.absolute(v[0])
			} else if name == "home" {
				return errors.New("it is empty")
			}
			return err
		},
		show: func(c *Config) string { return *field(c) }}
}

func textKey(name, env, flag, standard, hint string, check func(string) error, field func(*Config) *string) key {
	return key{name: name, env: env, flag: flag, standard: []string{standard}, text: true, hint: hint,
		set: func(c *Config, _ *loader, v []string) error {
			*field(c) = v[0]
			if check == nil {
				return nil
			}
			return check(v[0])
		},
		show: func(c *Config) string { return *field(c) }}
}

// placeKey is a folder, or the URL of a store. A URL is shown as it is, so
// there must be no key in it: keys come from the environment.
func placeKey(name, env string, field func(*Config) *string) key {
	return key{name: name, env: env, standard: []string{""}, text: true,
		hint: "Use the path of a folder, or a URL such as s3://bucket/folder?region=eu-west-1; keys are taken from the environment, as AWS_ACCESS_KEY_ID.",
		set: func(c *Config, l *loader, v []string) (err error) {
			*field(c) = v[0]
			switch {
			case v[0] == "":
				return nil
			case strings.Contains(v[0], "://"):
				return placeURL(v[0])
			}
			*field(c), err = l.absolute(v[0])
			return err
		},
		show: func(c *Config) string { return *field(c) }}
}

// placeURL refuses a URL that holds a secret, without a word of it. What else
// may stand in it, the store itself says.
func placeURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return errors.New("it is no URL")
	}
	if u.User != nil {
		return errors.New("it holds a key or a password")
	}
	for _, values := range u.Query() {
		for _, v := range values {
			if in, err := url.Parse(v); err == nil && in.User != nil {
				return errors.New("it holds a key or a password")
			}
		}
	}
	return nil
}

func portKey(name, env, flag string, standard int, field func(*Config) *int) key {
	return numberKey(name, env, flag, standard, 0, 65535, "Use a port from 1 to 65535, or 0 for any free one.", field)
}

func countKey(name, flag string, standard, most int, field func(*Config) *int) key {
	return numberKey(name, "", flag, standard, 1, most, fmt.Sprintf("Use a number from 1 to %d.", most), field)
}

func numberKey(name, env, flag string, standard, least, most int, hint string, field func(*Config) *int) key {
	return key{name: name, env: env, flag: flag, standard: []string{strconv.Itoa(standard)}, hint: hint,
		set: func(c *Config, _ *loader, v []string) error {
			n, err := strconv.Atoi(v[0])
			if err != nil {
				return fmt.Errorf("%q is not a whole number", v[0])
			}
			if n < least || n > most {
				return fmt.Errorf("%d is out of range", n)
			}
			*field(c) = n
			return nil
		},
		show: func(c *Config) string { return strconv.Itoa(*field(c)) }}
}

func boolKey(name, env, flag string, field func(*Config) *bool) key {
	return key{name: name, env: env, flag: flag, standard: []string{"false"}, hint: "Use true or false.",
		set: func(c *Config, _ *loader, v []string) error {
			switch strings.ToLower(v[0]) {
			case "true", "1", "yes", "on", "y", "t":
				*field(c) = true
			case "false", "0", "no", "off", "n", "f":
				*field(c) = false
			default:
				return fmt.Errorf("%q is neither true nor false", v[0])
			}
			return nil
		},
		show: func(c *Config) string { return strconv.FormatBool(*field(c)) }}
}

func levelKey(name, env, flag string) key {
	return key{name: name, env: env, flag: flag, standard: []string{"info"}, hint: "Use debug, info, warn or error.",
		set: func(c *Config, _ *loader, v []string) error {
			levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
			level, ok := levels[strings.ToLower(v[0])]
			if !ok {
				return fmt.Errorf("%q is no level", v[0])
			}
			c.LogLevel = level
			return nil
		},
		show: func(c *Config) string { return strings.ToLower(c.LogLevel.String()) }}
}

func timeoutKey(name, flag string) key {
	return key{name: name, flag: flag, standard: []string{"7200"}, hint: "Use a number of seconds, or a duration such as 90m.",
		set: func(c *Config, _ *loader, v []string) error {
			s := v[0]
			if _, err := strconv.Atoi(s); err == nil {
				s += "s"
			}
			d, err := time.ParseDuration(s)
			if err != nil {
				return fmt.Errorf("%q is not a duration", v[0])
			}
			if d < time.Second {
				return fmt.Errorf("%q is less than a second", v[0])
			}
			c.Fork.Timeout = d
			return nil
		},
		show: func(c *Config) string { return c.Fork.Timeout.String() }}
}

// noBudget is how a flag lifts a budget that the file sets. 0 is refused: who
// writes "budget = 0" does not mean "without limit".
const noBudget = "none"

func budgetKey(name, env, flag string, field func(*Config) *fork.USD) key {
	return key{name: name, env: env, flag: flag, standard: []string{noBudget}, hint: `Use an amount of dollars above 0, such as 2.50, or "none".`,
		set: func(c *Config, _ *loader, v []string) error {
			*field(c) = 0
			if v[0] == noBudget {
				return nil
			}
			amount, err := fork.ParseUSD(v[0])
			if err != nil {
				return err
			}
			if amount <= 0 {
				return errors.New("a budget of nothing lets nothing run")
			}
			*field(c) = amount
			return nil
		},
		show: func(c *Config) string {
			if *field(c) == 0 {
				return noBudget
			}
			return field(c).String()
		}}
}

func onBudget(s string) error {
	if s != fork.OnBudgetStop && s != fork.OnBudgetPause {
		return fmt.Errorf("%q is neither stop nor pause", s)
	}
	return nil
}

func credentials(s string) error {
	if s != fork.CredentialsGateway && s != fork.CredentialsDirect {
		return fmt.Errorf("%q is neither gateway nor direct", s)
	}
	return nil
}

// ledgerKey is an address that may hold a password, so nothing of it is shown.
func ledgerKey(name, env string) key {
	return key{name: name, env: env, standard: []string{""}, text: true, hint: "Use an address such as postgres://user@host/database.",
		set: func(c *Config, _ *loader, v []string) error {
			if c.LedgerURL = Secret(v[0]); v[0] == "" {
				return nil
			}
			u, err := url.Parse(v[0])
			if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
				return errors.New("it is no address that begins with postgres://")
			}
			return nil
		},
		show: func(c *Config) string {
			if c.LedgerURL == "" {
				return ""
			}
			return c.LedgerURL.String()
		}}
}

// autoLimit leaves a limit to the provider, also when the file sets one.
const autoLimit = "auto"

func limitKey(name, flag, hint string, parse func(string) (int64, error), show func(int64) string, field func(*fork.Limits) *int64) key {
	return key{name: name, flag: flag, standard: []string{autoLimit}, hint: hint,
		set: func(c *Config, _ *loader, v []string) (err error) {
			at := field(&c.Fork.Limits)
			*at = 0
			if v[0] != autoLimit {
				*at, err = parse(v[0])
			}
			return err
		},
		show: func(c *Config) string {
			if n := *field(&c.Fork.Limits); n != 0 {
				return show(n)
			}
			return autoLimit
		}}
}

func parseCount(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a whole number", s)
	}
	if n < 1 {
		return 0, fmt.Errorf("%d is out of range", n)
	}
	return n, nil
}

func formatCount(n int64) string { return strconv.FormatInt(n, 10) }

func mountsKey(name, flag string) key {
	return key{name: name, flag: flag, list: true, hint: "Write a mount as SOURCE or SOURCE:TARGET, with an absolute TARGET.",
		set: func(c *Config, l *loader, values []string) error {
			c.Fork.Mounts = nil
			for _, v := range values {
				source, target, two := strings.Cut(v, ":")
				if source == "" {
					return fmt.Errorf("%q names no source", v)
				}
				abs, err := l.absolute(source)
				if err != nil {
					return err
				}
				if !two {
					target = abs
				}
				if !path.IsAbs(target) || path.Clean(target) == "/" {
					return fmt.Errorf("%q: the target is not an absolute path below /", v)
				}
				c.Fork.Mounts = append(c.Fork.Mounts, fork.Mount{Source: abs, Target: path.Clean(target)})
			}
			return nil
		},
		show: func(c *Config) string {
			var list []string
			for _, m := range c.Fork.Mounts {
				list = append(list, m.Source+":"+m.Target)
			}
			return strings.Join(list, " ")
		}}
}

func needed(s string) error {
	if strings.TrimSpace(s) == "" {
		return errors.New("it is empty")
	}
	return nil
}

func address(s string) error {
	if s == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || port == "" {
		return fmt.Errorf("%q is not host:port, as localhost:7233 is", s)
	}
	return nil
}

// hostname accepts what can be listened on: an address or a name, no port.
func hostname(s string) error {
	if strings.ContainsAny(s, "/@ []") || strings.Contains(s, ":") && net.ParseIP(s) == nil || s == "" {
		return fmt.Errorf("%q is not an address of a host, as 127.0.0.1 is", s)
	}
	return nil
}

func logFormat(s string) error {
	if s != "text" && s != "json" {
		return fmt.Errorf("%q is neither text nor json", s)
	}
	return nil
}

func webAddress(s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("%q is not an address that begins with http:// or https://", s)
	}
	if u.User != nil {
		return errors.New("it holds a password")
	}
	return nil
}

// publicAddress is where others send tokens to, which must not be read on the
// way: plain HTTP is for this host only.
func publicAddress(s string) error {
	if err := webAddress(s); s == "" || err != nil {
		return err
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return err
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("%q is more than a scheme, a host and a port", s)
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return fmt.Errorf("%q is not encrypted", s)
	}
	return nil
}

// NoListener as a GatewayListen leaves the listener out.
const NoListener = "none"

func listenAddress(s string) error {
	if s == NoListener {
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%q is not host:port", s)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 || strings.ContainsAny(host, " /") {
		return fmt.Errorf("%q is not host:port", s)
	}
	return nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// nearest returns the key that a misspelt name was most likely meant to be,
// or "" when none is near.
func nearest(name string) string {
	best, least := "", max(2, len(name)/3)+1
	last := name[strings.LastIndexByte(name, '.')+1:]
	for _, k := range keys {
		// The right name in the wrong table is near too: "budget" alone means
		// "fork.budget".
		d := min(distance(name, k.name), distance(last, k.name[strings.LastIndexByte(k.name, '.')+1:]))
		if d < least {
			best, least = k.name, d
		}
	}
	return best
}

// distance counts the letters to insert, drop or change to get from a to b.
// Case and the choice of dash or underscore count nothing.
func distance(a, b string) int {
	fold := strings.NewReplacer("-", "_")
	a, b = fold.Replace(strings.ToLower(a)), fold.Replace(strings.ToLower(b))
	return fault.Distance(a, b)
}
