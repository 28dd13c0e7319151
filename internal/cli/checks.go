package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"
	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/host"
)

// askTime bounds how long doctor waits for one answer.
const askTime = 5 * time.Second

// programs looks for the agents' own programs. Only the one that runs use when
// nobody names another is missed.
func (c *checkup) programs(cfg *config.Config, find func(string) (string, error)) {
	for _, a := range agent.All() {
		need := a.Program()
		if need.Name == "" || need.Name == program {
			continue
		}
		path, err := find(need.Name)
		switch {
		case err == nil:
			c.add(need.Name, nil, path)
		case a.Name() == cfg.Fork.Agent:
			c.poor(need.Name, fmt.Sprintf("the program of the agent %q is not on PATH", a.Name()), "Install it with: "+need.Install+"; or use --agent mini.")
		}
	}
}

// credentials looks which are set here, or were lent to the engine before.
func (c *checkup) credentials(ctx context.Context, cfg *config.Config, getenv func(string) string) {
	const model = "model key"
	here, err := config.ReadSecrets(getenv)
	if err != nil {
		c.add(model, err, "")
		return
	}
	all := here
	if v, err := openVault(cfg.Home, getenv); err != nil {
		c.add("kept credentials", err, "")
	} else {
		all = v.secrets()
	}
	where := func(here config.Secret) string {
		if here != "" {
			return "set"
		}
		return "lent by an earlier command"
	}
	switch {
	case here.AnthropicKey != "" || here.AnthropicAuthToken != "" || here.OpenAIKey != "":
		c.add(model, nil, "set")
	case all.AnthropicKey != "" || all.AnthropicAuthToken != "" || all.OpenAIKey != "":
		c.add(model, nil, where(""))
	default:
		c.poor(model, "neither ANTHROPIC_API_KEY nor ANTHROPIC_AUTH_TOKEN nor OPENAI_API_KEY is set", "Set one of them; the engine keeps the one that a fork command gave it.")
	}
	if all.GitHubToken != "" {
		c.add("git token", nil, where(here.GitHubToken)+", for "+all.GitHubServer)
	} else {
		c.add("git token", nil, "not set; public and local repositories need none, private ones GITHUB_TOKEN")
	}
	// An address that somebody chose is asked whether it is there. The maker's
	// own is not: doctor sends nothing out of this host by itself.
	for name, base := range map[string]string{"ANTHROPIC_BASE_URL": all.AnthropicBaseURL, "OPENAI_BASE_URL": all.OpenAIBaseURL} {
		if base != "" {
			c.reach(ctx, name, base)
		}
	}
}

func (c *checkup) reach(ctx context.Context, name, base string) {
	u, err := url.Parse(base)
	if err != nil {
		c.add(name, fault.New("", fault.Invalid, "it is no address").Hinted("Set %s to an address that begins with https://.", name), "")
		return
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	at := net.JoinHostPort(u.Hostname(), port)
	conn, err := (&net.Dialer{Timeout: askTime}).DialContext(ctx, "tcp", at)
	if err != nil {
		c.poor("model API", fmt.Sprintf("%s, which %s names, cannot be reached: %v", at, name, err), "Check "+name+", and the way out of this host.")
		return
	}
	_ = conn.Close()
	c.add("model API", nil, at+" can be reached")
}

// ledger looks whether the books can be opened.
func (c *checkup) ledger(ctx context.Context, cfg *config.Config, open func(context.Context, Globals) (Books, error)) {
	const name = "ledger"
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	books, err := open(ctx, Globals{Config: cfg})
	switch fault.KindOf(err) {
	case fault.NotFound:
		c.add(name, nil, "none yet; the first start of an engine or a worker makes it")
		return
	case fault.Unsupported: // of another version; the message says which, and what to do
		c.poor(name, err.Error(), fault.HintOf(err))
		return
	}
	if err == nil {
		err = books.Close()
	}
	where := "a file of the state folder"
	if cfg.LedgerURL != "" {
		where = "the database that ledger_url names"
	}
	c.add(name, err, "can be read, in "+where)
}

// artifacts tries the store: who can open it may still not write to it.
func (c *checkup) artifacts(ctx context.Context, cfg *config.Config, secrets func() config.Secrets) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	store, err := host.Artifacts(ctx, cfg.Home, cfg.Artifacts, storeKeys(cfg, secrets),
		artifact.WithPause(func(int) time.Duration { return askTime / 50 }))
	if err == nil {
		err = errors.Join(store.Try(ctx), store.Close())
	}
	where := "a folder of the state folder"
	if cfg.Artifacts != "" {
		where = cfg.Artifacts
	}
	c.add("artifacts", err, "can be written, read and removed, in "+where)
}

// logFile looks whether the log can be written, without making it.
func (c *checkup) logFile(cfg *config.Config) {
	if cfg.LogFile == "" {
		return
	}
	at := cfg.LogFile
	if _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) {
		at = filepath.Dir(at)
	}
	err := unix.Access(at, unix.W_OK)
	if err != nil {
		err = logFileFault(&fs.PathError{Op: "write", Path: at, Err: err})
	}
	c.add("log file", err, cfg.LogFile)
}

// port looks whether an engine could have it.
func (c *checkup) port(ctx context.Context, name, host string, port int, setting string) {
	err := free(ctx, host, port)
	if err != nil {
		err = fault.New("", fault.Conflict, "%w", err).Hinted("Choose another with %s; 0 is any free one.", setting)
	}
	c.add(name, err, numbered(port))
}

// metricsPort looks whether metrics could be served. Runs do without.
func (c *checkup) metricsPort(ctx context.Context, cfg *config.Config) {
	const name = "metrics port"
	if cfg.DisableMetrics {
		c.add(name, nil, "no metrics and no health, as DISABLE_METRICS wants it")
		return
	}
	if err := free(ctx, cfg.MetricsHost, cfg.MetricsPort); err != nil {
		err = host.MetricsFault(cfg.MetricsHost, cfg.MetricsPort, err)
		c.poor(name, err.Error(), fault.HintOf(err))
		return
	}
	c.add(name, nil, numbered(cfg.MetricsPort))
}

func free(ctx context.Context, host string, port int) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err == nil {
		_ = ln.Close()
	}
	return err
}

func numbered(port int) string {
	if port == 0 {
		return "any free one"
	}
	return fmt.Sprintf("%d is free", port)
}

// ready asks a running engine whether it takes work.
func (c *checkup) ready(ctx context.Context, cfg *config.Config, ep endpoint.Endpoint) {
	const name = "readiness"
	for _, text := range ep.Lacks {
		c.poor("metrics", text, "")
	}
	if ep.Metrics == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	at := strings.TrimSuffix(ep.Metrics, "/metrics") + "/readyz"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		c.poor(name, err.Error(), "")
		return
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		c.poor(name, fmt.Sprintf("%s does not answer: %v", at, err), fmt.Sprintf("Look at %s.", filepath.Join(cfg.Home, engineLog)))
		return
	}
	defer res.Body.Close()
	said, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	if err != nil || res.StatusCode != http.StatusOK {
		c.add(name, fault.New("", fault.Unavailable, "%s says %s: %s", at, res.Status, fork.Cut(strings.TrimSpace(string(said)), 500)).
			Hinted("Look at %s.", filepath.Join(cfg.Home, engineLog)), "")
		return
	}
	c.add(name, nil, "the engine takes work")
}

// pollers counts who waits for workflow tasks on a queue.
func pollers(ctx context.Context, c client.Client, queue string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	d, err := c.DescribeTaskQueue(ctx, queue, enumspb.TASK_QUEUE_TYPE_WORKFLOW)
	if err != nil {
		return 0, err
	}
	return len(d.GetPollers()), nil
}
