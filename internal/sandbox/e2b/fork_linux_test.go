package e2b

import (
	"net/http"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

func TestForksOfOneCallFailAlone(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	_, b := create(t, provider(t, srv), sandbox.Spec{Key: "fork"})
	srv.Fault(e2btest.Fault{On: "POST /sandboxes/*/fork", Fork: map[int]int{1: http.StatusTooManyRequests}})
	forks, err := b.c.fork(t.Context(), b.id, 3, time.Minute)
	if err != nil || len(forks) != 3 {
		t.Fatalf("%d forks, %v", len(forks), err)
	}
	for i, f := range forks {
		err := f.err(srv.Key)
		if (err == nil) == (i == 1) {
			t.Errorf("fork %d: %v", i, err)
		}
		if err == nil {
			if err := b.c.kill(t.Context(), f.Sandbox.ID); err != nil {
				t.Error(err)
			}
		}
	}
	for _, count := range []int{0, 101} {
		if _, err := b.c.fork(t.Context(), b.id, count, time.Minute); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%d forks: %v", count, err)
		}
	}
}
