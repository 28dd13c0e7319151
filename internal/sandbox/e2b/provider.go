// Package e2b makes sandboxes at E2B (https://e2b.dev), or at a service that
// speaks its protocol: virtual machines that any worker with the key reaches.
//
// # Layout
//
// A machine of E2B has a user of its own, for whom its template has installed
// the agent. That user is the agent here too. What [sandbox] promises is made
// beside its home by a command of root before the sandbox is given out:
// [sandbox.Workspace], [sandbox.Home], which is $HOME, and
// [sandbox.ProgramDir]. On most templates the user may become root: a sandbox
// of E2B is a machine, and its bounds are those of the machine.
//
// # Processes
//
// What envd is connected to is lost when the connection, envd or the worker
// is. So commands are started detached, in a session of their own, with their
// outputs, process number and exit code in files. Outputs are read by offset;
// nothing hangs on a connection. A shell writes the exit code down, to which a
// command that ended by a signal and one that exited with 128 and its number
// are the same.
//
// # Time
//
// E2B ends a sandbox at its timeout, which may be no further away than the
// plan allows. Who works in a sandbox moves it on, and crosses the plan's end
// by a pause and a resume, which the agent does not notice. The deadline
// itself is a file in the sandbox. A paused sandbox has no timeout: its
// deadline is looked at by who attaches to it.
package e2b

import (
	"context"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// ProviderName is the name of the provider.
const ProviderName = "e2b"

var (
	_ sandbox.Provider    = (*Provider)(nil)
	_ sandbox.Snapshotter = (*Provider)(nil)
	_ sandbox.Pauser      = (*Provider)(nil)
	_ sandbox.Gated       = (*Provider)(nil)
	_ sandbox.Lagger      = (*Provider)(nil)
	_ sandbox.Pricer      = (*Provider)(nil)
)

// Options is what a provider is made of.
type Options struct {
	// Settings are asked for again and again: the key may come, and change,
	// while the provider lives.
	Settings func() Settings

	Dir    string       // where the descriptions of bases are kept; it need not exist
	Logger *slog.Logger // nil: none

	Pace     time.Duration // between two creations; 0: the plan's; less: none
	Lifetime time.Duration // the longest timeout; 0: the plan's
	Queue    time.Duration // how long Create waits for the team's other sandboxes to end; 0: until the sandbox's own deadline
	Margin   time.Duration // how long before its timeout a sandbox that is worked in is given more; 0: a tenth of the lifetime
	Ping     time.Duration // between signs of life on a stream; 0: 15 s. Three without one cut it.
}

// A Provider makes sandboxes. It must be made by [New].
type Provider struct {
	o Options

	mu     sync.Mutex
	last   Settings
	client *client
	keys   map[string]*keyLock
	made   map[string]string // sandboxes that this process made, by key: lists are late
}

// New returns a provider that asks nothing before it is asked.
func New(o Options) *Provider {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Ping == 0 {
		o.Ping = 15 * time.Second
	}
	return &Provider{o: o, keys: map[string]*keyLock{}, made: map[string]string{}}
}

// Name returns [ProviderName].
func (p *Provider) Name() string { return ProviderName }

// Ready reports whether there is a key and the settings make sense.
func (p *Provider) Ready(context.Context) error {
	_, err := p.connect()
	return err
}

// connect returns the client of the settings as they are now.
func (p *Provider) connect() (*client, error) {
	now := p.o.Settings()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client != nil && now == p.last {
		return p.client, nil
	}
	c, err := newClient(now)
	if err != nil {
		return nil, err
	}
	switch {
	case p.o.Pace < 0:
		c.plan.pace = 0
	case p.o.Pace > 0:
		c.plan.pace = p.o.Pace
	}
	if p.o.Lifetime > 0 {
		c.plan.lifetime = p.o.Lifetime
	}
	p.last, p.client = now, c
	return c, nil
}

func (p *Provider) watchdog() watchdog { return watchdog{p.o.Ping, 3 * p.o.Ping} }

func (p *Provider) margin(c *client) time.Duration {
	if p.o.Margin > 0 {
		return p.o.Margin
	}
	return c.plan.lifetime / 10
}

// The metadata of our sandboxes. Labels have a prefix, as the team may have
// sandboxes of others, with words of theirs.
const (
	metaOwner    = "sandbox-temporal"
	metaKey      = "sandbox-temporal.key"
	metaNonce    = "sandbox-temporal.nonce"
	metaBase     = "sandbox-temporal.base"
	metaDeadline = "sandbox-temporal.deadline"
	metaLabel    = "sandbox-temporal.label."
	metaVersion  = "1"
)

func metadata(spec sandbox.Spec, nonce string) map[string]string {
	m := map[string]string{
		metaOwner: metaVersion, metaKey: spec.Key, metaNonce: nonce, metaDeadline: spec.Deadline.UTC().Format(time.RFC3339),
	}
	if spec.Base != "" {
		m[metaBase] = spec.Base
	}
	for k, v := range spec.Labels {
		m[metaLabel+k] = v
	}
	return m
}

func labels(meta map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range meta {
		if name, ok := strings.CutPrefix(k, metaLabel); ok {
			out[name] = v
		}
	}
	return out
}

// List asks E2B for what has the labels.
func (p *Provider) List(ctx context.Context, want map[string]string) ([]sandbox.Info, error) {
	const op = "e2b: list sandboxes"
	c, err := p.connect()
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	filter := map[string]string{metaOwner: metaVersion}
	for k, v := range want {
		filter[metaLabel+k] = v
	}
	all, err := c.list(ctx, filter)
	if err != nil {
		return nil, asFault(op, err)
	}
	var infos []sandbox.Info
	for _, m := range all {
		// Services that do not know the filter say too much.
		have := labels(m.Metadata)
		h := handle{Key: m.Metadata[metaKey], Sandbox: m.ID}
		if m.Metadata[metaOwner] != metaVersion || !sandbox.ValidID(h.Key) || !validMachineID(h.Sandbox) || !sandbox.HasLabels(have, want) {
			continue
		}
		created := m.Started // of the last resume; what was written down is better
		if t, err := time.Parse(time.RFC3339, have[sandbox.LabelCreated]); err == nil && t.Before(created) {
			created = t
		}
		infos = append(infos, sandbox.Info{Ref: h.ref(), Labels: have, Created: created, Paused: m.State == statePaused,
			Size: sandbox.Limits{CPUMillis: 1000 * max(m.CPUs, 0), MemoryBytes: max(m.MemoryMB, 0) << 20}})
	}
	return infos, nil
}

// Attach asks E2B for the sandbox and its token.
func (p *Provider) Attach(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	return p.attach(ctx, "e2b: attach", ref)
}

func (p *Provider) attach(ctx context.Context, op string, ref sandbox.Ref) (*box, error) {
	h, err := readHandle(op, ref)
	if err != nil {
		return nil, err
	}
	c, err := p.connect()
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	m, err := c.get(ctx, h.Sandbox)
	if statusOf(err) == 404 {
		return nil, gone(op, ref.ID)
	}
	if err != nil {
		return nil, asFault(op, err)
	}
	b := &box{p: p, c: c, ref: ref, id: h.Sandbox, first: m.Metadata[metaDeadline], end: m.End}
	b.link.Store(c.envd(m))
	if m.State == statePaused && past(b.first) {
		// Its timeout stands still while it is paused. It may have been given
		// more since it was made: that is written inside.
		over := false
		err := b.awake(ctx, func() (err error) {
			deadline, err := b.deadline(ctx)
			over = time.Now().After(deadline)
			return err
		})
		if err != nil {
			return nil, asFault(op, err)
		}
		if over {
			if err := c.kill(ctx, b.id); err != nil {
				return nil, asFault(op, err)
			}
			return nil, gone(op, ref.ID)
		}
	}
	return b, nil
}

func past(deadline string) bool {
	t, err := time.Parse(time.RFC3339, deadline)
	return err == nil && time.Now().After(t)
}

func gone(op, id string) error {
	return fault.New(op, fault.NotFound, "sandbox %q is gone", id)
}

// Destroy kills the sandbox.
func (p *Provider) Destroy(ctx context.Context, ref sandbox.Ref) error {
	const op = "e2b: destroy sandbox"
	h, err := readHandle(op, ref)
	if err != nil {
		return err
	}
	c, err := p.connect()
	if err != nil {
		return fault.Wrap(op, err)
	}
	if err := c.kill(ctx, h.Sandbox); err != nil {
		return asFault(op, err)
	}
	p.mu.Lock()
	maps.DeleteFunc(p.made, func(key, id string) bool { return key == h.Key && id == h.Sandbox })
	p.mu.Unlock()
	return nil
}

// ListLag is as long as a creation looks for itself in the service's list.
func (p *Provider) ListLag() time.Duration { return 5 * time.Second }

// What E2B takes for an hour, in billionths of a dollar, as its documentation had
// it in August 2026 (https://e2b.dev/docs/faq/calculate-sandbox-price). A paused
// sandbox costs nothing, and the disk is part of the plan.
const (
	priceOfCPU = 50_400_000 // for each of a machine
	priceOfGiB = 16_200_000 // of memory
)

// HourlyPrice is that of E2B itself: what others take who speak its protocol, and
// what a machine costs of which the list does not say how large it is, nobody
// knows.
func (p *Provider) HourlyPrice(info sandbox.Info) (nanoUSD int64, ok bool) {
	s := p.o.Settings()
	if s.APIURL != "" || s.Debug || s.domain() != defaultDomain || info.Size.CPUMillis == 0 || info.Size.MemoryBytes == 0 {
		return 0, false
	}
	if info.Paused {
		return 0, true
	}
	return info.Size.CPUMillis*priceOfCPU/1000 + info.Size.MemoryBytes/(1<<20)*priceOfGiB/1024, true
}
