package gvisor

import (
	"fmt"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
)

func TestConformance(t *testing.T) {
	p := newProvider(t)
	another := func() (sandbox.Provider, error) { return New(testOptions(t, p.dir)), nil }
	checks := append([]conformance.Check{conformance.NewWorker(another)}, conformance.Checks...)
	t.Run("checks", func(t *testing.T) {
		for i, check := range checks {
			t.Run(check.Name, func(t *testing.T) {
				t.Parallel()
				if err := check.Run(t.Context(), p, fmt.Sprintf("check-%d", i)); err != nil {
					t.Error(err)
				}
			})
		}
	})
}
