package e2b

import (
	"fmt"
	"os"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

func TestConformance(t *testing.T) {
	srv := serve(t, e2btest.Options{})
	p := provider(t, srv)
	checks := append([]conformance.Check{conformance.NewWorker(func() (sandbox.Provider, error) { return provider(t, srv), nil })}, conformance.Checks...)
	t.Run("checks", func(t *testing.T) {
		for i, check := range checks {
			t.Run(check.Name, func(t *testing.T) {
				t.Parallel()
				if err := check.Run(t.Context(), p, fmt.Sprintf("check-%d-%d", os.Getpid(), i)); err != nil {
					t.Error(err)
				}
			})
		}
	})
	if left := srv.Sandboxes(); len(left) > 0 {
		t.Errorf("%d sandboxes are left: %+v", len(left), left)
	}
	if left := srv.Snapshots(); len(left) > 0 {
		t.Errorf("snapshots are left: %v", left)
	}
}
