package e2b

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// says runs a command in the sandbox.
func says(t *testing.T, b *box) {
	t.Helper()
	out, _, exit, err := sandbox.Output(t.Context(), b, "say", shell("echo here"), 100)
	if err != nil || exit.Code != 0 || string(out) != "here\n" {
		t.Errorf("%q, %+v, %v", out, exit, err)
	}
}

func TestAServiceWithAddressesAndKeysOfItsOwnIsSpokenTo(t *testing.T) {
	srv := serve(t, e2btest.Options{Key: "bsx_of-another-form"})
	at, err := url.Parse(srv.APIURL())
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]Settings{
		"sandboxes by path": {APIURL: srv.APIURL() + "/kruise/api/", SandboxURL: srv.APIURL() + "/kruise/{sandbox}/{port}"},
		"sandboxes by head": {APIURL: srv.APIURL(), SandboxURL: srv.SandboxURL() + "/"},
		"E2B_DEBUG":         {Debug: true},
	} {
		t.Run(name, func(t *testing.T) {
			s.Key, s.Plan = srv.Key, "pro"
			p := New(Options{Settings: func() Settings { return s }, Pace: -1})
			c, err := p.connect()
			if err != nil {
				t.Fatal(err)
			}
			if s.Debug { // nobody may listen there
				c.http.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
					if address != "localhost:3000" && address != "localhost:49983" {
						return nil, fmt.Errorf("%s was asked for", address)
					}
					return new(net.Dialer).DialContext(ctx, network, at.Host)
				}
			}
			ref, b := create(t, p, sandbox.Spec{Key: "own"})
			says(t, b)
			if err := p.Destroy(t.Context(), ref); err != nil {
				t.Error(err)
			}
		})
	}
}

// What services that are not E2B's leave out, as they answer then: forks run
// there all the same, and what cannot be done is said.
func TestAServiceThatSpeaksAPartOfTheProtocolIsUsedAsFarAsItGoes(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			srv := serve(t, e2btest.Options{})
			absent := []string{"GET /v2/sandboxes", "POST /sandboxes/*/timeout", "POST /sandboxes/*/pause", "* /snapshots", "POST /sandboxes/*/snapshots", "POST /sandboxes/*/fork"}
			if status != http.StatusNotImplemented {
				absent = append(absent, "POST /v2/sandboxes")
			}
			for _, on := range absent {
				srv.Fault(e2btest.Fault{On: on, Status: status, Times: -1})
			}
			p := provider(t, srv)
			ref, b := create(t, p, sandbox.Spec{Key: "part", Labels: map[string]string{sandbox.LabelRun: "r"}})
			says(t, b)
			if infos, err := p.List(t.Context(), map[string]string{sandbox.LabelRun: "r"}); err != nil || len(infos) != 1 || infos[0].Ref != ref {
				t.Errorf("list: %+v, %v", infos, err)
			}
			if infos, err := p.List(t.Context(), map[string]string{sandbox.LabelRun: "another"}); err != nil || len(infos) != 0 {
				t.Errorf("list of another run: %+v, %v", infos, err)
			}
			// More time is asked for in another way.
			if err := b.SetDeadline(t.Context(), time.Now().Add(30*time.Minute)); err != nil {
				t.Errorf("deadline: %v", err)
			}
			if m, err := b.c.get(t.Context(), b.id); err != nil || time.Until(m.End) < 25*time.Minute {
				t.Errorf("it ends in %v, %v", time.Until(m.End), err)
			}
			_, forkErr := b.c.fork(t.Context(), b.id, 2, time.Minute)
			for what, err := range map[string]error{
				"pause": p.Pause(t.Context(), ref), "base": p.Base(t.Context(), "base"), "snapshot": p.Snapshot(t.Context(), ref, "base"), "fork": forkErr,
			} {
				if fault.KindOf(err) != fault.Unsupported || !strings.Contains(fault.HintOf(err), "only a part of E2B's protocol") {
					t.Errorf("%s: %v of kind %s, hint %q", what, err, fault.KindOf(err), fault.HintOf(err))
				}
			}
			if bases, err := p.Bases(t.Context()); err != nil || len(bases) > 0 {
				t.Errorf("bases: %v, %v", bases, err)
			}
			if err := p.RemoveBase(t.Context(), "base"); err != nil {
				t.Errorf("remove a base: %v", err)
			}
			says(t, b)
			if err := p.Destroy(t.Context(), ref); err != nil {
				t.Error(err)
			}
			// One that is gone is gone, and no call that is not known.
			if err := b.c.pause(t.Context(), b.id); statusOf(err) == 0 && status == http.StatusNotFound {
				t.Errorf("pause of what is gone: %v", err)
			}
		})
	}
}

func TestCreationsKeepThePaceOfThePlan(t *testing.T) {
	for name, want := range map[string]plan{"": {time.Second, time.Hour}, "hobby": {time.Second, time.Hour}, "pro": {200 * time.Millisecond, 24 * time.Hour}} {
		p := New(Options{Settings: func() Settings { return Settings{Key: "k", Plan: name} }})
		c, err := p.connect()
		if err != nil || c.plan != want {
			t.Errorf("plan %q: %+v, %v; want %+v", name, c.plan, err, want)
		}
	}
	const pace = 150 * time.Millisecond
	var mu sync.Mutex
	var made []time.Time
	srv := serve(t, e2btest.Options{Observe: func(r *http.Request, _ string) {
		if r.Method == http.MethodPost && r.URL.Path == "/v2/sandboxes" {
			mu.Lock()
			made = append(made, time.Now())
			mu.Unlock()
		}
	}})
	p := provider(t, srv, func(o *Options) { o.Pace = pace })
	var wg sync.WaitGroup
	begun := time.Now()
	for i := range 4 {
		wg.Go(func() {
			if _, err := p.Create(t.Context(), sandbox.Spec{Key: fmt.Sprintf("pace-%d", i), Deadline: time.Now().Add(time.Minute)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	if len(made) != 4 || made[3].Sub(begun) < 3*pace {
		t.Errorf("%d were made, the last after %v", len(made), made[len(made)-1].Sub(begun))
	}
}

func TestListsAreReadPageByPageToTheirEnd(t *testing.T) {
	var mu sync.Mutex
	pages := 0
	srv := serve(t, e2btest.Options{Observe: func(r *http.Request, _ string) {
		if r.Method == http.MethodGet && r.URL.Path == "/v2/sandboxes" {
			mu.Lock()
			pages++
			mu.Unlock()
		}
	}})
	p := provider(t, srv)
	c, err := p.connect()
	if err != nil {
		t.Fatal(err)
	}
	const all = 230
	for i := range all {
		spec := sandbox.Spec{Key: fmt.Sprintf("page-%d", i), Deadline: time.Now().Add(time.Hour), Labels: map[string]string{sandbox.LabelRun: fmt.Sprint("r", i%2)}}
		if _, err := c.create(t.Context(), newMachine{Template: DefaultTemplate, Timeout: 3600, Metadata: metadata(spec, newNonce())}); err != nil {
			t.Fatal(err)
		}
	}
	for want, labels := range map[int]map[string]string{all: nil, all / 2: {sandbox.LabelRun: "r1"}} {
		infos, err := p.List(t.Context(), labels)
		seen := map[string]bool{}
		for _, i := range infos {
			seen[i.Ref.ID] = true
		}
		if err != nil || len(infos) != want || len(seen) != want {
			t.Errorf("%d of %d, %d of them once, %v", len(infos), want, len(seen), err)
		}
	}
	if pages != 3+2 {
		t.Errorf("%d pages were read", pages)
	}
	// A page that leads back to itself has no end.
	srv.Fault(e2btest.Fault{On: "GET /v2/sandboxes", Status: http.StatusOK, Header: http.Header{"X-Next-Token": {"again"}}, Body: "[]", Times: -1})
	if _, err := p.List(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "without an end") {
		t.Errorf("%v", err)
	}
}

// A fork of E2B's has the metadata of its source, and so our labels and our key.
func TestAForkThatSomebodyMadeOfOursIsNotTakenForIt(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	first := provider(t, srv)
	spec := sandbox.Spec{Key: "source", Deadline: time.Now().Add(time.Hour)}
	ref, b := create(t, first, spec)
	forks, err := b.c.fork(t.Context(), b.id, 2, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range forks {
		if err := f.err(); err != nil {
			t.Fatal(err)
		}
	}
	again, err := provider(t, srv).Create(t.Context(), spec) // a worker that knows nothing
	if err != nil || again != ref {
		t.Errorf("%+v, %v; want %+v", again, err, ref)
	}
	// A clean-up sees all of them.
	if infos, err := first.List(t.Context(), nil); err != nil || len(infos) != 3 {
		t.Errorf("%+v, %v", infos, err)
	}
}

// E2B's own example: a sandbox of the default size costs about $0.109 an hour.
func TestWhatASandboxOfE2BCostsIsKnownAndThatOfOthersIsNot(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	p := provider(t, srv)
	ref, _ := create(t, p, sandbox.Spec{Key: "price"})
	price := func(s Settings) (int64, bool) {
		infos, err := p.List(t.Context(), nil)
		if err != nil || len(infos) != 1 {
			t.Fatalf("%+v, %v", infos, err)
		}
		return New(Options{Settings: func() Settings { return s }}).HourlyPrice(infos[0])
	}
	if got, ok := price(Settings{Key: "k"}); !ok || got != 108_900_000 {
		t.Errorf("%d, %v", got, ok)
	}
	for _, s := range []Settings{settingsOf(srv), {Domain: "example.com"}, {Debug: true}} {
		if got, ok := price(s); ok {
			t.Errorf("%+v: %d", s, got)
		}
	}
	if err := p.Pause(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if got, ok := price(Settings{Key: "k"}); !ok || got != 0 {
		t.Errorf("while it is paused: %d, %v", got, ok)
	}
	if got, ok := p.HourlyPrice(sandbox.Info{}); ok {
		t.Errorf("of unknown size: %d", got)
	}
}
