package activities

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact/s3test"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// inBucket has a world keep its artifacts on a server.
func (w *world) inBucket(t *testing.T) *s3test.Server {
	t.Helper()
	srv, err := s3test.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	w.Artifacts, err = artifact.Open(t.Context(), srv.Place("team-a"), artifact.WithPause(func(int) time.Duration { return 0 }),
		artifact.WithKeys(func() artifact.Keys { return artifact.Keys{ID: s3test.KeyID, Secret: s3test.Secret} }))
	if err != nil {
		t.Fatal(err)
	}
	return srv
}

// A fork is hours of somebody's money; its store is a server that is upgraded
// now and then.
func TestAnAgentOutlastsAStoreThatIsAway(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	srv := w.inBucket(t)
	p := plan("", "x")
	p.Agent, p.AgentCommand = "command", "echo begun; echo done"
	spec, ref := w.start(t, p)

	var mu sync.Mutex
	given := 0 // requests that were given up
	srv.Fail(func(r *http.Request) s3test.Fault {
		if !strings.Contains(r.URL.Path, fork.TranscriptName(1)) {
			return s3test.Fault{}
		}
		mu.Lock()
		defer mu.Unlock()
		if strings.HasPrefix(r.Header.Get("Amz-Sdk-Request"), "attempt=5;") {
			given++
		}
		if given > 3 {
			return s3test.Fault{}
		}
		return s3test.Fault{Status: 503, Code: "SlowDown"}
	})
	out, err := w.RunAgent(t.Context(), runInput(spec, ref))
	if err != nil || out.Status != fork.Success {
		t.Fatalf("%+v, %v", out, err)
	}
	r, err := w.Artifacts.Get(t.Context(), artifact.RunKey(spec.Run, spec.Num, fork.TranscriptName(1)))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !strings.Contains(string(got), "begun\ndone") {
		t.Errorf("the transcript is %q, %v", got, err)
	}
	mu.Lock()
	defer mu.Unlock()
	if given <= 3 {
		t.Errorf("the store was away for %d looks at it", given)
	}
}

func TestWhatLiesInABucketIsRemovedAfterThirtyDays(t *testing.T) {
	t.Parallel()
	w, ctx := setUp(t), t.Context()
	w.inBucket(t)
	for _, run := range []string{"sandbox-orch-0000000a", "sandbox-orch-0000000b"} {
		for _, name := range []string{"transcript", "refused"} {
			if err := w.Artifacts.Put(ctx, artifact.RunKey(run, 1, name), strings.NewReader("x")); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.states["sandbox-orch-0000000b"] = orchestrator.RunState{Known: true}
	for _, c := range []struct {
		after time.Duration
		want  string
	}{
		{time.Hour, ""},
		{RunAge + time.Hour, "sandbox-orch-0000000a"},
		{RunAge + 2*time.Hour, ""},
	} {
		s := &scan{a: w.Activities, now: time.Now().Add(c.after), states: map[owner]answer{}}
		gone := ""
		for _, item := range s.files(ctx, false, storedLimit) {
			if item.Removed {
				gone += item.Run
			}
		}
		if gone != c.want {
			t.Errorf("after %v %q is removed, want %q", c.after, gone, c.want)
		}
	}
	var left []string
	for o, err := range w.Artifacts.List(ctx, "runs") {
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, o.Key)
	}
	if len(left) != 2 || !strings.HasPrefix(left[0], "runs/sandbox-orch-0000000b/") {
		t.Errorf("left: %q", left)
	}
}
