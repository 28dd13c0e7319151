package e2btest

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// config is the command of a process.
type config struct {
	Cmd  string            `json:"cmd"`
	Args []string          `json:"args,omitempty"`
	Envs map[string]string `json:"envs,omitempty"`
	Cwd  string            `json:"cwd,omitempty"`
}

type ptySize struct {
	Size struct {
		Cols uint16 `json:"cols"`
		Rows uint16 `json:"rows"`
	} `json:"size"`
}

// selector names a process.
type selector struct {
	PID int    `json:"pid"`
	Tag string `json:"tag"`
}

// dataEvent is output of a process; one of the three.
type dataEvent struct {
	Stdout []byte `json:"stdout,omitempty"`
	Stderr []byte `json:"stderr,omitempty"`
	PTY    []byte `json:"pty,omitempty"`
}

type endEvent struct {
	ExitCode int    `json:"exitCode,omitempty"`
	Exited   bool   `json:"exited,omitempty"`
	Status   string `json:"status,omitempty"`
	Error    string `json:"error,omitempty"`
}

// event is what is said of a process; one of the four.
type event struct {
	Start     *startEvent `json:"start,omitempty"`
	Data      *dataEvent  `json:"data,omitempty"`
	End       *endEvent   `json:"end,omitempty"`
	Keepalive *struct{}   `json:"keepalive,omitempty"`
}

type startEvent struct {
	PID int `json:"pid"`
}

type eventMessage struct {
	Event event `json:"event"`
}

// A process was started by envd.
type process struct {
	config config
	pid    int // in its box
	tag    string
	cmd    *exec.Cmd
	stdin  *os.File // nil: none
	pty    *os.File // nil: none
	out    []*os.File

	mu    sync.Mutex
	subs  map[*subscriber]struct{}
	ended *endEvent
}

// A subscriber reads what a process says. One that does not read holds the
// process up, and all who read after it: so it is with E2B.
type subscriber struct {
	events chan event
	gone   chan struct{}
}

func (p *process) subscribe() *subscriber {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &subscriber{events: make(chan event), gone: make(chan struct{})}
	if p.ended == nil {
		p.subs[s] = struct{}{}
	}
	return s
}

func (p *process) unsubscribe(s *subscriber) {
	p.mu.Lock()
	delete(p.subs, s)
	p.mu.Unlock()
	close(s.gone)
}

// tell says something to all who listen now. What nobody hears is lost.
func (p *process) tell(e event) {
	p.mu.Lock()
	subs := slices.Collect(maps.Keys(p.subs))
	p.mu.Unlock()
	for _, s := range subs {
		select {
		case s.events <- e:
		case <-s.gone:
		}
	}
}

type startRequest struct {
	Process config   `json:"process"`
	PTY     *ptySize `json:"pty"`
	Tag     string   `json:"tag"`
	Stdin   *bool    `json:"stdin"`
}

// start runs a command. It goes on when the caller does not, unless the call
// has a timeout: that is the process's.
func (v *vm) start(w http.ResponseWriter, r *http.Request) {
	var in startRequest
	s, ok := openStream(w, r, &in)
	if !ok {
		return
	}
	p, sub, err := v.launch(userOf(r), in)
	if err != nil {
		s.end(asRPC(err))
		return
	}
	ctx := r.Context()
	if life := callTimeout(r); life > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, life)
		defer cancel()
		time.AfterFunc(life, func() { p.kill() })
	}
	p.follow(ctx, s, sub)
}

// follow passes on what a process says until it has ended, or the caller
// listens no more.
func (p *process) follow(ctx context.Context, s *stream, sub *subscriber) {
	defer p.unsubscribe(sub)
	if s.send(eventMessage{event{Start: &startEvent{p.pid}}}) != nil {
		return
	}
	p.mu.Lock()
	ended := p.ended
	if ended != nil {
		if _, ok := p.subs[sub]; ok {
			ended = nil // it is about to hear of it
		}
	}
	p.mu.Unlock()
	if ended != nil {
		if s.send(eventMessage{event{End: ended}}) == nil {
			s.end(nil)
		}
		return
	}
	ping := time.NewTicker(s.ping)
	defer ping.Stop()
	for {
		e := event{Keepalive: &struct{}{}}
		select {
		case e = <-sub.events:
			ping.Reset(s.ping)
		case <-ping.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				s.end(rpcErrorf("deadline_exceeded", "context deadline exceeded"))
			}
			return
		}
		if s.send(eventMessage{e}) != nil {
			return
		}
		if e.End != nil {
			s.end(nil)
			return
		}
	}
}

// launch starts the process, with one who listens from the beginning.
func (v *vm) launch(user string, in startRequest) (*process, *subscriber, error) {
	p := &process{config: in.Process, tag: in.Tag, subs: map[*subscriber]struct{}{}}
	sub := p.subscribe()
	// Known before it can end, and paused with all others or not yet there.
	err := v.as(user, func(a account) error { return p.start(a, v, in) })
	if err != nil {
		return nil, nil, err
	}
	if p.pid, err = inside(p.cmd.Process.Pid); err != nil {
		p.kill()
		p.abandon()
		_ = p.cmd.Wait()
		return nil, nil, err
	}
	v.mu.Lock()
	v.processes[p.pid] = p
	v.mu.Unlock()
	go p.run(v)
	return p, sub, nil
}

// start runs on the thread of the box.
func (p *process) start(a account, v *vm, in startRequest) error {
	cwd := a.resolve(in.Process.Cwd)
	if st, err := os.Stat(cwd); err != nil || !st.IsDir() {
		return rpcErrorf("invalid_argument", "cwd '%s' does not exist", cwd)
	}
	c := &exec.Cmd{Path: lookPath(in.Process.Cmd, cwd), Args: append([]string{in.Process.Cmd}, in.Process.Args...), Dir: cwd, Env: environ(a, v, in.Process.Envs)}
	if c.Path == "" {
		// A shell says why, and exits as shells do.
		c.Path, c.Args = "/bin/sh", append([]string{"sh", "-c", `exec "$@"`, "sh", in.Process.Cmd}, in.Process.Args...)
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: a.uid, Gid: a.gid}}
	p.cmd = c
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			_ = f.Close()
		}
	}()
	var err error
	if in.PTY != nil {
		theirs, err = p.terminal(in.PTY, a)
	} else {
		theirs, err = p.pipes(in.Stdin == nil || *in.Stdin)
	}
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		p.abandon()
		return rpcErrorf("invalid_argument", "error starting process '%s': %v", in.Process.Cmd, err)
	}
	return nil
}

// pipes makes what a process without a terminal reads and writes.
func (p *process) pipes(stdin bool) (theirs []*os.File, err error) {
	pipe := func(ours **os.File, write bool) *os.File {
		if err != nil {
			return nil
		}
		r, w, pipeErr := os.Pipe()
		if err = pipeErr; err != nil {
			return nil
		}
		if write {
			r, w = w, r
		}
		*ours = r
		theirs = append(theirs, w)
		return w
	}
	if stdin {
		p.cmd.Stdin = pipe(&p.stdin, true)
	}
	p.out = make([]*os.File, 2)
	p.cmd.Stdout, p.cmd.Stderr = pipe(&p.out[0], false), pipe(&p.out[1], false)
	return theirs, err
}

func environ(a account, v *vm, added map[string]string) []string {
	env := []string{"PATH=" + systemPath, "HOME=" + a.home, "USER=" + a.name, "LOGNAME=" + a.name, "E2B_SANDBOX=true", "E2B_SANDBOX_ID=" + v.id, "E2B_TEMPLATE_ID=" + v.spec.Template}
	for _, more := range []map[string]string{v.spec.Env, added} {
		for k, v := range more {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// lookPath finds a program in the sandbox; empty: there is none.
func lookPath(name, dir string) string {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		if executable(name) {
			return name
		}
		return ""
	}
	for _, d := range filepath.SplitList(systemPath) {
		if p := filepath.Join(d, name); name != "" && executable(p) {
			return p
		}
	}
	return ""
}

func executable(name string) bool {
	st, err := os.Stat(name)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// run hears the process out. Its end comes when nobody has its outputs open
// any more, which may be long after it has exited.
func (p *process) run(v *vm) {
	var read sync.WaitGroup
	for i, f := range p.out {
		read.Go(func() { p.hear(f, i) })
	}
	read.Wait()
	_ = p.cmd.Wait() // how it ended stands in the state
	p.abandon()
	state := p.cmd.ProcessState
	end := &endEvent{ExitCode: state.ExitCode(), Exited: state.Exited(), Status: state.String()}
	if !state.Success() {
		end.Error = state.String()
	}
	p.mu.Lock()
	p.ended = end
	p.mu.Unlock()
	p.tell(event{End: end})
	time.AfterFunc(v.srv.opts.ExitRetention, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.processes[p.pid] == p {
			delete(v.processes, p.pid)
		}
	})
}

func (p *process) hear(f *os.File, number int) {
	for {
		b := make([]byte, 32<<10)
		n, err := f.Read(b)
		if n > 0 {
			d := &dataEvent{}
			switch {
			case p.pty != nil:
				d.PTY = b[:n]
			case number == 0:
				d.Stdout = b[:n]
			default:
				d.Stderr = b[:n]
			}
			p.tell(event{Data: d})
		}
		if err != nil {
			return
		}
	}
}

// abandon closes our ends of what the process has open.
func (p *process) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range append([]*os.File{p.stdin, p.pty}, p.out...) {
		if f != nil {
			_ = f.Close()
		}
	}
}

func (p *process) kill() { _ = p.cmd.Process.Kill() }

// forget has envd know nothing of what it started.
func (v *vm) forget() {
	v.mu.Lock()
	all := v.processes
	v.processes = map[int]*process{}
	watchers := v.watchers
	v.watchers = map[string]*watcher{}
	v.mu.Unlock()
	for _, p := range all {
		p.abandon()
	}
	for _, w := range watchers {
		w.close()
	}
}
