package e2b

import (
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// serve starts a server whose sandboxes work, or skips the test.
func serve(t testing.TB, o e2btest.Options) *e2btest.Server {
	t.Helper()
	if err := e2btest.Supported(); err != nil {
		t.Skipf("no sandboxes of E2B can be made here: %v", err)
	}
	srv := e2btest.New(o)
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return srv
}

func settingsOf(srv *e2btest.Server) Settings {
	return Settings{Key: srv.Key, APIURL: srv.APIURL(), SandboxURL: srv.SandboxURL(), Plan: "pro"}
}

// provider makes one that talks to the server, as fast as that is.
func provider(t testing.TB, srv *e2btest.Server, change ...func(*Options)) *Provider {
	t.Helper()
	s := settingsOf(srv)
	o := Options{Settings: func() Settings { return s }, Dir: t.TempDir(), Pace: -1}
	for _, f := range change {
		f(&o)
	}
	return New(o)
}

// create makes a sandbox that is destroyed with the test.
func create(t testing.TB, p *Provider, spec sandbox.Spec) (sandbox.Ref, *box) {
	t.Helper()
	if spec.Deadline.IsZero() {
		spec.Deadline = time.Now().Add(10 * time.Minute)
	}
	ref, err := p.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.attach(t.Context(), "test", ref)
	if err != nil {
		t.Fatal(err)
	}
	return ref, b
}

func shell(script string) sandbox.Cmd { return sandbox.Cmd{Args: []string{"sh", "-c", script}} }
