package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/fake"
)

// A broken provider is the fake with one promise broken. Every hook that is
// nil does what it should.
type broken struct {
	*fake.Provider
	create  func(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error)
	attach  func(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error)
	destroy func(ctx context.Context, ref sandbox.Ref) error
	list    func(ctx context.Context, labels map[string]string) ([]sandbox.Info, error)
	base    func(ctx context.Context, key string) error
	freeze  func(ctx context.Context, ref sandbox.Ref, key string) error
	snap    func(ctx context.Context, ref sandbox.Ref, key string) error
	bases   func(ctx context.Context) ([]sandbox.BaseInfo, error)
	remove  func(ctx context.Context, key string) error
	pause   func(ctx context.Context, ref sandbox.Ref) error
	open    func(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error)
	dial    func(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error)
	wrap    func(sb brokenSandbox) brokenSandbox
	boasts  bool // of limits that nobody enforces
}

// Unenforced is where a fake that has no limits can boast.
func (b *broken) Unenforced(sandbox.Limits) []sandbox.Limit {
	if b.boasts {
		return nil
	}
	return []sandbox.Limit{sandbox.MemoryLimit}
}

func (b *broken) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
	if b.create != nil {
		return b.create(ctx, spec)
	}
	return b.Provider.Create(ctx, spec)
}

func (b *broken) Attach(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	if b.attach != nil {
		return b.attach(ctx, ref)
	}
	sb, err := b.Provider.Attach(ctx, ref)
	if err != nil || b.wrap == nil {
		return sb, err
	}
	return b.wrap(brokenSandbox{Sandbox: sb}), nil
}

func (b *broken) Destroy(ctx context.Context, ref sandbox.Ref) error {
	if b.destroy != nil {
		return b.destroy(ctx, ref)
	}
	return b.Provider.Destroy(ctx, ref)
}

func (b *broken) List(ctx context.Context, labels map[string]string) ([]sandbox.Info, error) {
	if b.list != nil {
		return b.list(ctx, labels)
	}
	return b.Provider.List(ctx, labels)
}

func (b *broken) Base(ctx context.Context, key string) error {
	if b.base != nil {
		return b.base(ctx, key)
	}
	return b.Provider.Base(ctx, key)
}

func (b *broken) Freeze(ctx context.Context, ref sandbox.Ref, key string) error {
	if b.freeze != nil {
		return b.freeze(ctx, ref, key)
	}
	return b.Provider.Freeze(ctx, ref, key)
}

func (b *broken) Snapshot(ctx context.Context, ref sandbox.Ref, key string) error {
	if b.snap != nil {
		return b.snap(ctx, ref, key)
	}
	return b.Provider.Snapshot(ctx, ref, key)
}

func (b *broken) Bases(ctx context.Context) ([]sandbox.BaseInfo, error) {
	if b.bases != nil {
		return b.bases(ctx)
	}
	return b.Provider.Bases(ctx)
}

func (b *broken) RemoveBase(ctx context.Context, key string) error {
	if b.remove != nil {
		return b.remove(ctx, key)
	}
	return b.Provider.RemoveBase(ctx, key)
}

// onBases breaks every line of the list.
func onBases(f func(i *sandbox.BaseInfo)) func(*broken) {
	return func(b *broken) {
		b.bases = func(ctx context.Context) ([]sandbox.BaseInfo, error) {
			infos, err := b.Provider.Bases(ctx)
			for i := range infos {
				f(&infos[i])
			}
			return infos, err
		}
	}
}

func (b *broken) Pause(ctx context.Context, ref sandbox.Ref) error {
	if b.pause != nil {
		return b.pause(ctx, ref)
	}
	return b.Provider.Pause(ctx, ref)
}

func (b *broken) OpenTerminal(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error) {
	if b.open != nil {
		return b.open(ctx, ref, cmd, size)
	}
	return b.Provider.OpenTerminal(ctx, ref, cmd, size)
}

func (b *broken) DialPort(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
	if b.dial != nil {
		return b.dial(ctx, ref, port)
	}
	return b.Provider.DialPort(ctx, ref, port)
}

// A brokenTerminal is one with hooks.
type brokenTerminal struct {
	sandbox.Terminal
	write  func(p []byte) (int, error)
	resize func(size sandbox.TerminalSize) error
	close  func() error
}

func (t brokenTerminal) Write(p []byte) (int, error) {
	if t.write != nil {
		return t.write(p)
	}
	return t.Terminal.Write(p)
}

func (t brokenTerminal) Resize(size sandbox.TerminalSize) error {
	if t.resize != nil {
		return t.resize(size)
	}
	return t.Terminal.Resize(size)
}

func (t brokenTerminal) Close() error {
	if t.close != nil {
		return t.close()
	}
	return t.Terminal.Close()
}

// onTerminal breaks every terminal.
func onTerminal(f func(t brokenTerminal) brokenTerminal) func(*broken) {
	return func(b *broken) {
		b.open = func(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error) {
			t, err := b.Provider.OpenTerminal(ctx, ref, cmd, size)
			if err != nil {
				return nil, err
			}
			return f(brokenTerminal{Terminal: t}), nil
		}
	}
}

// onPausedList changes what a list says of pauses.
func onPausedList(f func(paused bool) bool) func(*broken) {
	return func(b *broken) {
		b.list = func(ctx context.Context, labels map[string]string) ([]sandbox.Info, error) {
			infos, err := b.Provider.List(ctx, labels)
			for i := range infos {
				infos[i].Paused = f(infos[i].Paused)
			}
			return infos, err
		}
	}
}

type brokenSandbox struct {
	sandbox.Sandbox
	start    func(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error)
	process  func(ctx context.Context, id string) (sandbox.Process, error)
	upload   func(ctx context.Context, path string, r io.Reader) error
	download func(ctx context.Context, path string) (io.ReadCloser, error)
	health   func(ctx context.Context) error
	deadline func(ctx context.Context, t time.Time) error
	proc     func(p brokenProcess) brokenProcess
}

func (s brokenSandbox) wrap(p sandbox.Process, err error) (sandbox.Process, error) {
	if err != nil || s.proc == nil {
		return p, err
	}
	return s.proc(brokenProcess{Process: p}), nil
}

func (s brokenSandbox) Start(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
	if s.start != nil {
		return s.start(ctx, id, cmd)
	}
	return s.wrap(s.Sandbox.Start(ctx, id, cmd))
}

func (s brokenSandbox) Process(ctx context.Context, id string) (sandbox.Process, error) {
	if s.process != nil {
		return s.process(ctx, id)
	}
	return s.wrap(s.Sandbox.Process(ctx, id))
}

func (s brokenSandbox) Upload(ctx context.Context, path string, r io.Reader) error {
	if s.upload != nil {
		return s.upload(ctx, path, r)
	}
	return s.Sandbox.Upload(ctx, path, r)
}

func (s brokenSandbox) Download(ctx context.Context, path string) (io.ReadCloser, error) {
	if s.download != nil {
		return s.download(ctx, path)
	}
	return s.Sandbox.Download(ctx, path)
}

func (s brokenSandbox) Health(ctx context.Context) error {
	if s.health != nil {
		return s.health(ctx)
	}
	return s.Sandbox.Health(ctx)
}

func (s brokenSandbox) SetDeadline(ctx context.Context, t time.Time) error {
	if s.deadline != nil {
		return s.deadline(ctx, t)
	}
	return s.Sandbox.SetDeadline(ctx, t)
}

type brokenProcess struct {
	sandbox.Process
	readAt func(ctx context.Context, stream sandbox.Stream, p []byte, offset int64) (int, error)
	exit   func(ctx context.Context) (sandbox.Exit, bool, error)
	wait   func(ctx context.Context) (sandbox.Exit, error)
	signal func(ctx context.Context, sig sandbox.Signal) error
}

func (p brokenProcess) ReadAt(ctx context.Context, stream sandbox.Stream, b []byte, offset int64) (int, error) {
	if p.readAt != nil {
		return p.readAt(ctx, stream, b, offset)
	}
	return p.Process.ReadAt(ctx, stream, b, offset)
}

func (p brokenProcess) Exit(ctx context.Context) (sandbox.Exit, bool, error) {
	if p.exit != nil {
		return p.exit(ctx)
	}
	return p.Process.Exit(ctx)
}

func (p brokenProcess) Wait(ctx context.Context) (sandbox.Exit, error) {
	if p.wait != nil {
		return p.wait(ctx)
	}
	return p.Process.Wait(ctx)
}

func (p brokenProcess) Signal(ctx context.Context, sig sandbox.Signal) error {
	if p.signal != nil {
		return p.signal(ctx, sig)
	}
	return p.Process.Signal(ctx, sig)
}

// onSandbox breaks every sandbox, and onProcess every process.
func onSandbox(f func(s brokenSandbox) brokenSandbox) func(*broken) {
	return func(b *broken) { b.wrap = f }
}

func onProcess(f func(p brokenProcess) brokenProcess) func(*broken) {
	return onSandbox(func(s brokenSandbox) brokenSandbox { s.proc = f; return s })
}

// onStart breaks what is started.
func onStart(f func(cmd *sandbox.Cmd)) func(*broken) {
	return onSandbox(func(s brokenSandbox) brokenSandbox {
		inner := s.Sandbox
		s.start = func(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
			f(&cmd)
			return inner.Start(ctx, id, cmd)
		}
		return s
	})
}

func onSpec(f func(s *sandbox.Spec)) func(*broken) {
	return func(b *broken) {
		b.create = func(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
			f(&spec)
			return b.Provider.Create(ctx, spec)
		}
	}
}

// kindless loses the kind of an error.
func kindless(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(err.Error())
}

type brokenPromise struct {
	name   string
	caught string // by the check of this name
	spoil  func(b *broken)
}

// patience is how long such a provider is waited for: most are caught at once.
func (r brokenPromise) patience() time.Duration {
	switch r.name {
	case "takes a Ctrl-C for itself", "leaves the line open", "has pipes for terminals", "loses the end of what was sent":
		return 2 * time.Second
	}
	return 10 * time.Second
}

// TestEveryBrokenPromiseIsCaught breaks one promise at a time and wants the
// check of that promise to say so.
func TestEveryBrokenPromiseIsCaught(t *testing.T) {
	rows := []brokenPromise{
		{"forgets keys", "create twice is one sandbox", func(b *broken) {
			var n atomic.Int64
			onSpec(func(s *sandbox.Spec) { s.Key = fmt.Sprintf("%s.%d", s.Key, n.Add(1)) })(b)
		}},
		{"forgets keys at once", "create twice at once is one sandbox", func(b *broken) {
			var n atomic.Int64
			onSpec(func(s *sandbox.Spec) { s.Key = fmt.Sprintf("%s.%d", s.Key, n.Add(1)) })(b)
		}},
		{"has one sandbox for all", "two keys are two sandboxes", onSpec(func(s *sandbox.Spec) { s.Key = "all" })},
		{"finds the successor by the old ref", "a key can be used again after destroy", func(b *broken) {
			b.attach = func(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
				infos, err := b.Provider.List(ctx, nil)
				for _, i := range infos {
					if i.Ref.ID == ref.ID {
						ref = i.Ref
					}
				}
				return b.Provider.Attach(ctx, errorless(ref, err))
			}
		}},
		{"takes any deadline", "an impossible spec is invalid", onSpec(func(s *sandbox.Spec) { s.Deadline = time.Now().Add(time.Minute) })},

		{"forgets ids", "start twice is one process", func(b *broken) { forgetIDs(b) }},
		{"forgets ids at once", "start twice at once is one process", func(b *broken) { forgetIDs(b) }},
		{"ignores a missing folder", "an impossible command is invalid", onStart(func(c *sandbox.Cmd) { c.Dir = "" })},
		{"finds what never was", "a process that was never started is not found", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.process = func(ctx context.Context, id string) (sandbox.Process, error) {
				return inner.Start(ctx, id, sandbox.Cmd{Args: []string{"true"}})
			}
			return s
		})},
		{"fails on a missing program", "a program that does not exist exits 127", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.start = func(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
				if strings.Contains(cmd.Args[0], "no-such") || strings.HasPrefix(cmd.Args[0], "/no/") {
					return nil, fault.New("start", fault.NotFound, "no such program")
				}
				return inner.Start(ctx, id, cmd)
			}
			return s
		})},
		{"knows success and failure only", "the exit code is reported, and stays", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			p.wait = func(ctx context.Context) (sandbox.Exit, error) {
				exit, err := inner.Wait(ctx)
				exit.Code = min(exit.Code, 1)
				return exit, err
			}
			return p
		})},
		{"forgets the signal's name", "the signal that ended a process is reported", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			p.wait = func(ctx context.Context) (sandbox.Exit, error) {
				exit, err := inner.Wait(ctx)
				exit.Signal = ""
				return exit, err
			}
			return p
		})},
		{"says ended too early", "exit and wait tell a running process from one that ended", onProcess(func(p brokenProcess) brokenProcess {
			p.exit = func(context.Context) (sandbox.Exit, bool, error) { return sandbox.Exit{}, true, nil }
			return p
		})},
		{"mixes the outputs", "the two outputs are kept apart and whole", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			p.readAt = func(ctx context.Context, _ sandbox.Stream, b []byte, offset int64) (int, error) {
				return inner.ReadAt(ctx, sandbox.Stdout, b, offset)
			}
			return p
		})},
		{"loses output that was read", "output can be read again from any byte, also after attaching anew", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			var read int64
			p.readAt = func(ctx context.Context, stream sandbox.Stream, b []byte, _ int64) (int, error) {
				n, err := inner.ReadAt(ctx, stream, b, read)
				read += int64(n)
				return n, err
			}
			return p
		})},
		{"waits for more output", "reading output never waits", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			p.readAt = func(ctx context.Context, stream sandbox.Stream, b []byte, offset int64) (int, error) {
				n, err := inner.ReadAt(ctx, stream, b, offset)
				if n == 0 {
					soon, cancel := context.WithTimeout(ctx, time.Second)
					defer cancel()
					if _, err := inner.Wait(soon); err != nil {
						return 0, err
					}
					return inner.ReadAt(ctx, stream, b, offset)
				}
				return n, err
			}
			return p
		})},
		{"joins arguments with blanks", "arguments arrive as they are", onStart(func(c *sandbox.Cmd) {
			if len(c.Args) > 3 {
				c.Args = []string{"sh", "-c", strings.Join(c.Args, " ")}
			}
		})},
		{"ignores the environment", "the environment is added to the sandbox's own", onStart(func(c *sandbox.Cmd) { c.Env = nil })},
		{"has the worker's own PATH emptied", "the environment is added to the sandbox's own", onStart(func(c *sandbox.Cmd) { c.Env = append(c.Env, "PATH=") })},
		{"ignores standard input", "standard input is a file of the sandbox, or empty", onStart(func(c *sandbox.Cmd) { c.Stdin = "" })},
		{"ignores the folder", "a command runs in the workspace or where it is told to", onStart(func(c *sandbox.Cmd) { c.Dir = "" })},
		{"runs in the home", "a command runs in the workspace or where it is told to", onStart(func(c *sandbox.Cmd) {
			if c.Dir == "" {
				c.Dir = sandbox.Home
			}
		})},
		{"has another home", "the home is the agent's own", onStart(func(c *sandbox.Cmd) { c.Env = append(c.Env, "HOME=/tmp") })},
		{"signals the first process only", "a signal reaches the whole process group", onStart(func(c *sandbox.Cmd) {
			for i, a := range c.Args {
				c.Args[i] = strings.Replace(a, "(while", "setsid sh -c 'while", 1)
				c.Args[i] = strings.Replace(c.Args[i], "0.02; done)", "0.02; done'", 1)
			}
		})},
		{"sends no signals", "a signal reaches the whole process group", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			p.signal = func(ctx context.Context, sig sandbox.Signal) error { return nil }
			p.wait = func(ctx context.Context) (sandbox.Exit, error) {
				soon, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				return inner.Wait(soon)
			}
			return p
		})},

		{"cuts large files", "what was uploaded is downloaded, byte for byte", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.upload = func(ctx context.Context, path string, r io.Reader) error {
				return inner.Upload(ctx, path, io.LimitReader(r, 5<<20))
			}
			return s
		})},
		{"keeps the first upload", "an upload replaces a file whole and makes its folders", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.upload = func(ctx context.Context, path string, r io.Reader) error {
				if f, err := inner.Download(ctx, path); err == nil {
					return f.Close()
				}
				return inner.Upload(ctx, path, r)
			}
			return s
		})},
		{"keeps half an upload", "an upload that breaks off leaves nothing", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.upload = func(ctx context.Context, path string, r io.Reader) error {
				b, readErr := io.ReadAll(r)
				return errors.Join(readErr, inner.Upload(ctx, path, strings.NewReader(string(b))))
			}
			return s
		})},
		{"keeps uploads to itself", "what a process wrote can be downloaded, and what was uploaded read", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.upload = func(ctx context.Context, path string, r io.Reader) error { return inner.Upload(ctx, path+".hidden", r) }
			return s
		})},
		{"does not say what is missing", "a missing file is not found and a folder is invalid", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.download = func(ctx context.Context, path string) (io.ReadCloser, error) {
				r, err := inner.Download(ctx, path)
				return r, kindless(err)
			}
			return s
		})},
		{"forgets mounts", "mounts are there first on the path, and the host's file cannot be changed", onSpec(func(s *sandbox.Spec) { s.Mounts = nil })},

		{"is never well", "a living sandbox is healthy", onSandbox(func(s brokenSandbox) brokenSandbox {
			s.health = func(context.Context) error { return errors.New("ill") }
			return s
		})},
		{"is always well", "a living sandbox is healthy", onSandbox(func(s brokenSandbox) brokenSandbox {
			s.health = func(context.Context) error { return nil }
			return s
		})},
		{"leaks on destroy", "attach after destroy is not found", func(b *broken) {
			b.destroy = func(context.Context, sandbox.Ref) error { return nil }
		}},
		{"leaks processes on destroy", "destroy ends running processes", func(b *broken) {
			b.destroy = func(context.Context, sandbox.Ref) error { return nil }
		}},
		{"loses the kind of a sandbox that is gone", "attach after destroy is not found", func(b *broken) {
			b.attach = func(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
				sb, err := b.Provider.Attach(ctx, ref)
				return sb, kindless(err)
			}
		}},
		{"destroys once only", "destroy twice is fine", func(b *broken) {
			b.destroy = func(ctx context.Context, ref sandbox.Ref) error {
				if _, err := b.Provider.Attach(ctx, ref); err != nil {
					return err
				}
				return b.Provider.Destroy(ctx, ref)
			}
		}},
		{"lists everything", "list finds by labels, and only those", func(b *broken) {
			b.list = func(ctx context.Context, _ map[string]string) ([]sandbox.Info, error) {
				return b.Provider.List(ctx, nil)
			}
		}},
		{"forgets labels", "list finds by labels, and only those", onSpec(func(s *sandbox.Spec) { s.Labels = nil })},
		{"destroys when it lets go", "close lets the sandbox live", func(b *broken) {
			b.attach = func(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
				sb, err := b.Provider.Attach(ctx, ref)
				if err != nil {
					return nil, err
				}
				return closing{sb, b, ref}, nil
			}
		}},
		{"lives for ever", "a deadline destroys the sandbox by itself", onSpec(func(s *sandbox.Spec) {
			if !s.Deadline.IsZero() {
				s.Deadline = s.Deadline.Add(time.Hour)
			}
		})},
		{"dies before its time", "a deadline destroys the sandbox by itself", onSpec(func(s *sandbox.Spec) {
			if !s.Deadline.IsZero() {
				s.Deadline = s.Deadline.Add(-2 * time.Second)
			}
		})},
		{"keeps the first deadline", "a deadline can be moved, both ways", onSandbox(func(s brokenSandbox) brokenSandbox {
			s.deadline = func(context.Context, time.Time) error { return nil }
			return s
		})},

		{"has every base", "a base that was never frozen is not found", func(b *broken) {
			b.base = func(context.Context, string) error { return nil }
		}},
		{"starts empty from a base", "sandboxes start from a base and do not see each other's writes", onSpec(func(s *sandbox.Spec) { s.Base = "" })},
		{"has one sandbox for each base", "sandboxes start from a base and do not see each other's writes", onSpec(func(s *sandbox.Spec) {
			if s.Base != "" {
				s.Key = s.Base
			}
		})},
		{"freezes anew", "the base that is there first stays", func(b *broken) {
			newest := map[string]string{}
			n := 0
			b.freeze = func(ctx context.Context, ref sandbox.Ref, key string) error {
				n++
				newest[key] = fmt.Sprintf("%s.%d", key, n)
				return b.Provider.Freeze(ctx, ref, newest[key])
			}
			b.base = func(ctx context.Context, key string) error { return b.Provider.Base(ctx, newest[key]) }
			onSpec(func(s *sandbox.Spec) { s.Base = newest[s.Base] })(b)
		}},
		{"forgets what a base was made on", "a base can be made on a base", onSpec(func(s *sandbox.Spec) {
			if strings.HasSuffix(s.Key, "-two") {
				s.Base = ""
			}
		})},
		{"uses the sandbox up", "a snapshot holds the files of one moment, and its sandbox goes on", func(b *broken) {
			b.snap = b.Provider.Freeze
		}},
		{"holds nobody", "a snapshot holds the files of one moment, and its sandbox goes on", func(b *broken) {
			b.snap = func(ctx context.Context, ref sandbox.Ref, key string) error { return copySlowly(ctx, b, ref, key) }
		}},
		{"snapshots an empty sandbox", "a snapshot holds the files of one moment, and its sandbox goes on", func(b *broken) {
			b.snap = func(ctx context.Context, _ sandbox.Ref, key string) error {
				return empty(ctx, b, key)
			}
		}},
		{"snapshots what was changed only", "a snapshot can be made on a base", func(b *broken) {
			b.snap = func(ctx context.Context, _ sandbox.Ref, key string) error { return empty(ctx, b, key) }
		}},
		{"forgets the labels of a base", "bases are listed with what is known of them", onBases(func(i *sandbox.BaseInfo) { i.Labels = nil })},
		{"never measured a base", "bases are listed with what is known of them", onBases(func(i *sandbox.BaseInfo) { i.Bytes = 0 })},
		{"forgets who uses a base", "bases are listed with what is known of them", onBases(func(i *sandbox.BaseInfo) { i.Users = 0 })},
		{"forgets when a base was used", "bases are listed with what is known of them", onBases(func(i *sandbox.BaseInfo) { i.Used = time.Time{} })},
		{"lists no bases", "bases are listed with what is known of them", func(b *broken) {
			b.bases = func(context.Context) ([]sandbox.BaseInfo, error) { return nil, nil }
		}},
		{"removes no base", "a base is removed when nobody stands on it, and not before", func(b *broken) {
			b.remove = func(context.Context, string) error { return nil }
		}},
		{"does not say why a base stays", "a base is removed when nobody stands on it, and not before", func(b *broken) {
			b.remove = func(ctx context.Context, key string) error { return kindless(b.Provider.RemoveBase(ctx, key)) }
		}},
		{"removes a base once only", "a base is removed when nobody stands on it, and not before", func(b *broken) {
			b.remove = func(ctx context.Context, key string) error {
				if err := b.Provider.Base(ctx, key); err != nil {
					return err
				}
				return b.Provider.RemoveBase(ctx, key)
			}
		}},

		{"does not pause", "a paused sandbox stands still, and goes on from there", func(b *broken) {
			b.pause = func(context.Context, sandbox.Ref) error { return nil }
			onPausedList(func(bool) bool { return true })(b)
		}},
		{"pauses the group only", "a paused sandbox stands still, and goes on from there", onStart(func(c *sandbox.Cmd) {
			c.Args = append([]string{}, c.Args...)
			for i, a := range c.Args {
				// What does not have the mark is not found by the fake; it ends with its folder.
				c.Args[i] = strings.Replace(a, "(setsid sh -c 'while :;", `(env -u SANDBOX_FAKE setsid sh -c 'while [ -e "$PWD" ];`, 1)
			}
		})},
		{"starts anew after a pause", "a paused sandbox stands still, and goes on from there", onProcess(func(p brokenProcess) brokenProcess {
			inner := p.Process
			p.readAt = func(ctx context.Context, stream sandbox.Stream, b []byte, offset int64) (int, error) {
				n, err := inner.ReadAt(ctx, stream, b, offset)
				for i := range b[:n] {
					if b[i] == '7' {
						b[i] = '1'
					}
				}
				return n, err
			}
			return p
		})},
		{"does not list a pause", "a paused sandbox stands still, and goes on from there", onPausedList(func(bool) bool { return false })},
		{"lists a pause for ever", "a paused sandbox stands still, and goes on from there", func(b *broken) {
			was := false
			onPausedList(func(paused bool) bool { was = was || paused; return was })(b)
		}},
		{"starts while paused", "a paused sandbox stands still, and goes on from there", onSandbox(func(s brokenSandbox) brokenSandbox {
			inner := s.Sandbox
			s.start = func(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
				p, err := inner.Start(ctx, id, cmd)
				if fault.KindOf(err) == fault.Conflict {
					return nil, nil
				}
				return p, err
			}
			return s
		})},
		{"does not let a paused one be seen", "a paused sandbox can be read, attached to and destroyed", func(b *broken) {
			b.attach = func(ctx context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
				sb, err := b.Provider.Attach(ctx, ref)
				if err == nil && fault.KindOf(sb.Health(ctx)) == fault.Conflict {
					return nil, fault.New("attach", fault.Conflict, "paused")
				}
				return sb, err
			}
		}},
		{"cannot destroy a paused one", "a paused sandbox can be read, attached to and destroyed", func(b *broken) {
			b.destroy = func(ctx context.Context, ref sandbox.Ref) error {
				if sb, err := b.Provider.Attach(ctx, ref); err == nil && fault.KindOf(sb.Health(ctx)) == fault.Conflict {
					return fault.New("destroy", fault.Conflict, "paused")
				}
				return b.Provider.Destroy(ctx, ref)
			}
		}},
		{"stops the clock of a paused one", "the deadline of a paused sandbox goes on", func(b *broken) {
			b.pause = func(ctx context.Context, ref sandbox.Ref) error {
				sb, err := b.Provider.Attach(ctx, ref)
				if err != nil {
					return err
				}
				return errors.Join(b.Provider.Pause(ctx, ref), sb.SetDeadline(ctx, time.Now().Add(time.Hour)))
			}
		}},

		{"cannot be resized", "a terminal has a size, echoes, and says how its command ended", onTerminal(func(t brokenTerminal) brokenTerminal {
			t.resize = func(sandbox.TerminalSize) error { return nil }
			return t
		})},
		{"knows one size", "a terminal has a size, echoes, and says how its command ended", func(b *broken) {
			b.open = func(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, _ sandbox.TerminalSize) (sandbox.Terminal, error) {
				return b.Provider.OpenTerminal(ctx, ref, cmd, sandbox.TerminalSize{Rows: 24, Columns: 80})
			}
		}},
		{"has pipes for terminals", "a terminal has a size, echoes, and says how its command ended", func(b *broken) {
			b.open = func(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error) {
				cmd.Args = append([]string{"sh", "-c", `cat | "$@" | cat`, "sh"}, cmd.Args...)
				return b.Provider.OpenTerminal(ctx, ref, cmd, size)
			}
		}},
		{"takes a Ctrl-C for itself", "keys on a terminal send signals", onTerminal(func(t brokenTerminal) brokenTerminal {
			inner := t.Terminal
			t.write = func(p []byte) (int, error) {
				_, err := inner.Write([]byte(strings.ReplaceAll(string(p), "\x03", "")))
				return len(p), err
			}
			return t
		})},
		{"leaves the line open", "closing a terminal hangs it up", onTerminal(func(t brokenTerminal) brokenTerminal {
			inner := t.Terminal
			var once sync.Once
			t.close = func() error {
				once.Do(func() { time.AfterFunc(3*time.Second, func() { inner.Close() }) })
				return nil
			}
			return t
		})},
		{"fails on a missing program on a terminal", "an impossible command on a terminal is told as one without", func(b *broken) {
			b.open = func(ctx context.Context, ref sandbox.Ref, cmd sandbox.Cmd, size sandbox.TerminalSize) (sandbox.Terminal, error) {
				if len(cmd.Args) > 0 && strings.HasPrefix(cmd.Args[0], "no-such") {
					return nil, fault.New("open terminal", fault.NotFound, "no such program")
				}
				return b.Provider.OpenTerminal(ctx, ref, cmd, size)
			}
		}},

		{"dials another port", "a port in the sandbox can be reached, and one where nobody listens is unavailable", func(b *broken) {
			b.dial = func(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
				return b.Provider.DialPort(ctx, ref, port-1)
			}
		}},
		{"loses the end of what was sent", "a port in the sandbox can be reached, and one where nobody listens is unavailable", func(b *broken) {
			b.dial = func(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
				c, err := b.Provider.DialPort(ctx, ref, port)
				if err != nil {
					return nil, err
				}
				return deaf{c}, nil
			}
		}},
		{"does not say that nobody listens", "a port in the sandbox can be reached, and one where nobody listens is unavailable", func(b *broken) {
			b.dial = func(ctx context.Context, ref sandbox.Ref, port int) (sandbox.Conn, error) {
				c, err := b.Provider.DialPort(ctx, ref, port)
				return c, kindless(err)
			}
		}},

		{"takes any limit", "limits that no sandbox could live with are invalid", boastOfLimits},
		{"has no memory limit", "a process that needs too much memory is ended, and says so", boastOfLimits},
		{"has no process limit", "a fork bomb runs out of processes and the sandbox still answers", boastOfLimits},
		{"has no disk limit", "a process that writes too much is ended, and says so", boastOfLimits},
		{"has no CPU limit", "a sandbox gets no more CPU time than it may", boastOfLimits},
	}
	checks := map[string]conformance.Check{}
	for _, c := range conformance.Checks {
		checks[c.Name] = c
	}
	tried := map[string]bool{}
	for _, r := range rows {
		tried[r.caught] = true
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			check, ok := checks[r.caught]
			if !ok {
				t.Fatalf("there is no check %q", r.caught)
			}
			inner := fake.New(t.TempDir())
			t.Cleanup(func() {
				if err := inner.Close(); err != nil {
					t.Error(err)
				}
			})
			b := &broken{Provider: inner}
			r.spoil(b)
			// A provider that never lets go of what it should is waited for
			// in vain; not for a minute.
			ctx, cancel := context.WithTimeout(t.Context(), r.patience())
			defer cancel()
			err := check.Run(ctx, b, "broken")
			for i := range 4 {
				if err != nil {
					break
				}
				// Who takes more CPU time than he may gets none on a machine
				// that has other things to do.
				err = check.Run(ctx, b, fmt.Sprintf("broken-%d", i))
			}
			if err == nil {
				t.Errorf("%q did not see it", r.caught)
			}
			t.Log(err) // with -v: whether it was seen for the right reason
		})
	}
	for name := range checks {
		if !tried[name] {
			t.Errorf("no broken provider shows that %q can fail", name)
		}
	}
}

// A deaf connection does not tell its other side that nothing more comes.
type deaf struct{ sandbox.Conn }

func (deaf) CloseWrite() error { return nil }

func boastOfLimits(b *broken) { b.boasts = true }

// errorless keeps a row short; the list of a fake never fails.
func errorless(ref sandbox.Ref, err error) sandbox.Ref {
	if err != nil {
		panic(err)
	}
	return ref
}

// empty stores an empty base.
func empty(ctx context.Context, b *broken, key string) error {
	ref, err := b.Provider.Create(ctx, sandbox.Spec{Key: key + "-empty", Deadline: time.Now().Add(time.Minute)})
	if err != nil {
		return err
	}
	return errors.Join(b.Provider.Freeze(ctx, ref, key), b.Provider.Destroy(ctx, ref))
}

// copySlowly stores a base of two files that are not of one moment.
func copySlowly(ctx context.Context, b *broken, ref sandbox.Ref, key string) error {
	if b.Provider.Base(ctx, key) == nil {
		return nil
	}
	from, err := b.Provider.Attach(ctx, ref)
	if err != nil {
		return err
	}
	made, err := b.Provider.Create(ctx, sandbox.Spec{Key: key + "-slow", Deadline: time.Now().Add(time.Minute)})
	if err != nil {
		return err
	}
	to, err := b.Provider.Attach(ctx, made)
	if err != nil {
		return err
	}
	read := func(name string) (n int, err error) {
		r, err := from.Download(ctx, sandbox.Workspace+"/"+name)
		if err != nil {
			return 0, err
		}
		defer r.Close()
		_, err = fmt.Fscan(r, &n)
		return n, err
	}
	a, err := read("a")
	if err != nil {
		return err
	}
	var later int
	for later < a+2 { // as a copy of many files comes to the second one late
		if later, err = read("b"); err != nil {
			return err
		}
	}
	for name, n := range map[string]int{"a": a, "b": later} {
		if err := to.Upload(ctx, sandbox.Workspace+"/"+name, strings.NewReader(strconv.Itoa(n))); err != nil {
			return err
		}
	}
	return errors.Join(b.Provider.Freeze(ctx, made, key), b.Provider.Destroy(ctx, made))
}

func forgetIDs(b *broken) {
	var n atomic.Int64
	onSandbox(func(s brokenSandbox) brokenSandbox {
		inner := s.Sandbox
		s.start = func(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
			return inner.Start(ctx, fmt.Sprintf("%s.%d", id, n.Add(1)), cmd)
		}
		return s
	})(b)
}

// A closing sandbox is destroyed when it is let go.
type closing struct {
	sandbox.Sandbox
	b   *broken
	ref sandbox.Ref
}

func (c closing) Close() error { return c.b.Provider.Destroy(context.Background(), c.ref) }

func TestNewWorkerCatchesAProviderThatKeepsItsSandboxesToItself(t *testing.T) {
	p := fake.New(t.TempDir())
	defer p.Close()
	others := 0
	check := conformance.NewWorker(func() (sandbox.Provider, error) {
		others++
		q := fake.New(t.TempDir())
		t.Cleanup(func() { q.Close() })
		return q, nil
	})
	if err := check.Run(t.Context(), p, "worker"); err == nil {
		t.Error("a provider in memory passed for one that another worker can follow")
	}
	if others != 1 {
		t.Errorf("%d other workers were made", others)
	}
	// One that both workers share passes.
	if err := conformance.NewWorker(func() (sandbox.Provider, error) { return p, nil }).Run(t.Context(), p, "same"); err != nil {
		t.Error(err)
	}
}

func TestNamesOfChecksAreSentencesOfTheirOwn(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range conformance.Checks {
		if seen[c.Name] || c.Name == "" || strings.ToLower(c.Name[:1]) != c.Name[:1] {
			t.Errorf("name %q", c.Name)
		}
		seen[c.Name] = true
	}
}
