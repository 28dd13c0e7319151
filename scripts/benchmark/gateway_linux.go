package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// gatewayWord is the first argument with which this program is a gateway, for
// another one of its kind that measures it. A folder and the address of the
// model API follow.
const gatewayWord = "gateway"

// The sizes of what is measured.
const (
	gatewayForks = 50
	agentBody    = 50_000 // bytes of an agent's first request
	smallBody    = 600
	latencyCalls = 2000
	latencyTurn  = 200
	streamCount  = 1000
	callsWidth   = 64
	callsTime    = 5 * time.Second
	longDeltas   = 20_000
	longTurns    = 7
)

// serveGateway is a gateway with a ledger on the disk. It prints its address and
// a token for each of its forks, and ends when its standard input does.
func serveGateway(dir, upstream string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	prices, err := gateway.LoadPrices(nil)
	if err != nil {
		return err
	}
	g, err := gateway.Open(ctx, gateway.Options{
		Ledger: ledger.Options{Dir: dir}, Prices: prices, Rate: 1e6,
		Credentials: func(context.Context) (gateway.Credentials, error) {
			return gateway.Credentials{APIKey: "key", BaseURL: upstream}, nil
		},
	})
	if err != nil {
		return err
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return errors.Join(err, g.Close())
	}
	fmt.Println("http://" + ln.Addr().String())
	for num := range gatewayForks {
		token, err := g.Grant(ctx, gateway.Account{Run: "bench", Fork: num + 1, RunBudget: 1_000_000 * fork.Dollar, ForkBudget: 100_000 * fork.Dollar})
		if err != nil {
			return errors.Join(err, g.Close())
		}
		fmt.Println(token)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until whoever measures is done, or dead
		stop()
	}()
	return errors.Join(g.Serve(ctx, ln), g.Close())
}

// A gate is a gateway in a process of its own, and the API behind it.
type gate struct {
	api    *modelAPI
	url    string
	tokens []string
	pid    int
	client *http.Client
	file   *os.File // beside the ledger
	disk   series   // what a write to it takes
}

func newGate(ctx context.Context, o options) (_ *gate, done func(), err error) {
	dir, err := os.MkdirTemp(o.dir, "benchmark-gateway-")
	if err != nil {
		return nil, nil, err
	}
	api, err := newModelAPI(ctx)
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, exe, gatewayWord, filepath.Join(dir, "ledger"), api.url)
	cmd.Stderr = o.log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	g := &gate{api: api, pid: cmd.Process.Pid, client: &http.Client{Transport: &http.Transport{MaxIdleConns: 2000, MaxIdleConnsPerHost: 2000, DisableCompression: true}}}
	if g.file, err = os.Create(filepath.Join(dir, "file")); err == nil {
		_, err = g.file.Write(make([]byte, 1<<20))
	}
	if err != nil {
		_, _ = stdin.Close(), cmd.Wait()
		return nil, nil, err
	}
	done = func() {
		_ = g.file.Close()
		g.client.CloseIdleConnections()
		_ = stdin.Close()
		_ = cmd.Wait()
		_ = api.server.Close()
		_ = os.RemoveAll(dir)
	}
	lines := bufio.NewScanner(stdout)
	for len(g.tokens) < gatewayForks {
		if !lines.Scan() {
			done()
			return nil, nil, errors.New("the gateway did not start")
		}
		if g.url == "" {
			g.url = lines.Text()
			continue
		}
		g.tokens = append(g.tokens, lines.Text())
	}
	return g, done, nil
}

// call makes one call of the model and reads its answer to the end.
func (g *gate) call(ctx context.Context, url, token string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v1/messages", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Api-Key", token)
	res, err := g.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	if err == nil && (res.StatusCode != http.StatusOK || n == 0) {
		err = fmt.Errorf("status %d, %d bytes", res.StatusCode, n)
	}
	return err
}

// models are those that calls are made to, the first one where it makes no
// difference.
var models = []string{"claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-5-5", "claude-fable-5-2"}

func messageBody(model string, size int, stream bool, kind string) []byte {
	return fmt.Appendf(nil, `{"model":%q,"max_tokens":1000,"stream":%v,"metadata":{"user_id":%q},"messages":[{"role":"user","content":%q}]}`,
		model, stream, kind, strings.Repeat("words ", size/6))
}

// measureGateway compares calls through the gateway with direct ones.
func measureGateway(ctx context.Context, o options) ([]table, error) {
	g, done, err := newGate(ctx, o)
	if err != nil {
		return nil, err
	}
	defer done()
	w := &watch{}

	o.logf("latency")
	direct, through, err := g.latency(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("latency: %w", err)
	}
	o.logf("calls a second")
	w.quiet(ctx)
	rate, err := g.rate(ctx)
	if err != nil {
		return nil, fmt.Errorf("calls: %w", err)
	}
	o.logf("streaming")
	straight, metered, err := g.throughput(ctx, w, "long")
	if err != nil {
		return nil, fmt.Errorf("streaming: %w", err)
	}
	straightWhole, meteredWhole, err := g.throughput(ctx, w, "whole")
	if err != nil {
		return nil, fmt.Errorf("streaming: %w", err)
	}
	o.logf("%d streams", streamCount)
	idle, busy, err := g.streams(ctx)
	if err != nil {
		return nil, fmt.Errorf("streams: %w", err)
	}

	added50, added99 := through.p(.5)-direct.p(.5), through.p(.99)-direct.p(.99)
	share := float64(straight.p(.5)) / float64(metered.p(.5))
	promised := figureTable([]figure{
		{"added latency of a call, p50", "≤ 1 ms", ms(added50) + " ms", added50 <= time.Millisecond},
		{"added latency of a call, p99", "≤ 5 ms", ms(added99) + " ms", added99 <= 5*time.Millisecond},
		{"memory with 1,000 streams at once", "≤ 300 MiB", wholeMiB(busy) + " MiB", busy <= 300<<20},
		{"small calls a second, ledger on the disk", "≥ 2,000", fmt.Sprintf("%.0f", rate), rate >= 2000},
		{"streaming, of what a direct call gets", "≥ 0.8 ×", fmt.Sprintf("%.2f ×", share), share >= 0.8},
	})
	promised.note = w.String()

	size := float64(len(g.api.long)) / 1e6
	speed := func(d time.Duration) string { return fmt.Sprintf("%.0f", size/d.Seconds()) }
	latency := table{title: "One call after the other", columns: []string{"", "p50", "p99"},
		note: fmt.Sprintf("Milliseconds from the request to the end of its answer; %d KB go up, as an agent's first request has, and a short answer comes back. %d calls of each in turns of %d. The gateway is a process of its own; each of its calls is reserved on the disk before it goes out. Added is the difference of the quantiles.", agentBody/1000, latencyCalls, latencyTurn)}
	latency.add("direct", ms(direct.p(.5)), ms(direct.p(.99)))
	latency.add("through the gateway", ms(through.p(.5)), ms(through.p(.99)))
	latency.add("added", ms(added50), ms(added99))
	latency.add("4 KiB written to the same disk, fdatasync(2)", ms(g.disk.p(.5)), ms(g.disk.p(.99)))
	stream := table{title: "One long stream", columns: []string{"", "MB a second, p50", "in one piece"},
		note: fmt.Sprintf("%d events, %.1f MB, as fast as they can be read; %d of each in turns. A model API sends every event by itself, which is what is promised of; a stream that comes in one piece shows what the copying and metering alone can do.", longDeltas, size, longTurns)}
	stream.add("direct", speed(straight.p(.5)), speed(straightWhole.p(.5)))
	stream.add("through the gateway", speed(metered.p(.5)), speed(meteredWhole.p(.5)))
	memory := table{title: "Memory", columns: []string{"", "MiB"},
		note: fmt.Sprintf("Of the gateway's process (Pss), %d streams of %d forks open at the same time, each with a request of %d KB and some events on their way.", streamCount, gatewayForks, agentBody/1000)}
	memory.add("before", wholeMiB(idle))
	memory.add("with all streams", wholeMiB(busy))
	return []table{promised, latency, stream, memory}, nil
}

func wholeMiB(bytes int64) string { return fmt.Sprintf("%.0f", float64(bytes)/(1<<20)) }

// latency makes direct calls and calls through the gateway in turns.
func (g *gate) latency(ctx context.Context, w *watch) (direct, through series, err error) {
	body := messageBody(models[0], agentBody, false, "short")
	for range latencyCalls / latencyTurn {
		w.quiet(ctx)
		for _, way := range []struct {
			url, token string
			to         *series
		}{{g.api.url, "key", &direct}, {g.url, g.tokens[0], &through}} {
			for range latencyTurn {
				took, err := timed(func() error { return g.call(ctx, way.url, way.token, body) })
				if err != nil {
					return nil, nil, err
				}
				*way.to = append(*way.to, took)
			}
		}
		for i := range latencyTurn / 10 {
			took, err := timed(func() error {
				if _, err := g.file.WriteAt(make([]byte, 4096), int64(i)*4096); err != nil {
					return err
				}
				return syscall.Fdatasync(int(g.file.Fd()))
			})
			if err != nil {
				return nil, nil, err
			}
			g.disk = append(g.disk, took)
		}
	}
	return direct, through, nil
}

// rate is how many small calls a second get through. They go to several models,
// since the governor lets no more than 2,000 a second through to one.
func (g *gate) rate(ctx context.Context) (float64, error) {
	var bodies [][]byte
	for _, model := range models {
		bodies = append(bodies, messageBody(model, smallBody, false, "short"))
	}
	ctx, cancel := context.WithTimeout(ctx, callsTime)
	defer cancel()
	var made atomic.Int64
	var first atomic.Pointer[error]
	var wg sync.WaitGroup
	start := time.Now()
	for i := range callsWidth {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := g.call(ctx, g.url, g.tokens[i%len(g.tokens)], bodies[i%len(bodies)]); err == nil {
					made.Add(1)
				} else if ctx.Err() == nil {
					first.CompareAndSwap(nil, &err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return 0, *err
	}
	return float64(made.Load()) / time.Since(start).Seconds(), nil
}

// throughput reads one long stream after the other, direct and through the
// gateway in turns.
func (g *gate) throughput(ctx context.Context, w *watch, kind string) (direct, through series, err error) {
	body := messageBody(models[0], smallBody, true, kind)
	for range longTurns {
		w.quiet(ctx)
		for _, way := range []struct {
			url, token string
			to         *series
		}{{g.api.url, "key", &direct}, {g.url, g.tokens[0], &through}} {
			took, err := timed(func() error { return g.call(ctx, way.url, way.token, body) })
			if err != nil {
				return nil, nil, err
			}
			*way.to = append(*way.to, took)
		}
	}
	return direct, through, nil
}

// streams opens many streams, waits until all of them are under way, and says
// what memory the gateway has before and then.
func (g *gate) streams(ctx context.Context) (idle, busy int64, err error) {
	if idle, err = pss(g.pid); err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	body := messageBody(models[0], agentBody, true, "held")
	failed := make(chan error, streamCount)
	var wg sync.WaitGroup
	for i := range streamCount {
		wg.Go(func() {
			if err := g.call(ctx, g.url, g.tokens[i%len(g.tokens)], body); err != nil {
				failed <- err
			}
		})
	}
	for end := time.Now().Add(time.Minute); g.api.held.Load() < streamCount; {
		select {
		case err := <-failed:
			return 0, 0, err
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(end) {
			return 0, 0, fmt.Errorf("only %d streams got through", g.api.held.Load())
		}
	}
	busy, err = pss(g.pid)
	close(g.api.release)
	wg.Wait()
	if later, e := pss(g.pid); e == nil { // the ends cost something too
		busy = max(busy, later)
	}
	select {
	case err = <-failed:
	default:
	}
	return idle, busy, err
}

// pss is the memory of a process.
func pss(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "Pss:" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("the kernel does not say what memory a process has")
}

// A modelAPI answers at once, so that what is measured is the gateway.
type modelAPI struct {
	url     string
	server  *http.Server
	long    []byte
	held    atomic.Int64
	release chan struct{}
}

const (
	eventsStart = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"model\":\"claude-sonnet-5-5\",\"usage\":{\"input_tokens\":12000,\"output_tokens\":1}}}\n\n"
	eventText   = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"some words of an answer\"}}\n\n"
	eventsEnd   = "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":500}}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
	shortAnswer = `{"id":"m","type":"message","model":%q,"content":[{"type":"text","text":"ok"}],"usage":{"input_tokens":%d,"output_tokens":7}}`
)

func newModelAPI(ctx context.Context) (*modelAPI, error) {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	a := &modelAPI{url: "http://" + ln.Addr().String(), release: make(chan struct{}), long: []byte(eventsStart + strings.Repeat(eventText, longDeltas) + eventsEnd)}
	a.server = &http.Server{Handler: a, ReadHeaderTimeout: time.Minute}
	go func() { _ = a.server.Serve(ln) }() // until it is closed
	return a, nil
}

func (a *modelAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	head := body[:min(len(body), 200)]
	if !bytes.Contains(head, []byte(`"stream":true`)) {
		w.Header().Set("Content-Type", "application/json")
		model := models[0]
		for _, m := range models {
			if bytes.Contains(head, []byte(m)) {
				model = m
			}
		}
		_, _ = fmt.Fprintf(w, shortAnswer, model, len(body)/4) // a caller that is gone is seen by itself
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	out := http.NewResponseController(w)
	switch {
	case bytes.Contains(head, []byte(`"whole"`)):
		_, _ = w.Write(a.long)
		return
	case bytes.Contains(head, []byte(`"long"`)):
		_, _ = io.WriteString(w, eventsStart)
		for range longDeltas {
			_, _ = io.WriteString(w, eventText)
			if out.Flush() != nil {
				return
			}
		}
		_, _ = io.WriteString(w, eventsEnd)
		return
	}
	_, _ = io.WriteString(w, eventsStart+strings.Repeat(eventText, 20))
	_ = out.Flush()
	a.held.Add(1)
	select {
	case <-a.release:
	case <-r.Context().Done():
		return
	}
	_, _ = io.WriteString(w, strings.Repeat(eventText, 20)+eventsEnd)
}
