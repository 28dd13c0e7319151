package local

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// The tests in this file play an init that the agent has taken over, and
// strangers who write what a worker or a supervisor reads.

// A dummy is a supervisor whose init is the test.
type dummy struct {
	*supervisor
	link *link // init's end
	over sync.WaitGroup
}

// newDummy returns a supervisor that hears what init says, and takes the
// process for it.
func newDummy(t testing.TB, init *os.Process) *dummy {
	t.Helper()
	box, err := openFolder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { box.Close() })
	d := &dummy{supervisor: &supervisor{
		box: box, log: slog.New(slog.DiscardHandler), state: ready, processes: map[string]*process{},
		record: record{Identity: currentIdentity()}, init: asInit(t, init), initDone: make(chan struct{}), heard: make(chan struct{}), over: make(chan struct{}),
	}}
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := fileConn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	d.link = newLink(conn, maxRequest, maxFiles)
	d.orders.open(ours, d.initDone)
	d.over.Go(func() {
		d.orders.hear(d.supervisor)
		close(d.initDone)
	})
	t.Cleanup(d.close)
	return d
}

// close ends init, and returns when the supervisor has noticed.
func (d *dummy) close() {
	d.link.conn.Close()
	d.over.Wait()
}

// say has init say this, whatever it is.
func (d *dummy) say(t testing.TB, b []byte, fds ...int) {
	t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := d.link.conn.WriteMsgUnix(b, oob, nil); err != nil {
		t.Fatal(err)
	}
}

// frame encodes v.
func frame(t testing.TB, v any) []byte {
	t.Helper()
	b, err := encodeFrame(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sleeper starts a process that lives until it is killed, at the latest when
// the test ends, in whatever way. The channel is closed when it is dead.
func sleeper(t testing.TB) (*os.Process, <-chan struct{}) {
	t.Helper()
	cmd := self(t, attackWord, "stay")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dead := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(dead)
	}()
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill()
		<-dead
	})
	return cmd.Process, dead
}

func TestAnInitThatMakesNoSenseIsKilled(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	n := int(null.Fd())
	for what, row := range map[string]struct {
		says []byte
		fds  []int
	}{
		"a frame too long":        {says: []byte{0xff, 0xff, 0xff, 0xff}},
		"a frame a bit too long":  {says: binary.BigEndian.AppendUint32(nil, maxReply+1)},
		"no JSON":                 {says: append([]byte{0, 0, 0, 5}, "hello"...)},
		"nothing":                 {says: []byte{0, 0, 0, 0}},
		"a number out of range":   {says: append([]byte{0, 0, 0, 10}, `{"seq":-1}`...)},
		"one file too many":       {says: frame(t, answer{Seq: 1}), fds: []int{n, n}},
		"more files than allowed": {says: frame(t, answer{Seq: 1}), fds: []int{n, n, n, n, n, n}},
	} {
		t.Run(what, func(t *testing.T) {
			init, dead := sleeper(t)
			d := newDummy(t, init)
			asked := make(chan error, 1)
			go func() {
				_, err := d.order(order{Op: opPing})
				asked <- err
			}()
			var o order
			if _, err := d.link.receive(&o); err != nil {
				t.Fatal(err)
			}
			before := descriptors(t)
			d.say(t, row.says, row.fds...)
			<-dead
			if err := <-asked; fault.KindOf(err) != fault.NotFound {
				t.Errorf("who waited for an answer was told: %v", err)
			}
			eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
		})
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestASupervisorIsNotConfusedByInit has init say what it may say, when it may
// not.
func TestASupervisorIsNotConfusedByInit(t *testing.T) {
	init, _ := sleeper(t)
	d := newDummy(t, init)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := descriptors(t)
	p := &process{known: make(chan struct{}), done: make(chan struct{})}
	close(p.known)
	d.mu.Lock()
	d.processes["x"] = p
	d.mu.Unlock()
	end := func(id string, code int) *ended {
		return &ended{ID: id, Exit: sandbox.Exit{Code: code, Signal: "\x1b[2J"}}
	}
	for range 100 {
		d.say(t, frame(t, answer{Seq: 12345}), int(null.Fd()))                         // nobody asked
		d.say(t, frame(t, answer{Ended: end("y", 1)}), int(null.Fd()))                 // nobody it knows
		d.say(t, frame(t, answer{Ended: end("../../x", 1)}))                           // nobody there can be
		d.say(t, frame(t, answer{Fault: &wireFault{Kind: "x", Text: "x", Hint: "x"}})) // to nothing
	}
	d.say(t, frame(t, answer{Ended: end("x", 7+256)}))
	<-p.done
	// More than once, and both ways at a time.
	var all sync.WaitGroup
	for range 50 {
		d.say(t, frame(t, answer{Ended: end("x", 8)}))
		all.Go(func() { d.ended("x", sandbox.Exit{Code: 9}) })
	}
	all.Wait()
	all.Go(func() { // init is asked once more, and answers three times
		var o order
		if _, err := d.link.receive(&o); err != nil {
			t.Error(err)
			return
		}
		for range 3 {
			if err := d.link.send(answer{Seq: o.Seq, Fault: &wireFault{Kind: "made_up", Text: strings.Repeat("x", 2*maxText), Hint: "h"}}); err != nil {
				t.Error(err)
			}
		}
	})
	_, err = d.order(order{Op: opPing})
	all.Wait()
	if fault.KindOf(err) != fault.Internal || len(err.Error()) > maxText+100 {
		t.Errorf("kind %s, %d bytes", fault.KindOf(err), len(err.Error()))
	}
	if p.exit.Code != 7 {
		t.Errorf("exit code %d, want that of the first time, 7", p.exit.Code)
	}
	eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
}

// TestAFileFromInitMustBeAFile has init send something else: a worker would
// wait for it, or write to it with rights that the agent has not.
func TestAFileFromInitMustBeAFile(t *testing.T) {
	dir := t.TempDir()
	plain, pipe := filepath.Join(dir, "plain"), filepath.Join(dir, "pipe")
	if err := os.WriteFile(plain, []byte("plain"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", "@"+newInstance())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	listener, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	open := func(name string, flags int) int {
		t.Helper()
		fd, err := unix.Open(name, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	for what, row := range map[string]struct {
		fds []int
		ok  bool
	}{
		"a file":                 {[]int{open(plain, unix.O_RDONLY)}, true},
		"a folder":               {[]int{open(dir, unix.O_RDONLY)}, false},
		"a pipe":                 {[]int{open(pipe, unix.O_RDONLY)}, false},
		"a device":               {[]int{open("/dev/zero", unix.O_RDONLY)}, false},
		"a socket":               {[]int{int(listener.Fd())}, false},
		"a file of the kernel's": {[]int{open("/proc/self/oom_score_adj", unix.O_RDWR)}, false},
		"nothing":                {nil, false},
	} {
		t.Run(what, func(t *testing.T) {
			init, _ := sleeper(t)
			d := newDummy(t, init)
			before := descriptors(t)
			var all sync.WaitGroup
			all.Go(func() {
				var o order
				_, err := d.link.receive(&o)
				if err == nil {
					err = d.link.send(answer{Seq: o.Seq}, row.fds...)
				}
				if err != nil {
					t.Error(err)
				}
			})
			f, err := d.openFile(request{Op: opRead, Path: []byte("/workspace/x")})
			all.Wait()
			if (err == nil) != row.ok {
				t.Errorf("%v", err)
			}
			if f != nil {
				f.Close()
			}
			eventually(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
		})
	}
}

// TestAListenerThatBlocksHoldsNobodyUp: init has the same listener as the
// supervisor, and can have its Accept wait in the kernel.
func TestAListenerThatBlocksHoldsNobodyUp(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	inits, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer inits.Close()
	l.Close()
	given, err := unix.FcntlInt(inits.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	w, err := forward(os.NewFile(uintptr(given), "given"), "/no/such/gateway", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(int(inits.Fd()), false); err != nil {
		t.Fatal(err)
	}
	// Whoever connects is let go again, and the next Accept blocks.
	for range 2 {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("somebody answered")
		}
		c.Close()
	}
	closed := make(chan struct{})
	go func() {
		w.close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for init")
	}
}

// TestDestroyKillsNobodyThatARefNames: refs come from the history of a
// workflow, which others can write to.
func TestDestroyKillsNobodyThatARefNames(t *testing.T) {
	victim, dead := sleeper(t)
	id, err := identify(victim.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p := newProvider(t)
	ref, _ := newSandbox(t, p, testSpec("forged"))
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	// One that does not answer is killed.
	if err := unix.Kill(h.Supervisor.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the supervisor is stopped", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.Supervisor.PID))
		return err == nil && bytes.Contains(b, []byte(") T "))
	})
	forged := h
	forged.Supervisor = id
	if err := p.Destroy(t.Context(), forged.ref()); err != nil {
		t.Error(err)
	}
	select {
	case <-dead:
		t.Error("a process that had nothing to do with it was killed")
	default:
	}
	if _, err := p.Attach(t.Context(), ref); fault.KindOf(err) != fault.NotFound {
		t.Errorf("the sandbox lives on: %v", err)
	}
}

// TestOddFilesInTheStateFolderHurtNobody puts odd things into the place of the
// files that describe a sandbox.
func TestOddFilesInTheStateFolderHurtNobody(t *testing.T) {
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte(`{"key":"odd","instance":"0123456789abcdef"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	write := func(text string) func(string) error {
		return func(name string) error { return os.WriteFile(name, []byte(text), 0o600) }
	}
	for what, odd := range map[string]func(name string) error{
		"a link":                 func(name string) error { return os.Symlink(victim, name) },
		"a link to itself":       func(name string) error { return os.Symlink(name, name) },
		"a pipe":                 func(name string) error { return unix.Mkfifo(name, 0o600) },
		"a folder":               func(name string) error { return os.Mkdir(name, 0o700) },
		"a device":               func(name string) error { return os.Symlink("/dev/zero", name) },
		"nothing":                write(""),
		"no JSON":                write("hello"),
		"too much":               func(name string) error { return os.Truncate(name, maxRequest+1) },
		"another's":              write(`{"key":"other","instance":"0123456789abcdef"}`),
		"a way out":              write(`{"key":"../..","instance":"../../../victim"}`),
		"a way out of the trash": write(`{"key":"odd","instance":"../../../../victim"}`),
		"all fields wrong":       write(`{"key":1,"instance":[],"identity":"x"}`),
		"deep":                   write(strings.Repeat(`{"a":`, 100_000)),
	} {
		for _, file := range []string{specFile, refFile, lifeFile} {
			t.Run(what+" as "+file, func(t *testing.T) {
				p := New(testOptions(filepath.Join(t.TempDir(), "state")))
				if err := makeState("test", p.dir); err != nil {
					t.Fatal(err)
				}
				box := p.boxPath("odd")
				if err := os.MkdirAll(filepath.Join(box, fsDir), 0o700); err != nil {
					t.Fatal(err)
				}
				for name, text := range map[string]string{
					lifeFile: "{}", specFile: `{"key":"odd","instance":"0123456789abcdef"}`, refFile: `{"key":"odd","instance":"0123456789abcdef"}`,
				} {
					path := filepath.Join(box, name)
					if name == file && what != "too much" {
						if err := odd(path); err != nil {
							t.Fatal(err)
						}
						continue
					}
					if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
					if name == file {
						if err := odd(path); err != nil {
							t.Fatal(err)
						}
					}
				}
				if _, err := p.List(t.Context(), nil); err != nil {
					t.Errorf("list: %v", err)
				}
				h := handle{Key: "odd", Instance: "0123456789abcdef"}
				if _, err := p.Attach(t.Context(), h.ref()); err == nil {
					t.Error("attached to it")
				}
				_ = p.Destroy(t.Context(), h.ref()) // it may fail, and say why
				if _, err := os.Stat(victim); err != nil {
					t.Errorf("the link's target is gone: %v", err)
				}
			})
		}
	}
}

// exited is a process that is no more.
func exited(t testing.TB) *os.Process {
	t.Helper()
	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process
}

// FuzzWhatInitSays lets init say anything while orders are under way.
func FuzzWhatInitSays(f *testing.F) {
	one, two := frame(f, answer{Seq: 1}), frame(f, answer{Ended: &ended{ID: "x", Exit: sandbox.Exit{Code: 1}}})
	for _, b := range [][]byte{one, two, append(append(bytes.Clone(two), one...), two...), append(bytes.Clone(one), one...), {0, 0, 0, 2, '{', '}'}, {0xff, 0xff, 0xff, 0xff}} {
		f.Add(b)
	}
	dead := exited(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newDummy(t, dead)
		p := &process{known: make(chan struct{}), done: make(chan struct{})}
		close(p.known)
		d.mu.Lock()
		d.processes["x"] = p
		d.mu.Unlock()
		var all sync.WaitGroup
		for _, op := range []string{opPing, opRead} {
			all.Go(func() {
				if op == opPing {
					_, _ = d.order(order{Op: op})
				} else if file, err := d.openFile(request{Op: op, Path: []byte("/x")}); err == nil {
					file.Close()
					t.Error("a file from nowhere")
				}
			})
		}
		for len(b) > 0 {
			n, err := d.link.conn.Write(b)
			if err != nil {
				break // it has heard enough
			}
			b = b[n:]
		}
		d.close()
		all.Wait()
	})
}

// FuzzWhatAWorkerSays sends anything to a supervisor whose init agrees to
// everything.
func FuzzWhatAWorkerSays(f *testing.F) {
	for _, q := range []request{
		{Op: opHello}, {Op: opHealth}, {Op: opProcess, ID: "x"}, {Op: opSignal, ID: "x", Signal: "KILL"}, {Op: opRead, Path: []byte("/x")}, {Op: opWrite, Path: []byte("/../x")},
		{Op: opStart, ID: "y", Cmd: &command{Args: [][]byte{[]byte("true")}, Dir: []byte("/")}}, {Op: opStart, ID: "..", Cmd: &command{Args: [][]byte{{}}, Dir: []byte("/")}},
		{Op: opFreeze, Base: "../x"}, {Op: opDeadline},
	} {
		f.Add(frame(f, q))
	}
	dead := exited(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		var q request
		if err := decodeFrame(bytes.NewReader(b), &q, maxRequest); err == nil {
			switch q.Op {
			case opFreeze, opDestroy, opDeadline, opWait:
				// They end the sandbox, or wait for its end; their one argument
				// is checked by ValidID or is a time.
				return
			}
		}
		d := newDummy(t, dead)
		var asked sync.WaitGroup
		defer asked.Wait()
		defer d.link.conn.Close()
		asked.Go(func() {
			for {
				var o order
				files, err := d.link.receive(&o)
				closeAll(files)
				if err != nil {
					return
				}
				if (o.Op == opRead || o.Op == opWrite) && !cleanAbsolute(string(o.Path)) {
					t.Errorf("init was asked for %q", o.Path)
				}
				if o.Op == opStart && (!sandbox.ValidID(o.ID) || checkCommand("", o.ID, o.Cmd) != nil) {
					t.Errorf("init was asked to start %+v", o)
				}
				if err := d.link.send(answer{Seq: o.Seq}); err != nil {
					return
				}
			}
		})
		ours, theirs, err := socketPair()
		if err != nil {
			t.Fatal(err)
		}
		worker, err := fileConn(theirs)
		if err != nil {
			t.Fatal(err)
		}
		talked := make(chan struct{})
		go func() {
			defer close(talked)
			defer ours.Close()
			d.talk(ours)
		}()
		_, _ = worker.Write(b)
		_ = worker.CloseWrite()
		_ = worker.SetReadDeadline(time.Now().Add(10 * time.Second))
		reply, err := io.ReadAll(worker)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q has no answer", b)
		}
		worker.Close()
		<-talked
		if len(reply) > 0 {
			var r response
			if err := decodeFrame(bytes.NewReader(reply), &r, maxReply); err != nil {
				t.Errorf("%q is answered by %q: %v", b, reply, err)
			}
		}
		// Whatever was started has its outputs in the folder, under names of ours.
		_ = filepath.WalkDir(d.box.path, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			rel, err := filepath.Rel(d.box.path, path)
			if err != nil || strings.Contains(rel, "/") || !strings.HasPrefix(rel, "p-") {
				t.Errorf("a file was made: %s", path)
			}
			return nil
		})
	})
}

// FuzzBase reads what describes a base, which is ours but lies where others
// may have been.
func FuzzBase(f *testing.F) {
	id := currentIdentity()
	good, err := json.Marshal(base{Version: baseVersion, Key: "b", Agent: id.agent(), Below: []string{"a"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(fmt.Appendf(nil, `{"version":1,"key":"b","agent":%d,"below":["../../x"]}`, id.agent()))
	f.Add([]byte(`{"version":1,"key":"../b"}`))
	dir := f.TempDir()
	for _, key := range []string{"a", "b"} {
		for _, l := range layers {
			if err := os.MkdirAll(filepath.Join(basePath(dir, key), fsDir, l.name), 0o700); err != nil {
				f.Fatal(err)
			}
		}
	}
	a, err := json.Marshal(base{Version: baseVersion, Key: "a", Agent: id.agent()})
	if err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(basePath(dir, "a"), baseFile), a, 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(filepath.Join(basePath(dir, "b"), baseFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		keys, err := readLayers("fuzz", dir, "b", id)
		if err != nil {
			return
		}
		for _, key := range keys {
			// They become the names of folders that are mounted.
			if key != "a" && key != "b" {
				t.Fatalf("%q names the layer %q", b, key)
			}
		}
	})
}

// asInit returns the process as newInit does the one that it starts. It may be
// no more.
func asInit(t testing.TB, p *os.Process) *initChild {
	t.Helper()
	fd, err := unix.PidfdOpen(p.Pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return &initChild{pid: p.Pid, fd: -1}
	}
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "init")
	t.Cleanup(func() { f.Close() })
	return &initChild{p.Pid, fd, f}
}
