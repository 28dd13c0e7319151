package e2b

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A process is a folder in the sandbox.
type process struct {
	b   *box
	id  string
	dir string

	mu   sync.Mutex
	exit *sandbox.Exit // once it is known
	look time.Time     // when it is next looked at whether anybody still waits for the process

	// Who follows a process asks in turns for its exit and for what it has
	// printed since. One request answers both: what Exit has read ahead is
	// given to the next ReadAt, once and soon, or to nobody.
	tail  int64 // where the last read of the output met its end; less than 0: none has
	ahead ahead
}

// ahead is what was read of the output before it was asked for.
type ahead struct {
	data   []byte // nil: nothing was read
	offset int64
	end    bool // there was no more
	at     time.Time
}

const (
	aheadSize = 16 << 10
	aheadTime = 100 * time.Millisecond // from Exit to the ReadAt that follows it
)

// lookEvery is how often it is looked at whether who writes down how a process
// ended still lives.
const lookEvery = 30 * time.Second

func (b *box) process(id string) *process {
	// An id may be "..": with something before it, it is a name.
	return &process{b: b, id: id, dir: processDir + "/p-" + id, look: time.Now().Add(lookEvery), tail: -1}
}

// ReadAt reads a part of the stream's file.
func (p *process) ReadAt(ctx context.Context, stream sandbox.Stream, buf []byte, offset int64) (n int, err error) {
	const op = "e2b: read output"
	switch {
	case stream != sandbox.Stdout && stream != sandbox.Stderr:
		return 0, fault.New(op, fault.Invalid, "there is no stream %q", stream)
	case offset < 0:
		return 0, fault.New(op, fault.Invalid, "there is no byte %d", offset)
	case len(buf) == 0:
		return 0, nil
	}
	if stream == sandbox.Stdout {
		if n, ok, err := p.takeAhead(buf, offset); ok {
			return n, err
		}
		defer func() { p.noteTail(offset+int64(n), err) }()
	}
	name := p.dir + "/" + string(stream)
	err = p.b.reading(ctx, func() (err error) {
		n, err = p.read(ctx, name, buf, offset)
		return err
	})
	switch {
	case err == io.EOF: //nolint:errorlint // as in try
		return n, io.EOF
	case statusOf(err) == http.StatusNotFound && fault.KindOf(err) != fault.NotFound:
		return 0, io.EOF // it has only just been started
	}
	return n, asFault(op, err)
}

func (p *process) read(ctx context.Context, name string, buf []byte, offset int64) (n int, err error) {
	if err := p.b.keep(ctx); err != nil {
		return 0, err
	}
	if !p.b.noRange.Load() {
		err = p.b.try(ctx, true, func() (err error) {
			n, err = p.b.envd().readAt(ctx, name, buf, offset)
			return err
		})
		if !errors.Is(err, errNoRange) {
			return n, err
		}
		p.b.noRange.Store(true)
	}
	most := min(len(buf), maxSaid)
	r, err := p.b.script(ctx, userAgentOf, tailScript, name, strconv.FormatInt(offset+1, 10), strconv.Itoa(most))
	if err != nil {
		return 0, err
	}
	n = copy(buf, r.stdout)
	if n < most {
		err = io.EOF
	}
	return n, err
}

// aheadBuffers are for what is, most of the time, nothing.
var aheadBuffers = sync.Pool{New: func() any { return new([aheadSize]byte) }}

// takeAhead gives what Exit has read ahead, if that is what is asked for.
func (p *process) takeAhead(buf []byte, offset int64) (n int, ok bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.ahead
	p.ahead = ahead{}
	if a.data == nil || a.offset != offset || time.Since(a.at) > aheadTime {
		return 0, false, nil
	}
	n = copy(buf, a.data)
	p.tail = -1
	if a.end && n == len(a.data) {
		p.tail, err = offset+int64(n), io.EOF
	}
	return n, true, err
}

// noteTail remembers where the output ended.
func (p *process) noteTail(offset int64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tail = -1
	if err == io.EOF { //nolint:errorlint // as in try
		p.tail = offset
	}
}

// lives reports whether the process is known to live, and reads ahead. Of one
// that was started by an older program, and of one that ended, it is not.
func (p *process) lives(ctx context.Context, tail int64) (bool, error) {
	pooled := aheadBuffers.Get().(*[aheadSize]byte)
	defer aheadBuffers.Put(pooled)
	buf, n := pooled[:], 0
	err := p.b.try(ctx, true, func() (err error) {
		n, err = p.b.envd().readAt(ctx, p.dir+"/live/"+string(sandbox.Stdout), buf, tail)
		return err
	})
	switch {
	case err == nil || err == io.EOF: //nolint:errorlint // as in try
		p.mu.Lock()
		p.ahead = ahead{append([]byte{}, buf[:n]...), tail, err == io.EOF, time.Now()} //nolint:errorlint // as in try
		p.mu.Unlock()
		return true, nil
	case errors.Is(err, errNoRange), statusOf(err) == http.StatusNotFound && fault.KindOf(err) != fault.NotFound:
		return false, nil
	}
	return false, err
}

// Exit reads what the shell that waits for the process wrote down.
func (p *process) Exit(ctx context.Context) (exit sandbox.Exit, ok bool, err error) {
	err = p.b.reading(ctx, func() (err error) {
		exit, ok, err = p.ended(ctx)
		return err
	})
	return exit, ok, asFault("e2b: ask for exit", err)
}

func (p *process) ended(ctx context.Context) (sandbox.Exit, bool, error) {
	p.mu.Lock()
	known, look := p.exit, time.Now().After(p.look)
	if look {
		p.look = time.Now().Add(lookEvery)
	}
	tail := p.tail
	p.ahead = ahead{} // what is printed before an end is read after it
	p.mu.Unlock()
	if known != nil {
		// What it left is still the sandbox's: one that is gone has no exit.
		return *known, true, nil
	}
	if err := p.b.keep(ctx); err != nil {
		return sandbox.Exit{}, false, err
	}
	if tail >= 0 && !look && !p.b.noRange.Load() {
		if ok, err := p.lives(ctx, tail); ok || err != nil {
			return sandbox.Exit{}, false, err
		}
	}
	for {
		var buf [16]byte
		n := 0
		err := p.b.try(ctx, true, func() (err error) {
			n, err = p.b.envd().readAt(ctx, p.dir+"/exit", buf[:], 0)
			return err
		})
		switch {
		case err == nil || err == io.EOF: //nolint:errorlint // as in try
			exit, err := readExit(string(buf[:n]))
			if err != nil {
				return exit, false, err
			}
			p.mu.Lock()
			p.exit = &exit
			p.mu.Unlock()
			return exit, true, nil
		case statusOf(err) != http.StatusNotFound || fault.KindOf(err) == fault.NotFound:
			return sandbox.Exit{}, false, err
		case !look:
			return sandbox.Exit{}, false, nil
		}
		look = false
		if _, err := p.b.script(ctx, userAgentOf, aliveScript, p.dir); err != nil {
			return sandbox.Exit{}, false, err
		}
	}
}

// signalNames are those that end processes.
var signalNames = map[int]string{
	1: "HUP", 2: "INT", 3: "QUIT", 4: "ILL", 5: "TRAP", 6: "ABRT", 7: "BUS", 8: "FPE", 9: "KILL", 10: "USR1", 11: "SEGV",
	12: "USR2", 13: "PIPE", 14: "ALRM", 15: "TERM", 24: "XCPU", 25: "XFSZ", 31: "SYS",
}

// readExit reads what a shell calls the end of a command.
func readExit(text string) (sandbox.Exit, error) {
	code, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil || code < 0 || code > 255 {
		return sandbox.Exit{}, fmt.Errorf("the exit code %q is none", clean(text, 32, nil))
	}
	return sandbox.Exit{Code: code, Signal: signalNames[code-128]}, nil
}

// Wait asks again and again.
func (p *process) Wait(ctx context.Context) (sandbox.Exit, error) {
	for step := time.Millisecond; ; step = min(step+step/2, 500*time.Millisecond) {
		exit, ok, err := p.Exit(ctx)
		if err != nil || ok {
			return exit, err
		}
		if err := sleep(ctx, step); err != nil {
			return sandbox.Exit{}, asFault("e2b: wait", err)
		}
	}
}

// Signal signals the process group, from inside: envd would reach one process.
func (p *process) Signal(ctx context.Context, sig sandbox.Signal) error {
	const op = "e2b: signal"
	switch sig {
	case sandbox.Interrupt, sandbox.Terminate, sandbox.Kill:
	default:
		return fault.New(op, fault.Invalid, "there is no signal %q", sig)
	}
	_, err := p.b.script(ctx, userAgentOf, signalScript, p.dir, string(sig))
	return asFault(op, err)
}
