package e2btest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"syscall"
)

// selected finds a process.
func (v *vm) selected(s selector) (*process, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s.Tag == "" {
		if p := v.processes[s.PID]; p != nil {
			return p, nil
		}
		return nil, rpcErrorf("not_found", "process with pid %d not found", s.PID)
	}
	// The search ends at the first process with another tag, wherever that
	// comes: E2B's does.
	for _, p := range v.processes {
		if p.tag == s.Tag {
			return p, nil
		}
		if p.tag != "" {
			break
		}
	}
	return nil, rpcErrorf("not_found", "process with tag %s not found", s.Tag)
}

// lives finds a process that has not ended.
func (v *vm) lives(s selector) (*process, error) {
	p, err := v.selected(s)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended != nil {
		return nil, rpcErrorf("not_found", "process with pid %d not found", p.pid)
	}
	return p, nil
}

func (v *vm) connect(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Process selector `json:"process"`
	}
	s, ok := openStream(w, r, &in)
	if !ok {
		return
	}
	p, err := v.selected(in.Process)
	if err != nil {
		s.end(asRPC(err))
		return
	}
	ctx := r.Context()
	if life := callTimeout(r); life > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, life)
		defer cancel()
	}
	p.follow(ctx, s, p.subscribe())
}

type processInfo struct {
	Config config `json:"config"`
	PID    int    `json:"pid"`
	Tag    string `json:"tag,omitempty"`
}

func (v *vm) list(struct{}) (any, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var out struct {
		Processes []processInfo `json:"processes,omitempty"`
	}
	for _, p := range v.processes {
		p.mu.Lock()
		if p.ended == nil {
			out.Processes = append(out.Processes, processInfo{p.config, p.pid, p.tag})
		}
		p.mu.Unlock()
	}
	slices.SortFunc(out.Processes, func(a, b processInfo) int { return a.PID - b.PID })
	return out, nil
}

func (v *vm) update(in struct {
	Process selector `json:"process"`
	PTY     *ptySize `json:"pty"`
}) (any, error) {
	p, err := v.lives(in.Process)
	if err != nil || in.PTY == nil {
		return nil, err
	}
	if p.pty == nil {
		return nil, rpcErrorf("failed_precondition", "tty not assigned to process")
	}
	return nil, resize(p.pty, in.PTY)
}

type input struct {
	Stdin []byte `json:"stdin"`
	PTY   []byte `json:"pty"`
}

func (v *vm) sendInput(in struct {
	Process selector `json:"process"`
	Input   input    `json:"input"`
}) (any, error) {
	p, err := v.lives(in.Process)
	if err != nil {
		return nil, err
	}
	return nil, p.write(in.Input)
}

func (p *process) write(in input) error {
	f, b := p.stdin, in.Stdin
	if in.PTY != nil {
		f, b = p.pty, in.PTY
	}
	switch {
	case f == nil && in.PTY != nil:
		return rpcErrorf("failed_precondition", "tty not assigned to process")
	case f == nil || p.pty != nil && in.PTY == nil:
		return rpcErrorf("failed_precondition", "stdin not enabled or closed")
	}
	if _, err := f.Write(b); err != nil {
		return rpcErrorf("internal", "error writing to process: %v", err)
	}
	return nil
}

// streamInput reads input from a call that stays open.
func (v *vm) streamInput(w http.ResponseWriter, r *http.Request) {
	if !speaks(w, r, streamType) {
		return
	}
	s := &stream{w: w, rc: http.NewResponseController(w)}
	w.Header().Set("Content-Type", streamType)
	var p *process
	for {
		var in struct {
			Start *struct {
				Process selector `json:"process"`
			} `json:"start"`
			Data *struct {
				Input input `json:"input"`
			} `json:"data"`
		}
		end, err := readFrame(r.Body, &in)
		if end || errors.Is(err, io.EOF) {
			break
		}
		switch {
		case err != nil:
			err = rpcErrorf("invalid_argument", "%v", err)
		case in.Start != nil:
			p, err = v.lives(in.Start.Process)
		case in.Data != nil && p == nil:
			err = rpcErrorf("failed_precondition", "the first message must be a start")
		case in.Data != nil:
			err = p.write(in.Data.Input)
		}
		if err != nil {
			s.end(asRPC(err))
			return
		}
	}
	if s.send(struct{}{}) == nil {
		s.end(nil)
	}
}

// signals are those that can be sent, by name and by number.
var signals = map[string]syscall.Signal{
	`"SIGNAL_SIGTERM"`: syscall.SIGTERM, "15": syscall.SIGTERM,
	`"SIGNAL_SIGKILL"`: syscall.SIGKILL, "9": syscall.SIGKILL,
}

// sendSignal signals the process that was started, and none of those that it
// started.
func (v *vm) sendSignal(in struct {
	Process selector        `json:"process"`
	Signal  json.RawMessage `json:"signal"`
}) (any, error) {
	p, err := v.lives(in.Process)
	if err != nil {
		return nil, err
	}
	sig, ok := signals[string(in.Signal)]
	if !ok {
		return nil, rpcErrorf("unimplemented", "invalid signal: %s", in.Signal)
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return nil, rpcErrorf("internal", "error sending signal: %v", err)
	}
	return nil, nil
}

func (v *vm) closeStdin(in struct {
	Process selector `json:"process"`
}) (any, error) {
	p, err := v.lives(in.Process)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.pty != nil:
		return nil, rpcErrorf("failed_precondition", "cannot close stdin of a process with a terminal")
	case p.stdin == nil:
		return nil, rpcErrorf("failed_precondition", "stdin not enabled or closed")
	}
	if err := p.stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return nil, fmt.Errorf("close stdin: %w", err)
	}
	return nil, nil
}
