package local

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// What stands here in JSON is what versions of this program say that people
// have: it is not made from the types of today, and it never changes.

// exchange sends one frame and returns the answer's.
func exchange(t *testing.T, c net.Conn, text string) map[string]any {
	t.Helper()
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(text)))
	if _, err := c.Write(append(frame, text...)); err != nil {
		t.Fatal(err)
	}
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(c, body); err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal(body, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestAWorkerOfProtocol1IsServed(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("elder"))
	say := func(text string) map[string]any {
		t.Helper()
		c, err := sb.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return exchange(t, c, text)
	}
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	if r := say(`{"version":1,"op":"hello"}`); r["state"] != "ready" || r["instance"] != h.Instance || r["fault"] != nil {
		t.Errorf("hello: %v", r)
	}
	if r := say(`{"version":1,"op":"health"}`); r["fault"] != nil {
		t.Errorf("health: %v", r)
	}
	// Args, environment and folder are bytes in base64.
	if r := say(`{"version":1,"op":"start","id":"old","cmd":{"args":["c2g=","LWM=","ZWNobyAkQTsgZXhpdCA3"],"env":["QT1oZWxsbw=="],"dir":"L3dvcmtzcGFjZQ=="}}`); r["fault"] != nil {
		t.Errorf("start: %v", r)
	}
	exit := func(r map[string]any) any {
		e, _ := r["exit"].(map[string]any)
		return e["code"]
	}
	if r := say(`{"version":1,"op":"wait","id":"old"}`); exit(r) != 7.0 {
		t.Errorf("wait: %v", r)
	}
	if r := say(`{"version":1,"op":"process","id":"old"}`); exit(r) != 7.0 {
		t.Errorf("process: %v", r)
	}
	// Where outputs lie has changed since: a worker of that time reads none of
	// this sandbox, while one of today reads those of old sandboxes.
	if out, err := os.ReadFile(filepath.Join(p.boxPath("elder"), "p-old.stdout")); err != nil || string(out) != "hello\n" {
		t.Errorf("output %q, %v", out, err)
	}
	kind := func(r map[string]any) any {
		f, _ := r["fault"].(map[string]any)
		return f["kind"]
	}
	if r := say(`{"version":1,"op":"process","id":"never"}`); kind(r) != "not_found" {
		t.Errorf("a process that never was: %v", r)
	}
	if r := say(`{"version":1,"op":"signal","id":"old","signal":"TERM"}`); r["fault"] != nil {
		t.Errorf("signal: %v", r)
	}
	if r := say(`{"version":1,"op":"deadline","deadline":"2199-01-01T00:00:00Z"}`); r["fault"] != nil {
		t.Errorf("deadline: %v", r)
	}
	if r := say(`{"version":1,"op":"destroy"}`); r["fault"] != nil {
		t.Errorf("destroy: %v", r)
	}
	if _, err := p.Attach(t.Context(), ref); fault.KindOf(err) != fault.NotFound {
		t.Errorf("attach after destroy: %v", err)
	}
}

// supervisorOfProtocol1 stands in for one that an older version of this
// program left running: its folder, its lock and its answers.
func supervisorOfProtocol1(t *testing.T, p *Provider, key string) sandbox.Ref {
	t.Helper()
	if err := makeState("test", p.dir); err != nil {
		t.Fatal(err)
	}
	const instance = "0123456789abcdef"
	dir := p.boxPath(key)
	if err := os.MkdirAll(filepath.Join(dir, "proc", "p-old"), 0o700); err != nil {
		t.Fatal(err)
	}
	const handleOf1 = `{"key":"old","instance":"0123456789abcdef","supervisor":{"pid":1,"start":1,"boot":"b"}}`
	for name, text := range map[string]string{
		specFile:            `{"version":1,"key":"old","instance":"` + instance + `","created":"2026-01-02T03:04:05Z","deadline":"2199-01-01T00:00:00Z","labels":{"run":"r"},"dir":"` + p.dir + `","identity":{"root":true,"first":1879048192,"group":0,"count":65536}}`,
		refFile:             handleOf1,
		lifeFile:            `{"init":{"pid":1,"start":1,"boot":"another"}}`,
		"proc/p-old/stdout": "hello\n",
		"proc/p-old/stderr": "",
		"log":               "",
		"unexpected":        "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	life, err := os.OpenFile(filepath.Join(dir, lifeFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(life.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { life.Close() })
	folder, err := openFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { folder.Close() })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fdPath(folder.fd(), socketFile)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	answers := map[string]string{
		"hello":    `{"version":1,"instance":"` + instance + `","state":"ready"}`,
		"health":   `{"version":1}`,
		"start":    `{"version":1}`,
		"process":  `{"version":1,"exit":{"code":7}}`,
		"wait":     `{"version":1,"exit":{"code":7}}`,
		"signal":   `{"version":1}`,
		"deadline": `{"version":1}`,
		"destroy":  `{"version":1}`,
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var q struct {
				Version int
				Op      string
			}
			if err := decodeFrame(c, &q, maxRequest); err == nil {
				answer, ok := answers[q.Op]
				if !ok {
					answer = `{"version":1,"fault":{"kind":"unsupported","text":"this supervisor does not know \"` + q.Op + `\"","hint":"It was started by an older version of this program; it goes away with its sandbox."}}`
				}
				if q.Op == "destroy" {
					_ = life.Close()
				}
				_, _ = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(answer))), answer...))
			}
			c.Close()
		}
	}()
	return sandbox.Ref{Provider: "local", Version: 1, ID: key, Handle: handleOf1}
}

func TestASupervisorOfProtocol1IsUsedForWhatItCan(t *testing.T) {
	p := newProvider(t)
	ctx := t.Context()
	ref := supervisorOfProtocol1(t, p, "old")
	again, err := p.Create(ctx, testSpec("old"))
	if err != nil || again != ref {
		t.Fatalf("create: %+v, %v", again, err)
	}
	infos, err := p.List(ctx, map[string]string{"run": "r"})
	if err != nil || len(infos) != 1 || infos[0].Ref != ref || infos[0].Paused {
		t.Fatalf("list: %+v, %v", infos, err)
	}
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Close()
	proc, err := sb.Start(ctx, "old", sandbox.Cmd{Args: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := proc.Wait(ctx); err != nil || exit.Code != 7 {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if exit, ok, err := proc.Exit(ctx); err != nil || !ok || exit.Code != 7 {
		t.Errorf("exit: %+v, %v, %v", exit, ok, err)
	}
	if out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, 100); err != nil || string(out) != "hello\n" {
		t.Errorf("output %q, %v", out, err)
	}
	if err := errors.Join(sb.Health(ctx), proc.Signal(ctx, sandbox.Kill), sb.SetDeadline(ctx, time.Now().Add(time.Hour))); err != nil {
		t.Error(err)
	}
	for name, try := range map[string]func() error{
		"pause":  func() error { return p.Pause(ctx, ref) },
		"resume": func() error { return p.Resume(ctx, ref) },
		"terminal": func() error {
			_, err := p.OpenTerminal(ctx, ref, sandbox.Cmd{Args: []string{"sh"}}, sandbox.TerminalSize{})
			return err
		},
		"dial": func() error { _, err := p.DialPort(ctx, ref, 80); return err },
	} {
		if err := try(); fault.KindOf(err) != fault.Unsupported || !strings.Contains(fault.HintOf(err), "older version") {
			t.Errorf("%s: %v, hint %q", name, err, fault.HintOf(err))
		}
	}
	if err := p.Destroy(context.Background(), ref); err != nil {
		t.Errorf("destroy: %v", err)
	}
}
