package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// e2bWord is the first argument with which this program is a server that
// speaks E2B's protocol, for another one of its kind that measures the client.
// A folder follows.
const e2bWord = "e2b"

// The sizes of what is measured.
const (
	e2bFirst     = 150 // sandboxes made for a first command
	e2bFirstTurn = 10

	e2bRecordings = 5
	e2bPolls      = 2000
	e2bPollTurn   = 200
	e2bFile       = 200 << 20
	e2bFiles      = 5
	e2bListed     = 1000
	e2bLists      = 15
)

// serveE2B is the server. It prints its URL, its key and the address of a plain
// copy of files, and ends when its standard input does.
func serveE2B(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	srv := e2btest.New(e2btest.Options{Dir: dir})
	go func() {
		for n := 0; ; n++ { // one after the other
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			if err := plainCopy(conn, filepath.Join(dir, fmt.Sprint("plain-", n))); err != nil {
				fmt.Fprintln(os.Stderr, "plain copy:", err)
			}
			_ = conn.Close()
		}
	}()
	fmt.Printf("%s\n%s\n%s\n", srv.APIURL(), srv.Key, ln.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until whoever measures is done, or dead
		stop()
	}()
	<-ctx.Done()
	return srv.Close()
}

// The ways of a plain copy.
const (
	wayUp     = 'u' // to a new file, read and written, as whoever speaks HTTP has to
	waySplice = 's' // to a new file, within the kernel: splice(2)
	wayDown   = 'd' // from a file, within the kernel: sendfile(2)
)

// plainCopy takes a new file from the connection, or sends one, as the first
// byte says.
func plainCopy(conn net.Conn, name string) error {
	way := make([]byte, 1)
	if _, err := io.ReadFull(conn, way); err != nil {
		return err
	}
	if way[0] == wayDown {
		f, err := os.Open(filepath.Join(filepath.Dir(name), "plain-0"))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(conn, f)
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if way[0] == waySplice {
		_, err = io.Copy(f, conn)
	} else {
		_, err = io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{conn}, make([]byte, 256<<10))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	_, err = conn.Write(way) // it is all there
	return err
}

// A cloud is a server in a process of its own, and our client of it.
type cloud struct {
	dir             string
	url, key, plain string
	provider        *e2b.Provider
	bare            *http.Client
	made            int
}

func newCloud(ctx context.Context, o options) (_ *cloud, done func(), err error) {
	dir, err := os.MkdirTemp(o.dir, "benchmark-e2b-")
	if err != nil {
		return nil, nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	cmd := exec.CommandContext(ctx, exe, e2bWord, dir)
	cmd.Stderr = o.log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	c := &cloud{dir: dir, bare: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true}}}
	done = func() {
		c.bare.CloseIdleConnections()
		_ = stdin.Close()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	}
	lines := bufio.NewScanner(stdout)
	for _, to := range []*string{&c.url, &c.key, &c.plain} {
		if !lines.Scan() {
			done()
			return nil, nil, errors.New("the server did not start")
		}
		*to = lines.Text()
	}
	c.provider = c.client(c.url)
	return c, done, nil
}

func (c *cloud) client(at string) *e2b.Provider {
	s := e2b.Settings{Key: c.key, APIURL: at, SandboxURL: at, Plan: "pro"}
	return e2b.New(e2b.Options{Settings: func() e2b.Settings { return s }, Pace: -1})
}

// spec is that of a new sandbox.
func (c *cloud) spec() sandbox.Spec {
	c.made++
	return sandbox.Spec{Key: fmt.Sprintf("bench-%06d", c.made), Deadline: time.Now().Add(6 * time.Hour), Labels: map[string]string{sandbox.LabelRun: "bench"}}
}

// measureE2B compares our client of E2B with the HTTP beneath it.
func measureE2B(ctx context.Context, o options) ([]table, error) {
	if err := e2btest.Supported(); err != nil {
		o.logf("no sandboxes of E2B can be made here: %v", err)
		return nil, nil
	}
	c, done, err := newCloud(ctx, o)
	if err != nil {
		return nil, err
	}
	defer done()
	w := &watch{}

	o.logf("first command")
	first, err := c.recordFirst(ctx)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	one, err := c.firstCommand(ctx, w, first)
	if err != nil {
		return nil, fmt.Errorf("first command: %w", err)
	}
	o.logf("polls")
	poll, barePoll, err := c.polls(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("polls: %w", err)
	}
	o.logf("files")
	f, err := c.files(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("files: %w", err)
	}
	o.logf("%d forks", e2bForks)
	t, err := c.tail(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("forks: %w", err)
	}
	o.logf("%d sandboxes", e2bListed)
	list, err := c.list(ctx, w, first)
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}

	up, down := share(f.plainUp, f.up), share(f.plainDown, f.down)
	promised := figureTable([]figure{
		most("create to first command, while nobody is asked for anything, p50", one.own.p(.5), 5*time.Millisecond),
		most("empty poll, p50", poll.p(.5), time.Millisecond),
		{"200 MB up, of what a plain copy gets", "≥ 0.7 ×", fmt.Sprintf("%.2f ×", up), up >= .7},
		{"200 MB down, of what a plain copy gets", "≥ 0.7 ×", fmt.Sprintf("%.2f ×", down), down >= .7},
		most("1,000 sandboxes listed, in pages, p50", list.p(.5), 200*time.Millisecond),
		{fmt.Sprintf("%d forks tailed by one worker that each speak every %v, of one core", e2bForks, e2bSpeaks), "≤ 10 %", fmt.Sprintf("%.1f %%", 100*t[0].share), t[0].share <= .1},
	})
	promised.note = "The client in this process, and a server on the loopback that speaks E2B's protocol and runs real processes in a process of its own. " + w.String()

	create := table{title: "From nothing to the end of the first command", columns: []string{"", "p50", "p99"},
		note: fmt.Sprintf("Milliseconds. Create, attach, /bin/true, its exit code and both outputs: %d requests or more, as the exit is asked for until it is there; %d of them start a script in the sandbox, which is most of what it takes. What the client itself adds is the time in which no request is under way, its waits between two questions included. The bare round trips are the same requests, recorded once (of %d recordings the shortest) and sent again one after the other by net/http; the client asks for some of it at once. What it takes more than its neighbour has in it what else the machine did. %d of each in turns.", len(first.requests), first.scripts(), e2bRecordings, e2bFirst)}
	create.add("client", ms(one.ours.p(.5)), ms(one.ours.p(.99)))
	create.add("of which no request is under way", ms(one.own.p(.5)), ms(one.own.p(.99)))
	create.add("bare round trips", ms(one.bare.p(.5)), ms(one.bare.p(.99)))
	create.add("what the client took more", fmt.Sprintf("%.2f", one.more.p(.5).Seconds()*1000), fmt.Sprintf("%.2f", one.more.p(.99).Seconds()*1000))
	empty := table{title: "An empty poll", columns: []string{"", "p50", "p99"},
		note: fmt.Sprintf("Milliseconds for a read behind the last byte of an agent's output; %d of each in turns of %d.", e2bPolls, e2bPollTurn)}
	empty.add("client", ms(poll.p(.5)), ms(poll.p(.99)))
	empty.add("the same request, bare", ms(barePoll.p(.5)), ms(barePoll.p(.99)))
	files := table{title: "Files", columns: []string{"", "MB a second, p50", "of the plain copy"},
		note: fmt.Sprintf("%d MB from and to memory here, to and from a new file there. The plain copy goes over a TCP connection to the same process and the same folder. Up, it reads and writes, as every server of HTTP has to; with splice(2) the kernel does both at once. Down, both use sendfile(2). %d of each in turns.", e2bFile>>20, e2bFiles)}
	speed := func(s series) string { return fmt.Sprintf("%.0f", e2bFile/1e6/s.p(.5).Seconds()) }
	files.add("plain copy up", speed(f.plainUp), "1.00 ×")
	files.add("the same with splice(2)", speed(f.spliced), fmt.Sprintf("%.2f ×", share(f.plainUp, f.spliced)))
	files.add("client up", speed(f.up), fmt.Sprintf("%.2f ×", up))
	files.add("plain copy down", speed(f.plainDown), "1.00 ×")
	files.add("client down", speed(f.down), fmt.Sprintf("%.2f ×", down))
	listed := table{title: "Lists", columns: []string{"", "p50", "p99"},
		note: fmt.Sprintf("Milliseconds for the %d sandboxes of a run, in pages of 100; %d times.", e2bListed, e2bLists)}
	listed.add("list", ms(list.p(.5)), ms(list.p(.99)))
	return []table{promised, create, empty, files, tailTable(t), listed}, nil
}

func share(a, b series) float64 { return float64(a.p(.5)) / float64(b.p(.5)) }

// firstOf makes a sandbox and runs a command in it.
func firstOf(ctx context.Context, p *e2b.Provider, spec sandbox.Spec) (sandbox.Ref, error) {
	ref, err := p.Create(ctx, spec)
	if err != nil {
		return ref, err
	}
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return ref, err
	}
	_, _, exit, err := sandbox.Output(ctx, sb, "true", sandbox.Cmd{Args: []string{"true"}}, 10)
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("exit code %d", exit.Code)
	}
	return ref, err
}

// A recorded request can be sent again.
type recorded struct {
	method, target string
	header         http.Header
	body           []byte
}

// A recording is what the client asks for from nothing to the end of the first
// command, and the words in it that are others each time.
type recording struct {
	requests       []recorded
	key, id, token string
}

func (r *recording) scripts() (n int) {
	for _, x := range r.requests {
		if strings.HasPrefix(x.target, "/process.Process/") {
			n++
		}
	}
	return n
}

// record has a client work through a proxy that writes down what it asks for.
func (c *cloud) record(ctx context.Context, work func(*e2b.Provider) error) ([]recorded, error) {
	target, err := url.Parse(c.url)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var requests []recorded
	proxy := &httputil.ReverseProxy{FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		mu.Lock()
		requests = append(requests, recorded{r.Method, r.URL.RequestURI(), r.Header.Clone(), body})
		mu.Unlock()
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		proxy.ServeHTTP(w, r)
	})}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() { _ = srv.Serve(ln) }() // until it is closed
	defer srv.Close()
	err = work(c.client("http://" + ln.Addr().String()))
	mu.Lock()
	defer mu.Unlock()
	return requests, err
}

// recordFirst records a first command, as short as it can be.
func (c *cloud) recordFirst(ctx context.Context) (shortest *recording, err error) {
	for range e2bRecordings {
		rec, err := c.recordOnce(ctx)
		if err != nil {
			return nil, err
		}
		if shortest == nil || len(rec.requests) < len(shortest.requests) {
			shortest = rec
		}
	}
	return shortest, nil
}

func (c *cloud) recordOnce(ctx context.Context) (*recording, error) {
	spec := c.spec()
	var ref sandbox.Ref
	requests, err := c.record(ctx, func(p *e2b.Provider) (err error) { ref, err = firstOf(ctx, p, spec); return err })
	if err != nil {
		return nil, err
	}
	rec := &recording{requests: requests, key: spec.Key}
	for _, r := range requests {
		if id := r.header.Get("E2b-Sandbox-Id"); id != "" {
			rec.id, rec.token = id, r.header.Get("X-Access-Token")
		}
	}
	if rec.id == "" || rec.token == "" {
		return nil, errors.New("no request named a sandbox")
	}
	return rec, c.provider.Destroy(ctx, ref)
}

// send sends a recorded request with other words in it, reads the answer to
// its end and returns it.
func (c *cloud) send(ctx context.Context, r recorded, words *strings.Replacer) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, r.method, c.url+words.Replace(r.target), strings.NewReader(words.Replace(string(r.body))))
	if err != nil {
		return nil, err
	}
	for k, values := range r.header {
		for _, v := range values {
			req.Header.Add(k, words.Replace(v))
		}
	}
	res, err := c.bare.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode >= http.StatusInternalServerError {
		err = fmt.Errorf("status %d: %s", res.StatusCode, b)
	}
	return b, err
}

// create returns the request that makes the sandbox.
func (r *recording) create() (recorded, error) {
	for _, x := range r.requests {
		if x.method == http.MethodPost && x.target == "/v2/sandboxes" {
			return x, nil
		}
	}
	return recorded{}, errors.New("no sandbox was made")
}

// again sends the recording with a new key, and returns the id of the sandbox.
func (c *cloud) again(ctx context.Context, rec *recording) (string, error) {
	c.made++
	key := fmt.Sprintf("bench-%06d", c.made)
	words := strings.NewReplacer(rec.key, key)
	var made struct {
		ID    string `json:"sandboxID"`
		Token string `json:"envdAccessToken"`
	}
	for _, r := range rec.requests {
		b, err := c.send(ctx, r, words)
		if err != nil {
			return made.ID, err
		}
		if r.method == http.MethodPost && r.target == "/v2/sandboxes" {
			if err := json.Unmarshal(b, &made); err != nil {
				return "", err
			}
			// A message has its length before it.
			if len(made.ID) != len(rec.id) {
				return "", fmt.Errorf("the id %q is not as long as %q", made.ID, rec.id)
			}
			words = strings.NewReplacer(rec.key, key, rec.id, made.ID, rec.token, made.Token)
		}
	}
	return made.ID, nil
}

// remove kills a sandbox without our client.
func (c *cloud) remove(ctx context.Context, id string) error {
	_, err := c.send(ctx, recorded{method: http.MethodDelete, target: "/sandboxes/" + id, header: http.Header{"X-Api-Key": {c.key}}}, strings.NewReplacer())
	return err
}

// firsts are what a first command took: ours, the bare requests, how much more
// ours took than its neighbour, and for how long nobody was asked for anything
// meanwhile.
type firsts struct{ ours, bare, more, own series }

// firstCommand measures both in turns: what else the machine does is much the
// same for two neighbours.
func (c *cloud) firstCommand(ctx context.Context, w *watch, rec *recording) (f firsts, err error) {
	for i := range e2bFirst {
		if i%e2bFirstTurn == 0 {
			w.quiet(ctx)
		}
		var ref sandbox.Ref
		spec := c.spec()
		asking := &underWay{since: time.Now()}
		took, err := timed(func() (err error) { ref, err = firstOf(asking.trace(ctx), c.provider, spec); return err })
		if err != nil {
			return f, err
		}
		own, asked, err := asking.done(ctx)
		if err == nil && asked < len(rec.requests) {
			err = fmt.Errorf("%d requests were seen of at least %d", asked, len(rec.requests))
		}
		if err == nil {
			err = c.provider.Destroy(ctx, ref)
		}
		if err != nil {
			return f, err
		}
		var id string
		plain, err := timed(func() (err error) { id, err = c.again(ctx, rec); return err })
		if err == nil {
			err = c.remove(ctx, id)
		}
		if err != nil {
			return f, err
		}
		f.ours, f.bare, f.more, f.own = append(f.ours, took), append(f.bare, plain), append(f.more, took-plain), append(f.own, own)
	}
	return f, nil
}

// underWay measures for how long no request is under way, from when a
// connection is wanted to when it can be used again.
type underWay struct {
	mu       sync.Mutex
	n, asked int
	since    time.Time
	none     time.Duration
}

func (u *underWay) add(n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n == 0 && n > 0 {
		u.none += time.Since(u.since)
	}
	u.n, u.asked, u.since = u.n+n, u.asked+max(n, 0), time.Now()
}

func (u *underWay) trace(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GetConn: func(string) { u.add(1) }, PutIdleConn: func(error) { u.add(-1) }})
}

// done returns how long that was before the last request, and how many there
// were. A connection comes back a moment after its last byte.
func (u *underWay) done(ctx context.Context) (none time.Duration, asked int, err error) {
	for range 1000 {
		u.mu.Lock()
		none, asked, left := u.none, u.asked, u.n
		u.mu.Unlock()
		if left == 0 {
			return none, asked, nil
		}
		if !pause(ctx, time.Millisecond) {
			return 0, 0, ctx.Err()
		}
	}
	return 0, 0, errors.New("a request did not end")
}

// start makes a sandbox with a process in it.
func (c *cloud) start(ctx context.Context, spec sandbox.Spec, script string) (sandbox.Ref, sandbox.Process, error) {
	ref, err := c.provider.Create(ctx, spec)
	if err != nil {
		return ref, nil, err
	}
	sb, err := c.provider.Attach(ctx, ref)
	if err != nil {
		return ref, nil, err
	}
	p, err := sb.Start(ctx, "agent", sandbox.Cmd{Args: []string{"sh", "-c", script}})
	return ref, p, err
}

// saidOnce is all that the process says whose output is polled.
const saidOnce = "said"

// polls reads where there is nothing to read.
func (c *cloud) polls(ctx context.Context, w *watch) (ours, bare series, err error) {
	ref, p, err := c.start(ctx, c.spec(), "printf "+saidOnce+"; exec sleep infinity")
	if err != nil {
		return nil, nil, err
	}
	buf := make([]byte, 64<<10)
	for n := 0; n < len(saidOnce); {
		if n, err = p.ReadAt(ctx, sandbox.Stdout, buf, 0); err != nil && !errors.Is(err, io.EOF) {
			return nil, nil, err
		}
	}
	requests, err := c.record(ctx, func(through *e2b.Provider) error {
		sb, err := through.Attach(ctx, ref)
		if err != nil {
			return err
		}
		p, err := sb.Process(ctx, "agent")
		if err != nil {
			return err
		}
		return emptyPoll(ctx, p, buf)
	})
	if err != nil {
		return nil, nil, err
	}
	request := requests[len(requests)-1]
	for range e2bPolls / e2bPollTurn {
		w.quiet(ctx)
		for range e2bPollTurn {
			took, err := timed(func() error { return emptyPoll(ctx, p, buf) })
			if err != nil {
				return nil, nil, err
			}
			ours = append(ours, took)
		}
		for range e2bPollTurn {
			took, err := timed(func() error { _, err := c.send(ctx, request, strings.NewReplacer()); return err })
			if err != nil {
				return nil, nil, err
			}
			bare = append(bare, took)
		}
	}
	return ours, bare, c.provider.Destroy(ctx, ref)
}

func emptyPoll(ctx context.Context, p sandbox.Process, buf []byte) error {
	if n, err := p.ReadAt(ctx, sandbox.Stdout, buf, int64(len(saidOnce))); n > 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("%d bytes behind the end of the output: %w", n, err)
	}
	return nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// copies are the times of a file's way.
type copies struct{ up, down, plainUp, spliced, plainDown series }

func (c *cloud) files(ctx context.Context, w *watch) (f copies, err error) {
	ref, err := c.provider.Create(ctx, c.spec())
	if err != nil {
		return f, err
	}
	sb, err := c.provider.Attach(ctx, ref)
	if err != nil {
		return f, err
	}
	for turn := range e2bFiles {
		// Always a new file: to put one in the place of another, the file system
		// takes longer than for the copy.
		name := fmt.Sprint(sandbox.Workspace, "/large-", turn)
		w.quiet(ctx)
		for _, step := range []struct {
			to *series
			do func() error
		}{
			{&f.plainUp, func() error { return c.plainUp(ctx, wayUp) }},
			{&f.spliced, func() error { return c.plainUp(ctx, waySplice) }},
			{&f.up, func() error { return sb.Upload(ctx, name, io.LimitReader(zeros{}, e2bFile)) }},
			{&f.plainDown, func() error { return c.plainDown(ctx) }},
			{&f.down, func() error {
				r, err := sb.Download(ctx, name)
				if err != nil {
					return err
				}
				defer r.Close()
				return all(io.Copy(io.Discard, r))
			}},
		} {
			syscall.Sync() // or each is slowed by what the one before it has to write yet
			took, err := timed(step.do)
			if err != nil {
				return f, err
			}
			*step.to = append(*step.to, took)
		}
	}
	return f, c.provider.Destroy(ctx, ref)
}

// all is an error when the file was not whole.
func all(n int64, err error) error {
	if err == nil && n != e2bFile {
		err = fmt.Errorf("%d bytes", n)
	}
	return err
}

func (c *cloud) dial(ctx context.Context, way byte) (*net.TCPConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.plain)
	if err != nil {
		return nil, err
	}
	_, err = conn.Write([]byte{way})
	return conn.(*net.TCPConn), err
}

func (c *cloud) plainUp(ctx context.Context, way byte) error {
	conn, err := c.dial(ctx, way)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := all(io.Copy(conn, io.LimitReader(zeros{}, e2bFile))); err != nil {
		return err
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

func (c *cloud) plainDown(ctx context.Context) error {
	conn, err := c.dial(ctx, wayDown)
	if err != nil {
		return err
	}
	defer conn.Close()
	return all(io.Copy(io.Discard, conn))
}

// list lists many sandboxes, which were made by the request that makes one,
// and nothing else.
func (c *cloud) list(ctx context.Context, w *watch, rec *recording) (took series, err error) {
	one, err := rec.create()
	if err != nil {
		return nil, err
	}
	for i := range e2bListed {
		if _, err := c.send(ctx, one, strings.NewReplacer(rec.key, fmt.Sprintf("list-%06d", i))); err != nil {
			return nil, err
		}
	}
	for range e2bLists {
		w.quiet(ctx)
		n := 0
		d, err := timed(func() error {
			all, err := c.provider.List(ctx, map[string]string{sandbox.LabelRun: "bench"})
			n = len(all)
			return err
		})
		if err == nil && n != e2bListed {
			err = fmt.Errorf("%d sandboxes are listed", n)
		}
		if err != nil {
			return nil, err
		}
		took = append(took, d)
	}
	return took, nil
}
