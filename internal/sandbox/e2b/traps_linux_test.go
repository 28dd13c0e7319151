package e2b

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

func TestADeadlineOfTheCallerIsNeverTheProcesss(t *testing.T) {
	var told atomic.Bool
	srv := serve(t, e2btest.Options{Observe: func(r *http.Request, _ string) {
		if r.Header.Get("Connect-Timeout-Ms") != "" {
			told.Store(true)
		}
	}})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "deadline"})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	proc, err := b.Start(ctx, "long", shell("while [ ! -e go ]; do sleep 0.02; done; exit 6"))
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Upload(t.Context(), sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	if exit, err := proc.Wait(t.Context()); err != nil || exit.Code != 6 {
		t.Errorf("%+v, %v", exit, err)
	}
	if told.Load() {
		t.Error("Connect-Timeout-Ms was sent")
	}
}

func TestAProcessOutlivesEnvdAndIsFoundAgain(t *testing.T) {
	srv := serve(t, e2btest.Options{ExitRetention: time.Millisecond})
	ref, b := create(t, provider(t, srv), sandbox.Spec{Key: "envd"})
	proc, err := b.Start(t.Context(), "say", shell("echo before; while [ ! -e go ]; do sleep 0.02; done; echo after; exit 7"))
	if err != nil {
		t.Fatal(err)
	}
	srv.RestartEnvd(b.id)
	if err := b.Upload(t.Context(), sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	if exit, err := proc.Wait(t.Context()); err != nil || exit.Code != 7 {
		t.Errorf("%+v, %v", exit, err)
	}
	again, err := provider(t, srv).Attach(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if proc, err = again.Process(t.Context(), "say"); err != nil {
		t.Fatal(err)
	}
	out, err := sandbox.ReadAll(t.Context(), proc, sandbox.Stdout, 100)
	if err != nil || string(out) != "before\nafter\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestBothKindsOf429AreToldApart(t *testing.T) {
	srv := serve(t, e2btest.Options{MaxConcurrent: 1})
	p := provider(t, srv, func(o *Options) { o.Queue = time.Nanosecond })
	srv.Fault(e2btest.RateLimited("POST /v2/sandboxes", time.Second))
	begun := time.Now()
	ref, _ := create(t, p, sandbox.Spec{Key: "first"})
	if d := time.Since(begun); d < time.Second {
		t.Errorf("Retry-After of 1 s was waited for during %v", d)
	}
	_, err := p.Create(t.Context(), sandbox.Spec{Key: "second", Deadline: time.Now().Add(time.Minute)})
	if fault.KindOf(err) != fault.Unavailable || !strings.Contains(fault.HintOf(err), "--max-concurrent") {
		t.Errorf("full: %v, hint %q", err, fault.HintOf(err))
	}
	// Who queues gets the place of the one that ends.
	p.o.Queue = time.Minute
	made := make(chan error, 1)
	go func() {
		_, err := p.Create(t.Context(), sandbox.Spec{Key: "third", Deadline: time.Now().Add(time.Minute)})
		made <- err
	}()
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if err := <-made; err != nil {
		t.Error(err)
	}
}

func TestACreationThatWasNotAnsweredIsNotDoneTwice(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	srv.Fault(e2btest.Fault{On: "POST /v2/sandboxes", Lose: true})
	create(t, provider(t, srv), sandbox.Spec{Key: "lost"})
	if all := srv.Sandboxes(); len(all) != 1 {
		t.Errorf("%d sandboxes were made", len(all))
	}
}

func TestALateListDoesNotMakeASecondSandbox(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	srv.LateLists(3)
	p := provider(t, srv)
	first, _ := create(t, p, sandbox.Spec{Key: "late"})
	second, _ := create(t, p, sandbox.Spec{Key: "late"})
	if first != second || len(srv.Sandboxes()) != 1 {
		t.Errorf("%+v and %+v; %d sandboxes", first, second, len(srv.Sandboxes()))
	}
}

func TestAServiceWithoutTheSecondVersionIsSpokenToInTheFirst(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusMethodNotAllowed} {
		srv := serve(t, e2btest.Options{})
		srv.Fault(e2btest.Fault{On: "POST /v2/sandboxes", Status: status, Times: -1})
		_, b := create(t, provider(t, srv), sandbox.Spec{Key: "v1"})
		if b.envd().token == "" {
			t.Error("the sandbox is open to all")
		}
	}
}

func TestASandboxThatCannotBeReachedJustNowIsNotLost(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "reach"})
	f := e2btest.NotRunning("GET /health", b.id)
	f.Times = 2
	srv.Fault(f)
	if err := b.Health(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestASandboxThatVanishedIsNotFoundAndNobodyHangs(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "vanish"})
	proc, err := b.Start(t.Context(), "long", shell("sleep 600"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { _, err := proc.Wait(t.Context()); ended <- err }()
	srv.Kill(b.id)
	if err := <-ended; fault.KindOf(err) != fault.NotFound {
		t.Errorf("wait: %v", err)
	}
	if _, err := proc.ReadAt(t.Context(), sandbox.Stdout, make([]byte, 8), 0); fault.KindOf(err) != fault.NotFound {
		t.Errorf("read: %v", err)
	}
}

func TestA401ThatIsNoConnectIsDeniedAndShowsNoToken(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "token"})
	f := e2btest.Unauthorized("POST /process.Process/*")
	f.Times = -1
	srv.Fault(f)
	_, err := b.Start(t.Context(), "x", shell("true"))
	if fault.KindOf(err) != fault.Denied || strings.Contains(err.Error(), b.envd().token) || strings.Contains(err.Error(), srv.Key) {
		t.Errorf("%v", err)
	}
}

func TestWrongKeyAndUnknownTemplateSayWhatToDo(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	good := settingsOf(srv)
	for _, r := range []struct {
		change func(*Settings)
		kind   fault.Kind
		hint   string
	}{
		{func(s *Settings) { s.Key = "" }, fault.Denied, "E2B_API_KEY"},
		{func(s *Settings) { s.Key = "wrong" }, fault.Denied, "E2B_API_KEY"},
		{func(s *Settings) { s.Template = "no-such" }, fault.NotFound, "SANDBOX_TEMPORAL_E2B_TEMPLATE"},
		{func(s *Settings) { s.APIURL = "http://127.0.0.1:1" }, fault.Unavailable, "E2B_API_URL"},
	} {
		s := good
		r.change(&s)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		_, err := New(Options{Settings: func() Settings { return s }, Pace: -1}).Create(ctx, sandbox.Spec{Key: "x", Deadline: time.Now().Add(time.Minute)})
		cancel()
		if fault.KindOf(err) != r.kind || !strings.Contains(fault.HintOf(err), r.hint) {
			t.Errorf("%v of kind %s, hint %q; want %s, %s", err, fault.KindOf(err), fault.HintOf(err), r.kind, r.hint)
		}
	}
}

func TestAServiceWithoutRangesIsReadByTail(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "tail"})
	proc, err := b.Start(t.Context(), "say", shell("printf 0123456789"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := proc.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	f := e2btest.Fault{On: "GET /files", Status: http.StatusOK, Body: "0123456789"}
	srv.Fault(f)
	buf := make([]byte, 4)
	if n, err := proc.ReadAt(t.Context(), sandbox.Stdout, buf, 3); err != nil || string(buf[:n]) != "3456" || !b.noRange.Load() {
		t.Errorf("%q, %v", buf[:n], err)
	}
}

func TestASilentStreamIsCut(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	p := provider(t, srv)
	_, b := create(t, p, sandbox.Spec{Key: "silent"})
	srv.Fault(e2btest.Fault{On: "POST /process.Process/Start", Delay: time.Minute})
	_, err := b.envd().run(t.Context(), userAgentOf, command{Cmd: "true"}, watchdog{time.Second, 100 * time.Millisecond})
	if !errors.Is(err, errSilent) {
		t.Errorf("%v", err)
	}
}

func TestTheEndOfAPlanIsCrossedWithoutLosingTheAgent(t *testing.T) {
	srv := serve(t, e2btest.Options{MaxLifetime: 4 * time.Second})
	p := provider(t, srv, func(o *Options) { o.Lifetime, o.Margin = 4*time.Second, 2*time.Second })
	_, b := create(t, p, sandbox.Spec{Key: "plan", Deadline: time.Now().Add(time.Minute)})
	proc, err := b.Start(t.Context(), "long", shell("i=0; while [ $i -lt 90 ]; do i=$((i+1)); sleep 0.1; done; exit 8"))
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := proc.Wait(t.Context()); err != nil || exit.Code != 8 {
		t.Errorf("%+v, %v", exit, err)
	}
}

func TestOneRequestAsksForTheExitAndForWhatIsNew(t *testing.T) {
	var asked atomic.Int64
	srv := serve(t, e2btest.Options{Observe: func(r *http.Request, _ string) {
		if r.URL.Path == "/files" {
			asked.Add(1)
		}
	}})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "follow"})
	proc, err := b.Start(t.Context(), "say", shell("echo 1; while [ ! -e go ]; do sleep 0.02; done; echo 2; while [ ! -e end ]; do sleep 0.02; done; echo 3; exit 9"))
	if err != nil {
		t.Fatal(err)
	}
	var said []byte
	buf := make([]byte, 64)
	look := func() (sandbox.Exit, bool) {
		exit, ended, err := proc.Exit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n, err := proc.ReadAt(t.Context(), sandbox.Stdout, buf, int64(len(said)))
		if err != io.EOF { //nolint:errorlint // exactly
			t.Fatal(err)
		}
		said = append(said, buf[:n]...)
		return exit, ended
	}
	follow := func(to string) {
		t.Helper()
		for string(said) != to {
			if _, ended := look(); ended {
				t.Fatalf("it ended after %q", said)
			}
		}
	}
	follow("1\n")
	asked.Store(0)
	for range 10 {
		look()
	}
	if n := asked.Load(); n != 10 {
		t.Errorf("10 looks were %d requests", n)
	}
	if err := b.Upload(t.Context(), sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	follow("1\n2\n")
	// What is read ahead of a living process is not what it said in the end.
	if _, ended := look(); ended {
		t.Fatal("it ended by itself")
	}
	if _, ended, err := proc.Exit(t.Context()); err != nil || ended {
		t.Fatal(ended, err)
	}
	if err := b.Upload(t.Context(), sandbox.Workspace+"/end", strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	for {
		exit, ended := look()
		if !ended {
			continue
		}
		if exit.Code != 9 || string(said) != "1\n2\n3\n" {
			t.Errorf("%+v after %q", exit, said)
		}
		return
	}
}

func TestALimitThatDoesNotEndAndAnOutageSayWhatToDo(t *testing.T) {
	always := func(f e2btest.Fault) *e2btest.Fault { f.Times = -1; return &f }
	for name, r := range map[string]struct {
		fault  *e2btest.Fault
		change func(*Settings)
		hint   string
	}{
		"asked too often":  {fault: always(e2btest.RateLimited("GET /v2/sandboxes", 0)), hint: "SANDBOX_TEMPORAL_E2B_PLAN"},
		"too many at once": {fault: always(e2btest.Full("GET /v2/sandboxes", 20)), hint: "--max-concurrent"},
		"an outage":        {fault: always(e2btest.Fault{On: "GET /v2/sandboxes", Status: http.StatusServiceUnavailable}), hint: "https://status.e2b.dev"},
		"nobody listens":   {change: func(s *Settings) { s.APIURL = "http://127.0.0.1:1" }, hint: "E2B_API_URL"},
		"no such name":     {change: func(s *Settings) { s.APIURL = "http://api.nowhere.invalid" }, hint: "E2B_API_URL"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := serve(t, e2btest.Options{})
			s := settingsOf(srv)
			if r.fault != nil {
				srv.Fault(*r.fault)
			}
			if r.change != nil {
				r.change(&s)
			}
			_, err := New(Options{Settings: func() Settings { return s }}).List(t.Context(), nil)
			if fault.KindOf(err) != fault.Unavailable || !strings.Contains(fault.HintOf(err), r.hint) {
				t.Errorf("%v of kind %s, hint %q", err, fault.KindOf(err), fault.HintOf(err))
			}
		})
	}
}
