package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// vars is an environment.
type vars map[string]string

func (v vars) get(name string) string { return v[name] }

// file writes a configuration file and returns an environment that names it.
func file(t *testing.T, text string) vars {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return vars{"HOME": "/home/u", configEnv: path}
}

func load(t *testing.T, env vars, flags ...Flag) *Config {
	t.Helper()
	c, err := Load(env.get, flags...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	got := load(t, vars{"HOME": "/home/u"})
	want := &Config{
		Home: "/home/u/.local/state/sandbox-temporal",
		Port: 7233, UIPort: 8080, MetricsHost: "127.0.0.1", MetricsPort: 9090,
		Namespace: "default", TaskQueue: "sandbox-orchestration",
		GatewayListen: "127.0.0.1:8485",
		LogLevel:      slog.LevelInfo, LogFormat: "text",
		Fork: Defaults{Forks: 1, Model: "sonnet", MaxConcurrent: 5, Timeout: 2 * time.Hour, OnBudget: "stop", Provider: "local", Agent: "claude", Credentials: "gateway", Egress: "registries"},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !got.Embedded() {
		t.Error("without a Temporal there is no engine")
	}
	for _, s := range got.Explain() {
		if s.Source != "default" || got.IsSet(s.Key) {
			t.Errorf("%+v", s)
		}
	}
}

// TestFlagsBeatEnvironmentBeatsFileBeatsDefaults tries every setting there is,
// at every place that it has.
func TestFlagsBeatEnvironmentBeatsFileBeatsDefaults(t *testing.T) {
	// For each key a value for the file (in TOML), the environment and the
	// flag, and how each is shown.
	samples := map[string]struct{ file, env, flag, shownFile, shownEnv, shownFlag string }{
		"home":                 {`"/f"`, "/e", "/l", "/f", "/e", "/l"},
		"port":                 {`1`, "2", "3", "1", "2", "3"},
		"ui_port":              {`0`, "2", "3", "0", "2", "3"},
		"metrics_host":         {`"10.0.0.1"`, "0.0.0.0", "::1", "10.0.0.1", "0.0.0.0", "::1"},
		"metrics_port":         {`1`, "2", "65535", "1", "2", "65535"},
		"disable_metrics":      {`true`, "no", "YES", "true", "false", "true"},
		"temporal_address":     {`"f:1"`, "e:1", "[::1]:1", "f:1", "e:1", "[::1]:1"},
		"temporal_profile":     {`"f"`, "e", "l", "f", "e", "l"},
		"namespace":            {`"f"`, "e", "l", "f", "e", "l"},
		"task_queue":           {`"f"`, "e", "l", "f", "e", "l"},
		"gateway_url":          {`"https://f"`, "https://e:1", "http://127.0.0.1:1", "https://f", "https://e:1", "http://127.0.0.1:1"},
		"gateway_listen":       {`":1"`, "127.0.0.1:2", "none", ":1", "127.0.0.1:2", "none"},
		"gateway_cert":         {`"/f"`, "/e", "/l", "/f", "/e", "/l"},
		"gateway_key":          {`"/f"`, "/e", "/l", "/f", "/e", "/l"},
		"deployment":           {`"f"`, "e", "l", "f", "e", "l"},
		"claude_path":          {`"~/f"`, "/e", "/l", "/home/u/f", "/e", "/l"},
		"prices_file":          {`"/f"`, "/e", "/l", "/f", "/e", "/l"},
		"log_format":           {`"json"`, "text", "json", "json", "text", "json"},
		"log_file":             {`"/f"`, "/e", "/l", "/f", "/e", "/l"},
		"allow_unpriced":       {`true`, "no", "YES", "true", "false", "true"},
		"log_level":            {`"debug"`, "WARN", "error", "debug", "warn", "error"},
		"ledger_url":           {`"postgres://u:f@h/f"`, "postgresql://u:e@h/e", "", "(set)", "(set)", ""},
		"artifacts":            {`"~/f"`, "s3://bucket/e?region=x", "", "/home/u/f", "s3://bucket/e?region=x", ""},
		"budget_per_day":       {`5`, "2.5", "none", "$5.0000", "$2.5000", "none"},
		"fork.forks":           {`1`, "", "1000", "1", "", "1000"},
		"fork.model":           {`"f"`, "", "l", "f", "", "l"},
		"fork.max_concurrent":  {`2`, "", "3", "2", "", "3"},
		"fork.timeout":         {`90`, "", "2h", "1m30s", "", "2h0m0s"},
		"fork.budget":          {`0.1`, "", "none", "$0.1000", "", "none"},
		"fork.budget_per_fork": {`0.1`, "", "2", "$0.1000", "", "$2.0000"},
		"fork.on_budget":       {`"pause"`, "", "stop", "pause", "", "stop"},
		"fork.provider":        {`"f"`, "", "l", "f", "", "l"},
		"fork.agent":           {`"f"`, "", "l", "f", "", "l"},
		"fork.agent_command":   {`"f {prompt}"`, "", "", "f {prompt}", "", ""},
		"fork.setup":           {`"make"`, "", "", "make", "", ""},
		"fork.verify":          {`"make test"`, "", "", "make test", "", ""},
		"fork.isolation":       {`"f"`, "", "l", "f", "", "l"},
		"fork.credentials":     {`"direct"`, "", "gateway", "direct", "", "gateway"},
		"fork.egress":          {`"none"`, "", "open", "none", "", "open"},
		"fork.memory":          {`"4GiB"`, "", "1.5G", "4GiB", "", "1.5GiB"},
		"fork.cpus":            {`1.5`, "", "auto", "1.5", "", "auto"},
		"fork.processes":       {`500`, "", "4096", "500", "", "4096"},
		"fork.disk":            {`"20 GB"`, "", "20gib", "20GB", "", "20GiB"},
		"fork.mounts":          {`["/a", "~/b:/c/"]`, "", "/l:/m", "/a:/a /home/u/b:/c", "", "/l:/m"},
	}
	for _, k := range keys {
		s, ok := samples[k.name]
		if !ok {
			t.Errorf("no sample for %s", k.name)
			continue
		}
		text := k.name + " = " + s.file
		if table, name, ok := strings.Cut(k.name, "."); ok {
			text = "[" + table + "]\n" + name + " = " + s.file
		}
		env := file(t, text)
		check := func(value, source string, flags ...Flag) {
			t.Helper()
			c := load(t, env, flags...)
			i := slices.IndexFunc(c.Explain(), func(s Setting) bool { return s.Key == k.name })
			want := Setting{k.name, value, source}
			if got := c.Explain()[i]; got != want || !c.IsSet(k.name) {
				t.Errorf("%+v, want %+v", got, want)
			}
			if n := len(slices.DeleteFunc(c.Explain(), func(s Setting) bool { return s.Source == "default" })); n != 1 {
				t.Errorf("%s: %d settings are set", k.name, n)
			}
		}
		check(s.shownFile, "file "+env[configEnv])
		if k.env != "" {
			env[k.env] = ""
			check(s.shownFile, "file "+env[configEnv]) // an empty variable is none
			env[k.env] = " " + s.env + " "
			check(s.shownEnv, "environment "+k.env)
		}
		if k.flag != "" {
			check(s.shownFlag, "flag --"+k.flag, Flag{k.flag, []string{s.flag}})
		}
	}
}

func TestWholeFileIsRead(t *testing.T) {
	env := file(t, `
# A comment.
home = "/srv/state"
port = 7300
temporal_address = "temporal:7233"
log_level = "warn"
ledger_url = "postgres://u:secret@db/ledger"
budget_per_day = 100

[fork]
forks = 3
model = "opus"
timeout = "30m"
budget = 12.345678901
budget_per_fork = 0.5
on_budget = "pause"
setup = """
make deps
make build"""
mounts = ["/usr/local/go"]
`)
	got := load(t, env)
	want := &Config{
		Home: "/srv/state", File: env[configEnv],
		Port: 7300, UIPort: 8080, MetricsHost: "127.0.0.1", MetricsPort: 9090,
		TemporalAddress: "temporal:7233", Namespace: "default", TaskQueue: "sandbox-orchestration",
		GatewayListen: "127.0.0.1:8485",
		LogLevel:      slog.LevelWarn, LogFormat: "text", LedgerURL: "postgres://u:secret@db/ledger", BudgetPerDay: 100 * fork.Dollar,
		Fork: Defaults{Forks: 3, Model: "opus", MaxConcurrent: 5, Timeout: 30 * time.Minute, Budget: 12_345_678_901, BudgetPerFork: fork.Dollar / 2, OnBudget: "pause",
			Provider: "local", Agent: "claude", Credentials: "gateway", Egress: "registries", Setup: "make deps\nmake build", Mounts: []fork.Mount{{Source: "/usr/local/go", Target: "/usr/local/go"}}},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got.Embedded() {
		t.Error("an address was given")
	}
}

func TestPlacesOfTheFileAndOfState(t *testing.T) {
	dir := t.TempDir()
	for _, place := range []string{"xdg/sandbox-temporal", "home/.config/sandbox-temporal"} {
		if err := os.MkdirAll(filepath.Join(dir, place), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, place, "config.toml"), []byte(`deployment = "`+place[:3]+`"`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	home, xdg := filepath.Join(dir, "home"), filepath.Join(dir, "xdg")
	for _, c := range []struct {
		name       string
		env        vars
		deployment string
		state      string
	}{
		{"home", vars{"HOME": home}, "hom", home + "/.local/state/sandbox-temporal"},
		{"xdg", vars{"HOME": home, "XDG_CONFIG_HOME": xdg, "XDG_STATE_HOME": "/s"}, "xdg", "/s/sandbox-temporal"},
		{"relative xdg is ignored", vars{"HOME": home, "XDG_CONFIG_HOME": "xdg", "XDG_STATE_HOME": "s"}, "hom", home + "/.local/state/sandbox-temporal"},
		{"no file", vars{"HOME": "/nowhere"}, "", "/nowhere/.local/state/sandbox-temporal"},
		{"no home", vars{"SANDBOX_TEMPORAL_HOME": "/s"}, "", "/s"},
	} {
		got := load(t, c.env)
		if got.Deployment != c.deployment || got.Home != c.state || (got.File != "") != (c.deployment != "") {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
	named := load(t, vars{"HOME": home, configEnv: "/nowhere"}, Flag{"config", []string{filepath.Join(xdg, "sandbox-temporal", "config.toml")}})
	if named.Deployment != "xdg" {
		t.Errorf("--config: %+v", named)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if c := load(t, vars{"SANDBOX_TEMPORAL_HOME": "here"}); c.Home != filepath.Join(wd, "here") {
		t.Errorf("a relative home became %s", c.Home)
	}
	if c := load(t, vars{"HOME": home, "SANDBOX_TEMPORAL_ARTIFACTS": "here"}); c.Artifacts != filepath.Join(wd, "here") {
		t.Errorf("relative artifacts became %s", c.Artifacts)
	}
}

func TestMisspeltKeyIsAnErrorThatNamesTheRightOne(t *testing.T) {
	for text, want := range map[string]string{
		"prot = 1":                     `"port"`,
		"Port = 1":                     `"port"`,
		"ui-port = 1":                  `"ui_port"`,
		"budget = 10":                  `"fork.budget"`,
		"max_concurent = 10":           `"fork.max_concurrent"`,
		"[fork]\nbugdet = 10":          `"fork.budget"`,
		"[fork]\nport = 10":            `"port"`,
		"[Fork]\nbudget = 10":          `"fork.`,
		"[forks]\nbudget = 10":         `"fork.`,
		"xyzzy_nothing_like_it = true": "home, port",
		"[fork.model]\nname = 'x'":     "",
		"anthropic_api_key = 'sk-123'": "The settings are",
	} {
		env := file(t, text)
		_, err := Load(env.get)
		name, _, _ := strings.Cut(text, " =")
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), env[configEnv]) || !strings.Contains(fault.HintOf(err), want) {
			t.Errorf("%s: %v (hint %q)", name, err, fault.HintOf(err))
			continue
		}
		if strings.Contains(err.Error()+fault.HintOf(err), "sk-123") {
			t.Errorf("the error shows the value: %v", err)
		}
	}
}

func TestBadValuesAreRefusedByName(t *testing.T) {
	type where struct{ text, env, flag, value string }
	for _, c := range []struct {
		where
		want string // in the error's text
	}{
		{where{text: `port = 70000`}, `"port" in /`},
		{where{text: `port = -1`}, `"port" in /`},
		{where{text: `port = "http"`}, `"port" in /`},
		{where{text: `port = 7233.5`}, `"port" in /`},
		{where{text: `port = [1]`}, `"port" in /`},
		{where{text: `port = ["1"]`}, `"port" in /`},
		{where{text: `port = 2020-01-01`}, `"port" in /`},
		{where{text: `metrics_host = "a:1"`}, `"metrics_host" in /`},
		{where{text: `metrics_host = "http://a"`}, `"metrics_host" in /`},
		{where{text: `log_format = "xml"`}, `"log_format" in /`},
		{where{text: `home = 5`}, `"home" in /`},
		{where{text: `home = ""`}, `"home" in /`},
		{where{text: `namespace = ""`}, `"namespace" in /`},
		{where{text: `disable_metrics = "maybe"`}, `"disable_metrics" in /`},
		{where{text: "[fork]\nmodel = true"}, `"fork.model" in /`},
		{where{text: "[fork]\nbudget = 0"}, `"fork.budget" in /`},
		{where{text: "budget_per_day = 0"}, `"budget_per_day" in /`},
		{where{text: "[fork]\nbudget_per_fork = 0"}, `"fork.budget_per_fork" in /`},
		{where{text: "[fork]\non_budget = 'ask'"}, `"fork.on_budget" in /`},
		{where{text: "ledger_url = 'mysql://u:secret@h/d'"}, `"ledger_url" in /`},
		{where{text: "artifacts = 's3://u:secret@bucket'"}, `"artifacts" in /`},
		{where{text: "artifacts = 's3://bucket?endpoint=http://u:secret@h'"}, `"artifacts" in /`},
		{where{text: "artifacts = 's3://secret:%zz@bucket'"}, `"artifacts" in /`},
		{where{text: "[fork]\nbudget = -1"}, `"fork.budget" in /`},
		{where{text: "[fork]\nbudget = nan"}, `"fork.budget" in /`},
		{where{text: "[fork]\nbudget = 1e300"}, `"fork.budget" in /`},
		{where{text: "[fork]\nbudget = '10 dollars'"}, `"fork.budget" in /`},
		{where{text: "[fork]\ntimeout = 0"}, `"fork.timeout" in /`},
		{where{text: "[fork]\ntimeout = 'soon'"}, `"fork.timeout" in /`},
		{where{text: "[fork]\nforks = 0"}, `"fork.forks" in /`},
		{where{text: "[fork]\nforks = 1001"}, `"fork.forks" in /`},
		{where{text: "[fork]\nmounts = '/a'"}, `"fork.mounts" in /`},
		{where{text: "[fork]\nmounts = [1]"}, `"fork.mounts" in /`},
		{where{text: "[fork]\nmounts = ['/a:b']"}, `"fork.mounts" in /`},
		{where{text: "[fork]\nmounts = ['/a:/']"}, `"fork.mounts" in /`},
		{where{text: "[fork]\nmounts = [':/a']"}, `"fork.mounts" in /`},
		{where{text: "[fork]\nmemory = 4"}, `"fork.memory" in /`},
		{where{text: "[fork]\nmemory = 'much'"}, `"fork.memory" in /`},
		{where{text: "[fork]\ncpus = 'all'"}, `"fork.cpus" in /`},
		{where{text: "[fork]\ncpus = -1"}, `"fork.cpus" in /`},
		{where{text: "[fork]\nprocesses = 1.5"}, `"fork.processes" in /`},
		{where{text: "[fork]\nprocesses = 0"}, `"fork.processes" in /`},
		{where{text: "[fork]\ndisk = '20'"}, `"fork.disk" in /`},
		{where{text: "port = "}, "line 1"},
		{where{text: "port = 1\nport = 2"}, "line 2"},
		{where{text: "fork = 1"}, `"fork"`},
		{where{env: "METRICS_PORT", value: "nine"}, "METRICS_PORT"},
		{where{env: "DISABLE_METRICS", value: "ja"}, "DISABLE_METRICS"},
		{where{env: "TEMPORAL_ADDRESS", value: "localhost"}, "TEMPORAL_ADDRESS"},
		{where{env: "TEMPORAL_ADDRESS", value: ":7233"}, "TEMPORAL_ADDRESS"},
		{where{env: "SANDBOX_TEMPORAL_GATEWAY_URL", value: "gateway:1"}, "SANDBOX_TEMPORAL_GATEWAY_URL"},
		{where{env: "SANDBOX_TEMPORAL_GATEWAY_URL", value: "http://gateway.example.com"}, "SANDBOX_TEMPORAL_GATEWAY_URL"},
		{where{env: "SANDBOX_TEMPORAL_GATEWAY_URL", value: "https://gateway.example.com/v1"}, "SANDBOX_TEMPORAL_GATEWAY_URL"},
		{where{env: "SANDBOX_TEMPORAL_GATEWAY_LISTEN", value: "8443"}, "SANDBOX_TEMPORAL_GATEWAY_LISTEN"},
		{where{text: "[fork]\ncredentials = 'key'"}, `"fork.credentials" in /`},
		{where{env: "SANDBOX_TEMPORAL_LOG_LEVEL", value: "loud"}, "SANDBOX_TEMPORAL_LOG_LEVEL"},
		{where{env: configEnv, value: "/nowhere/config.toml"}, "/nowhere/config.toml"},
		{where{env: configEnv, value: "/"}, "/"},
		{where{flag: "ui-port", value: "x"}, "--ui-port"},
		{where{flag: "port", value: ""}, "--port"},
		{where{flag: "budget", value: "1e3"}, "--budget"},
		{where{flag: "config", value: "/nowhere/config.toml"}, "/nowhere/config.toml"},
	} {
		env := vars{"HOME": "/home/u"}
		var flags []Flag
		switch {
		case c.text != "":
			env = file(t, c.text)
		case c.env != "":
			env[c.env] = c.value
		default:
			flags = []Flag{{c.flag, []string{c.value}}}
		}
		got, err := Load(env.get, flags...)
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), c.want) || got != nil {
			t.Errorf("%+v: %v", c.where, err)
		}
		if fault.HintOf(err) == "" && c.env != configEnv && !strings.HasPrefix(c.text, "fork =") {
			t.Errorf("%+v: no hint", c.where)
		}
	}
	if _, err := Load(vars{}.get); fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_HOME") {
		t.Errorf("without a home: %v", err)
	}
	if _, err := Load(vars{"HOME": "/h"}.get, Flag{"prompt", []string{"x"}}); fault.KindOf(err) != fault.Internal {
		t.Errorf("a flag of nobody: %v", err)
	}
	if _, err := Load(vars{"HOME": "/h"}.get, Flag{"port", nil}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a flag without a value: %v", err)
	}
	big := file(t, "# "+strings.Repeat("x", maxFile))
	if _, err := Load(big.get); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a huge file: %v", err)
	}
}

func TestNamesOfSettingsAreUnique(t *testing.T) {
	seen := map[string]string{}
	for _, k := range keys {
		for _, name := range []string{k.name, k.env, "--" + k.flag} {
			if other, twice := seen[name]; name != "" && name != "--" && twice {
				t.Errorf("%s belongs to %s and to %s", name, other, k.name)
			}
			seen[name] = k.name
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add("port = 1\n[fork]\nbudget = 1.5\nmounts = ['/a:/b']", "80", "yes")
	f.Add("x = {a = [1, {b = 2}]}", "", "")
	f.Add("\xff", "-", "\x00")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text, port, disable string) {
		path := filepath.Join(dir, "fuzz.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(vars{"HOME": "/h", configEnv: path, "METRICS_PORT": port, "DISABLE_METRICS": disable}.get)
		if (c == nil) == (err == nil) {
			t.Fatalf("%+v, %v", c, err)
		}
		if err != nil && fault.KindOf(err) != fault.Invalid {
			t.Fatalf("%v is of kind %s", err, fault.KindOf(err))
		}
		if c != nil && (c.Port < 0 || c.Port > 65535 || c.Fork.Budget < 0 || c.Fork.Forks < 1 || !filepath.IsAbs(c.Home)) {
			t.Fatalf("%+v", c)
		}
	})
}
