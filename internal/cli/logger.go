package cli

import (
	"io"
	"log/slog"
	"net/url"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// serviceFlags are the settings of every process that serves: engine and
// worker.
var serviceFlags = []string{"metrics-host", "metrics-port", "disable-metrics", "log-level", "log-format", "log-file", "budget-per-day", "allow-unpriced"}

// addServiceFlags adds them.
func addServiceFlags(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.String("metrics-host", "127.0.0.1", "the `ADDRESS` that metrics and health are served on; 0.0.0.0: all")
	fs.Int("metrics-port", 9090, "the `PORT` of metrics and health; 0: any free one")
	fs.Bool("disable-metrics", false, "serve neither metrics nor health")
	fs.String("log-level", "info", "the least `LEVEL` that is logged: debug, info, warn or error")
	fs.String("log-format", "text", "the `FORMAT` of the log: text or json")
	fs.String("log-file", "", "log to this `FILE` and not to standard error")
	dayFlag(cmd)
	unpricedFlag(cmd)
}

// A keeper knows what must stand in no line of the log. It is filled in as
// secrets come to be known.
type keeper struct {
	mu    sync.Mutex
	fixed []string
	vault *vault
}

func (k *keeper) hold(v *vault) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.vault = v
}

func (k *keeper) texts() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.vault == nil {
		return k.fixed
	}
	return append(k.vault.secrets().Texts(), k.fixed...)
}

func logFileFault(err error) error {
	return fault.New("log file", fault.Denied, "%w", err).
		Hinted("Set --log-file (SANDBOX_TEMPORAL_LOG_FILE, log_file) to a file that can be written, or leave it out.")
}

// logger opens the log of an engine or a worker. The returned function closes
// it.
func (p *plugged) logger(cfg *config.Config) (*slog.Logger, *keeper, func(), error) {
	k := &keeper{}
	if s, err := config.ReadSecrets(p.env.Getenv); err == nil {
		k.fixed = s.Texts()
	}
	if key := p.env.Getenv("TEMPORAL_API_KEY"); key != "" {
		k.fixed = append(k.fixed, key)
	}
	if u, err := url.Parse(string(cfg.LedgerURL)); err == nil && u.User != nil {
		if password, set := u.User.Password(); set {
			k.fixed = append(k.fixed, password)
		}
	}
	to, done := io.Writer(p.env.Stderr), func() {}
	if cfg.LogFile != "" {
		f, err := os.OpenFile(cfg.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, nil, nil, logFileFault(err)
		}
		to, done = f, func() { _ = f.Close() }
	}
	return logs.New(to, logs.Options{Format: cfg.LogFormat, Level: cfg.LogLevel, Secrets: k.texts}), k, done, nil
}
