package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b"
)

const (
	e2bForks  = 200
	e2bTail   = 15 * time.Second
	e2bSpeaks = 3 * time.Second // an agent says something so often
	aLine     = 1 << 10         // and so much: a line of JSON
)

// talk prints a line and the time, and waits for as long as a file says,
// without starting a program: the machine is not there for those.
var talk = fmt.Sprintf(`exec bash -c 'mkfifo $HOME/wait; exec 3<>$HOME/wait; pad=%s; every=%g
while :; do echo "$EPOCHREALTIME $pad"; [ ! -e $HOME/every ] || read every <$HOME/every; read -t $every <&3; done'`,
	strings.Repeat("x", aLine-len("1700000000.000000 \n")), e2bSpeaks.Seconds())

// A watched provider counts how often its processes are looked at, and sees
// what they say as the worker does.
type watched struct {
	*e2b.Provider
	*seen
}

type seen struct {
	looks, bytes, spoke atomic.Int64

	mu   sync.Mutex
	late series // from saying to seeing
}

func (w watched) Unwrap() sandbox.Provider { return w.Provider }

func (w watched) Attach(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	sb, err := w.Provider.Attach(ctx, ref)
	return watchedSandbox{sb, w.seen}, err
}

type watchedSandbox struct {
	sandbox.Sandbox
	*seen
}

func (w watchedSandbox) Start(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
	p, err := w.Sandbox.Start(ctx, id, cmd)
	return watchedProcess{p, w.seen}, err
}

type watchedProcess struct {
	sandbox.Process
	*seen
}

func (w watchedProcess) Exit(ctx context.Context) (sandbox.Exit, bool, error) {
	w.looks.Add(1)
	return w.Process.Exit(ctx)
}

func (w watchedProcess) ReadAt(ctx context.Context, stream sandbox.Stream, p []byte, offset int64) (int, error) {
	n, err := w.Process.ReadAt(ctx, stream, p, offset)
	if n > 0 {
		w.note(p[:n], offset, time.Now())
	}
	return n, err
}

func (s *seen) note(p []byte, offset int64, now time.Time) {
	if offset == 0 {
		s.spoke.Add(1)
	}
	s.bytes.Add(int64(len(p)))
	for line := range bytes.Lines(p) {
		said, _, _ := strings.Cut(string(line[:min(len(line), 20)]), " ")
		if at, err := strconv.ParseFloat(said, 64); err == nil && len(line) == aLine {
			s.mu.Lock()
			s.late = append(s.late, now.Sub(time.UnixMicro(int64(at*1e6))))
			s.mu.Unlock()
		}
	}
}

// A tailing is what following many forks costs.
type tailing struct {
	every         time.Duration // how often each says something; 0: never
	share, system float64       // of one core
	looks         float64       // a second
	lines         int64
	late          series
}

// tail has the worker's own activity follow many forks at once, whose agents
// first speak as agents do, then more often, and then not at all.
func (c *cloud) tail(ctx context.Context, w *watch) (all []tailing, err error) {
	provider := watched{c.provider, &seen{}}
	acts, key, done, err := newFollower(ctx, filepath.Join(c.dir, "worker"), provider)
	if err != nil {
		return nil, err
	}
	defer done()
	refs, specs := make([]sandbox.Ref, e2bForks), make([]sandbox.Spec, e2bForks)
	for i := range specs {
		specs[i] = c.spec()
	}
	if _, err := parallel(e2bForks, 4, func(i int) (err error) { refs[i], err = c.provider.Create(ctx, specs[i]); return err }); err != nil {
		return nil, err
	}
	following, stop := context.WithCancel(ctx)
	ended := make(chan error, e2bForks)
	begin := make(chan struct{}, 4) // agents are started so many at a time, and followed all at once
	var followers sync.WaitGroup
	for i := range refs {
		followers.Go(func() {
			select {
			case begin <- struct{}{}:
			case <-following.Done():
				ended <- following.Err()
				return
			}
			ended <- follow(following, acts, key, i+1, refs[i])
		})
	}
	defer func() {
		// Nobody asks how the agents end that a benchmark stops.
		_, killErr := parallel(e2bForks, 4, func(i int) error { return c.provider.Destroy(ctx, refs[i]) })
		stop()
		followers.Wait()
		err = errors.Join(err, killErr)
	}()
	for n := int64(0); n < e2bForks; {
		select {
		case err := <-ended:
			return nil, fmt.Errorf("an agent ended: %w", err)
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		for now := provider.spoke.Load(); n < now; n++ {
			<-begin
		}
	}
	for _, every := range []time.Duration{e2bSpeaks, time.Second, 0} {
		if every != e2bSpeaks {
			text := strconv.FormatFloat(every.Seconds(), 'f', -1, 64)
			if every == 0 {
				text = "100000"
			}
			if _, err := parallel(e2bForks, 4, func(i int) error { return c.put(ctx, refs[i], sandbox.Home+"/every", text) }); err != nil {
				return nil, err
			}
		}
		if !pause(ctx, 2*e2bSpeaks) { // until all have read it
			return nil, ctx.Err()
		}
		w.quiet(ctx)
		t, err := provider.measure(ctx, e2bTail)
		if err != nil {
			return nil, err
		}
		t.every = every
		all = append(all, t)
	}
	return all, nil
}

func (c *cloud) put(ctx context.Context, ref sandbox.Ref, name, text string) error {
	sb, err := c.provider.Attach(ctx, ref)
	if err != nil {
		return err
	}
	return errors.Join(sb.Upload(ctx, name, strings.NewReader(text)), sb.Close())
}

// measure looks at what this process uses for a while.
func (s *seen) measure(ctx context.Context, long time.Duration) (t tailing, err error) {
	var before, after syscall.Rusage
	s.mu.Lock()
	s.late = nil
	s.mu.Unlock()
	looks, bytes := s.looks.Load(), s.bytes.Load()
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
		return t, err
	}
	begun := time.Now()
	if !pause(ctx, long) {
		return t, ctx.Err()
	}
	took := time.Since(begun).Seconds()
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
		return t, err
	}
	t.system = float64(after.Stime.Nano()-before.Stime.Nano()) / 1e9 / took
	t.share = t.system + float64(after.Utime.Nano()-before.Utime.Nano())/1e9/took
	t.looks = float64(s.looks.Load()-looks) / took
	t.lines = (s.bytes.Load() - bytes) / aLine
	s.mu.Lock()
	defer s.mu.Unlock()
	t.late = s.late
	return t, nil
}

const followedRun = fork.RunPrefix + "be7cbe7c"

// newFollower returns the activities of a worker with everything that they
// follow agents with, and the key of a prompt.
func newFollower(ctx context.Context, dir string, provider sandbox.Provider) (acts *activities.Activities, key string, done func(), err error) {
	prices, err := gateway.LoadPrices(nil)
	if err != nil {
		return nil, "", nil, err
	}
	g, err := gateway.Open(ctx, gateway.Options{
		Ledger: ledger.Options{Dir: filepath.Join(dir, "gateway")}, Prices: prices,
		Credentials: func(context.Context) (gateway.Credentials, error) { return gateway.Credentials{APIKey: "key"}, nil },
	})
	if err != nil {
		return nil, "", nil, err
	}
	store, err := artifact.Open(ctx, filepath.Join(dir, "artifacts"))
	if err != nil {
		return nil, "", nil, errors.Join(err, g.Close())
	}
	done = func() { _ = errors.Join(store.Close(), g.Close()) }
	key, err = store.PutText(ctx, "Say something.")
	if err != nil {
		done()
		return nil, "", nil, err
	}
	return activities.New(activities.Options{
		Providers: sandbox.NewSet(provider), Gateway: g, Artifacts: store, GatewayURL: "https://gateway.invalid",
		Deployment: "d", Namespace: "n", Logger: slog.New(slog.DiscardHandler),
	}), key, done, nil
}

// follow starts an agent and follows it until ctx ends, which an agent of a
// sandbox that is gone does not hear.
func follow(ctx context.Context, acts *activities.Activities, key string, num int, ref sandbox.Ref) error {
	_, err := acts.RunAgent(ctx, orchestrator.RunAgentInput{
		Spec: fork.Spec{Run: followedRun, Num: num, PromptKey: key, Model: "sonnet", Timeout: time.Hour, Provider: e2b.ProviderName, Agent: "command", AgentCommand: talk},
		Ref:  ref, Attempt: 1, Deadline: time.Now().Add(time.Hour),
	})
	return err
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// tailTable shows what following costs.
func tailTable(all []tailing) table {
	t := table{title: "Many forks", columns: []string{"each says a line of 1 KiB", "share of one core", "of which in the kernel", "looks a second", "time on a core a look", "lines read, of those said", "said to seen, p50", "p99"},
		note: fmt.Sprintf("%d forks, followed by the worker's own activity, which asks for exits, reads outputs into transcripts and asks the ledger what was spent; Temporal is not there. For %v each. The share is the time that this process, which has nothing else to do, spent on a core (getrusage). An agent far away that is silent is looked at less and less often, every 2 s at last, and all of them in the same moments. Times in milliseconds, but for those a look.", e2bForks, e2bTail)}
	for _, x := range all {
		name, said := "never", int64(0)
		if x.every > 0 {
			name, said = "every "+x.every.String(), int64(e2bForks*e2bTail/x.every)
		}
		t.add(name, fmt.Sprintf("%.1f %%", 100*x.share), fmt.Sprintf("%.1f %%", 100*x.system), fmt.Sprintf("%.0f", x.looks), fmt.Sprintf("%.0f µs", 1e6*x.share/x.looks),
			fmt.Sprintf("%d of about %d", x.lines, said), ms(x.late.p(.5)), ms(x.late.p(.99)))
	}
	return t
}
