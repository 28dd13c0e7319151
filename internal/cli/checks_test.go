package cli

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// wantFinding checks the last finding.
func wantFinding(t *testing.T, c *checkup, health Health, text, hint string) {
	t.Helper()
	got := c.all[len(c.all)-1]
	if got.Health != health || !strings.Contains(got.Text, text) || !strings.Contains(got.Hint, hint) {
		t.Errorf("%+v, want %s, %q and %q", got, health, text, hint)
	}
	if got.Health != Good && got.Hint == "" {
		t.Errorf("%+v does not say what to do", got)
	}
}

func TestDoctorSaysWhichSettingToChange(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	taken := ln.Addr().(*net.TCPAddr).Port
	ctx, c := t.Context(), &checkup{}
	dir := t.TempDir()
	cfg := &config.Config{Home: dir, MetricsHost: "127.0.0.1", MetricsPort: taken, Fork: config.Defaults{Agent: "claude", MaxConcurrent: 2}}

	c.port(ctx, "port", "127.0.0.1", taken, "--port or SANDBOX_TEMPORAL_PORT")
	wantFinding(t, c, Bad, "address already in use", "SANDBOX_TEMPORAL_PORT")
	c.port(ctx, "port", "127.0.0.1", 0, "--port")
	wantFinding(t, c, Good, "any free one", "")
	c.metricsPort(ctx, cfg)
	wantFinding(t, c, Poor, "METRICS_PORT", "--metrics-port")
	cfg.DisableMetrics = true
	c.metricsPort(ctx, cfg)
	wantFinding(t, c, Good, "DISABLE_METRICS", "")

	cfg.LogFile = filepath.Join(dir, "nowhere", "log")
	c.logFile(cfg)
	wantFinding(t, c, Bad, "no such file", "--log-file")
	cfg.LogFile = filepath.Join(dir, "log")
	c.logFile(cfg)
	wantFinding(t, c, Good, cfg.LogFile, "")

	c.artifacts(ctx, cfg, func() config.Secrets { return config.Secrets{} })
	wantFinding(t, c, Good, "the state folder", "")
	cfg.Artifacts = "s3://bucket?endpoint=http://127.0.0.1:1"
	c.artifacts(ctx, cfg, func() config.Secrets {
		return config.Secrets{Store: config.Store{KeyID: "AKIA0", Secret: "0123456789"}}
	})
	wantFinding(t, c, Bad, "connection refused", "reach it")
	cfg.Artifacts = cfg.LogFile + "/artifacts"
	if err := os.WriteFile(cfg.LogFile, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.artifacts(ctx, cfg, func() config.Secrets { return config.Secrets{} })
	wantFinding(t, c, Bad, "not a directory", "SANDBOX_TEMPORAL_ARTIFACTS")

	c.credentials(ctx, cfg, func(string) string { return "" })
	if got := c.all[len(c.all)-2]; got.Health != Poor || !strings.Contains(got.Text, "ANTHROPIC_API_KEY") {
		t.Errorf("%+v", got)
	}
	env := map[string]string{"ANTHROPIC_API_KEY": "sk-ant-0123456789", "ANTHROPIC_BASE_URL": "http://" + ln.Addr().String()}
	c.credentials(ctx, cfg, func(name string) string { return env[name] })
	wantFinding(t, c, Good, "can be reached", "")
	env["ANTHROPIC_BASE_URL"] = "http://127.0.0.1:1"
	c.credentials(ctx, cfg, func(name string) string { return env[name] })
	wantFinding(t, c, Poor, "cannot be reached", "ANTHROPIC_BASE_URL")

	c.programs(cfg, func(string) (string, error) { return "", fault.New("", fault.NotFound, "no") })
	wantFinding(t, c, Poor, "claude", "--agent mini")

	cfg.Fork.Limits = fork.Limits{MemoryBytes: 1 << 50}
	c.room(cfg)
	wantFinding(t, c, Poor, "2 forks at once", "--max-concurrent")
	for _, f := range c.all {
		if strings.Contains(f.Text+f.Hint, "0123456789") {
			t.Errorf("%+v shows the key", f)
		}
	}
}

func TestALogThatCannotBeWrittenIsRefusedByName(t *testing.T) {
	p := &plugged{env: &Env{Getenv: func(string) string { return "" }}}
	_, _, _, err := p.logger(&config.Config{LogFile: filepath.Join(t.TempDir(), "nowhere", "log")})
	if fault.KindOf(err) != fault.Denied || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_LOG_FILE") {
		t.Errorf("%v (%s)", err, fault.HintOf(err))
	}
}
